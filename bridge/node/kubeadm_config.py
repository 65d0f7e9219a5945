"""
kubeadm's configuration: the one reader of its format, and what names in certificates and kubeconfigs come from.

A file with `InitConfiguration` and `ClusterConfiguration` (v1beta2 to v1beta4), or the ClusterConfiguration alone, as
the ConfigMap kube-system/kubeadm-config has it. `bridge.bootstrap.configuration` writes such files.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bridge.errors import BridgeError, Exit
from bridge.node.yamltree import YamlError, YamlNode, documents, split_bom
from bridge.pki.kubeadm_names import NamingFacts, Release, parse_release
from bridge.specs import KEY_ALGORITHMS, KeyAlgorithm
from bridge.system.paths import UnreadableError, read

#: Where the cluster keeps it, for the Kubernetes API.
CONFIG_MAP = "/api/v1/namespaces/kube-system/configmaps/kubeadm-config"
#: In that ConfigMap's `data`.
CLUSTER_CONFIGURATION = "ClusterConfiguration"

_SERVICE_SUBNET = "10.96.0.0/12"
_API = "kubeadm.k8s.io/"
_FILE_HINT = "name the file that `kubeadm init --config` had, or is to have"


class KubeadmConfigError(BridgeError):
    """Not a configuration of kubeadm that can be used."""

    exit_code = Exit.USAGE
    hint = (
        "`kubeadm config validate --config FILE` says what kubeadm thinks of it; `kubeadm config print init-defaults` "
        "shows the form; `ca-bridge help day-0` says which fields matter"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeadmConfig:
    """Values as they stand there; defaults are kubeadm's."""

    release: Release | None  #: Of `kubernetesVersion`; None: not there, or a label such as `stable-1`.
    endpoint: str = ""  #: `controlPlaneEndpoint`: host, and perhaps a port.
    service_subnet: str = _SERVICE_SUBNET  #: Of both families, with a comma.
    dns_domain: str = "cluster.local"
    cluster_name: str = "kubernetes"
    api_sans: tuple[str, ...] = ()
    etcd_server_sans: tuple[str, ...] = ()
    etcd_peer_sans: tuple[str, ...] = ()
    is_etcd_external: bool = False
    key: KeyAlgorithm = "rsa-2048"
    bind_port: str = ""  #: Of InitConfiguration, as what follows; empty: not there.
    node: str = ""
    address: str = ""  #: `localAPIEndpoint.advertiseAddress`.

    @property
    def endpoint_host(self) -> str:
        """Name or address of `controlPlaneEndpoint`; empty if there is none."""
        return urlsplit(f"//{self.endpoint}").hostname or "" if ":" in self.endpoint else self.endpoint

    @property
    def endpoint_url(self) -> str:
        """The server's URL for kubeconfigs of people; empty if there is none."""
        host, port = self.endpoint_host, urlsplit(f"//{self.endpoint}").port or 6443
        return f"https://{f'[{host}]' if ':' in host else host}:{port}" if host else ""

    @property
    def service_address(self) -> str:
        """The API server's own: the first of the (first) service subnet (kubeadm's `GetAPIServerVirtualIP`)."""
        return str(ipaddress.ip_network(self.service_subnet.partition(",")[0].strip())[1])

    def naming_facts(self, node: str, address: str) -> NamingFacts:
        """The facts that kubeadm makes the names of a node with this name and advertise address of."""
        return NamingFacts(
            release=self.release,
            node=node,
            address=address,
            service_address=self.service_address,
            endpoint_host=self.endpoint_host,
            dns_domain=self.dns_domain,
            api_sans=self.api_sans,
            etcd_server_sans=self.etcd_server_sans,
            etcd_peer_sans=self.etcd_peer_sans,
        )


def read_file(path: Path) -> bytes:
    """Read a file that the operator names; it has to be there."""
    try:
        data = read(path)
    except UnreadableError as e:
        raise KubeadmConfigError(f"{path}: wanted kubeadm's configuration, found: {e}", hint=_FILE_HINT) from None
    if data is None:
        raise KubeadmConfigError(f"{path}: wanted kubeadm's configuration, found no file", hint=_FILE_HINT)
    return data


def parse(data: bytes, source: str = "") -> KubeadmConfig:
    """Read what the names come from; `source` says in messages where the documents are from."""
    try:
        config = _config(_by_kind(data))
        _ = config.endpoint_url, config.service_address
    except (YamlError, ValueError, IndexError) as e:
        problem = str(e)
    else:
        return config
    raise _unusable(problem, source)


def parse_documents(data: bytes, source: str = "") -> tuple[dict[str, Any], ...]:
    """Read the documents whole, those for the kubelet and kube-proxy among them."""
    try:
        return tuple(one.plain() for one in _by_kind(data).values())
    except YamlError as e:
        problem = str(e)
    raise _unusable(problem, source)


def _unusable(problem: str, source: str) -> KubeadmConfigError:
    """An error to be raised outside of `except`: that error, and so a traceback's context, may hold the data."""
    where = f"{source}: " if source else ""
    return KubeadmConfigError(f"{where}wanted a configuration of kubeadm, found one that can't be used: {problem}")


def _by_kind(data: bytes) -> dict[str, YamlNode]:
    """The documents, of which each kind is there once (as kubeadm demands) and one is kubeadm's."""
    kinds: dict[str, YamlNode] = {}
    for one in documents(split_bom(data)[1]):
        if one.null:
            continue
        kind = _text(one, "kind")
        if kind in kinds:
            raise YamlError(f"wanted {kind or 'a document without a kind'} once, found it twice")
        kinds[kind] = one
    if not any(map(_is_kubeadms, kinds.values())):
        raise YamlError(f"wanted a document of apiVersion {_API}…, found none")
    return kinds


def _is_kubeadms(document: YamlNode) -> bool:
    return _text(document, "apiVersion").startswith(_API)


def _config(every: dict[str, YamlNode]) -> KubeadmConfig:
    kinds = {kind: one for kind, one in every.items() if _is_kubeadms(one)}
    cluster, init = kinds.get(CLUSTER_CONFIGURATION), kinds.get("InitConfiguration")
    if cluster is None:
        raise YamlError(f"no {CLUSTER_CONFIGURATION} in it")
    return KubeadmConfig(
        release=parse_release(_text(cluster, "kubernetesVersion")),
        endpoint=_text(cluster, "controlPlaneEndpoint"),
        service_subnet=_text(cluster, "networking", "serviceSubnet") or _SERVICE_SUBNET,
        dns_domain=_text(cluster, "networking", "dnsDomain") or "cluster.local",
        cluster_name=_text(cluster, "clusterName") or "kubernetes",
        api_sans=_texts(cluster, "apiServer", "certSANs"),
        etcd_server_sans=_texts(cluster, "etcd", "local", "serverCertSANs"),
        etcd_peer_sans=_texts(cluster, "etcd", "local", "peerCertSANs"),
        is_etcd_external=_at(cluster, "etcd", "external") is not None,
        key=_key(cluster),
        bind_port="" if init is None else _text(init, "localAPIEndpoint", "bindPort"),
        node="" if init is None else _text(init, "nodeRegistration", "name"),
        address="" if init is None else _text(init, "localAPIEndpoint", "advertiseAddress"),
    )


def _key(cluster: YamlNode) -> KeyAlgorithm:
    """`encryptionAlgorithm`, or below v1beta4 the gate PublicKeysECDSA."""
    named = _text(cluster, "encryptionAlgorithm").lower()
    if not named:
        return "ecdsa-p256" if _text(cluster, "featureGates", "PublicKeysECDSA") == "true" else "rsa-2048"
    for algorithm in KEY_ALGORITHMS:
        if algorithm == named:
            return algorithm
    raise YamlError(f"encryptionAlgorithm: wanted one of {', '.join(KEY_ALGORITHMS).upper()}, found another one")


def _at(root: YamlNode, *keys: str) -> YamlNode | None:
    found: YamlNode | None = root
    for key in keys:
        found = None if found is None else found.get(key)
    return found


def _text(root: YamlNode, *keys: str) -> str:
    found = _at(root, *keys)
    return "" if found is None else found.text()


def _texts(root: YamlNode, *keys: str) -> tuple[str, ...]:
    found = _at(root, *keys)
    return () if found is None else tuple(one.text() for one in found.items())
