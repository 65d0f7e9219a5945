"""Calls that come from several threads at the same time, made one call: a process, a round trip or an fsync for all."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class _Place(Generic[T, R]):
    """One caller's place in the line."""

    __slots__ = ("error", "item", "leads", "results", "turn")

    def __init__(self, item: T) -> None:
        self.item = item
        self.turn = threading.Lock()  # held until there is a result, or it is our turn to do it for all
        self.turn.acquire()
        self.leads = False
        self.results: list[R] = []  # one, when it went well
        self.error: BaseException | None = None


class Combined(Generic[T, R]):
    """
    A function of many, to be called with one.

    Whoever comes while nobody is at it does it for all who wait, in their order; the others wait for him, and nobody
    is woken for nothing.
    """

    def __init__(self, together: Callable[[Sequence[T]], Sequence[R]], most: int) -> None:
        """
        Args:
            together: One result an item, in their order; what it raises, each of those callers gets.
            most: Items at a time.
        """
        self._together = together
        self._most = most
        self._mutex = threading.Lock()
        self._line: deque[_Place[T, R]] = deque()
        self._busy = False

    def __call__(self, item: T) -> R:
        """The result for one."""
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
        """Work for those who came first, ourselves among them; then it is the next one's turn."""
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
