"""Tracks installed certificates whose components an operator restarts, until process and file ages show them in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from typing import ClassVar

from bridge import control_plane
from bridge.control_plane import proof
from bridge.control_plane.proof import ProofFinding
from bridge.errors import BridgeError, Exit
from bridge.node import processes
from bridge.node.inventory import Node
from bridge.settings.tables import Components, Settings
from bridge.specs import CertificateSpec, Component
from bridge.state import Outcome
from bridge.state.obligations import NotProven, postponed_file
from bridge.state.session import Run
from bridge.system.state_file import StateError, StateFile

_MOST_SHOWN = 3


class NotLiveError(BridgeError):
    """An installed certificate is not in use, or does not work."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE
    hint = "`ca-bridge prove` shows each check; `ca-bridge rollback` puts the old files back"


def record_due(run: Run, done: Sequence[Outcome], file: StateFile[NotProven]) -> None:
    """Record, before the installation, the certificates that are in use only after an operator's restart."""
    node, unproven = run.read_node(), file.read() or NotProven(certificates=())
    reloads = control_plane.reloading(node, run.settings.node)
    here = running(node)

    def is_read_at_start(name: str) -> bool:
        return bool(here & set(control_plane.stale([installed_spec(node, name)], reloads, Components("needed"))))

    unproven = unproven.live_on(node).with_installed(
        (certificate for certificate in done if is_read_at_start(certificate.name)), run.record.run_id
    )
    if unproven.certificates:
        file.put(unproven)


def installed_spec(node: Node, name: str) -> CertificateSpec:
    """Return a certificate's spec; a kubelet reads a pair from a signer only at its start (measured on 1.37)."""
    spec, item = node.spec(name), node.item(name)
    return dataclasses.replace(spec, reloaded=False) if item is not None and item.rotates else spec


def running(node: Node) -> set[Component]:
    """Return the components of this node."""
    return {*node.manifests, *([Component.KUBELET] if processes.running(Component.KUBELET.value) else [])}


def finish(run: Run, node: Node, unproven: NotProven) -> tuple[NotProven, list[BridgeError]]:
    """Return the certificates that are still not seen in use, and an error that names the components to restart."""
    live, findings = unproven.live_on(node), look(unproven, node, run.settings, run.now())
    late = not_in_use(findings)
    runs = {
        certificate.newest_run
        for certificate in live.certificates
        if certificate.name in {use.certificate for use in late}
    }
    left = dataclasses.replace(
        unproven,
        certificates=tuple(certificate for certificate in live.certificates if certificate.newest_run in runs),
        to_restart=tuple(c for c in unproven.to_restart if c in {use.component for use in late}),
    )
    reloads = control_plane.reloading(node, run.settings.node)
    users = {*control_plane.stale(map(node.spec, live.names), reloads, Components("needed")), *unproven.to_restart}
    can_not_be_seen = users - {finding.component for finding in findings}  # only this run's message names these
    components = [c for c in control_plane.ORDER if c in can_not_be_seen or c in {use.component for use in late}]
    if not components:
        return left, []
    hint = "; ".join(control_plane.how_to_restart(component, run.settings.node) for component in components)
    names = ", ".join(component.value for component in components)
    seen = f": {sentence(late)}" if late else ""
    return left, [
        NotLiveError(f"installed by an earlier run, and not seen in use{seen}; to be restarted: {names}", hint=hint)
    ]


def settle_postponed(run: Run) -> list[BridgeError]:
    """Return errors about certificates of `postponed_file` from earlier runs that are not seen in use yet."""
    file = postponed_file(run.store)
    try:
        unproven = file.read()
        if unproven is None:
            return []
        certificates = tuple(
            certificate for certificate in unproven.certificates if certificate.newest_run == run.record.run_id
        )
        earlier = tuple(certificate for certificate in unproven.certificates if certificate not in certificates)
        left, errors = finish(run, run.read_node(), dataclasses.replace(unproven, certificates=earlier))
        keep(file, dataclasses.replace(left, certificates=(*left.certificates, *certificates)))
    except StateError as e:
        return [e]
    return errors


def keep(file: StateFile[NotProven], left: NotProven) -> None:
    """Record the certificates that are still unproven, or remove an empty record."""
    file.put(left if left.certificates or left.to_restart else None)


def look(unproven: NotProven, node: Node, settings: Settings, now: datetime) -> list[ProofFinding]:
    """Return findings about unproven certificates, from files and processes alone."""
    names = unproven.live_on(node).names
    return [
        finding
        for finding in proof.by_files(node, settings, now).findings
        if finding.certificate in names or finding.component in unproven.to_restart
    ]


def not_in_use(findings: Sequence[ProofFinding]) -> list[ProofFinding]:
    """Return the findings that show an old certificate in use, or could not tell."""
    return [finding for finding in findings if finding.state in ("stale", "unknown")]


def sentence(findings: Sequence[ProofFinding]) -> str:
    """Join the first few findings for a message."""
    parts = [f"{f.certificate}: {f.what}: {f.state}: {f.detail}" for f in findings[:_MOST_SHOWN]]
    more = len(findings) - _MOST_SHOWN
    return "; ".join([*parts, *([f"and {more} more"] if more > 0 else [])])
