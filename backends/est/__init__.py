"""
EST, "Enrollment over Secure Transport" (RFC 7030, RFC 8951), over HTTPS.

A request holds only the CSR: the *label* in the URL, the client, or the server's default decides what the certificate
is for. So each usage class has a label, and the bridge verifies the answer as always. `simplereenroll` is not used,
since it needs the key of the certificate that is renewed, which no backend gets. Details that the RFCs leave open were
measured with GlobalSign's estserver 1.0.6.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import re
import shlex
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7
from requests import Response
from requests.auth import HTTPBasicAuth

from backends.http import LATER_STATUSES, Http, OverHttp, Wording, retry_after_seconds, without
from backends.settings import common_name, pair_problems, read_secret, tls_context, url_problems
from bridge.contract import BackendSettings, Issued, Pending, Secret, Selector, SetupFile, SetupRequest, SignRequest
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    NoVerdictError,
    SettingsProblem,
    Violation,
)
from bridge.pki.certificates import (
    UNREADABLE,
    csr_fingerprint,
    extended_key_usages,
    is_for,
    is_signed_by,
    name_text,
    san_entries,
)
from bridge.pki.expiry import day, minute
from bridge.specs import EKU, SPECS, CertificateSpec
from bridge.system.paths import open_regular
from bridge.words import escaped, one_line

#: A long Retry-After, or a clock that was set back, must not delay the next try until the certificate has expired.
LONGEST_RETRY_AFTER = timedelta(days=1)
#: Names that no label may have (RFC 7030 §3.2.2).
OPERATIONS = frozenset({"cacerts", "simpleenroll", "simplereenroll", "fullcmc", "serverkeygen", "csrattrs"})


@dataclass(frozen=True, kw_only=True)
class EstSettings(BackendSettings):
    """Keys of a backend of type `est`."""

    url: str  #: The server's URL without `/.well-known/est`; a path of a reverse proxy stays in it.
    #: A pattern: `{name}` is the certificate, `{usage}` its usage class (server, client, peer), `{node}` the node. It
    #: may have several segments. If empty, the server's default.
    label: str = ""
    labels: dict[str, str] = field(default_factory=dict)  #: Other labels, by certificate or usage class.
    ca_file: Path | None = None  #: CA certificates (PEM) for the server's TLS certificate; if not set, the system's.
    #: The client certificate of an agent, with its chain; not a certificate of the control plane.
    client_cert: Path | None = None
    client_key: Path | None = None  #: The key of `client_cert`.
    username: str = ""  #: A user name, instead of a client certificate or in addition to it.
    password: Secret | None = None  #: The password of `username`.

    def tls_context(self) -> ssl.SSLContext:
        """A TLS context for one thread; see `backends.settings.tls_context`."""
        context = tls_context(self.ca_file, self.client_cert, self.client_key)
        # A server may want the certificate for some URLs only, and TLS 1.3 knows no renegotiation (RFC 8446 §4.6.2).
        context.post_handshake_auth = self.client_cert is not None
        return context

    def problems(self) -> Iterator[SettingsProblem]:
        """Find settings that contradict each other, or would make no URL."""
        wanted = f"https://HOST[:PORT] (EST knows no other), without /{ROOT} and what follows it"
        yield from url_problems(self.url, wanted, suffix=ROOT)
        yield from Selector(self.label, self.labels).problems("label", "labels", self.pairs)
        for key, label in {"label": self.label, **{f"labels.{k}": v for k, v in self.labels.items()}}.items():
            yield from _label_problems(key, label)
        yield from pair_problems(self.client_cert, self.client_key)
        if bool(self.username) != (self.password is not None):
            missing = "password_file" if self.username else "username"
            yield SettingsProblem(missing, "both of username and password_file, or neither", "one of them")
        if ":" in self.username:  # RFC 7617 §2
            yield SettingsProblem("username", "a name without a colon", "one in it")


def _label_problems(key: str, label: str) -> Iterator[SettingsProblem]:
    segments = label.split("/") if label else []
    if not all(segment.isprintable() and segment not in {"", ".", ".."} and "%" not in segment for segment in segments):
        wanted = "a label, or several with one / between them, in plain text (they are percent-encoded here)"
        yield SettingsProblem(key, wanted, repr(label))
    elif named := OPERATIONS.intersection(segments):
        yield SettingsProblem(key, "a label that is not called like an operation of EST", ", ".join(sorted(named)))


class EstBackend(OverHttp):
    """One CA behind an EST server."""

    settings_type = EstSettings

    def __init__(self, settings: EstSettings) -> None:
        self._settings = settings
        self._label = Selector(settings.label, settings.labels, settings.node)
        self._cas: dict[str, Sequence[x509.Certificate]] = {}  #: CA certificates by label, as last seen.
        wording = Wording(
            name="est", not_ours=_NOT_EST, tls=functools.partial(_tls_hint, settings), cut_off=_CUT_OFF_HINT
        )
        self._http = Http(wording, settings.url, settings.timeout, settings.tls_context)

    @classmethod
    def setup(cls, wanted: SetupRequest) -> Sequence[SetupFile]:
        """Write a page for the authority, with the settings' labels or one for each usage class."""
        each_usage = f"{wanted.authority.name}-{{usage}}"  # whose label gives its own EKUs
        label = Selector(wanted.settings.get("label") or each_usage, wanted.settings.get("labels") or {}, wanted.node)
        by_label: dict[str, list[CertificateSpec]] = {}
        for name in wanted.certificates:
            by_label.setdefault(label(SPECS[name]), []).append(SPECS[name])
        url = str(wanted.settings.get("url", "https://est.corp.example")).rstrip("/")
        parts = [_HEAD.format(authority=wanted.authority.name, node=wanted.node, cluster=wanted.cluster)]
        parts += ["\n".join(_label_lines(name, specs, wanted)) for name, specs in by_label.items()]
        parts += [_ASKER, "\n".join(_settings_lines(wanted, url, label)), "\n".join(_try_lines(url, list(by_label)))]
        text = "\n".join(parts) + "\n"
        return [SetupFile(name=f"est-{wanted.authority.name}.txt", text=text)]

    def sign(self, request: SignRequest) -> Issued | Pending:
        """Have the server sign one CSR (`bridge.contract.Backend`); the label decides validity and usages."""
        label = self._label(request.spec)
        answer = self._enrol(label, request.csr.public_bytes(Encoding.DER))
        if answer.status == HTTPStatus.ACCEPTED:
            return _pending(request, answer, datetime.now(UTC))
        if answer.status == HTTPStatus.FORBIDDEN and self._enrol(label, b"").status in NO_ENTRY:
            hint = f"the server refuses {_who(self._settings)} whatever the CSR is"
            raise NoVerdictError(str(self._error(answer)), hint=hint)
        found = self._certificates(answer)
        leaf = leaf_of(found, request.csr)
        if leaf is None:
            text = f"{answer.where}: wanted a certificate for the CSR's key, found {_names(found)}"
            hint = "does the server make keys by itself, or answer with an older request's certificate?"
            raise BackendRefusedError(f"est: {text}", hint=hint)
        known = [*found, *self._ca_certificates(label)]
        has_signer = any(is_signed_by(leaf, issuer) for issuer in known)
        if not has_signer:  # the CA has another certificate than at the last look
            known = [*found, *self._ca_certificates(label, anew=True)]
        return Issued(leaf=leaf, intermediates=intermediates_of(leaf, known))

    def collect(self, request: SignRequest, reference: str) -> Issued | Pending:
        """Send the same CSR again, as EST demands (RFC 7030 §4.2.3), but not before the server's Retry-After."""
        digest, _, end = reference.partition("@")
        if digest != csr_fingerprint(request.csr):
            hint = "`ca-bridge pending cancel` makes room for a new request"
            raise BackendRefusedError("est: wanted the reference of this CSR, found another one's", hint=hint)
        now = datetime.now(UTC)
        left = int(end) - now.timestamp() if end.isdecimal() else 0
        if 0 < left <= LONGEST_RETRY_AFTER.total_seconds():
            moment = minute(now + timedelta(seconds=left))
            return Pending(reference=reference, note=f"the server asks to wait until {moment}")
        return self.sign(request)

    def check(self, specs: Sequence[CertificateSpec]) -> dict[str, list[Violation]]:
        """Ask whether the server knows each label and accepts us, and whether all labels belong to one CA."""
        labels = {label: self._label_violations(label) for label in dict.fromkeys(map(self._label, specs))}
        return {spec.name: found for spec in specs if (found := labels[self._label(spec)])}

    def issuers(self) -> list[x509.Certificate]:
        """The CA's current certificates, the signing one first, by a client label, which every authority has."""
        self._cas.clear()
        clients = [spec for spec in SPECS.values() if spec.usage == "client"]
        *others, last = dict.fromkeys(map(self._label, clients))  # one, unless labels depend on certificates' names
        known = next((label for label in others if self._knows(label)), last)
        return issuing_first(self._ca_certificates(known))

    def identity(self) -> str:
        """The client certificate's CN, and the user."""
        settings = self._settings
        name = common_name(settings.client_cert, "est")
        return ", ".join(filter(None, [name, settings.username and f"user {settings.username}"]))

    def _ca_certificates(self, label: str, *, anew: bool = False) -> Sequence[x509.Certificate]:
        if anew or label not in self._cas:
            self._cas[label] = self._certificates(self._cacerts(label))
        return self._cas[label]

    def _knows(self, label: str) -> bool:
        """Whether the server has the label; any other failure is an error."""
        if label not in self._cas:
            answer = self._cacerts(label)
            if answer.status == HTTPStatus.NOT_FOUND:
                return False
            self._cas[label] = self._certificates(answer)
        return True

    def _certificates(self, answer: Answer) -> list[x509.Certificate]:
        if answer.status != HTTPStatus.OK:
            raise self._error(answer)
        try:
            return certificates(answer.response.content)
        except ValueError as e:
            found = f"{e}: {answer.text}" if answer.text else str(e)
            hint = f"is it an EST server that answers below {self._settings.url}, and not a proxy or a log-in page?"
            raise NoVerdictError(f"est: {answer.where}: wanted certificates in PKCS#7, found {found}", hint=hint) from e

    def _label_violations(self, label: str) -> list[Violation]:
        subject = f"label {label!r}" if label else "no label"
        if not self._knows(label):
            return [Violation(subject=subject, want="one that the server knows", got="HTTP 404 for its cacerts")]
        first, cas = next(iter(self._cas.values())), self._cas[label]
        if not set(first) & set(cas):
            return [Violation(subject=subject, want=f"the same CA as other labels, {_names(first)}", got=_names(cas))]
        entry = self._enrol(label, b"")
        if entry.status in NO_ENTRY:
            error = self._error(entry)
            return [Violation(subject=subject, want="that the server lets us enrol", got=f"{error}; {error.hint}")]
        return []

    # --- the server ---------------------------------------------------------------------------------------------------

    def _cacerts(self, label: str) -> Answer:
        """`cacerts`, which needs no credentials."""
        return self._send("GET", label, "cacerts", headers={"Accept": HEADERS["Accept"]})

    def _enrol(self, label: str, csr_der: bytes) -> Answer:
        """`simpleenroll`; without a CSR only to see whether the server accepts us."""
        return self._send("POST", label, "simpleenroll", data=base64.b64encode(csr_der), headers=HEADERS)

    def _error(self, answer: Answer) -> BackendError:
        """The error for an answer without certificates."""
        said = answer.text.removeprefix(f"{answer.status} ")
        text = f"est: {answer.where}: HTTP {answer.status}" + (f", {said}" if said else "")
        if answer.status in LATER_STATUSES:
            hint, wait_seconds = _LATER_HINTS.get(answer.status, ""), retry_after_seconds(answer.response)
            return BackendUnavailableError(text, hint=hint, retry_after_seconds=wait_seconds)
        kind = BackendRefusedError if answer.status in _VERDICTS else NoVerdictError
        return kind(text, hint=self._hint(answer))

    def _hint(self, answer: Answer) -> str:
        settings = self._settings
        if 300 <= answer.status < 400:  # noqa: PLR2004 (RFC 9110 §15.4)
            to = answer.header("Location") or "nowhere"
            return f"redirects are not followed; if you trust it, give url the beginning of {to}"
        if answer.status == HTTPStatus.UNAUTHORIZED:
            return _unauthorized_hint(answer.header("WWW-Authenticate"), settings.username)
        if answer.status == HTTPStatus.BAD_REQUEST and "host not allowed" in answer.text:
            return "the host in url is not one of those that the server answers for"
        return HINTS.get(answer.status, "the server's log may say more").format(who=_who(settings))

    def _send(
        self, method: str, label: str, operation: str, *, headers: Mapping[str, str], data: bytes | None = None
    ) -> Answer:
        url = operation_url(self._settings.url, label, operation)
        secret = self._settings.password if method == "POST" else None  # `cacerts` needs none
        password = read_secret(secret, "est: password", "put it there, or fix password_file") if secret else None
        auth = password and HTTPBasicAuth(self._settings.username.encode(), password.encode())
        response = self._http.request(method, url, headers=headers, data=data, auth=auth)
        basic = base64.b64encode(f"{self._settings.username}:{password}".encode()).decode()
        return Answer(where=url, response=response, hidden=[password, basic])


#: Statuses for a request without a CSR that a request with a CSR would also get.
NO_ENTRY = frozenset({401, 403, 404, 405})
#: Statuses about the request; others say that the server rejects us, or that no EST server answers at url.
_VERDICTS = frozenset({400, 403, 409, 410, 413, 415, 422})


def _pending(request: SignRequest, answer: Answer, now: datetime) -> Pending:
    """The pending answer: RFC 7030 §4.2.3 has no reference, and not every server sends its Retry-After."""
    said = f" ({answer.text})" if answer.text else ""
    wait_seconds = retry_after_seconds(answer.response)
    if wait_seconds is None:
        return Pending(reference=csr_fingerprint(request.csr), note=f"the server answers later{said}")
    moment = now + min(timedelta(seconds=wait_seconds), LONGEST_RETRY_AFTER)
    note = f"the server answers later{said}, and asks to wait until {minute(moment)}"
    return Pending(reference=f"{csr_fingerprint(request.csr)}@{int(moment.timestamp())}", note=note)


def _names(certificates: Sequence[x509.Certificate]) -> str:
    names = [name_text(certificate.subject) or "a nameless one" for certificate in certificates]
    return one_line(" and ".join(names)) or "none"


#: Below the server's root (RFC 7030 §3.2.2).
ROOT = ".well-known/est"
#: Every server accepts one line of base64 with both headers, although RFC 8951 §3.1 wants no encoding header.
HEADERS = {
    "Content-Type": "application/pkcs10",
    "Content-Transfer-Encoding": "base64",
    "Accept": "application/pkcs7-mime",
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One HTTP answer of the server, whatever its status."""

    where: str  #: The URL.
    response: Response = field(repr=False)
    hidden: Sequence[str | None] = field(repr=False)  #: Secrets that we sent and never show.

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.response.status_code

    @functools.cached_property
    def text(self) -> str:
        """The body's beginning on one line for people, or a web page's title; without our secrets."""
        kind = self.response.headers.get("content-type", "")
        text = without(self.response.content.decode("utf-8", "replace"), self.hidden)
        if "html" in kind or text.lstrip()[:1] == "<":
            title = re.search(r"<title[^>]*>([^<]{,500})", text[:20000], re.IGNORECASE)
            return f"a web page, {one_line(title[1])!r}" if title else "a web page"
        return one_line(text) if kind.startswith("text/") or "json" in kind else ""

    def header(self, name: str) -> str:
        """A header, safe to show; empty: there is none."""
        return one_line(without(self.response.headers.get(name, ""), self.hidden))


_LATER_HINTS: Mapping[int, str] = {
    HTTPStatus.TOO_MANY_REQUESTS: "the server limits how often it is asked, by this node or by all",
    HTTPStatus.INTERNAL_SERVER_ERROR: "the CA behind the server has failed (its log says why), or the CSR is too long "
    "for it: GlobalSign's takes 64 KiB",
    HTTPStatus.SERVICE_UNAVAILABLE: "the server, or the proxy before it, is down or has too much to do",
}

_NOT_EST = "is it an EST server that answers at url?"
_CUT_OFF_HINT = (
    "if it stays so: a server may break the connection where it does not accept client_cert (wanted: valid, good for "
    "clientAuth, with its intermediates in the file), or where it wants one and none is given"
)
#: What to do next, by status.
HINTS: Mapping[int, str] = {
    HTTPStatus.BAD_REQUEST: "the server can't use the CSR: does it want a link between TLS and the CSR (tls-unique, "
    "RFC 7030 §3.5)? that can't be done here, switch it off for this label",
    HTTPStatus.FORBIDDEN: "the label's policy, or the rights of {who}, do not allow this certificate",
    HTTPStatus.NOT_FOUND: "has the server this label, and is url without /.well-known/est? a label of several segments "
    "is not known to every server",
    HTTPStatus.METHOD_NOT_ALLOWED: _NOT_EST,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "the server, or a proxy before it, limits the length of a CSR",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "a proxy may take away Content-Type or Content-Transfer-Encoding",
    HTTPStatus.UNPROCESSABLE_ENTITY: "the label's policy does not take subject, SANs or key of the CSR",
    HTTPStatus.NO_CONTENT: _NOT_EST,
    HTTPStatus.MISDIRECTED_REQUEST: "the host in url is not one of those that the server answers for",
}


def _who(settings: EstSettings) -> str:
    names = [f"user {settings.username}"] if settings.username else []
    names += ["the client certificate"] if settings.client_cert else []
    return " and ".join(names) or "a client without client_cert or username"


def _unauthorized_hint(challenge: str, username: str) -> str:
    schemes = {part.strip().split(" ")[0].lower() for part in challenge.split(",")}
    if challenge and "basic" not in schemes:
        scheme = challenge.split(" ", maxsplit=1)[0]
        return f"the server wants {scheme}; only Basic and client certificates can be used here"
    if username:
        return "the server does not know username, or it has another password"
    return "the server wants username and password_file, or a client certificate"


def _tls_hint(settings: EstSettings, reason: str) -> str:
    """A hint for a TLS handshake that failed; OpenSSL's reasons name the alert that the server sent."""
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return _our_verdict_hint(reason)
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason or "HTTP_REQUEST" in reason:
        return "does the server speak TLS at this port?"
    if "PROTOCOL_VERSION" in reason or "HANDSHAKE_FAILURE" in reason:
        return "the server must speak TLS 1.2 or 1.3 with a common cipher; some say so where a client certificate lacks"
    if settings.client_cert is None:
        return "the server wants a client certificate: client_cert and client_key"
    wrong = " and ".join(_agent_faults(settings.client_cert, datetime.now(UTC)))
    return f"the server does not accept client_cert: {wrong or 'its CA, or a missing intermediate, is the usual cause'}"


def _our_verdict_hint(reason: str) -> str:
    if "mismatch" in reason:
        return "the SANs of the server's TLS certificate must hold the host in url"
    if "expired" in reason:
        return "the server's TLS certificate has to be renewed, or this node's clock put right"
    return "ca_file must hold the CA of the server's TLS certificate (it is pinned: no other CA is trusted)"


def _agent_faults(client_cert: Path, now: datetime) -> Iterator[str]:
    """Faults for which any server refuses a client certificate; none if the file can't be read."""
    with contextlib.suppress(OSError, ValueError), open_regular(client_cert) as file:
        agent = x509.load_pem_x509_certificate(file.read())
        if not agent.not_valid_before_utc <= now <= agent.not_valid_after_utc:
            yield f"it is valid from {day(agent.not_valid_before_utc)} to {day(agent.not_valid_after_utc)} only"
        usages = extended_key_usages(agent)
        if usages is not None and EKU.CLIENT_AUTH.value not in usages:
            yield "it is not good for clientAuth"


def operation_url(url: str, label: str, operation: str) -> str:
    """The URL of an operation; each segment of a label is percent-encoded by itself."""
    segments = [quote(segment, safe="") for segment in label.split("/") if segment]
    return "/".join([url.rstrip("/"), ROOT, *segments, operation])


# An answer is a PKCS#7 without a signature (RFC 7030 §4.1.3, §4.2.3), a *set*: its order says nothing, so keys and
# signatures have to show what each certificate is.

#: A chain has three or four certificates, during a key roll-over twice as many; each more costs signature checks.
MAX_CERTIFICATES = 50

_PEM_ARMOUR = re.compile(rb"-----[A-Z0-9 ]+-----")


def certificates(body: bytes) -> list[x509.Certificate]:
    """
    The certificates of an answer, in its order (ValueError: found something else): base64 with or without line breaks
    (RFC 8951 §3.1), PEM, or bare DER or BER, whatever its Content-Type.
    """
    try:
        found = pkcs7.load_der_pkcs7_certificates(_der(body))
        for certificate in found:
            _ = certificate.subject, certificate.issuer, certificate.not_valid_before_utc  # which are read only now
    except UNREADABLE as e:
        # ValueError: also a date in the year 0; TypeError: a type that does not fit an attribute
        raise ValueError(f"{len(body)} bytes in another form") from e
    if len(found) > MAX_CERTIFICATES:
        raise ValueError(f"{len(found)} certificates, where {MAX_CERTIFICATES} are too many")
    return found


def _der(body: bytes) -> bytes:
    if body[:1] == b"\x30":  # a SEQUENCE; no base64 of one begins so
        return body
    text = re.sub(rb"\s", b"", _PEM_ARMOUR.sub(b"", body))
    return base64.b64decode(text, validate=True)  # or foreign characters would be skipped


def leaf_of(certificates: Sequence[x509.Certificate], csr: x509.CertificateSigningRequest) -> x509.Certificate | None:
    """The certificate for the CSR's key; of several the one that began last. None: there is none."""
    leaves = [certificate for certificate in certificates if is_for(certificate, csr)]
    return max(leaves, key=lambda certificate: certificate.not_valid_before_utc, default=None)


def intermediates_of(leaf: x509.Certificate, pool: Sequence[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """
    All certificates that a path from leaf to anchor may need, in any order. Roots are known by their signature:
    roll-over certificates (RFC 7030 §4.1.3) also have the same subject and issuer, and are needed.
    """
    others = (certificate for certificate in dict.fromkeys(pool) if certificate != leaf)
    return tuple(certificate for certificate in others if not is_signed_by(certificate, certificate))


def issuing_first(pool: Sequence[x509.Certificate]) -> list[x509.Certificate]:
    """The CA's certificates, first those that certify no other one, since RFC 7030 §4.1.3 promises no order."""
    cas = list(dict.fromkeys(pool))
    return sorted(cas, key=lambda ca: sum(is_signed_by(other, ca) for other in cas if other != ca))


# --- what the CA's administrator needs ---------------------------------------------------------------------------------


_HEAD = """\
EST for authority {authority} of cluster {cluster}, node {node}

An EST request has neither usages nor validity, so each label below needs its own profile at the CA.
The CA must be the node's trust anchor or below it, and must add nothing to subject or SANs.
"""

_ASKER = """\
Who asks
  One agent (client_cert, or username) sends all of the node's requests, by simpleenroll (never simplereenroll).
  Allow it these subjects and SANs, and no others: the holder of a clientAuth certificate with O=system:masters
  or CN=system:kube-controller-manager controls the cluster.
  Do not require a link between TLS and the CSR (tls-unique, RFC 7030 section 3.5).
  If the server answers 202, the node sends the same CSR again; it must count as the same request.
"""


def _label_lines(label: str, specs: Sequence[CertificateSpec], wanted: SetupRequest) -> Iterator[str]:
    usages = {", ".join(eku.label for eku in EKU if eku in spec.ekus) for spec in specs}
    yield f"Label {label}"
    if len(usages) > 1:
        yield "  CAN'T BE USED: these certificates have different usages and need a label each"
    yield f"  extended key usage  {' / '.join(sorted(usages))}, and no other"
    yield "  key usage           digitalSignature, keyEncipherment"
    yield "  basic constraints   CA:FALSE"
    yield f"  validity            {wanted.validity / timedelta(days=1):g} days"
    for spec in specs:
        yield f"  {spec.name}"
        certificate = wanted.certificates[spec.name]
        yield f"    subject           {one_line(name_text(certificate.subject))}"
        yield from (f"    SAN               {kind} {one_line(name)}" for kind, name in sorted(san_entries(certificate)))
    yield ""


def _settings_lines(wanted: SetupRequest, url: str, label: Selector) -> Iterator[str]:
    yield "In the node's settings"
    yield "  [backend.enrol]"
    yield '  type = "est"'
    yield f"  url = {_toml(url)}"
    yield '  ca_file = "/etc/ca-bridge/est-tls-ca.crt"       # pins the server: no other CA is trusted'
    yield '  client_cert = "/etc/ca-bridge/agent.crt"        # with its intermediates; with clientAuth'
    yield '  client_key = "/etc/ca-bridge/agent.key"'
    yield f"  [authority.{wanted.authority.name}]"
    yield '  backend = "enrol"'
    yield f"  label = {_toml(label.pattern)}"
    if label.exceptions:
        yield f"  [authority.{wanted.authority.name}.labels]"
        yield from (f"  {_toml(name)} = {_toml(text)}" for name, text in label.exceptions.items())
    yield ""


def _try_lines(url: str, labels: Sequence[str]) -> Iterator[str]:
    yield "To see the CA behind each label, from the node"
    for label in labels:
        where = shlex.quote(operation_url(url, label, "cacerts"))
        yield f"  curl -sS --fail --cacert /etc/ca-bridge/est-tls-ca.crt {where} |"
        yield "    tr -d '\\r\\n' | openssl base64 -d -A | openssl pkcs7 -inform DER -print_certs -noout"
    yield "To see whether the server accepts the agent: ca-bridge doctor"


def _toml(value: Any) -> str:
    return escaped(json.dumps(value, ensure_ascii=False))
