"""Room on the file systems that are written to: bytes, inodes, and whether they can be written to at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The free space of one file system, for us."""

    place: Path  #: A directory on it.
    free: int  #: Bytes.
    inodes: int | None  #: None: the file system makes them as it needs them.
    is_read_only: bool = False  #: As it is mounted there.


def rooms(places: Iterable[Path]) -> Iterator[Room]:
    """
    Look at each file system once.

    Args:
        places: Directories; of one that is not there yet, that in which it will be made.
    """
    seen: set[tuple[int, bool]] = set()  # one file system may be mounted twice, and one of these read-only
    for place in map(_existing, places):
        room = _room(place)
        kind = (place.stat().st_dev, room.is_read_only)
        if kind not in seen:
            seen.add(kind)
            yield room


def _existing(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if one.is_dir())


def _room(place: Path) -> Room:
    found = os.statvfs(place)
    for_us = os.geteuid() == 0  # the last few per cent are root's
    free = found.f_frsize * (found.f_bfree if for_us else found.f_bavail)
    inodes = (found.f_ffree if for_us else found.f_favail) if found.f_files else None  # some file systems say 0
    return Room(place=place, free=free, inodes=inodes, is_read_only=bool(found.f_flag & os.ST_RDONLY))
