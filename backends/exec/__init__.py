"""
Any program as a CA, by certmonger's contract for submission helpers (doc/helpers.txt of https://pagure.io/certmonger;
measured with 0.79.17); variables of our own tell a script what certmonger can't, above all the EKUs.
"""

from __future__ import annotations

import base64
import errno
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding

from backends.exec.settings import ENVIRONMENT, LONGEST_VARIABLE, ExecSettings, ekus_text, setup_files
from bridge.contract import Backend, Issued, Names, Pending, Selector, SignRequest
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
from bridge.pki.budget import of_server
from bridge.pki.certificates import certificates_in, extension, is_for, is_signed, spki
from bridge.specs import CertificateSpec
from bridge.system.paths import program_exposure
from bridge.system.run_command import Account, Command, Ended, reached, run
from bridge.words import one_line

log = logging.getLogger("ca-bridge.exec")
#: Variables that certmonger may set but we can't: they take the node's private key, or a Kerberos principal.
NOT_OURS_TO_GIVE = frozenset(
    {"CERTMONGER_REQ_PRINCIPAL", "CERTMONGER_SPKAC", "CERTMONGER_PKCSREQ", "CERTMONGER_PKCSREQ_REKEY"}
    | {"CERTMONGER_GETCERTINITIAL", "CERTMONGER_GETCERTINITIAL_REKEY", "CERTMONGER_SCEP_RA_CERTIFICATE"}
)
#: Bytes of standard output and standard error together; a certificate with its chain has a few thousand.
_MOST_OUTPUT = 1 << 20
#: certmonger's exit statuses (its src/submit-e.h).
_ISSUED, _WAIT, _UNREACHABLE, _NOT_CONFIGURED, _WAIT_SECONDS, _UNKNOWN_OPERATION = 0, 1, 3, 4, 5, 6
#: No answer about optional information: also a refusal, such as dogtag-submit's to list profiles.
_NO_ANSWER = (2, _UNKNOWN_OPERATION)
#: The program could not ask its CA: it lacks settings, or a shell could not start what it calls.
_NO_VERDICT = (_NOT_CONFIGURED, 126, 127)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    code: int
    output: bytes
    messages: bytes  #: On standard error.


class ExecBackend(Backend):
    """One CA behind a program."""

    settings_type = ExecSettings
    setup = staticmethod(setup_files)

    def __init__(self, settings: ExecSettings) -> None:
        self._settings = settings
        self._account = _account_of(settings.user)
        self._profile = Selector(settings.profile, settings.profiles, settings.node)
        self._program = Path(settings.command[0])

    @property
    def names_beside_csr(self) -> bool:
        """As the settings say, since only the program's author knows."""
        return self._settings.names_beside_csr

    def sign(self, request: SignRequest) -> Issued | Pending:
        """
        Run the program with SUBMIT (BackendRefusedError: it refused, can't be run, or answered something else;
        BackendUnavailableError: its CA is out of reach, the time limit, or status 1 without a cookie, as from a broken
        program).
        """
        if not is_signed(request.csr):
            raise BackendRefusedError("exec: wanted a CSR that is signed with its own key, found another signature")
        return self._answer(request, self._run("SUBMIT", self._request_variables(request)))

    def collect(self, request: SignRequest, reference: str) -> Issued | Pending:
        """Run the program with POLL: the variables of SUBMIT, and the cookie that it gave."""
        variables = {**self._request_variables(request), "CERTMONGER_CA_COOKIE": reference}
        return self._answer(request, self._run("POLL", variables))

    def check(self, specs: Sequence[CertificateSpec]) -> dict[str, list[Violation]]:
        """Run the program with IDENTIFY, and ask for its profiles and required variables; it can't ask for usages."""
        authority = _authority_variables(specs[0]) if specs else {}
        self._ask("IDENTIFY", authority)
        profiles = self._ask("GET-SUPPORTED-TEMPLATES", authority, silent=_NO_ANSWER)
        needed = self._ask("GET-NEW-REQUEST-REQUIREMENTS", authority, silent=_NO_ANSWER)
        lacking = sorted(NOT_OURS_TO_GIVE & set(_names(needed)) - self._settings.environment.keys())
        needs = [Violation(subject="the program's needs", want=name, got="nothing to set it from") for name in lacking]
        offered = _names(profiles)
        wrong = {spec.name: [*_profile_violations(self._profile(spec), offered), *needs] for spec in specs}
        return {name: violations for name, violations in wrong.items() if violations}

    def issuers(self) -> list[x509.Certificate]:
        """Run the program with FETCH-ROOTS, without naming an authority; none if it does not know that operation."""
        printed = self._ask("FETCH-ROOTS", {}, silent=_NO_ANSWER)
        if not printed.strip():
            return []
        try:
            issuers = certificates_of(printed)
        except ValueError as e:
            raise self._refused(f"FETCH-ROOTS: wanted the CA's certificates, found {e}") from e
        # roots come first in this operation, and our callers want the signing certificate first
        above = {other.issuer for other in issuers if other.issuer != other.subject}
        return sorted(issuers, key=lambda issuer: issuer.subject in above)

    def _answer(self, request: SignRequest, ended: _Answer) -> Issued | Pending:
        try:
            if ended.code == _ISSUED:
                return _issued(request, ended.output)
            if ended.code == _WAIT and (cookie := cookie_of(ended.output)):
                return self._pending(cookie, ended)
            if ended.code == _WAIT_SECONDS:
                seconds, cookie = _delayed_cookie(ended.output)
                return self._pending(cookie, ended, f", and is to be asked again in {seconds} s")
        except ValueError as e:
            raise self._refused(f"{_WANTED[ended.code]}, found {e}{_aside(ended)}") from e
        raise self._error(ended)

    def _pending(self, cookie: str, ended: _Answer, when: str = "") -> Pending:
        longest = LONGEST_VARIABLE - len("CERTMONGER_CA_COOKIE=")
        if len(cookie.encode()) > longest:
            raise ValueError(f"a cookie of more than {longest} bytes")
        note = f'{self._program} waits{when}; its cookie: "{display_text(cookie.encode())}"{_aside(ended)}'
        return Pending(reference=cookie, note=note)

    def _ask(
        self, operation: str, variables: Mapping[str, str], silent: Collection[int] = (_UNKNOWN_OPERATION,)
    ) -> bytes:
        """Ask the program for information, and return its output; empty if its status says that it has no answer."""
        ended = self._run(operation, variables)
        if ended.code == _ISSUED:
            return ended.output
        if ended.code in silent:
            return b""
        error = self._error(ended)
        if ended.code not in {_UNREACHABLE, _NOT_CONFIGURED}:
            error.hint = _UNKNOWN_HINT
        raise error

    def _run(self, operation: str, variables: Mapping[str, str]) -> _Answer:
        surroundings = {**ENVIRONMENT, "HOME": self._account.home, **self._settings.environment}
        seconds = self._settings.timeout.total_seconds()
        call = {"CERTMONGER_OPERATION": operation, "CA_BRIDGE_TIMEOUT_SECONDS": str(max(1, int(seconds)))}
        self._check_program()
        output, messages = bytearray(), bytearray()
        command = Command(
            words=self._settings.command,
            environment={**surroundings, **call, **variables},
            limit=self._settings.timeout,
            account=self._account,
            umask=0o077,
            most_output=_MOST_OUTPUT,
            ends_background=True,
        )
        ended = run(command, output.extend, messages.extend)
        if ended.code is None:
            raise self._stopped(operation, ended, _Answer(code=0, output=bytes(output), messages=bytes(messages)))
        log.debug("%s: %s ended with status %d after %.2f s", self._program, operation, ended.code, ended.seconds)
        return _Answer(code=ended.code, output=bytes(output), messages=bytes(messages))

    def _check_program(self) -> None:
        """Check that only root, we and the program's account may change it, as `sudo` does for its files."""
        try:
            exposure = reached(partial(program_exposure, self._program, self._account.uid))
        except TimeoutError as e:
            raise BackendUnavailableError(f"exec: {self._program}: can't be run: {e.strerror}") from e
        except OSError as e:
            text = f"can't be run: {e.strerror}"
            raise self._refused(text, "`command` begins with its path", LocalFileError) from e
        if exposure is not None:
            raise self._refused(str(exposure), exposure.hint, LocalFileError)

    def _stopped(self, operation: str, ended: Ended, answer: _Answer) -> BackendError:
        if isinstance(ended.error, TimeoutError):
            return BackendUnavailableError(f"exec: {self._program}: {ended.failure}")
        if ended.error is not None:
            number = ended.error.errno if isinstance(ended.error, OSError) else None
            return self._refused(ended.failure, _START_HINTS.get(number or 0, ""), LocalFileError)
        text = f"{operation} {ended.failure}{_printed(answer)}"
        if ended.stopped == "output":
            return self._refused(text)
        return BackendUnavailableError(f"exec: {self._program}: {text}", hint="`timeout` is how long it may take")

    def _request_variables(self, request: SignRequest) -> dict[str, str]:
        seconds = request.validity.total_seconds()
        days = -(-request.validity // timedelta(days=1))
        optional = {
            "CERTMONGER_CA_PROFILE": self._profile(request.spec),
            "CA_BRIDGE_NODE": self._settings.node,
            "CA_BRIDGE_REPLACES": request.replaces.public_bytes(Encoding.PEM).decode() if request.replaces else "",
        }
        return {
            **{name: text for name, text in optional.items() if text},
            **_csr_variables(request.csr),
            **_names_variables(request.names),
            **_authority_variables(request.spec),
            "CA_BRIDGE_CERTIFICATE": request.spec.name,
            "CA_BRIDGE_USAGE": request.spec.usage,
            "CA_BRIDGE_EKUS": ekus_text(request.spec),
            "CA_BRIDGE_VALIDITY_SECONDS": f"{seconds:.0f}",
            "CA_BRIDGE_DAYS": str(days),
        }

    def _refused(
        self, text: str, hint: str = "", kind: type[BackendRefusedError] = BackendRefusedError
    ) -> BackendRefusedError:
        return kind(f"exec: {self._program}: {text}", hint=hint)

    def _error(self, ended: _Answer) -> BackendError:
        if ended.code < 0:
            text = f"was ended by signal {-ended.code}"
            return BackendUnavailableError(f"exec: {self._program}: {text}{_printed(ended)}")
        meaning, hint = _STATUSES.get(ended.code, ("", "certmonger knows no such status; run it by hand"))
        about = f" ({meaning})" if meaning else ""
        text = f"ended with status {ended.code}{about}{_printed(ended)}"
        if ended.code in {_WAIT, _UNREACHABLE}:
            return BackendUnavailableError(f"exec: {self._program}: {text}", hint=hint)
        return self._refused(text, hint, NoVerdictError if ended.code in _NO_VERDICT else BackendRefusedError)


def _account_of(user: str) -> Account:
    try:
        account = Account.of(user)
    except KeyError:
        raise SettingsError([SettingsProblem("user", "a user of this machine", repr(user))]) from None
    if account.is_other and Account.of("").uid != 0:
        raise SettingsError([SettingsProblem("user", "no other user (only root can become one)", user)])
    return account


_START_HINTS = {
    errno.EPERM: "only root can run it as another user",
    errno.E2BIG: "the CSR or the cookie is larger than a variable can be (131071 bytes)",
    errno.ENOEXEC: "does it begin with a line such as #!/bin/sh ?",
    errno.EACCES: "is it executable, and may its `user` enter all of its directories?",
}
_WANTED = {
    _ISSUED: "status 0: wanted a certificate for the CSR's key on standard output",
    _WAIT: "status 1: wanted a cookie on standard output",
    _WAIT_SECONDS: "status 5: wanted seconds, a line end and a cookie on standard output",
}
_STATUSES = {
    _WAIT: (
        "wait, but there is no cookie",
        "1 is what most broken programs end with; a request that waits has a cookie on standard output",
    ),
    2: ("refused", "2 is also what a shell ends with after an unset variable or a syntax error"),
    _UNREACHABLE: ("the CA can't be reached", "does the CA run, and may this node reach it?"),
    _NOT_CONFIGURED: (
        "not configured",
        "the program lacks settings: arguments in `command`, variables in `environment`",
    ),
    _WAIT_SECONDS: ("wait", "only SUBMIT and POLL may wait"),
    _UNKNOWN_OPERATION: ("operation not supported", "the program has to know SUBMIT, and POLL if it lets wait"),
    16: ("SCEP data", "SCEP helpers need the node's private key, and no program is ever given it"),
    17: ("wants a new key", "`renew` makes one; if it goes on, look for the CA's rules on keys"),
    126: ("not executable", "for the shell that started it: look into the script"),
    127: ("command not found", "for the shell that started it: `environment` may set another PATH"),
}
_UNKNOWN_HINT = "a program ends with status 6 for operations that it does not know, and asks its CA for SUBMIT alone"


def _issued(request: SignRequest, output: bytes) -> Issued:
    """The certificate for the CSR's key, and the other certificates, in no reliable order."""
    certificates = certificates_of(output)
    leaves = [certificate for certificate in certificates if is_for(certificate, request.csr)]
    if not leaves:
        raise ValueError(f"{len(certificates)} for other keys")
    newest = max(leaves, key=lambda certificate: certificate.not_valid_before_utc)
    # the rest may lead to its CA; `bridge.pki.verify` finds out which of them do
    others = tuple(certificate for certificate in certificates if certificate not in leaves)
    return Issued(leaf=newest, intermediates=others)


def _profile_violations(profile: str, offered: Sequence[str]) -> Iterator[Violation]:
    if profile and offered and profile not in offered:
        got = display_text(", ".join(offered).encode())
        yield Violation(subject="profile", want=f"{profile} among the program's", got=got)


def _authority_variables(spec: CertificateSpec) -> dict[str, str]:
    return {"CERTMONGER_CA_NICKNAME": spec.authority.name, "CA_BRIDGE_AUTHORITY": spec.authority.name}


def _names_variables(names: Names | None) -> dict[str, str]:
    """The variables for names beside the CSR, one name a line; without these variables the CSR's names count."""
    if names is None:
        return {}
    unprintable = [name for name in (*names.uris, *names.dns, names.common_name) if not name.isprintable()]
    if unprintable:  # a line break would make two names of one
        raise BackendRefusedError(f"exec: wanted names of printable characters, found {unprintable[0]!r}")
    return {
        "CA_BRIDGE_URIS": "\n".join(names.uris),
        "CA_BRIDGE_DNS": "\n".join(names.dns),
        "CA_BRIDGE_COMMON_NAME": names.common_name,
    }


def _csr_variables(csr: x509.CertificateSigningRequest) -> dict[str, str]:
    """The CSR, and its content as text; a type of SAN that it lacks has no variable."""
    names = extension(csr, x509.SubjectAlternativeName) or x509.SubjectAlternativeName([])
    sans = {
        "CERTMONGER_REQ_HOSTNAME": names.get_values_for_type(x509.DNSName),
        "CERTMONGER_REQ_IP_ADDRESS": map(str, names.get_values_for_type(x509.IPAddress)),
        "CERTMONGER_REQ_EMAIL": names.get_values_for_type(x509.RFC822Name),
    }
    texts = {name: "\n".join(values) for name, values in sans.items()}
    return {
        "CERTMONGER_CSR": csr.public_bytes(Encoding.PEM).decode(),
        "CERTMONGER_REQ_SUBJECT": csr.subject.rfc4514_string(),
        "CERTMONGER_SPKI": base64.b64encode(spki(csr.public_key())).decode(),
        "CERTMONGER_KEY_TYPE": "RSA" if isinstance(csr.public_key(), rsa.RSAPublicKey) else "EC",
        **{name: text for name, text in texts.items() if text},
    }


def _printed(ended: _Answer) -> str:
    """The program's two outputs for a message, each on one line and cut."""
    text = display_text(ended.output)
    return (f', printed: "{text}"' if text else ", printed nothing") + _aside(ended)


def _aside(ended: _Answer) -> str:
    text = display_text(ended.messages, keep_end=True)
    return f', on standard error: "{text}"' if text else ""


# --- certmonger's contract: the environment of a helper, and what it prints -----------------------------------------------


_LONGEST_TEXT = 300  # characters; certmonger itself keeps the first line of a refusal
_SECONDS = re.compile(r"[0-9]{1,9}")


def certificates_of(output: bytes) -> list[x509.Certificate]:
    """The certificates of an answer, in its order: PEM, DER, PKCS#7 or certmonger's JSON (doc/helpers.txt, "SUBMIT")."""
    if not output.strip():
        raise ValueError("nothing")
    if output.lstrip().startswith(b"{"):
        return [certificate for text in _texts(output) for certificate in certificates_in(text.encode())]
    return certificates_in(output)


def _texts(output: bytes) -> list[str]:
    try:
        document = of_server(output)
        further = [entry["certificate"] for key in ("chain", "roots") for entry in document.get(key) or ()]
        texts = [document["certificate"], *further]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError('JSON without {"certificate": …, "chain": [{"certificate": …}]}') from None
    if not all(isinstance(text, str) and text.isascii() for text in texts):
        raise ValueError("JSON with a certificate that is no text")
    return texts


def cookie_of(output: bytes) -> str:
    """The cookie of a request that waits: opaque, one line without its end, or several without the blank ones."""
    try:
        text = output.decode()
    except UnicodeDecodeError:
        raise ValueError("bytes that are no UTF-8") from None
    if "\0" in text:
        raise ValueError("a NUL character")
    return "\n".join(line for line in text.split("\n") if line.strip())


def _delayed_cookie(output: bytes) -> tuple[int, str]:
    """Seconds to wait, and the cookie on the lines after them."""
    first, _, rest = output.partition(b"\n")
    seconds = first.decode("ascii", "replace").strip()
    if not _SECONDS.fullmatch(seconds):
        instead = f'"{display_text(first)}" in the place of the seconds'
        raise ValueError(instead if seconds else "no line with the seconds")
    cookie = cookie_of(rest)
    if not cookie:
        raise ValueError("no cookie after the seconds")
    return int(seconds), cookie


def display_text(data: bytes, *, keep_end: bool = False) -> str:
    """Text for the operator: on one line, cut, without terminal controls."""
    text = data.decode("utf-8", "replace")
    return one_line(text[::-1], _LONGEST_TEXT)[::-1] if keep_end else one_line(text, _LONGEST_TEXT)


def _names(data: bytes) -> list[str]:
    """Names that a helper lists: separated by commas or line ends, blank ones left out."""
    return [name for part in re.split(r"[,\n]", data.decode("utf-8", "replace")) if (name := part.strip())]
