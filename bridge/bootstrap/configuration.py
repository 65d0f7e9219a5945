"""
kubeadm's configuration on a new node: what it says, and how it is made (pure).

`bridge.node.kubeadm_config` reads its YAML documents; what is not needed here is kept for kubeadm to judge.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bridge.node import kubeadm_config
from bridge.node.kubeadm_config import KubeadmConfigError, read_file
from bridge.pki.kubeadm_names import NamingFacts
from bridge.specs import KEY_ALGORITHMS, KeyAlgorithm

#: What a node's name may be (RFC 1123 subdomain).
_NODE = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_VERSION = re.compile(r"v?1\.\d+\.\d+([-+].*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """kubeadm's configuration: one or several YAML documents."""

    documents: tuple[Mapping[str, Any], ...]

    def of_kind(self, kind: str) -> Mapping[str, Any] | None:
        """The document of this kind, if there is one."""
        return next((one for one in self.documents if one.get("kind") == kind), None)

    @property
    def cluster(self) -> Mapping[str, Any]:
        """The ClusterConfiguration; empty if there is none."""
        return self.of_kind("ClusterConfiguration") or {}

    @property
    def name(self) -> str:
        """The node's; empty: the file leaves it to the host."""
        return _text(_below(self._node, "nodeRegistration"), "name")

    @property
    def socket(self) -> str:
        """The container runtime's; empty: the default."""
        return _text(_below(self._node, "nodeRegistration"), "criSocket")

    @property
    def address(self) -> str:
        """The API server's advertise address; empty: that of the default route."""
        return _text(self._endpoint, "advertiseAddress")

    @property
    def port(self) -> int:
        """The API server's on this node."""
        port = self._endpoint.get("bindPort", 6443)
        return port if isinstance(port, int) else 6443

    @property
    def endpoint(self) -> str:
        """The control plane's, for all nodes: host and port; empty: none."""
        found = _text(self.cluster, "controlPlaneEndpoint")
        return found if not found or re.search(r":\d+$", found) else f"{found}:6443"

    @property
    def version(self) -> str:
        """Kubernetes' version, such as `v1.37.2`; empty: whatever kubeadm finds in the internet."""
        return _text(self.cluster, "kubernetesVersion")

    @property
    def kubelets_rotate(self) -> bool:
        """Whether kubelets ask the cluster for their next certificate, and read no other; kubeadm's default."""
        kubelet = self.of_kind("KubeletConfiguration") or {}
        return kubelet.get("rotateCertificates") is not False

    @property
    def etcd_directory(self) -> str:
        """Where etcd has its data; empty: the default."""
        return _text(_below(_below(self.cluster, "etcd"), "local"), "dataDir")

    @property
    def _node(self) -> Mapping[str, Any]:
        return self.of_kind("InitConfiguration") or self.of_kind("JoinConfiguration") or {}

    @property
    def _endpoint(self) -> Mapping[str, Any]:
        node = self._node
        return _below(_below(node, "controlPlane") if "controlPlane" in node else node, "localAPIEndpoint")

    def text(self) -> str:
        """The documents as YAML."""
        return "---\n".join(yaml.safe_dump(dict(one), sort_keys=False) for one in self.documents)


def parse(data: bytes, source: str = "") -> Configuration:
    """Read a file."""
    return Configuration(documents=kubeadm_config.parse_documents(data, source))


def naming_facts(config: Configuration, node: str, address: str) -> NamingFacts:
    """The facts that kubeadm makes a node's names of, from its configuration."""
    return kubeadm_config.parse(config.text().encode()).naming_facts(node, address)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigurationFacts:
    """The few facts that a configuration is made of where there is no file; an empty one was not given."""

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


#: For nodes in a cluster without a signer: a running kubelet takes a new certificate by itself only with `false`.
_KUBELET = {
    "apiVersion": "kubelet.config.k8s.io/v1beta1",
    "kind": "KubeletConfiguration",
    "rotateCertificates": False,
}


def from_facts(facts: ConfigurationFacts) -> Configuration:
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
    node = {
        "apiVersion": "kubeadm.k8s.io/v1beta4",
        "kind": "InitConfiguration",
        "localAPIEndpoint": {"advertiseAddress": facts.address},
        "nodeRegistration": {key: value for key, value in registration.items() if value},
    }
    return Configuration(documents=(node, {key: value for key, value in cluster.items() if value}, _KUBELET))


def for_node(cluster: Configuration, facts: ConfigurationFacts) -> Configuration:
    """The cluster's configuration with the part of another node; for `certs generate-csr` on a control plane."""
    registration = {"name": facts.name, "criSocket": facts.socket or cluster.socket}
    api = str(cluster.cluster.get("apiVersion", "kubeadm.k8s.io/v1beta4"))
    node = {
        "apiVersion": api,
        "kind": "InitConfiguration",
        "localAPIEndpoint": {"advertiseAddress": facts.address, "bindPort": cluster.port},
        "nodeRegistration": {key: value for key, value in registration.items() if value},
    }
    return Configuration(documents=(node, *shared(cluster).documents))


def shared(config: Configuration) -> Configuration:
    """The documents that are the same for all nodes, without those that say who one of them is."""
    ours = ("ClusterConfiguration", "KubeletConfiguration", "KubeProxyConfiguration")
    return Configuration(documents=tuple(one for one in config.documents if one.get("kind") in ours))


def key_algorithm(config: Configuration) -> KeyAlgorithm:
    """The algorithm of all keys; kubeadm's default where the file names none."""
    found = _text(config.cluster, "encryptionAlgorithm").lower()
    return next((one for one in KEY_ALGORITHMS if one == found), "rsa-2048")


def join_configuration(
    config: Configuration, discovery: str, ignored: str, *, control_plane: bool, base: Mapping[str, Any] | None = None
) -> Configuration:
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
    return Configuration(documents=(document,))


_IN_FILE = "the file that --kubeadm-config names; `ca-bridge help day-0` has one to begin with"


def assert_usable(config: Configuration, pki_dir: str, *, further: bool) -> None:
    """Refuse what kubeadm would find out too late, or would look for in the internet."""
    name, address = config.name, config.address
    if not name or not _NODE.fullmatch(name):
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
    if "external" in _below(config.cluster, "etcd"):
        raise KubeadmConfigError(
            "etcd.external: wanted an etcd that runs on the control-plane nodes, found an external one",
            hint="make its certificates with its own tools, then run kubeadm as its documentation says",
        )
    found = _text(config.cluster, "certificatesDir")
    if found and found.rstrip("/") != pki_dir:
        raise KubeadmConfigError(f"certificatesDir: wanted node.pki_dir of the settings, {pki_dir}, found {found}")


def _is_address(text: str) -> bool:
    try:
        return not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


def _below(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The mapping below a key; empty for anything else, of which kubeadm complains."""
    found = mapping.get(key)
    return found if isinstance(found, dict) else {}


def _text(mapping: Mapping[str, Any], key: str) -> str:
    found = mapping.get(key)
    return found if isinstance(found, str) else ""


def read_configuration(path: Path) -> tuple[Configuration, bytes]:
    """Read kubeadm's configuration file."""
    data = read_file(path)
    return parse(data, str(path)), data


def together(files: Sequence[Path]) -> Configuration | None:
    """A node's configuration (the first file) with what others say of the cluster; None: the first is not there."""
    own, *others = [read_configuration(path)[0] if path.exists() else None for path in files]
    if own is None:
        return None
    cluster = [one for other in others if other is not None for one in shared(other).documents]
    return Configuration(documents=(*own.documents, *cluster))
