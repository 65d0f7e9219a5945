"""
Orders: the cluster's configuration, its CA certificates and the node's identity, carried to a new node.

An order from an administrator's machine holds no secret, but it decides which programs the node runs and which CAs it
trusts, so it can be signed. An order that a control-plane node shares may hold the service account key, and goes
through a pipe. No field can hold a CA's or a node's key.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import sys
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography import x509

from bridge.bootstrap import (
    ROLES,
    Places,
    Role,
    assert_usable,
    for_node,
    gather_authorities,
    live,
    read_configuration,
    shared,
)
from bridge.desk.files import load_signing_key
from bridge.errors import BridgeError, Exit
from bridge.node.kubeadm_config import KubeadmConfig, KubeadmConfigError, parse_documents
from bridge.node.pairs import is_sa_pair
from bridge.pki import kubeadm_names, signatures
from bridge.pki.budget import MOST_BYTES, OverBudgetError, json_of
from bridge.pki.certificates import load_pem_certificates, pem
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES
from bridge.system.codec import named, to_json
from bridge.system.console import log
from bridge.system.files import held_directory, write_atomically
from bridge.system.paths import UnreadableError, open_secret, read, read_present, read_public_key

_SCHEMA, _VERSION = "ca-bridge/new-node", 1
_KEYS = frozenset({"schema", "version", "cluster", "authorities", "node", "serviceAccount", "signature"})


class OrderError(BridgeError):
    """The order can't be read, or has forbidden content."""

    exit_code = Exit.USAGE
    hint = "`ca-bridge bootstrap orders` and `ca-bridge bootstrap share` write them; carry it again, unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewNode:
    """The new node: its role, name and addresses."""

    role: Role
    name: str
    addresses: tuple[str, ...]  #: The first is the node's own; all are in its kubelet's serving certificate.
    socket: str = field(default="", metadata=named("criSocket"))  #: The container runtime's; empty: kubeadm's default.


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """An order: the cluster, its CAs, and the new node's identity."""

    cluster: KubeadmConfig  #: The ClusterConfiguration, and other documents that all nodes share.
    authorities: Mapping[str, tuple[x509.Certificate, ...]]
    node: NewNode | None = None  #: None: the operator on the node names it.
    sa: tuple[bytes, bytes] | None = field(default=None, repr=False)  #: sa.key and sa.pub.
    signature: bytes | None = None  #: Over `message`; None: it is not signed.


def dumps(order: Order) -> bytes:
    """Return an order as the content of its file."""
    document = _document(order)
    if order.signature is not None:
        document["signature"] = b64encode(order.signature).decode()
    return json.dumps(document, indent=1).encode() + b"\n"


def digest(order: Order) -> str:
    """Return the SHA-256 (hex) of an order, without its signature."""
    return sha256(json.dumps(_document(order), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def message(order: Order) -> bytes:
    """Return the bytes that an administrator signs: a prefix for orders alone, and the digest."""
    return b"ca-bridge order 1\n" + digest(order).encode()


def _document(order: Order) -> dict[str, Any]:
    document: dict[str, Any] = {
        "schema": _SCHEMA,
        "version": _VERSION,
        "cluster": order.cluster.text(),
        "authorities": {name: pem(*certificates).decode() for name, certificates in order.authorities.items()},
    }
    if order.node is not None:
        document["node"] = to_json(order.node)
    if order.sa is not None:
        document["serviceAccount"] = {"key": order.sa[0].decode(), "public": order.sa[1].decode()}
    return document


def loads(data: bytes) -> Order:
    """Parse an order, and check every field; no error shows a key."""
    try:
        document = json_of(data, pairs=_once)
    except OverBudgetError as e:
        raise OrderError(f"wanted an order: {e}") from None
    except ValueError:
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
    """Refuse a repeated key in a JSON object, since two readers may take different values of it."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError
    return values


def _cluster(value: object) -> KubeadmConfig:
    if not isinstance(value, str):
        raise OrderError("cluster: wanted kubeadm's configuration as text, found something else")
    try:
        found = parse_documents(value.encode())
    except KubeadmConfigError as e:
        raise OrderError(f"cluster: {e}") from None
    if not found.cluster:
        raise OrderError("cluster: there is no ClusterConfiguration in it")
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
    """Check a node's role, name and addresses."""
    if role not in ROLES:
        raise OrderError(f"role: wanted one of {', '.join(ROLES)}, found {role[:40]!r}")
    if not kubeadm_names.is_node_name(name):
        raise OrderError(f"name: wanted a node's name in small letters, found {name[:80]!r}")
    if not addresses:
        raise OrderError(f"{name}: its IP address is missing")
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


def read_nodes(path: Path) -> list[NewNode]:
    """Read a list of nodes: `ROLE NAME ADDRESS …` on each line, and at most one `init`."""
    try:
        listed = kubeadm_names.parse_nodes((read(path) or b"").decode(), with_roles=True)
    except (UnreadableError, UnicodeDecodeError) as e:
        hint = "a line is `ROLE NAME ADDRESS …`"
        raise OrderError(f"{path}: wanted a list of nodes, found: {e}", hint=hint) from None
    except ValueError as e:
        raise OrderError(f"{path}: {e}", hint=_LINE) from None
    found: list[NewNode] = []
    for node in listed:
        where = f"{path}: line {node.line}"
        try:
            found.append(new_node(node.role, node.name, node.addresses))
        except OrderError as e:
            raise OrderError(f"{where}: {e}", hint=_LINE) from None
        if [one.role for one in found].count("init") > 1:
            raise OrderError(f"{where}: wanted one node for `kubeadm init`, found another one", hint=_FIRST)
    if not found:
        raise OrderError(f"{path}: there is no node in it", hint=_LINE)
    return found


def order_for(cluster: KubeadmConfig, authorities: Mapping[str, tuple[x509.Certificate, ...]], node: NewNode) -> Order:
    """Return the order that an administrator's machine sends to a node; it holds no secret."""
    ours = {name: found for name, found in authorities.items() if node.role != "worker" or name == "ca"}
    return Order(cluster=shared(cluster), authorities=ours, node=node)


_PUBLIC = 0o644
_IN_ORDERS = ("apiVersion", "kind", "nodeRegistration.name", "localAPIEndpoint.advertiseAddress")


def share(settings: Settings, config: Path | None, now: datetime, *, worker: bool) -> bytes:
    """Return an order, as bytes, with everything that a further node needs from this one."""
    cluster = read_configuration(config or Places.of(settings).kubeadm_config)[0]
    places = Places.of(settings, cluster)
    found = gather_authorities(settings, places, "worker" if worker else "control-plane", None, {}, now)
    if worker:
        return dumps(Order(cluster=shared(cluster), authorities=found))
    key, public = live(places.sa_key), live(places.sa_public)
    if key is None or public is None or not is_sa_pair(key, public):
        raise OrderError(
            f"{places.sa_key}: there is no pair of the service account key and {places.sa_public.name}",
            hint="run it on a control-plane node; for a worker there is --worker",
        )
    return dumps(Order(cluster=shared(cluster), authorities=found, sa=(key, public)))


def read_order(path: Path) -> Order:
    """Read an order from a file, or from standard input (`-`); refuse a file with a key that other users can read."""
    if str(path) == "-":
        return loads(sys.stdin.buffer.read(MOST_BYTES + 1))
    try:
        order = loads(read_present(path))
    except UnreadableError as e:
        raise OrderError(f"{path}: wanted an order, found: {e}") from None
    except OrderError as e:
        raise OrderError(f"{path}: {e}", hint=e.hint) from None
    if order.sa is not None and (found := open_secret(path)) is not None:
        raise OrderError(
            str(found), hint="a user who can read it can act as any service account: send it through a pipe"
        )
    return order


def read_signed_order(settings: Settings, path: Path) -> Order:
    """Read an order, and refuse one without a valid signature if the settings have a key for it."""
    order, file = read_order(path), settings.node.order_key
    if file is None:
        return order
    key = read_public_key(file, "node.order_key")
    if order.signature is None or not signatures.is_by(key, order.signature, message(order)):
        found = "no signature" if order.signature is None else "another signature, or an order that was changed later"
        text = f"{path}: wanted an order that is signed with the key of {file}, found {found}"
        hint = (
            "`ca-bridge bootstrap orders --sign-with KEY` signs them; node.order_key in the settings names whose count"
        )
        raise BridgeError(text, hint=hint, exit_code=Exit.REFUSED)
    return order


def write_orders(
    settings: Settings,
    nodes: Path,
    config: Path,
    ca_dir: Path | None,
    directory: Path,
    sign_with: Path | None,
    now: datetime,
) -> dict[NewNode, tuple[Path, Order]]:
    """Write an order for each node of a list, never over a different order; return each node's file and order."""
    key = load_signing_key(sign_with, "--sign-with", "orders") if sign_with is not None else None
    listed = read_nodes(nodes)
    cluster = read_configuration(config)[0]
    if not cluster.cluster:
        raise KubeadmConfigError(f"{config}: there is no ClusterConfiguration in it")
    if left_out := [*_left_out(cluster)]:
        log.warning("%s: no order has its %s, since that is a node's own", config, ", ".join(left_out))
        hint = "without them a node gets kubeadm's defaults; a further one may have its own JoinConfiguration: --kubeadm-config"
        log.warning("%s", hint, extra={"is_hint": True})
    for node in listed:
        if node.role != "worker":
            config_of_node = for_node(cluster, node.name, node.addresses[0])
            assert_usable(config_of_node, str(settings.node.pki_dir), further=node.role != "init")
    found = gather_authorities(settings, Places.of(settings, cluster), "control-plane", ca_dir, {}, now)
    made = {node: (directory / f"{node.name}.order.json", order_for(cluster, found, node)) for node in listed}
    for path, order in made.values():
        if not _is_older(path, order):
            raise OrderError(f"{path}: another order is there already", hint="name an empty directory")
    with held_directory(directory) as held:
        for path, order in made.values():
            signature = signatures.sign(key, message(order)) if key is not None else None
            write_atomically(held / path.name, dumps(dataclasses.replace(order, signature=signature)), _PUBLIC)
    return made


def _left_out(config: KubeadmConfig) -> Iterator[str]:
    """Yield a node's own fields that orders leave out: all but name and address, which the list has."""
    for key, value in (config.of_kind("InitConfiguration") or {}).items():
        inner = [f"{key}.{one}" for one in value] if isinstance(value, dict) else [key]
        yield from (one for one in inner if one not in _IN_ORDERS)


def _is_older(path: Path, order: Order) -> bool:
    """Return whether there is no file, or the same order from an earlier run, signed or not."""
    data = live(path)
    try:
        return data is None or digest(loads(data)) == digest(order)
    except OrderError:
        return False
