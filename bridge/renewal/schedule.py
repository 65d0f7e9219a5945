"""When a run without names acts: not outside its windows, not at the same second as all other nodes."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta

from bridge.errors import WaitingError
from bridge.pki.expiry import first_end
from bridge.renewal.selection import Selection, outcome_of
from bridge.settings.tables import RenewalSettings
from bridge.settings.windows import Decision, may_act


class NotYetError(WaitingError):
    """It is due, and waits for its window; nobody has been asked."""

    hint = "the first run within the window renews it; `ca-bridge renew NAME` and `ca-bridge renew all` do not wait"


def decide(selection: Selection, settings: RenewalSettings, now: datetime) -> Decision:
    """
    Whether what is due may be renewed now.

    What must not wait takes the rest with it: one interruption instead of several.

    Raises:
        SettingsError: There are windows, and the machine's time zone is none that it knows.
    """
    if not settings.window or not selection.items:
        return Decision(act=True, reason="renewal.window is not set, or nothing is due")
    return may_act(now, settings.window, settings.window_zone.resolve(), _first_end(selection))


def held(selection: Selection, settings: RenewalSettings, now: datetime) -> Selection:
    """
    The selection, or one without items: all that is due then waits for the next window.

    Raises:
        SettingsError: As `decide`.
    """
    decision = decide(selection, settings, now)
    if decision.act:
        return selection
    error = NotYetError(f"due; {decision.reason} ({settings.window}, {settings.window_zone})")
    waiting = tuple(outcome_of(item, error) for item in selection.items)
    return dataclasses.replace(selection, items=(), failed=(*selection.failed, *waiting))


def delay(
    selection: Selection, settings: RenewalSettings, now: datetime, *, is_terminal: bool, share: float
) -> timedelta:
    """
    How long to wait before a run takes the lock.

    Never past the window that is open, nor longer than half of the time that a certificate has left.

    Args:
        selection: What is due and will be renewed now.
        settings: `jitter` is the longest delay.
        now: Aware, UTC.
        is_terminal: Somebody waits for it: no delay.
        share: By chance, from 0 to below 1.

    Raises:
        SettingsError: As `decide`.
    """
    if is_terminal or not selection.items or not settings.jitter.most:
        return timedelta()
    limits = [settings.jitter.most, (_first_end(selection) - now) / 2]
    until = decide(selection, settings, now).until
    if until is not None:
        limits.append(until - now)
    return max(min(limits), timedelta()) * share


def _first_end(selection: Selection) -> datetime:
    return min(first_end(item.certificates) for item in selection.items)
