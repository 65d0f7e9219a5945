"""Installed certificates that are not proven: on disk before an installation, and until they are seen in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bridge.errors import Exit
from bridge.node.inventory import Item, Node
from bridge.pki.certificates import serial_hex
from bridge.specs import SPECS, Component
from bridge.state.store import Store
from bridge.system.state_file import OnDamage, StateFile

if TYPE_CHECKING:
    from bridge.control_plane.proof import ProofFinding


@dataclass(frozen=True, slots=True, kw_only=True)
class Unproven:
    """A certificate that was installed, perhaps by several runs, before anybody has seen it in use."""

    name: str  #: kubeadm's.
    runs: Mapping[str, str]  #: What they installed, or were about to: the run by the serial.
    backup_of: str  #: The first of them, whose backup has what was in use.
    before: frozenset[str] = frozenset()  #: Checks that failed before it, as in `Finding.what`.

    @property
    def newest_run(self) -> str:
        """The run whose certificate it is, as far as that is known."""
        return list(self.runs.values())[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Owed:
    """Installed certificates that are not proven, and what is owed for them."""

    certificates: tuple[Unproven, ...]
    going_back: str = ""  #: Why all of it goes back; empty: it does not.
    to_restart: tuple[Component, ...] = ()  #: Restarted on what goes back, or went, and not on the old files yet.

    @property
    def names(self) -> list[str]:
        """The certificates' names."""
        return [one.name for one in self.certificates]

    def live_on(self, node: Node) -> Owed:
        """The same without what is not there: it was not installed, or was replaced by somebody else."""
        live = {i.spec.name: serial_hex(i.certificates[0]) for i in node.items if i.certificates}
        odd = {item.spec.name for item in self.unreadable_on(node)}
        ours = tuple(one for one in self.certificates if live.get(one.name) in one.runs or one.name in odd)
        return dataclasses.replace(self, certificates=ours)

    def unreadable_on(self, node: Node) -> list[Item]:
        """Certificates of these on the node that can't be read now, and may come back."""
        return [
            item
            for item in node.items
            if item.spec.name in self.names
            and item.state != "present"
            and not (item.state == "missing" and item.spec.optional)
        ]

    def is_new(self, finding: ProofFinding) -> bool:
        """Whether it worked before the installation."""
        return not any(finding.certificate == one.name and finding.what in one.before for one in self.certificates)


def unproven_file(store: Store) -> StateFile[Owed]:
    """The file with what was installed and is not proven; a damaged one may owe a restart, or the way back."""
    return StateFile(
        path=store.unproven,
        what="what was installed and not proven",
        parse=_owed_of,
        keys=frozenset({"certificates", "going_back", "to_restart"}),
        on_damage=OnDamage.REFUSE,
        afterwards="`ca-bridge prove` shows whether all is in use, and `ca-bridge restart` restarts what is not",
        exit_code=Exit.NOT_LIVE,
    )


def _owed_of(document: Mapping[str, Any]) -> Owed:
    return Owed(
        certificates=tuple(map(_unproven_of, document["certificates"])),
        going_back=str(document["going_back"]),
        to_restart=tuple(map(Component, document["to_restart"])),
    )


def _unproven_of(entry: Mapping[str, Any]) -> Unproven:
    return Unproven(
        name=SPECS[entry["name"]].name,
        runs={str(serial): str(run_id) for serial, run_id in entry["runs"].items()},
        backup_of=str(entry["backup_of"]),
        before=frozenset(map(str, entry["before"])),
    )


def write(store: Store, owed: Owed) -> None:
    """
    Remember it.

    Raises:
        StateError: It can't be written.
    """
    certificates = [{**dataclasses.asdict(one), "before": sorted(one.before)} for one in owed.certificates]
    document: dict[str, object] = {"certificates": certificates, "going_back": owed.going_back}
    document["to_restart"] = [component.value for component in owed.to_restart]
    unproven_file(store).replace(document)
