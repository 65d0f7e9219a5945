"""
How the last runs of `renew` ended, and the metrics file, which node_exporter's textfile collector reads.

Each `renew` writes both when it ends, however it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from bridge.errors import BridgeError, Exit
from bridge.monitoring import exposition
from bridge.monitoring.exposition import Remembered
from bridge.node import inventory
from bridge.node.expiry_report import report
from bridge.renewal import in_use
from bridge.renewal.gate import attempts_file
from bridge.settings.tables import Settings
from bridge.state.open_requests import OpenRequests
from bridge.state.store import Store
from bridge.system import waiting
from bridge.system.codec import named
from bridge.system.console import print_error
from bridge.system.files import write_atomically
from bridge.system.locks import lock
from bridge.system.paths import ForeignLinkError, opened
from bridge.system.state_file import OnDamage, StateError, StateFile, coded

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


# --- the file ----------------------------------------------------------------------------------------------------------

MODE = 0o644
#: For another run that ends at the same moment.
_WAIT = timedelta(seconds=10)


class MetricsError(BridgeError):
    """The metrics could not be written; what the run did is not touched by that."""

    hint = "fix [metrics] file in the settings, or the directory that it names; the next run writes it"


@dataclass(slots=True)
class Told:
    """The exit code of a run, for the monitor."""

    exit_code: int = Exit.DONE


@contextlib.contextmanager
def written(settings: Settings, now: Callable[[], datetime], *, rehearsal: bool = False) -> Iterator[Told]:
    """
    Write the file when the run in it ends, with a result or an error; without `[metrics] file`, nothing.

    A rehearsal counts by itself.

    A file that can't be written is told, and makes a success a failure (exit code 1).

    Yields:
        Where the run puts its exit code, and finds the one that it ends with.
    """
    told, start = Told(), time.monotonic()
    try:
        yield told
    except BaseException as e:
        told.exit_code = _code_of(e)
        _write_or_tell(settings, now, told, start, rehearsal=rehearsal)
        raise
    _write_or_tell(settings, now, told, start, rehearsal=rehearsal)


@contextlib.contextmanager
def kept_current(settings: Settings, now: Callable[[], datetime]) -> Iterator[None]:
    """
    Write the file when this ends, and count nothing: for commands that are no `renew` and change what it tells.

    A file that can't be written is told.
    """
    try:
        yield
    finally:
        file = settings.metrics.file
        if file is not None:
            try:
                write(settings, file, lambda before: before or History(), now())
            except MetricsError as e:
                print_error(e)


def _code_of(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return waiting.exit_code(error)
    return error.exit_code if isinstance(error, BridgeError) else Exit.FAILED


def _write_or_tell(
    settings: Settings, now: Callable[[], datetime], told: Told, start: float, *, rehearsal: bool
) -> None:
    if settings.metrics.file is None:
        return
    ended, seconds = now(), time.monotonic() - start
    try:
        if rehearsal:
            write(settings, settings.metrics.file, lambda before: after_rehearsal(before, told.exit_code, ended), ended)
        else:
            write(settings, settings.metrics.file, lambda before: after(before, told.exit_code, ended, seconds), ended)
    except BridgeError as e:
        print_error(e)
        if told.exit_code in Exit.PRECEDENCE:
            told.exit_code = Exit.worst([told.exit_code, e.exit_code])


def write(settings: Settings, file: Path, count: Callable[[History | None], History], now: datetime) -> None:
    """
    Count a run, and write the metrics.

    Args:
        settings: The node's.
        file: Where to; its directory may be the monitor's own.
        count: The history with the run, from the one without it.
        now: Aware, UTC.

    Raises:
        MetricsError: It can't be written.
    """
    store = Store(settings.node.state_dir)
    try:
        store.prepare()
        # a run that found another one at work ends while that goes on: the node's lock is not the one to take
        with lock(store.history_lock, "renew", _WAIT):
            runs = history_file(store)
            runs.put(count(runs.read()))
            _put(file, of_node(settings, now, known(settings, now)).encode())
    except OSError as e:
        raise MetricsError(f"{file}: wanted to write the metrics, found: {e.strerror}") from e
    except ForeignLinkError as e:
        raise MetricsError(f"{file}: wanted to write the metrics; {e}") from e
    except BridgeError as e:
        raise MetricsError(f"{file}: wanted to write the metrics, found: {e}") from e


def of_node(settings: Settings, now: datetime, seen: Remembered | None) -> str:
    """All metrics of the node as it is at this moment."""
    node = inventory.of(settings.node)
    return exposition.text(report(node, now, None), exposition.due_times(node, settings.renewal), seen)


def known(settings: Settings, now: datetime) -> Remembered:
    """
    Read the state directory; its lock need not be held, since each file is replaced whole.

    Raises:
        StateError: A file is damaged, or can't be read.
    """
    store = Store(settings.node.state_dir)
    requests = OpenRequests(store).by_name()
    return Remembered(
        failures=attempts_file(store).read() or {},
        pending=tuple(one for one in requests.values() if one.is_waiting),
        history=history_file(store).read(),
        late=_late(settings, now) if store.unproven.exists() else (),
    )


def known_here(settings: Settings, now: datetime) -> Remembered | None:
    """`known` of this node's state; None: this user may not see it, or it is damaged (which `doctor` and `renew` tell)."""
    directory = settings.node.state_dir
    try:
        directory.lstat()
    except FileNotFoundError:
        return Remembered(failures={}, pending=(), history=None)
    except OSError:
        return None
    if not os.access(directory, os.R_OK | os.X_OK):
        return None
    try:
        return known(settings, now)
    except StateError:
        return None


def _late(settings: Settings, now: datetime) -> tuple[tuple[str, str], ...]:
    found = in_use.late(settings, inventory.of(settings.node), now)
    return tuple(dict.fromkeys((one.certificate, one.component.value) for one in found if one.component is not None))


def _put(file: Path, data: bytes) -> None:
    """
    Replace the file in one step; what a killed run left beside it goes.

    The directory may belong to whoever reads the file: nothing in it is opened, and no link is followed.
    """
    with opened(file) as place:
        ours = re.compile(rf"\.{re.escape(place.name)}\.[a-z0-9_]{{8}}")  # as `tempfile` makes them
        for one in place.path.parent.iterdir():
            if ours.fullmatch(one.name) and stat.S_ISREG(one.lstat().st_mode):
                one.unlink(missing_ok=True)
        write_atomically(place.path, data, MODE)
