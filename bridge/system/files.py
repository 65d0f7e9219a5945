"""Files that survive a power cut, and the one lock of a node."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

from bridge.errors import BridgeError, Exit
from bridge.system.paths import exposure
from bridge.system.status import doing
from bridge.system.waiting import wait_until

DIRECTORY_MODE = 0o700
SECRET_MODE = 0o600

_ACCESS_ACL = "system.posix_acl_access"  # acl(5)
#: Hashes and signatures of the old content: copied, they would make the new one unreadable (Linux IMA/EVM).
_OF_THE_CONTENT = {"security.ima", "security.evm"}

# linux/fs.h
_FS_IOC_GETFLAGS = 0x80086601
_FS_IMMUTABLE_FL = 0x10
_FS_APPEND_FL = 0x20


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """The attributes of a file that stay when its content is replaced."""

    mode: int  #: Permission bits.
    uid: int
    gid: int
    #: POSIX ACLs, SELinux label and whatever else (see xattr(7)); those that the file system lets us read.
    extended: dict[str, bytes]

    @classmethod
    def of(cls, path: Path) -> Attributes:
        """The attributes of the file that the path leads to."""
        status = path.stat()
        return cls(mode=stat.S_IMODE(status.st_mode), uid=status.st_uid, gid=status.st_gid, extended=_extended(path))

    @classmethod
    def private(cls) -> Attributes:
        """Attributes of a file that only we can read."""
        return cls(mode=SECRET_MODE, uid=os.geteuid(), gid=os.getegid(), extended={})

    def narrowed(self, mask: int) -> Attributes:
        """The same with no permission outside `mask`."""
        return Attributes(mode=self.mode & mask, uid=self.uid, gid=self.gid, extended=self.extended)


def _extended(path: Path) -> dict[str, bytes]:
    extended = {}
    with contextlib.suppress(OSError):  # a file system without extended attributes has none to keep
        for name in set(os.listxattr(path)) - _OF_THE_CONTENT:
            with contextlib.suppress(OSError):  # one that is not for us to read does not hide the others
                extended[name] = os.getxattr(path, name)
    return extended


def is_frozen(path: Path) -> bool:
    """Whether the file or directory is immutable or append-only (chattr(1)), which not even root can rename over."""
    flags = array.array("i", [0])
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False  # whoever may not read it is told so elsewhere
    try:
        fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, flags)
    except OSError:
        return False  # a file system without such flags
    finally:
        os.close(descriptor)
    return bool(flags[0] & (_FS_IMMUTABLE_FL | _FS_APPEND_FL))


def write_staged(path: Path, data: bytes, attributes: Attributes) -> None:
    """
    Write a new file, safe on disk when this returns; its content comes last, when only those it is for can read it.

    Raises:
        FileExistsError: The path is taken.
        OSError: Anything else; then the file is gone again.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, SECRET_MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, SECRET_MODE)  # whatever the umask is
            if (attributes.uid, attributes.gid) != (os.geteuid(), os.getegid()):
                os.fchown(descriptor, attributes.uid, attributes.gid)
            _set_extended(descriptor, attributes.extended)
            os.fchmod(descriptor, attributes.mode)  # after the ACL, whose mask it sets
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except BaseException as e:  # noqa: BLE001 (raised again)
        with contextlib.suppress(OSError):  # what went wrong first is the cause; `recover` removes the rest
            path.unlink()
        raise _with_name(e, path) from None


def _with_name(error: BaseException, path: Path) -> BaseException:
    """An error of write(2) or fsync(2) does not tell which file it was."""
    if isinstance(error, OSError) and error.filename is None:
        return OSError(error.errno, error.strerror, str(path))
    return error


def _set_extended(descriptor: int, extended: dict[str, bytes]) -> None:
    if _ACCESS_ACL not in extended:
        with contextlib.suppress(OSError):  # there is none, as a rule
            os.removexattr(descriptor, _ACCESS_ACL)  # of the directory's default ACL, which the old file did not have
    for name, value in extended.items():
        try:
            os.setxattr(descriptor, name, value)
        except OSError as e:
            # security.* may be the kernel's own to set (SELinux gives the label by policy); others are the user's
            if not (name.startswith("security.") and e.errno in (errno.EPERM, errno.EACCES, errno.ENOTSUP)):
                raise


def write_atomically(path: Path, data: bytes, mode: int = SECRET_MODE) -> None:
    """
    The old content or the new, never half, and never a moment with a looser mode.

    Raises:
        OSError: Then the old content is still there.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        Path(temporary).rename(path)
    except BaseException as e:  # noqa: BLE001 (raised again)
        with contextlib.suppress(OSError):  # what went wrong first is the cause
            Path(temporary).unlink()
        raise _with_name(e, path) from None
    sync_directory(path.parent)  # or a power cut may bring the old content back


def sync_directory(path: Path) -> None:
    """Make what was created, renamed and removed in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_directory(path: Path) -> None:
    """
    Make a directory for our eyes only, or accept one that is.

    Raises:
        BridgeError: It is somebody else's, or others can write to it or to a directory on the way.
        OSError: It can't be made.
    """
    if not path.is_dir():
        path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    if (found := exposure(path.parent)) is not None:
        raise BridgeError(f"{path} can't hold keys: {found}", hint=found.hint)
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        owner = f"owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}"
        raise BridgeError(
            f"{path}: wanted a directory of user {os.geteuid()} with mode 0700 (it holds keys), found {owner}",
            hint=how_to_own(path, status.st_uid) if os.geteuid() == 0 else _run_as(status.st_uid),
        )


def how_to_own(path: Path, owner: int) -> str:
    """A hint for a directory that is not ours alone: a CA desk's, say, is right as it is, and root is the wrong user."""
    hint = f"chown {os.geteuid()} {path} && chmod 700 {path}, after a look at who else uses it"
    return hint if owner == os.geteuid() else f"is it a CA desk's? {_run_as(owner)}; otherwise {hint}"


def _run_as(uid: int) -> str:
    return "run it as root (sudo)" if uid == 0 else f"run it as user {uid}"


class LockedError(BridgeError):
    """Another run works on this node."""

    exit_code: ClassVar[int] = Exit.LOCKED
    hint = "run again when it has ended, or with --wait 10m; `ca-bridge doctor` says whether it hangs"


@contextlib.contextmanager
def lock(path: Path, command: str, wait: timedelta = timedelta()) -> Iterator[None]:
    """
    One writer a node: an advisory lock that ends with its process, however that ends.

    The file tells the others who holds it; it stays when the lock is given back (removing it would let two in).

    Args:
        path: The lock's file.
        command: For the others to see.
        wait: How long for somebody else to give it back.

    Raises:
        LockedError: Somebody holds it; it says who, and since when.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, SECRET_MODE)
    try:
        if not take_lock(descriptor, wait):
            raise LockedError(f"wanted the lock {path}, found it held by {_holder(descriptor)}")
        since = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # on a full disk only the others know less
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "command": command, "since": since}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


#: flock(2) has no time limit of its own, and an alarm would belong to the whole process.
_LOCK_POLL_SECONDS = 0.1


def take_lock(descriptor: int, wait: timedelta) -> bool:
    """
    Take the flock(2) of an open file, which ends with the last process that has the file open.

    Args:
        descriptor: Of the file.
        wait: How long for somebody else to give it back.

    Returns:
        Whether it is ours now.
    """
    with doing("waiting for another run to end", is_plain=False):
        return wait_until(lambda: _try_lock(descriptor), bool, wait, pause_seconds=_LOCK_POLL_SECONDS)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lock, as far as its file tells."""

    pid: int | None = None
    command: str = ""
    since: datetime | None = None

    def __str__(self) -> str:
        if self.pid is None or self.since is None:
            return "a process that did not say who it is"
        age = int((datetime.now(UTC) - self.since).total_seconds())
        return f"process {self.pid} for {age} s: {self.command}"


def held_by(path: Path) -> Holder | None:
    """
    Who holds a lock; None: nobody does, or it was never taken.

    Raises:
        BridgeError: The lock's file can't be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise BridgeError(f"{path}: wanted to see who holds the lock, found: {e.strerror}") from e
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> Holder:
    # a holder that has just got it has not said who it is yet
    limit = timedelta(seconds=_SAYING_SECONDS)
    told = wait_until(lambda: _told(descriptor), lambda one: one is not None, limit, pause_seconds=_SAYING_SECONDS / 10)
    return told or Holder()


def _told(descriptor: int) -> Holder | None:
    """Who holds it, by its own words; None: nobody said."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        since = datetime.fromisoformat(found["since"])
        holder = Holder(pid=int(found["pid"]), command=str(found["command"]), since=since)
    except (ValueError, KeyError, TypeError):
        return None
    return holder if since.tzinfo is not None else None


_SAYING_SECONDS = 0.1
