"""
Files in directories that may be somebody else's, such as a home or a monitor's.

The way there is walked one directory after the other, each opened in the one before it, so that no owner of a directory
can lead us elsewhere while we look: what was judged is what is used.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bridge.system.ownership import MOST_LINKS, trusted_users

_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class ForeignLinkError(Exception):
    """Somebody else than root and the effective user decides where the path leads; the text says by what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A name in an open directory; what has the name is no link of which we know, and may be nothing."""

    directory: int  #: Its descriptor; good for nothing but as a part of a path.
    name: str
    #: Of the directories on the way, who else than root and the effective user owns one.
    owners: frozenset[int]
    #: The first directory on the way in which others than its owner can put what they like; empty: there is none.
    shared: str

    @property
    def path(self) -> Path:
        """Leads through the open directory, whatever has its old name now."""
        return Path(f"/proc/self/fd/{self.directory}/{self.name}")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Place]:
    """
    Walk to a file, which need not be there.

    A link is followed only where root or the effective user made it, on a way that nobody else could have changed.

    Raises:
        ForeignLinkError: There is another link on the way, or in its place.
        OSError: A directory can't be opened.
    """
    place = _Walk(path).place()
    try:
        yield place
    finally:
        os.close(place.directory)


class _Walk:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._trusted = trusted_users()
        self._links = 0
        self.here = os.open("/", _STEP | os.O_DIRECTORY)
        self._shown = Path("/")
        self._owners: set[int] = set()
        self._shared = ""  # where everybody may rename

    def place(self) -> Place:
        rest = list(self._path.parts[1:])
        try:
            while rest:
                name = rest.pop(0)
                self._look_round()
                rest = [*self._step(name, last=not rest), *rest]
        except BaseException:
            os.close(self.here)
            raise
        # in one with the sticky bit nobody renames what is another's, but everybody adds
        shared = self._shared or (str(self._shown) if os.fstat(self.here).st_mode & 0o022 else "")
        return Place(directory=self.here, name=name, owners=frozenset(self._owners), shared=shared)

    def _look_round(self) -> None:
        status = os.fstat(self.here)
        if status.st_uid not in self._trusted:
            self._owners.add(status.st_uid)
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX and not self._shared:
            self._shared = str(self._shown)

    def _step(self, name: str, *, last: bool) -> list[str]:
        """Go on by one name; the names that take its place, if it is a link, or the name itself has been read."""
        try:
            found = os.open(name, _STEP, dir_fd=self.here)
        except FileNotFoundError as e:
            if last:
                return []
            raise FileNotFoundError(e.errno, e.strerror, str(self._shown / name)) from None
        status = os.fstat(found)
        if stat.S_ISLNK(status.st_mode):
            try:
                return self._link(found, name, status)
            finally:
                os.close(found)
        if last:
            os.close(found)
            return []
        os.close(self.here)
        self.here, self._shown = found, self._shown / name
        return []

    def _link(self, link: int, name: str, status: os.stat_result) -> list[str]:
        self._links += 1
        if status.st_uid not in self._trusted or self._owners or self._shared:
            raise ForeignLinkError(
                f"{self._shown / name}: wanted no link, or one that only root can make, found one of user {status.st_uid}"
            )
        if self._links > MOST_LINKS:
            raise ForeignLinkError(f"{self._shown / name}: wanted a file, found links without end")
        target = Path(os.readlink("", dir_fd=link))
        if target.is_absolute():
            os.close(self.here)
            self.here, self._shown = os.open("/", _STEP | os.O_DIRECTORY), Path("/")
            return list(target.parts[1:])
        return list(target.parts)
