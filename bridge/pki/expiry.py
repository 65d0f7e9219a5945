"""When a certificate ends, and whether that is soon. No file and no clock: the time is an argument."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509

from bridge.pki.durations import Before

if TYPE_CHECKING:  # the settings need only `Before`, and nothing here reads a file
    pass

MINUTE, HOUR, DAY = 60, 3600, 86400
YEAR = 365 * DAY
#: How far a CA's clock may be ahead of ours.
CLOCK_SKEW = timedelta(minutes=1)


def seconds_left(end: datetime, now: datetime) -> int:
    """Whole seconds from `now` to `end`, cut toward zero as Go does; negative when it is over."""
    microseconds = (end - now) // timedelta(microseconds=1)
    return microseconds // 1_000_000 if microseconds >= 0 else -(-microseconds // 1_000_000)


def rfc3339(time: datetime) -> str:
    """A time as JSON has it, in UTC and whole seconds, such as `2027-11-24T23:39:32Z`."""
    return time.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds") + "Z"


def minute(time: datetime) -> str:
    """A time, in UTC, as people have it, such as `2027-11-24 23:39 UTC`."""
    return f"{time:%Y-%m-%d %H:%M} UTC"


def residual(seconds: int) -> str:
    """
    Time left in kubeadm's words, such as `364d`.

    As `HumanDuration` in k8s.io/apimachinery/pkg/util/duration, from Kubernetes 1.31 on.

    Args:
        seconds: Left, cut toward zero; negative when it is over.
    """
    if seconds < -1:
        return "<invalid>"
    for limit, unit, letter, rest_unit, rest_letter in _FORMS:
        if limit is None or seconds < limit:
            whole, rest = divmod(max(seconds, 0), unit)
            rest = rest // rest_unit if rest_unit else 0
            return f"{whole}{letter}" + (f"{rest}{rest_letter}" if rest else "")
    raise AssertionError("the last form has no limit")


def left_text(end: datetime, now: datetime) -> str:
    """The time that is left, for people: `364d left`, `expired 35 days ago`."""
    seconds = seconds_left(end, now)
    if seconds >= 0 and end > now:
        return f"{residual(seconds)} left"
    days = -seconds // DAY
    return f"expired {days} days ago" if days > 1 else f"expired {residual(-seconds)} ago"


# (below how many seconds, unit and its letter, unit and letter of the rest that is shown too; 0: none)
_FORMS: tuple[tuple[int | None, int, str, int, str], ...] = (
    (2 * MINUTE, 1, "s", 0, ""),
    (10 * MINUTE, MINUTE, "m", 1, "s"),
    (3 * HOUR, MINUTE, "m", 0, ""),
    (8 * HOUR, HOUR, "h", MINUTE, "m"),
    (2 * DAY, HOUR, "h", 0, ""),
    (8 * DAY, DAY, "d", HOUR, "h"),
    (2 * YEAR, DAY, "d", 0, ""),
    (8 * YEAR, YEAR, "y", DAY, "d"),
    (None, YEAR, "y", 0, ""),
)


def first_end(chain: Sequence[x509.Certificate]) -> datetime:
    """When a leaf with its intermediates is of no use any more: an intermediate that ends takes its leaf with it."""
    return min(certificate.not_valid_after_utc for certificate in chain)


def is_early(chain: Sequence[x509.Certificate], now: datetime) -> bool:
    """Whether a leaf or one of its intermediates begins in the future: a clock is wrong, or was."""
    return any(certificate.not_valid_before_utc > now + CLOCK_SKEW for certificate in chain)


# A kubelet asks for a new one when 70 to 90 % of the lifetime are over (client-go,
# util/certificate/certificate_manager.go): only with less than this left it is late.
ROTATION_IS_LATE = 0.1


def is_rotation_late(chain: Sequence[x509.Certificate], now: datetime) -> bool:
    """
    Whether a kubelet that renews its certificate by itself should have done so.

    Args:
        chain: The leaf, then its intermediates.
        now: Aware, UTC.
    """
    end = first_end(chain)
    return end - now < (end - chain[0].not_valid_before_utc) * ROTATION_IS_LATE


def due_from(chain: Sequence[x509.Certificate], before: Before, validity: timedelta, *, rotates: bool) -> datetime:
    """
    The time from which on a certificate should be renewed.

    Args:
        chain: The leaf, then its intermediates.
        before: As for `is_due`.
        validity: As for `is_due`.
        rotates: A kubelet renews it by itself, and is to be helped only when it is late.
    """
    end = first_end(chain)
    lifetime = end - chain[0].not_valid_before_utc
    due = end - before.of(min(lifetime, validity))
    return max(due, end - lifetime * ROTATION_IS_LATE) if rotates else due


def is_due(chain: Sequence[x509.Certificate], before: Before, validity: timedelta, now: datetime) -> bool:
    """
    Whether a certificate should be renewed: less than `before` is left, or it has expired.

    One that is not valid yet is not due by that alone.

    Args:
        chain: The leaf, then its intermediates.
        before: How early.
        validity: What is asked for at a renewal; a share is of this at most, since kubeadm up to 1.30 copies
            notBefore from the CA, which makes lifetimes up to ten years too long.
        now: Aware, UTC.
    """
    end = first_end(chain)
    lifetime = min(end - chain[0].not_valid_before_utc, validity)
    return end < now or end - now < before.of(lifetime)
