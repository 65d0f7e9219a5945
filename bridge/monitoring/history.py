"""How the last runs of `renew` ended, from one run to the next: a small file of the state directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bridge.errors import Exit
from bridge.state.store import Store
from bridge.system.state_file import OnDamage, StateFile

#: A CA that has not answered yet, or another run that does the work: neither success nor failure.
_NEITHER = (Exit.WAITING, Exit.LOCKED)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Of `renew` on this node."""

    ended: datetime  #: The last run.
    exit_code: int  #: Of the last run.
    seconds: float  #: That it took.
    succeeded: datetime | None  #: The end of the last one with exit code 0; None: there was none.
    failures: int  #: Runs in a row that failed; those that only waited, or found another one at work, do not count.


def after(before: History | None, exit_code: int, ended: datetime, seconds: float) -> History:
    """
    The history with one more run (pure).

    Args:
        before: Up to then.
        exit_code: The run's; 128 and the signal's number for one that was interrupted.
        ended: Aware, UTC.
        seconds: From its start to its end.
    """
    failures = before.failures if before is not None else 0
    run = History(ended=ended, exit_code=exit_code, seconds=seconds, succeeded=None, failures=failures + 1)
    if exit_code == Exit.DONE:
        return dataclasses.replace(run, succeeded=ended, failures=0)
    if exit_code in _NEITHER:
        run = dataclasses.replace(run, failures=failures)
    return dataclasses.replace(run, succeeded=before.succeeded if before is not None else None)


def history_file(store: Store) -> StateFile[History]:
    """The file; a damaged one counts as none: the worst that follows is a count that begins anew."""
    return StateFile(
        path=store.history,
        what="how the last runs ended",
        parse=_from_json,
        keys=frozenset({"version", "ended", "exitCode", "seconds", "succeeded", "failures"}),
        on_damage=OnDamage.START_OVER,
    )


def to_json(one: History) -> dict[str, Any]:
    """For the file."""
    return {
        "version": 1,
        "ended": one.ended.isoformat(),
        "exitCode": one.exit_code,
        "seconds": one.seconds,
        "succeeded": one.succeeded.isoformat() if one.succeeded is not None else None,
        "failures": one.failures,
    }


def _from_json(document: Mapping[str, Any]) -> History:
    succeeded = document["succeeded"]
    history = History(
        ended=datetime.fromisoformat(document["ended"]),
        exit_code=int(document["exitCode"]),
        seconds=float(document["seconds"]),
        succeeded=datetime.fromisoformat(succeeded) if succeeded is not None else None,
        failures=int(document["failures"]),
    )
    times = [time for time in (history.ended, history.succeeded) if time is not None]
    if any(time.tzinfo is None for time in times) or not history.seconds >= 0 or history.failures < 0:
        raise ValueError("not written by this program")
    return history
