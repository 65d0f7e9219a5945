"""When a certificate ends, whether that is soon, and durations as settings have them (pure: the time is an argument)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509

MINUTE, HOUR, DAY = 60, 3600, 86400
YEAR = 365 * DAY
#: How far a CA's clock may be ahead of ours.
CLOCK_SKEW = timedelta(minutes=1)
#: A CA that ends sooner soon can't issue certificates of the usual length, and replacing it takes weeks.
CA_ENDS_SOON = timedelta(days=365)


def seconds_left(end: datetime, now: datetime) -> int:
    """Whole seconds from `now` to `end`, truncated toward zero like Go's; negative after `end`."""
    microseconds = (end - now) // timedelta(microseconds=1)
    return microseconds // 1_000_000 if microseconds >= 0 else -(-microseconds // 1_000_000)


def rfc3339(time: datetime, timespec: str = "seconds") -> str:
    """A time for JSON in UTC, in whole seconds or with what `isoformat` knows, such as `2027-11-24T23:39:32Z`."""
    return time.astimezone(UTC).replace(tzinfo=None).isoformat(timespec=timespec) + "Z"


def minute(time: datetime) -> str:
    """A time for people, in UTC, such as `2027-11-24 23:39 UTC`."""
    return f"{time:%Y-%m-%d %H:%M} UTC"


def day(time: datetime) -> str:
    """A time for people where its day is enough, in UTC, such as `2027-11-24`."""
    return f"{time:%Y-%m-%d}"


def residual(seconds: int) -> str:
    """Time left as kubeadm prints it, such as `364d` (`HumanDuration` of k8s.io/apimachinery since Kubernetes 1.31)."""
    if seconds < -1:
        return "<invalid>"
    _, unit, letter, rest_unit, rest_letter = next(form for form in _FORMS if seconds < form[0])
    whole, rest = divmod(max(seconds, 0), unit)
    return f"{whole}{letter}" + (f"{rest // rest_unit}{rest_letter}" if rest >= rest_unit else "")


def left_text(end: datetime, now: datetime) -> str:
    """The remaining time for people: `364d left`, `expired 35 days ago`."""
    seconds = seconds_left(end, now)
    if seconds >= 0 and end > now:
        return f"{residual(seconds)} left"
    days = -seconds // DAY
    return f"expired {days} days ago" if days > 1 else f"expired {residual(-seconds)} ago"


# (below how many seconds, unit and its letter, unit and letter of the remainder to show; the same unit: none)
_FORMS: tuple[tuple[float, int, str, int, str], ...] = (
    (2 * MINUTE, 1, "s", 1, ""),
    (10 * MINUTE, MINUTE, "m", 1, "s"),
    (3 * HOUR, MINUTE, "m", MINUTE, ""),
    (8 * HOUR, HOUR, "h", MINUTE, "m"),
    (2 * DAY, HOUR, "h", HOUR, ""),
    (8 * DAY, DAY, "d", HOUR, "h"),
    (2 * YEAR, DAY, "d", DAY, ""),
    (8 * YEAR, YEAR, "y", DAY, "d"),
    (math.inf, YEAR, "y", YEAR, ""),
)


def first_end(chain: Sequence[x509.Certificate]) -> datetime:
    """When a leaf with its intermediates becomes useless: an intermediate that ends takes its leaf with it."""
    return min(certificate.not_valid_after_utc for certificate in chain)


def is_early(chain: Sequence[x509.Certificate], now: datetime) -> bool:
    """Whether a leaf or intermediate begins in the future: a clock is or was wrong."""
    return any(certificate.not_valid_before_utc > now + CLOCK_SKEW for certificate in chain)


# A kubelet requests a new certificate after 70 to 90 % of the lifetime (client-go,
# util/certificate/certificate_manager.go): it is late only when less than this is left.
ROTATION_IS_LATE = 0.1


def is_rotation_late(chain: Sequence[x509.Certificate], now: datetime) -> bool:
    """Whether a kubelet that renews its certificate by itself should have done so already."""
    end = first_end(chain)
    return end - now < (end - chain[0].not_valid_before_utc) * ROTATION_IS_LATE


def due_from(chain: Sequence[x509.Certificate], before: Before, validity: timedelta, *, rotates: bool) -> datetime:
    """The time from which a certificate should be renewed."""
    end = first_end(chain)
    lifetime = end - chain[0].not_valid_before_utc
    # kubeadm up to 1.30 copies notBefore from the CA, which makes lifetimes up to ten years too long
    due = end - before.of(min(lifetime, validity))
    return max(due, end - lifetime * ROTATION_IS_LATE) if rotates else due


def is_due(chain: Sequence[x509.Certificate], before: Before, validity: timedelta, now: datetime) -> bool:
    """Whether a certificate should be renewed: less than `before` is left, or it has expired."""
    return first_end(chain) < now or now > due_from(chain, before, validity, rotates=False)


_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_duration(value: object) -> timedelta:
    """A duration such as `"30d"`, `"12h"` or `"1h30m"` (units w, d, h, m, s)."""
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
    """A duration as in the settings, in the largest unit that fits; in days rather than weeks."""
    for unit, name in reversed([unit for unit in _UNITS.items() if unit[0] != "w"]):
        whole, rest = divmod(duration, timedelta(**{name: 1}))
        if not rest and whole:
            return f"{whole}{unit}"
    return f"{duration.total_seconds():g}s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """How long before its end a certificate is due: a duration or a share of its lifetime, exactly one of the two."""

    remaining: timedelta | None = None
    share: float | None = None  #: A number between 0 and 1.

    @classmethod
    def from_setting(cls, value: object) -> Before:
        """A duration such as `"30d"`, or a share such as `"33%"`."""
        wanted = 'a duration such as "30d", or a share of the lifetime such as "33%"'
        share = re.fullmatch(r"([0-9]{1,2})%", value) if isinstance(value, str) else None
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
        """The duration before the end of a certificate with this lifetime."""
        return self.remaining if self.remaining is not None else lifetime * (self.share or 0)
