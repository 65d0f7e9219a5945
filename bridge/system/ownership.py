"""Who else may change what a path leads to, or read a secret: the owners and modes of all that is on the way."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: As the kernel counts them (path_resolution(7)).
MOST_LINKS = 40
_OVERFLOW_UID = 65534  # unless the administrator has set another (linux/highuid.h)
_ALL_IDS = ["0", "0", "4294967295"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """Something by which others could change what a path leads to."""

    path: Path  #: The file, directory or link.
    wanted: str
    found: str
    hint: str

    def __str__(self) -> str:
        return f"{self.path}: wanted {self.wanted}, found {self.found}"


def exposure(path: Path) -> Exposure | None:
    """
    Find by what somebody other than root and the effective user could change what a path leads to.

    The file counts, each directory on the way, and each link with what it leads to. A directory with the sticky bit
    may be everybody's, as /tmp is: what is ours in it can't be renamed by others. What does not exist is nobody's.

    Raises:
        OSError: It can't be looked at.
    """
    trusted = trusted_users()
    return next(filter(None, (_exposed(one, status, trusted) for one, status in _way(path))), None)


def foreign_link(path: Path) -> Exposure | None:
    """
    Find the first link on the way that lies where somebody other than root and the effective user may put links.

    Raises:
        OSError: It can't be looked at.
    """
    for one, status in _way(path):
        if not stat.S_ISLNK(status.st_mode):
            continue
        directory = one.parent.resolve()
        found = exposure(directory)
        if found is not None or status.st_uid not in trusted_users():
            reason = f"a link in {found.path if found else directory}, where others can put one"
            return Exposure(
                path=one,
                wanted="no link, or one that only root can make",
                found=reason,
                hint=found.hint if found else f"chown -h {os.geteuid()} {one}, after a look at where it leads",
            )
    return None


def open_secret(path: Path) -> Exposure | None:
    """
    Find whether others than its owner, and the groups of root and of this process, may read a file with a secret.

    Raises:
        OSError: It can't be looked at.
    """
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if not mode & 0o007 and not (mode & 0o070 and status.st_gid not in {0, os.getegid()}):
        return None
    return Exposure(
        path=path,
        wanted="it for its owner alone",
        found=f"mode {mode:04o}",
        hint=f"chmod 600 {path}; whoever may have read it has the secret",
    )


def _exposed(path: Path, status: os.stat_result, trusted: set[int]) -> Exposure | None:
    us = os.geteuid()
    if status.st_uid not in trusted:
        wanted = "it to belong to root" if us == 0 else f"it to belong to root or user {us}"
        return Exposure(
            path=path, wanted=wanted, found=f"user {status.st_uid}", hint=f"chown -h {us} {path}, after a look at it"
        )
    mode = stat.S_IMODE(status.st_mode)
    shared = stat.S_ISDIR(status.st_mode) and mode & stat.S_ISVTX
    if stat.S_ISLNK(status.st_mode) or shared or not mode & 0o022:
        return None
    kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a file"
    return Exposure(
        path=path,
        wanted=f"{kind} that only its owner can write to",
        found=f"mode {mode:04o}",
        hint=f"chmod go-w {path}, after a look at it",
    )


def trusted_users() -> set[int]:
    """
    The users (uids) whose files are as good as ours.

    In a user namespace that does not know everybody, whoever it does not know (root outside it, as a rule) is shown as
    one user.
    """
    ours = {0, os.geteuid()}
    if Path("/proc/self/uid_map").read_text(encoding="ascii").split() != _ALL_IDS:
        ours.add(_unknown_user())
    return ours


def _unknown_user() -> int:
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
    except FileNotFoundError:  # a unit with ProcSubset=pid
        return _OVERFLOW_UID


def _way(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything that decides where a path leads, from the root directory on, links as such."""
    here, rest, links = Path("/"), list(path.absolute().parts[1:]), 0
    yield here, here.lstat()
    while rest:
        name = rest.pop(0)
        if name == "..":
            here = here.parent
            continue
        one = here / name
        try:
            status = one.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        yield one, status
        if not stat.S_ISLNK(status.st_mode):
            here = one
            continue
        links += 1
        if links > MOST_LINKS:
            return  # nobody can open it
        target = one.readlink()
        here, rest = (Path("/") if target.is_absolute() else here), [*target.parts, *rest]
        if target.is_absolute():
            rest.pop(0)
