"""One run of a program of the site's: whose file may be run, what surrounds it, and how it ends."""

from __future__ import annotations

import errno
import os
import pwd
import selectors
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal

#: Bytes of standard output and standard error together; a certificate with its chain has a few thousand.
MOST_OUTPUT = 1 << 20
#: Bytes of one variable, its name and `=` included (Linux: 32 pages and no more, MAX_ARG_STRLEN, one for the NUL).
LONGEST_VARIABLE = (32 << 12) - 1
#: As the kernel does it (path_resolution(7)).
_MOST_LINKS = 40


class NotRunError(Exception):
    """The program was not started; the text says what was wanted and found."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Whom a program runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    @classmethod
    def of(cls, name: str) -> Account:
        """
        The user of this name with all of its groups; empty: who we are.

        Raises:
            KeyError: No such user.
        """
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
        """Whether it is another user than ours, which only root can become."""
        return self.uid != os.geteuid()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a run ended, and what it printed."""

    code: int  #: Below zero: ended by that signal.
    stopped: Literal["", "time", "output"] = ""  #: Killed by us, at one of the limits.
    output: bytes = b""
    messages: bytes = b""  #: On standard error.
    seconds: float = 0.0


def check_program(path: Path, account: Account) -> None:
    """
    Make sure that nobody can change the program, or put another one in its place, who could not run it as this account.

    As `sudo` does for its own files: the file, each directory on the way to it, and each link, belong to root, to us
    or to the account, and nobody else may write to them. A directory where all may make files, and nobody may remove
    another's (sticky, as /tmp), is none that somebody else can write to. What an interpreter loads is not looked at.

    Raises:
        NotRunError: It is not there, no regular file, or can be changed.
    """
    owners = {0, os.geteuid(), account.uid}
    try:
        for place in _way(path):
            status = place.lstat()
            if status.st_uid not in owners:
                raise NotRunError(
                    f"wanted {place} to belong to root or to who runs it, found user {status.st_uid}",
                    hint=f"chown root {place}",
                )
            if _is_open(status.st_mode):
                raise NotRunError(
                    f"wanted {place} to be writable by its owner alone, found mode {stat.S_IMODE(status.st_mode):04o}",
                    hint=f"chmod go-w {place}",
                )
    except OSError as e:
        raise NotRunError(f"wanted a program, found: {e.strerror}", hint="`command` begins with its path") from e
    if not stat.S_ISREG(status.st_mode):
        raise NotRunError("wanted a program, found something else than a regular file")


def _way(path: Path) -> Iterator[Path]:
    """Every directory and link on the way to a file, and the file at the end."""
    here, todo, links = Path("/"), list(reversed(path.parts[1:])), 0
    yield here
    while todo:
        part = todo.pop()
        if part == "..":
            here = here.parent
            continue
        step = here / part
        yield step
        if not step.is_symlink():
            here = step
            continue
        target, links = step.readlink(), links + 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        if target.is_absolute():
            here = Path("/")
        todo += reversed(target.parts[1:] if target.is_absolute() else target.parts)


def _is_open(mode: int) -> bool:
    if stat.S_ISLNK(mode) or not mode & 0o022:
        return False
    return not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX)


def run(command: Sequence[str], environment: Mapping[str, str], account: Account, limit: timedelta) -> Ended:
    """
    Run a program in a session of its own, with nothing to read and no environment but the given one.

    When it ends, or reaches a limit, all that is left of its process group is killed: what it started in the
    background does not outlive it, unless it made itself a session of its own.

    Raises:
        NotRunError: It could not be started.
    """
    # the groups are set only where the account changes, since that takes root
    becoming: dict[str, Any] = (
        {"user": account.uid, "group": account.gid, "extra_groups": account.groups} if account.is_other else {}
    )
    begin = time.monotonic()
    try:
        process = subprocess.Popen(
            list(command),
            cwd="/",
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            umask=0o077,
            **becoming,
        )
    except OSError as e:
        raise NotRunError(f"wanted to start it, found: {e.strerror}", hint=_START_HINTS.get(e.errno or 0, "")) from e
    except ValueError as e:  # a NUL character in the environment
        raise NotRunError(f"wanted to start it, found: {e}") from e
    with process:
        return _ended(process, begin, limit.total_seconds())


_START_HINTS = {
    errno.EPERM: "only root can run it as another user",
    errno.E2BIG: "the CSR or the cookie is larger than a variable can be (131071 bytes)",
    errno.ENOEXEC: "does it begin with a line such as #!/bin/sh ?",
    errno.EACCES: "is it executable, and may its `user` enter all of its directories?",
}


def _ended(process: subprocess.Popen[bytes], begin: float, limit_seconds: float) -> Ended:
    output, messages = _Stream(process.stdout), _Stream(process.stderr)
    try:
        stopped = _watch(process, (output, messages), begin + limit_seconds)
    finally:
        # nobody has waited for it yet, so that the number is still its own
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if not stopped and not _drain((output, messages)):
        stopped = "output"
    return Ended(
        code=process.wait(),
        stopped=stopped,
        output=bytes(output.data),
        messages=bytes(messages.data),
        seconds=time.monotonic() - begin,
    )


class _Stream:
    """One pipe of a process, and all that has come through it."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        if pipe is None:
            raise TypeError("wanted a pipe")
        self.fd = pipe.fileno()
        self.data = bytearray()
        self.is_over = False
        os.set_blocking(self.fd, False)  # what keeps it open may say nothing for ever

    def read(self) -> None:
        """Read what is there now, without waiting."""
        with suppress(BlockingIOError):
            data = os.read(self.fd, 1 << 16)
            self.data += data
            self.is_over = not data


def _watch(
    process: subprocess.Popen[bytes], streams: Sequence[_Stream], deadline: float
) -> Literal["", "time", "output"]:
    """Read until the process ends, whoever may still hold the pipes, or reaches a limit, which is named."""
    ended = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(ended, selectors.EVENT_READ)
            for stream in streams:
                selector.register(stream.fd, selectors.EVENT_READ, stream)
            while (left := deadline - time.monotonic()) > 0:
                ready = [key for key, _ in selector.select(left)]
                for key in ready:
                    if isinstance(key.data, _Stream):
                        key.data.read()
                        if key.data.is_over:
                            selector.unregister(key.fd)
                if _is_too_much(streams):
                    return "output"
                if any(key.fd == ended for key in ready):
                    return ""
    finally:
        os.close(ended)
    return "time"


def _drain(streams: Sequence[_Stream]) -> bool:
    """Read what an ended process has left in the pipes; False: more than the limit."""
    for stream in streams:
        size = -1
        while not stream.is_over and len(stream.data) > size and not _is_too_much(streams):
            size = len(stream.data)
            stream.read()
    return not _is_too_much(streams)


def _is_too_much(streams: Sequence[_Stream]) -> bool:
    return sum(len(stream.data) for stream in streams) > MOST_OUTPUT
