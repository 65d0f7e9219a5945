"""
Prometheus' text format: each metric's name and meaning, for the metrics file and `check-expiration -o prometheus`.

Times are seconds since 1970, and never ages: a file's content stays as it is while time goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from bridge.node.expiry_report import ExpiryReport, Row
from bridge.node.inventory import Item, Node
from bridge.pki.expiry import due_from, first_end
from bridge.renewal.gate import Failures
from bridge.settings.tables import RenewalSettings
from bridge.specs import AUTHORITIES, Component
from bridge.state.open_requests import OpenRequest
from bridge.system.codec import labels, metric

if TYPE_CHECKING:
    from bridge.monitoring.metrics import History


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """The values for metrics from the state directory, which only root may read."""

    failures: Mapping[str, Failures]  #: Runs in a row that failed, by authority.
    pending: tuple[OpenRequest, ...]  #: That somebody has, and has not answered.
    history: History | None  #: None: no run has ended yet.
    late: tuple[tuple[str, str], ...] = ()  #: Certificates that are installed and not in use, and their components.


def due_times(node: Node, renewal: RenewalSettings) -> dict[str, datetime]:
    """
    The times from which on `renew` renews each certificate, by name; none for what it leaves to the kubelet (pure).

    Args:
        node: What is there.
        renewal: `before` and `validity` say when it is due.
    """
    return {
        item.spec.name: due_from(item.renewable, renewal.before, renewal.validity, rotates=item.rotates)
        for item in node.items
        if item.state == "present" and _is_ours(item)
    }


def _is_ours(item: Item) -> bool:
    return (item.managed or item.spec.component is not Component.KUBELET) and not item.foreign


def text(found: ExpiryReport, due: Mapping[str, datetime], known: Remembered | None) -> str:
    """
    All metrics.

    Args:
        found: The rows.
        due: From when on each certificate is due, by name.
        known: None: this user may not see it.
    """
    return "".join([*_of_files(found, due), *(_of_state(known) if known is not None else ())])


def _of_files(found: ExpiryReport, due: Mapping[str, datetime]) -> Iterator[str]:
    leaves = [row for row in found.rows if row.authority]
    cas = [*found.authorities, *(row for row in found.extra if not row.authority and not row.foreign)]
    yield _metric(
        "ca_bridge_certificate_not_after_seconds",
        "End of a certificate's validity, or of its intermediate's or CA's if that is sooner.",
        ((_labels(row), _end(row)) for row in leaves if row.certificate),
    )
    yield _metric(
        "ca_bridge_certificate_due_seconds",
        "From when on renew renews a certificate.",
        ((_labels(row), _timestamp(due[row.name])) for row in leaves if row.name in due),
    )
    yield _metric(
        "ca_bridge_authority_not_after_seconds",
        "End of a CA certificate's validity.",
        ((_labels(row), _end(row)) for row in cas if row.certificate),
    )
    yield _metric(
        "ca_bridge_certificate_usable",
        "Whether the file is there and can be read.",
        ((_labels(row), int(row.state == "present")) for row in (*leaves, *cas) if not _absent(row)),
    )


def _of_state(known: Remembered) -> Iterator[str]:
    counts = [(name, known.failures[name].count if name in known.failures else 0) for name in AUTHORITIES]
    yield _metric(
        "ca_bridge_failed_runs",
        "Runs in a row that could not renew at this CA.",
        ((labels(authority=name), count) for name, count in counts),
    )
    yield _metric(
        "ca_bridge_certificate_not_in_use",
        "Whether a component is still to be restarted before it uses an installed certificate.",
        ((labels(name=name, component=component), 1) for name, component in known.late),
    )
    yield _metric(
        "ca_bridge_certificate_pending_since_seconds",
        "When a request was made that a CA has and has not answered.",
        (
            (labels(name=one.name, authority=one.request.spec.authority.name), _timestamp(one.created))
            for one in known.pending
        ),
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
    return _metric(f"ca_bridge_{name}", help_text, [("", value)])


def _metric(name: str, help_text: str, samples: Iterable[tuple[str, float]]) -> str:
    return metric(name, help_text, (f"{name}{labels_text} {value}" for labels_text, value in samples))


def _labels(row: Row) -> str:
    return labels(name=row.name, authority=row.authority or row.name, path=row.path)


def _end(row: Row) -> int:
    return _timestamp(first_end(row.chain))


def _timestamp(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=time.tzinfo)) // timedelta(seconds=1)


def _absent(row: Row) -> bool:
    """Missing, as it may be."""
    return row.state == "missing" and row.optional
