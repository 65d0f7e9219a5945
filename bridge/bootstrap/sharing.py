"""What a control-plane node gives to the next one, and an administrator's machine to all."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bridge.bootstrap import authorities, orders
from bridge.bootstrap.configuration import ConfigurationFacts, assert_usable, for_node, shared
from bridge.bootstrap.orders import NewNode, Order, OrderError
from bridge.bootstrap.places import Places, live
from bridge.bootstrap.service_account import is_sa_pair
from bridge.bootstrap.wishes import order_for, read_configuration
from bridge.desk.files import load_signing_key
from bridge.errors import BridgeError, Exit, SettingsError, SettingsProblem
from bridge.node.kubeadm_config import KubeadmConfigError
from bridge.pki import signatures
from bridge.pki.display import fingerprint_text
from bridge.settings.tables import Settings
from bridge.system.files import write_atomically
from bridge.system.paths import UnreadableError, open_secret, read

_PUBLIC = 0o644
_MOST_BYTES = 1 << 20


class SharingError(BridgeError):
    """Something that is to be shared is not there."""

    exit_code = Exit.USAGE


def share(settings: Settings, places: Places, config: Path, now: datetime, *, worker: bool) -> bytes:
    """
    An order (its bytes) with all that a further node needs from this one.

    Args:
        settings: Of this node.
        places: Of this node.
        config: kubeadm's configuration with the ClusterConfiguration.
        now: Aware, UTC.
        worker: Without the service account key.

    Raises:
        SharingError, BridgeError: Something is not there, or not as it should be.
    """
    cluster = read_configuration(config)[0]
    found = authorities.gather(settings, places, "worker" if worker else "control-plane", None, {}, now)
    if worker:
        return orders.dumps(Order(cluster=shared(cluster), authorities=found))
    key, public = live(places.sa_key), live(places.sa_public)
    if key is None or public is None or not is_sa_pair(key, public):
        raise SharingError(
            f"{places.sa_key}: wanted the service account key and {places.sa_public.name}, found no such pair",
            hint="run it on a control-plane node; for a worker there is --worker",
        )
    return orders.dumps(Order(cluster=shared(cluster), authorities=found, sa=(key, public)))


def read_order(path: Path) -> Order:
    """
    An order, or what a node shares; `-` is standard input. One with a key in it must be for its owner alone.

    Raises:
        OrderError: It can't be read, or others can read the key in it.
    """
    if str(path) == "-":
        return orders.loads(sys.stdin.buffer.read(_MOST_BYTES + 1))
    try:
        data = read(path)
    except UnreadableError as e:
        raise OrderError(f"{path}: wanted an order, found: {e}") from None
    if data is None:
        raise OrderError(f"{path}: wanted an order, found no file")
    try:
        order = orders.loads(data)
    except OrderError as e:
        raise OrderError(f"{path}: {e}", hint=e.hint) from None
    if order.sa is not None and (found := open_secret(path)) is not None:
        raise OrderError(str(found), hint="whoever could read it can be any service account: send it through a pipe")
    return order


class UnsignedOrderError(BridgeError):
    """The settings name a key for orders, and somebody else made this one."""

    exit_code = Exit.REFUSED
    hint = "`ca-bridge bootstrap orders --sign-with KEY` signs them; node.order_key in the settings names whose count"


def read_signed_order(settings: Settings, path: Path) -> Order:
    """
    An order; signed, where the settings name who signs.

    Raises:
        OrderError: It can't be read.
        UnsignedOrderError: It has no signature by `node.order_key`.
    """
    order, file = read_order(path), settings.node.order_key
    if file is None:
        return order
    try:
        key = signatures.public_key(read(file) or b"")
    except (UnreadableError, ValueError) as e:
        wanted = str(e) if isinstance(e, ValueError) else "a certificate or a public key in PEM"
        raise SettingsError([SettingsProblem("node.order_key", wanted, f"something else in {file}")]) from None
    if order.signature is None or not signatures.is_by(key, order.signature, orders.message(order)):
        found = (
            "no signature" if order.signature is None else "another signature, or something that was changed after it"
        )
        raise UnsignedOrderError(f"{path}: wanted an order that is signed with the key of {file}, found {found}")
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """An order on its way."""

    node: NewNode
    path: Path
    fingerprint: str  #: To be compared on the node by another way.


def write_orders(
    settings: Settings,
    places: Places,
    nodes: Path,
    config: Path,
    ca_dir: Path | None,
    directory: Path,
    sign_with: Path | None,
    now: datetime,
) -> list[Written]:
    """
    An order for each node of a list, on an administrator's machine; never over an older one of another content.

    Args:
        settings: Backends tell the CA certificates that `ca_dir` does not.
        places: In place of them nothing is expected here.
        nodes: The list; see `orders.parse_nodes`.
        config: kubeadm's configuration with the ClusterConfiguration.
        ca_dir: CA certificates.
        directory: Is made if it is not there.
        sign_with: A private key; None: they are not signed.
        now: Aware, UTC.

    Raises:
        OrderError, KubeadmConfigError, BridgeError: Nothing was written.
    """
    key = load_signing_key(sign_with, "--sign-with", "orders") if sign_with is not None else None
    listed = _listed(nodes)
    cluster = read_configuration(config)[0]
    if not cluster.cluster:
        raise KubeadmConfigError(f"{config}: wanted a ClusterConfiguration, found none")
    for node in listed:
        if node.role != "worker":
            facts = ConfigurationFacts(name=node.name, address=node.addresses[0])
            assert_usable(for_node(cluster, facts), str(settings.node.pki_dir), further=node.role != "init")
    found = authorities.gather(settings, places, "control-plane", ca_dir, {}, now)
    made = {node: (directory / f"{node.name}.order.json", order_for(cluster, found, node)) for node in listed}
    for path, order in made.values():
        if not _is_older(path, order):
            raise OrderError(f"{path}: wanted no file, found another order", hint="name an empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    for path, order in made.values():
        signature = signatures.sign(key, orders.message(order)) if key is not None else None
        write_atomically(path, orders.dumps(dataclasses.replace(order, signature=signature)), _PUBLIC)
    return [
        Written(node=node, path=path, fingerprint=fingerprint_text(orders.digest(order)))
        for node, (path, order) in made.items()
    ]


def _is_older(path: Path, order: Order) -> bool:
    """Whether nothing is there, or the same by an earlier run, signed or not."""
    data = live(path)
    try:
        return data is None or orders.digest(orders.loads(data)) == orders.digest(order)
    except OrderError:
        return False


def _listed(path: Path) -> Sequence[NewNode]:
    try:
        data = read(path)
        text = (data or b"").decode()
    except (UnreadableError, UnicodeDecodeError) as e:
        raise OrderError(
            f"{path}: wanted a list of nodes, found: {e}", hint="a line is `ROLE NAME ADDRESS …`"
        ) from None
    try:
        return orders.parse_nodes(text)
    except OrderError as e:
        raise OrderError(f"{path}: {e}", hint=e.hint) from None
