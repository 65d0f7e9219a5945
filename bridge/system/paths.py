"""Where a path leads, and who can change that: owners and modes along the way, and reading the file at its end."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.pki.certificates import load_pem_certificates

#: The kernel's limit (path_resolution(7)).
MOST_LINKS = 40
#: Certificates, kubeconfigs and manifests are far smaller.
MAX_FILE_BYTES = 1 << 20
#: Bundles of all public CAs with their texts take one MiB.
_MOST_OPENED = 16 << 20
#: It also shows bind mounts within one file system, which `os.path.ismount` misses.
MOUNTS = Path("/proc/self/mountinfo")
_OVERFLOW_UID = 65534  # the default (linux/highuid.h)
_LOOK = os.O_PATH | os.O_CLOEXEC


# --- reading ---------------------------------------------------------------------------------------------------------


class UnreadableError(Exception):
    """A path exists and can't be read; the message says why."""


class _DirectoryError(UnreadableError):
    """The path is a directory."""


def read(path: Path) -> bytes | None:
    """A file's content; None: no file, a dangling link or a directory, as for kubeadm; else UnreadableError."""
    try:
        with regular_file(path) as (descriptor, _):
            return _content(descriptor)
    except (FileNotFoundError, NotADirectoryError, _DirectoryError):
        return None


def read_present(path: Path) -> bytes:
    """The content of a file that must exist (UnreadableError also if it does not)."""
    data = read(path)
    if data is None:
        raise UnreadableError("no file")
    return data


def read_once(path: Path) -> tuple[bytes, os.stat_result]:
    """Content and status of a file, opened once, without following a link; keep these bytes rather than the name."""
    try:
        with regular_file(path, os.O_NOFOLLOW) as (descriptor, status):
            return _content(descriptor), status
    except NotADirectoryError as e:
        raise UnreadableError("not a regular file") from e


@contextlib.contextmanager
def regular_file(path: Path, flags: int = 0, *, most: int | None = None) -> Iterator[tuple[int, os.stat_result]]:
    """Open a regular file of at most `most` bytes; FileNotFoundError, NotADirectoryError or UnreadableError."""
    with contextlib.ExitStack() as stack:
        try:
            fd = os.open(path, _LOOK | flags)
            stack.callback(os.close, fd)
            status = os.fstat(fd)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as e:
            raise UnreadableError(e.strerror or str(e)) from e
        if stat.S_ISDIR(status.st_mode):
            raise _DirectoryError("a directory, not a regular file")
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableError(f"{kind(status.st_mode)}, not a regular file")
        if most is not None and status.st_size > most:
            raise UnreadableError(f"more than {most} bytes")
        try:
            descriptor = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            raise UnreadableError(e.strerror or str(e)) from e
        stack.callback(os.close, descriptor)
        yield descriptor, status


def open_regular(path: Path, most: int | None = _MOST_OPENED) -> io.FileIO:
    """Open a regular file of at most `most` bytes; OSError for a longer file or another kind, such as a FIFO."""
    try:
        with regular_file(path, most=most) as (descriptor, _):
            return io.FileIO(os.dup(descriptor))
    except UnreadableError as e:
        raise OSError(errno.EINVAL, str(e), str(path)) from e


def _content(descriptor: int) -> bytes:
    try:
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise UnreadableError(e.strerror or str(e)) from e
    if len(data) > MAX_FILE_BYTES:
        raise UnreadableError(f"more than {MAX_FILE_BYTES} bytes")
    return data


def kind(mode: int) -> str:
    """The name of a file's kind, by its mode (stat)."""
    names = {stat.S_IFREG: "a file", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link"}
    return (names | {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}).get(stat.S_IFMT(mode), "a device")


class NoCaFileError(UnreadableError):
    """The CA file does not exist."""


def read_public_key(path: Path, setting: str) -> PublicKeyTypes:
    """Read a public key or a certificate's key (PEM) from the file that a setting names (SettingsError: it has none)."""
    from bridge.pki.signatures import public_key  # noqa: PLC0415 (15 ms; only if something is signed)

    try:
        return public_key(read(path) or b"")
    except (UnreadableError, ValueError) as e:
        wanted = str(e) if isinstance(e, ValueError) else "a certificate or a public key in PEM"
        raise SettingsError([SettingsProblem(setting, wanted, f"something else in {path}")]) from None


def read_ca_file(path: Path) -> tuple[x509.Certificate, ...]:
    """The certificates of a CA file, kubeadm's trust anchor first; NoCaFileError without it, else UnreadableError."""
    data = read(path)
    if data is None:
        raise NoCaFileError(os.strerror(errno.ENOENT))
    try:
        return tuple(load_pem_certificates(data))
    except ValueError as e:
        raise UnreadableError(str(e)) from None


def own_text(path: Path, what: str, hint: str) -> str:
    """Read a text file that only root and the effective user can change; `what` names it in the SettingsError."""
    try:
        assert_ours(path)
        data = read(path)
    except (OSError, UnreadableError) as e:
        found = str(e.strerror if isinstance(e, OSError) else e)
        raise SettingsError([SettingsProblem("", what, found, path)]) from None
    if data is None and path.is_dir():
        raise SettingsError([SettingsProblem("", what, "a directory", path)], hint="name the file in it")
    if data is None:
        raise SettingsError([SettingsProblem("", what, "none", path)], hint=hint)
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise SettingsError([SettingsProblem("", "UTF-8 text", f"byte {e.start} is not", path)]) from None


def assert_ours(path: Path) -> None:
    """Make sure that only root and the effective user can change a file that decides what is run or signed."""
    weakness = exposure(path)
    if weakness is not None:
        raise SettingsError([SettingsProblem("", weakness.wanted, weakness.found, weakness.path)], hint=weakness.hint)


def real_path(path: Path, *, strict: bool = False) -> Path:
    """Follow a path's links, even to a missing target; unlike `Path.resolve` it does not fail on a loop of links."""
    return Path(os.path.realpath(path, strict=strict))


def mounts() -> dict[str, str]:
    """The mount points and their file system types (proc(5), mountinfo); empty: the kernel does not list them."""
    try:
        lines = MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {mounted_at(word[4]): word[word.index("-") + 1] for word in words if "-" in word[:-1]}


def mounted_at(place: str) -> str:
    """A mount point as mount tables write it: blanks and similar characters in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), place)


# --- who can change it -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """A way for others to change what a path leads to."""

    path: Path  #: The file, directory or link that they can change.
    wanted: str
    found: str
    hint: str

    def __str__(self) -> str:
        return f"{self.path}: wanted {self.wanted}, found {self.found}"


def exposure(path: Path, also: int | None = None, *, new_files: bool = False) -> Exposure | None:
    """
    How a user other than root, the effective user and `also` (a uid) could change what a path leads to (OSError).

    Args:
        path: A file, perhaps a missing one, or a directory.
        also: A further user who may change it.
        new_files: The path is a directory for new files, in which no other user may make one first.
    """
    trusted = trusted_users() | ({also} if also is not None else set())
    walk = ((step, new_files and step.is_last) for step in _steps(path) if step.status is not None)
    weaknesses = (_exposed(step, trusted, also, new_files=is_open) for step, is_open in walk)
    return next(filter(None, weaknesses), None)


def program_exposure(path: Path, account: int | None = None) -> Exposure | None:
    """Why a program must not be run: others can change or replace it, or it is not a regular file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        hint = "a command begins with the path of its program"
        return Exposure(path=path, wanted="a program", found="something else than a regular file", hint=hint)
    return exposure(path, account)


def foreign_link(path: Path) -> Exposure | None:
    """The first link in a directory in which users other than root and the effective user can create links."""
    for step in _steps(path):
        if step.status is None or not stat.S_ISLNK(step.status.st_mode):
            continue
        directory = real_path(step.path.parent)
        weakness = exposure(directory)
        if weakness is not None or step.status.st_uid not in trusted_users():
            reason = f"a link in {weakness.path if weakness else directory}, where others can put one"
            return Exposure(
                path=step.path,
                wanted="no link, or one that only root can make",
                found=reason,
                hint=weakness.hint
                if weakness
                else f"chown -h {os.geteuid()} {step.path}, after a look at where it leads",
            )
    return None


def open_secret(path: Path) -> Exposure | None:
    """Whether anyone but the owner, and the groups of root and this process, can read a file with a secret."""
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if not mode & 0o007 and not (mode & 0o070 and status.st_gid not in {0, os.getegid()}):
        return None
    return Exposure(
        path=path,
        wanted="it for its owner alone",
        found=f"mode {mode:04o}",
        hint=f"chmod 600 {path}; replace the secret if another user may have read it",
    )


def trusted_users() -> set[int]:
    """The users (uids) whose files we trust like our own."""
    # in a user namespace all users from outside share one uid, and so does root if the namespace has none of its own;
    # else (`PrivateUsers=yes`) that uid is not trusted
    users = {0, os.geteuid()}
    spans = [line.split() for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()]
    if not any(int(first) == 0 and int(count) for first, _, count in spans):
        try:
            users.add(int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii")))
        except FileNotFoundError:  # a unit has ProcSubset=pid
            users.add(_OVERFLOW_UID)
    return users


def _exposed(step: _Step, trusted: set[int], also: int | None, *, new_files: bool) -> Exposure | None:
    path, status = step.path, step.judged
    us = os.geteuid()
    if status.st_uid not in trusted:
        others = sorted({us, us if also is None else also} - {0})
        wanted = " or ".join(["it to belong to root", *(f"user {uid}" for uid in others)])
        hint = f"chown -h {us} {path}, after a look at it"
        return Exposure(path=path, wanted=wanted, found=f"user {status.st_uid}", hint=hint)
    is_open = bool(status.st_mode & 0o022) if new_files else _others_can_change(status)
    if stat.S_ISLNK(status.st_mode) or not is_open:
        return None
    return Exposure(
        path=path,
        wanted=f"{kind(status.st_mode)} that only its owner can write to",
        found=f"mode {stat.S_IMODE(status.st_mode):04o}",
        hint=f"chmod go-w {path}, after a look at it",
    )


def _others_can_change(status: os.stat_result) -> bool:
    # the sticky bit in /tmp keeps others from renaming our files, and not from making one first
    is_shared = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    return bool(status.st_mode & 0o022) and not is_shared


# --- the steps of a path ---------------------------------------------------------------------------------------------


class ForeignLinkError(BridgeError):
    """A user other than root and the effective user decides where the path leads; the message says how."""

    hint = "name a directory in which no other user can put links"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPath:
    """A name in an open directory, perhaps another user's, such as a home; the name is no link."""

    directory: int  #: The directory's descriptor, only for use in a path.
    name: str
    #: Users other than root and the effective user who own directories along the way.
    owners: frozenset[int]
    #: The first directory along the way that users other than its owner can write to; empty: none.
    shared: str

    @property
    def path(self) -> Path:
        """A path through the open directory, even if its name now leads elsewhere."""
        return Path(f"/proc/self/fd/{self.directory}/{self.name}")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[OpenPath]:
    """Walk to a file, which may be missing, through no link that others could have made (ForeignLinkError)."""
    trusted, owners, shared = trusted_users(), set[int](), ""
    with contextlib.closing(_steps(path)) as steps:
        for step in steps:
            if step.status is not None and stat.S_ISLNK(step.status.st_mode):
                if step.status.st_uid not in trusted or owners or shared:
                    wanted = "wanted no link, or one that only root can make"
                    raise ForeignLinkError(f"{step.path}: {wanted}, found one of user {step.status.st_uid}")
            elif step.is_last:
                mode = os.fstat(step.directory).st_mode
                if not stat.S_ISDIR(mode):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(step.path.parent))
                # the sticky bit stops renames by others, not new files
                shared = shared or (str(step.path.parent) if mode & 0o022 else "")
                yield OpenPath(directory=step.directory, name=step.path.name, owners=frozenset(owners), shared=shared)
                return
            else:
                if step.judged.st_uid not in trusted:
                    owners.add(step.judged.st_uid)
                if _others_can_change(step.judged):
                    shared = shared or str(step.path)
    raise ForeignLinkError(f"{path}: wanted a file, found links without end")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One name along a path, in a directory that stays open until the next step."""

    path: Path  #: The path walked so far, for messages.
    status: os.stat_result | None  #: The link's own status, if it is a link; None: the name does not exist.
    directory: int  #: Descriptor of the name's directory.
    is_last: bool  #: Only the target of a link can follow.

    @property
    def judged(self) -> os.stat_result:
        if self.status is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        return self.status


def _steps(path: Path) -> Generator[_Step]:
    """All steps that decide where a path leads, from / on, links included; ends at a missing name or a loop."""
    here, reached, links = os.open("/", _LOOK | os.O_DIRECTORY), Path("/"), 0
    rest = list(path.absolute().parts[1:])
    try:
        yield _Step(path=reached, status=os.fstat(here), directory=here, is_last=not rest)
        while rest:
            name = rest.pop(0)
            step = reached.parent if name == ".." else reached / name
            try:
                fd = os.open(name, _LOOK | os.O_NOFOLLOW, dir_fd=here)
            except (FileNotFoundError, NotADirectoryError):
                yield _Step(path=step, status=None, directory=here, is_last=not rest)
                return
            try:
                status = os.fstat(fd)
                yield _Step(path=step, status=status, directory=here, is_last=not rest)
                if not stat.S_ISLNK(status.st_mode):
                    here, reached, fd = fd, step, here
                    continue
                links += 1
                if links > MOST_LINKS:
                    return
                target = Path(os.readlink("", dir_fd=fd))
                rest = [*target.parts[target.is_absolute() :], *rest]
                if target.is_absolute():
                    os.close(here)
                    here, reached = os.open("/", _LOOK | os.O_DIRECTORY), Path("/")
            finally:
                os.close(fd)
    finally:
        os.close(here)
