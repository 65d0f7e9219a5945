"""
EST, "Enrollment over Secure Transport" (RFC 7030, RFC 8951), over HTTPS.

A request holds the CSR alone: the *label* in the URL, the client, or the server's default decides what the certificate
is for. So each usage class has a label, and the answer is verified as always. `simplereenroll` is not used, since it
needs the key of the certificate that is renewed, which no backend gets. Details that the RFCs leave open were measured
with GlobalSign's estserver 1.0.6.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from backends.est.server import (
    ROOT,
    Answer,
    Server,
    certificates,
    certifies,
    intermediates_of,
    issuing_first,
    leaf_of,
    operation_url,
)
from backends.http import common_name, pair_problems, tls_context, url_problems
from bridge.contract import BackendSettings, Issued, Pending, Secret, Selector, SetupFile, SetupRequest, SignRequest
from bridge.errors import BackendRefusedError, SettingsProblem, Violation
from bridge.pki.certificates import name_text, san_entries
from bridge.specs import EKU, SPECS, CertificateSpec
from bridge.words import escaped, one_line

_EXAMPLE_URL = "https://est.corp.example"
_DAY_SECONDS = 86400

#: A long Retry-After, or a clock that was set back, must not delay the next try until the certificate has expired.
LONGEST_RETRY_AFTER = timedelta(days=1)
#: No label may be called like one of them (RFC 7030 §3.2.2).
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
        """A TLS context for one thread; see `backends.http.tls_context`."""
        context = tls_context(self.ca_file, self.client_cert, self.client_key)
        # A server may want the certificate for some URLs only, and TLS 1.3 knows no renegotiation (RFC 8446 §4.6.2).
        context.post_handshake_auth = self.client_cert is not None
        return context

    def problems(self) -> Iterator[SettingsProblem]:
        """Settings that contradict each other, or would make no URL."""
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
    if not all(one.isprintable() and one not in {"", ".", ".."} and "%" not in one for one in segments):
        wanted = "a label, or several with one / between them, in plain text (they are percent-encoded here)"
        yield SettingsProblem(key, wanted, repr(label))
    elif named := OPERATIONS.intersection(segments):
        yield SettingsProblem(key, "a label that is not called like an operation of EST", ", ".join(sorted(named)))


class EstBackend:
    """One CA behind an EST server."""

    settings_type: ClassVar[type[BackendSettings]] = EstSettings

    def __init__(self, settings: EstSettings) -> None:
        self._settings = settings
        self._label = Selector(settings.label, settings.labels, settings.node)
        self._server = Server(settings)
        self._cas: dict[str, Sequence[x509.Certificate]] = {}  #: By label, as they were at the last look.

    @classmethod
    def from_settings(cls, settings: EstSettings) -> EstBackend:
        """Make the backend; nothing is sent yet. A SettingsError: a file can't be used."""
        settings.tls_context()  # trouble is found now, not in the middle of a renewal
        return cls(settings)

    @classmethod
    def setup(cls, wanted: SetupRequest) -> Sequence[SetupFile]:
        """Say what each label has to give; see `bridge.contract.SetsUp`."""
        return _setup_files(wanted)

    def sign(self, request: SignRequest) -> Issued | Pending:
        """Have the server sign one CSR (`bridge.contract.Backend`); the label decides validity and usages."""
        label = self._label(request.spec)
        answer = self._server.enrol(label, request.csr.public_bytes(Encoding.DER))
        if answer.status == HTTPStatus.ACCEPTED:
            return _pending(request, answer, datetime.now(UTC))
        found = self._certificates(answer)
        leaf = leaf_of(found, request.csr)
        if leaf is None:
            text = f"{answer.where}: wanted a certificate for the CSR's key, found {_names(found)}"
            hint = "does the server make keys by itself, or answer with an older request's certificate?"
            raise BackendRefusedError(f"est: {text}", hint=hint)
        known = [*found, *self._ca_certificates(label)]
        if not any(certifies(one, leaf) for one in known):  # the CA has another certificate than at the last look
            known = [*found, *self._ca_certificates(label, anew=True)]
        return Issued(leaf=leaf, intermediates=intermediates_of(leaf, known))

    def collect(self, request: SignRequest, reference: str) -> Issued | Pending:
        """Send the same CSR again, as EST demands (RFC 7030 §4.2.3), but not before its Retry-After."""
        digest, _, end = reference.partition("@")
        if digest != _digest(request):
            hint = "`ca-bridge pending cancel` makes room for a new request"
            raise BackendRefusedError("est: wanted the reference of this CSR, found another one's", hint=hint)
        now = datetime.now(UTC)
        left = int(end) - now.timestamp() if end.isdecimal() else 0
        if 0 < left <= LONGEST_RETRY_AFTER.total_seconds():
            moment = _moment_text(now + timedelta(seconds=left))
            return Pending(reference=reference, note=f"the server asks to wait until {moment}")
        return self.sign(request)

    def check(self, specs: Sequence[CertificateSpec]) -> dict[str, list[Violation]]:
        """Ask whether the server knows each label, whether they belong to one CA, and whether it accepts us."""
        labels = {label: self._label_violations(label) for label in dict.fromkeys(map(self._label, specs))}
        return {spec.name: found for spec in specs if (found := labels[self._label(spec)])}

    def issuers(self) -> list[x509.Certificate]:
        """The CA's certificates of now, the one that signs first, from the label of a client's: each authority has one."""
        self._cas.clear()
        clients = [spec for spec in SPECS.values() if spec.usage == "client"]
        *others, last = dict.fromkeys(map(self._label, clients))  # one, unless it depends on the certificate's name
        known = next((label for label in others if self._knows(label)), last)
        return issuing_first(self._ca_certificates(known))

    def identity(self) -> str:
        """The client certificate's CN, and the user."""
        settings = self._settings
        name = common_name(settings.client_cert, "est") if settings.client_cert else ""
        return ", ".join(filter(None, [name, settings.username and f"user {settings.username}"]))

    def close(self) -> None:
        """Close the connections."""
        self._server.http.close()

    def _ca_certificates(self, label: str, *, anew: bool = False) -> Sequence[x509.Certificate]:
        found = self._cas.get(label)
        if found is None or anew:
            found = self._cas[label] = self._certificates(self._server.ca_certificates(label))
        return found

    def _knows(self, label: str) -> bool:
        """Whether the server has the label; all else that is wrong is an error."""
        if label not in self._cas:
            answer = self._server.ca_certificates(label)
            if answer.status == HTTPStatus.NOT_FOUND:
                return False
            self._cas[label] = self._certificates(answer)
        return True

    def _certificates(self, answer: Answer) -> list[x509.Certificate]:
        if answer.status != HTTPStatus.OK:
            raise self._server.error(answer)
        try:
            return certificates(answer.body)
        except ValueError as e:
            found = f"{e}: {answer.text}" if answer.text else str(e)
            hint = f"is it an EST server that answers below {self._settings.url}, and not a proxy or a log-in page?"
            raise BackendRefusedError(
                f"est: {answer.where}: wanted certificates in PKCS#7, found {found}", hint=hint
            ) from e

    def _label_violations(self, label: str) -> list[Violation]:
        subject = f"label {label!r}" if label else "no label"
        if not self._knows(label):
            return [Violation(subject=subject, want="one that the server knows", got="HTTP 404 for its cacerts")]
        first, ours = next(iter(self._cas.values())), self._cas[label]
        if not set(first) & set(ours):
            return [Violation(subject=subject, want=f"the same CA as other labels, {_names(first)}", got=_names(ours))]
        entry = self._server.enrol(label, b"")
        if entry.status in NO_ENTRY:
            error = self._server.error(entry)
            return [Violation(subject=subject, want="that the server lets us enrol", got=f"{error}; {error.hint}")]
        return []


#: Answers to a request without a CSR that a request with a CSR would get as well.
NO_ENTRY = frozenset({401, 403, 404, 405})


def _digest(request: SignRequest) -> str:
    return hashlib.sha256(request.csr.public_bytes(Encoding.DER)).hexdigest()


def _pending(request: SignRequest, answer: Answer, now: datetime) -> Pending:
    """RFC 7030 §4.2.3: no reference, and a Retry-After, which not every server sends."""
    said = f" ({answer.text})" if answer.text else ""
    if answer.retry_after_seconds is None:
        return Pending(reference=_digest(request), note=f"the server answers later{said}")
    moment = now + min(timedelta(seconds=answer.retry_after_seconds), LONGEST_RETRY_AFTER)
    note = f"the server answers later{said}, and asks to wait until {_moment_text(moment)}"
    return Pending(reference=f"{_digest(request)}@{int(moment.timestamp())}", note=note)


def _moment_text(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _names(found: Sequence[x509.Certificate]) -> str:
    return one_line(" and ".join(one.subject.rfc4514_string() or "a nameless one" for one in found)) or "none"


def _setup_files(wanted: SetupRequest) -> Sequence[SetupFile]:
    """One page for the authority; labels as the settings name them, or else one a usage class."""
    each_usage = f"{wanted.authority.name}-{{usage}}"  # whose label gives its own EKUs
    label = Selector(wanted.settings.get("label") or each_usage, wanted.settings.get("labels") or {}, wanted.node)
    by_label: dict[str, list[CertificateSpec]] = {}
    for name in wanted.certificates:
        by_label.setdefault(label(SPECS[name]), []).append(SPECS[name])
    url = str(wanted.settings.get("url", _EXAMPLE_URL)).rstrip("/")
    parts = [_HEAD.format(authority=wanted.authority.name, node=wanted.node, cluster=wanted.cluster)]
    parts += ["\n".join(_label_lines(name, specs, wanted)) for name, specs in by_label.items()]
    parts.append(_ASKER)
    parts.append("\n".join(_settings_lines(wanted, url, label)))
    parts.append("\n".join(_try_lines(url, list(by_label))))
    text = "\n".join(parts) + "\n"
    return [SetupFile(name=f"est-{wanted.authority.name}.txt", text=text)]


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
    yield f"  validity            {wanted.validity.total_seconds() / _DAY_SECONDS:g} days"
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
