"""Rates: token buckets by name."""

from __future__ import annotations

from collections import OrderedDict

#: Names are the requesters' choice; the bucket that was used the longest time ago is forgotten first.
_MOST_BUCKETS = 10_000
_MINUTE_SECONDS = 60.0


class Rate:
    """So many a minute for each name, all of them at once if it has been quiet; as many more wait in line."""

    def __init__(self, a_minute: int) -> None:
        self._a_minute = a_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def reserve(self, name: str, now: float) -> float | None:
        """Seconds until one more has its turn, which it then has for sure; None: too many wait for theirs already."""
        left = self._left(name, now)
        if left <= -self._a_minute:
            return None
        self._buckets[name] = (left - 1, now)
        self._buckets.move_to_end(name)
        if len(self._buckets) > _MOST_BUCKETS:
            self._buckets.popitem(last=False)
        return max(0.0, 1 - left) * _MINUTE_SECONDS / self._a_minute

    def take(self, name: str, now: float) -> float:
        """0: one more has its turn now; otherwise the seconds after which it may ask again, and nothing is reserved."""
        left = self._left(name, now)
        if left < 1:
            return (1 - left) * _MINUTE_SECONDS / self._a_minute
        self.reserve(name, now)
        return 0.0

    def _left(self, name: str, now: float) -> float:
        left, since = self._buckets.get(name, (float(self._a_minute), now))
        return min(float(self._a_minute), left + (now - since) * self._a_minute / _MINUTE_SECONDS)
