"""Room on the file systems that are written to: bytes and inodes."""

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


def rooms(places: Iterable[Path]) -> Iterator[Room]:
    """
    Look at each file system once.

    Args:
        places: Directories; of one that is not there yet, that in which it will be made.
    """
    seen: set[int] = set()
    for place in map(_existing, places):
        device = place.stat().st_dev
        if device not in seen:
            seen.add(device)
            yield _room(place)


def _existing(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if one.is_dir())


def _room(place: Path) -> Room:
    found = os.statvfs(place)
    for_us = os.geteuid() == 0  # the last few per cent are root's
    free = found.f_frsize * (found.f_bfree if for_us else found.f_bavail)
    inodes = (found.f_ffree if for_us else found.f_favail) if found.f_files else None  # some file systems say 0
    return Room(place=place, free=free, inodes=inodes)
