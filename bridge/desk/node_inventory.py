"""The inventory file: a cluster's nodes, written by an administrator or a program, but never by a node (pure)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bridge.errors import SettingsProblem
from bridge.pki.csr import address
from bridge.pki.kubeadm_names import is_host_name, is_node_name
from bridge.settings import network_of, opened

_LOCAL = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")
#: kubeadm's service of the API; each name with and without the rest.
_SERVICE_LABELS = ("kubernetes", "kubernetes.default", "kubernetes.default.svc")
San = tuple[str, str]  #: (type, value), as `certificates.san_entries`.


@dataclass(frozen=True, kw_only=True)
class NodeEntry:
    """Table `[node.NAME]`: one node."""

    addresses: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  #: In addition to its own.
    control_plane: bool = False
    rejoin: bool = False  #: A bootstrap token may request it while its Node object exists but is not ready.
    blocked: bool = False  #: It receives no certificates.

    def problems(self) -> Iterator[SettingsProblem]:
        """Malformed names and addresses."""
        for text in self.addresses:
            if address(text) is None:
                yield SettingsProblem("addresses", "IP addresses", repr(text))
        for text in self.names:
            if not is_host_name(text):
                yield SettingsProblem("names", "host names in small letters, no wildcards", repr(text))

    def sans(self, name: str) -> frozenset[San]:
        """The SANs that the node's certificates may have."""
        addresses = {("IP", str(found)) for text in self.addresses if (found := address(text)) is not None}
        return frozenset({("DNS", name), *(("DNS", text) for text in self.names), *addresses})


@dataclass(frozen=True, kw_only=True)
class ClusterEntry:
    """Table `[cluster]`: names and addresses of the API and of services."""

    endpoints: tuple[str, ...] = ()
    service_networks: tuple[str, ...] = ("10.96.0.0/12",)
    service_domain: str = "cluster.local"

    def problems(self) -> Iterator[SettingsProblem]:
        """Malformed names, addresses and networks."""
        for text in self.endpoints:
            if address(text) is None and not is_host_name(text.lower()):
                yield SettingsProblem("endpoints", "host names and IP addresses, without a port", repr(text))
        for text in self.service_networks:
            if network_of(text) is None:
                yield SettingsProblem("service_networks", "networks such as 10.96.0.0/12", repr(text))
        if not is_host_name(self.service_domain):
            yield SettingsProblem("service_domain", "a domain such as cluster.local", repr(self.service_domain))


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The whole file."""

    cluster: ClusterEntry = field(default_factory=ClusterEntry)
    nodes: Mapping[str, NodeEntry] = field(default_factory=dict)

    @cached_property
    def control_planes(self) -> Mapping[str, NodeEntry]:
        """The control-plane nodes."""
        return {name: entry for name, entry in self.nodes.items() if entry.control_plane}

    @cached_property
    def blocked(self) -> frozenset[str]:
        """The names of blocked nodes."""
        return frozenset(name for name, entry in self.nodes.items() if entry.blocked)

    @cached_property
    def taken_names(self) -> frozenset[str]:
        """The API server's endpoints and all nodes' names, which are looked up for each certificate of a pod."""
        of_nodes = (name for node, entry in self.nodes.items() for name in (node, *entry.names))
        return frozenset((*(text.lower() for text in self.cluster.endpoints), *of_nodes))

    def is_never_a_nodes(self, san: San, node: str) -> bool:
        """Whether a name or address is the API's, a service's, a loopback or another control-plane node's."""
        kind, value = san
        if kind == "IP":
            return self._is_never_an_address(value, node)
        name = value.lower().rstrip(".")
        domain = self.cluster.service_domain
        return (
            kind != "DNS"
            or not is_host_name(name)
            or name in (*_LOCAL, *_SERVICE_LABELS)
            or name.endswith((".localhost", ".svc", f".{domain}"))
            or name == domain
            or name in {text.lower() for text in self.cluster.endpoints}
            or any(name == other or name in entry.names for other, entry in self._others(node))
        )

    def _is_never_an_address(self, value: str, node: str) -> bool:
        found = address(value)
        if found is None:
            return True
        mapped = getattr(found, "ipv4_mapped", None) or found
        return (
            mapped.is_loopback
            or mapped.is_unspecified
            or mapped.is_multicast
            or any(mapped in ipaddress.ip_network(network) for network in self.cluster.service_networks)
            or any(mapped == address(text) for text in self.cluster.endpoints)
            or any(mapped == address(text) for _, entry in self._others(node) for text in entry.addresses)
        )

    def _others(self, node: str) -> Iterator[tuple[str, NodeEntry]]:
        return ((name, entry) for name, entry in self.control_planes.items() if name != node)


def parse(text: str, file: Path | None = None) -> Inventory:
    """Parse the inventory from TOML text."""
    reader, document = opened(text, file)
    tables = reader.tables(document, ("cluster", "node"))
    cluster = reader.read(ClusterEntry, tables["cluster"], ("cluster",)) or ClusterEntry()
    nodes = reader.each(NodeEntry, tables["node"], ("node",), is_node_name, "a node's name")
    inventory = Inventory(cluster=cluster, nodes=nodes)
    for name, entry in nodes.items():
        for san in sorted(entry.sans(name)):
            if inventory.is_never_a_nodes(san, name):
                reader.add(("node", name), "none of the API's, of services or of another control-plane node", san[1])
    reader.raise_problems()
    return inventory
