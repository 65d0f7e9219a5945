"""Numbers for Prometheus (text format 0.0.4); their names are in docs/gateway.md, and stay."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterator
from datetime import datetime
from itertools import accumulate

PREFIX = "ca_bridge_gateway"
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
#: Of certificates; the one that has not changed for the longest time is forgotten first.
_MOST_ENDS = 10_000

OUTCOMES = (
    *("signed", "denied", "failed", "left", "pending", "ca-refused", "ca-unavailable", "bad-answer", "conflict"),
    "too-large",
)


class Metrics:
    """May be used by any thread."""

    def __init__(self, signers: tuple[str, ...]) -> None:
        self._mutex = threading.Lock()
        self._requests: Counter[tuple[str, str]] = Counter(
            {(one, outcome): 0 for one in signers for outcome in OUTCOMES}
        )
        #: How many were in each bucket, in the one without a limit, and all their seconds.
        self._seconds: dict[str, list[float]] = {one: [0.0] * (len(_BUCKETS) + 2) for one in signers}
        self._successes: dict[str, float] = {}
        self._ends: OrderedDict[tuple[str, str], float] = OrderedDict()
        self.gauges: dict[tuple[str, str], float] = {}  #: Written by one thread each.

    def count(self, signer: str, outcome: str, times: int = 1) -> None:
        """One more request with this outcome."""
        with self._mutex:
            self._requests[signer, outcome] += times

    def signed(self, signer: str, name: str, end: datetime, seconds: float, now: datetime) -> None:
        """A certificate was written."""
        with self._mutex:
            self._requests[signer, "signed"] += 1
            row = self._seconds[signer]
            row[bisect_left(_BUCKETS, seconds)] += 1
            row[-1] += seconds
            self._successes[signer] = now.timestamp()
        self.saw(signer, name, end)

    def saw(self, signer: str, name: str, end: datetime) -> None:
        """There is a certificate that ends then."""
        with self._mutex:
            key = (signer, name)
            self._ends[key] = max(self._ends.get(key, 0.0), end.timestamp())
            self._ends.move_to_end(key)
            if len(self._ends) > _MOST_ENDS:
                self._ends.popitem(last=False)

    def text(self) -> str:
        """All metrics as text."""
        with self._mutex:
            return "\n".join([*self._lines(), ""])

    def _lines(self) -> Iterator[str]:
        yield from _head("requests_total", "counter", "Requests by what became of them.")
        for (signer, outcome), count in sorted(self._requests.items()):
            yield f'{PREFIX}_requests_total{{signer="{_safe(signer)}",outcome="{outcome}"}} {count}'
        yield from _head("sign_seconds", "histogram", "From the arrival of a request to its certificate.")
        for signer, row in sorted(self._seconds.items()):
            labels = f'signer="{_safe(signer)}"'
            counts = list(accumulate(row[:-1]))
            for limit, count_below in zip((*map(str, _BUCKETS), "+Inf"), counts, strict=True):
                yield f'{PREFIX}_sign_seconds_bucket{{{labels},le="{limit}"}} {count_below:.0f}'
            yield f"{PREFIX}_sign_seconds_count{{{labels}}} {counts[-1]:.0f}"
            yield f"{PREFIX}_sign_seconds_sum{{{labels}}} {row[-1]:.6f}"
        yield from _head("last_success_timestamp_seconds", "gauge", "When a certificate was last written.")
        for signer, moment in sorted(self._successes.items()):
            yield f'{PREFIX}_last_success_timestamp_seconds{{signer="{_safe(signer)}"}} {moment:.3f}'
        yield from _head("certificate_end_timestamp_seconds", "gauge", "When the newest certificate ends.")
        for (signer, name), moment in sorted(self._ends.items()):
            labels = f'signer="{_safe(signer)}",name="{_safe(name)}"'
            yield f"{PREFIX}_certificate_end_timestamp_seconds{{{labels}}} {moment:.0f}"
        seen = ""
        for (gauge, rest), value in sorted(self.gauges.items()):
            if gauge != seen:
                yield from _head(gauge, "gauge", _GAUGES[gauge])
                seen = gauge
            yield f"{PREFIX}_{gauge}{rest} {value:g}"


_GAUGES = {
    "queue": "Requests that are waiting, being worked at, or at a CA that answers later.",
    "leader": "Whether this replica works.",
    "api_up": "Whether the watch is alive.",
    "inventory_good": "Whether the inventory and the policy were read when they last changed.",
}


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {PREFIX}_{name} {text}"
    yield f"# TYPE {PREFIX}_{name} {kind}"


def _safe(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", " ")
