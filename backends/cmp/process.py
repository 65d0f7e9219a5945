"""One run of `openssl cmp` (measured with 3.0.19 and 3.5.9): the secret goes in by a pipe, answers come in files."""

from __future__ import annotations

import math
import os
import re
import resource
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from subprocess import STDOUT

from backends.cmp.answers import Poll, body_of, poll_of, quoted
from bridge.errors import BackendRefusedError, BackendUnavailableError
from bridge.system.run_command import Command, Ended, openssl_environment, run

OLDEST, OLDEST_WITH_PROFILES = (3, 0), (3, 3)
#: openssl reads its answers with a limit of 100 kB; a certificate with its chain is a few.
_MOST_FILE_BYTES = 1 << 20
#: All that it prints about one request is below 10 kB, with both chains of a server that is not trusted.
_MOST_MESSAGE_BYTES = 64 << 10
#: Far less than the second that it sleeps at least.
_MOMENT_SECONDS = 0.2
#: Beyond its own limits, for its start and end on a busy machine.
_GRACE = timedelta(seconds=10)

_CERTIFICATE, _EXTRA, _CA_CERTIFICATES = "leaf.pem", "extra.pem", "ca.pem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """The end of a run of `openssl cmp`: its exit code, what it printed, and the files that it left."""

    code: int | None  #: Exit code, negative for a signal; None: we stopped it.
    messages: str  #: Empty if it was stopped, as it prints at its end.
    answers: tuple[bytes, ...] = ()  #: The CA's messages in DER, in their order; none if there are none to keep.
    leaf_pem: bytes = b""
    others_pem: bytes = b""  #: Further certificates that came with it.
    poll: Poll | None = None  #: Why we stopped it: it would have slept for longer than we wait.


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The program, and how long it may take."""

    name: str  #: As in the settings.
    timeout: timedelta  #: For one request and its answer.
    wait: timedelta  #: For a CA that answers "waiting", to be asked again in the same run.

    def version(self) -> tuple[int, int]:
        """Major and minor version."""
        ended, output = self._run(["version"], Path("/"), self.timeout + _GRACE)
        if ended.code is None:
            raise BackendUnavailableError(
                f"cmp: wanted `{self.name} version` to end, found it still running; it was stopped"
            )
        text = output.decode(errors="replace").strip()
        match = re.match(r"OpenSSL (\d+)\.(\d+)\.\d+", text)
        found = (int(match[1]), int(match[2])) if match else (0, 0)
        if found < OLDEST:
            wanted = f"cmp: wanted OpenSSL 3.0 or newer as {self.name!r}, found {quoted(text)}"
            raise BackendRefusedError(wanted, hint="`openssl` in the settings can name another program")
        return found

    def run(self, words: Sequence[str], given: Mapping[str, bytes], secret: bytes | None = None) -> Ran:
        """
        Run `openssl cmp` in a temporary directory with files that hold no secret; `secret` is in no file, environment
        or process list. BackendRefusedError: no such program; BackendUnavailableError: time limit, signal or full disk.
        """
        seconds, wait = _whole_seconds(self.timeout), _whole_seconds(self.wait)
        # An answer that comes after the total is thrown away, issued or not: so it is beyond all that is wanted.
        total = 2 * seconds + wait
        names = [f"{number}.der" for number in range(wait + 2)]
        limits = ["-msg_timeout", str(seconds), "-total_timeout", str(total), "-rspout", ",".join(names)]
        limit = timedelta(seconds=total + seconds) + _GRACE
        try:
            with tempfile.TemporaryDirectory(prefix="ca-bridge-cmp-") as directory, _pipe(secret) as pipe:
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
                )
        except OSError as e:
            wanted = f"cmp: wanted a few files in {tempfile.gettempdir()}, found: {e.strerror}"
            raise BackendUnavailableError(wanted, hint="make room there") from e
        if ended.stopped == "time":
            raise BackendUnavailableError(
                f"cmp: wanted openssl to end within {limit.total_seconds():g} s, found it still running; it was stopped"
            )
        return replace(ran, poll=watch.poll if ended.stopped else None)

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
            # it has the secret in its memory, which a core file would show
            resources={resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: _MOST_FILE_BYTES},
        )
        ended = run(command, lambda data: output.extend(data[: _MOST_MESSAGE_BYTES - len(output)]), STDOUT, is_enough)
        if ended.error is not None:
            text = f"cmp: wanted {self.name}, which {ended.failure}"
            raise BackendRefusedError(text, hint="install openssl 3.0 or newer")
        if ended.code is not None and ended.code < 0:
            raise BackendUnavailableError(f"cmp: openssl {ended.failure}")
        return ended, bytes(output)


#: Where the certificates go that came.
ENROLMENT = ("-certout", _CERTIFICATE, "-extracertsout", _EXTRA, "-cacertsout", _CA_CERTIFICATES)


class _Watch:
    """Looks at the CA's answers while the program runs, and says when nothing more is to be had from it for now."""

    def __init__(self, files: Sequence[Path], wait: timedelta) -> None:
        self._files = list(files)
        self._wait_seconds = wait.total_seconds()
        self._enough_at: float | None = None
        self.poll: Poll | None = None

    def is_enough(self, seconds: float) -> bool:
        """
        Whether it now sleeps for longer than we wait, so that stopping it loses nothing. Each answer is judged once,
        when it is new: later the program may be asking again, and stopping it could lose a certificate.
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


@contextmanager
def _pipe(secret: bytes | None) -> Iterator[int | None]:
    """The end to read from of a pipe with the secret's line in it, closed behind it; None without a secret."""
    if secret is None:
        yield None
        return
    reading, writing = os.pipe()
    try:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(secret + b"\n")
        yield reading
    finally:
        os.close(reading)


def _read(file: Path) -> bytes:
    with suppress(FileNotFoundError):
        return file.read_bytes()
    return b""


def _whole_seconds(value: timedelta) -> int:
    """Rounded up; at least one, as 0 means for ever."""
    return max(1, math.ceil(value.total_seconds()))
