"""
A CA behind a CMP server (RFC 9810, RFC 9483), asked with `openssl cmp` 3.0 or newer: in mode `p10cr` with the CSR, in
mode `cr` with a template, for whose proof of possession we vouch as an RA.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from cryptography import x509

from backends.cmp.program import ENROLMENT, OLDEST_WITH_PROFILES, Log, Program, Ran, body_of, failure, quoted
from backends.settings import is_https, pair_problems, read_secret, subject_of, url_problems
from bridge.contract import (
    Backend,
    BackendSettings,
    Issued,
    NamePatterns,
    Pending,
    Secret,
    Selector,
    SetupFile,
    SetupRequest,
    SignRequest,
)
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    LocalFileError,
    NoVerdictError,
    SettingsError,
    SettingsProblem,
    Violation,
)
from bridge.pki.certificates import extended_key_usages, is_signed, load_pem_certificates, name_text, pem, san_entries
from bridge.specs import EKU, SPECS, CertificateSpec
from bridge.system.paths import open_regular
from bridge.system.tls import Peer, UnreachableError

#: RFC 9811 §3.3; with `/p/` and a name behind it the server's profile of that name (RFC 9483 §6.1).
WELL_KNOWN = ".well-known/cmp"
Mode = Literal["p10cr", "cr"]


@dataclass(frozen=True, kw_only=True)
class CmpSettings(BackendSettings):
    """Keys of a backend of type `cmp`; `timeout` is for one request and its answer."""

    url: str  #: Scheme, host and port; a path in it goes before `path`.
    #: A pattern: `{name}` is the certificate, `{usage}` its usage class (server, client, peer), `{node}` the node. If
    #: empty, `.well-known/cmp/p/{usage}`, or `.well-known/cmp` with a `profile` or in mode `cr`.
    path: str | None = None
    paths: dict[str, str] = field(default_factory=dict)  #: Other paths, by certificate or usage class.
    profile: str = ""  #: A pattern for the profile's name in the message header (openssl 3.3 and newer).
    profiles: dict[str, str] = field(default_factory=dict)  #: Other profiles, by certificate or usage class.
    recipient: str = ""  #: The CA's subject, such as `/O=Corp/CN=kubernetes`.
    reference: str = ""  #: Our name at the server, for a shared secret.
    secret: Secret | None = None  #: The shared secret.
    client_cert: Path | None = None  #: A certificate with its chain that signs requests, instead of a shared secret.
    client_key: Path | None = None  #: The key of `client_cert`.
    trusted_file: Path | None = None  #: The CAs of the certificate that the server signs its answers with.
    sender: str = ""  #: The subject of the certificate that the server signs with; any other is refused.
    tls_ca_file: Path | None = None  #: CA certificates (PEM) for the server's TLS certificate.
    tls_client_cert: Path | None = None  #: The client certificate for mutual TLS.
    tls_client_key: Path | None = None  #: The key of `tls_client_cert`.
    #: `"cr"` puts the usages into a template, for a server that trusts this node as a registration authority.
    mode: Mode = "p10cr"
    wait: timedelta = timedelta(seconds=5)  #: How long one run waits for a server that answers "not yet".
    #: Accept errors and rejections without protection, which anyone on the network path can forge.
    unprotected_errors: bool = False
    openssl: str = "openssl"  #: The openssl program, 3.0 or newer.

    def programs(self) -> Sequence[str]:
        """openssl."""
        return (self.openssl,)

    @property
    def path_pattern(self) -> str:
        """The URL path; by default the server's profile for the usage class, unless something else gives the usages."""
        if self.path is not None:
            return self.path
        return WELL_KNOWN if self.mode == "cr" or self.profile else f"{WELL_KNOWN}/p/{{usage}}"

    def problems(self) -> Iterator[SettingsProblem]:
        """Find contradictions, and settings that would accept unprotected answers."""
        yield from url_problems(self.url, "http://HOST[:PORT], without a query", plain_http=True)
        if not self.url.isprintable():
            yield SettingsProblem("url", "a URL of printable characters", repr(self.url))
        yield from Selector(self.path_pattern, self.paths).problems("path", "paths", self.pairs)
        for key, path in {"path": self.path_pattern, **{f"paths.{name}": p for name, p in self.paths.items()}}.items():
            if not re.fullmatch(r"[A-Za-z0-9._~!$&'()*+,;=:@%/{}-]*", path):
                yield SettingsProblem(key, "a path without spaces, query and fragment", repr(path))
        yield from Selector(self.profile, self.profiles).problems("profile", "profiles", self.pairs)
        if self.profiles and not self.profile:
            yield SettingsProblem("profile", "a pattern, as profiles has exceptions to it", "nothing")
        for key, name in {"recipient": self.recipient, "sender": self.sender}.items():
            if name and not re.match(r"/[\w.]+=", name):
                yield SettingsProblem(key, "a subject in the form /O=Corp/CN=NAME", repr(name))
        yield from self._protection_problems()
        yield from self._tls_problems()
        if self.wait > timedelta(minutes=10):
            yield SettingsProblem("wait", "at most 10m", f"{self.wait.total_seconds():g}s")

    def _protection_problems(self) -> Iterator[SettingsProblem]:
        if self.secret and (self.client_cert or self.client_key):
            yield SettingsProblem("client_cert", "a shared secret or a client certificate", "both")
        elif not self.secret and not (self.client_cert or self.client_key):
            yield SettingsProblem("secret_file", "a shared secret, or client_cert and client_key", "nothing")
        elif not self.secret and not (self.client_cert and self.client_key):
            missing = "client_key" if self.client_cert else "client_cert"
            yield SettingsProblem(missing, "both of client_cert and client_key", "one of them")
        if self.secret and not self.reference:
            yield SettingsProblem("reference", "the name under which the server has the secret", "nothing")
        if self.client_cert and not self.trusted_file:
            wanted = "the CA of the certificate that the server signs with (without it no answer can be verified)"
            yield SettingsProblem("trusted_file", wanted, "nothing")
        if self.sender and not self.trusted_file:
            yield SettingsProblem("trusted_file", "the CA of the sender's certificate", "nothing")

    def _tls_problems(self) -> Iterator[SettingsProblem]:
        yield from pair_problems(self.tls_client_cert, self.tls_client_key, "tls_")
        if is_https(self.url) and not self.tls_ca_file:
            wanted = "the CA of the server's TLS certificate (openssl would not check it, and not say so)"
            yield SettingsProblem("tls_ca_file", wanted, "nothing")
        if not is_https(self.url) and (self.tls_ca_file or self.tls_client_cert or self.tls_client_key):
            yield SettingsProblem("url", "https:// (as files for TLS are given)", "http://")


def check_files(settings: CmpSettings) -> None:
    """Check the files with certificates and keys, before openssl reads them during a renewal."""
    labels = dict.fromkeys(("client_cert", "trusted_file", "tls_ca_file", "tls_client_cert"), b"CERTIFICATE")
    labels |= dict.fromkeys(("client_key", "tls_client_key"), b"PRIVATE KEY")
    files = {name: file for name in labels if (file := getattr(settings, name))}
    problems = [problem for name, file in files.items() for problem in _file_problems(name, file, labels[name])]
    if problems:
        raise SettingsError(problems)


def _file_problems(name: str, file: Path, label: bytes) -> Iterator[SettingsProblem]:
    wanted = f"a PEM file with a {label.decode().lower()}"
    try:
        with open_regular(file) as opened:
            data = opened.read()
    except OSError as e:
        yield SettingsProblem(name, wanted, f"{file}: {e.strerror}")
        return
    if b"ENCRYPTED" in data:
        yield SettingsProblem(name, f"{wanted} that is not encrypted", f"{file}: an encrypted one")
    elif label + b"-----" not in data:
        yield SettingsProblem(name, wanted, f"{file}: none in it")


#: With less than 16 bytes, a recorded request can be attacked offline; openssl reads a line of at most 1023.
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 16, 1023
#: CRLReason (RFC 5280 §5.3.1).
_SUPERSEDED = "4"

_CSR, _WAITING, _OLD_CERTIFICATE, _EXTENSIONS = "request.csr", "waiting.der", "old.crt", "extensions.cnf"


class CmpBackend(Backend):
    """One CA behind a CMP server."""

    settings_type = CmpSettings

    def __init__(self, settings: CmpSettings) -> None:
        check_files(settings)
        self._settings = settings
        self._path = Selector(settings.path_pattern, settings.paths, settings.node)
        self._profile = Selector(settings.profile, settings.profiles, settings.node)
        self._program = Program(name=settings.openssl, timeout=settings.timeout, wait=settings.wait)

    @classmethod
    def setup(cls, wanted: SetupRequest) -> Sequence[SetupFile]:
        """Write a page for the administrator: profiles, names and a client for one node's certificates."""
        server = CmpSettings(**{"url": "http://RA-HOST:8080", **wanted.settings})
        path = Selector(server.path_pattern, server.paths, wanted.node)
        profile = Selector(server.profile, server.profiles, wanted.node)
        problems = [*path.problems("path", "paths"), *profile.problems("profile", "profiles")]
        if wanted.patterns and server.mode != "cr":
            wanted_mode = '"cr", whose template takes names beside the CSR'
            problems.append(SettingsProblem("mode", wanted_mode, repr(server.mode)))
        if problems:
            raise SettingsError(problems)
        places: dict[str, list[CertificateSpec]] = {}
        patterns = {pattern.spec.name: pattern for pattern in wanted.patterns}
        for spec in [*(SPECS[name] for name in wanted.certificates), *(pattern.spec for pattern in wanted.patterns)]:
            header = f", with profile {profile(spec)} in the message's header" if server.profile else ""
            places.setdefault(f"{server.url.rstrip('/')}/{path(spec).lstrip('/')}{header}", []).append(spec)
        text = _TEXT.format(
            authority=wanted.authority.name,
            node=wanted.node,
            cluster=wanted.cluster,
            reference=server.reference or wanted.node,
            url=server.url,
            profiles="\n".join(
                line for place, specs in places.items() for line in _profile(place, specs, wanted, patterns)
            ),
            request=_REQUESTS[server.mode],
        )
        return [SetupFile(name=f"{wanted.authority.name}.txt", text=text)]

    @property
    def names_beside_csr(self) -> bool:
        """A template takes any names; a CSR in `p10cr` goes as it is."""
        return self._settings.mode == "cr"

    def sign(self, request: SignRequest) -> Issued | Pending:
        """Have the server sign one CSR; only mode `cr` asks for a validity, in whole days."""
        ran = self._enrol(request, {})
        if ran.code == 0:
            return _issued(ran)
        log = Log.of(ran.messages)
        if ran.answers and (ran.poll or log.has_waited):
            # a later process goes on from this answer: it has the transaction and nonce, and no secret
            return Pending(reference=base64.b64encode(ran.answers[0]).decode(), note=_note(ran))
        raise failure(log, self._url(request.spec))

    def collect(self, request: SignRequest, reference: str) -> Issued | Pending:
        """Continue the transaction that `sign` began in this process; only the server's protected verdict ends it."""
        waiting = _answer_of(reference)
        ran = self._enrol(request, {_WAITING: waiting})
        if ran.code == 0:
            return _issued(ran)
        log = Log.of(ran.messages)
        if ran.poll or (log.has_waited and "received polling response" in log.text):
            return Pending(reference=reference, note=_note(ran))
        error = failure(log, self._url(request.spec))
        if "sending POLLREQ" not in log.text:  # it could not ask for the answer
            hint = "was the order made with other settings of `secret_file`, `client_cert` or `trusted_file`?"
            raise BackendRefusedError(f"{error} (the answer that was kept can't be used)", hint=hint)
        is_verdict = log.rejection is not None or "our enrollment key" in log.text
        if isinstance(error, BackendUnavailableError) or is_verdict:
            raise error
        raise BackendUnavailableError(str(error), hint=error.hint)

    def check(self, specs: Sequence[CertificateSpec]) -> dict[str, list[Violation]]:
        """Send a general message to each path: is the server there, and does each side accept the other's messages?"""
        greet = functools.cache(self._greet)
        greetings = {spec.name: greet(self._url(spec), self._profile(spec)) for spec in specs}
        return {name: [violation] for name, violation in greetings.items() if violation}

    def identity(self) -> str:
        """The reference, or the subject of the client certificate."""
        if self._settings.client_cert is None:
            return self._settings.reference
        return subject_of(self._settings.client_cert, "cmp").rfc4514_string()

    def revoke(self, certificate: x509.Certificate) -> None:
        """Have the server revoke a certificate (`rr`, RFC 9810 §5.3.9), by the path of the certificates with its usages."""
        spec = _spec_like(certificate)
        words = ["-cmd", "rr", "-oldcert", _OLD_CERTIFICATE, "-revreason", _SUPERSEDED]
        files = {_OLD_CERTIFICATE: pem(certificate)}
        ran = self._run(self._url(spec), self._profile(spec), words, files)
        log = Log.of(ran.messages)
        is_done = log.rejection is not None and "certRevoked" in log.rejection.failures
        if ran.code != 0 and not is_done:
            raise _error(ran, self._url(spec))

    def _greet(self, url: str, profile: str) -> Violation | None:
        ran = self._run(url, profile, ["-cmd", "genm"], {})
        log = Log.of(ran.messages)
        if ran.code == 0 or (log.rejection is not None and log.rejection.failures <= {"badRequest"}):
            return None
        if log.is_no_such_path:
            return Violation(subject=f"path {urlsplit(url).path}", want="a CMP service", got="HTTP status 404")
        raise _error(ran, url)

    def _enrol(self, request: SignRequest, given: dict[str, bytes]) -> Ran:
        """Send the request, or continue the transaction of the answer in `given`."""
        words = ["-cmd", self._settings.mode, "-csr", _CSR, "-implicit_confirm", *ENROLMENT]
        files = {_CSR: request.csr_pem, **given}
        if _WAITING in given:
            words += ["-rspin", _WAITING]
        if self._settings.mode == "cr":
            if not is_signed(request.csr):  # the CSR's signature is not sent: we vouch for it as an RA (RFC 4211 §4)
                wanted = f"a CSR that is signed with its own key for {request.spec.name}"
                raise BackendRefusedError(f"cmp: wanted {wanted}, found another")
            files[_EXTENSIONS] = _extensions(request)
            words += ["-popo", "0", "-config", _EXTENSIONS, "-reqexts", "wanted"]
            if request.names is not None and request.names.common_name:
                words += ["-subject", f"/CN={request.names.common_name}"]
            # a pod's certificate is backdated, so a whole day would be too long: the profile's lifetime counts
            if request.names is None or request.validity.days:
                words += ["-days", str(max(1, request.validity.days))]
        else:
            words += ["-config", ""]
        return self._run(self._url(request.spec), self._profile(request.spec), words, files)

    def _run(self, url: str, profile: str, words: Sequence[str], files: Mapping[str, bytes]) -> Ran:
        """Run openssl after a test connection, since openssl tries a closed port for half a minute."""
        words, secret = [*words, *self._addressed(url, profile)], self._secret()
        try:
            Peer.of(url, None).connected(self._settings.timeout.total_seconds()).close()
        except UnreachableError as e:
            hint = "is the server running, and the host and port in `url` right?"
            raise BackendUnavailableError(f"cmp: {url}: no connection: {e}", hint=hint) from e
        return self._program.run(words, files, secret)

    def _addressed(self, url: str, profile: str) -> list[str]:
        """The arguments for the server, for our credentials and for its protection."""
        settings = self._settings
        words = ["-batch", "-server", url]
        optional: dict[str, object] = {
            "-recipient": settings.recipient,
            "-ref": settings.reference,
            "-cert": settings.client_cert,
            "-key": settings.client_key,
            "-trusted": settings.trusted_file,
            "-expect_sender": settings.sender,
            "-tls_trusted": settings.tls_ca_file,
            "-tls_cert": settings.tls_client_cert,
            "-tls_key": settings.tls_client_key,
            "-profile": profile,
        }
        for option, value in optional.items():
            words += [option, str(value)] if value else []
        words += ["-tls_used"] if is_https(settings.url) else []
        words += ["-unprotected_errors"] if settings.unprotected_errors else []
        major, minor = self._version
        if profile and (major, minor) < OLDEST_WITH_PROFILES:
            wanted = ".".join(map(str, OLDEST_WITH_PROFILES))
            text = f"cmp: wanted openssl {wanted} or newer, which can name a profile, found {major}.{minor}"
            raise NoVerdictError(text, hint="use `path` instead of `profile`, or name a newer program in `openssl`")
        return words

    @functools.cached_property
    def _version(self) -> tuple[int, int]:
        return self._program.version()

    def _url(self, spec: CertificateSpec) -> str:
        return f"{self._settings.url.rstrip('/')}/{self._path(spec).lstrip('/')}"

    def _secret(self) -> bytes | None:
        """Read the secret before openssl starts, since openssl takes the name of a missing file for the secret."""
        place = self._settings.secret
        if place is None:
            return None
        hint = "a good one: openssl rand -hex 32 (the server must have the same)"
        text = read_secret(place, "cmp: shared secret", f"put it there; {hint}")
        secret = text.encode()
        if not text.isprintable() or not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
            wanted = f"{MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes of printable text on one line"
            raise LocalFileError(f"cmp: wanted {wanted} in {place}, found something else", hint=hint)
        return secret


def _extensions(request: SignRequest) -> bytes:
    """An openssl configuration with the template's extensions, and with SANs if they are not the CSR's."""
    ekus = ", ".join(eku.label for eku in EKU if eku in request.spec.ekus)
    usage, sans = "critical, digitalSignature, keyEncipherment", ""
    if request.names is not None:
        if not request.names.are_plain:
            raise BackendRefusedError("cmp: wanted names of plain characters, found others")
        usage, sans = "critical, digitalSignature", request.names.openssl_sans
        if not sans:
            raise BackendRefusedError("cmp: there is no name beside the CSR")
    return f"[wanted]\nkeyUsage = {usage}\nextendedKeyUsage = {ekus}\n{sans}".encode()


def _spec_like(certificate: x509.Certificate) -> CertificateSpec:
    """Any kubeadm certificate with the same usages, since only its path or profile matters."""
    try:
        ekus = extended_key_usages(certificate)
        return next(spec for spec in SPECS.values() if frozenset(eku.value for eku in spec.ekus) == ekus)
    except (ValueError, StopIteration) as e:
        raise BackendRefusedError("cmp: wanted a certificate with kubeadm's usages to revoke, found another") from e


def _issued(ran: Ran) -> Issued:
    if b"-----END CERTIFICATE-----" not in ran.leaf_pem:
        wanted = "cmp: wanted the certificate in a file of openssl's, found a part of it or none"
        raise BackendUnavailableError(wanted, hint="is the disk with the temporary files full?")
    try:
        [leaf] = load_pem_certificates(ran.leaf_pem)
        others = load_pem_certificates(ran.others_pem) if ran.others_pem else []
    except ValueError as e:
        raise BackendRefusedError(f"cmp: wanted one certificate, found something else ({type(e).__name__})") from e
    return Issued(leaf=leaf, intermediates=tuple(other for other in others if other != leaf))


def _error(ran: Ran, url: str) -> BackendError:
    """The error of an operation that can't wait for an answer."""
    if ran.poll is not None:  # since openssl 3.3 a server may postpone any request
        return BackendUnavailableError(f"cmp: {url}: {_note(ran)}")
    return failure(Log.of(ran.messages), url)


def _note(ran: Ran) -> str:
    """Tell the operator why the request waits, with the server's own reason."""
    if ran.poll is None:
        return "the server has not decided yet"
    reason = f": {quoted(ran.poll.reason)}" if ran.poll.reason else ""
    return f"the server wants to be asked again after {ran.poll.seconds} s{reason}"


def _answer_of(reference: str) -> bytes:
    try:
        answer = base64.b64decode(reference, validate=True)
    except binascii.Error:
        answer = b""
    if body_of(answer) is None:
        wanted = "the server's answer in the reference that was kept"
        raise BackendRefusedError(f"cmp: wanted {wanted}, found something else")
    return answer


_TEXT = """\
# What a CMP server (RFC 9810, RFC 9483) needs to sign for {authority} of node {node}, cluster {cluster}.

# 1. Profiles (some products call them aliases) and their names. Each certificate must have exactly the extended key
#    usages of its profile: a certificate without that extension is valid for every purpose.
#    The cluster has three CAs; if one server has all of them, each needs its own paths (`path` in the settings).
{profiles}

# 2. Requests
{request}
#    The node asks for implicit confirmation (RFC 9810 §5.1.1.1); without it, it confirms each certificate.
#    Grant a second request for the same key and names: it comes from a renewal that was interrupted.
#    If an officer has to approve, answer `waiting`; the node asks again with pollReq until there is a decision.
#    Protect errors like other answers; otherwise the node can't show the reason.

# 3. The client: this node, for the names above and no others. Either
#    a) a shared secret with reference {reference} (protect it like a CA's key: its holder can act as the node):
#         (umask 077; openssl rand -hex 32 > cmp.secret)
#       copy it to the node as /etc/ca-bridge/cmp.secret, mode 0600; or
#    b) a client certificate (keyUsage digitalSignature) from a CA that the server trusts only for this:
#         (umask 077; openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \\
#           -keyout agent.key -subj /CN=ca-bridge-{node} -out agent.csr)

# 4. In the node's settings:
#   [authority.{authority}]
#   backend = "corp"
#   [backend.corp]
#   type = "cmp"
#   url = "{url}"
#   reference = "{reference}"                             # a)
#   secret_file = "/etc/ca-bridge/cmp.secret"
#   client_cert = "/etc/ca-bridge/agent.crt"              # b), instead of the two above
#   client_key = "/etc/ca-bridge/agent.key"
#   trusted_file = "/etc/ca-bridge/cmp-ra-ca.crt"         # with b) needed: the CA of what the server signs answers with
"""

_REQUESTS: Mapping[Mode, str] = {
    "p10cr": "#    p10cr: the CSR as it is, with subject and SANs; it asks for no usages, the profile gives them.",
    "cr": "#    cr: subject, SANs, usages and validity in the template. The client has verified the proof of possession\n"
    "#    (raVerified, RFC 4211 §4): the server has to trust it as an RA, for these names and usages alone.",
}


def _profile(
    place: str, specs: list[CertificateSpec], wanted: SetupRequest, patterns: Mapping[str, NamePatterns]
) -> Iterator[str]:
    yield f"#\n#  {place}"
    usages = sorted({", ".join(eku.label for eku in EKU if eku in spec.ekus) for spec in specs})
    yield f"#    extendedKeyUsage: {' or, as the request says, '.join(usages)}"
    yield "#    keyUsage: digitalSignature, keyEncipherment; not a CA; subject and SANs: the request's"
    if not patterns:
        yield f"#    validity: {wanted.validity.days} days"
    for spec in specs:
        yield from _patterns(patterns[spec.name]) if patterns else _names(spec, wanted.certificates[spec.name])


def _patterns(patterns: NamePatterns) -> Iterator[str]:
    """The names that pods may have; a template can't ask for less than a day."""
    yield f"#    validity: the profile's, counted from its backdated beginning at most {int(patterns.longest.total_seconds())} s"
    yield "#    notBefore: less than 5 minutes ago; SANs critical below an empty subject"
    for what, values in (("URI", patterns.uris), ("DNS", patterns.dns), ("CN", patterns.common_names)):
        if values:
            yield f"#      {patterns.spec.name}: {what} {', '.join(values)}"


def _names(spec: CertificateSpec, certificate: x509.Certificate) -> Iterator[str]:
    sans = ", ".join(f"{kind}:{value}" for kind, value in sorted(san_entries(certificate)))
    text = f"{spec.name}: {name_text(certificate.subject)}; {f'SANs {sans}' if sans else 'no SANs'}"
    yield from textwrap.wrap(text, 116, initial_indent="#      ", subsequent_indent="#        ", break_long_words=False)
