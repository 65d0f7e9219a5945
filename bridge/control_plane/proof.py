"""A report of what each component really serves and uses, seen from outside by new connections; it changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from bridge.control_plane import ORDER, checks
from bridge.control_plane.probes import Check, ProofState
from bridge.errors import BridgeError, Exit
from bridge.node.inventory import Item, Node
from bridge.node.reading import read_node
from bridge.settings.tables import Settings
from bridge.specs import Component
from bridge.system.console import doing
from bridge.system.waiting import wait_until, workers

_AT_ONCE = 8
_PAUSE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class ProofFinding:
    """The result of one check: what a component serves, uses or accepts."""

    component: Component | None  #: The component whose certificate it is; None: people use it.
    certificate: str  #: kubeadm's name, or the file's where kubeadm has none.
    what: str
    state: ProofState
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofReport:
    """All findings of one look."""

    findings: tuple[ProofFinding, ...]  #: Empty: there was nothing to check.

    @property
    def stale(self) -> list[Component]:
        """Components that must be restarted, in restart order."""
        found = {finding.component for finding in self.findings if finding.state == "stale"}
        return [component for component in ORDER if component in found]

    @property
    def wrong(self) -> list[ProofFinding]:
        """Findings that keep the exit code from 0."""
        return [finding for finding in self.findings if finding.state in _CODES]

    @property
    def exit_code(self) -> int:
        """7 if a finding is stale, refused or without an answer; 1 if nothing, or not everything, could be checked."""
        return Exit.worst([_CODES[finding.state] for finding in self.wrong]) if self.findings else Exit.FAILED


_CODES: Mapping[ProofState, int] = {
    "stale": Exit.NOT_LIVE,
    "refused": Exit.NOT_LIVE,
    "no-answer": Exit.NOT_LIVE,
    "unknown": Exit.FAILED,
}


def look(node: Node, settings: Settings, now: datetime, **paths: Path) -> ProofReport:
    """Check all components of a node concurrently; a fault is a finding, not an error."""
    shared = checks.Look(node=node, settings=settings, now=now, **paths)
    to_run = list(checks.of(shared) if node.manifests or node.is_worker else checks.of_pairs(node, now))
    with workers(_AT_ONCE) as pool:
        return ProofReport(findings=tuple(pool.map(_finding, to_run)))


def by_files(node: Node, settings: Settings, now: datetime) -> ProofReport:
    """Compare the ages of processes and files only, without a connection or a key."""
    shared = checks.Look(node=node, settings=settings, now=now)
    return ProofReport(findings=tuple(map(_finding, checks.by_files(shared))))


def of_pair(item: Item, now: datetime) -> ProofFinding | None:
    """Return the finding on a further pair; None: the settings name no server to check."""
    check = checks.of_pair(item, now)
    return None if check is None else _finding(check)


def _finding(check: Check) -> ProofFinding:
    return ProofFinding(check.component, check.certificate, check.what, *check.run())


def within(
    read: Callable[[], Node],
    settings: Settings,
    now: Callable[[], datetime],
    limit: timedelta,
    *,
    counts: Callable[[ProofFinding], bool] = lambda _: True,
) -> ProofReport:
    """Look at least once, until no finding that counts is wrong or the time is over; return the last look."""
    with doing("proving that every component works on its certificates"):
        return wait_until(
            lambda: look(read(), settings, now()),
            lambda report: not any(map(counts, report.wrong)),
            limit,
            pause_seconds=_PAUSE_SECONDS,
        )


def prove(settings: Settings, now: Callable[[], datetime], wait: timedelta) -> ProofReport:
    """Check this node until every check passes or the time is over (BridgeError: there is nothing to check)."""
    node = settings.node
    found = within(lambda: read_node(node), settings, now, wait)
    if not found.findings:
        directory, reason = node.kubeconfig_dir / "manifests", " none"
        try:
            list(directory.iterdir())
        except OSError as e:
            reason = f": {e.strerror}"
        raise BridgeError(
            f"nothing could be proven: wanted static-pod manifests in {directory}, found{reason}",
            hint="run it on a node of the cluster; --kubeconfig-dir names the directory of its files",
        )
    return found
