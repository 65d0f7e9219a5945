"""
Day 0: everything that a new node needs before `kubeadm init` or `kubeadm join`, signed by an external CA.

This module has what the others share: the paths of a new node's files, and which of them exist; CA certificates, never
a CA's key; and kubeadm's configuration, made here, and checked for errors that kubeadm would find too late.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from cryptography import x509

from bridge.ca import registry, signer_of
from bridge.errors import BridgeError, Exit
from bridge.node import kubeadm_config, pairs
from bridge.node.kubeadm_config import ExternalEtcd, KubeadmConfig, KubeadmConfigError, is_address
from bridge.node.kubelet import KUBELET_DIR
from bridge.pki.certificates import UNREADABLE, fingerprint, is_ca, name_text, spki
from bridge.pki.expiry import minute
from bridge.pki.kubeadm_names import is_node_name, naming
from bridge.settings.tables import Settings
from bridge.specs import (
    AUTHORITIES,
    CA,
    ETCD_CA,
    FRONT_PROXY_CA,
    KUBELET_CONF,
    KUBELET_SERVER,
    SERVERS,
    SPECS,
    SUPER_ADMIN,
    Authority,
    CertificateSpec,
)
from bridge.system.files import reasons
from bridge.system.paths import NoCaFileError, UnreadableError, read, read_ca_file

Certificates = Mapping[str, tuple[x509.Certificate, ...]]

#: init: the first control-plane node; control-plane: a further control-plane node; worker: any other node.
Role = Literal["init", "control-plane", "worker"]
ROLES: tuple[Role, ...] = get_args(Role)

ETCD_CLIENT = SPECS["apiserver-etcd-client"]
ETCD_DIRECTORY = Path("/var/lib/etcd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The paths of kubeadm's and the kubelet's files."""

    pki: Path
    kubeconfigs: Path
    kubelet: Path = KUBELET_DIR
    etcd: Path = ETCD_DIRECTORY
    external_etcd: ExternalEtcd | None = None  #: Its CA and client pair are where kubeadm's configuration says.
    servers: tuple[CertificateSpec, ...] = ()  #: Serving certificates that kubeadm puts into manifests.

    @classmethod
    def of(cls, settings: Settings, config: KubeadmConfig | None = None) -> Places:
        """Return the places that the settings and kubeadm's configuration name."""
        node, config = settings.node, config or KubeadmConfig()
        return cls(
            pki=node.pki_dir,
            kubeconfigs=node.kubeconfig_dir,
            kubelet=node.kubelet_dir,
            etcd=Path(config.etcd_directory or ETCD_DIRECTORY),
            external_etcd=config.external_etcd,
            servers=servers_of(config, node.pki_dir),
        )

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
        """Key and certificate of the kubelet's port; the kubelet makes a pair only if it can't read these."""
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
        """The configuration for `kubeadm init`; on a further node, the cluster's part of it."""
        return self.kubeconfigs / "kubeadm.yaml"

    @property
    def join_config(self) -> Path:
        """The configuration for `kubeadm join`."""
        return self.kubeconfigs / "join.yaml"

    def authority(self, authority: Authority) -> Path:
        """Return the path of a CA's certificate."""
        if authority == ETCD_CA and self.external_etcd is not None and self.external_etcd.has_tls:
            return Path(self.external_etcd.ca_file)
        return self.pki / authority.certificate_file

    def pair(self, spec: CertificateSpec) -> tuple[Path, Path]:
        """Return the key and certificate files of a certificate outside kubeconfigs."""
        if spec.name == KUBELET_SERVER:
            return self.serving
        if spec == ETCD_CLIENT and self.external_etcd is not None and self.external_etcd.has_tls:
            return Path(self.external_etcd.key_file), Path(self.external_etcd.certificate_file)
        return self.pki / f"{spec.base}.key", self.pki / f"{spec.base}.crt"

    def mode(self, path: Path) -> int:
        """Return a file's mode, by its path for an external etcd's files, which the operator names."""
        key, certificate = self.pair(ETCD_CLIENT)
        is_public = path in (certificate, self.authority(ETCD_CA)) or path.suffix == ".crt"
        return 0o644 if is_public and path != key else 0o600

    def specs(self, role: Role) -> list[CertificateSpec]:
        """Return the certificates that a new node of this role needs."""
        return specs_of(role, self.external_etcd, self.servers)

    def authorities(self, role: Role) -> list[Authority]:
        """Return the CAs whose certificates a new node of this role needs."""
        if role == "worker":
            return [AUTHORITIES["ca"]]
        has_etcds = self.external_etcd is None or self.external_etcd.has_tls
        return [authority for authority in AUTHORITIES.values() if has_etcds or authority != ETCD_CA]

    @property
    def brought(self) -> list[CertificateSpec]:
        """An external etcd's client pair, if both files exist already; it stays as it is, and no CA is asked for it."""
        is_here = all(live(path) is not None for path in self.pair(ETCD_CLIENT))
        return [ETCD_CLIENT] if self.external_etcd is not None and self.external_etcd.has_tls and is_here else []


def servers_of(config: KubeadmConfig, pki: Path) -> tuple[CertificateSpec, ...]:
    """Return the serving certificates that kubeadm puts into manifests; the components don't start without them."""
    return tuple(spec for component, spec in SERVERS.items() if pairs.is_ours_in(config.cluster, component, pki))


def specs_of(
    role: Role, external_etcd: ExternalEtcd | None = None, servers: Sequence[CertificateSpec] = ()
) -> list[CertificateSpec]:
    """Return the certificates that a new node of this role needs, without etcd's own if etcd is external."""
    if role == "worker":
        return [SPECS[KUBELET_CONF], SPECS[KUBELET_SERVER]]
    specs = [spec for spec in SPECS.values() if role == "init" or spec.name != SUPER_ADMIN]
    specs = [spec for spec in specs if not spec.by_flag or spec in servers]
    if external_etcd is None:
        return specs
    of_etcd = [ETCD_CLIENT] if external_etcd.has_tls else []
    return [spec for spec in specs if spec.authority != ETCD_CA or spec in of_etcd]


def live(path: Path) -> bytes | None:
    """Read a file on the node; None: it does not exist."""
    with reasons(BridgeError, f"{path}: can't read it"):
        return read(path)


def traces_of_cluster(places: Places) -> Iterator[Path]:
    """Yield files of kubeadm or a kubelet that show that a node is, or was, part of a cluster."""
    yield from sorted((places.kubeconfigs / "manifests").glob("*.yaml"))
    for path in (places.etcd / "member", places.kubelet / "config.yaml", places.kubelet / "kubeadm-flags.env"):
        if path.exists():
            yield path


def ca_keys(places: Places) -> Iterator[Path]:
    """Yield private keys of CAs, which must be on no node."""
    for authority in AUTHORITIES.values():
        path = places.pki / authority.key_file
        if path.exists() or path.is_symlink():
            yield path


# --- CA certificates --------------------------------------------------------------------------------------------------


class AuthorityError(BridgeError):
    """A CA certificate is missing or unusable."""

    exit_code = Exit.USAGE
    hint = "--ca-dir DIR holds ca.crt, front-proxy-ca.crt and etcd/ca.crt, each with the certificate that signs first"


class CaKeyError(BridgeError):
    """A CA's private key is on the node."""

    exit_code = Exit.REFUSED
    hint = "kubeadm would sign with it: find out who put it there, and remove it (shred -u) first"


def gather_authorities(
    settings: Settings, places: Places, role: Role, ca_dir: Path | None, carried: Certificates, now: datetime
) -> Certificates:
    """Gather the CAs' certificates for their files, by authority, with the signing one first."""
    for path in ca_keys(places):
        raise CaKeyError(f"{path}: wanted no CA's private key on a node, found one")
    if ca_dir is not None:
        _assert_holds_some(ca_dir, places.authorities(role))
    certificates: dict[str, tuple[x509.Certificate, ...]] = {}
    for authority in places.authorities(role):
        named = carried.get(authority.name) or (_in_file(ca_dir / authority.certificate_file) if ca_dir else ())
        live = _in_file(places.authority(authority))
        if named and live and named[0] != live[0]:
            raise AuthorityError(
                f"{places.authority(authority)}: wanted {_about(named[0])}, found {_about(live[0])}",
                hint="one of the two belongs to another cluster",
            )
        anchors = tuple(named or live)
        if not anchors and authority.name in settings.authorities:  # the one that signs, which kubeadm uses as the root
            anchors = signer_of(registry.configured(settings, [authority.name])[authority.name])
        if not anchors:
            raise AuthorityError(f"{authority.name}: no file and no backend has the CA's certificate")
        if (wrong := authority_trouble(anchors, now)) is not None:
            raise AuthorityError(f"{authority.name}: {wrong}")
        certificates[authority.name] = anchors
    if (twice := shared_key(certificates)) is not None:
        raise AuthorityError(
            twice,
            hint="a certificate of one CA would be valid for the other: with front-proxy-ca it can act as any user, "
            "with etcd-ca it can read and write everything",
        )
    return certificates


def _assert_holds_some(ca_dir: Path, wanted: Sequence[Authority]) -> None:
    """Refuse a mistyped directory, which would silently be ignored in favour of the backends' answers."""
    files = [authority.certificate_file for authority in wanted]
    if not any((ca_dir / file).exists() for file in files):
        found = "none of them" if ca_dir.is_dir() else "no such directory"
        raise AuthorityError(f"{ca_dir}: wanted {', '.join(files)} in it, found {found}")


def _in_file(path: Path) -> tuple[x509.Certificate, ...]:
    """Return the certificates in a CA file; none if there is no file."""
    try:
        if b"PRIVATE KEY-----" in (read(path) or b""):
            raise CaKeyError(f"{path}: wanted a CA's certificate alone, found a private key beside it")
        return read_ca_file(path)
    except NoCaFileError:
        return ()
    except UnreadableError as e:
        raise AuthorityError(f"{path}: wanted a CA certificate, found: {e}") from None


def authority_trouble(certificates: tuple[x509.Certificate, ...], now: datetime) -> str | None:
    """Return why the first of a CA's certificates, the one that signs, can't be used; None: it can."""
    first = certificates[0]
    try:
        if not is_ca(first):
            return f"wanted a CA's certificate, found {_about(first)}, which is not one"
        if not first.not_valid_before_utc <= now < first.not_valid_after_utc:
            begin, end = minute(first.not_valid_before_utc), minute(first.not_valid_after_utc)
            return f"wanted a CA that is valid now, found {_about(first)}, valid from {begin} until {end}"
        first.public_key()
    except UNREADABLE as e:
        return f"wanted a CA's certificate that can be read, found: {e}"
    return None


def shared_key(found: Certificates) -> str | None:
    """Return why two authorities can't be told apart; None: each has a key of its own."""
    keys: dict[bytes, str] = {}
    for name, certificates in found.items():
        other = keys.setdefault(spki(certificates[0].public_key()), name)
        if other != name:
            return f"{other} and {name}: wanted a CA each, found the same key for both"
    return None


def _about(certificate: x509.Certificate) -> str:
    return f"{name_text(certificate.subject)} (SHA-256 {fingerprint(certificate)[:16]}…)"


# --- kubeadm's configuration (pure, but for the last two) -------------------------------------------------------------

_VERSION = re.compile(r"v?1\.\d+\.\d+([-+].*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigurationFacts:
    """The operator's facts for a configuration without a file; empty: not given."""

    name: str = ""
    address: str = ""
    endpoint: str = ""
    version: str = ""
    socket: str = ""
    service_subnet: str = ""
    dns_domain: str = ""
    key: str = ""  #: kubeadm's `encryptionAlgorithm`.
    sans: Sequence[str] = ()

    def given(self) -> list[str]:
        """Return the names of the given facts."""
        return [name for name in self.__slots__ if getattr(self, name)]


#: For clusters without a signer: only with `false` does a running kubelet load a new certificate from its file.
_KUBELET = {"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration", "rotateCertificates": False}


def from_facts(facts: ConfigurationFacts) -> KubeadmConfig:
    """Return the configuration for `kubeadm init` without a file."""
    networking = {"serviceSubnet": facts.service_subnet, "dnsDomain": facts.dns_domain}
    cluster = {
        "apiVersion": "kubeadm.k8s.io/v1beta4",
        "kind": "ClusterConfiguration",
        "kubernetesVersion": facts.version,
        "controlPlaneEndpoint": facts.endpoint,
        "networking": {key: value for key, value in networking.items() if value},
        "apiServer": {"certSANs": list(facts.sans)} if facts.sans else {},
        "encryptionAlgorithm": facts.key,
    }
    node = _init_configuration("kubeadm.k8s.io/v1beta4", facts.name, facts.socket, {"advertiseAddress": facts.address})
    return KubeadmConfig.of((node, {key: value for key, value in cluster.items() if value}, _KUBELET))


def for_node(cluster: KubeadmConfig, name: str, address: str, socket: str = "", port: int = 0) -> KubeadmConfig:
    """Return the cluster's configuration with another node's part; for `certs generate-csr` on a control plane."""
    api = str(cluster.cluster.get("apiVersion", "kubeadm.k8s.io/v1beta4"))
    endpoint = {"advertiseAddress": address, "bindPort": port or cluster.port}
    node = _init_configuration(api, name, socket or cluster.socket, endpoint)
    return KubeadmConfig.of((node, *shared(cluster).documents))


def _init_configuration(api: str, name: str, socket: str, endpoint: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in (("name", name), ("criSocket", socket)) if value}
    return {"apiVersion": api, "kind": "InitConfiguration", "localAPIEndpoint": endpoint, "nodeRegistration": given}


def shared(config: KubeadmConfig) -> KubeadmConfig:
    """Return the documents that are the same for all nodes."""
    kinds = ("ClusterConfiguration", "KubeletConfiguration", "KubeProxyConfiguration")
    return KubeadmConfig.of(tuple(document for document in config.documents if document.get("kind") in kinds))


def join_configuration(
    config: KubeadmConfig, discovery: str, ignored: str, *, control_plane: bool, base: Mapping[str, Any] | None = None
) -> KubeadmConfig:
    """Return the configuration for `kubeadm join` by a local kubeconfig, without a token; the rest of `base` stays."""
    document = dict(base or {"apiVersion": str(config.cluster.get("apiVersion")), "kind": "JoinConfiguration"})
    registration = dict(_below(document, "nodeRegistration"))
    also = registration.get("ignorePreflightErrors")
    registration |= {
        "name": config.name,
        "ignorePreflightErrors": [*(also if isinstance(also, list) else ()), ignored],
        **({"criSocket": config.socket} if config.socket else {}),
    }
    document |= {"discovery": {"file": {"kubeConfigPath": discovery}}, "nodeRegistration": registration}
    document.pop("controlPlane", None)
    if control_plane:
        endpoint = {"advertiseAddress": config.address, "bindPort": config.port}
        document["controlPlane"] = {**_below(base or {}, "controlPlane"), "localAPIEndpoint": endpoint}
    return KubeadmConfig.of((document,))


_BY_FILE = "the file that --kubeadm-config names; `ca-bridge help day-0` has one to begin with"


def assert_usable(config: KubeadmConfig, pki_dir: str, *, further: bool) -> None:
    """Refuse a configuration that kubeadm would reject too late, or complete from the internet."""
    name, address = config.name, config.address
    if not is_node_name(name):
        raise KubeadmConfigError(
            f"nodeRegistration.name: wanted the node's name in small letters, found {name or 'none'}",
            hint=f"--name gives it, or {_BY_FILE}",
        )
    if not is_address(address):
        raise KubeadmConfigError(
            f"localAPIEndpoint.advertiseAddress: wanted an IP address, found {address or 'none'}",
            hint=f"--advertise-address gives it, or {_BY_FILE}",
        )
    if not _VERSION.fullmatch(config.version):
        raise KubeadmConfigError(
            f"kubernetesVersion: wanted a version such as v1.37.2, found {config.version or 'none'}",
            hint=f"--kubernetes-version gives it, or {_BY_FILE}; without it kubeadm asks the internet for one",
        )
    if further and not config.endpoint:
        raise KubeadmConfigError(
            "controlPlaneEndpoint is missing: the control plane's stable address",
            hint="kubeadm refuses a second control-plane node without it; a later change needs new certificates",
        )
    if config.external_etcd is not None and config.external_etcd.has_tls:
        _assert_own_files(config.external_etcd, pki_dir)
    directory = config.certificates_dir
    if directory and directory.rstrip("/") != pki_dir:
        raise KubeadmConfigError(f"certificatesDir: wanted node.pki_dir of the settings, {pki_dir}, found {directory}")
    for spec in ("apiserver", "etcd-server", "etcd-peer") if config.cluster else ():  # NoFactError: an invalid name
        naming(SPECS[spec], config.naming_facts(name, address))


def _assert_own_files(etcd: ExternalEtcd, pki_dir: str) -> None:
    """Refuse an external etcd whose files are not all named, or belong to another certificate."""
    bases = {spec.base: name for name, spec in SPECS.items() if name != "apiserver-etcd-client"}
    bases |= {CA.base: CA.name, FRONT_PROXY_CA.base: FRONT_PROXY_CA.name}
    taken = {f"{pki_dir}/{base}.{suffix}": name for base, name in bases.items() for suffix in ("crt", "key")}
    taken |= {f"{pki_dir}/sa.{suffix}": "the service accounts" for suffix in ("key", "pub")}
    for name, file in etcd.files.items():
        path = os.path.normpath(file)
        found = f"that of {taken[path]}, {file}" if path in taken else file or "none"
        if not file.startswith("/") or path in taken:
            raise KubeadmConfigError(
                f"etcd.external.{name}: wanted a file of its own by its absolute path, found {found}",
                hint=f"{', '.join(etcd.files)}: an etcd with TLS needs all three; the API server's certificates renew apart",
            )
        taken[path] = f"etcd.external.{name}"


def _below(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the mapping below a key; empty for anything else, which kubeadm rejects."""
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def read_configuration(path: Path) -> tuple[KubeadmConfig, bytes]:
    """Read kubeadm's configuration file."""
    data = kubeadm_config.read_file(path)
    return kubeadm_config.parse_documents(data, str(path)), data


def together(files: Sequence[Path]) -> KubeadmConfig | None:
    """Return a node's configuration (the first file) with the cluster's from the others; None: no first file."""
    own, *others = [read_configuration(path)[0] if path.exists() else None for path in files]
    if own is None:
        return None
    cluster = [document for other in others if other is not None for document in shared(other).documents]
    return KubeadmConfig.of((*own.documents, *cluster))
