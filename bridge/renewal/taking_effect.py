"""Restart what runs on old certificates, and look until all is in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from bridge.control_plane import proof, restart_plan
from bridge.control_plane.proof import ProofFinding, ProofReport
from bridge.control_plane.restarts import ImpossibleError, Restarted, restart_all, restarted_since
from bridge.errors import PostponedError
from bridge.node.inventory import Node
from bridge.specs import SPECS, CertificateSpec, Component
from bridge.state import backups
from bridge.state.obligations import Owed
from bridge.state.session import Run

_MOST_SHOWN = 3
FAILED = ("refused", "no-answer")


def restart(run: Run, node: Node, owed: Owed) -> list[Restarted]:
    """
    First those that are known not to reload, as the settings say; if only what is needed, as proof shows it.

    What an earlier run has installed is not restarted for once more: of its users those that proof shows, and where
    there is none, those that were not restarted since.
    """
    wanted = run.settings.restart.components
    reloads = restart_plan.reloading(node, run.settings.node.kubernetes_version)
    specs = {name: SPECS[name] for name in owed.names} | _read_at_start(node, owed)
    ours = [specs[one.name] for one in owed.certificates if one.newest_run == run.record.run_id]
    others = [specs[one.name] for one in owed.certificates if one.newest_run != run.record.run_id]
    new, old = (
        restart_plan.stale(ours, reloads, wanted),
        {*restart_plan.stale(others, reloads, wanted), *owed.to_restart},
    )
    stale: list[Component] = []
    is_looked_at = bool(node.manifests) or node.is_worker
    if is_looked_at and (old or (new and wanted.which == "needed")):
        report = proof.look(node, run.settings, run.now())
        stale = report.stale
        if wanted.which == "needed":
            new = [c for c in new if c in stale or (c is Component.KUBELET and not _has_read(report))]
    done = restarted_since(run.store, began(run, owed, newest=True)) if old else []
    unseen = [c for c in old if c not in done and (c is Component.KUBELET or not is_looked_at)]
    return restart_these(
        run, node, [c for c in restart_plan.ORDER if c in new or (c in old and (c in stale or c in unseen))]
    )


def _has_read(report: ProofReport) -> bool:
    """Whether the kubelet is seen to have its new client certificate, or to take it by itself."""
    found = [f for f in report.findings if f.component is Component.KUBELET and f.what.startswith("has read")]
    return bool(found) and all(f.state in ("current", "next-connection") for f in found)


def _read_at_start(node: Node, owed: Owed) -> dict[str, CertificateSpec]:
    """A pair that a kubelet got from a signer is read by nobody but itself, and at its start (measured on 1.37)."""
    return {
        item.spec.name: dataclasses.replace(item.spec, reloaded=False)
        for item in node.items
        if item.spec.name in owed.names and item.rotates
    }


def began(run: Run, owed: Owed, *, newest: bool) -> datetime:
    """When the newest, or the first, of the installations began; the beginning of time where no backup tells."""
    wanted = {one.newest_run if newest else one.backup_of for one in owed.certificates}
    created = [one.created for one in backups.read_all(run.store)[0] if one.run_id in wanted]
    return (max if newest else min)(created, default=datetime.min.replace(tzinfo=UTC))


def restart_these(
    run: Run, node: Node, components: Sequence[Component], *, going_back: bool = False
) -> list[Restarted]:
    """Restart these components and no other."""
    if not components:
        return []
    return restart_all(components, node, run.settings, run.store, record=run.record, going_back=going_back)


def look(run: Run, owed: Owed, restarted: Sequence[Restarted]) -> tuple[ProofReport, list[Restarted]]:
    """
    Look until all is well; what was trusted to reload and did not is restarted after all.

    What could not be restarted now is on its old certificate, and not waited for.
    """
    names, done = owed.names, {one.component for one in restarted}
    if any(isinstance(one.error, PostponedError) for one in restarted):
        return look_until(
            run, lambda f: f.certificate in names and f.state in FAILED and owed.is_new(f.certificate, f.what)
        ), []
    stuck = {one.component for one in restarted if isinstance(one.error, ImpossibleError)}
    report = look_until(run, lambda f: f.certificate in names and not (f.state == "stale" and f.component in stuck))
    late = [f.component for f in report.wrong if f.state == "stale" and f.certificate in names and f.component]
    more = [component for component in restart_plan.ORDER if component in late and component not in done]
    if not more or run.settings.restart.components.which == "listed":
        return report, []
    again = restart_these(run, run.read_node(), more)
    stuck |= {one.component for one in again if isinstance(one.error, ImpossibleError)}
    report = look_until(run, lambda f: f.certificate in names and not (f.state == "stale" and f.component in stuck))
    return report, again


def look_until(run: Run, counts: Callable[[ProofFinding], bool]) -> ProofReport:
    """Look until none of the findings that count is wrong, or the time is over."""
    return proof.within(run.read_node, run.settings, run.now, run.settings.restart.prove_for, counts=counts)


def sentence(findings: Sequence[ProofFinding]) -> str:
    """The first few of them, for a message."""
    parts = [f"{f.certificate}: {f.what}: {f.state}: {f.detail}" for f in findings[:_MOST_SHOWN]]
    more = len(findings) - _MOST_SHOWN
    return "; ".join([*parts, *([f"and {more} more"] if more > 0 else [])])
