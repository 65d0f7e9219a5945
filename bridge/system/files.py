"""Files that survive a power cut, free disk space, and the files that are installed with the program."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import hashlib
import os
import pwd
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from bridge.errors import BridgeError
from bridge.system.paths import UnreadableError, exposure, opened

R = TypeVar("R")
T = TypeVar("T")

DIRECTORY_MODE = 0o700
SECRET_MODE = 0o600

_ACCESS_ACL = "system.posix_acl_access"  # acl(5)
#: Hashes and signatures of the old content; copied, they would make the new content unreadable (Linux IMA/EVM).
_OF_THE_CONTENT = {"security.ima", "security.evm"}

# linux/fs.h
_FS_IOC_GETFLAGS = 0x80086601
_FS_IMMUTABLE_FL = 0x10
_FS_APPEND_FL = 0x20


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def version(status: os.stat_result) -> tuple[int, ...]:
    """Values of which at least one differs once a file was changed or replaced."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def reasons(kind: Callable[..., BridgeError], failed: str, **more: Any) -> Iterator[None]:
    """Turn an OSError or UnreadableError into a BridgeError: what `failed`, such as `PATH: can't write it`, and why."""
    try:
        yield
    except (OSError, UnreadableError) as e:
        raise kind(f"{failed}: {e.strerror if isinstance(e, OSError) else e}", **more) from e


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """File attributes that stay when the content is replaced."""

    mode: int  #: Permission bits.
    uid: int
    gid: int
    #: POSIX ACLs, SELinux label and others (see xattr(7)), if the file system lets us read them.
    extended: dict[str, bytes]

    @classmethod
    def of(cls, path: Path) -> Attributes:
        """The attributes of the file at the end of a path."""
        status = path.stat()
        return cls(mode=stat.S_IMODE(status.st_mode), uid=status.st_uid, gid=status.st_gid, extended=_extended(path))

    @classmethod
    def private(cls) -> Attributes:
        """The attributes of a file that only we can read."""
        return cls(mode=SECRET_MODE, uid=os.geteuid(), gid=os.getegid(), extended={})

    def narrowed(self, mask: int) -> Attributes:
        """The same attributes, without permissions outside `mask`."""
        return replace(self, mode=self.mode & mask)


def _extended(path: Path) -> dict[str, bytes]:
    extended = {}
    with contextlib.suppress(OSError):  # a file system without extended attributes has none to keep
        for name in set(os.listxattr(path)) - _OF_THE_CONTENT:
            with contextlib.suppress(OSError):  # one unreadable attribute does not hide the others
                extended[name] = os.getxattr(path, name)
    return extended


def is_frozen(path: Path) -> bool:
    """Whether a file or directory is immutable or append-only (chattr(1)): not even root can rename over it."""
    flags = array.array("i", [0])
    with contextlib.suppress(OSError):  # reading it reports the error; or the file system lacks such flags
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, flags)
        finally:
            os.close(descriptor)
        return bool(flags[0] & (_FS_IMMUTABLE_FL | _FS_APPEND_FL))
    return False


#: Files that are written at the same time.
_SIDE_BY_SIDE = 16


def side_by_side(write: Callable[[T], R], files: Iterable[T]) -> list[R]:
    """
    Write each file in a thread: a disk writes many at once with few writes to its journal.

    No write is in progress when this returns or raises an error, even an interruption.
    """
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 (every command loads this module)

    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        return list(pool.map(write, files))


def write_staged(path: Path, data: bytes, attributes: Attributes) -> None:
    """Write a new file, safe on disk and never readable by others; FileExistsError: it exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, SECRET_MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, SECRET_MODE)  # whatever the umask
            if (attributes.uid, attributes.gid) != (os.geteuid(), os.getegid()):
                os.fchown(descriptor, attributes.uid, attributes.gid)
            _set_extended(descriptor, attributes.extended)
            os.fchmod(descriptor, attributes.mode)  # after the ACL, whose mask it sets
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except BaseException as e:  # noqa: BLE001 (raised again)
        with contextlib.suppress(OSError):  # the first error is the cause; `recover` removes the rest
            path.unlink()
        raise _with_name(e, path) from None


def _with_name(error: BaseException, path: Path) -> BaseException:
    """Add the file's name to an error of write(2) or fsync(2), which lacks it."""
    if isinstance(error, OSError) and error.filename is None:
        return OSError(error.errno, error.strerror, str(path))
    return error


def _set_extended(descriptor: int, extended: dict[str, bytes]) -> None:
    if _ACCESS_ACL not in extended:
        with contextlib.suppress(OSError):  # usually it does not exist
            os.removexattr(descriptor, _ACCESS_ACL)  # from the directory's default ACL, which the old file did not have
    for name, value in extended.items():
        try:
            os.setxattr(descriptor, name, value)
        except OSError as e:
            # security.* may be reserved for the kernel (SELinux sets the label by policy); others are the user's
            if not (name.startswith("security.") and e.errno in (errno.EPERM, errno.EACCES, errno.ENOTSUP)):
                raise


def write_atomically(
    path: Path, data: bytes, mode: int = SECRET_MODE, adopt: Callable[[int], object] | None = None
) -> None:
    """Replace a file atomically, with `mode` or by `adopt` of its descriptor: never half-written, or with a looser mode."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if adopt is None:
                os.fchmod(descriptor, mode)
            else:
                adopt(descriptor)
            os.fsync(descriptor)
        Path(temporary).rename(path)
    except BaseException as e:  # noqa: BLE001 (raised again)
        with contextlib.suppress(OSError):  # the first error is the cause
            Path(temporary).unlink()
        raise _with_name(e, path) from None
    sync_directory(path.parent)  # or a power cut may restore the old content


def exchange(path: Path, data: bytes, staged: Path) -> None:
    """Replace a file's content in one step, through `staged` on the same file system; mode, owner and so on stay."""
    staged.unlink(missing_ok=True)  # a killed run left it
    write_staged(staged, data, Attributes.of(path))
    staged.rename(path)
    sync_directory(path.parent)


def append(path: Path, data: bytes) -> os.stat_result:
    """Append lines to a file of ours with one write, safe on disk; return its status. OSError: nothing was appended."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, SECRET_MODE)
    try:
        before = os.fstat(descriptor)
        if stat.S_IMODE(before.st_mode) != SECRET_MODE:  # whatever the umask
            os.fchmod(descriptor, SECRET_MODE)
        try:
            _write_at_once(descriptor, data)
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, before.st_size)  # leave no torn line
            raise
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if before.st_size == 0:  # the file may be new
        sync_directory(path.parent)
    return after


def _write_at_once(descriptor: int, data: bytes) -> None:
    if os.write(descriptor, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def sync_directory(path: Path) -> None:
    """Sync a directory, so that creations, renames and removals in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno != errno.EINVAL:  # a file system that can't sync a directory, such as a network share (fsync(2))
            raise
    finally:
        os.close(descriptor)


def remove_unfinished(directory: Path, pattern: str) -> None:
    """Remove files that a killed process left half-written; anything else under such a name is not ours."""
    for path in directory.glob(pattern):
        with contextlib.suppress(OSError):  # a leftover does no harm
            if stat.S_ISREG(path.lstat().st_mode):
                path.unlink()


def make_directories(path: Path, mode: int = 0o755) -> None:
    """Make a directory and its parents, through no link that others could have made, and closed to others at any umask."""
    for missing in reversed([directory for directory in (path, *path.parents) if not directory.is_dir()]):
        try:
            with opened(missing) as place:
                place.path.mkdir(mode=mode if missing == path else 0o755, exist_ok=True)
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(missing)) from None


@contextlib.contextmanager
def held_directory(path: Path) -> Iterator[Path]:
    """Make or open a directory, and hold it open, so that no other user can exchange it (ForeignLinkError)."""
    make_directories(path)
    with opened(path) as place:
        how = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(place.name or ".", how, dir_fd=place.directory)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)


def assert_holds_keys(directory: Path) -> None:
    """Raise a BridgeError if another user can replace files in a directory."""
    if (trouble := exposure(directory)) is not None:
        raise BridgeError(f"{directory} can't hold keys: {trouble}", hint=trouble.hint)


def private_directory(path: Path) -> None:
    """Make a directory that only we can enter, or accept an existing one."""
    make_directories(path, DIRECTORY_MODE)
    assert_holds_keys(path.parent)
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        owner = f"owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}"
        raise BridgeError(
            f"{path}: wanted a directory of user {os.geteuid()} with mode 0700 (it holds keys), found {owner}",
            hint=how_to_own(path, status.st_uid) if os.geteuid() == 0 else _run_as(status.st_uid),
        )


def user_name(uid: int) -> str:
    """The user's name; without a name, the number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def how_to_own(path: Path, owner: int) -> str:
    """A hint about another user's directory, which may belong to a CA desk that root must not use."""
    hint = f"chown {os.geteuid()} {path} && chmod 700 {path}, after a look at who else uses it"
    return hint if owner == os.geteuid() else f"is it a CA desk's or a door's? {_run_as(owner)}; otherwise {hint}"


def _run_as(uid: int) -> str:
    return "run it as root (sudo)" if uid == 0 else f"run it as its user (`runuser -u {user_name(uid)} -- ca-bridge …`)"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpace:
    """The space on one file system that is free for us."""

    place: Path  #: A directory on it.
    free: int  #: Bytes.
    inodes: int | None  #: None: the file system creates inodes on demand.
    is_read_only: bool = False  #: At this mount point.


def disk_spaces(places: Iterable[Path]) -> Iterator[DiskSpace]:
    """Look at each file system once."""
    seen: set[tuple[int, bool]] = set()  # a file system may be mounted twice, once read-only
    for place in (next(directory for directory in (path, *path.parents) if directory.is_dir()) for path in places):
        space = _space(place)
        kind = (place.stat().st_dev, space.is_read_only)
        if kind not in seen:
            seen.add(kind)
            yield space


def _space(place: Path) -> DiskSpace:
    statvfs = os.statvfs(place)
    for_us = os.geteuid() == 0  # the last few per cent are reserved for root
    free = statvfs.f_frsize * (statvfs.f_bfree if for_us else statvfs.f_bavail)
    inodes = (
        (statvfs.f_ffree if for_us else statvfs.f_favail) if statvfs.f_files else None
    )  # some file systems report 0
    return DiskSpace(place=place, free=free, inodes=inodes, is_read_only=bool(statvfs.f_flag & os.ST_RDONLY))


# --- files that are installed with the program ------------------------------------------------------------------------

_SHARE, _PAGES = "share/kubeadm-ca-bridge", "share/doc/kubeadm-ca-bridge"


def shipped(name: str) -> Path | None:
    """The path of an example, policy, manifest or unit, given below `config/`; None: it is not installed."""
    return next((place / name for place in _places(_SHARE, "config") if (place / name).exists()), None)


def pages() -> Path | None:
    """The directory of the documents; None: they are not installed."""
    return next((place for place in _places(_PAGES, "docs") if (place / "README.md").exists()), None)


def _places(installed: str, in_clone: str) -> tuple[Path, ...]:
    """The paths in a release, in a virtual environment and in a clone."""
    here = Path(__file__)
    return (
        here.parents[min(4, len(here.parents) - 1)] / installed,
        Path(sys.prefix, installed),
        here.parents[2] / in_clone,
    )


def how_to_begin(example: str, place: Path) -> str:
    """A hint for a missing file: the command that copies the example there."""
    return f"begin with the example: install -m 0644 {shipped(example) or f'config/{example}'} {place}"
