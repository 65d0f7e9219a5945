"""When a certificate ends, and whether that is soon. No file and no clock: the time is an argument."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509

if TYPE_CHECKING:  # the settings need only `Before`, and nothing here reads a file
    from bridge.inventory import AuthorityState, Item, Node, State

MINUTE, HOUR, DAY = 60, 3600, 86400
YEAR = 365 * DAY

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

# What we don't renew, the kubelet does, when 70 to 90 % of the lifetime are over (client-go,
# util/certificate/certificate_manager.go): only with less than this left it is late.
_ROTATION_IS_LATE = 0.1


def parse_duration(value: object) -> timedelta:
    """
    A duration such as `"30d"`, `"12h"` or `"1h30m"` (units w, d, h, m, s).

    Raises:
        ValueError: Its text is what was wanted.
    """
    wanted = 'a duration such as "30d", "12h" or "30s"'
    if not isinstance(value, str) or not re.fullmatch(r"([0-9]{1,7}[wdhms])+", value):
        raise ValueError(wanted)
    parts = re.findall(r"([0-9]+)([wdhms])", value)
    duration = sum((timedelta(**{_UNITS[unit]: int(number)}) for number, unit in parts), timedelta())
    if not timedelta() < duration <= timedelta(days=36500):
        raise ValueError(f"{wanted}, more than nothing and at most 100 years")
    return duration


def duration_text(duration: timedelta) -> str:
    """As a setting would say it, in the largest unit that fits."""
    for unit, name in reversed(_UNITS.items()):
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
        """As a duration."""
        return self.remaining if self.remaining is not None else lifetime * (self.share or 0)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One certificate of the report."""

    name: str
    path: str
    state: State
    trouble: str | None
    chain: Sequence[x509.Certificate]  #: The certificate and its intermediates; empty unless it is present.
    seconds_left: int | None  #: The certificate's, as kubeadm has it.
    chain_seconds_left: int | None  #: Of the one that ends first.
    authority: str | None  #: None for a CA itself.
    external: bool  #: Its CA's key is not on the node.
    due: bool  #: Ends within the time asked for, or has ended; False when nothing was asked for.
    optional: bool = False  #: A healthy node may be without it.

    @property
    def certificate(self) -> x509.Certificate | None:
        """The first of the file."""
        return self.chain[0] if self.chain else None

    @property
    def expired(self) -> bool:
        """Whether it, or an intermediate that it needs, has ended."""
        return self.chain_seconds_left is not None and self.chain_seconds_left < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All rows, in the order of the output."""

    certificates: Sequence[Row]  #: As kubeadm lists them.
    authorities: Sequence[Row]  #: As kubeadm lists them.
    extra: Sequence[Row]  #: What kubeadm does not list.
    troubles: Sequence[str]  #: One line each: files that are there and can't be used.

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return [*self.certificates, *self.authorities, *self.extra]

    @property
    def due(self) -> bool:
        """Whether one is due."""
        return any(row.due for row in self.rows)


def report(node: Node, now: datetime, within: timedelta | None) -> Report:
    """
    What there is to say about the expiry of a node's certificates, its CAs included.

    Args:
        node: What is on the node.
        now: Aware, UTC.
        within: What ends sooner is due, as is what has ended; None: nothing is.
    """
    rows = [(item, _item_row(item, now, within)) for item in node.items]
    return Report(
        certificates=[row for item, row in rows if item.listed],
        authorities=[_authority_row(state, now, within) for state in node.authorities if state.listed],
        extra=[row for item, row in rows if not item.listed and not (item.state == "missing" and row.optional)]
        + [_authority_row(state, now, within) for state in node.authorities if not state.listed],
        troubles=node.troubles,
    )


def _item_row(item: Item, now: datetime, within: timedelta | None) -> Row:
    return Row(
        name=item.spec.name,
        path=str(item.certificate_path),
        state=item.state,
        trouble=item.trouble,
        chain=item.certificates,
        seconds_left=_left(item.certificates, now),
        chain_seconds_left=_chain_left(item.certificates, now),
        authority=item.spec.authority.name,
        external=item.authority_external,
        due=_ends_within(item.certificates, now, within, late_share=1 if item.managed else _ROTATION_IS_LATE),
        optional=item.spec.optional,
    )


def _authority_row(state: AuthorityState, now: datetime, within: timedelta | None) -> Row:
    return Row(
        name=state.authority.name,
        path=str(state.path),
        state=state.state,
        trouble=state.trouble,
        chain=state.certificates[:1],
        seconds_left=_left(state.certificates, now),
        chain_seconds_left=_left(state.certificates, now),
        authority=None,
        external=state.key == "external",
        due=_ends_within(state.certificates[:1], now, within, late_share=1),
    )


def _left(certificates: Sequence[x509.Certificate], now: datetime) -> int | None:
    return seconds_left(certificates[0].not_valid_after_utc, now) if certificates else None


def _chain_left(chain: Sequence[x509.Certificate], now: datetime) -> int | None:
    return seconds_left(first_end(chain), now) if chain else None


def _ends_within(chain: Sequence[x509.Certificate], now: datetime, within: timedelta | None, late_share: float) -> bool:
    if within is None or not chain:
        return False
    end = first_end(chain)
    lifetime = end - chain[0].not_valid_before_utc
    return end < now or end - now < min(within, lifetime * late_share)
