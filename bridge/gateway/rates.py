"""How often somebody may ask: buckets of tokens, with the time as an argument."""

from __future__ import annotations

from collections import OrderedDict

#: Names are the requesters' choice; whoever has not asked for the longest time is forgotten first.
_MOST_BUCKETS = 10_000
_SECONDS = 60.0


class Rate:
    """So many a minute for each name, all of them at once if it has been quiet."""

    def __init__(self, a_minute: int) -> None:
        self._a_minute = a_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_seconds(self, name: str, now: float) -> float:
        """How long one more has to wait; 0: not at all."""
        left = self._left(name, now)
        return 0.0 if left >= 1 else (1 - left) * _SECONDS / self._a_minute

    def take(self, name: str, now: float) -> None:
        """One more was begun."""
        self._buckets[name] = (self._left(name, now) - 1, now)
        self._buckets.move_to_end(name)
        if len(self._buckets) > _MOST_BUCKETS:
            self._buckets.popitem(last=False)

    def _left(self, name: str, now: float) -> float:
        left, since = self._buckets.get(name, (float(self._a_minute), now))
        return min(float(self._a_minute), left + (now - since) * self._a_minute / _SECONDS)
