"""The whole examination of a node, a CA desk, or a machine that is neither."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from bridge.diagnosis import authorities, desk, installed, machine, use
from bridge.diagnosis.findings import Finding
from bridge.node import inventory
from bridge.settings.tables import Settings


def examine(settings: Settings, now: datetime) -> Iterator[Finding]:
    """
    Look at all that the next renewal depends on; asks the CAs, spends no signature, writes nothing.

    What is wrong is a finding, and no error.
    """
    node = inventory.read(settings.node.pki_dir, settings.node.kubeconfig_dir)
    is_desk = desk.policy_file(settings).is_file()
    if node.is_here:
        yield from installed.look(node, settings, now)
        yield from use.look(node, settings)
        yield from machine.look(node, settings, now)
        yield from authorities.look(node, settings, now)
    elif not is_desk:
        error = inventory.NoNodeError(settings.node.pki_dir)
        yield Finding(level="error", check="no-node", about="node", text=str(error), hint=error.hint)
    if is_desk:
        yield from desk.look(settings, now)
