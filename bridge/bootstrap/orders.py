"""
What is carried to a new node: its cluster's configuration and CA certificates, and who it is to be (pure: bytes, values).

An order comes from an administrator's machine and holds nothing secret, but whoever can change it decides which programs
the node runs and whom it trusts: so it can be signed. What a control-plane node shares with the next
one may hold the service account key, and goes through a pipe. There is no field for a CA's key, or for a node's.
"""

from __future__ import annotations

import ipaddress
import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from cryptography import x509

from bridge.bootstrap import configuration
from bridge.bootstrap.authorities import text as ca_text
from bridge.bootstrap.configuration import Configuration
from bridge.bootstrap.places import ROLES, Role
from bridge.bootstrap.service_account import is_sa_pair
from bridge.errors import BridgeError, Exit
from bridge.node.kubeadm_config import KubeadmConfigError
from bridge.pki import kubeadm_names
from bridge.pki.certificates import load_pem_certificates
from bridge.specs import AUTHORITIES

_SCHEMA, _VERSION = "ca-bridge/new-node", 1
_MOST_BYTES = 1 << 20
_KEYS = frozenset({"schema", "version", "cluster", "authorities", "node", "serviceAccount", "signature"})


class OrderError(BridgeError):
    """The order can't be read, or says what no order may say."""

    exit_code = Exit.USAGE
    hint = "`ca-bridge bootstrap orders` and `ca-bridge bootstrap share` write them; carry it again, unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewNode:
    """The new node: its role, name and addresses."""

    role: Role
    name: str
    addresses: tuple[str, ...]  #: The first is the node's own; all are in its kubelet's serving certificate.
    socket: str = ""  #: The container runtime's; empty: kubeadm's default.


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """An order: the cluster, its CAs, and who the new node is to be."""

    cluster: Configuration  #: The ClusterConfiguration, and others that are the same for all nodes.
    authorities: Mapping[str, tuple[x509.Certificate, ...]]
    node: NewNode | None = None  #: None: whoever gets it says who it is.
    sa: tuple[bytes, bytes] | None = field(default=None, repr=False)  #: sa.key and sa.pub.
    signature: bytes | None = None  #: Over `message`; None: nobody has signed it.


def dumps(order: Order) -> bytes:
    """The order as a file."""
    document = _document(order)
    if order.signature is not None:
        document["signature"] = b64encode(order.signature).decode()
    return json.dumps(document, indent=1).encode() + b"\n"


def digest(order: Order) -> str:
    """SHA-256 (hex) over all that it says."""
    return sha256(json.dumps(_document(order), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def message(order: Order) -> bytes:
    """The bytes that an administrator's signature is over: words of its own, and the digest."""
    return b"ca-bridge order 1\n" + digest(order).encode()


def _document(order: Order) -> dict[str, Any]:
    document: dict[str, Any] = {
        "schema": _SCHEMA,
        "version": _VERSION,
        "cluster": order.cluster.text(),
        "authorities": {name: ca_text(certificates).decode() for name, certificates in order.authorities.items()},
    }
    if order.node is not None:
        node = order.node
        document["node"] = {
            "role": node.role,
            "name": node.name,
            "addresses": list(node.addresses),
            "criSocket": node.socket,
        }
    if order.sa is not None:
        document["serviceAccount"] = {"key": order.sa[0].decode(), "public": order.sa[1].decode()}
    return document


def loads(data: bytes) -> Order:
    """
    Read one; every field is judged.

    Raises:
        OrderError: It is none. Its text holds nothing of the content.
    """
    if len(data) > _MOST_BYTES:
        raise OrderError(f"wanted an order, found {len(data)} bytes")
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        document = None  # not raised here, since a traceback could lead to the text, which may hold a key
    if not isinstance(document, dict) or document.get("schema") != _SCHEMA or document.get("version") != _VERSION:
        raise OrderError(f"wanted a JSON document of schema {_SCHEMA}, version {_VERSION}, found something else")
    if unknown := document.keys() - _KEYS:
        raise OrderError(f"wanted the fields {', '.join(sorted(_KEYS))}, found {len(unknown)} more")
    return Order(
        cluster=_cluster(document.get("cluster")),
        authorities=_authorities(document.get("authorities")),
        node=_node(document["node"]) if "node" in document else None,
        sa=_sa(document["serviceAccount"]) if "serviceAccount" in document else None,
        signature=_signature(document["signature"]) if "signature" in document else None,
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two values for one key, two readers may each take another."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError
    return values


def _cluster(value: object) -> Configuration:
    if not isinstance(value, str):
        raise OrderError("cluster: wanted kubeadm's configuration as text, found something else")
    try:
        found = configuration.parse(value.encode())
    except KubeadmConfigError as e:
        raise OrderError(f"cluster: {e}") from None
    if not found.cluster:
        raise OrderError("cluster: wanted a ClusterConfiguration, found none")
    return found


def _authorities(value: object) -> dict[str, tuple[x509.Certificate, ...]]:
    if not isinstance(value, dict) or not value.keys() <= AUTHORITIES.keys():
        raise OrderError(f"authorities: wanted certificates of {', '.join(AUTHORITIES)}, found something else")
    found = {}
    for name, text in value.items():
        if not isinstance(text, str) or "PRIVATE KEY" in text:
            raise OrderError(f"authorities.{name}: wanted certificates in PEM and nothing else, found something else")
        try:
            found[name] = tuple(load_pem_certificates(text.encode()))
        except ValueError as e:
            raise OrderError(f"authorities.{name}: wanted certificates in PEM, found {e}") from None
    return found


def _node(value: object) -> NewNode:
    if not isinstance(value, dict) or value.keys() != {"role", "name", "addresses", "criSocket"}:
        raise OrderError("node: wanted role, name, addresses and criSocket, found something else")
    addresses, socket = value["addresses"], value["criSocket"]
    if not isinstance(addresses, list) or not isinstance(socket, str) or not socket.isprintable():
        raise OrderError("node: wanted a list of addresses and a socket, found something else")
    return new_node(str(value["role"]), str(value["name"]), [str(one) for one in addresses], socket)


def new_node(role: str, name: str, addresses: Sequence[str], socket: str = "") -> NewNode:
    """
    Judge who a node is to be.

    Raises:
        OrderError: A role that is none, or what can't be a name or an address.
    """
    if role not in ROLES:
        raise OrderError(f"role: wanted one of {', '.join(ROLES)}, found {role[:40]!r}")
    if not kubeadm_names.is_node_name(name):
        raise OrderError(f"name: wanted a node's name in small letters, found {name[:80]!r}")
    if not addresses:
        raise OrderError(f"{name}: wanted its IP address, found none")
    for one in addresses:
        try:
            ipaddress.ip_address(one)
        except ValueError:
            raise OrderError(f"{name}: wanted an IP address, found {one[:80]!r}") from None
    return NewNode(role=role, name=name, addresses=tuple(addresses), socket=socket)


def _sa(value: object) -> tuple[bytes, bytes]:
    texts = (value.get("key"), value.get("public")) if isinstance(value, dict) else (None, None)
    pair = tuple(text.encode() for text in texts if isinstance(text, str))
    if len(pair) != len(texts) or not is_sa_pair(pair[0], pair[1]):
        raise OrderError("serviceAccount: wanted a key and its public key in PEM, found something else")
    return pair[0], pair[1]


def _signature(value: object) -> bytes:
    try:
        return b64decode(value, validate=True) if isinstance(value, str) else b""
    except ValueError:
        return b""


_LINE = "a line is `ROLE NAME ADDRESS …`, with each name and address once"
_FIRST = "further nodes with a control plane have the role control-plane"


def parse_nodes(text: str) -> list[NewNode]:
    """
    A list of nodes: `ROLE NAME ADDRESS …` a line, and one `init` at most.

    Raises:
        OrderError: With the number of the line.
    """
    try:
        listed = kubeadm_names.parse_nodes(text, with_roles=True)
    except ValueError as e:
        raise OrderError(str(e), hint=_LINE) from None
    found: list[NewNode] = []
    for node in listed:
        try:
            found.append(new_node(node.role, node.name, node.addresses))
        except OrderError as e:
            raise OrderError(f"line {node.line}: {e}", hint=_LINE) from None
        if [one.role for one in found].count("init") > 1:
            raise OrderError(f"line {node.line}: wanted one node for `kubeadm init`, found another one", hint=_FIRST)
    if not found:
        raise OrderError("wanted a list of nodes, found none", hint=_LINE)
    return found
