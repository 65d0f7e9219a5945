"""The node's certificates, CAs and manifests, read from files alone; a broken file is reported, and reading goes on."""

from __future__ import annotations

import os
import shlex
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cryptography import x509

from bridge.errors import BridgeError
from bridge.node import manifests
from bridge.node.kubeconfig import Kubeconfig, KubeconfigError
from bridge.node.kubeconfig import parse as parse_kubeconfig
from bridge.node.kubelet import KUBELET_DIR, KubeletFiles
from bridge.node.manifests import TLS_CERTIFICATE, TLS_KEY, Manifest
from bridge.pki.certificates import anchor_of, has_key_of, is_ca, leads_to, load_pem_certificates
from bridge.settings.pair_tables import PairSettings
from bridge.specs import (
    AUTHORITIES,
    CA,
    ETCD_CA,
    FRONT_PROXY_CA,
    KUBELET_CONF,
    KUBELET_SERVER,
    SPECS,
    Authority,
    CertificateSpec,
    Component,
)
from bridge.system.paths import UnreadableError, kind
from bridge.system.paths import read as read_file

FileState = Literal["present", "missing", "broken", "unreadable"]
KeyState = Literal["local", "external", "missing"]

_ETCD_CLIENT = SPECS["apiserver-etcd-client"]
_KUBELET = SPECS[KUBELET_CONF]
#: Kubeconfigs of administrators, which a worker may have in addition to its kubelet's.
_PEOPLES = ("admin.conf", "super-admin.conf")

#: etcd host: a static pod of etcd with its certificates, and nothing else of a control plane (kubeadm's "Set up a High
#: Availability etcd Cluster").
Role = Literal["control plane", "worker", "etcd host"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One leaf certificate that the node has, or should have."""

    spec: CertificateSpec
    authority_external: bool  #: Its CA's certificate is here, but not its key.
    certificate_path: Path  #: The file that holds it: .crt, kubeconfig, or the kubeconfig's reference.
    key_path: Path | None  #: None: embedded in the kubeconfig. Not opened, and may not exist.
    embedded: bool  #: Certificate and key are embedded in a kubeconfig.
    anchor_path: Path  #: The file with its CA.
    certificates: tuple[x509.Certificate, ...]  #: As in the file, the leaf first; empty unless present.
    state: FileState
    trouble: str | None  #: "wanted …, found …" when broken or unreadable.
    managed: bool  #: `renew` may replace it; else a kubelet rotates it, or its CA is unknown here.
    listed: bool  #: kubeadm has a row for it.
    rotates: bool = False  #: The kubelet renews it by itself, if a signer in the cluster answers.
    #: The symlink to a kubelet's dated pair, which a new pair replaces; for an embedded pair it leads to the copy.
    current: Path | None = None
    #: The kubelet's copy of an embedded certificate; its end counts, too.
    copy: tuple[x509.Certificate, ...] = ()
    anchor: x509.Certificate | None = None  #: The CA in its CA file that its chain leads to.
    is_anchor_first: bool = True  #: The anchor is the file's first CA, which signs new certificates.
    key_trouble: str | None = None  #: "wanted …, found …" if its key is missing, empty or another certificate's.
    foreign: bool = False  #: No CA of the cluster signed it: the kubelet made it, or it is another cluster's.
    named: bool = True  #: False: a pair of `SERVERS` that its component's manifest does not name (yet).
    obstacle: BridgeError | None = None  #: Why its files can't be replaced, although they can be read and used.
    pair: PairSettings | None = None  #: The settings of a further pair; None: a certificate of kubeadm's.
    #: "wanted …, found …" if a further pair differs from its settings; its renewal will follow them.
    unlike: str | None = None

    @property
    def in_one_file(self) -> bool:
        """Certificate and key are PEM blocks of one file, which kubelets and many load balancers use."""
        may_be = self.spec.component is Component.KUBELET or self.pair is not None
        return may_be and self.key_path is not None and _real(self.key_path) == _real(self.certificate_path)

    @property
    def ending(self) -> tuple[x509.Certificate, ...]:
        """The certificates of which none may end: its own, its intermediates, a kubelet's copy, and its CA."""
        return (*self.certificates, *self.copy, *([self.anchor] if self.anchor is not None else []))

    @property
    def renewable(self) -> tuple[x509.Certificate, ...]:
        """Those of `ending` that a renewal replaces, including the CA unless it is the file's first."""
        return (*self.certificates, *self.copy) if self.is_anchor_first else self.ending


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorityState:
    """One CA, as far as the node has its files."""

    authority: Authority
    path: Path
    certificates: tuple[x509.Certificate, ...]  #: All CAs in the file; kubeadm takes the first as the root.
    key: KeyState
    state: FileState
    trouble: str | None  #: Like `Item.trouble`.
    listed: bool  #: kubeadm has a row for it.


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The state of the node's files."""

    items: tuple[Item, ...]  #: In the order of `SPECS`.
    authorities: tuple[AuthorityState, ...]  #: In the order of `AUTHORITIES`.
    manifests: Mapping[Component, Manifest]
    local_etcd: bool
    role: Role = "control plane"
    troubles: tuple[str, ...]  #: One line for each existing file that can't be used.

    @property
    def bundles(self) -> dict[str, tuple[x509.Certificate, ...]]:
        """The CAs in each CA file, by authority."""
        return {authority.authority.name: authority.certificates for authority in self.authorities}

    @property
    def is_worker(self) -> bool:
        """Whether it has a kubelet, but nothing of a control plane."""
        return self.role == "worker"

    @property
    def is_etcd_host(self) -> bool:
        """Whether it has etcd, but nothing else of a control plane."""
        return self.role == "etcd host"

    def spec(self, name: str) -> CertificateSpec:
        """A certificate's spec on this node: on an etcd host no process reads the API servers' client certificate."""
        item = self.item(name)
        return SPECS[name] if item is None else item.spec

    def item(self, name: str) -> Item | None:
        """A certificate by name, in whatever state; None: nodes of this role do not have it."""
        return next((item for item in self.items if item.spec.name == name), None)

    def flags(self, component: Component) -> Mapping[str, str]:
        """The flags in a component's manifest; empty without a manifest."""
        manifest = self.manifests.get(component)
        return {} if manifest is None else manifest.flags

    def live(self, name: str) -> x509.Certificate | None:
        """The installed certificate; None: it is missing or can't be read."""
        return next((item.certificates[0] for item in self.items if item.spec.name == name and item.certificates), None)

    @property
    def is_here(self) -> bool:
        """Whether the node has any of these files."""
        states = [item.state for item in self.items if item.pair is None]
        states += [authority.state for authority in self.authorities]
        return bool(self.manifests) or any(state != "missing" for state in states)

    @property
    def kubernetes_version(self) -> tuple[int, int] | None:
        """The API server's version, by its image's tag."""
        apiserver = self.manifests.get(Component.APISERVER)
        return None if apiserver is None else apiserver.version


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The result of reading a file that should hold certificates."""

    state: FileState
    certificates: tuple[x509.Certificate, ...] = ()
    trouble: str | None = None
    obstacle: BridgeError | None = None
    has_key: bool | None = None  #: The file also has the certificate's key; None: the key can't be read.


class NoNodeError(BridgeError):
    """No file of a node exists."""

    hint = "run it on a node of the cluster; --pki-dir and --kubeconfig-dir tell where its files are"

    def __init__(self, pki_dir: Path) -> None:
        wanted = f"wanted kubeadm's certificates in {pki_dir}, or a worker's kubelet.conf"
        super().__init__(f"no control plane here: {wanted}, found none")


def read(pki_dir: Path, kubeconfig_dir: Path, kubelet_dir: Path = KUBELET_DIR) -> Node:
    """Read a node; a problem with its files is no error."""
    kubelet = KubeletFiles.load(kubelet_dir)
    found, troubles = _manifests(kubeconfig_dir)
    if kubelet.trouble is not None:
        troubles.append(f"kubelet: {kubelet.trouble}")
    role = _role(pki_dir, kubeconfig_dir, has_manifests=bool(found))
    local_etcd = role != "worker" and _has_local_etcd(found, pki_dir, kubeconfig_dir)
    apiserver_flags = found[Component.APISERVER].flags if Component.APISERVER in found else {}
    authorities = _authorities(role, pki_dir, apiserver_flags, local_etcd=local_etcd)
    by_name = {state.authority.name: state for state in authorities}
    items: list[Item] = []
    for spec in _specs(role, kubeconfig_dir):
        authority = by_name.get(spec.authority.name)
        if authority is None:
            continue
        if spec.kubelets:
            items += _serving_items(authority, kubelet)
        elif spec.by_flag:
            items += _component_server(spec, authority, pki_dir, found, items)
        elif spec.kubeconfig:
            items.append(_kubeconfig_item(spec, authority, kubeconfig_dir / spec.base, kubelet))
        elif spec.authority != ETCD_CA or local_etcd:
            items.append(file_item(spec, authority, pki_dir / f"{spec.base}.crt", pki_dir / f"{spec.base}.key"))
        elif spec == _ETCD_CLIENT:
            items.append(_external_etcd_client(authority, apiserver_flags))
    return Node(
        items=_with_shared_files(items),
        authorities=authorities,
        manifests=found,
        local_etcd=local_etcd,
        role=role,
        troubles=(*_no_directory(pki_dir), *troubles_of(items, authorities), *troubles),
    )


def _specs(role: Role, kubeconfig_dir: Path) -> list[CertificateSpec]:
    """The certificates that nodes of a role may have, as specified for this node."""
    if role == "worker":
        people = [name for name in _PEOPLES if _exists(kubeconfig_dir / SPECS[name].base)]
        return [SPECS[name] for name in (*people, KUBELET_CONF, KUBELET_SERVER)]
    if role == "control plane":
        return list(SPECS.values())
    # the API servers' client certificate is here to be copied, and no process reads it
    copied = replace(_ETCD_CLIENT, component=None, flags=(), optional=True)
    return [copied if spec == _ETCD_CLIENT else spec for spec in SPECS.values()]


def troubles_of(items: Sequence[Item], authorities: Sequence[AuthorityState]) -> Iterator[str]:
    """A line for each problem; the kubelet's client certificate comes first, since a rebooted node needs it."""
    for item in sorted(items, key=lambda item: item.spec != _KUBELET):
        if trouble := item.trouble or item.key_trouble:
            yield f"{item.spec.name}: {trouble}"
    for state in authorities:
        if state.trouble:
            yield f"{state.authority.name}: {state.trouble}"


def _role(pki_dir: Path, kubeconfig_dir: Path, *, has_manifests: bool) -> Role:
    """The role by the files that exist; a worker may have an administrator's kubeconfig, but no file of a control plane."""

    def any_of(specs: Iterable[CertificateSpec], components: Iterable[Component], *more: Path) -> bool:
        paths = [manifests.path_of(component, kubeconfig_dir) for component in components]
        for spec in specs:
            if spec.kubeconfig:
                paths.append(kubeconfig_dir / spec.base)
            elif spec.of_kubeadm:
                paths += [pki_dir / f"{spec.base}.{suffix}" for suffix in ("crt", "key")]
        return any(map(_exists, (*paths, *more)))

    planes = [spec for spec in SPECS.values() if spec != _KUBELET and spec.name not in _PEOPLES]
    is_kubelet = _exists(kubeconfig_dir / _KUBELET.base)
    if is_kubelet and not has_manifests and not any_of(planes, manifests.COMPONENTS):
        return "worker"
    etcds = [spec for spec in SPECS.values() if spec.authority == ETCD_CA and spec != _ETCD_CLIENT]
    others = [spec for spec in SPECS.values() if spec.authority != ETCD_CA]
    components = [component for component in manifests.COMPONENTS if component is not Component.ETCD]
    keys = [pki_dir / f"{base}.{suffix}" for base in (CA.base, FRONT_PROXY_CA.base) for suffix in ("crt", "key")]
    is_etcd = any_of(etcds, [Component.ETCD]) and not any_of(others, components, pki_dir / "sa.key", *keys)
    return "etcd host" if is_etcd else "control plane"


def _with_shared_files(items: Sequence[Item]) -> tuple[Item, ...]:
    """Mark certificates that share a file: renewing one of them would overwrite the other."""
    users: dict[str, list[str]] = defaultdict(list)
    for item in items:
        if item.managed and item.state == "present":
            for path in (item.certificate_path, None if item.in_one_file else item.key_path):
                if path is not None:
                    users[_real(path)].append(item.spec.name)
    obstacles: dict[str, BridgeError] = {}
    for file, names in users.items():
        for name in names if len(names) > 1 else ():
            others = ", ".join(other for other in dict.fromkeys(names) if other != name)
            wanted, found = ("a file of its own", f"the same as {others}'s") if others else ("two files", "one")
            hint = "give each a file of its own (a copy instead of a symlink), and name that in the component's configuration"
            obstacles[name] = BridgeError(f"wanted {wanted} for certificate and key, found {found}: {file}", hint=hint)
    return tuple(replace(item, obstacle=obstacles.get(item.spec.name, item.obstacle)) for item in items)


def _real(path: Path) -> str:
    try:
        return os.path.realpath(path)  # unlike `Path.resolve` it does not fail at a loop of symlinks
    except ValueError:  # a NUL in a flag
        return str(path)


def _no_directory(pki_dir: Path) -> tuple[str, ...]:
    """A line about a wrong path, which a probe must not mistake for a node without certificates."""
    try:
        found = pki_dir.is_dir()
    except OSError:  # the error of each file in it says why
        found = True
    return () if found else (f"{pki_dir}: there is no such directory of kubeadm's certificates",)


def _manifests(kubeconfig_dir: Path) -> tuple[dict[Component, Manifest], list[str]]:
    found, troubles = {}, []
    for component in manifests.COMPONENTS:
        try:
            manifest = manifests.load(component, kubeconfig_dir)
        except ValueError as e:
            troubles.append(f"{component.value}: {e}")
        else:
            if manifest is not None:
                found[component] = manifest
    return found, troubles


def _has_local_etcd(by_component: Mapping[Component, Manifest], pki_dir: Path, kubeconfig_dir: Path) -> bool:
    """Whether etcd runs on this node; without an API server's manifest it counts as local, as for kubeadm."""
    traces = [pki_dir / f"{SPECS[name].base}.crt" for name in ("etcd-server", "etcd-peer")]
    traces.append(manifests.path_of(Component.ETCD, kubeconfig_dir))
    return Component.APISERVER not in by_component or any(map(_exists, traces))


def _exists(path: Path) -> bool:
    """Whether a path exists by Go's `!os.IsNotExist(err)`: a dangling symlink does not, an inaccessible file does."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _authorities(
    role: Role, pki_dir: Path, apiserver_flags: Mapping[str, str], *, local_etcd: bool
) -> tuple[AuthorityState, ...]:
    """The node's CAs, including an external etcd's if the API server uses TLS with it."""
    states = []
    for authority in {"worker": (CA,), "etcd host": (ETCD_CA,)}.get(role, tuple(AUTHORITIES.values())):
        if authority != ETCD_CA or local_etcd:
            path, key = pki_dir / authority.certificate_file, pki_dir / authority.key_file
            states.append(authority_state(authority, path, key, listed=True))
        elif "--etcd-certfile" in apiserver_flags:
            path = Path("/", apiserver_flags.get("--etcd-cafile", ""))  # kubeadm mounts it there; containers start in /
            states.append(authority_state(authority, path, None, listed=False))
    return tuple(states)


def authority_state(authority: Authority, path: Path, key_path: Path | None, *, listed: bool) -> AuthorityState:
    """Read one CA: its certificates, and whether its key is here."""
    found = read_certificates(path)
    state, trouble = found.state, found.trouble
    if found.certificates and not is_ca(found.certificates[0]):
        state, trouble = "broken", f"wanted a CA certificate in {path}, found one that is not a CA"
    return AuthorityState(
        authority=authority,
        path=path,
        certificates=found.certificates,
        key="local" if key_path and _exists(key_path) else "external" if found.certificates else "missing",
        state=state,
        trouble=trouble,
        listed=listed,
    )


def read_certificates(path: Path) -> _Found:
    """Read a file of certificates, which may also have their key; a problem with it is no error."""
    try:
        data = read_file(path)
        if data is None:
            return _Found(state="missing")
        certificates = tuple(load_pem_certificates(data))
        return _Found(state="present", certificates=certificates, has_key=has_key_of(data, certificates[0]))
    except UnreadableError as e:
        return _Found(state="unreadable", trouble=f"wanted a certificate in {path}, found: {e}")
    except ValueError as e:
        return _Found(state="broken", trouble=f"wanted a certificate in {path}, found {e}")


def file_item(spec: CertificateSpec, authority: AuthorityState, certificate_path: Path, key_path: Path) -> Item:
    """The item of a certificate and key in separate files."""
    return _item(spec, authority, read_certificates(certificate_path), certificate_path, key_path)


def _external_etcd_client(authority: AuthorityState, apiserver_flags: Mapping[str, str]) -> Item:
    """The API server's client certificate for an external etcd; kubeadm neither lists nor renews it."""
    path = Path("/", apiserver_flags["--etcd-certfile"])
    key_path = Path("/", apiserver_flags.get("--etcd-keyfile", ""))
    managed = authority.state == "present" and "--etcd-keyfile" in apiserver_flags
    return _item(_ETCD_CLIENT, authority, read_certificates(path), path, key_path, managed=managed, listed=False)


def _kubeconfig_item(spec: CertificateSpec, authority: AuthorityState, path: Path, kubelet: KubeletFiles) -> Item:
    try:
        data = read_file(path)
        parsed = None if data is None else parse_kubeconfig(data)
    except UnreadableError as e:
        found = _Found(state="unreadable", trouble=f"wanted the kubeconfig {path}, found: {e}")
    except KubeconfigError as e:
        found = _Found(state="broken", trouble=f"{path}: {e}")
    else:
        if parsed is None:
            item = _item(spec, authority, _Found(state="missing"), path, None, listed=spec.listed)
            is_kept = spec == _KUBELET and kubelet.directory.is_dir()
            return replace(item, current=kubelet.client) if is_kept else item
        if parsed.certificate_data is None and parsed.certificate_file and parsed.key_file and not parsed.key_present:
            item = _referring_item(spec, authority, path, parsed.certificate_file, parsed.key_file)
            return _rotating(item, kubelet.rotates) if spec == _KUBELET else item
        found = _embedded(path, parsed)
    item = _item(spec, authority, found, path, None, listed=spec.listed)
    if spec != _KUBELET or not kubelet.directory.is_dir():
        return item
    # a new pair is written where the kubelet keeps its own; the earlier end of the two counts
    return replace(item, current=kubelet.client, copy=read_certificates(kubelet.client).certificates[:1])


def _rotating(item: Item, rotates: bool | None) -> Item:
    """The item of a dated file behind a symlink: the kubelet's form, but not every kubelet rotates it."""
    is_link = item.in_one_file and item.certificate_path.name.endswith("-current.pem")
    return replace(
        item,
        rotates=rotates is not False,
        managed=rotates is False or item.managed,
        current=item.certificate_path if is_link else None,
    )


def _serving_items(authority: AuthorityState, kubelet: KubeletFiles) -> list[Item]:
    """The kubelet's serving certificate, empty before its first start; managed by us if no signer can answer."""
    found = read_certificates(kubelet.certificate)
    if found.state == "missing" and kubelet.serving != "named":
        return []
    is_asked = kubelet.serving == "asked"
    managed, spec = not is_asked or authority.key == "external", SPECS[KUBELET_SERVER]
    item = _item(spec, authority, found, kubelet.certificate, kubelet.key, managed=managed, listed=False)
    return [_or_foreign(_rotating(item, rotates=True) if is_asked else item, authority)]


def _or_foreign(item: Item, authority: AuthorityState) -> Item:
    """The item, marked as foreign if no CA of the cluster signed it."""
    is_ours = not item.certificates or (
        leads_to(item.certificates, authority.certificates)
        if authority.certificates
        else item.certificates[-1].issuer != item.certificates[-1].subject  # a kubelet appends its own CA
    )
    return item if is_ours else replace(item, foreign=True, key_trouble=None)


def _component_server(
    spec: CertificateSpec,
    authority: AuthorityState,
    pki_dir: Path,
    by_component: Mapping[Component, Manifest],
    others: Sequence[Item],
) -> list[Item]:
    """A component's serving certificate, at the path in its manifest or else at our own; None if the file is another pair's."""
    manifest = None if spec.component is None else by_component.get(spec.component)
    if manifest is None:
        return []
    path, key_path, trouble = pki_dir / f"{spec.base}.crt", pki_dir / f"{spec.base}.key", None
    is_named = TLS_CERTIFICATE in manifest.flags
    spec = replace(spec, optional=not is_named, reloaded=is_named)  # otherwise a restart adds its flags
    if is_named:
        path = Path("/", manifest.flags[TLS_CERTIFICATE])
        key_path = Path("/", manifest.flags.get(TLS_KEY, ""))
        if TLS_KEY not in manifest.flags:
            trouble = f"the manifest has {TLS_CERTIFICATE}, and no {TLS_KEY}"
    if _real(path) in {_real(path) for item in others for path in (item.certificate_path, item.key_path) if path}:
        return []
    files = read_certificates(path) if trouble is None else _Found(state="broken", trouble=trouble)
    item = _item(spec, authority, files, path, key_path, listed=False)
    return [replace(_or_foreign(item, authority), named=is_named)]


def _embedded(path: Path, parsed: Kubeconfig) -> _Found:
    """The certificate that a kubeconfig embeds, with its key."""
    where = f"for user {parsed.user!r} of {path}"
    if parsed.certificate_data is None and not parsed.certificate_file:
        return _Found(state="broken", trouble=f"there is no client certificate {where}")
    if parsed.certificate_data is None or not parsed.key_present:
        certificate = "certificate data" if parsed.certificate_data else "a certificate file"
        key = "key data" if parsed.key_present else "a key file" if parsed.key_file else "no key"
        wanted = f"wanted certificate and key both as data or both as files {where}"
        return _Found(state="broken", trouble=f"{wanted}, found {certificate} and {key}")
    try:
        certificates = tuple(load_pem_certificates(parsed.certificate_data))
    except ValueError as e:
        return _Found(state="broken", trouble=f"wanted a client certificate {where}, found {e}")
    obstacle = KubeconfigError(parsed.not_editable).of(path) if parsed.not_editable is not None else None
    return _Found(state="present", certificates=certificates, obstacle=obstacle, has_key=parsed.key_fits)


def _referring_item(
    spec: CertificateSpec, authority: AuthorityState, path: Path, certificate_file: str, key_file: str
) -> Item:
    """The item of a kubeconfig that refers to files; we renew even a kubelet's if the CA's key is elsewhere."""
    certificate_path, key_path = path.parent / certificate_file, path.parent / key_file
    found = read_certificates(certificate_path)
    if found.state == "missing":
        trouble = f"there is no certificate {certificate_path}, to which {path} refers"
        found = _Found(state="broken", trouble=trouble + (_older(certificate_path) if spec == _KUBELET else ""))
    managed = spec != _KUBELET or authority.key == "external"
    return _item(spec, authority, found, certificate_path, key_path, managed=managed, listed=spec.listed)


def _older(current: Path) -> str:
    """A hint with the command that restores a kubelet's lost symlink; empty: no older certificate exists."""
    dated = f"kubelet-client-{'-'.join(['[0-9]' * 4, *['[0-9][0-9]'] * 5])}.pem"
    found = max((path.name for path in current.parent.glob(dated)), default="")
    if not found or current.name != "kubelet-client-current.pem":
        return ""
    back = shlex.join(["ln", "-sfn", str(current.with_name(found)), str(current)])
    return f"; an older one is beside it: `{back}`, then renew it"


def _item(
    spec: CertificateSpec,
    authority: AuthorityState,
    files: _Found,
    certificate_path: Path,
    key_path: Path | None,
    *,
    managed: bool = True,
    listed: bool = True,
) -> Item:
    anchor = anchor_of(files.certificates, authority.certificates) if files.certificates else None
    return Item(
        spec=spec,
        authority_external=authority.key == "external",
        certificate_path=certificate_path,
        key_path=key_path,
        embedded=key_path is None,
        anchor_path=authority.path,
        certificates=files.certificates,
        state=files.state,
        trouble=files.trouble,
        managed=managed,
        listed=listed,
        obstacle=files.obstacle,
        anchor=anchor,
        is_anchor_first=anchor in (None, *authority.certificates[:1]),
        key_trouble=_key_trouble(files, certificate_path, key_path) if files.certificates else None,
    )


def _key_trouble(files: _Found, certificate_path: Path, key_path: Path | None) -> str | None:
    """The problem of a certificate's key; a file with only the key is not opened, see `other_key`."""
    wanted = f"wanted the key of {certificate_path}"
    if key_path is None or _real(key_path) == _real(certificate_path):
        return f"{wanted} in it, found none or another certificate's" if files.has_key is False else None
    try:
        status = key_path.stat()
    except FileNotFoundError:
        return f"{wanted} in {key_path}, found nothing"
    except (OSError, ValueError):  # not readable by us, or no path
        return None
    if not stat.S_ISREG(status.st_mode):
        return f"{wanted} in {key_path}, found {kind(status.st_mode)}"
    return None if status.st_size else f"{wanted} in {key_path}, found an empty file"


def other_key(item: Item) -> str | None:
    """The problem of the key in an item's key file; None: it matches the certificate, or can't be read."""
    if item.key_path is None or not item.certificates or item.in_one_file:
        return None
    try:
        fits = has_key_of(read_file(item.key_path) or b"", item.certificates[0])
    except UnreadableError:
        return None
    return f"wanted the key of {item.certificate_path} in {item.key_path}, found another" if fits is False else None
