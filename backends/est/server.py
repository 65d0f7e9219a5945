"""The operations of an EST server, what its errors mean, and the certificates in its answers."""

from __future__ import annotations

import base64
import contextlib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import pkcs7
from requests.auth import HTTPBasicAuth

from backends.http import Http, Wording, retry_after_seconds, without
from bridge.contract import SecretUnavailableError
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError, LocalFileError
from bridge.pki.certificates import extended_key_usages, is_for, is_signed_by
from bridge.specs import EKU
from bridge.words import one_line

if TYPE_CHECKING:
    from backends.est import EstSettings

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
    status: int
    headers: Mapping[str, str]
    body: bytes
    retry_after_seconds: float | None
    hidden: Sequence[str | None] = field(repr=False)  #: What we sent and do not repeat.

    @functools.cached_property
    def text(self) -> str:
        """Its beginning as one line for people, or a page's title; without our secrets, should the server repeat them."""
        kind = self.headers.get("content-type", "")
        text = without(self.body.decode("utf-8", "replace"), self.hidden)
        if "html" in kind or text.lstrip()[:1] == "<":
            title = re.search(r"<title[^>]*>([^<]{,500})", text[:20000], re.IGNORECASE)
            return f"a web page, {one_line(title[1])!r}" if title else "a web page"
        return one_line(text) if kind.startswith("text/") or "json" in kind else ""

    def header(self, name: str) -> str:
        """A header as it may be shown; empty: there is none."""
        return one_line(without(self.headers.get(name.lower(), ""), self.hidden))


class Server:
    """The operations of EST."""

    def __init__(self, settings: EstSettings) -> None:
        self._settings = settings
        wording = Wording(
            name="est",
            not_ours=_NOT_EST,
            tls=lambda reason: _tls_hint(reason, settings, datetime.now(UTC)),
            cut_off=_CUT_OFF_HINT,
        )
        self.http = Http(wording, settings.url, settings.timeout, settings.tls_context)

    def ca_certificates(self, label: str) -> Answer:
        """`cacerts`, which needs no credentials."""
        return self._send("GET", label, "cacerts", headers={"Accept": HEADERS["Accept"]})

    def enrol(self, label: str, csr_der: bytes) -> Answer:
        """`simpleenroll`; without a CSR only to see whether the server accepts us."""
        return self._send("POST", label, "simpleenroll", data=base64.b64encode(csr_der), headers=HEADERS)

    def error(self, answer: Answer) -> BackendError:
        """The error for an answer without certificates."""
        said = answer.text.removeprefix(f"{answer.status} ")
        text = f"est: {answer.where}: HTTP {answer.status}" + (f", {said}" if said else "")
        if answer.status in LATER_STATUSES:
            hint = _LATER_HINTS.get(answer.status, "")
            return BackendUnavailableError(text, hint=hint, retry_after_seconds=answer.retry_after_seconds)
        return BackendRefusedError(text, hint=self._hint(answer))

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
        password = self._password() if method == "POST" else None  # `cacerts` needs none
        auth = password and HTTPBasicAuth(self._settings.username.encode(), password.encode())
        answer = self.http.request(method, url, headers=headers, data=data, auth=auth)
        return Answer(
            where=url,
            status=answer.status,
            headers=answer.headers,
            body=answer.body,
            retry_after_seconds=retry_after_seconds(answer, datetime.now(UTC)),
            hidden=[password, base64.b64encode(f"{self._settings.username}:{password}".encode()).decode()],
        )

    def _password(self) -> str | None:
        try:
            return self._settings.password.read() if self._settings.password else None
        except SecretUnavailableError as e:
            raise LocalFileError(f"est: password: {e}", hint="put it there, or fix password_file") from e


#: Statuses that may pass: a limit of requests or of time, a CA that fails behind the server, proxies (RFC 9110 §15.5
#: and §15.6, RFC 6585 §4).
LATER_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
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


def _tls_hint(reason: str, settings: EstSettings, now: datetime) -> str:
    """A hint for a TLS handshake that failed; OpenSSL's reasons name the alert that the server sent."""
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return _our_verdict_hint(reason)
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason or "HTTP_REQUEST" in reason:
        return "does the server speak TLS at this port?"
    if "PROTOCOL_VERSION" in reason or "HANDSHAKE_FAILURE" in reason:
        return "the server must speak TLS 1.2 or 1.3 with a common cipher; some say so where a client certificate lacks"
    if settings.client_cert is None:
        return "the server wants a client certificate: client_cert and client_key"
    wrong = " and ".join(_agent_faults(settings.client_cert, now))
    return f"the server does not accept client_cert: {wrong or 'its CA, or a missing intermediate, is the usual cause'}"


def _our_verdict_hint(reason: str) -> str:
    if "mismatch" in reason:
        return "the SANs of the server's TLS certificate must hold the host in url"
    if "expired" in reason:
        return "the server's TLS certificate has to be renewed, or this node's clock put right"
    return "ca_file must hold the CA of the server's TLS certificate (it is pinned: no other CA is trusted)"


def _agent_faults(client_cert: Path, now: datetime) -> Iterator[str]:
    """Faults for which any server refuses a client certificate; none if the file can't be read."""
    with contextlib.suppress(OSError, ValueError):
        agent = x509.load_pem_x509_certificate(client_cert.read_bytes())
        if not agent.not_valid_before_utc <= now <= agent.not_valid_after_utc:
            yield f"it is valid from {agent.not_valid_before_utc:%Y-%m-%d} to {agent.not_valid_after_utc:%Y-%m-%d} only"
        usages = extended_key_usages(agent)
        if usages is not None and EKU.CLIENT_AUTH.value not in usages:
            yield "it is not good for clientAuth"


def operation_url(url: str, label: str, operation: str) -> str:
    """The URL of an operation; each segment of a label is percent-encoded by itself."""
    segments = [quote(segment, safe="") for segment in label.split("/") if segment]
    return "/".join([url.rstrip("/"), ROOT, *segments, operation])


# An answer is a PKCS#7 without a signature (RFC 7030 §4.1.3, §4.2.3), a *set*: its order says nothing, so that keys and
# signatures have to tell what a certificate is.

#: A chain has three or four, a roll-over of its keys twice as many; each more costs signatures to be looked at.
MAX_CERTIFICATES = 50

_PEM_ARMOUR = re.compile(rb"-----[A-Z0-9 ]+-----")


def certificates(body: bytes) -> list[x509.Certificate]:
    """
    The certificates of an answer, in its order (ValueError: found something else): base64 with or without line breaks
    (RFC 8951 §3.1), PEM, or bare DER or BER, whatever its Content-Type.
    """
    try:
        found = pkcs7.load_der_pkcs7_certificates(_der(body))
        _ = [(one.subject, one.issuer, one.not_valid_before_utc) for one in found]  # which are read only now
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm) as e:
        # ValueError: a date in the year 0, too; TypeError: a type that does not fit an attribute
        raise ValueError(f"{len(body)} bytes in another form") from e
    if len(found) > MAX_CERTIFICATES:
        raise ValueError(f"{len(found)} certificates, where {MAX_CERTIFICATES} are too many")
    return found


def _der(body: bytes) -> bytes:
    if body[:1] == b"\x30":  # a SEQUENCE; no base64 of one begins so
        return body
    text = re.sub(rb"\s", b"", _PEM_ARMOUR.sub(b"", body))
    return base64.b64decode(text, validate=True)  # or foreign characters would be skipped


def leaf_of(found: Sequence[x509.Certificate], csr: x509.CertificateSigningRequest) -> x509.Certificate | None:
    """The certificate for the CSR's key; of several the one that began last. None: there is none."""
    ours = [certificate for certificate in found if is_for(certificate, csr)]
    return max(ours, key=lambda certificate: certificate.not_valid_before_utc, default=None)


def intermediates_of(leaf: x509.Certificate, pool: Sequence[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """
    All that may be needed between a leaf and an anchor, first the path. Roots are known by their signature: roll-over
    certificates (RFC 7030 §4.1.3) have the same subject and issuer, and are needed.
    """
    left = [one for one in dict.fromkeys(pool) if one != leaf and not certifies(one, one)]
    path: list[x509.Certificate] = []
    below = leaf
    while issuer := next((certificate for certificate in left if certifies(certificate, below)), None):
        left.remove(issuer)
        path.append(issuer)
        below = issuer
    return (*path, *left)


def issuing_first(pool: Sequence[x509.Certificate]) -> list[x509.Certificate]:
    """The CA's certificates, first those that certify no other one, since RFC 7030 §4.1.3 promises no order."""
    found = list(dict.fromkeys(pool))
    return sorted(found, key=lambda one: sum(certifies(one, other) for other in found if other != one))


@functools.lru_cache(maxsize=256)  # the CA's own are asked about again with every leaf
def certifies(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    """Whether a certificate names this issuer, and is signed with its key."""
    return issuer.subject == certificate.issuer and is_signed_by(certificate, issuer)
