"""
Further pairs of this node, as items of its inventory: what the settings demand of each, and why it can't be replaced; and
checks whether any pair is fit for use (`findings`, `key_finding`), which `doctor`, day 0 and backups share.

The settings say what a pair must be; the live certificate only proves continuity. Its files may belong to another user,
and their content decides nothing else. Its directories must not: a user who can rename files in them decides which file
root replaces.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from bridge.contract import Issued, SignRequest
from bridge.errors import BridgeError, Exit, VerificationError, Violation
from bridge.node import manifest_flags, manifests
from bridge.node.inventory import (
    AuthorityState,
    Item,
    Node,
    authority_state,
    file_item,
    other_key,
    read_certificates,
    troubles_of,
)
from bridge.node.manifest_flags import Mount
from bridge.node.manifests import TLS_CERTIFICATE, TLS_KEY, path_of
from bridge.node.yamltree import YamlError
from bridge.pki import csr, verify
from bridge.pki.certificates import (
    CN_OID,
    O_OID,
    UNREADABLE,
    attributes,
    extended_key_usages,
    has_key_of,
    is_ca,
    leads_to,
    san_entries,
    spki,
)
from bridge.pki.csr import Naming, names_of
from bridge.settings.pair_tables import MOST_OF_A_KEY, PairFiles, PairSettings, collisions
from bridge.settings.tables import NodeSettings
from bridge.specs import AUTHORITIES, EKU, SERVERS, CertificateSpec, Component
from bridge.system.files import Attributes
from bridge.system.paths import UnreadableError, exposure, foreign_link, read, real_path

#: `missing`: no key at all; `unreadable`: not PEM, or with a passphrase; `other`: another certificate's; `unusable`: an
#: algorithm that Kubernetes does not accept; `certificate`: the certificate itself is wrong; `incomparable`: the
#: certificate to compare with contains something that a CSR can't express.
Kind = Literal["missing", "unreadable", "other", "unusable", "certificate", "incomparable"]

_Files = TypeVar("_Files", bound=PairFiles)
_CERTIFICATE_MODE, _KEY_MODE = 0o644, 0o600


class PairPlaceError(BridgeError):
    """The files of a further pair can't be replaced at their paths."""

    exit_code = Exit.USAGE


def added(node: Node, settings: NodeSettings) -> Node:
    """The node with its further pairs after kubeadm's certificates."""
    named = [replace(pair, node=settings.node_name) for pair in settings.pairs]
    taken = _taken(node, settings, named)
    items = [
        _item(pair, _authority(node, settings, pair.authority), taken.get(pair.name) or _obstacle(pair))
        for pair in named
    ]
    return replace(node, items=(*node.items, *items), troubles=(*node.troubles, *troubles_of(items, ())))


def _authority(node: Node, settings: NodeSettings, name: str) -> AuthorityState:
    """The pair's CA; if a node of this role lacks it, it is read from kubeadm's path."""
    authority = AUTHORITIES[name]
    state = next((state for state in node.authorities if state.authority == authority), None)
    return state or authority_state(authority, settings.pki_dir / authority.certificate_file, None, listed=False)


def _item(pair: PairSettings, authority: AuthorityState, obstacle: BridgeError | None) -> Item:
    item = file_item(pair.spec, authority, pair.certificate_file, pair.key_file)
    item = replace(item, pair=pair, listed=False, obstacle=obstacle)
    if item.state != "present":
        return item
    if is_ca(item.certificates[0]):
        trouble = f"wanted a certificate of a server or client in {pair.certificate_file}, found a CA's"
        return replace(item, state="broken", trouble=trouble, certificates=())
    return replace(item, unlike=next(_unlike(item, pair, authority), None))


def _unlike(item: Item, pair: PairSettings, authority: AuthorityState) -> Iterator[str]:
    """All differences between a pair and its settings."""
    leaf = item.certificates[0]
    try:
        if not leads_to(item.certificates, authority.certificates) and authority.certificates:
            yield f"wanted a certificate of {pair.authority} in {item.certificate_path}, found another CA's"
        if not _is_named(leaf, pair.naming):
            yield f"wanted {pair.naming.text} as [certificate.{pair.name}] says, found other names"
        usages = extended_key_usages(leaf)
        if usages != frozenset({eku.value for eku in pair.spec.ekus}):
            wanted = ", ".join(eku.label for eku in EKU if eku in pair.spec.ekus)
            yield f"wanted {wanted} as [certificate.{pair.name}] says, found other usages"
    except UNREADABLE:
        yield "wanted names and usages that can be read, found others"
    for copy in pair.copies:
        if read_certificates(copy.certificate_file).certificates != item.certificates:
            yield f"wanted the same certificate in {copy.certificate_file}, found another or none"
    trusted = {*item.certificates[1:], *authority.certificates}
    for files in pair.places:
        if files.ca_file is not None and set(read_certificates(files.ca_file).certificates) != trusted:
            yield f"wanted what {authority.path} has in {files.ca_file}, found other certificates or none"


def _is_named(leaf: x509.Certificate, naming: Naming) -> bool:
    """Whether a certificate has these names; a CA may add subject parts (`allow_extra_subject`), but no CN or O."""
    identity_of = [part for part in attributes(leaf.subject) if part[0] in (CN_OID, O_OID)]
    return sorted(identity_of) == sorted(attributes(naming.subject)) and san_entries(leaf) == names_of(naming.sans)


def lost_copy(item: Item) -> str | None:
    """The problem of the key in one of a pair's copies; None: each matches the certificate, or can't be read."""
    for copy in item.pair.copies if item.pair is not None and item.certificates else ():
        try:
            data = read(copy.key_file)
        except UnreadableError:
            continue
        wanted = f"wanted the key of {item.certificate_path} in {copy.key_file}"
        if data is None:
            return f"{wanted}, found nothing"
        if has_key_of(data, item.certificates[0]) is False:
            return f"{wanted}, found another or none"
    return None


def proves_itself(item: Item) -> bool:
    """Whether the live certificate is an earlier one of this pair (CA, CN, key), and not one that the file's owner put there."""
    if item.pair is None or not item.certificates or item.key_trouble or other_key(item) is not None:
        return False
    try:
        wanted, found = attributes(item.pair.naming.subject), attributes(item.certificates[0].subject)
    except UNREADABLE:
        return False
    return wanted[-1] in found and leads_to(item.certificates, read_certificates(item.anchor_path).certificates)


# --- why a pair's files can't be replaced -----------------------------------------------------------------------------


def _taken(node: Node, settings: NodeSettings, pairs: Sequence[PairSettings]) -> dict[str, BridgeError]:
    """Pairs with a file that, by its real path, is kubeadm's, the kubelet's, ours or another pair's."""
    paths = [path for item in node.items for path in (item.certificate_path, item.key_path, item.current) if path]
    paths += [path for state in node.authorities for path in (state.path, state.path.with_suffix(".key"))]
    real = [replace(_real(pair), copies=tuple(map(_real, pair.copies))) for pair in pairs]
    return {
        name: PairPlaceError(f"wanted {wanted}, found {file}", hint=f"name other files in [certificate.{name}]")
        for name, wanted, file in collisions(real, list(map(real_path, (*paths, *settings.taken))))
    }


def _real(files: _Files) -> _Files:
    """The same files with their real paths."""
    ca_file = None if files.ca_file is None else real_path(files.ca_file)
    certificate_file, key_file = real_path(files.certificate_file), real_path(files.key_file)
    return replace(files, certificate_file=certificate_file, key_file=key_file, ca_file=ca_file)


def _obstacle(pair: PairSettings) -> BridgeError | None:
    try:
        return next(filter(None, map(_obstacle_at, pair.places)), None)
    except OSError as e:
        return PairPlaceError(f"{e.filename}: can't look at it: {e.strerror}")


def _obstacle_at(files: PairFiles) -> BridgeError | None:
    """Why root must not, or can't, write a pair's files at this place."""
    for _, path in files.paths():
        if not path.parent.is_dir():
            return PairPlaceError(f"there is no directory for {path}", hint=f"mkdir -p {path.parent}")
        trouble = foreign_link(path) or exposure(real_path(path).parent, new_files=True)
        if trouble is not None:
            wanted = f"wanted {path} in a directory that only root can change, found {trouble}"
            return PairPlaceError(wanted, hint=f"{trouble.hint}; the file itself may belong to another user (owner)")
    try:
        account(files.owner)
    except LookupError:
        return PairPlaceError(f"there is no user or group {files.owner}", hint="correct owner, or make it")
    return None


def account(owner: str) -> tuple[int, int]:
    """The uid and gid of `user` or `user:group` (LookupError: unknown); empty: our own."""
    if not owner:
        return os.geteuid(), os.getegid()
    user, _, group = owner.partition(":")
    entry = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    if not group:
        return entry.pw_uid, entry.pw_gid
    return entry.pw_uid, int(group) if group.isdigit() else grp.getgrnam(group).gr_gid


def attributes_for(files: PairFiles, path: Path) -> Attributes:
    """The owner and mode for a file at one place; attributes that the settings leave open stay."""
    is_secret = path == files.key_file
    mask = MOST_OF_A_KEY if is_secret else _CERTIFICATE_MODE
    try:
        now = Attributes.of(path).narrowed(mask)
    except OSError:
        now = replace(Attributes.private(), mode=_KEY_MODE if is_secret else _CERTIFICATE_MODE)
    uid, gid = account(files.owner) if files.owner else (now.uid, now.gid)
    mode = files.key_mode.bits if is_secret and files.key_mode is not None else now.mode
    kept = {name: value for name, value in now.extended.items() if not files.owner or "acl" not in name}
    return Attributes(mode=mode, uid=uid, gid=gid, extended=kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFinding:
    """One reason why a pair is not fit."""

    kind: Kind
    violation: Violation


def key_finding(certificate: x509.Certificate, key_pem: bytes | None) -> PairFinding | None:
    """The problem of a certificate's key (PEM, perhaps after certificates); None: it is the right key."""
    key = _key_or_finding(certificate, key_pem)
    return key if isinstance(key, PairFinding) else None


def _key_or_finding(certificate: x509.Certificate, key_pem: bytes | None) -> csr.PrivateKey | PairFinding:
    """Return the loaded key, or its problem; loading an RSA key takes as long as making one."""
    if key_pem is None:
        return _of_key("missing", "none")
    try:
        public = certificate.public_key()
        key = csr.load_key(key_pem, public)
        is_its_own = spki(key.public_key()) == spki(public)
    except UNREADABLE as e:
        return _of_key("unreadable", f"{type(e).__name__}: one that can't be read")
    if not is_its_own:
        return _of_key("other", "another certificate's")
    if not isinstance(key, csr.PrivateKey):
        return _of_key("unusable", f"a key that Kubernetes can't use ({type(key).__name__})")
    return key


def _of_key(kind: Kind, cause: str) -> PairFinding:
    return PairFinding(kind=kind, violation=Violation("key", want="the certificate's private key", got=cause))


def findings(
    spec: CertificateSpec,
    certificates: Sequence[x509.Certificate],
    key_pem: bytes | None,
    expected: verify.Expectation,
    like: x509.Certificate | None = None,
) -> Iterator[PairFinding]:
    """Check a pair as the answer to a new request, whatever its remaining validity."""
    leaf, *intermediates = certificates
    key = _key_or_finding(leaf, key_pem)
    if isinstance(key, PairFinding):
        yield key
        return
    try:
        request = SignRequest(spec=spec, csr_pem=csr.build(like or leaf, key), validity=timedelta())
        verify.check(Issued(leaf=leaf, intermediates=tuple(intermediates)), request, expected)
    except csr.CannotCarryError as e:
        violation = Violation("live certificate", want="one to compare it with", got=str(e))
        yield PairFinding(kind="incomparable", violation=violation)
    except VerificationError as e:
        for violation in e.violations:
            yield PairFinding(kind="certificate", violation=violation)


def is_sa_pair(key: bytes, public: bytes) -> bool:
    """Whether kube-apiserver can sign service-account tokens with the key and verify them with the public key."""
    try:
        there = load_pem_public_key(public)
        loaded = csr.load_key(key, there)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return isinstance(loaded, csr.PrivateKey) and spki(loaded.public_key()) == spki(there)


# --- the serving pair of kube-controller-manager or kube-scheduler ----------------------------------------------------
# The static pod's manifest names it, and so does the ClusterConfiguration from which `kubeadm upgrade` and `kubeadm join`
# write that manifest. A component does not start if its manifest names a missing file: the flags are added after the
# files, and removed before them.

#: The volume with the directory of a component's pair.
_VOLUME = "ca-bridge-serving"


def served_item(node: Node, component: Component) -> Item | None:
    """The component's serving certificate on this node, which may be missing."""
    spec = SERVERS.get(component)
    return None if spec is None else node.item(spec.name)


def manifest_with_pair(node: Node, component: Component, kubeconfig_dir: Path) -> bytes | None:
    """The manifest with flags for the pair on disk; None: the pair is unfit, or the manifest names one (ValueError)."""
    item = served_item(node, component)
    if item is None or item.named or item.state != "present" or item.foreign or item.key_trouble or other_key(item):
        return None
    return manifest_with(item, component, kubeconfig_dir)


def manifest_with(item: Item, component: Component, kubeconfig_dir: Path) -> bytes | None:
    """The manifest with the flags for a pair, even if the pair is missing; None: there is no manifest (ValueError)."""
    flags = {TLS_CERTIFICATE: str(item.certificate_path), TLS_KEY: str(item.key_path)}
    return _edited(component, kubeconfig_dir, flags, Mount(_VOLUME, str(item.certificate_path.parent)))


def manifest_without(component: Component, certificate: Path, kubeconfig_dir: Path) -> bytes | None:
    """The manifest without the flags for this pair; None: it does not name it (ValueError: it can't be edited)."""
    manifest = manifests.load(component, kubeconfig_dir)
    named = None if manifest is None else manifest.flags.get(TLS_CERTIFICATE)
    if named is None or os.path.realpath(named) != os.path.realpath(certificate):
        return None
    return _edited(component, kubeconfig_dir, dict.fromkeys((TLS_CERTIFICATE, TLS_KEY)))


def _edited(
    component: Component, kubeconfig_dir: Path, flags: Mapping[str, str | None], mount: Mount | None = None
) -> bytes | None:
    path, unmount = path_of(component, kubeconfig_dir), _VOLUME if mount is None else ""
    try:
        data = read(path)
        return None if data is None else manifest_flags.edited(data, component, flags, mount, unmount)
    except (UnreadableError, YamlError) as e:
        raise ValueError(f"{path}: can't change its flags: {e}") from None


# --- kubeadm's ClusterConfiguration ----------------------------------------------------------------------------------


def _flags(spec: CertificateSpec, pki_dir: Path) -> dict[str, str]:
    """A pair's paths in our own directory, by the names of a component's arguments."""
    places = {TLS_CERTIFICATE: f"{pki_dir / spec.base}.crt", TLS_KEY: f"{pki_dir / spec.base}.key"}
    return {flag.removeprefix("--"): place for flag, place in places.items()}


def is_named_by(cluster: Mapping[str, Any], component: Component) -> bool:
    """Whether kubeadm would write a manifest that names a serving pair."""
    return TLS_CERTIFICATE.removeprefix("--") in manifest_flags.arguments(cluster, component)


def is_ours_in(cluster: Mapping[str, Any], component: Component, pki_dir: Path) -> bool:
    """Whether the pair that kubeadm would name is at our own path."""
    return _flags(SERVERS[component], pki_dir).items() <= manifest_flags.arguments(cluster, component).items()


def cluster_with(cluster: Mapping[str, Any], component: Component, pki_dir: Path) -> Mapping[str, Any]:
    """The ClusterConfiguration with our own pair, unless an operator named another."""
    if is_named_by(cluster, component):
        return cluster
    spec = SERVERS[component]
    # kubeadm mounts pki_dir into kube-controller-manager
    mount = Mount(_VOLUME, str((pki_dir / spec.base).parent)) if component is Component.SCHEDULER else None
    return manifest_flags.with_arguments(cluster, component, _flags(spec, pki_dir), mount)


def cluster_without(cluster: Mapping[str, Any], component: Component, pki_dir: Path) -> Mapping[str, Any]:
    """The ClusterConfiguration without our own pair; another pair of an operator's stays."""
    if not is_ours_in(cluster, component, pki_dir):
        return cluster
    flags = dict.fromkeys(_flags(SERVERS[component], pki_dir))
    return manifest_flags.with_arguments(cluster, component, flags, unmount=_VOLUME)
