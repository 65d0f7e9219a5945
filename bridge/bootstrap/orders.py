"""
Orders: the cluster's configuration, its CA certificates and the node's identity, carried to a new node.

An order from an administrator's machine holds no secret, but it decides which programs the node runs and which CAs it
trusts, so it can be signed. An order that a control-plane node shares may hold the service account key, and goes
through a pipe. No field can hold a CA's or a node's key.
"""

from __future__ import annotations

import ipaddress
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal

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
from bridge.errors import BridgeError, Exit, converted
from bridge.node.kubeadm_config import KubeadmConfig, KubeadmConfigError, parse_documents
from bridge.node.pairs import is_sa_pair
from bridge.pki import kubeadm_names, signatures
from bridge.pki.budget import MOST_BYTES, OverBudgetError, json_of
from bridge.pki.bundle import BundleError
from bridge.pki.bundle_format import each_once
from bridge.pki.certificates import load_pem_certificates, pem
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES
from bridge.system.codec import CodecError, from_json, left_out, named, to_json
from bridge.system.console import log
from bridge.system.files import held_directory, reasons, write_atomically
from bridge.system.paths import UnreadableError, open_secret, read, read_present, read_public_key

_SCHEMA: Final = "ca-bridge/new-node"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _ServiceAccount:
    key_pem: bytes = field(repr=False)
    public_pem: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderDocument:
    """An order as JSON."""

    schema: Literal["ca-bridge/new-node"] = _SCHEMA
    version: Literal[1] = 1
    cluster: str
    authorities: Mapping[str, str]
    node: NewNode | None = field(default=None, metadata=left_out())
    service_account: _ServiceAccount | None = field(
        default=None, metadata={**named("serviceAccount"), **left_out()}, repr=False
    )
    signature: bytes | None = field(default=None, metadata=left_out())


def dumps(order: Order) -> bytes:
    """Return an order as the content of its file."""
    return json.dumps(to_json(_document(order)), indent=1).encode() + b"\n"


def digest(order: Order) -> str:
    """Return the SHA-256 (hex) of an order, without its signature."""
    document = to_json(replace(_document(order), signature=None))
    return sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def message(order: Order) -> bytes:
    """Return the bytes that an administrator signs: a prefix for orders alone, and the digest."""
    return b"ca-bridge order 1\n" + digest(order).encode()


def _document(order: Order) -> OrderDocument:
    cas = {name: pem(*certificates).decode() for name, certificates in order.authorities.items()}
    account = None if order.sa is None else _ServiceAccount(key_pem=order.sa[0], public_pem=order.sa[1])
    document = OrderDocument(cluster=order.cluster.text(), authorities=cas, node=order.node, service_account=account)
    return replace(document, signature=order.signature)


def loads(data: bytes) -> Order:
    """Parse an order, and check every field; no error shows a key."""
    try:
        values = json_of(data, pairs=each_once)
    except OverBudgetError as e:
        raise OrderError(f"wanted an order: {e}") from None
    except (ValueError, BundleError):
        values = None  # not raised here, since a traceback could lead to the text, which may hold a key
    if not isinstance(values, dict) or values.get("schema") != _SCHEMA:
        raise OrderError("wanted an order in JSON, found something else")
    with converted(CodecError, OrderError, "wanted an order of version 1: "):
        document = from_json(OrderDocument, values)
    node, account = document.node, document.service_account
    if account is not None and not is_sa_pair(account.key_pem, account.public_pem):
        raise OrderError("serviceAccount: wanted a key and its public key in PEM, found something else")
    if node is not None and not node.socket.isprintable():
        raise OrderError("node: wanted a socket of printable characters, found others")
    cluster = _cluster(document.cluster)
    cas = {name: _authority(name, text) for name, text in document.authorities.items()}
    checked = None if node is None else new_node(node.role, node.name, node.addresses, node.socket)
    sa = None if account is None else (account.key_pem, account.public_pem)
    return Order(cluster=cluster, authorities=cas, node=checked, sa=sa, signature=document.signature)


def _cluster(text: str) -> KubeadmConfig:
    with converted(KubeadmConfigError, OrderError, "cluster: "):
        documents = parse_documents(text.encode())
    if not documents.cluster:
        raise OrderError("cluster: there is no ClusterConfiguration in it")
    return documents


def _authority(name: str, text: str) -> tuple[x509.Certificate, ...]:
    if name not in AUTHORITIES or "PRIVATE KEY" in text:
        raise OrderError(f"authorities: wanted certificates of {', '.join(AUTHORITIES)}, found something else")
    with converted(ValueError, OrderError, f"authorities.{name}: wanted certificates in PEM, found "):
        return tuple(load_pem_certificates(text.encode()))


def new_node(role: str, name: str, addresses: Sequence[str], socket: str = "") -> NewNode:
    """Check a node's role, name and addresses."""
    if role not in ROLES:
        raise OrderError(f"role: wanted one of {', '.join(ROLES)}, found {role[:40]!r}")
    if not kubeadm_names.is_node_name(name):
        raise OrderError(f"name: wanted a node's name in small letters, found {name[:80]!r}")
    if not addresses:
        raise OrderError(f"{name}: its IP address is missing")
    for address in addresses:
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise OrderError(f"{name}: wanted an IP address, found {address[:80]!r}") from None
    return NewNode(role=role, name=name, addresses=tuple(addresses), socket=socket)


_LINE = "a line is `ROLE NAME ADDRESS …`, with each name and address once"
_FIRST = "further nodes with a control plane have the role control-plane"


def read_nodes(path: Path) -> list[NewNode]:
    """Read a list of nodes: `ROLE NAME ADDRESS …` on each line, and at most one `init`."""
    unreadable, prefix = (UnreadableError, UnicodeDecodeError), f"{path}: wanted a list of nodes, found: "
    with converted(unreadable, OrderError, prefix, hint="a line is `ROLE NAME ADDRESS …`"):
        text = (read(path) or b"").decode()
    with converted(ValueError, OrderError, f"{path}: ", hint=_LINE):
        listed = kubeadm_names.parse_nodes(text, with_roles=True)
    nodes: list[NewNode] = []
    for node in listed:
        where = f"{path}: line {node.line}"
        with converted(OrderError, OrderError, f"{where}: ", hint=_LINE):
            nodes.append(new_node(node.role, node.name, node.addresses))
        if [node.role for node in nodes].count("init") > 1:
            raise OrderError(f"{where}: wanted one node for `kubeadm init`, found another one", hint=_FIRST)
    if not nodes:
        raise OrderError(f"{path}: there is no node in it", hint=_LINE)
    return nodes


def order_for(cluster: KubeadmConfig, authorities: Mapping[str, tuple[x509.Certificate, ...]], node: NewNode) -> Order:
    """Return the order that an administrator's machine sends to a node; it holds no secret."""
    certificates = {name: anchors for name, anchors in authorities.items() if node.role != "worker" or name == "ca"}
    return Order(cluster=shared(cluster), authorities=certificates, node=node)


_IN_ORDERS = ("apiVersion", "kind", "nodeRegistration.name", "localAPIEndpoint.advertiseAddress")


def share(settings: Settings, config: Path | None, now: datetime, *, worker: bool) -> bytes:
    """Return an order, as bytes, with everything that a further node needs from this one."""
    cluster = read_configuration(config or Places.of(settings).kubeadm_config)[0]
    places = Places.of(settings, cluster)
    certificates = gather_authorities(settings, places, "worker" if worker else "control-plane", None, {}, now)
    if worker:
        return dumps(Order(cluster=shared(cluster), authorities=certificates))
    key, public = live(places.sa_key), live(places.sa_public)
    if key is None or public is None or not is_sa_pair(key, public):
        raise OrderError(
            f"{places.sa_key}: there is no pair of the service account key and {places.sa_public.name}",
            hint="run it on a control-plane node; for a worker there is --worker",
        )
    return dumps(Order(cluster=shared(cluster), authorities=certificates, sa=(key, public)))


def read_order(path: Path) -> Order:
    """Read an order from a file, or from standard input (`-`); refuse a file with a key that other users can read."""
    if str(path) == "-":
        return loads(sys.stdin.buffer.read(MOST_BYTES + 1))
    with reasons(OrderError, f"{path}: wanted an order, found"):
        data = read_present(path)
    try:
        order = loads(data)
    except OrderError as e:
        raise OrderError(f"{path}: {e}", hint=e.hint) from None
    if order.sa is not None and (trouble := open_secret(path)) is not None:
        raise OrderError(
            str(trouble), hint="a user who can read it can act as any service account: send it through a pipe"
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
    settings: Settings, nodes: Path, config: Path, ca_dir: Path | None, out: Path, sign_with: Path | None, now: datetime
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
    certificates = gather_authorities(settings, Places.of(settings, cluster), "control-plane", ca_dir, {}, now)
    made = {node: (out / f"{node.name}.order.json", order_for(cluster, certificates, node)) for node in listed}
    for path, order in made.values():
        if not _is_older(path, order):
            raise OrderError(f"{path}: another order is there already", hint="name an empty directory")
    with held_directory(out) as held:
        for path, order in made.values():
            signature = signatures.sign(key, message(order)) if key is not None else None
            write_atomically(held / path.name, dumps(replace(order, signature=signature)), 0o644)
    return made


def _left_out(config: KubeadmConfig) -> Iterator[str]:
    """Yield a node's own fields that orders leave out: all but name and address, which the list has."""
    for key, value in (config.of_kind("InitConfiguration") or {}).items():
        inner = [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]
        yield from (name for name in inner if name not in _IN_ORDERS)


def _is_older(path: Path, order: Order) -> bool:
    """Return whether there is no file, or the same order from an earlier run, signed or not."""
    data = live(path)
    try:
        return data is None or digest(loads(data)) == digest(order)
    except OrderError:
        return False
