"""
Installed certificates that an operator takes into use, since `restart.method` is "none": owed until they are seen in use.

A component that reads its certificates at its start alone goes on with the old ones until it is restarted, by whatever
means; the ages of processes and files tell whether it was. Runs, `doctor` and monitors ask here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from bridge.control_plane import restart_plan
from bridge.node import processes
from bridge.node.inventory import Node
from bridge.pki.certificates import serial_hex
from bridge.settings.tables import Components, Settings
from bridge.specs import SPECS, Component
from bridge.state.obligations import Owed, Unproven, unproven_file
from bridge.state.session import Run
from bridge.state.store import Outcome, Store
from bridge.system.state_file import StateError

if TYPE_CHECKING:
    from bridge.control_plane.proof import ProofFinding


def owe(run: Run, done: Sequence[Outcome]) -> None:
    """Write down, before the installation, which certificates are in use only after a restart that an operator makes."""
    node, file = run.read_node(), unproven_file(run.store)
    owed = file.read() or Owed(certificates=())
    reloads = restart_plan.reloading(node, run.settings.node)
    rotating = {item.spec.name for item in node.items if item.rotates}
    running = {*node.manifests, *([Component.KUBELET] if processes.running(Component.KUBELET.value) else [])}
    certificates = {one.name: one for one in owed.live_on(node).certificates}
    for name, serial in ((one.name, serial_hex(one.new)) for one in done if one.new is not None):
        spec = dataclasses.replace(SPECS[name], reloaded=SPECS[name].reloaded and name not in rotating)
        if running & set(restart_plan.stale([spec], reloads, Components("needed"))):
            new = Unproven(name=name, runs={}, backup_of=run.record.run_id)
            one = certificates.pop(name, new)
            certificates[name] = dataclasses.replace(one, runs={**one.runs, serial: run.record.run_id})
    if certificates:
        file.put(dataclasses.replace(owed, certificates=tuple(certificates.values())))


def is_owed_by(run: Run) -> bool:
    """Whether a certificate of this very run is owed."""
    owed = unproven_file(run.store).read()
    return owed is not None and any(one.newest_run == run.record.run_id for one in owed.certificates)


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


def late(settings: Settings, node: Node, now: datetime) -> list[ProofFinding]:
    """The same for monitors and `doctor`; empty for a user who may not look into the state directory."""
    try:
        owed = unproven_file(Store(settings.node.state_dir)).read()
    except StateError:
        return []
    return not_in_use(look(owed, node, settings, now)) if owed is not None else []
