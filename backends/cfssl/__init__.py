"""
CloudFlare's cfssl as a CA: `cfssl serve` (a process for each CA) or `multirootca` (one process for several).

A request holds the CSR and a profile's name, so the server copies the CSR's subject and SANs, and the profile decides
usages and validity. The API is doc/api/ of https://github.com/cloudflare/cfssl; the rest was measured with version
1.6.5.
"""

from __future__ import annotations

import base64
import functools
import hmac
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from typing import Any

from cryptography import x509
from requests import Response

from backends.cfssl.settings import API, EKU_NAMES, MIN_KEY_BYTES, CfsslSettings, setup_files
from backends.http import Http, OverHttp, Wording, json_object, listed, retry_after_seconds, without
from backends.settings import common_name, is_https, read_secret, tls_context
from bridge.contract import Issued, Names, PlannedCertificate, Secret, Selector, SignRequest
from bridge.errors import BackendRefusedError, BackendUnavailableError, LocalFileError, Violation
from bridge.pki.certificates import is_signed_by, load_pem_certificates
from bridge.specs import PODS, CertificateSpec
from bridge.words import one_line


class CfsslBackend(OverHttp):
    """One CA behind a cfssl server."""

    settings_type = CfsslSettings
    setup = staticmethod(setup_files)
    names_beside_csr = True

    def __init__(self, settings: CfsslSettings) -> None:
        self._settings = settings
        self._profile = Selector(settings.profile, settings.profiles, settings.node)
        self._label = {"label": settings.label} if settings.label else {}
        silent = "" if is_https(settings.url) else "does the server speak TLS? url says http://"
        wording = Wording(name="cfssl", not_ours=_HINTS[_NOT_CFSSL], tls=_tls_hint, silent=silent)
        tls = functools.partial(tls_context, settings.ca_file, settings.client_cert, settings.client_key)
        self._http = Http(wording, settings.url, settings.timeout, tls)
        self._issuer: x509.Certificate | None = None  # the CA's certificate at the last look

    def sign(self, request: SignRequest) -> Issued:
        """Have the server sign one CSR (`bridge.contract.Backend`); the profile decides the validity."""
        issuer = self._issuer or self.issuers()[0]  # look before signing, so that an error here loses no certificate
        profile = self._profile(request.spec)
        # text around the block may be in any encoding
        csr = request.csr_pem.decode("ascii", "replace")
        body = self._body(csr, profile, self._key_place(request.spec), request.names)
        result = self._result(self._post(self._settings.endpoint, body), profile)
        leaf = _certificate(result)
        if not is_signed_by(leaf, issuer):  # the CA has another certificate by now
            [issuer] = self.issuers()
        return Issued(leaf=leaf, intermediates=() if issuer.subject == issuer.issuer else (issuer,))

    def check(self, specs: Sequence[CertificateSpec]) -> dict[str, list[Violation]]:
        """Ask for each profile's usages, and whether the server accepts us; no certificate is made."""
        offer = functools.cache(self._offer)
        no_entry = functools.cache(self._no_entry)
        unknown = f"no-such-profile-{secrets.token_hex(8)}"
        violations = {}
        for spec in specs:
            profile = self._profile(spec)
            usages = _usage_violations(spec, profile, offer(profile), lambda: offer(unknown))
            violations[spec.name] = usages or no_entry(profile, self._key_place(spec))
        return {name: violations for name, violations in violations.items() if violations}

    def check_whole(self, wanted: Sequence[PlannedCertificate]) -> dict[str, list[Violation]]:
        """Compare the lifetimes that the profiles give; all else is copied from the CSR."""
        offer = functools.cache(self._offer)
        violations = {}
        for planned in wanted:
            profile = self._profile(planned.spec)
            gives = _go_duration(offer(profile).expiry)
            if gives is not None and gives < planned.at_least:
                least = f"{planned.at_least.days}d" if planned.at_least.days else f"{planned.at_least}"
                want = f"at least {least}, or its answer is refused"
                violation = Violation(subject=f"profile {profile}: expiry", want=want, got=offer(profile).expiry)
                violations[planned.spec.name] = [violation]
        return violations

    def advice(self, spec: CertificateSpec) -> str:
        """Name the profile, and the HMAC key for it."""
        setup = f"`ca-bridge setup cfssl --authority {spec.authority.name}`"
        return f"compare profile {self._profile(spec)}, and the HMAC key if that is refused, with what {setup} prints"

    def clock_ahead(self) -> timedelta | None:
        """How far the server's clock is ahead, by the header `Date` of its latest answer."""
        return self._http.clock_ahead

    def issuers(self) -> list[x509.Certificate]:
        """The CA's certificate; the server does not give the chain above it."""
        self._issuer = _certificate(self._result(self._post("info", self._label), ""))
        return [self._issuer]

    def revoke(self, certificate: x509.Certificate) -> None:
        """Have the server mark a certificate in its database; anyone who reaches the server can do that."""
        try:
            known = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        except (x509.ExtensionNotFound, ValueError):
            known = None
        if known is None:
            raise BackendRefusedError("cfssl: the certificate has no authority key identifier, by which cfssl revokes")
        serial, authority = str(certificate.serial_number), known.hex()
        body = {"serial": serial, "authority_key_id": authority, "reason": "superseded"}
        reply = self._post("revoke", body)
        if reply.message == _NOT_FOUND:
            text = f"cfssl: can't revoke {certificate.serial_number:x}: this server has no endpoint for it"
            hint = "`revoke` is disabled there (as `ca-bridge setup cfssl` has it), or the server has no database"
            raise BackendRefusedError(text, hint=hint)
        self._result(reply, "")

    def identity(self) -> str:
        """The client certificate's CN; an HMAC key has no name."""
        return common_name(self._settings.client_cert, "cfssl")

    def _post(self, endpoint: str, body: Mapping[str, object]) -> _Reply:
        """Send one request to an endpoint; raises as `Http.request`."""
        url = f"{self._settings.url.rstrip('/')}{API}/{endpoint}"
        return _parse(self._http.request("POST", url, json=body), body)

    def _offer(self, profile: str) -> _Offer:
        """The usages and the validity that a profile of the server gives (`info`)."""
        info = self._result(self._post("info", {"profile": profile, **self._label}), profile)
        self._issuer = _certificate(info)
        listed = info.get("usages")
        usages = map(str, listed) if isinstance(listed, list) else ()
        # cfssl has two names for this usage
        names = frozenset("digital signature" if usage == "signing" else usage for usage in usages)
        return _Offer(usages=names, expiry=str(info.get("expiry")))

    def _no_entry(self, profile: str, key_place: Secret | None) -> list[Violation]:
        """Ask for a signature without a CSR, since the server checks the HMAC first."""
        reply = self._post(self._settings.endpoint, self._body("", profile, key_place))
        if reply.message in _NO_ENTRY:
            subject = f"{self._settings.endpoint} with profile {profile}"
            return [Violation(subject=subject, want="that the server accepts us", got=reply.message)]
        if reply.code is None:
            self._result(reply, profile)
        return []

    def _body(self, csr: str, profile: str, key_place: Secret | None, names: Names | None = None) -> dict[str, object]:
        request: dict[str, object] = {"certificate_request": csr, "profile": profile, **self._label}
        if names is not None:  # instead of the CSR's
            request |= {"hosts": [*names.uris, *names.dns], "subject": {"CN": names.common_name}}
        if key_place is None:
            return request
        text = json.dumps(request).encode()
        token = hmac.digest(_read_key(key_place), text, "sha256")
        return {"token": base64.b64encode(token).decode(), "request": base64.b64encode(text).decode()}

    def _key_place(self, spec: CertificateSpec) -> Secret | None:
        secret = self._settings.auth_key
        return secret and Secret(secret.kind, Selector(secret.where, node=self._settings.node)(spec))

    def _result(self, reply: _Reply, profile: str) -> Mapping[str, Any]:
        """Return a success's result; the one place where cfssl's errors become ours."""
        if reply.result is not None:
            return reply.result
        code, status = "" if reply.code is None else f", code {reply.code}", reply.response.status_code
        text = f"cfssl: {reply.message} (HTTP {status}{code})"
        if status in _LATER_STATUSES or reply.code in _LATER_CODES:
            raise BackendUnavailableError(text, retry_after_seconds=retry_after_seconds(reply.response))
        hint = _HINTS.get(reply.message) or _HINTS.get(reply.code, "the server's log may say more")
        raise BackendRefusedError(text, hint=hint.format(profile=repr(profile), label=repr(self._settings.label)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offer:
    usages: frozenset[str]  #: cfssl's names.
    expiry: str


def _go_duration(text: str) -> timedelta | None:
    """Parse a duration as Go writes it (`8760h0m0s`), in its larger units; None for anything else."""
    parts = re.fullmatch(r"(?:([0-9]{1,8})h)?(?:([0-9]{1,8})m)?(?:([0-9]{1,8})(?:\.[0-9]+)?s)?", text)
    if parts is None or not text:
        return None
    hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return timedelta(hours=hours, minutes=minutes, seconds=seconds)


def _usage_violations(
    spec: CertificateSpec, profile: str, offer: _Offer, default: Callable[[], _Offer]
) -> list[Violation]:
    """Check for kubeadm's key usages and exactly the spec's EKUs; `default` is the answer for an unknown profile."""
    want = {"digital signature", "key encipherment"} | {EKU_NAMES[eku] for eku in spec.ekus}
    needless = {"key encipherment"} if spec.authority == PODS else set()  # SPIFFE certificates need no such usage
    if want - needless <= offer.usages <= want:
        return []
    unknown = "unknown or without these usages" if offer == default() else "without these usages"
    return [Violation(subject=f"profile {profile}, {unknown}", want=listed(want), got=listed(offer.usages))]


def _certificate(result: Mapping[str, Any]) -> x509.Certificate:
    pem = result.get("certificate")
    try:
        found = load_pem_certificates(pem.encode() if isinstance(pem, str) else b"")
    except ValueError:
        found = []
    if len(found) != 1:
        wanted = f"cfssl: wanted one PEM certificate in the answer, found {len(found)} that can be read"
        raise BackendRefusedError(wanted, hint=_HINTS[_NOT_CFSSL])
    return found[0]


def _read_key(place: Secret) -> bytes:
    hint = "a good one: openssl rand -hex 32 (the server must have the same)"
    text = read_secret(place, "cfssl: HMAC key", f"put it there; {hint}")
    if not re.fullmatch("([0-9a-fA-F]{2})+", text):
        found = f"{len(text)} characters that are not"
        raise LocalFileError(f"cfssl: wanted pairs of hexadecimal digits in {place}, found {found}", hint=hint)
    key = bytes.fromhex(text)
    if len(key) < MIN_KEY_BYTES:
        found = f"{len(key)} bytes"
        raise LocalFileError(f"cfssl: wanted {MIN_KEY_BYTES} bytes or more in {place}, found {found}", hint=hint)
    return key


#: Statuses and codes that may pass: from a proxy in front (RFC 9110 §15.6, RFC 6585 §4), the certificate database is
#: locked (the server signed, but keeps it), the server's own upstream failed. The last two come with status 400.
_LATER_STATUSES = frozenset({429, 502, 503, 504})
_LATER_CODES = frozenset({11000, 7400})

#: Messages by which the server refuses this profile and key before it looks at the CSR.
_NO_ENTRY = frozenset(
    {"invalid token", "no authentication provider", "authentication required", "authorisation required"}
    | {"invalid profile", "bad label", "not authorised", "404 page not found"}
)

_NOT_FOUND = "404 page not found"
_UNKNOWN_PROFILE = "does the server have profile {profile}? for an unknown one it uses its default profile"
_NOT_CFSSL = "wanted an answer of cfssl, found something else"
_WHICH_LABEL = "is {label} a label in the server's roots file? the reason is in its log, never in its answers"
#: What to do next, by message if that says more than the code.
_HINTS: Mapping[str | int | None, str] = {
    "invalid token": "either the HMAC key is not that of profile {profile}, or the server has no such profile: both "
    "look alike; compare auth_key and profile with the server's configuration",
    "no authentication provider": "profile {profile} is unknown to the server, or has no auth_key there",
    "authentication required": 'the server wants an HMAC for profile {profile}: endpoint = "authsign", auth_key_file',
    "authorisation required": "profile {profile} has no auth_key in the server's configuration, and needs one",
    "invalid profile": "the server has no profile {profile}",
    "bad label": _WHICH_LABEL,
    "bad request": _WHICH_LABEL,
    "not authorised": "this machine's address is in none of the `nets` of the server's roots file",
    "Invalid CN": "the server's -mutual-tls-cn does not match the CN of client_cert",
    _NOT_FOUND: "is the url right, are `info` and the signing endpoint enabled, and is the CA loaded? "
    "`cfssl serve` runs on without its CA or key, without /sign where every profile has an auth_key, and without /authsign where none has",
    "Client sent an HTTP request to an HTTPS server.": "url must begin with https://",
    _NOT_CFSSL: "is it a cfssl server that answers at this url?",
    1000: "the server's CA key does not fit its CA certificate, or its profile has a lint_error_level",
    5100: _UNKNOWN_PROFILE,
    5300: "the CSR asks for what profile {profile} never gives, such as a CA certificate",
    5400: _UNKNOWN_PROFILE,
    11200: "the server's database knows no such certificate",
    5500: "the CN or a SAN does not match the name_whitelist of profile {profile}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    response: Response
    result: Mapping[str, Any] | None = None  #: The result of a success.
    code: int | None = None  #: cfssl's error code.
    message: str = ""


#: Answers of cfssl's own that are not JSON. Others are not quoted: they may hold anything.
_PLAIN = frozenset({"404 page not found", "Invalid CN", "Client sent an HTTP request to an HTTPS server."})


def _parse(response: Response, sent: Mapping[str, object]) -> _Reply:
    """Read status and envelope; a request that the answer quotes is not shown, since anyone could send it again."""
    envelope = json_object(response.content)
    if envelope is None or "success" not in envelope:
        text = response.content.decode("utf-8", "replace").strip()
        return _Reply(response=response, message=text if text in _PLAIN else _NOT_CFSSL)
    result = envelope.get("result")
    if response.status_code == HTTPStatus.OK and envelope["success"] is True and isinstance(result, dict):
        return _Reply(response=response, result=result)
    errors = envelope.get("errors")
    first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    code, secrets_sent = first.get("code"), [str(sent.get(key, "")) for key in ("token", "request")]
    message = one_line(without(str(first.get("message", "no reason given")), secrets_sent))
    return _Reply(response=response, code=code if isinstance(code, int) else None, message=message)


def _tls_hint(reason: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return "ca_file must hold the CA of the server's TLS certificate, and its SANs the name in url"
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason:
        return "does the server speak plain HTTP? cfssl does when one of -tls-cert and -tls-key is missing"
    return (
        "the server may want a client certificate, or another one (client_cert and client_key: from the CA of its "
        "-mutual-tls-ca, good for clientAuth), or may not speak TLS 1.2"
    )
