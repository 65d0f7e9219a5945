"""The whole examination of a node, a CA desk, or a machine that is neither."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime

from bridge.diagnosis import authorities, desk, drift, installed, machine, upgrade, use
from bridge.diagnosis.findings import Finding, from_error
from bridge.errors import BridgeError
from bridge.node import inventory
from bridge.settings.tables import Settings


def before_upgrade(settings: Settings, now: datetime) -> Iterator[Finding]:
    """Look at what `kubeadm upgrade` would make of this node's certificates; asks the cluster's API, and no CA."""
    node = inventory.of(settings.node)
    if not node.is_here:
        error = inventory.NoNodeError(settings.node.pki_dir)
        yield Finding(level="error", check="no-node", about="node", text=str(error), hint=error.hint)
        return
    yield from _whole(lambda: upgrade.look(node, settings, now))
    yield from _whole(lambda: drift.look(node, settings))


def examine(settings: Settings, now: datetime) -> Iterator[Finding]:
    """
    Look at all that the next renewal depends on; asks the CAs, spends no signature, writes nothing.

    What is wrong is a finding, and no error.
    """
    node = inventory.of(settings.node)
    is_desk = desk.policy_file(settings).is_file()
    if node.is_here:
        yield from _whole(lambda: installed.look(node, settings, now))
        yield from _whole(lambda: use.look(node, settings))
        yield from _whole(lambda: machine.look(node, settings, now))
        yield from _whole(lambda: authorities.look(node, settings, now))
    elif not is_desk:
        error = inventory.NoNodeError(settings.node.pki_dir)
        hint = f"{error.hint}; a CA desk has its policy in {desk.policy_file(settings)}"
        yield Finding(level="error", check="no-node", about="node", text=str(error), hint=hint)
    if is_desk:
        yield from _whole(lambda: desk.look(settings, now))


def _whole(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Run one part of the examination; what can't be looked at ends it, and no other."""
    try:
        yield from look()
    except OSError as e:
        place = str(e.filename or "this machine")
        text = f"wanted to look at it, found: {e.strerror}"
        yield Finding(level="error", check="unreadable", about=place, text=text)
    except BridgeError as e:
        yield from_error("unreadable", "state directory", e)
