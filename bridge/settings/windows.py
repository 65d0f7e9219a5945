"""When a due certificate may be renewed: weekly windows, and when they give way. Pure: time and zone are arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo

from bridge.pki.expiry import day, duration_text, parse_duration

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
DAY_MINUTES = 24 * 60

_WANTED = 'a list of windows such as "Sat-Sun 02:00-06:00", "Wed 22:00-02:00" or "03:00-05:00" (every day)'
_HOURS = r"([0-9]{1,2}):([0-9]{2})-([0-9]{1,2}):([0-9]{2})"

#: With less than this left, a certificate no longer waits for a window; a nightly timer then has two tries.
LAST_DAYS = timedelta(days=2)
#: If the clock skips a weekly window in spring, the next is a week later, and we look for two of them.
_LOOK_AHEAD_DAYS = 23


@dataclass(frozen=True, slots=True)
class Window:
    """Hours on some days of the week, by local time."""

    days: frozenset[int]  #: Days on which it begins; Monday is 0.
    begin: int  #: In minutes from midnight.
    end: int  #: In minutes from the same midnight; more than a day's if it ends on the next day.

    @classmethod
    def parse(cls, text: str) -> Window:
        """Parse a text such as `"Sat-Sun 02:00-06:00"`, `"Mon,Wed 22:00-02:00"` or `"03:00-05:00"` (ValueError)."""
        days, _, hours = text.strip().rpartition(" ")
        match = re.fullmatch(_HOURS, hours)
        if match is None:
            raise ValueError(_WANTED)
        begin_hour, begin_minute, end_hour, end_minute = map(int, match.groups())
        begin, end = begin_hour * 60 + begin_minute, end_hour * 60 + end_minute
        if max(begin_minute, end_minute) > 59 or begin >= DAY_MINUTES or end > DAY_MINUTES or begin == end:  # noqa: PLR2004
            raise ValueError(f"{_WANTED}, from 00:00 to 24:00 and not empty")
        return cls(_days(days), begin, end if end > begin else end + DAY_MINUTES)

    def __str__(self) -> str:
        days = "" if len(self.days) == len(DAYS) else ",".join(DAYS[day] for day in sorted(self.days)) + " "
        end = self.end if self.end <= DAY_MINUTES else self.end - DAY_MINUTES
        return f"{days}{_clock(self.begin)}-{_clock(end)}"


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"


def _days(text: str) -> frozenset[int]:
    """Parse `Mon`, `Sat-Sun`, `Fri-Mon`, or several with commas; empty: every day."""
    if not text:
        return frozenset(range(len(DAYS)))
    days: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if first not in DAYS or (dash and last not in DAYS):
            raise ValueError(f"{_WANTED}, with days {', '.join(DAYS)}")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        days |= {(begin + i) % len(DAYS) for i in range((end - begin) % len(DAYS) + 1)}
    return frozenset(days)


@dataclass(frozen=True, slots=True)
class Windows:
    """Maintenance windows; empty: any time."""

    windows: tuple[Window, ...] = ()

    @classmethod
    def from_setting(cls, value: object) -> Windows:
        """A time such as `"Sat-Sun 02:00-06:00"`, or a list of them."""
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(_WANTED)
        return cls(tuple(map(Window.parse, texts)))

    def __bool__(self) -> bool:
        return bool(self.windows)

    def __str__(self) -> str:
        return ", ".join(map(str, self.windows))


@dataclass(frozen=True, slots=True)
class Jitter:
    """A random delay below this, so that nodes do not all start at once."""

    most: timedelta = timedelta()

    @classmethod
    def from_setting(cls, value: object) -> Jitter:
        """A duration, or `"0s"`."""
        return cls() if value == "0s" else cls(parse_duration(value))

    def __str__(self) -> str:
        return duration_text(self.most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether a due certificate may be renewed now."""

    act: bool
    reason: str  #: A clause for the operator.
    until: datetime | None = None  #: When the open window ends.


def may_act(now: datetime, windows: Windows, zone: tzinfo, expires: datetime) -> Decision:
    """Whether to renew now: wait for a window while two complete ones and `LAST_DAYS` are left before `expires`."""
    if not windows:
        return Decision(act=True, reason="renewal.window is not set")
    coming = spans(now, windows, zone)
    begin, end = coming[0]
    if begin <= now:
        return Decision(act=True, reason=f"the window is open until {local_text(end, zone)}", until=end)
    reason = f"the next window begins at {local_text(begin, zone)}"
    if expires <= max(coming[1][1], now + LAST_DAYS):
        reason = f"{reason}, too late to wait for: a certificate expires at {local_text(expires, zone)}"
        return Decision(act=True, reason=reason)
    return Decision(act=False, reason=reason)


def ever_waits(now: datetime, windows: Windows, zone: tzinfo, before: timedelta) -> bool:
    """Whether a certificate that becomes due `before` its end may wait for one of the next windows."""
    moments = (begin - timedelta(seconds=1) for begin, _ in spans(now, windows, zone))
    return any(not may_act(moment, windows, zone, moment + before).act for moment in moments)


def local_text(moment: datetime, zone: tzinfo) -> str:
    """A time for the operator, in local time."""
    try:
        return f"{moment.astimezone(zone):%a %Y-%m-%d %H:%M %Z}"
    except OverflowError:  # year 9999 (RFC 5280 §4.1.2.5 uses its end for "never")
        return day(moment)


def spans(now: datetime, windows: Windows, zone: tzinfo) -> list[tuple[datetime, datetime]]:
    """
    The times from now on in which a window is open, in order and merged; at least two if the windows leave a gap.
    A window that the clock skips in spring is missing that day; in autumn it has the repeated hour twice.
    """
    today = now.astimezone(zone).date()
    unmerged = sorted(
        span
        for offset in range(-2, _LOOK_AHEAD_DAYS)
        for span in _on(today + timedelta(days=offset), windows.windows, zone)
        if span[0] < span[1]
    )
    merged: list[tuple[datetime, datetime]] = []
    for begin, end in unmerged:
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return [span for span in merged if span[1] > now]


def _on(day: date, windows: Sequence[Window], zone: tzinfo) -> Iterator[tuple[datetime, datetime]]:
    for window in windows:
        if day.weekday() in window.days:
            yield _moment(day, window.begin, zone), _moment(day, window.end, zone)


def _moment(day: date, minutes: int, zone: tzinfo) -> datetime:
    days, rest = divmod(minutes, DAY_MINUTES)
    local = datetime.combine(day + timedelta(days=days), time(rest // 60, rest % 60), tzinfo=zone)
    return local.astimezone(UTC)  # a time that the clock skips is one hour later (PEP 495, fold=0)
