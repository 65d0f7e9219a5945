"""A reader's limits: bytes, time, and steps (values, keys, files), since a megabyte of `[],` is 350,000 lists."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

#: A kubeconfig with a thousand clusters has about 30,000 values, a bundle of a dozen requests 500.
MOST_BYTES, MOST_STEPS = 1 << 20, 100_000
#: A page of a thousand Node objects' metadata has up to 400 values a node; this limit takes 70 MB at most.
MOST_OF_SERVER = 1_000_000


class OverBudgetError(ValueError):
    """The input exceeds a reader's budget."""

    def __init__(self, wanted: str, found: str) -> None:
        self.wanted = wanted
        self.found = found
        super().__init__(f"wanted {wanted}, found {found}")


class Budget:
    """The remaining budget; all functions that read one document share it."""

    def __init__(
        self,
        size: int = MOST_BYTES,
        steps: int = MOST_STEPS,
        *,
        seconds: float | None = None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Begin; `clock` returns seconds, and only a time limit needs it."""
        self._size, self._steps, self._seconds = size, steps, seconds
        self._bytes_left, self.steps_left = size, steps
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    def spend(self, size: int = 0, steps: int = 0) -> None:
        """Spend bytes and steps; OverBudgetError: they, or the time, are used up."""
        if not self.allows(size):
            raise OverBudgetError(f"at most {self._size} bytes", f"{self._size - self._bytes_left}")
        self.steps_left -= steps
        if self.steps_left < 0:
            raise OverBudgetError(f"at most {self._steps} values", "more")
        if self.seconds_left() <= 0:
            raise OverBudgetError(f"no more than can be read within {self._seconds:g} s", "more")

    def allows(self, size: int) -> bool:
        """Spend bytes only, and return whether the budget had as many."""
        self._bytes_left -= size
        return self._bytes_left >= 0

    def seconds_left(self) -> float:
        """The remaining time; infinite without a limit."""
        return float("inf") if self._end is None else self._end - self._clock()


def of_server(body: bytes) -> Any:
    """Parse a server's or program's JSON, whose length was limited on receipt."""
    return json_of(body, Budget(len(body), MOST_OF_SERVER))


def json_of(
    data: bytes, budget: Budget | None = None, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Parse JSON in UTF-8; `pairs` makes its objects (OverBudgetError: above `budget`, None: a new one; ValueError)."""
    spent = Budget() if budget is None else budget
    spent.spend(len(data))
    steps = _most_values(data)
    spent.spend(steps=steps if steps <= spent.steps_left else _most_values(_TEXT.sub(b"", data)))
    try:
        return json.JSONDecoder(object_pairs_hook=pairs, parse_constant=_no_constant).decode(data.decode("utf-8"))
    except RecursionError:
        raise OverBudgetError("JSON", "nesting without end") from None


#: A text, even without an end.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


def _most_values(data: bytes) -> int:
    """An upper bound of a JSON document's values: each but the first follows one of these characters."""
    return 1 + sum(map(data.count, (b",", b"[", b"{")))


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"wanted numbers, found {text}")
