"""
Copies of a new node's files outside of what `kubeadm reset` deletes, keys included, so that nothing is signed anew.

One file a node, 0600, in a directory that is the administrator's choice; whoever has it can be that node.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.bootstrap.places import Role
from bridge.system.files import Attributes, private_directory
from bridge.system.state_file import OnDamage, StateFile

_KEY = "keptV1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The files of one node."""

    role: Role
    config: str  #: kubeadm's, for which they were made.
    files: tuple[tuple[str, Path, int, bytes], ...] = field(repr=False)  #: Certificate, path, mode, content.


def kept_file(directory: Path, node: str) -> StateFile[Kept]:
    """The file of a node."""
    return StateFile(
        path=directory / f"{node}.kept.json",
        what="copies of a node's files",
        parse=_from_json,
        keys=frozenset({_KEY}),
        on_damage=OnDamage.REFUSE,
        afterwards="without it all is signed anew",
    )


def keep(directory: Path, node: str, kept: Kept) -> None:
    """
    Write it; the directory is made if it is not there.

    Raises:
        BridgeError: The directory is not ours alone.
        StateError: It can't be written.
    """
    private_directory(directory)
    files = [
        {"certificate": name, "path": str(path), "mode": mode, "data": b64encode(data).decode()}
        for name, path, mode, data in kept.files
    ]
    kept_file(directory, node).replace({_KEY: {"role": kept.role, "config": kept.config, "files": files}})


def attributes(mode: int) -> Attributes:
    """Root's, or whoever runs this."""
    own = Attributes.private()
    return Attributes(mode=mode, uid=own.uid, gid=own.gid, extended={})


def _from_json(document: Mapping[str, Any]) -> Kept:
    entry = document[_KEY]
    files = tuple(
        (str(one["certificate"]), Path(one["path"]), int(one["mode"]), b64decode(one["data"])) for one in entry["files"]
    )
    return Kept(role=entry["role"], config=entry["config"], files=files)
