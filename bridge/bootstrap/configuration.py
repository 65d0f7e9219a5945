"""kubeadm's configuration on a new node: how it is made, and what kubeadm would refuse too late (pure)."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.node.kubeadm_config import ExternalEtcd, KubeadmConfig, KubeadmConfigError, parse_documents, read_file
from bridge.pki.kubeadm_names import is_node_name
from bridge.specs import CA, FRONT_PROXY_CA, SPECS

_VERSION = re.compile(r"v?1\.\d+\.\d+([-+].*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigurationFacts:
    """Facts for a configuration without a file; an empty fact was not given."""

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
        """The names of the facts that were given."""
        return [name for name in self.__slots__ if getattr(self, name)]


#: For clusters without a signer: only with `false` a running kubelet loads a new certificate from its file.
_KUBELET = {"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration", "rotateCertificates": False}


def from_facts(facts: ConfigurationFacts) -> KubeadmConfig:
    """The configuration for `kubeadm init` where there is no file."""
    registration = {"name": facts.name, "criSocket": facts.socket}
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
    node = _init_configuration("kubeadm.k8s.io/v1beta4", {"advertiseAddress": facts.address}, registration)
    return KubeadmConfig.of((node, {key: value for key, value in cluster.items() if value}, _KUBELET))


def for_node(cluster: KubeadmConfig, facts: ConfigurationFacts) -> KubeadmConfig:
    """The cluster's configuration with the part of another node; for `certs generate-csr` on a control plane."""
    registration = {"name": facts.name, "criSocket": facts.socket or cluster.socket}
    api = str(cluster.cluster.get("apiVersion", "kubeadm.k8s.io/v1beta4"))
    node = _init_configuration(api, {"advertiseAddress": facts.address, "bindPort": cluster.port}, registration)
    return KubeadmConfig.of((node, *shared(cluster).documents))


def _init_configuration(api: str, endpoint: Mapping[str, Any], registration: Mapping[str, str]) -> dict[str, Any]:
    given = {key: value for key, value in registration.items() if value}
    return {"apiVersion": api, "kind": "InitConfiguration", "localAPIEndpoint": endpoint, "nodeRegistration": given}


def shared(config: KubeadmConfig) -> KubeadmConfig:
    """The documents that are the same for all nodes."""
    ours = ("ClusterConfiguration", "KubeletConfiguration", "KubeProxyConfiguration")
    return KubeadmConfig.of(tuple(one for one in config.documents if one.get("kind") in ours))


def join_configuration(
    config: KubeadmConfig, discovery: str, ignored: str, *, control_plane: bool, base: Mapping[str, Any] | None = None
) -> KubeadmConfig:
    """The configuration for `kubeadm join` by a kubeconfig on the node, without a token; the rest of `base` stays."""
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
        document["controlPlane"] = {
            **_below(base or {}, "controlPlane"),
            "localAPIEndpoint": {"advertiseAddress": config.address, "bindPort": config.port},
        }
    return KubeadmConfig.of((document,))


_IN_FILE = "the file that --kubeadm-config names; `ca-bridge help day-0` has one to begin with"


def assert_usable(config: KubeadmConfig, pki_dir: str, *, further: bool) -> None:
    """Refuse what kubeadm would reject too late, or would ask the internet for."""
    name, address = config.name, config.address
    if not is_node_name(name):
        raise KubeadmConfigError(
            f"nodeRegistration.name: wanted the node's name in small letters, found {name or 'none'}",
            hint=f"--name gives it, or {_IN_FILE}",
        )
    if not _is_address(address):
        raise KubeadmConfigError(
            f"localAPIEndpoint.advertiseAddress: wanted an IP address, found {address or 'none'}",
            hint=f"--advertise-address gives it, or {_IN_FILE}",
        )
    if not _VERSION.fullmatch(config.version):
        raise KubeadmConfigError(
            f"kubernetesVersion: wanted a version such as v1.37.2, found {config.version or 'none'}",
            hint=f"--kubernetes-version gives it, or {_IN_FILE}; without it kubeadm asks the internet for one",
        )
    if further and not config.endpoint:
        raise KubeadmConfigError(
            "controlPlaneEndpoint: wanted the control plane's stable address, found none",
            hint="kubeadm refuses a second control-plane node without it; a later change needs new certificates",
        )
    if config.external_etcd is not None and config.external_etcd.has_tls:
        _assert_own_files(config.external_etcd, pki_dir)
    found = config.certificates_dir
    if found and found.rstrip("/") != pki_dir:
        raise KubeadmConfigError(f"certificatesDir: wanted node.pki_dir of the settings, {pki_dir}, found {found}")


def _assert_own_files(etcd: ExternalEtcd, pki_dir: str) -> None:
    """Refuse an external etcd's files that are not all named, or are another certificate's."""
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


def _is_address(text: str) -> bool:
    try:
        return not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


def _below(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The mapping below a key; empty for anything else, which kubeadm rejects."""
    found = mapping.get(key)
    return found if isinstance(found, dict) else {}


def read_configuration(path: Path) -> tuple[KubeadmConfig, bytes]:
    """Read kubeadm's configuration file."""
    data = read_file(path)
    return parse_documents(data, str(path)), data


def together(files: Sequence[Path]) -> KubeadmConfig | None:
    """A node's configuration (the first file) with the cluster's from the others; None: no first file."""
    own, *others = [read_configuration(path)[0] if path.exists() else None for path in files]
    if own is None:
        return None
    cluster = [one for other in others if other is not None for one in shared(other).documents]
    return KubeadmConfig.of((*own.documents, *cluster))
