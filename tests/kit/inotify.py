"""What the kernel reports of directories, in the order in which it happened, however late it is read (inotify(7))."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

MOVED_FROM, CLOSE_WRITE, MOVED_TO, CREATE, IS_DIRECTORY = 0x040, 0x008, 0x080, 0x100, 0x40000000
_HEADER = struct.Struct("iIII")


class Inotify:
    """A queue of events, to be closed."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._places: dict[int, Path] = {}

    def add(self, directory: Path, mask: int) -> bool:
        """Watch a directory for these kinds of events; False: it is gone already."""
        number = self._libc.inotify_add_watch(self.descriptor, os.fsencode(directory), mask)
        if number >= 0:
            self._places[number] = directory
        return bool(number >= 0)

    def events(self) -> Iterator[tuple[Path, int]]:
        """What is there to be read: paths, and the kinds of event."""
        data, place = os.read(self.descriptor, 1 << 16), 0
        while place < len(data):
            number, mask, _, length = _HEADER.unpack_from(data, place)
            name = data[place + _HEADER.size : place + _HEADER.size + length].rstrip(b"\0")
            place += _HEADER.size + length
            if number in self._places and name:
                yield self._places[number] / os.fsdecode(name), mask

    def close(self) -> None:
        """End it."""
        os.close(self.descriptor)
