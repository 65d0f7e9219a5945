"""How the last runs of `renew` ended, from one run to the next: a small file of the state directory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import datetime

from bridge.errors import Exit
from bridge.state.store import Store
from bridge.system.codec import named
from bridge.system.state_file import OnDamage, StateFile, coded

#: A CA that has not answered yet, or another run that does the work: neither success nor failure.
_NEITHER = (Exit.WAITING, Exit.LOCKED)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """How the last runs of `renew` on this node ended; a rehearsal is no run."""

    ended: datetime | None = None  #: The last run; None: there was none.
    succeeded: datetime | None = None  #: The end of the last one with exit code 0; None: there was none.
    rehearsed: datetime | None = None  #: The end of the last rehearsal.
    exit_code: int = field(default=Exit.DONE, metadata=named("exitCode"))  #: Of the last run.
    seconds: float = 0  #: How long it took.
    failures: int = 0  #: Runs in a row that failed; those that only waited, or found another one at work, do not count.
    #: Of the last rehearsal.
    rehearsal_exit_code: int = field(default=Exit.DONE, metadata=named("rehearsalExitCode"))

    def __post_init__(self) -> None:
        if not self.seconds >= 0 or self.failures < 0:
            raise ValueError("not written by this program")


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
    return coded(History, store.history, "how the last runs ended", OnDamage.START_OVER, version=1)
