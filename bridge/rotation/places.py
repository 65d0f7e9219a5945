"""The files that hold a CA under replacement on a node, what each phase writes there, and where former keys go."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

from cryptography import x509

from bridge.ca.registry import load_cross
from bridge.errors import BridgeError, Exit, SettingsError, SettingsProblem, converted
from bridge.node import ca_files, endpoints, kubeconfig
from bridge.node.ca_files import CaFile
from bridge.node.inventory import AuthorityState, Item, Node
from bridge.node.kubeconfig import KubeconfigError
from bridge.pki.certificates import anchor_of, load_pem_certificates, pem
from bridge.rotation import Bundle, Change, OtherCas, Phase, Seen, Standing, standing
from bridge.settings.tables import NodeSettings, Settings
from bridge.specs import AUTHORITIES, CA, SPECS, Component
from bridge.state import Store, backups, copies
from bridge.state.install import CERTIFICATE_MASK, KUBECONFIG_MASK, Replacement
from bridge.system.files import digest, reasons, sync_directory, write_atomically
from bridge.system.paths import UnreadableError, exposure, own_text, read, read_ca_file, real_path

#: Weeks with both CAs are normal; after this, the replacement was probably forgotten.
LONG = timedelta(days=90)


class UnreadableCaError(BridgeError):
    """A file with a CA, or with a certificate that it issued, can't be read."""

    exit_code = Exit.FAILED
    hint = "put a good copy of it back, then run again; nothing was replaced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """One CA of this node, and the CA that replaces it."""

    state: AuthorityState
    change: Change
    seen: Seen
    items: tuple[Item, ...]  #: The leaves of this CA on the node.
    confs: Mapping[str, bytes]  #: The kubeconfigs with CA data, by path.
    others: OtherCas  #: The other CAs of this node, whether they are replaced or not.
    #: Files other than the CA file from which components read this CA, and their certificates; no phase writes them.
    elsewhere: Mapping[CaFile, Bundle | UnreadableError]

    @property
    def name(self) -> str:
        """The authority's name."""
        return self.state.authority.name

    @property
    def standing(self) -> Standing:
        """The phase of the replacement on this node."""
        return standing(self.seen, self.change)

    @property
    def since(self) -> datetime:
        """When the CA file was last replaced; each phase replaces it, and nothing else does."""
        return datetime.fromtimestamp(self.state.path.stat().st_mtime, UTC)

    def is_late(self, now: datetime) -> bool:
        """Whether the replacement is stuck: half a phase, files of no phase, or both CAs for too long."""
        here = self.standing
        is_between = here.phase in (Phase.TRUSTED, Phase.ISSUED)
        return here.phase is None or here.next is not None or (is_between and now - self.since > LONG)

    def trust_files(self, phase: Phase) -> Iterator[Replacement]:
        """Yield the replacements that bring the CA file and the kubeconfigs' CA data to a phase."""
        bundle = self.change.bundle(phase)
        if self.seen.bundle != bundle:
            path, is_same = self.state.path, set(self.seen.bundle) == set(bundle)
            new, was = pem(*bundle), digest(read(path) or b"")
            yield Replacement(
                certificate=self.name, path=path, data=new, mode_mask=CERTIFICATE_MASK, was=was, says_the_same=is_same
            )
        names = {spec.base: spec.name for spec in SPECS.values() if spec.kubeconfig}
        for place, data in self.confs.items():
            if set(self.seen.kubeconfigs[place]) != set(bundle):
                path = Path(place)
                name, new = names[path.name], with_ca(path, data, self.change, bundle)
                yield Replacement(certificate=name, path=path, data=new, mode_mask=KUBECONFIG_MASK, was=digest(data))


def with_ca(path: Path, data: bytes, change: Change, bundle: Bundle) -> bytes:
    """Return a kubeconfig with this CA data in all the cluster's entries (KubeconfigError: its form allows no edit)."""
    try:
        return kubeconfig.with_cas(kubeconfig.with_ca(data, pem(*bundle)), copies.following(change.bundles, bundle))
    except KubeconfigError as e:
        raise e.of(path) from None


def assert_has_next(settings: Settings) -> None:
    """Check that the settings name a next CA (BridgeError)."""
    if not any(authority.next for authority in settings.authorities.values()):
        raise BridgeError(
            "the settings have no authority with a next CA",
            hint='[authority.ca.next] with anchor = "FILE" names it; `ca-bridge help replace-the-ca` has the rest',
        )


def look(settings: Settings, node: Node, names: Sequence[str]) -> dict[str, Replaced]:
    """Read these CAs, or all with a next one, from the files (UnreadableCaError; SettingsError: one has no next)."""
    ready = [name for name, keys in settings.authorities.items() if keys.next]
    want = 'a table with `anchor = "FILE"`, the new CA\'s certificate'
    if problems := [SettingsProblem(f"authority.{name}.next", want, "none") for name in names if name not in ready]:
        raise SettingsError(problems)
    states = {state.authority.name: state for state in node.authorities}
    return {name: _look(settings, node, state) for name, state in states.items() if name in (names or ready)}


def new_ca(settings: Settings, name: str) -> x509.Certificate:
    """Read an authority's next CA (SettingsError: its file is not ours; UnreadableCaError: it has not exactly one)."""
    path, what = Path(settings.authorities[name].next["anchor"]), f"the certificate of {name}'s next CA"
    text = own_text(path, what, "its owner has it; a copy that root alone can change will do")
    with converted(ValueError, UnreadableCaError, f"{path}: wanted {what}, found: "):
        certificates = load_pem_certificates(text.encode())
    if len(certificates) != 1:
        raise UnreadableCaError(
            f"{path}: wanted one certificate, of the CA that signs, found {len(certificates)}",
            hint="a CA above it would be trusted with all that it signs for others; leave it out",
        )
    return certificates[0]


def _look(settings: Settings, node: Node, state: AuthorityState) -> Replaced:
    if state.state != "present":
        raise UnreadableCaError(state.trouble or f"{state.path}: there is no CA certificate in it")
    name, new = state.authority.name, new_ca(settings, state.authority.name)
    certified = settings.authorities[name].next.get("cross")
    confs = dict(_confs(settings, node)) if state.authority == CA else {}
    held = {place: _ca_data(place, data) for place, data in confs.items()}
    held = {place: bundle for place, bundle in held.items() if bundle}
    items = tuple(i for i in node.items if i.spec.authority == state.authority and i.certificates and not i.foreign)
    here = [*state.certificates, *(ca for bundle in held.values() for ca in bundle)]
    old = next((ca for ca in here if ca != new), None) or _old_in_backups(Store(settings.node.state_dir), name, new)
    change = Change(old or new, new, load_cross(Path(certified)) if certified is not None else None)
    leaves = {item.spec.name: anchor_of(item.certificates, (change.old, new)) for item in items}
    seen = Seen(bundle=state.certificates, kubeconfigs=held, leaves=leaves)
    confs = {place: confs[place] for place in held}
    others, elsewhere = dict(_others(settings, node, name)), dict(_elsewhere(settings.node, node, state))
    return Replaced(state=state, change=change, seen=seen, items=items, confs=confs, others=others, elsewhere=elsewhere)


def _elsewhere(
    settings: NodeSettings, node: Node, state: AuthorityState
) -> Iterator[tuple[CaFile, Bundle | UnreadableError]]:
    real = os.path.realpath(state.path)
    for file in (*ca_files.of_components(node, settings), *ca_files.of_kubeconfigs(node, settings)):
        if file.authority == state.authority.name and os.path.realpath(file.path) != real:
            try:
                yield file, read_ca_file(file.path)
            except UnreadableError as e:
                yield file, e


def _others(settings: Settings, node: Node, name: str) -> Iterator[tuple[str, Bundle | BridgeError]]:
    here = {state.authority.name: state.certificates for state in node.authorities}
    for other in (known for known in AUTHORITIES if known != name):
        keys = settings.authorities.get(other)
        try:
            yield other, (*here.get(other, ()), *((new_ca(settings, other),) if keys is not None and keys.next else ()))
        except BridgeError as e:  # it stops the verbs, and no look at this CA
            yield other, e


def _confs(settings: Settings, node: Node) -> Iterator[tuple[str, bytes]]:
    for item in node.items:
        path = settings.node.kubeconfig_dir / item.spec.base
        if item.spec.kubeconfig and item.state != "missing":
            with reasons(UnreadableCaError, f"{path}: can't read it"):
                yield str(path), read(path) or b""


def _ca_data(place: str, data: bytes) -> Bundle:
    """Return the CA data of a kubeconfig; empty: it names a file, or relies on the system's CAs."""
    prefix = f"{place}: wanted its certificate-authority-data, found: "
    with converted((KubeconfigError, ValueError), UnreadableCaError, prefix):
        ca_pem = kubeconfig.parse(data).ca_data
        return tuple(load_pem_certificates(ca_pem)) if ca_pem else ()


def _old_in_backups(store: Store, authority: str, new: x509.Certificate) -> x509.Certificate | None:
    """Return the CA that a finished replacement removed, from the newest backup with it; None: no backup has it."""
    every = (ca for backup in backups.read_all(store)[0] for ca in backups.cas_of(backup, authority))
    return next((ca for ca in every if ca != new), None)


class KeyLeftError(BridgeError):
    """The key of a CA that no longer signs is still where kubeadm put it."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE
    hint = "the same command with another --keys-to takes it away; until `drop` is done on every node, it can sign for any user"


def signing_flags(node: Node, ca: Replaced) -> list[str]:
    """Return the flags by which the controller manager signs with this CA's file, which may not hold two CAs then."""
    if ca.state.authority != CA:
        return []
    wanted = os.path.realpath(ca.state.path)
    signing_files = endpoints.signing_files(node.flags(Component.CONTROLLER_MANAGER))
    return [flag for flag, path in signing_files.items() if os.path.realpath(path) == wanted]


def key_place(node: NodeSettings, ca: Replaced) -> Path:
    """Return the path of a CA's key in kubeadm's layout."""
    return node.pki_dir / ca.state.authority.key_file


def assert_takes_keys(directory: Path, node: NodeSettings) -> None:
    """Check that a directory is fit for keys that nothing on this node should read again (SettingsError)."""
    found = ""
    try:
        if not directory.is_absolute() or not stat.S_ISDIR(directory.stat().st_mode):
            found = f"{directory}, which is no such directory"
        elif directory.stat().st_mode & 0o077:
            found = f"{directory}, which others may look into (chmod 700)"
        elif (open_to := exposure(directory)) is not None:
            found = f"{open_to.path}: {open_to.found}"
    except OSError as e:
        found = f"{directory}: {e.strerror}"
    real, keys = real_path(directory), [node.pki_dir / authority.key_file for authority in AUTHORITIES.values()]
    own_directories = (node.pki_dir, node.kubeconfig_dir, node.state_dir, *(key.parent for key in keys))
    if inside := [own for own in own_directories if any(_is_same(own, above) for above in (real, *real.parents))]:
        found = f"{directory}, which is {inside[0]} or below it, perhaps by another mount"
    if found:
        wanted = "an absolute path of a directory for its owner alone, outside kubeadm's and our own"
        raise SettingsError([SettingsProblem("--keys-to", wanted, found)])


def _is_same(first: Path, second: Path) -> bool:
    """Whether two paths lead to one file or directory, whatever the names and mounts on the way."""
    return first.exists() and second.exists() and first.samefile(second)


def take_keys_away(cas: Sequence[Replaced], node: NodeSettings, directory: Path) -> Iterator[str | KeyLeftError]:
    """Move each CA's key into a directory; yield sentences, and errors, after which a repeat continues."""
    for ca in cas:
        place, target = key_place(node, ca), directory / f"{ca.name}.key"
        try:
            data, there = read(place), read(target)
            if data is None:
                continue
            if there not in (None, data):
                yield KeyLeftError(f"{place}: wanted it away from this node, found another key in {target}")
                continue
            both = list(dict.fromkeys([real_path(place), place]))  # a link, and the key behind it
            write_atomically(target, data)
            kept = target.lstat()
            to_remove = [path for path in both if not os.path.samestat(path.lstat(), kept)]
            if read(target) != data or place not in to_remove:
                yield KeyLeftError(f"{place}: wanted a copy of it in another file, found the same file in {target}")
                continue
            for path in to_remove:
                path.unlink(missing_ok=True)  # behind a linked directory both names are one file
                sync_directory(path.parent)
        except (OSError, UnreadableError) as e:
            yield KeyLeftError(f"{place}: wanted it away from this node, found: {e}")
        else:
            yield f"{ca.name}: its former key is {target} now, and no longer {place}: take it off this node"
