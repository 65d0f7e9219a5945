"""
Runs `openssl cmp` (measured with 3.0.19 and 3.5.9) with the secret in a pipe, and reads the cause of a failure from its
output, since it exits only with 0 or 1; the server's own words only choose between "refused" and "unavailable".
"""

from __future__ import annotations

import math
import re
import resource
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from subprocess import STDOUT

from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError, LocalFileError, NoVerdictError
from bridge.pki import der
from bridge.system.run_command import Command, Ended, openssl_environment, run, secret_pipe
from bridge.words import one_line

OLDEST, OLDEST_WITH_PROFILES = (3, 0), (3, 3)
#: openssl reads its answers with a limit of 100 kB; a certificate with its chain is a few.
_MOST_FILE_BYTES = 1 << 20
#: Its output about one request is below 10 kB, even with both chains of a server that is not trusted.
_MOST_MESSAGE_BYTES = 64 << 10
#: Far less than a second, the least that openssl sleeps.
_MOMENT_SECONDS = 0.2
#: Added to openssl's own limits, for its start and end on a busy machine.
_GRACE = timedelta(seconds=10)

_CERTIFICATE, _EXTRA, _CA_CERTIFICATES = "leaf.pem", "extra.pem", "ca.pem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """The end of a run of `openssl cmp`: its exit code, what it printed, and the files that it left."""

    code: int | None  #: Exit code, negative for a signal; None: we stopped it.
    messages: str  #: Empty if we stopped it, since it prints only at its end.
    answers: tuple[bytes, ...] = ()  #: The CA's messages in DER, in their order.
    leaf_pem: bytes = b""
    others_pem: bytes = b""  #: Further certificates that came with the leaf.
    poll: Poll | None = None  #: Why we stopped it: it would have slept for longer than we wait.


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The program, and how long it may take."""

    name: str  #: As in the settings.
    timeout: timedelta  #: For one request and its answer.
    wait: timedelta  #: How long one run asks again while the CA answers "waiting".

    def version(self) -> tuple[int, int]:
        """Major and minor version."""
        ended, output = self._run(["version"], Path("/"), self.timeout + _GRACE)
        if ended.code is None:
            raise _still_running(f"`{self.name} version` to end")
        text = output.decode(errors="replace").strip()
        match = re.match(r"OpenSSL (\d+)\.(\d+)\.\d+", text)
        found = (int(match[1]), int(match[2])) if match else (0, 0)
        if found < OLDEST:
            wanted = f"cmp: wanted OpenSSL 3.0 or newer as {self.name!r}, found {quoted(text)}"
            raise NoVerdictError(wanted, hint="`openssl` in the settings can name another program")
        return found

    def run(self, words: Sequence[str], given: Mapping[str, bytes], secret: bytes | None = None) -> Ran:
        """
        Run `openssl cmp` in a temporary directory with files that hold no secret; `secret` is in no file, environment
        or process list. LocalFileError: no such program; BackendUnavailableError: time limit, signal or full disk.
        """
        seconds, wait = _whole_seconds(self.timeout), _whole_seconds(self.wait)
        # openssl throws away an answer after the total timeout, issued or not: so that exceeds the other limits.
        total = 2 * seconds + wait
        names = [f"{number}.der" for number in range(wait + 2)]
        limits = ["-msg_timeout", str(seconds), "-total_timeout", str(total), "-rspout", ",".join(names)]
        limit = timedelta(seconds=total + seconds) + _GRACE
        try:
            line = nullcontext() if secret is None else secret_pipe(secret)
            with tempfile.TemporaryDirectory(prefix="ca-bridge-cmp-") as directory, line as pipe:
                folder = Path(directory)
                for name, data in given.items():
                    (folder / name).write_bytes(data)
                secret_option = [] if pipe is None else ["-secret", f"fd:{pipe}"]
                watch = _Watch([folder / name for name in names], self.wait)
                inherited = () if pipe is None else (pipe,)
                ended, output = self._run(
                    ["cmp", *words, *limits, *secret_option],
                    folder,
                    limit,
                    inherited=inherited,
                    is_enough=watch.is_enough,
                )
                ran = Ran(
                    code=ended.code,
                    messages=output.decode(errors="replace"),
                    answers=tuple(answer for name in names if (answer := _read(folder / name))),
                    leaf_pem=_read(folder / _CERTIFICATE),
                    others_pem=_read(folder / _EXTRA) + _read(folder / _CA_CERTIFICATES),
                    poll=watch.poll if ended.stopped else None,
                )
        except OSError as e:
            wanted = f"cmp: wanted a few files in {tempfile.gettempdir()}, found: {e.strerror}"
            raise BackendUnavailableError(wanted, hint="make room there") from e
        if ended.stopped == "time":
            raise _still_running(f"openssl to end within {limit.total_seconds():g} s")
        return ran

    def _run(
        self,
        words: Sequence[str],
        folder: Path,
        limit: timedelta,
        *,
        inherited: Sequence[int] = (),
        is_enough: Callable[[float], bool] | None = None,
    ) -> tuple[Ended, bytes]:
        output = bytearray()
        command = Command(
            words=[self.name, *words],
            environment=openssl_environment(),
            limit=limit,
            folder=folder,
            inherited=inherited,
            umask=0o077,
            # its memory has the secret, which a core file would show
            resources={resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: _MOST_FILE_BYTES},
        )
        ended = run(command, lambda data: output.extend(data[: _MOST_MESSAGE_BYTES - len(output)]), STDOUT, is_enough)
        if ended.error is not None:
            text = f"cmp: wanted {self.name}, which {ended.failure}"
            raise LocalFileError(text, hint="install openssl 3.0 or newer")
        if ended.code is not None and ended.code < 0:
            raise BackendUnavailableError(f"cmp: openssl {ended.failure}")
        return ended, bytes(output)


#: The files for certificates that the CA sends.
ENROLMENT = ("-certout", _CERTIFICATE, "-extracertsout", _EXTRA, "-cacertsout", _CA_CERTIFICATES)


class _Watch:
    """Looks at the CA's answers while the program runs, and says when it is of no use to wait any longer."""

    def __init__(self, files: Sequence[Path], wait: timedelta) -> None:
        self._files = list(files)
        self._wait_seconds = wait.total_seconds()
        self._enough_at: float | None = None
        self.poll: Poll | None = None

    def is_enough(self, seconds: float) -> bool:
        """
        Whether the program now sleeps longer than we wait, so that stopping it loses nothing. Each answer is judged
        once, when it is new: later the program may be asking again, and stopping it could lose a certificate.
        """
        if self._enough_at is not None:
            return seconds >= self._enough_at
        while self._files and (body := body_of(_read(self._files[0]))):
            self._files.pop(0)
            found = poll_of(body)
            if found is not None and found.seconds >= 1 and seconds + found.seconds > self._wait_seconds:
                self.poll, self._enough_at = found, seconds + _MOMENT_SECONDS
                return False
        return False


def _still_running(wanted: str) -> BackendUnavailableError:
    return BackendUnavailableError(f"cmp: wanted {wanted}, found it still running; it was stopped")


def _read(file: Path) -> bytes:
    with suppress(FileNotFoundError):
        return file.read_bytes()
    return b""


def _whole_seconds(value: timedelta) -> int:
    """The seconds, rounded up; at least one, since 0 means for ever."""
    return max(1, math.ceil(value.total_seconds()))


# --- messages in DER -------------------------------------------------------------------------------------------------

#: PKIBody's choice [26] (RFC 9810 §5.1.2), and the strings of a PKIFreeText.
_POLL_REP, _UTF8_STRING = 0xBA, 0x0C
_MOST_SECONDS = 10**9  #: Thirty years; a server may write an integer of any size.


@dataclass(frozen=True, slots=True, kw_only=True)
class Poll:
    """A server's "not yet" (RFC 9810 §5.3.22)."""

    seconds: int  #: How long to wait before asking again.
    reason: str = ""


def body_of(message: bytes) -> tuple[int, bytes] | None:
    """Tag and content of a PKIMessage's body; None: the message is not whole."""
    try:
        _header, body, *_ = der.one(message, der.SEQUENCE).children()
    except ValueError:
        return None
    return body.tag, body.content


def poll_of(body: tuple[int, bytes]) -> Poll | None:
    """Parse a pollRep, only for its first certificate; None: the body is something else."""
    tag, content = body
    if tag != _POLL_REP:
        return None
    try:
        answers, *_ = der.elements(content)
        first, *_ = answers.children()
        _, seconds, *texts = first.children()
        strings = [text.content for free in texts for text in free.children() if text.tag == _UTF8_STRING]
    except ValueError:
        return None
    reason = b"; ".join(strings).decode(errors="replace")
    return Poll(seconds=min(int.from_bytes(seconds.content, "big", signed=True), _MOST_SECONDS), reason=reason)


# --- messages of the program -----------------------------------------------------------------------------------------

_LONGEST_QUOTE = 200
_LINES_QUOTED = 2
_LONGEST_LINE = 2000  #: The longest of the program's own, a rejection with its text, has 1200 characters.


def quoted(text: str) -> str:
    """Quote text from outside: on one line, cut, without terminal controls."""
    return repr(one_line(text, _LONGEST_QUOTE))


#: `FUNCTION:FILE:LINE:CMP error: TEXT`, or without what comes before CMP.
_PREFIX = re.compile(r"(?:[\w.]*:[^:\s]*:\d+:)?CMP (?P<level>error|warning|info): ?(?P<text>.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """The log of a run of `openssl cmp`; lines that continue another one, such as a dump of a chain, are left out."""

    errors: tuple[str, ...]
    text: str  #: All lines of the log, and the other lines of standard error, which come first.

    @classmethod
    def of(cls, messages: str) -> Log:
        """Parse standard error and output together."""
        errors, lines = [], []
        is_own = True
        for whole in messages.splitlines():
            line = whole[:_LONGEST_LINE]
            match = _PREFIX.match(line)
            is_own = is_own and (match is None or match["level"] == "warning")
            if match is None and is_own:
                errors.append(line.strip())
            elif match is not None and match["level"] == "error":
                errors.append(match["text"])
            if match is not None or is_own:
                lines.append(match["text"] if match is not None else line.strip())
        return cls(errors=tuple(errors), text="\n".join(lines))

    @property
    def has_waited(self) -> bool:
        """Whether the server had the request and no answer yet when the run ended."""
        ended = "total timeout" in self.text or "polling failed" in self.text
        return "received 'waiting' PKIStatus" in self.text and ended and self.rejection is None

    @property
    def is_no_such_path(self) -> bool:
        """Whether the HTTP server knows no such path."""
        return re.search(r"code[= ]404\b", self.text) is not None

    @property
    def rejection(self) -> Rejection | None:
        """The server's verdict, if the run ended with one."""
        found = next((match for error in self.errors if (match := _VERDICT.match(error))), None)
        if found is None:
            return None
        failures = re.search(r"PKIFailureInfo: ([\w, ]*)", found["status"])
        # up to the last quotation mark, as the text may have some
        text = re.search(r'StatusString: "(.*)"', found["status"]) or re.search(r'StatusString: "(.*)', found["status"])
        return Rejection(
            failures=frozenset(re.findall(r"\w+", failures[1])) if failures else frozenset(),
            text=quoted(text[1]) if text else "",
        )


#: With `code=…` the error is HTTP's. The program leaves out text that is too long for it, up to the `;`.
_VERDICT = re.compile(r"(?:received error|request rejected by server):(?!code=)(?P<status>.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """The server's own words (PKIStatusInfo, RFC 9810 §5.2.3)."""

    failures: frozenset[str]  #: Names of PKIFailureInfo; empty if the server gave none.
    text: str  #: The statusString, quoted; empty if the server gave none.

    def __str__(self) -> str:
        return ": ".join(filter(None, [", ".join(sorted(self.failures)), self.text])) or "it gave no reason"

    def error(self, place: str) -> BackendError:
        """The refusal as an error for the operator."""
        kind = BackendUnavailableError if self.failures & _PASSING else BackendRefusedError
        hint = next((hint for name, hint in _FAILURE_HINTS.items() if name in self.failures), "")
        return kind(f"cmp: {place}: the server said no: {self}", hint=hint or "the server's log may say more")


_PASSING = frozenset({"systemUnavail", "systemFailure", "timeNotAvailable"})
_FAILURE_HINTS: Mapping[str, str] = {
    "systemUnavail": "the server is not in service; run again later",
    "systemFailure": "the server has an internal failure; run again later",
    "timeNotAvailable": "the server has no time source; run again later",
    "badMessageCheck": "the server rejects our protection: compare `reference` and the secret, or `client_cert` and its "
    "CA, with what is registered at the server",
    "signerNotTrusted": "the server does not trust the CA of `client_cert`",
    "notAuthorized": "the server does not give this certificate to this client: is the node registered there, with "
    "these names and for this path or profile?",
    "badPOP": 'the request\'s signature is wrong, or missing where the server wants one: `mode = "cr"` needs a client '
    "that the server trusts as an RA",
    "certConfirmed": "the server issued the certificate but rejected our confirmation, so it may be revoked; it was "
    "discarded, and the next run asks for another one",
    "badCertTemplate": "the server does not accept the requested subject, names, usages or validity",
    "unacceptedPolicy": "the server's policy does not allow the request",
    "unacceptedExtension": "the server does not allow a requested extension, such as a name",
    "badAlg": "the server rejects an algorithm of the request: the key's, or that of its protection",
    "badTime": "the server's clock and this machine's differ",
    "badRequest": "the server does not support this request, or has forgotten it",
    "wrongAuthority": "`recipient` is not the subject of a CA that the server serves",
    "badRecipientNonce": "an answer was repeated, or two clients have the same transaction",
    "transactionIdInUse": "the server has this transaction already; run again",
    "badCertId": "the server does not know this certificate",
    "duplicateCertReq": "the server does not sign a second time for the same key or names",
    "unsupportedVersion": "the server speaks another version of CMP",
}


@dataclass(frozen=True, slots=True)
class _Rule:
    """A failure, recognised by the program's text about it."""

    sign: str  #: A regular expression for the log.
    found: str  #: What we report; its fields are the groups of `sign`.
    hint: str = ""
    hint_tls: str = field(default="", kw_only=True)  #: The hint for an https URL; empty: `hint`.
    later: bool = field(default=False, kw_only=True)  #: Trying again may help.


_TLS_CLIENT = "does the server want a TLS client certificate? (`tls_client_cert`; its complaint may be lost)"
_NOT_CMP = "is it a CMP server that answers at this url and path? A proxy or a sign-in page may be in between"
_PROTECTION = "someone else may be answering in the server's place"

#: The first rule that fits counts; rules about a transfer come first, since openssl then saw no answer.
_RULES: Sequence[_Rule] = (
    _Rule(
        r"error = 6[24]\b",
        "wanted a TLS certificate for the name in url, found another's",
        "use the name for which the server has its certificate",
    ),
    _Rule(
        r"alert certificate required|alert (?:bad certificate|unknown ca|certificate unknown|handshake failure)",
        "the server rejects our TLS client certificate, or wants one",
        "`tls_client_cert` and `tls_client_key`, from a CA that the server trusts",
    ),
    _Rule(
        r"error = \d+ \((?P<why>[^)\n]*)\)(?s:.*)certificate verify failed",
        "wanted a TLS server that tls_ca_file vouches for, found another ({why})",
        "`tls_ca_file` must hold the CA of the server's TLS certificate",
    ),
    _Rule(
        r"wrong version number|packet length too long",
        "wanted TLS, found something else",
        "does the server speak plain HTTP?",
    ),
    _Rule(
        r"Name or service not known|Temporary failure in name resolution|No address associated",
        "the host's name can't be resolved",
        "compare the host in `url` with DNS",
        later=True,
    ),
    _Rule(
        r"connect timeout|Connection refused|connect error|Network is unreachable|No route to host",
        "no connection",
        "is the server running, and the host and port in `url` right?",
        later=True,
    ),
    _Rule(
        r"code[= ](?P<code>5\d\d|429|408)\b",
        "the HTTP server answered with status {code}",
        "run again later",
        later=True,
    ),
    _Rule(
        r"code[= ]404\b",
        "the server knows no such path (HTTP status 404)",
        "`path` (or an exception in `paths`) must be that of a profile or alias that the server has",
    ),
    _Rule(
        r"code[= ](?P<code>401|403)\b",
        "the HTTP server denies access (status {code})",
        "a proxy before the CMP server wants credentials; ca-bridge can only show a TLS client certificate",
    ),
    _Rule(
        r"code[= ](?P<code>3\d\d)\b|redirection",
        "the HTTP server redirects to another place, and redirects are not followed",
        "set `url` and `path` to the CMP server itself",
    ),
    _Rule(r"code[= ](?P<code>[13-9]\d\d)\b", "the HTTP server answered with status {code}", _NOT_CMP),
    _Rule(
        r"(?:unexpected content type:expected=application/pkixcmp, actual=|http code 2\d\d with Content-Type: )(?P<type>.*)",
        "wanted a CMP message, found {type}",
        _NOT_CMP,
    ),
    _Rule(r"max(?:imum)? resp(?:onse)? len|too long", "wanted a CMP message, found an answer without end", _NOT_CMP),
    _Rule(
        r"transfer timeout|read timeout|total timeout:request sent",
        "no answer in time",
        "`timeout` is for one answer; a server that speaks TLS only, or plain HTTP only, may look like this as well",
        later=True,
    ),
    _Rule(
        r"failed reading data|unexpected eof|Connection reset",
        "the connection ended before the answer was whole",
        "does the server speak what `url` says, HTTP or HTTPS?",
        hint_tls=_TLS_CLIENT,
        later=True,
    ),
    _Rule(
        r"missing asn1 encoding|error parsing|inconsistent content length|error decoding|nested asn1 error",
        "wanted a CMP message, found something else",
        _NOT_CMP,
    ),
    _Rule(r"total timeout", "the answer came too late and was thrown away", "a longer `timeout` may help", later=True),
    _Rule(
        r"transfer error",  # the server ended the connection while openssl wrote, perhaps
        "no answer",
        "does the server speak what `url` says, HTTP or HTTPS? if so, run again later",
        hint_tls=_TLS_CLIENT,
        later=True,
    ),
    _Rule(
        r"missing trust anchor",
        "the server signed its answer, and nothing here says whether it may",
        "with a shared secret, a server answers like this if it does not know `reference` or has another secret; "
        "`trusted_file` with the CA of its certificate shows the reason",
    ),
    _Rule(
        r"missing protection",
        "wanted an answer with protection, found one without",
        "servers may leave errors unprotected: `unprotected_errors = true` shows the reason, but anyone on the network "
        "path can forge it; a certificate is never taken from such an answer",
    ),
    _Rule(r"wrong pbm value", "the answer is protected by another secret than ours", _PROTECTION),
    _Rule(
        r"(?P<what>recipnonce|transactionid) unmatched",
        "wanted an answer to our request, found one to another ({what})",
        f"an answer was repeated, or {_PROTECTION}",
    ),
    _Rule(r"unexpected pvno", "wanted CMP version 2, found another", "the server speaks another version of CMP"),
    _Rule(
        r"unexpected sender|does not match expected sender",
        "wanted an answer from `sender`, found one from another",
        "compare `sender` with the subject of the server's certificate, in the form /O=Corp/CN=RA",
    ),
    _Rule(
        r"failed to validate newly enrolled cert",
        "the certificate is not from the CA that it was wanted from",
        "compare `path` and `recipient` with the CAs that the server has",
    ),
    _Rule(
        r"no extraCerts(?s:.*)no suitable sender cert",
        "the server did not send the certificate that it signs with",
        "add it to `trusted_file`, or let the server send it",
    ),
    _Rule(r"msg signature verification failed", "the signature of the answer is wrong", _PROTECTION),
    _Rule(
        r"error = \d+ \((?P<why>[^)\n]*)\)(?s:.*)no suitable sender cert",
        "the answer's signer is not trusted by `trusted_file` ({why})",
        "`trusted_file` must hold the CA of the server's CMP certificate (which needs the usage digitalSignature)",
    ),
    _Rule(
        r"no suitable sender cert",
        "the signer's certificate is neither in the answer nor in `trusted_file`",
        _PROTECTION,
    ),
    _Rule(
        r"cert and key do not match",
        "wanted the key of `client_cert` in `client_key`, found another's",
        "`client_cert` must begin with the certificate of the key",
    ),
    _Rule(
        r"does not match our enrollment key",
        "wanted a certificate for our key, found one for another",
        "the server mixed up two requests, or is not to be trusted; the certificate was rejected there",
    ),
    _Rule(
        r"certificate not found",
        "the server granted the request, and sent no certificate",
        "the server's log may say more",
    ),
    _Rule(
        r"[Uu]nable to load|[Cc]ould not (?:read|open|find)|cannot load|not (?:open|load)",
        "a file of the settings can't be used: {notes}",
        "PEM, not encrypted, and readable",
    ),
    _Rule(
        r"Unknown option: (?P<option>\S+)|Error parsing option",
        "this openssl does not know one of our options or commands: {notes}",
        "a newer one may; `openssl` in the settings can name it",
    ),
)


def failure(log: Log, place: str) -> BackendError:
    """The error that a failed run means."""
    if rejection := log.rejection:
        return rejection.error(place)
    notes = quoted("; ".join(log.errors[-_LINES_QUOTED:])) if log.errors else "no message"
    for rule in _RULES:
        if match := re.search(rule.sign, log.text):
            groups = {name: quoted(text).strip("'") for name, text in match.groupdict("").items()}
            kind = BackendUnavailableError if rule.later else BackendRefusedError
            hint = rule.hint_tls if rule.hint_tls and place.startswith("https:") else rule.hint
            return kind(f"cmp: {place}: {rule.found.format(notes=notes, **groups)}", hint=hint)
    return BackendRefusedError(f"cmp: {place}: openssl failed: {notes}", hint="the server's log may say more")
