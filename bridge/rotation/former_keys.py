"""The keys that kubeadm has left beside the CAs' certificates: a replaced CA's leaves the node, whatever its place was."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from bridge.errors import BridgeError, Exit, SettingsError, SettingsProblem
from bridge.node import endpoints
from bridge.node.inventory import Node
from bridge.rotation.places import Replaced
from bridge.settings.tables import NodeSettings
from bridge.specs import CA, Component
from bridge.system.files import sync_directory, write_atomically
from bridge.system.paths import UnreadableError, exposure, read

_OTHERS = 0o077


class KeyLeftError(BridgeError):
    """The key of a CA that no longer signs is still in kubeadm's place."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE
    hint = "the same command with another --keys-to takes it away; its reader makes any user until `drop` is done on every node"


def signing(node: Node, one: Replaced) -> list[str]:
    """The flags by which the controller manager signs with this CA's file: that signer ends at a second certificate in it."""
    manifest = node.manifests.get(Component.CONTROLLER_MANAGER)
    if one.state.authority != CA or manifest is None:
        return []
    wanted = os.path.realpath(one.state.path)
    found = endpoints.signing_files(manifest.flags)
    return [flag for flag, path in found.items() if os.path.realpath(path) == wanted]


def place_of(node: NodeSettings, one: Replaced) -> Path:
    """Where kubeadm keeps a CA's key."""
    return node.pki_dir / one.state.authority.key_file


def assert_takes(directory: Path, node: NodeSettings) -> None:
    """Make sure that a directory can take keys, which nothing here is to read again (SettingsError)."""
    found = ""
    try:
        if not directory.is_absolute() or not stat.S_ISDIR(directory.stat().st_mode):
            found = f"{directory}, which is no such directory"
        elif directory.stat().st_mode & _OTHERS:
            found = f"{directory}, which others may look into (chmod 700)"
        elif (open_to := exposure(directory)) is not None:
            found = f"{open_to.path}: {open_to.found}"
    except OSError as e:
        found = f"{directory}: {e.strerror}"
    real = Path(os.path.realpath(directory))
    inside = [one for one in (node.pki_dir, node.kubeconfig_dir, node.state_dir) if real.is_relative_to(one.resolve())]
    if inside:
        found = f"{directory}, which is below {inside[0]}"
    if found:
        wanted = "an absolute path of a directory for its owner alone, outside kubeadm's and our own"
        raise SettingsError([SettingsProblem("--keys-to", wanted, found)])


def take_away(cas: Sequence[Replaced], node: NodeSettings, directory: Path) -> Iterator[str | KeyLeftError]:
    """Move keys into a directory, one file a CA; sentences, and errors after which the same call goes on."""
    for one in cas:
        place, target = place_of(node, one), directory / f"{one.name}.key"
        try:
            data, there = read(place), read(target)
            if data is None:
                continue
            if there not in (None, data):
                yield KeyLeftError(f"{place}: wanted it away from this node, found another key in {target}")
                continue
            write_atomically(target, data)
            sync_directory(directory)
            for path in dict.fromkeys([Path(os.path.realpath(place)), place]):  # a link and what it leads to
                path.unlink()
                sync_directory(path.parent)
        except (OSError, UnreadableError) as e:
            yield KeyLeftError(f"{place}: wanted it away from this node, found: {e}")
        else:
            yield f"{one.name}: its former key is {target} now, and no longer {place}: take it off this node"
