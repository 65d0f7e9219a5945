"""Many at once: `write_together` for 10,000 CSRs at the desk, `Combined` for the gateway (docs/evidence/numbers.md)."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from bridge.system.files import SECRET_MODE, sync_directory

#: Python takes its lock from a thread after 5 ms, for any of dozens that wait for it; ours give it up by themselves with
#: each request. In `http.KeptConnection` of 16 threads at once a request takes a quarter less processor time with this.
SWITCH_SECONDS = 0.05

T = TypeVar("T")
R = TypeVar("R")

# --- many files, one wait for the disk --------------------------------------------------------------------------------

#: Groups whose files are open at a time.
_AT_ONCE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFile:
    """A file that is to be there, whatever is there now."""

    path: Path
    data: bytes
    mode: int = SECRET_MODE
    links: Sequence[Path] = ()  #: Its other names, in the same directory; a name that is taken stays what it is.


def write_together(groups: Sequence[Sequence[NewFile]]) -> list[OSError | None]:
    """Write groups of files and wait for the disk once; no file of a group is put in place before all are on disk."""
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
        with contextlib.suppress(OSError):  # it does no harm
            if stat.S_ISREG(path.lstat().st_mode):
                path.unlink()


def _sync_directories(groups: Sequence[_Group]) -> None:
    """Flush the directories, or a power cut may take the new names away."""
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
        for file in self.files:
            if self.error is None:
                try:
                    step(file)
                except OSError as e:
                    self.error = OSError(e.errno, e.strerror, str(file.new.path))

    def close(self) -> None:
        for file in self.files:
            file.close()


# --- many threads' calls, one call ------------------------------------------------------------------------------------


class _Place(Generic[T, R]):
    __slots__ = ("error", "item", "leads", "results", "turn")

    def __init__(self, item: T) -> None:
        self.item = item
        self.turn = threading.Lock()  # held until there is a result, or it is our turn to do it for all
        self.turn.acquire()
        self.leads = False
        self.results: list[R] = []  # empty after an error
        self.error: BaseException | None = None


class Combined(Generic[T, R]):
    """
    Batches concurrent calls into one.

    A caller that comes while no batch is at work calls the function for all that wait, in their order; the others sleep
    until they have their result, or lead the next batch.
    """

    def __init__(self, together: Callable[[Sequence[T]], Sequence[R]], most: int) -> None:
        """`together` returns one result an item, in their order; what it raises, each caller gets."""
        self._together = together
        self._most = most
        self._mutex = threading.Lock()
        self._line: deque[_Place[T, R]] = deque()
        self._busy = False

    def __call__(self, item: T) -> R:
        """The result for one item."""
        place: _Place[T, R] = _Place(item)
        with self._mutex:
            self._line.append(place)
            place.leads, self._busy = not self._busy, True
        if not place.leads:
            place.turn.acquire()
        if place.leads:
            self._lead()
        if place.error is not None:
            raise place.error
        return place.results[0]

    def _lead(self) -> None:
        """Call the function for the first in the line, ourselves among them; the next in the line leads then."""
        with self._mutex:
            batch = [self._line.popleft() for _ in range(min(len(self._line), self._most))]
        try:
            results = self._together([place.item for place in batch])
            for place, result in zip(batch, results, strict=True):
                place.results.append(result)
        except BaseException as e:  # noqa: BLE001 (each caller gets it)
            for place in batch:
                place.error = e
        with self._mutex:
            following = self._line[0] if self._line else None
            self._busy = following is not None
        if following is not None:
            following.leads = True
            following.turn.release()
        for place in batch:
            if not place.leads:
                place.turn.release()
