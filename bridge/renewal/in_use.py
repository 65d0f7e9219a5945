"""
Installed certificates that an operator takes into use, by `restart.method = "none"` or --no-restart, until the ages of
processes and files tell that they are; runs, `doctor` and monitors ask here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar

from bridge.control_plane import restart_plan
from bridge.errors import BridgeError, Exit
from bridge.node import processes
from bridge.node.inventory import Node
from bridge.settings.tables import Components, Settings
from bridge.specs import Component
from bridge.state.obligations import Owed, postponed_file, unproven_file
from bridge.state.session import Run
from bridge.state.store import Outcome, Store
from bridge.system.state_file import StateError, StateFile

if TYPE_CHECKING:
    from bridge.control_plane.proof import ProofFinding

_MOST_SHOWN = 3


class NotLiveError(BridgeError):
    """An installed certificate is not in use, or does not work."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE
    hint = "`ca-bridge prove` shows each check; `ca-bridge rollback` puts the old files back"


def owe(run: Run, done: Sequence[Outcome], file: StateFile[Owed]) -> None:
    """Write down, before the installation, which certificates are in use only after a restart that an operator makes."""
    node, owed = run.read_node(), file.read() or Owed(certificates=())
    reloads = restart_plan.reloading(node, run.settings.node)
    rotating = {item.spec.name for item in node.items if item.rotates}
    here = running(node)

    def is_read_at_start(name: str) -> bool:
        spec = dataclasses.replace(node.spec(name), reloaded=node.spec(name).reloaded and name not in rotating)
        return bool(here & set(restart_plan.stale([spec], reloads, Components("needed"))))

    owed = owed.live_on(node).with_installed((one for one in done if is_read_at_start(one.name)), run.record.run_id)
    if owed.certificates:
        file.put(owed)


def running(node: Node) -> set[Component]:
    """The components of this node."""
    return {*node.manifests, *([Component.KUBELET] if processes.running(Component.KUBELET.value) else [])}


def is_owed_by(run: Run) -> bool:
    """Whether a certificate of this very run is owed."""
    owed = unproven_file(run.store).read()
    return owed is not None and any(one.newest_run == run.record.run_id for one in owed.certificates)


def settle(run: Run, node: Node, owed: Owed) -> tuple[Owed, list[BridgeError]]:
    """The certificates that are still not seen in use, and an error that names the components to restart."""
    live, findings = owed.live_on(node), look(owed, node, run.settings, run.now())
    late = not_in_use(findings)
    runs = {one.newest_run for one in live.certificates if one.name in {found.certificate for found in late}}
    left = dataclasses.replace(
        owed,
        certificates=tuple(one for one in live.certificates if one.newest_run in runs),
        to_restart=tuple(c for c in owed.to_restart if c in {one.component for one in late}),
    )
    reloads = restart_plan.reloading(node, run.settings.node)
    users = {*restart_plan.stale(map(node.spec, live.names), reloads, Components("needed")), *owed.to_restart}
    can_not_be_seen = users - {one.component for one in findings}  # a message says so once
    components = [c for c in restart_plan.ORDER if c in can_not_be_seen or c in {one.component for one in late}]
    if not components:
        return left, []
    manifests = run.settings.node.kubeconfig_dir / "manifests"
    hint = "; ".join(restart_plan.how(component, manifests) for component in components)
    names = ", ".join(component.value for component in components)
    seen = f": {sentence(late)}" if late else ""
    return left, [
        NotLiveError(f"installed by an earlier run, and not seen in use{seen}; to be restarted: {names}", hint=hint)
    ]


def settle_postponed(run: Run) -> list[BridgeError]:
    """Errors about certificates that earlier runs installed with --no-restart and that are not seen in use yet."""
    file = postponed_file(run.store)
    try:
        owed = file.read()
        if owed is None:
            return []
        ours = tuple(one for one in owed.certificates if one.newest_run == run.record.run_id)
        earlier = tuple(one for one in owed.certificates if one not in ours)
        left, errors = settle(run, run.read_node(), dataclasses.replace(owed, certificates=earlier))
        keep(file, dataclasses.replace(left, certificates=(*left.certificates, *ours)))
    except StateError as e:
        return [e]
    return errors


def keep(file: StateFile[Owed], left: Owed) -> None:
    """Write down what is still owed."""
    file.put(left if left.certificates or left.to_restart else None)


def look(owed: Owed, node: Node, settings: Settings, now: datetime) -> list[ProofFinding]:
    """Findings about what is owed, by files and processes alone."""
    from bridge.control_plane import proof  # noqa: PLC0415 (40 ms; only where something is owed)

    names = owed.live_on(node).names
    return [
        one
        for one in proof.by_files(node, settings, now).findings
        if one.certificate in names or one.component in owed.to_restart
    ]


def not_in_use(findings: Sequence[ProofFinding]) -> list[ProofFinding]:
    """Those of them that show no use, or that could not look."""
    return [one for one in findings if one.state in ("stale", "unknown")]


def sentence(findings: Sequence[ProofFinding]) -> str:
    """The first few of them, for a message."""
    parts = [f"{f.certificate}: {f.what}: {f.state}: {f.detail}" for f in findings[:_MOST_SHOWN]]
    more = len(findings) - _MOST_SHOWN
    return "; ".join([*parts, *([f"and {more} more"] if more > 0 else [])])


def late(settings: Settings, node: Node, now: datetime) -> list[ProofFinding]:
    """The same for monitors and `doctor`; empty for a user who may not look into the state directory."""
    store = Store(settings.node.state_dir)
    found: list[ProofFinding] = []
    for file in (unproven_file(store), postponed_file(store)):
        try:
            owed = file.read()
        except StateError:
            continue
        found += not_in_use(look(owed, node, settings, now)) if owed is not None else []
    if store.pairs.exists():
        from bridge.renewal import pairs  # noqa: PLC0415 (40 ms; only where a further pair is owed)

        found += pairs.late(settings, node, now)
    return list(dict.fromkeys(found))
