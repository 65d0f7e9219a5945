"""`check-expiration -o nagios`, by https://nagios-plugins.org/doc/guidelines.html: a line, data, and a status."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from bridge.errors import BridgeError
from bridge.node import inventory
from bridge.node.expiry_report import ExpiryReport, Limit, Row, ca_limit, report
from bridge.node.inventory import Node
from bridge.pki.expiry import minute, residual, seconds_left
from bridge.renewal import in_use
from bridge.settings.tables import Settings
from bridge.words import one_line

if TYPE_CHECKING:
    from bridge.control_plane.proof import ProofFinding
    from bridge.renewal.gate import Failures
    from bridge.state.credentials import Credential

_WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
UNKNOWN = 3  #: The status of a check that could not look.
#: What is still not renewed with this share of `renewal.before` left was passed over by many nights.
_CRITICAL_SHARE = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """How long before its end a certificate is worth a status."""

    warning: Limit
    critical: Limit
    cas: Limit  #: For a warning about a CA.

    @classmethod
    def of(cls, settings: Settings, warning: timedelta | None, critical: timedelta | None) -> Thresholds:
        """The limits that were asked for; else the warning when `renew` would renew it, critical at a third of that."""

        def by_settings(lifetime: timedelta) -> timedelta:
            return settings.renewal.before.of(min(lifetime, settings.renewal.validity))

        def early(lifetime: timedelta) -> timedelta:
            return by_settings(lifetime) if warning is None else warning

        def late(lifetime: timedelta) -> timedelta:
            return early(lifetime) * _CRITICAL_SHARE if critical is None else critical

        return cls(warning=early, critical=late, cas=ca_limit if warning is None else early)


def check(
    settings: Settings,
    now: datetime,
    limits: Thresholds,
    failures: Mapping[str, Failures] | None,
    own: Sequence[Credential] = (),
) -> tuple[str, list[str], int]:
    """
    Look at a node: the plugin's line, lines for standard error, and its status.

    `failures` has the failed runs by CA; None: this user can't see them. `own` are our own credentials.
    """
    node = inventory.of(settings.node)
    left_alone = settings.renewal.left_alone
    early = report(node, now, limits.warning, left_alone, limits.cas)
    late = report(node, now, limits.critical, left_alone)
    unused = [] if failures is None else in_use.late(settings, node, now)
    critical = [*_critical(late), *(f"{one.name} expired" for one in own if one.has_ended(now))]
    slow = [] if failures is None else list(_late_phases(settings, node, now))
    near = [one for one in own if one.is_near(settings.renewal.before, now) and not one.has_ended(now)]
    warning = [*_warning(early, late, failures, unused), *slow, *(_credential_ends(one, now) for one in near)]
    status = 2 if critical or early.troubles else 1 if warning else 0
    what = ", ".join([*critical, *warning]) or _good(early)
    unseen = "" if failures is not None else " (failed runs are for root to see)"
    data = " ".join(_performance(one, other) for one, other in zip(early.rows, late.rows, strict=True) if one.chain)
    return f"CERTIFICATES {_WORDS[status]} - {what}{unseen}{' | ' if data else ''}{data}", list(early.troubles), status


def _late_phases(settings: Settings, node: Node, now: datetime) -> Iterator[str]:
    """CAs whose replacement stays between two phases, or was forgotten."""
    if not any(ours.next for ours in settings.authorities.values()):
        return
    from bridge.rotation import places  # noqa: PLC0415 (where a CA is being replaced)

    with contextlib.suppress(BridgeError, OSError):  # a file that can't be read has a row
        for name, one in places.look(settings, node, ()).items():
            if one.is_late(now):
                yield f"{name} is in phase {one.standing.text} since {minute(one.since)}"


def unknown(why: str) -> str:
    """The line of a check that could not look; behind a bar it would have performance data."""
    return f"CERTIFICATES {_WORDS[UNKNOWN]} - {one_line(why).replace('|', '/')}"


def _critical(late: ExpiryReport) -> list[str]:
    rows = [row for row in late.rows if not (row.state == "missing" and row.optional)]
    return [
        *(f"{row.name} expired" for row in rows if row.expired),
        *(f"{row.name} is not valid yet" for row in rows if row.early and not row.foreign),
        *(f"{row.name} {row.state}" for row in rows if row.state != "present"),
        *(_ends(row) for row in rows if row.due and row.chain and not row.expired and not row.early),
    ]


def _warning(
    early: ExpiryReport, late: ExpiryReport, failures: Mapping[str, Failures] | None, unused: Sequence[ProofFinding]
) -> list[str]:
    late_names = {row.name for row in late.rows if row.due}
    return [
        *(_ends(row) for row in early.rows if row.due and row.chain and row.name not in late_names),
        *(f"{name}: {found}" for name, found in (failures or {}).items()),
        *(
            f"{one.component.value if one.component else 'a program'} does not use its new {one.certificate} yet"
            for one in unused
        ),
    ]


def _ends(row: Row) -> str:
    return f"{row.name} ends in {residual(row.chain_seconds_left or 0)}"


def _credential_ends(one: Credential, now: datetime) -> str:
    return f"{one.name} ends in {residual(seconds_left(one.ends or now, now))}"


def _good(found: ExpiryReport) -> str:
    left: Sequence[Row] = [row for row in found.rows if row.chain_seconds_left is not None]
    if not left:
        return "no certificates"
    first = min(left, key=lambda row: row.chain_seconds_left or 0)
    return f"{len(left)} certificates, {first.name} ends first, in {residual(first.chain_seconds_left or 0)}"


def _performance(early: Row, late: Row) -> str:
    """Seconds left; below a threshold it alerts, which is a range that ends in a colon."""
    limits = ";".join("" if row.limit is None else f"{int(row.limit.total_seconds())}:" for row in (early, late))
    return f"'{early.name}'={early.chain_seconds_left}s;{limits}"
