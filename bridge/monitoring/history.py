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
    """How the last runs of `renew` on this node ended; a rehearsal is no run."""

    ended: datetime | None = None  #: The last run; None: there was none.
    exit_code: int = Exit.DONE  #: Of the last run.
    seconds: float = 0  #: That it took.
    succeeded: datetime | None = None  #: The end of the last one with exit code 0; None: there was none.
    failures: int = 0  #: Runs in a row that failed; those that only waited, or found another one at work, do not count.
    rehearsed: datetime | None = None  #: The end of the last rehearsal.
    rehearsal_exit_code: int = Exit.DONE  #: Of the last rehearsal.


def after(before: History | None, exit_code: int, ended: datetime, seconds: float) -> History:
    """
    The history with one more run (pure).

    Args:
        before: Up to then.
        exit_code: The run's; 128 and the signal's number for one that was interrupted.
        ended: Aware, UTC.
        seconds: From its start to its end.
    """
    run = dataclasses.replace(before or History(), ended=ended, exit_code=exit_code, seconds=seconds)
    if exit_code == Exit.DONE:
        return dataclasses.replace(run, succeeded=ended, failures=0)
    return run if exit_code in _NEITHER else dataclasses.replace(run, failures=run.failures + 1)


def after_rehearsal(before: History | None, exit_code: int, ended: datetime) -> History:
    """The history with one more rehearsal (pure)."""
    return dataclasses.replace(before or History(), rehearsed=ended, rehearsal_exit_code=exit_code)


def history_file(store: Store) -> StateFile[History]:
    """The file; a damaged one counts as none: the worst that follows is a count that begins anew."""
    return StateFile(
        path=store.history,
        what="how the last runs ended",
        parse=_from_json,
        keys=frozenset({"version", *_TIMES, "exitCode", "seconds", "failures", "rehearsalExitCode"}),
        on_damage=OnDamage.START_OVER,
    )


_TIMES = ("ended", "succeeded", "rehearsed")


def to_json(one: History) -> dict[str, Any]:
    """The history as the file has it."""
    times = {name: getattr(one, name) for name in _TIMES}
    return {
        "version": 1,
        **{name: time.isoformat() if time is not None else None for name, time in times.items()},
        "exitCode": one.exit_code,
        "seconds": one.seconds,
        "failures": one.failures,
        "rehearsalExitCode": one.rehearsal_exit_code,
    }


def _from_json(document: Mapping[str, Any]) -> History:
    times = {name: datetime.fromisoformat(text) for name in _TIMES if (text := document[name]) is not None}
    history = History(
        **times,
        exit_code=int(document["exitCode"]),
        seconds=float(document["seconds"]),
        failures=int(document["failures"]),
        rehearsal_exit_code=int(document["rehearsalExitCode"]),
    )
    if any(time.tzinfo is None for time in times.values()) or not history.seconds >= 0 or history.failures < 0:
        raise ValueError("not written by this program")
    return history
