"""Calls that come from several threads at the same time, made one call: a process, a round trip or an fsync for all."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(eq=False)
class _Place(Generic[T, R]):
    """One caller's, in the line."""

    item: T
    done: bool = False
    results: list[R] = field(default_factory=list)  # one, when it went well
    error: BaseException | None = None


class Combined(Generic[T, R]):
    """
    A function of many, to be called with one.

    Whoever comes while nobody is at it does it for all who wait, in their order; the others wait for him.
    """

    def __init__(self, together: Callable[[Sequence[T]], Sequence[R]], most: int) -> None:
        """
        Args:
            together: One result an item, in their order; what it raises, each of those callers gets.
            most: Items at a time.
        """
        self._together = together
        self._most = most
        self._changed = threading.Condition()
        self._line: deque[_Place[T, R]] = deque()
        self._busy = False

    def __call__(self, item: T) -> R:
        """The result for one."""
        place: _Place[T, R] = _Place(item)
        with self._changed:
            self._line.append(place)
            self._changed.wait_for(lambda: place.done or not self._busy)
            if place.done:
                return _result(place)
            self._busy = True
            batch = self._next(place)
        self._run(batch)
        with self._changed:
            self._busy = False
            self._changed.notify_all()
        return _result(place)

    def _next(self, ours: _Place[T, R]) -> list[_Place[T, R]]:
        """Those who came first, and ourselves."""
        batch = [self._line.popleft() for _ in range(min(len(self._line), self._most))]
        if ours not in batch:
            self._line.remove(ours)
            batch.append(ours)
        return batch

    def _run(self, batch: Sequence[_Place[T, R]]) -> None:
        try:
            results = self._together([place.item for place in batch])
            for place, result in zip(batch, results, strict=True):
                place.results.append(result)
        except BaseException as e:  # noqa: BLE001 (each caller gets it)
            for place in batch:
                place.error = e
        for place in batch:
            place.done = True


def _result(place: _Place[T, R]) -> R:
    if place.error is not None:
        raise place.error
    return place.results[0]
