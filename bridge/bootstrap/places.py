"""Where the files of day 0 go, and which of a cluster's files exist already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from bridge.errors import BridgeError
from bridge.node import serving_pair
from bridge.node.kubeadm_config import ExternalEtcd, KubeadmConfig
from bridge.node.kubelet import KUBELET_DIR
from bridge.specs import AUTHORITIES, ETCD_CA, KUBELET_CONF, KUBELET_SERVER, SERVERS, SPECS, Authority, CertificateSpec
from bridge.system.paths import UnreadableError, read

#: init: the first control-plane node; control-plane: a further control-plane node; worker: any other node.
Role = Literal["init", "control-plane", "worker"]
ROLES: tuple[Role, ...] = get_args(Role)
#: Reads a file; None: there is no such file.
Read = Callable[[Path], bytes | None]

SUPER_ADMIN = "super-admin.conf"
ETCD_CLIENT = SPECS["apiserver-etcd-client"]
ETCD_DIRECTORY = Path("/var/lib/etcd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """kubeadm's directories and the kubelet's."""

    pki: Path
    kubeconfigs: Path
    kubelet: Path = KUBELET_DIR
    etcd: Path = ETCD_DIRECTORY
    external_etcd: ExternalEtcd | None = None  #: Whose CA and client pair are where kubeadm's configuration has them.
    servers: tuple[CertificateSpec, ...] = ()  #: Serving certificates that kubeadm's configuration has manifests name.

    @property
    def kubelet_pki(self) -> Path:
        """The directory of a kubelet's certificates."""
        return self.kubelet / "pki"

    @property
    def kubelet_current(self) -> Path:
        """The link to the kubelet's client certificate and key."""
        return self.kubelet_pki / "kubelet-client-current.pem"

    @property
    def serving(self) -> tuple[Path, Path]:
        """Key and certificate of the kubelet's own port; it makes a pair only if it can't read these."""
        return self.kubelet_pki / "kubelet.key", self.kubelet_pki / "kubelet.crt"

    @property
    def sa_key(self) -> Path:
        """The key that signs service account tokens, the same on all control-plane nodes."""
        return self.pki / "sa.key"

    @property
    def sa_public(self) -> Path:
        """The public key of `sa_key`."""
        return self.pki / "sa.pub"

    @property
    def kubeadm_config(self) -> Path:
        """The configuration for `kubeadm init`; on a further node it has the cluster's part."""
        return self.kubeconfigs / "kubeadm.yaml"

    @property
    def join_config(self) -> Path:
        """The configuration for `kubeadm join`."""
        return self.kubeconfigs / "join.yaml"

    def authority(self, authority: Authority) -> Path:
        """A CA's certificate."""
        if authority == ETCD_CA and self.external_etcd is not None and self.external_etcd.has_tls:
            return Path(self.external_etcd.ca_file)
        return self.pki / authority.certificate_file

    def pair(self, spec: CertificateSpec) -> tuple[Path, Path]:
        """Key and certificate file of a certificate outside kubeconfigs."""
        if spec == ETCD_CLIENT and self.external_etcd is not None and self.external_etcd.has_tls:
            return Path(self.external_etcd.key_file), Path(self.external_etcd.certificate_file)
        return self.pki / f"{spec.base}.key", self.pki / f"{spec.base}.crt"

    def directories(self, role: Role) -> list[Path]:
        """Directories that hold the files, parents first."""
        ours = [self.kubeconfigs, self.kubelet_pki]
        if role == "worker":
            return ours
        of_etcd = [path.parent for path in (self.authority(ETCD_CA), *self.pair(ETCD_CLIENT))]
        of_servers = [self.pair(spec)[0].parent for spec in self.servers]
        return list(dict.fromkeys([*ours, self.pki, *of_etcd, *of_servers]))

    def specs(self, role: Role) -> list[CertificateSpec]:
        """The certificates that a new node of this kind needs."""
        return specs_of(role, self.external_etcd, self.servers)

    def with_config(self, config: KubeadmConfig) -> Places:
        """The places with what kubeadm's configuration says of them."""
        return replace(self, external_etcd=config.external_etcd, servers=servers_of(config, self.pki))

    def authorities(self, role: Role) -> list[Authority]:
        """The CAs whose certificates it needs."""
        if role == "worker":
            return [AUTHORITIES["ca"]]
        has_etcds = self.external_etcd is None or self.external_etcd.has_tls
        return [one for one in AUTHORITIES.values() if has_etcds or one != ETCD_CA]

    @property
    def brought(self) -> list[CertificateSpec]:
        """An external etcd's client pair where both files are here already: it stays as it is, and is not asked for."""
        is_here = all(live(path) is not None for path in self.pair(ETCD_CLIENT))
        return [ETCD_CLIENT] if self.external_etcd is not None and self.external_etcd.has_tls and is_here else []


def servers_of(config: KubeadmConfig, pki: Path) -> tuple[CertificateSpec, ...]:
    """The components' serving certificates that kubeadm would have manifests name, without which they do not start."""
    return tuple(spec for component, spec in SERVERS.items() if serving_pair.is_ours_in(config.cluster, component, pki))


def specs_of(
    role: Role, external_etcd: ExternalEtcd | None = None, servers: Sequence[CertificateSpec] = ()
) -> list[CertificateSpec]:
    """The certificates that a new node of this kind needs; none that is etcd's own where etcd is elsewhere."""
    if role == "worker":
        return [SPECS[KUBELET_CONF], SPECS[KUBELET_SERVER]]
    ours = [one for one in SPECS.values() if role == "init" or one.name != SUPER_ADMIN]
    ours = [one for one in ours if not one.by_flag or one in servers]
    if external_etcd is None:
        return ours
    of_etcd = [ETCD_CLIENT] if external_etcd.has_tls else []
    return [one for one in ours if one.authority != ETCD_CA or one in of_etcd]


def live(path: Path) -> bytes | None:
    """Read a file on the node; None: it isn't there."""
    try:
        return read(path)
    except UnreadableError as e:
        raise BridgeError(f"{path}: wanted to read it, found: {e}") from None


def traces_of_cluster(places: Places) -> Iterator[Path]:
    """Files that show that a node is part of a cluster, or was: kubeadm or a kubelet has been at work."""
    manifests = places.kubeconfigs / "manifests"
    if manifests.is_dir():
        yield from sorted(manifests.glob("*.yaml"))
    for path in (places.etcd / "member", places.kubelet / "config.yaml", places.kubelet / "kubeadm-flags.env"):
        if path.exists():
            yield path


def ca_keys(places: Places) -> Iterator[Path]:
    """Private keys of CAs, which must be on no node."""
    for authority in AUTHORITIES.values():
        path = places.pki / authority.key_file
        if path.exists() or path.is_symlink():
            yield path
