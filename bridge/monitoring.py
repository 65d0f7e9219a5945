"""For monitors: how the last runs of `renew` ended, each metric's name and meaning, and the metrics file."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from bridge.errors import BridgeError, Exit
from bridge.node.expiry_report import ExpiryReport, Row, report
from bridge.node.inventory import Item, Node
from bridge.node.reading import read_node
from bridge.pki.expiry import due_from, first_end
from bridge.renewal.gate import Failures, attempts_file
from bridge.settings.tables import RenewalSettings, Settings
from bridge.specs import AUTHORITIES, Component
from bridge.state import Store, credentials
from bridge.state.open_requests import OpenRequest, OpenRequests
from bridge.system import waiting
from bridge.system.codec import named
from bridge.system.console import print_error
from bridge.system.files import remove_unfinished, write_atomically
from bridge.system.locks import lock
from bridge.system.metrics import labels, metric
from bridge.system.paths import ForeignLinkError, opened
from bridge.system.state_file import OnDamage, StateError, StateFile, coded
from bridge.words import steady

#: Neither success nor failure: a CA has not answered yet, or another run does the work.
_NEITHER = (Exit.WAITING, Exit.LOCKED)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """How the last runs of `renew` on this node ended; a rehearsal is no run."""

    ended: datetime | None = None  #: End of the last run; None: there was none.
    succeeded: datetime | None = None  #: End of the last run with exit code 0; None: there was none.
    rehearsed: datetime | None = None  #: End of the last rehearsal.
    exit_code: int = field(default=Exit.DONE, metadata=named("exitCode"))  #: Exit code of the last run.
    seconds: float = 0  #: Duration of the last run.
    failures: int = 0  #: Failed runs in a row, without runs that only waited or found another run at work.
    #: Exit code of the last rehearsal.
    rehearsal_exit_code: int = field(default=Exit.DONE, metadata=named("rehearsalExitCode"))

    def __post_init__(self) -> None:
        if not self.seconds >= 0 or self.failures < 0:
            raise ValueError("not written by this program")


def after(before: History | None, exit_code: int, ended: datetime, seconds: float) -> History:
    """Add a run to the history (pure); an interrupted run has the exit code 128 plus the signal's number."""
    run = dataclasses.replace(before or History(), ended=ended, exit_code=exit_code, seconds=seconds)
    if exit_code == Exit.DONE:
        return dataclasses.replace(run, succeeded=ended, failures=0)
    return run if exit_code in _NEITHER else dataclasses.replace(run, failures=run.failures + 1)


def history_file(store: Store) -> StateFile[History]:
    """Return the history's file; a damaged file counts as none, and the counts begin again."""
    return coded(History, store.history, "how the last runs ended", OnDamage.START_OVER)


# --- the file ----------------------------------------------------------------------------------------------------------

#: How long to wait for another run that ends at the same moment.
_WAIT = timedelta(seconds=10)
#: The end of a temporary file's name, as `tempfile` makes it.
_RANDOM = "[a-z0-9_]" * 8


class MetricsError(BridgeError):
    """The metrics could not be written; the run's own result stays."""

    hint = "fix [metrics] file in the settings, or the directory that it names; the next run writes it"


@dataclass(slots=True)
class RunExit:
    """The exit code of a run, which its block sets."""

    exit_code: int = Exit.DONE


@contextlib.contextmanager
def written(settings: Settings, now: Callable[[], datetime], *, rehearsal: bool = False) -> Iterator[RunExit]:
    """Write the file when the run in this block ends; a failed write turns success into exit code 1."""
    ending, start = RunExit(), time.monotonic()
    try:
        yield ending
    except BaseException as e:
        ending.exit_code = _code_of(e)
        raise
    finally:
        code, ended, seconds = ending.exit_code, now(), time.monotonic() - start

        def count(before: History | None) -> History:
            if rehearsal:
                return dataclasses.replace(before or History(), rehearsed=ended, rehearsal_exit_code=code)
            return after(before, code, ended, seconds)

        if not _write_or_report(settings, count, ended) and code in Exit.PRECEDENCE:
            ending.exit_code = Exit.worst([code, MetricsError.exit_code])


@contextlib.contextmanager
def kept_current(settings: Settings, now: Callable[[], datetime]) -> Iterator[None]:
    """Write the file when this block ends, and count no run: for commands other than `renew` that change the metrics."""
    try:
        yield
    finally:
        _write_or_report(settings, lambda before: before or History(), now())


def _code_of(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return waiting.exit_code(error)
    return error.exit_code if isinstance(error, BridgeError) else Exit.FAILED


def _write_or_report(settings: Settings, count: Callable[[History | None], History], now: datetime) -> bool:
    """Write the file, if the settings name one; return False after printing an error."""
    try:
        if settings.metrics.file is not None:
            write(settings, settings.metrics.file, count, now)
    except MetricsError as e:
        print_error(e)
        return False
    return True


def write(settings: Settings, file: Path, count: Callable[[History | None], History], now: datetime) -> None:
    """Count a run, and write the metrics (MetricsError: they can't be written)."""
    store = Store(settings.node.state_dir)
    try:
        store.prepare()
        # a run that found another run at work ends while that one still holds the node's lock
        with lock(store.history_lock, "renew", _WAIT):
            remove_unfinished(store.directory, f".{store.history.name}.{_RANDOM}")
            runs = history_file(store)
            runs.put(count(runs.read()))
            _put(file, steady(of_node(settings, now, known(settings, now))).encode())
    except OSError as e:
        raise MetricsError(f"{file}: can't write the metrics: {e.strerror}") from e
    except ForeignLinkError as e:
        raise MetricsError(f"{file}: can't write the metrics: {e}") from e
    except BridgeError as e:
        raise MetricsError(f"{file}: can't write the metrics: {e}") from e


def of_node(settings: Settings, now: datetime, seen: Remembered | None) -> str:
    """Return all metrics of the node at this moment."""
    node = read_node(settings.node)
    found = report(node, now, None, settings.renewal.left_alone)
    return text(found, due_times(node, settings.renewal), seen)


def known(settings: Settings, now: datetime) -> Remembered:
    """Read the state directory; this needs no lock, since each file is replaced whole (StateError: damage)."""
    store = Store(settings.node.state_dir)
    requests = OpenRequests(store).by_name()
    return Remembered(
        failures=attempts_file(store).read() or {},
        pending=tuple(request for request in requests.values() if request.is_waiting),
        history=history_file(store).read(),
        late=_not_in_use(settings, store, now),
        own=credentials.metrics(credentials.seen(settings) or (), settings.renewal.before),
        phases=tuple(_phases(settings)) if any(authority.next for authority in settings.authorities.values()) else (),
    )


def _not_in_use(settings: Settings, store: Store, now: datetime) -> tuple[tuple[str, str], ...]:
    """Return the certificates that were installed and are not in use, each with its component's name."""
    if not any(path.exists() for path in (store.unproven, store.postponed, store.pairs)):
        return ()
    from bridge.renewal import pairs  # noqa: PLC0415 (40 ms, each night)

    late = pairs.late(settings, read_node(settings.node), now)
    return tuple(
        dict.fromkeys(
            (certificate.certificate, certificate.component.value if certificate.component else "")
            for certificate in late
        )
    )


def _phases(settings: Settings) -> Iterator[tuple[str, datetime]]:
    """Yield the phase of each CA that is being replaced; `doctor` reports why it can't be read."""
    from bridge.rotation import places  # noqa: PLC0415 (only while a CA is replaced)

    with contextlib.suppress(BridgeError, OSError):
        for name, ca in places.look(settings, read_node(settings.node), ()).items():
            here = ca.standing
            phase = "unknown" if here.phase is None else here.phase.value
            yield labels(authority=name, phase=phase, half_done="" if here.next is None else here.next.value), ca.since


def known_here(settings: Settings, now: datetime) -> Remembered | None:
    """Return `known`; None: this user may not read the state, or it is damaged, which `doctor` reports."""
    if not credentials.may_look(settings):
        return None
    if not settings.node.state_dir.exists():
        return Remembered(failures={}, pending=(), history=None)
    try:
        return known(settings, now)
    except StateError:
        return None


def _put(file: Path, data: bytes) -> None:
    """
    Replace the file in one step, and remove the temporary files of killed runs.

    The directory may belong to the monitor's user: no file in it is opened, and no link is followed.
    """
    with opened(file) as place:
        remove_unfinished(place.path.parent, f".{glob.escape(place.name)}.{_RANDOM}")
        write_atomically(place.path, data, 0o644)


# --- Prometheus' text format -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """Values of metrics from the state directory, which only root may read."""

    failures: Mapping[str, Failures]  #: Runs in a row that failed, by authority.
    pending: tuple[OpenRequest, ...]  #: Requests that a CA has not answered yet.
    history: History | None  #: None: no run has ended yet.
    #: Installed certificates that are not in use, with their components; empty for a further pair's program.
    late: tuple[tuple[str, str], ...] = ()
    own: str = ""  #: The metrics of our own credentials.
    phases: tuple[tuple[str, datetime], ...] = ()  #: Labels of CAs that are being replaced, and since when they hold.


def due_times(node: Node, renewal: RenewalSettings) -> dict[str, datetime]:
    """Return by name when each certificate becomes due for `renew`, without those of the kubelet's own (pure)."""
    return {
        item.spec.name: due_from(item.renewable, renewal.before, renewal.validity, rotates=item.rotates)
        for item in node.items
        if item.state == "present" and _is_ours(item) and item.spec.name not in renewal.left_alone
    }


def _is_ours(item: Item) -> bool:
    return (item.managed or item.spec.component is not Component.KUBELET) and not item.foreign


def text(report: ExpiryReport, due: Mapping[str, datetime], known: Remembered | None) -> str:
    """Return all metrics, from the rows, the due times by name, and the state if this user may read it."""
    return "".join([*_of_files(report, due), *(_of_state(known) if known is not None else ())])


def _of_files(report: ExpiryReport, due: Mapping[str, datetime]) -> Iterator[str]:
    leaves = [row for row in report.rows if row.authority and not row.left_alone]
    cas = [*report.authorities, *(row for row in report.extra if not row.authority and not row.foreign)]
    yield metric(
        "ca_bridge_certificate_not_after_seconds",
        "End of a certificate's validity, or of its intermediate's or CA's if that is sooner.",
        ((_labels(row), _timestamp(first_end(row.chain))) for row in leaves if row.certificate),
    )
    yield metric(
        "ca_bridge_certificate_due_seconds",
        "From when on renew renews a certificate.",
        ((_labels(row), _timestamp(due[row.name])) for row in leaves if row.name in due),
    )
    yield metric(
        "ca_bridge_authority_not_after_seconds",
        "End of a CA certificate's validity.",
        ((_labels(row), _timestamp(first_end(row.chain))) for row in cas if row.certificate),
    )
    yield metric(
        "ca_bridge_certificate_usable",
        "Whether the file is there and can be read.",
        (
            (_labels(row), int(row.state == "present"))
            for row in (*leaves, *cas)
            if row.state != "missing" or not row.optional
        ),
    )


def _of_state(known: Remembered) -> Iterator[str]:
    counts = [(name, known.failures[name].count if name in known.failures else 0) for name in AUTHORITIES]
    yield metric(
        "ca_bridge_failed_runs",
        "Runs in a row that could not renew at this CA.",
        ((labels(authority=name), count) for name, count in counts),
    )
    yield metric(
        "ca_bridge_certificate_not_in_use",
        "Whether a component is still to be restarted before it uses an installed certificate.",
        ((labels(name=name, component=component), 1) for name, component in known.late),
    )
    yield metric(
        "ca_bridge_certificate_pending_since_seconds",
        "When a request was made that a CA has and has not answered.",
        (
            (labels(name=request.name, authority=request.request.spec.authority.name), _timestamp(request.created))
            for request in known.pending
        ),
    )
    yield known.own
    yield metric(
        "ca_bridge_authority_phase_since_seconds",
        "Since when a CA that is being replaced has been in a phase.",
        ((labels_text, _timestamp(since)) for labels_text, since in known.phases),
    )
    if known.history is not None:
        yield from _of_runs(known.history)


def _of_runs(history: History) -> Iterator[str]:
    if history.rehearsed is not None:
        yield _value("last_rehearsal_seconds", "When renew --rehearse last ended.", _timestamp(history.rehearsed))
        yield _value("last_rehearsal_exit_code", "Exit code of the last renew --rehearse.", history.rehearsal_exit_code)
    if history.ended is None:
        return
    yield _value("last_run_seconds", "When renew last ended.", _timestamp(history.ended))
    if history.succeeded is not None:
        yield _value("last_success_seconds", "When renew last ended with exit code 0.", _timestamp(history.succeeded))
    yield _value("last_run_exit_code", "Exit code of the last renew.", history.exit_code)
    what = "How long the last renew took, the delay of renewal.jitter included."
    yield _value("last_run_duration_seconds", what, round(history.seconds, 3))
    what = "Runs of renew in a row that failed; those that only wait do not count."
    yield _value("consecutive_failures", what, history.failures)


def _value(name: str, help_text: str, value: float) -> str:
    return metric(f"ca_bridge_{name}", help_text, [("", value)])


def _labels(row: Row) -> str:
    return labels(name=row.name, authority=row.authority or row.name, path=row.path)


def _timestamp(time: datetime) -> int:
    return int(time.timestamp())
