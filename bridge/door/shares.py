"""Who is next where many addresses want the few places that there are: threads, and the processes that read bundles."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

_One = TypeVar("_One")


class Shares(Generic[_One]):
    """
    So many places, and a line for each address, from which each gets its turn; the caller has a lock.

    One address has three quarters of the places at most, so that another one finds a place however long those in them
    take; beyond that it waits for its own, and is turned away by other limits alone.
    """

    def __init__(self, places: int) -> None:
        self._free, self._most = places, places - places // 4
        self._has: Counter[str] = Counter()
        self._lines: dict[str, deque[_One]] = {}  #: The address that had its turn last is last.

    def wait(self, peer: str, one: _One) -> None:
        """Put one at the end of its address's line."""
        self._lines.setdefault(peer, deque()).append(one)

    def withdraw(self, peer: str, one: _One) -> bool:
        """Take one out of its line; False: it was not there any more."""
        line = self._lines.get(peer, deque())
        if one not in line:
            return False
        line.remove(one)
        if not line:
            del self._lines[peer]
        return True

    def next(self) -> tuple[str, _One] | None:
        """An address and the one that has a place now; None: no place is free for those that wait."""
        peer = next((peer for peer in self._lines if self._free and self._has[peer] < self._most), None)
        if peer is None:
            return None
        line = self._lines.pop(peer)
        one = line.popleft()
        if line:
            self._lines[peer] = line
        self._free -= 1
        self._has[peer] += 1
        return peer, one

    def open(self) -> None:
        """Let each have a place from now on."""
        self._free = self._most = sys.maxsize

    def give_back(self, peer: str) -> None:
        """One of this address has left its place."""
        self._free += 1
        self._has[peer] -= 1
        if not self._has[peer]:
            del self._has[peer]


class Places:
    """Places that threads wait for."""

    def __init__(self, places: int) -> None:
        self._mutex = threading.Lock()
        self._shares = Shares[threading.Event](places)

    @contextlib.contextmanager
    def taken(self, peer: str, seconds: float) -> Iterator[bool]:
        """Run with a place; False: none came in time."""
        turn = threading.Event()
        with self._mutex:
            self._shares.wait(peer, turn)
            self._call()
        if not turn.wait(seconds):
            with self._mutex:
                is_late = self._shares.withdraw(peer, turn)
            if is_late:
                yield False
                return
        try:
            yield True
        finally:
            with self._mutex:
                self._shares.give_back(peer)
                self._call()

    def _call(self) -> None:
        while (found := self._shares.next()) is not None:
            found[1].set()
