"""Durations as settings have them, and how long before its end a certificate is due."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_duration(value: object) -> timedelta:
    """
    A duration such as `"30d"`, `"12h"` or `"1h30m"` (units w, d, h, m, s).

    Raises:
        ValueError: Its text is what was wanted.
    """
    wanted = 'a duration such as "30d", "12h" or "30s"'
    if not isinstance(value, str) or not re.fullmatch(r"([0-9]{1,12}[wdhms])+", value):
        raise ValueError(wanted)
    parts = re.findall(r"([0-9]+)([wdhms])", value)
    try:
        duration = sum((timedelta(**{_UNITS[unit]: int(number)}) for number, unit in parts), timedelta())
    except OverflowError:
        duration = timedelta.max
    if not timedelta() < duration <= timedelta(days=36500):
        raise ValueError(f"{wanted}, more than nothing and at most 100 years")
    return duration


def duration_text(duration: timedelta) -> str:
    """A duration as a setting would say it, in the largest unit that fits; in days rather than weeks."""
    for unit, name in reversed([one for one in _UNITS.items() if one[0] != "w"]):
        whole, rest = divmod(duration, timedelta(**{name: 1}))
        if not rest and whole:
            return f"{whole}{unit}"
    return f"{duration.total_seconds():g}s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """How long before its end a certificate is due: a duration, or a share of its lifetime. One of the two is set."""

    remaining: timedelta | None = None
    share: float | None = None  #: Between 0 and 1.

    @classmethod
    def from_setting(cls, value: object) -> Before:
        """
        Such as `"30d"` or `"33%"`.

        Raises:
            ValueError: Its text is what was wanted.
        """
        wanted = 'a duration such as "30d", or a share of the lifetime such as "33%"'
        if not isinstance(value, str):
            raise ValueError(wanted)  # noqa: TRY004 (the settings' way to say what was wanted)
        share = re.fullmatch(r"([0-9]{1,2})%", value)
        if share is None:
            try:
                return cls(remaining=parse_duration(value))
            except ValueError:
                raise ValueError(wanted) from None
        if int(share[1]) == 0:
            raise ValueError(f"{wanted}, from 1% to 99%")
        return cls(share=int(share[1]) / 100)

    def __str__(self) -> str:
        return duration_text(self.remaining) if self.remaining is not None else f"{(self.share or 0) * 100:.0f}%"

    def of(self, lifetime: timedelta) -> timedelta:
        """The duration before the end, of a certificate with this lifetime."""
        return self.remaining if self.remaining is not None else lifetime * (self.share or 0)
