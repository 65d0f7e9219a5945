"""The lock of a node, and similar locks, which end with their process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

from bridge.errors import BridgeError, Exit
from bridge.system.console import doing
from bridge.system.files import SECRET_MODE
from bridge.system.waiting import wait_until


class LockedError(BridgeError):
    """Another run is working on this node."""

    exit_code: ClassVar[int] = Exit.LOCKED
    hint = "run again when it has ended, or with --wait 10m where the command has that; `ca-bridge doctor` says whether it hangs"


@contextlib.contextmanager
def lock(path: Path, command: str, wait: timedelta = timedelta()) -> Iterator[None]:
    """Take an advisory lock that ends with its process (a LockedError names the holder); its file stays."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, SECRET_MODE)
    try:
        if not take_lock(descriptor, max(wait, _LOOK)):
            raise LockedError(f"wanted the lock {path}, found it held by {_holder(descriptor)}")
        since = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # on a full disk the lock is held without a name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "command": command, "since": since}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


#: For `held_by`, which takes the lock for a moment to look.
_LOOK = timedelta(seconds=0.1)
#: flock(2) has no timeout of its own, and an alarm would affect the whole process.
_LOCK_POLL_SECONDS = 0.1


def take_lock(descriptor: int, wait: timedelta) -> bool:
    """Take the flock(2) of an open file, which ends with the last process that has the file open."""

    def is_ours() -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    with doing("waiting for another run to end", is_plain=False):
        return wait_until(is_ours, bool, wait, pause_seconds=_LOCK_POLL_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The holder of a lock, as named in its file."""

    pid: int | None = None
    command: str = ""
    since: datetime | None = None

    def __str__(self) -> str:
        if self.pid is None or self.since is None:
            return "a process that did not write its name"
        age = int((datetime.now(UTC) - self.since).total_seconds())
        return f"process {self.pid} for {age} s: {self.command}"


def held_by(path: Path) -> Holder | None:
    """The holder of a lock; None: the lock is free."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise BridgeError(f"{path}: can't see who holds the lock: {e.strerror}") from e
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


#: A new holder needs a moment to write its name.
_SAYING_SECONDS = 0.1


def _holder(descriptor: int) -> Holder:
    """The holder named in the lock's file; if no name appears in time, it is unknown."""

    def stated() -> Holder | None:
        try:
            loads = json.loads(os.pread(descriptor, 4096, 0))
            since = datetime.fromisoformat(loads["since"])
            holder = Holder(pid=int(loads["pid"]), command=str(loads["command"]), since=since)
        except (ValueError, KeyError, TypeError):
            return None
        return holder if since.tzinfo is not None else None

    limit = timedelta(seconds=_SAYING_SECONDS)
    return wait_until(stated, bool, limit, pause_seconds=_SAYING_SECONDS / 10) or Holder()
