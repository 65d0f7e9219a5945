"""Checks before a CA is asked: disk space, a way to restart components, a CA that is only half replaced, the node's own policy."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

from bridge import control_plane
from bridge.errors import BridgeError, Exit
from bridge.node import kubeconfig
from bridge.node.inventory import Item, Node
from bridge.node.kubeconfig import KubeconfigError
from bridge.pki import csr
from bridge.pki.certificates import UNREADABLE, leads_to, load_pem_certificates
from bridge.pki.expiry import first_end
from bridge.renewal import Desired, NotReadyError, outcome_of
from bridge.renewal.prepare import next_key, present, replaced_by_next, serving_names
from bridge.settings.tables import Settings
from bridge.state import Outcome
from bridge.system.console import READ_ONLY_HINT
from bridge.system.files import DiskSpace, disk_spaces
from bridge.system.paths import UnreadableError, read

if TYPE_CHECKING:
    from bridge.desk.policy import Policy

#: A renewal of all twelve takes 0.3 MiB: new files beside the old ones, a backup, requests, a record.
BYTES_NEEDED, INODES_NEEDED = 1 << 20, 64


def assert_room(settings: Settings) -> None:
    """Look at the disks of the state, PKI and kubeconfig directories (NotReadyError)."""
    node = settings.node
    found = list(disk_spaces((node.state_dir, node.pki_dir, node.kubeconfig_dir)))
    if closed := [str(room.place) for room in found if room.is_read_only]:
        text = f"file system of {', '.join(closed)}: wanted one that can be written to, found it read-only"
        raise NotReadyError(text, hint=f"{READ_ONLY_HINT}, then run again; no CA was asked")
    if problems := [text for text in map(_too_little, found) if text]:
        raise NotReadyError("; ".join(problems), hint="make room there, then run again; no CA was asked")


def _too_little(room: DiskSpace) -> str:
    where = f"file system of {room.place}"
    if room.free < BYTES_NEEDED:
        return f"{where}: wanted {BYTES_NEEDED >> 10} KiB for a renewal, found {room.free >> 10} KiB"
    if room.inodes is not None and room.inodes < INODES_NEEDED:
        return f"{where}: wanted {INODES_NEEDED} inodes for a renewal, found {room.inodes}"
    return ""


def without_restart(node: Node, settings: Settings, items: Sequence[Item], now: datetime) -> list[Outcome]:
    """Outcomes of certificates whose components have to be restarted, and can't be; expired ones are none of them."""
    if settings.restart.method == "none":
        return []
    from bridge.control_plane import restarts  # noqa: PLC0415 (40 ms; only where components are restarted)

    reloads = control_plane.reloading(node, settings.node)
    users = control_plane.stale([item.spec for item in items], reloads, settings.restart.components)
    obstacles = {c: _no_way(e) for c in users if (e := restarts.obstacle(c, node, settings)) is not None}
    return [
        outcome_of(item, obstacles[component])
        for item in items
        if (component := item.spec.component) in obstacles
        and not (item.certificates and first_end(item.renewable) <= now)
        and component in control_plane.stale([item.spec], reloads, settings.restart.components)
    ]


def _no_way(error: BridgeError) -> NotReadyError:
    hint = f"{error.hint}; or `ca-bridge renew --no-restart` installs it, and says what to restart"
    text = f"not asked for, since its component could not be restarted: {error}"
    return NotReadyError(text, hint=hint, exit_code=Exit.USAGE)


def half_rotated(node: Node, kubeconfig_dir: Path) -> NotReadyError | None:
    """Find kubeconfigs that accept the API server's live certificate, and would refuse its next one."""
    serving = next((item.certificates for item in node.items if item.spec.name == "apiserver"), ())
    anchors = next((one.certificates for one in node.authorities if one.authority.name == "ca"), ())
    if not serving or not anchors or (len(anchors) == 1 and leads_to(serving, anchors)):
        return None
    new = anchors[0]  # kubeadm and our own checks take the first for the root
    behind = []
    for spec in (item.spec for item in node.items if item.spec.kubeconfig and item.state == "present"):
        trusted = _trusted(kubeconfig_dir / spec.base)
        if not any(_is_same(one, new) for one in trusted) and leads_to(serving, trusted):
            behind.append(str(kubeconfig_dir / spec.base))
    if not behind:
        return None
    ca = next(one.path for one in node.authorities if one.authority.name == "ca")
    return NotReadyError(
        f"wanted the first CA of {ca} in each kubeconfig, since it signs the new certificates; "
        f"found only the old one in {', '.join(behind)}",
        hint="have both CAs in certificate-authority-data of every kubeconfig, of all nodes and people, before the new "
        "one is the first in ca.crt (Kubernetes' “Manual Rotation of CA Certificates”); no CA was asked, and nothing was replaced",
    )


def _trusted(path: Path) -> list[x509.Certificate]:
    """The CAs that a kubeconfig trusts; empty: it names none, or they can't be read."""
    try:
        data = kubeconfig.parse(read(path) or b"").ca_data
        return load_pem_certificates(data) if data else []
    except (KubeconfigError, UnreadableError, ValueError):
        return []


def _is_same(one: x509.Certificate, other: x509.Certificate) -> bool:
    """Whether both are certificates of one CA, which may have been renewed for the same key."""
    try:
        return one.subject == other.subject and one.public_key() == other.public_key()
    except UNREADABLE:
        return False


# --- the node's own policy ---------------------------------------------------------------------------------------------


class NotAllowedError(BridgeError):
    """The node's own policy does not allow the next certificate; no CA was asked."""

    exit_code = Exit.REFUSED

    def __init__(self, item: Item, file: Path, problems: tuple[str, ...]) -> None:
        self.problems = problems
        key = f'"{item.spec.name}"' if "." in item.spec.name else item.spec.name
        hint = f"if it is meant, allow it in the policy ([allow] or [certificate.{key}])"
        if item.certificates:
            what = f"find out who put {item.certificate_path} there"
            hint = f"{what}, and put the right one back (an expired one will do); {hint}"
        super().__init__(
            f"this node's policy {file} does not allow the next certificate: {'; '.join(problems)}", hint=hint
        )


class Allowed:
    """
    A node's own allow-list: the policy that `[policy] file` names, in the form of a CA desk's; read when the first
    certificate is judged.

    A renewal takes over the names of the live certificate, so that an attacker who once put a certificate with more names
    in its place would have them renewed for ever. With a policy, such a certificate is not renewed, and no CA is asked for it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def policy(self) -> Policy:
        """The policy (SettingsError: the file can't be used)."""
        from bridge.desk.files import load_policy  # noqa: PLC0415 (100 ms; only where the settings name a policy)

        return load_policy(self._settings, self._settings.policy.file)

    def error(self, item: Item, desired: Desired | None) -> BridgeError | None:
        """The reason why the next certificate of this name must not be asked for; None: the policy allows it."""
        from bridge.desk.policy import Planned, planned_problems  # noqa: PLC0415 (see above)

        settings, live = self._settings, item.certificates[0] if item.certificates else None
        try:
            naming = desired.naming if desired is not None else serving_names(item, settings)
            planned = Planned(
                node=settings.node.node_name,
                cluster=settings.node.cluster,
                spec=item.spec,
                naming=naming or csr.naming_of(present(item, live)),
                key=next_key(item, live, settings, None, desired),
                validity=settings.renewal.validity,
                replaces=replaced_by_next(item, live),
            )
        except BridgeError as e:  # the renewal would fail for it, too
            return e
        problems = planned_problems(planned, self.policy)
        file = settings.policy.file
        return NotAllowedError(item, file, problems) if problems and file is not None else None
