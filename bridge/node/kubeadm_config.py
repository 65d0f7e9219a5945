"""Reads kubeadm's configuration (v1beta2 to v1beta4, a file or the ConfigMap), for names and for a new node."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from bridge.errors import BridgeError, Exit
from bridge.node.endpoints import PORTS
from bridge.node.yamltree import YamlError, documents, split_bom
from bridge.pki.kubeadm_names import NamingFacts, Release, parse_release
from bridge.specs import DEFAULT_CLUSTER, KEY_ALGORITHMS, Component, KeyAlgorithm
from bridge.system.paths import UnreadableError, read_present

#: The document's kind, and its key in the ConfigMap.
CLUSTER_CONFIGURATION = "ClusterConfiguration"

_SERVICE_SUBNET = "10.96.0.0/12"
_API = "kubeadm.k8s.io/"
_FILE_HINT = "name the file that `kubeadm init --config` had, or is to have"


class KubeadmConfigError(BridgeError):
    """Not a usable kubeadm configuration."""

    exit_code = Exit.USAGE
    hint = (
        "`kubeadm config validate --config FILE` says what kubeadm thinks of it; `kubeadm config print init-defaults` "
        "shows the form; `ca-bridge help day-0` says which fields matter"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalEtcd:
    """`etcd.external`: the API server's files for TLS with an external etcd; all empty: without TLS."""

    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""

    @property
    def files(self) -> dict[str, str]:
        """The files, by kubeadm's names."""
        return {"caFile": self.ca_file, "certFile": self.certificate_file, "keyFile": self.key_file}

    @property
    def has_tls(self) -> bool:
        """Whether any of these files is given."""
        return any(self.files.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeadmConfig:
    """The documents, and the values in them that decide names and paths; defaults are kubeadm's."""

    documents: tuple[Mapping[str, Any], ...] = ()
    name: str = ""  #: The node's name; empty: it is the host's.
    socket: str = ""  #: The container runtime's socket; empty: the default.
    address: str = ""  #: `localAPIEndpoint.advertiseAddress`; empty: the default route's address.
    bind_port: int | None = None  #: `localAPIEndpoint.bindPort`.
    node_ips: tuple[str, ...] = ()  #: The node's addresses by the kubelet's `--node-ip`.
    endpoint: str = ""  #: `controlPlaneEndpoint`, for all nodes: host and port; empty: none.
    version: str = ""  #: `kubernetesVersion`; empty: the version that kubeadm finds on the Internet.
    service_subnet: str = _SERVICE_SUBNET  #: One subnet, or IPv4 and IPv6 separated by a comma.
    dns_domain: str = "cluster.local"
    cluster_name: str = DEFAULT_CLUSTER
    api_sans: tuple[str, ...] = ()
    etcd_server_sans: tuple[str, ...] = ()
    etcd_peer_sans: tuple[str, ...] = ()
    external_etcd: ExternalEtcd | None = None  #: None: etcd runs on the control-plane nodes.
    etcd_directory: str = ""  #: etcd's data directory; empty: the default.
    certificates_dir: str = ""
    key: KeyAlgorithm = "rsa-2048"
    problem: str = ""  #: The first value that kubeadm could not use, which counts as not given.

    @classmethod
    def of(cls, documents: Sequence[Mapping[str, Any]]) -> KubeadmConfig:
        """Read documents; a value whose type is wrong becomes a problem, not yet an error."""
        kinds = {document.get("kind"): document for document in reversed(documents)}
        values = _Values(kinds.get(CLUSTER_CONFIGURATION) or {})
        own = _Values(kinds.get("InitConfiguration") or kinds.get("JoinConfiguration") or {}, values.problems)
        local = ("controlPlane", "localAPIEndpoint") if own.at("controlPlane") is not None else ("localAPIEndpoint",)
        port, endpoint = own.at(*local, "bindPort"), values.text("controlPlaneEndpoint")
        return cls(
            documents=tuple(documents),
            name=own.text("nodeRegistration", "name"),
            socket=own.text("nodeRegistration", "criSocket"),
            address=own.text(*local, "advertiseAddress"),
            bind_port=port if isinstance(port, int) else None,
            node_ips=own.node_ips(),
            endpoint=endpoint if not endpoint or re.search(r":\d+$", endpoint) else f"{endpoint}:6443",
            version=values.text("kubernetesVersion"),
            service_subnet=values.text("networking", "serviceSubnet") or _SERVICE_SUBNET,
            dns_domain=values.text("networking", "dnsDomain") or "cluster.local",
            cluster_name=values.text("clusterName") or DEFAULT_CLUSTER,
            api_sans=values.texts("apiServer", "certSANs"),
            etcd_server_sans=values.texts("etcd", "local", "serverCertSANs"),
            etcd_peer_sans=values.texts("etcd", "local", "peerCertSANs"),
            external_etcd=values.external_etcd(),
            etcd_directory=values.text("etcd", "local", "dataDir"),
            certificates_dir=values.text("certificatesDir"),
            key=values.key(),
            problem=next(iter(values.problems), ""),
        )

    def of_kind(self, kind: str) -> Mapping[str, Any] | None:
        """The document of this kind, if there is one."""
        return next((document for document in self.documents if document.get("kind") == kind), None)

    @property
    def cluster(self) -> Mapping[str, Any]:
        """The ClusterConfiguration; empty if there is none."""
        return self.of_kind(CLUSTER_CONFIGURATION) or {}

    @property
    def port(self) -> int:
        """The API server's port on this node."""
        return self.bind_port or PORTS[Component.APISERVER]

    @property
    def release(self) -> Release | None:
        """The version as numbers; None: not given, or a label such as `stable-1`."""
        return parse_release(self.version)

    @property
    def endpoint_host(self) -> str:
        """Host of `controlPlaneEndpoint`; empty if it is not given."""
        return urlsplit(f"//{self.endpoint}").hostname or ""

    @property
    def endpoint_url(self) -> str:
        """The server URL for users' kubeconfigs; empty without a `controlPlaneEndpoint`."""
        host, port = self.endpoint_host, urlsplit(f"//{self.endpoint}").port
        return f"https://{f'[{host}]' if ':' in host else host}:{port}" if host else ""

    @property
    def service_address(self) -> str:
        """The API server's service address: first of the (first) subnet (kubeadm's `GetAPIServerVirtualIP`)."""
        return str(ipaddress.ip_network(self.service_subnet.partition(",")[0].strip())[1])

    @property
    def kubelets_rotate(self) -> bool:
        """Whether kubelets request their next certificate from the cluster, and read no other; kubeadm's default."""
        return (self.of_kind("KubeletConfiguration") or {}).get("rotateCertificates") is not False

    def text(self) -> str:
        """The documents as YAML."""
        return "---\n".join(yaml.safe_dump(dict(document), sort_keys=False) for document in self.documents)

    def assert_usable(self, source: str = "") -> None:
        """Raise a KubeadmConfigError if a value or the ClusterConfiguration is unusable for kubeadm."""
        problem = self.problem
        if not _is_kubeadms(self.cluster):
            problem = f"no {CLUSTER_CONFIGURATION} in it"
        try:
            _ = self.endpoint_url, self.service_address
        except (ValueError, IndexError) as e:
            problem = problem or str(e)
        if problem:
            raise _unusable(problem, source)

    def naming_facts(self, node: str, address: str) -> NamingFacts:
        """The facts from which kubeadm derives the names of a node with this name and advertise address."""
        self.assert_usable()
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


def is_address(text: str) -> bool:
    """Whether a text is an IP address that a node can have."""
    try:
        return not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


class _Values:
    """The values of one document; a value whose type is wrong is a problem, and counts as not given."""

    def __init__(self, document: Mapping[str, Any], problems: list[str] | None = None) -> None:
        self._document = document
        self.problems = [] if problems is None else problems

    def at(self, *keys: str) -> Any:
        """The value below these keys; None: not given."""
        found: Any = self._document
        for key in keys:
            if not isinstance(found, Mapping):
                self._report(keys, "mappings above it")
                return None
            if (found := found.get(key)) is None:
                return None
        return found

    def text(self, *keys: str) -> str:
        found = self.at(*keys)
        if found is not None and not isinstance(found, str):
            self._report(keys, "a text")
        return found if isinstance(found, str) else ""

    def texts(self, *keys: str) -> tuple[str, ...]:
        texts = self.at(*keys)
        if texts is None or (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            return tuple(texts or ())
        self._report(keys, "a list of texts")
        return ()

    def node_ips(self) -> tuple[str, ...]:
        """`node-ip` of `nodeRegistration.kubeletExtraArgs`, which is a mapping below v1beta4."""
        flags = self.at("nodeRegistration", "kubeletExtraArgs")
        if isinstance(flags, Mapping):
            flags = [{"name": name, "value": value} for name, value in flags.items()]
        named = [flag for flag in flags if isinstance(flag, Mapping)] if isinstance(flags, list) else []
        values = [argument.get("value") for argument in named if argument.get("name") == "node-ip"]
        found = [address.strip() for address in str(values[-1]).split(",")] if values else []
        return tuple(address for address in found if is_address(address))

    def external_etcd(self) -> ExternalEtcd | None:
        """`etcd.external`."""
        if self.at("etcd", "external") is None:
            return None
        ca, certificate, key = (self.text("etcd", "external", name) for name in ("caFile", "certFile", "keyFile"))
        return ExternalEtcd(ca_file=ca, certificate_file=certificate, key_file=key)

    def key(self) -> KeyAlgorithm:
        """`encryptionAlgorithm`, or below v1beta4 the gate PublicKeysECDSA."""
        named = self.text("encryptionAlgorithm").lower()
        if not named:
            return "ecdsa-p256" if self.at("featureGates", "PublicKeysECDSA") is True else "rsa-2048"
        if named not in KEY_ALGORITHMS:
            self._report(("encryptionAlgorithm",), f"one of {', '.join(KEY_ALGORITHMS).upper()}")
        return next((algorithm for algorithm in KEY_ALGORITHMS if algorithm == named), "rsa-2048")

    def _report(self, keys: Sequence[str], wanted: str) -> None:
        self.problems.append(f"{'.'.join(keys)}: wanted {wanted}, found something else")


def read_file(path: Path) -> bytes:
    """Read a file that the operator named, which has to exist."""
    try:
        return read_present(path)
    except UnreadableError as e:
        raise KubeadmConfigError(f"{path}: wanted kubeadm's configuration, found: {e}", hint=_FILE_HINT) from None


def parse(data: bytes, source: str = "") -> KubeadmConfig:
    """Read a configuration and check that its names can be used; `source` is the documents' origin in messages."""
    config = parse_documents(data, source)
    config.assert_usable(source)
    return config


def parse_documents(data: bytes, source: str = "") -> KubeadmConfig:
    """Read the documents: each kind once (as kubeadm demands) and one of them kubeadm's, without checking their values."""
    try:
        return KubeadmConfig.of(_by_kind(data))
    except YamlError as e:
        problem = str(e)
    raise _unusable(problem, source)


def _unusable(problem: str, source: str) -> KubeadmConfigError:
    """An error to raise outside of `except`: the original, and so a traceback's context, may hold the data."""
    where = f"{source}: " if source else ""
    return KubeadmConfigError(f"{where}wanted a configuration of kubeadm, found one that can't be used: {problem}")


def _by_kind(data: bytes) -> list[Mapping[str, Any]]:
    kinds: dict[str, Mapping[str, Any]] = {}
    for document in documents(split_bom(data)[1]):
        if document.null:
            continue
        named = document.get("kind")
        kind = "" if named is None else named.text()
        if kind in kinds:
            raise YamlError(f"wanted {kind or 'a document without a kind'} once, found it twice")
        kinds[kind] = document.plain()
    if not any(map(_is_kubeadms, kinds.values())):
        raise YamlError(f"there is no document of apiVersion {_API}…")
    return list(kinds.values())


def _is_kubeadms(document: Mapping[str, Any]) -> bool:
    return str(document.get("apiVersion")).startswith(_API)
