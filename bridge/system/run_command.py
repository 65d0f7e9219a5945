"""Runs another program with limits on time and output, and ends every process that it started."""

from __future__ import annotations

import codecs
import contextlib
import errno
import logging
import os
import pwd
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

from bridge.system.paths import Exposure, program_exposure
from bridge.system.waiting import wait_until, within

log = logging.getLogger("ca-bridge")

MOST_LOGGED = 16 << 10
LONGEST_LINE = 500
USUAL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: The only variables of our own environment that an operator's command gets; others may hold a CA's token.
_PASSED = ("PATH", "HOME", "LANG")
#: How soon we notice a program's end on a kernel without pidfd_open(2).
_POLL_SECONDS = 0.1
#: How often `is_enough` is called.
_TICK_SECONDS = 0.02
#: The time for a killed program to be gone; one that waits for a dead disk, or that we may not kill, stays longer.
_KILL_SECONDS = 5.0
#: The time to find a program's file, which takes long on a network file system whose server is gone.
_REACH_SECONDS = 10.0
#: An interpreter may itself be a script, up to this depth (execve(2)).
_MOST_INTERPRETERS = 5
T = TypeVar("T")

Sink = Callable[[bytes], object]  #: Receives a program's output as it arrives.
Stopped = Literal["", "time", "output", "enough"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The user that a program runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    @classmethod
    def of(cls, name: str) -> Account:
        """Look up a user with all its groups; an empty name means our own user."""
        try:
            entry = pwd.getpwnam(name) if name else pwd.getpwuid(os.geteuid())
        except KeyError:
            if name:
                raise
            return cls(uid=os.geteuid(), gid=os.getegid(), groups=(), home="/")  # as in a container
        groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
        return cls(uid=entry.pw_uid, gid=entry.pw_gid, groups=groups, home=entry.pw_dir)

    @property
    def is_other(self) -> bool:
        """Whether it is not our own user, so that only root can run as it."""
        return self.uid != os.geteuid()


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A program with its environment and limits."""

    words: Sequence[str]  #: The program and its arguments.
    environment: Mapping[str, str]  #: The complete environment.
    limit: timedelta
    folder: Path = Path("/")
    account: Account | None = None  #: None: our own account.
    inherited: Sequence[int] = ()  #: File descriptors that stay open in the program.
    umask: int = -1  #: -1: our own umask.
    resources: Mapping[int, int] = field(default_factory=dict)  #: The limit of each, by its name in `resource`.
    most_output: int = sys.maxsize  #: In bytes, of both outputs together; a program that prints more is killed.
    #: Kill its background processes when it ends; only those in a new session escape.
    ends_background: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """The way a program ended."""

    code: int | None  #: As `subprocess` reports it; None: it did not start, or we stopped it.
    failure: str = ""  #: The failure, such as "ended with code 3"; empty: it succeeded.
    stopped: Stopped = field(default="", compare=False)  #: The limit at which we stopped it.
    error: OSError | ValueError | None = field(default=None, compare=False)  #: Why it did not start.
    seconds: float = field(default=0.0, compare=False)


def passed_on(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of an operator's command: these variables, and our own PATH, HOME and LANG."""
    return {"PATH": USUAL_PATH, **{name: os.environ[name] for name in _PASSED if os.environ.get(name)}, **variables}


def openssl_environment() -> dict[str, str]:
    """Our environment without proxies, OPENSSL_CONF and variables with secrets; messages are in English."""
    return {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if os.environ.get(name)} | {"LC_ALL": "C"}


@contextlib.contextmanager
def secret_pipe(secret: bytes) -> Iterator[int]:
    """
    The read end of a pipe with a secret's line, for `inherited`: no file, environment or process list shows it, and
    with the newline and the other end closed the program can't wait on it.
    """
    reading, writing = os.pipe()
    try:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(secret + b"\n")
        yield reading
    finally:
        os.close(reading)


def run(
    command: Command,
    output: Sink | int = subprocess.DEVNULL,
    messages: Sink | int = subprocess.DEVNULL,
    is_enough: Callable[[float], bool] | None = None,
) -> Ended:
    """
    Run a program in its own session, without standard input; at a limit it is killed with its process group, or
    abandoned a few seconds later, as `failure` says. `is_enough` gets the elapsed seconds, and returns True to stop it.
    """
    begin, account = time.monotonic(), command.account
    becoming: dict[str, Any] = {}
    if account is not None and account.is_other:  # the groups are set only then, since that takes root
        becoming = {"user": account.uid, "group": account.gid, "extra_groups": account.groups}
    try:
        _assert_within_reach(command)
        process = subprocess.Popen(
            list(command.words),
            bufsize=0,
            cwd=command.folder,
            env=dict(command.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if callable(output) else output,
            stderr=subprocess.PIPE if callable(messages) else messages,
            pass_fds=tuple(command.inherited),
            start_new_session=True,  # or it could ask for a passphrase on the terminal
            umask=command.umask,
            **becoming,
        )
    except (OSError, ValueError) as e:  # ValueError: a NUL character
        why = e.strerror if isinstance(e, OSError) else e
        return Ended(None, f"could not be started: {why}", error=e)
    running = _Running(command, process, begin)
    try:
        for name, most in command.resources.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, name, (most, most))
        sinks = {process.stdout: output, process.stderr: messages}
        pipes = {pipe.fileno(): sink for pipe, sink in sinks.items() if pipe is not None and callable(sink)}
        stopped = running.watch(pipes, is_enough)
        return running.end(stopped)
    except BaseException:
        running.end("time")
        raise
    finally:
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()


def reached(look: Callable[[], T]) -> T:
    """Look at a program in a thread (OSError: the look's own, or the file system does not answer)."""
    try:
        return within(_REACH_SECONDS, look)
    except TimeoutError:
        raise OSError(errno.ETIMEDOUT, "no answer of its file system") from None


def _assert_within_reach(command: Command) -> None:
    """Open directory, program and interpreter first: a start from a dead file system would block all our threads (vfork(2))."""

    def look() -> None:
        with contextlib.suppress(OSError, ValueError):  # the start reports it better
            os.close(os.open(command.folder, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            program = shutil.which(command.words[0], path=command.environment.get("PATH"))
            for _ in range(1 + _MOST_INTERPRETERS):
                program = _interpreter(command.folder / program) if program else None

    reached(look)


def _interpreter(program: Path) -> str | None:
    """The program in the first line of a script; None: the file is no such script (execve(2))."""
    descriptor = os.open(program, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        line = os.read(descriptor, 256).partition(b"\n")[0]
    finally:
        os.close(descriptor)
    words = line[2:].split() if line.startswith(b"#!") else []
    return os.fsdecode(words[0]) if words else None


#: Python would warn about a process object that is dropped while the process runs.
_given_up: list[subprocess.Popen[bytes]] = []


class _Running:
    def __init__(self, command: Command, process: subprocess.Popen[bytes], begin: float) -> None:
        self._command = command
        self._process = process
        self._begin = begin

    def watch(self, sinks: Mapping[int, Sink], is_enough: Callable[[float], bool] | None) -> Stopped:
        """Pass on its output until it ends or reaches a limit, even if other processes hold the pipes open."""
        left_to_print, limit = self._command.most_output, self._command.limit.total_seconds()
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
            for descriptor, sink in sinks.items():
                selector.register(descriptor, selectors.EVENT_READ, sink)
            with contextlib.suppress(OSError):
                ended = os.pidfd_open(self._process.pid)
                stack.callback(os.close, ended)
                selector.register(ended, selectors.EVENT_READ)
            tick = _POLL_SECONDS if is_enough is None else _TICK_SECONDS
            while True:
                has_ended = self._has_ended()  # before the pipes are read, or its last output could be missed
                passed = time.monotonic() - self._begin
                ready = [key for key, _ in selector.select(0 if has_ended else max(0.0, min(limit - passed, tick)))]
                printed = [key for key in ready if key.data is not None]
                for key in printed:
                    data = os.read(key.fd, 1 << 16)
                    left_to_print -= len(data)
                    key.data(data) if data else selector.unregister(key.fd)
                if left_to_print < 0:
                    return "output"
                if has_ended and (not printed or passed > limit):
                    return ""
                if not has_ended and passed > limit:
                    return "time"
                if not has_ended and is_enough is not None and is_enough(passed):
                    return "enough"

    def _has_ended(self) -> bool:
        """Check without reaping it, so that its process ID and group stay reserved."""
        if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        if self._command.ends_background:
            self._kill()
        return True

    def _kill(self) -> None:
        if self._process.returncode is None:  # else its ID may belong to another process by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self, stopped: Stopped) -> Ended:
        """Kill it if it was stopped, and wait for its end."""
        if stopped:
            self._kill()
        seconds = time.monotonic() - self._begin
        try:
            code = self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            _given_up.append(self._process)
            return Ended(None, f"{self._reason(stopped)}, and can't be killed: it goes on", stopped, seconds=seconds)
        if stopped:
            rest = ", but something that it started goes on" if self._outlived() else ""
            return Ended(None, f"{self._reason(stopped)}, and was killed{rest}", stopped, seconds=seconds)
        failure = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}" if code else ""
        return Ended(code, failure, seconds=seconds)

    def _outlived(self) -> bool:
        """Whether a process of its group still runs, because we may not kill it."""
        dying = timedelta(seconds=_KILL_SECONDS / 5)
        return wait_until(lambda: _is_alive(self._process.pid), lambda alive: not alive, dying, pause_seconds=0.02)

    def _reason(self, stopped: Stopped) -> str:
        if stopped == "output":
            return f"printed more than {_size(self._command.most_output)}"
        return f"was still running after {self._command.limit.total_seconds():g} s"


def _is_alive(group: int) -> bool:
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, start = status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
            if int(start) == group and state != "Z":
                return True
    return False


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


class OutputLines:
    """A program's output, logged line by line up to a limit; the rest is only counted."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._line = ""
        self._left = MOST_LOGGED
        self.left_out = 0  #: Bytes that were not logged.

    def add(self, data: bytes) -> None:
        """Add more output."""
        logged = data[: self._left]
        self._left -= len(logged)
        self.left_out += len(data) - len(logged)
        *lines, self._line = (self._line + self._decode(logged)).split("\n")
        for line in lines:
            self._cut(line)

    def end(self) -> None:
        """Log the last line, which may lack its line break."""
        if self._line:
            self._cut(self._line)
            self._line = ""

    def _cut(self, line: str) -> None:
        self._log(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…")


def unsafe_program(words: Sequence[str]) -> Exposure | None:
    """How others could change a program that we run; None also for a missing program, which fails at its start."""

    def look() -> Exposure | None:
        program = shutil.which(words[0], path=passed_on({})["PATH"])
        return None if program is None else program_exposure(Path(program).absolute())

    try:
        return reached(look)
    except OSError as e:
        text = e.strerror or str(e)
        return Exposure(path=Path(words[0]), wanted="a program that we can look at", found=text, hint="")


def run_logged(words: Sequence[str], variables: Mapping[str, str], limit: timedelta, lines: OutputLines) -> Ended:
    """Run an operator's command, unless others can change it; its background processes keep running."""
    if (unsafe := unsafe_program(words)) is not None:
        return Ended(None, f"is not run: {unsafe}{f' ({unsafe.hint})' if unsafe.hint else ''}")
    command = Command(words=words, environment=passed_on(variables), limit=limit)
    try:
        return run(command, lines.add, subprocess.STDOUT)
    finally:
        lines.end()


def command_failure(name: str, words: Sequence[str], variables: Mapping[str, str], limit: timedelta) -> str:
    """Run an operator's command, and log its output under a name; return why it failed, or an empty text."""
    log.info("%s: runs %s", name, words[0])
    ended = run_logged(words, variables, limit, OutputLines(lambda line: log.info("%s: %s", name, line)))
    return f"{words[0]} {ended.failure}" if ended.failure else ""


def python_command(code: str, *arguments: str) -> list[str]:
    """The command that runs code in a process with this Python and only these modules."""
    options = ["-I", "-S"] if sys.flags.no_site else ["-I"]
    places = [place for place in sys.path if place]
    return [sys.executable, *options, "-c", f"import sys; sys.path[:] = {places!r}; {code}", *arguments]
