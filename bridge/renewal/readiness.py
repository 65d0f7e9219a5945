"""Looks before a CA is asked: is there room for the files, and a way to restart components?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from bridge.control_plane import restart_plan
from bridge.errors import BridgeError, Exit
from bridge.node.inventory import Item, Node
from bridge.renewal.select import NotReadyError, outcome_of
from bridge.settings.tables import Settings
from bridge.state.outcome import Outcome
from bridge.system.console import READ_ONLY_HINT
from bridge.system.files import DiskSpace, disk_spaces

#: A renewal of all twelve takes 0.3 MiB: new files beside the old ones, a backup, requests, a record.
BYTES_NEEDED, INODES_NEEDED = 1 << 20, 64


class NoRoomError(NotReadyError):
    """The new files, or the copies of the old ones, would not fit."""

    hint = "make room there, then run again; no CA was asked"


class ReadOnlyError(NotReadyError):
    """Nothing can be written there."""

    hint = f"{READ_ONLY_HINT}, then run again; no CA was asked"


class NoWayToRestartError(NotReadyError):
    """The new certificate could not be taken into use."""

    exit_code: ClassVar[int] = Exit.USAGE


def assert_room(settings: Settings) -> None:
    """
    Look at the disks of the state, PKI and kubeconfig directories.

    Raises:
        ReadOnlyError: One of them is mounted read-only.
        NoRoomError: One of them has too little.
    """
    node = settings.node
    found = list(disk_spaces((node.state_dir, node.pki_dir, node.kubeconfig_dir)))
    if closed := [str(room.place) for room in found if room.is_read_only]:
        raise ReadOnlyError(
            f"file system of {', '.join(closed)}: wanted one that can be written to, found it read-only"
        )
    if problems := [text for text in map(_too_little, found) if text]:
        raise NoRoomError("; ".join(problems))


def _too_little(room: DiskSpace) -> str:
    if room.free < BYTES_NEEDED:
        return (
            f"file system of {room.place}: wanted {BYTES_NEEDED >> 10} KiB for a renewal, found {room.free >> 10} KiB"
        )
    if room.inodes is not None and room.inodes < INODES_NEEDED:
        return f"file system of {room.place}: wanted {INODES_NEEDED} inodes for a renewal, found {room.inodes}"
    return ""


def without_restart(node: Node, settings: Settings, items: Sequence[Item]) -> list[Outcome]:
    """
    Find the certificates whose components can't be restarted, though they have to be.

    Args:
        node: As it is.
        settings: `restart.method` and the commands.
        items: What is to be renewed.
    """
    if settings.restart.method == "none":
        return []
    from bridge.control_plane import restarts  # noqa: PLC0415 (40 ms; only where components are restarted)

    reloads = restart_plan.reloading(node, settings.node.kubernetes_version)
    users = restart_plan.stale([item.spec for item in items], reloads, settings.restart.components)
    obstacles = {c: _no_way(e) for c in users if (e := restarts.obstacle(c, node, settings)) is not None}
    return [
        outcome_of(item, obstacles[component])
        for item in items
        if (component := item.spec.component) in obstacles
        and component in restart_plan.stale([item.spec], reloads, settings.restart.components)
    ]


def _no_way(error: BridgeError) -> NoWayToRestartError:
    hint = f"{error.hint}; or `ca-bridge renew --no-restart` installs it, and says what to restart"
    return NoWayToRestartError(f"not asked for, since its component could not be restarted: {error}", hint=hint)
