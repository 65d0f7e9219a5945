"""One command of the operator's: limited in time, its output told line by line and not without end."""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

MOST_OUTPUT = 16 << 10
LONGEST_LINE = 500
#: Of our own environment; whatever else came to us, a CA's token for one, is not for others.
_PASSED = ("PATH", "HOME", "LANG")
_USUAL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: How soon we notice that a command has ended whose output something else keeps open.
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int | None  #: As `subprocess` gives it; None: it did not start, or was killed at its time limit.
    failure: str = ""  #: What it did, such as "ended with code 3"; empty: it succeeded.


class CommandOutput:
    """The output of one command: told line by line, up to a limit; the rest is only counted."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._line = ""
        self._room = MOST_OUTPUT
        self.left_out = 0  #: Bytes.

    def add(self, data: bytes) -> None:
        """Take more of it."""
        shown = data[: self._room]
        self._room -= len(shown)
        self.left_out += len(data) - len(shown)
        *lines, self._line = (self._line + self._decode(shown)).split("\n")
        for line in lines:
            self._told(line)

    def end(self) -> None:
        """Hear that there is no more."""
        if self._line:
            self._told(self._line)
            self._line = ""

    def _told(self, line: str) -> None:
        self._tell(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…")


class TooMuchError(Exception):
    """A command printed more than an answer may have; it was killed."""


class Answer:
    """Standard output of one command, as it is."""

    def __init__(self, most: int) -> None:
        self.data = b""
        self._most = most

    def add(self, data: bytes) -> None:
        """
        Keep more of it.

        Raises:
            TooMuchError: It is too much.
        """
        self.data += data
        if len(self.data) > self._most:
            raise TooMuchError(f"printed more than {self._most} bytes")

    def end(self) -> None:
        """Nothing is left to do."""


def run(
    words: Sequence[str], environment: Mapping[str, str], limit: timedelta, output: CommandOutput | Answer
) -> Ended:
    """
    Run one, with nothing on its standard input and in a session of its own.

    At its time limit it is killed with all that it started, but for what made itself a session of its own. What it left
    in the background when it ended goes on, and is not waited for.

    Args:
        words: Program and arguments.
        environment: Beside PATH, HOME and LANG, which are ours.
        limit: For all of it.
        output: Is told what it writes; `CommandOutput` what goes to standard error, too.

    Raises:
        TooMuchError: Of an `Answer`.
    """
    ours = {name: os.environ[name] for name in _PASSED if name in os.environ}
    reading, writing = os.pipe()
    try:
        try:
            process = subprocess.Popen(
                list(words),
                cwd="/",
                env={"PATH": _USUAL_PATH, **ours, **environment},
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing if isinstance(output, CommandOutput) else subprocess.DEVNULL,
                start_new_session=True,
            )
        except (OSError, ValueError) as e:  # ValueError: a NUL character
            return Ended(None, f"could not be started: {e.strerror if isinstance(e, OSError) else e}")
        finally:
            os.close(writing)
        with process:
            code = _code(process, reading, limit, output)
    finally:
        os.close(reading)
        output.end()
    if code is None:
        return Ended(None, f"was still running after {limit.total_seconds():g} s, and was killed")
    if code < 0:
        return Ended(code, f"was ended by signal {-code}")
    return Ended(code, f"ended with code {code}" if code else "")


def _code(
    process: subprocess.Popen[bytes], reading: int, limit: timedelta, output: CommandOutput | Answer
) -> int | None:
    """Run to the end: the exit code; None: it was killed."""
    deadline = time.monotonic() + limit.total_seconds()
    try:
        _read_until_ended(process, reading, deadline, output)
        return process.wait(max(0.0, deadline - time.monotonic()))
    except BaseException as e:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if isinstance(e, subprocess.TimeoutExpired):
            return None
        raise


def _read_until_ended(
    process: subprocess.Popen[bytes], reading: int, deadline: float, output: CommandOutput | Answer
) -> None:
    """Read until nobody can write any more, or it has ended, or the time is over."""
    poller = select.poll()
    poller.register(reading, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        has_ended = process.poll() is not None  # before the look at the pipe, or its last words could be missed
        if poller.poll(0 if has_ended else min(left, _POLL_SECONDS) * 1000):
            data = os.read(reading, 1 << 16)
            if not data:
                return
            output.add(data)
        elif has_ended:
            return
