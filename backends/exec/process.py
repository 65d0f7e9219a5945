"""One run of a program of the site's: whose file may be run, what surrounds it, and how it ends."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from bridge.system.run_command import Account

#: As the kernel does it (path_resolution(7)).
_MOST_LINKS = 40


class NotRunError(Exception):
    """The program was not started; the text says what was wanted and found."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


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
