"""Many files that survive a power cut, in a fraction of the time that each would take by itself."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bridge.system.files import SECRET_MODE, sync_directory

#: Groups whose files are open at a time.
_AT_ONCE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFile:
    """A file that is to be there, whatever is there now."""

    path: Path
    data: bytes
    mode: int = SECRET_MODE
    links: Sequence[Path] = ()  #: Its other names, in the same directory; one that is taken stays what it is.


def write_together(groups: Sequence[Sequence[NewFile]]) -> list[OSError | None]:
    """
    Write many files as `files.write_atomically` does one; all are written before the disk is waited for.

    Args:
        groups: Nothing of a group is put in place before all of it is on disk; then each file is, in their order.

    Returns:
        One answer a group. None: it is in place, and safe on disk; an error: not all of it is.
    """
    errors: list[OSError | None] = []
    for start in range(0, len(groups), _AT_ONCE):
        some = [_Group([_File(new) for new in group]) for group in groups[start : start + _AT_ONCE]]
        try:
            for step in (_File.write, _File.sync, _File.put_in_place):
                for group in some:
                    group.each(step)
            _sync_directories(some)
        finally:
            for group in some:
                group.close()
        errors += [group.error for group in some]
    return errors


def remove_unfinished(directory: Path, pattern: str) -> None:
    """Remove what a killed process left half written; whatever else is there under such a name is not ours."""
    for path in directory.glob(pattern):
        with contextlib.suppress(OSError):  # it is in nobody's way
            if stat.S_ISREG(path.lstat().st_mode):
                path.unlink()


def _sync_directories(groups: Sequence[_Group]) -> None:
    """Or a power cut may take the new names away."""
    for directory in {file.new.path.parent for group in groups for file in group.files}:
        try:
            sync_directory(directory)
        except OSError as e:
            for group in groups:
                if any(file.new.path.parent == directory for file in group.files):
                    group.error = group.error or e


class _File:
    """One file on its way: it has another name until it is on disk."""

    def __init__(self, new: NewFile) -> None:
        self.new = new
        self._file: BinaryIO | None = None
        self._temporary: Path | None = None

    def write(self) -> None:
        path = self.new.path
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
        self._file, self._temporary = os.fdopen(descriptor, "wb"), Path(temporary)
        self._file.write(self.new.data)
        self._file.flush()
        os.fchmod(descriptor, self.new.mode)

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def put_in_place(self) -> None:
        if self._temporary is not None:
            self._temporary.rename(self.new.path)
            self._temporary = None
        for link in self.new.links:
            with contextlib.suppress(FileExistsError):
                os.link(self.new.path, link)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what went wrong first is the cause
            if self._temporary is not None:
                self._temporary.unlink()
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()


@dataclass
class _Group:
    """Files that are of no use without each other."""

    files: Sequence[_File]
    error: OSError | None = None  #: Nothing more is done.

    def each(self, step: Callable[[_File], None]) -> None:
        """A step of every file."""
        for file in self.files:
            if self.error is None:
                try:
                    step(file)
                except OSError as e:
                    self.error = OSError(e.errno, e.strerror, str(file.new.path))

    def close(self) -> None:
        for file in self.files:
            file.close()
