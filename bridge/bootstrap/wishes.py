"""What is to be made, from what the operator says: files, facts, an order, and what another node shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509

from bridge.bootstrap.configuration import (
    Configuration,
    ConfigurationFacts,
    for_node,
    from_facts,
    join_configuration,
    key_algorithm,
    parse,
    shared,
)
from bridge.bootstrap.orders import NewNode, Order, OrderError, new_node
from bridge.bootstrap.places import ETCD_DIRECTORY, Places, Role
from bridge.bootstrap.wish import NodeWish
from bridge.node.kubeadm_config import KubeadmConfigError, read_file
from bridge.settings.tables import Settings
from bridge.specs import KUBELET_CONF

_ADMIN = "admin.conf"
#: Of `kubeadm join`: the pre-signed kubelet.conf, which makes a bootstrap token needless.
_IGNORED = "FileAvailable--etc-kubernetes-kubelet.conf"


@dataclass(frozen=True, kw_only=True)
class Said:
    """The operator's options of `bootstrap init` and `bootstrap join`."""

    facts: ConfigurationFacts = ConfigurationFacts()  # noqa: RUF009 (frozen)
    config: Path | None = None  #: kubeadm's configuration.
    order: Order | None = None
    given: Order | None = field(default=None, repr=False)  #: What another node shares.
    ca_dir: Path | None = None
    kubeadm: str = "kubeadm"
    keep: Path | None = None
    request: Path | None = None
    answers: tuple[Path, ...] = ()
    anew: bool = False


def of_init(settings: Settings, said: Said) -> NodeWish:
    """
    The first control-plane node.

    Raises:
        KubeadmConfigError, OrderError: What is said can't be used.
    """
    node, data = None, b""
    if said.order is not None:
        node = _ordered(said.order, ("init",))
        config = for_node(said.order.cluster, _facts(node))
        data = config.text().encode()
    elif said.config is not None:
        config, data = read_configuration(said.config)
    else:
        config = from_facts(said.facts)
        data = config.text().encode()
    places = places_in(settings, config)
    is_in_place = said.config is not None and said.config.absolute() == places.kubeadm_config
    files = {} if is_in_place else {places.kubeadm_config: data}
    addresses = node.addresses if node is not None else (config.address,)
    return _wish("init", said, places, config, data, files, addresses)


def of_join(settings: Settings, said: Said, role: Role | None) -> NodeWish:
    """
    A further node.

    Args:
        settings: Where its files are.
        said: By the operator.
        role: None: the order says it.

    Raises:
        KubeadmConfigError, OrderError: What is said can't be used.
    """
    cluster, own = _cluster(said)
    node = _joining(said, own, role)
    config = for_node(cluster, _facts(node))
    if node.role == "worker" and not config.endpoint:
        raise KubeadmConfigError(
            "controlPlaneEndpoint: wanted the address by which a worker reaches the control plane, found none",
            hint="it is in the ClusterConfiguration of the first node",
        )
    places = places_in(settings, config)
    is_worker = node.role == "worker"
    discovery = places.kubeconfigs / (KUBELET_CONF if is_worker else _ADMIN)
    base = read_configuration(said.config)[0].of_kind("JoinConfiguration") if said.config is not None else None
    joining = join_configuration(config, str(discovery), _IGNORED, control_plane=not is_worker, base=base)
    files = {places.join_config: joining.text().encode()}
    if not is_worker:
        files[places.kubeadm_config] = config.text().encode()
    return _wish(node.role, said, places, config, config.text().encode(), files, node.addresses)


def _wish(
    role: Role,
    said: Said,
    places: Places,
    config: Configuration,
    text: bytes,
    files: Mapping[Path, bytes],
    addresses: tuple[str, ...],
) -> NodeWish:
    return NodeWish(
        role=role,
        places=places,
        config=config,
        text=text,
        kubeadm=said.kubeadm,
        files=files,
        addresses=addresses,
        server=f"https://{config.endpoint}" if role == "worker" else "",
        ca_dir=said.ca_dir,
        carried=_carried(said),
        sa=said.given.sa if said.given is not None else None,
        algorithm=key_algorithm(config),
        keep=said.keep,
        request=said.request,
        answers=said.answers,
        anew=said.anew,
    )


def _cluster(said: Said) -> tuple[Configuration, Configuration]:
    """The cluster's, the same from all who tell it; and what is said of this node beside it."""
    own = read_configuration(said.config)[0] if said.config is not None else Configuration(documents=())
    told = [one.cluster for one in (said.order, said.given) if one is not None]
    told += [own] if own.cluster else []
    if not told:
        raise KubeadmConfigError(
            "wanted the cluster's ClusterConfiguration, found none",
            hint="`ca-bridge bootstrap share` on a control-plane node gives it, or --kubeadm-config names its file",
        )
    if any(one.cluster != told[0].cluster for one in told):
        raise OrderError(
            "cluster: wanted the same ClusterConfiguration from all sources, found another one",
            hint="one of the files is another cluster's, or older",
        )
    return told[0], own


def _joining(said: Said, own: Configuration, role: Role | None) -> NewNode:
    if said.order is not None and said.order.node is not None:
        found = _ordered(said.order, (role,) if role else ("control-plane", "worker"))
        if said.facts.given():
            raise OrderError("wanted either an order or the facts themselves, found both", hint="leave the flags out")
        return found
    if role is None:
        raise OrderError("wanted --control-plane, --worker, or an order that says which, found none of them", hint="")
    facts = said.facts
    address = facts.address or own.address
    return new_node(role, facts.name or own.name, [address] if address else [], facts.socket or own.socket)


def _ordered(order: Order, roles: tuple[Role, ...]) -> NewNode:
    node = order.node
    if node is None or node.role not in roles:
        found = f"one for {node.name} as {node.role}" if node is not None else "one without a node"
        right = "init" if node is not None and node.role == "init" else "join"
        hint = f"`ca-bridge bootstrap {right} --order FILE` takes that one" if node is not None else ""
        raise OrderError(f"wanted an order for a node as {' or '.join(roles)}, found {found}", hint=hint)
    return node


def _carried(said: Said) -> dict[str, tuple[x509.Certificate, ...]]:
    """CA certificates of the order and of another node: all the same, since each in the file would be trusted."""
    found: dict[str, tuple[x509.Certificate, ...]] = {}
    for one in (said.order, said.given):
        for name, certificates in one.authorities.items() if one is not None else ():
            if found.setdefault(name, certificates) != certificates:
                raise OrderError(
                    f"authorities.{name}: wanted the same CA in the order and from the other node, found two",
                    hint="one of the two is another cluster's",
                )
    return found


def _facts(node: NewNode) -> ConfigurationFacts:
    return ConfigurationFacts(name=node.name, address=node.addresses[0], socket=node.socket)


def places_in(settings: Settings, config: Configuration) -> Places:
    """The places that the settings name; etcd's data is where kubeadm's configuration has it."""
    return places_of(settings, Path(config.etcd_directory or ETCD_DIRECTORY))


def places_of(settings: Settings, etcd: Path = ETCD_DIRECTORY) -> Places:
    """The places that the settings name."""
    node = settings.node
    return Places(pki=node.pki_dir, kubeconfigs=node.kubeconfig_dir, kubelet=node.kubelet_dir, etcd=etcd)


def read_configuration(path: Path) -> tuple[Configuration, bytes]:
    """
    Read kubeadm's configuration file.

    Raises:
        KubeadmConfigError: It can't be read, or is none.
    """
    data = read_file(path)
    return parse(data, str(path)), data


def together(files: Sequence[Path]) -> Configuration | None:
    """
    A node's configuration (the first file) with what others say of the cluster; None: the first is not there.

    Raises:
        KubeadmConfigError: One can't be read, or is none.
    """
    own, *others = [read_configuration(path)[0] if path.exists() else None for path in files]
    if own is None:
        return None
    cluster = [one for other in others if other is not None for one in shared(other).documents]
    return Configuration(documents=(*own.documents, *cluster))


def order_for(cluster: Configuration, authorities: Mapping[str, tuple[x509.Certificate, ...]], node: NewNode) -> Order:
    """The order that an administrator's machine sends to a node; nothing in it is secret."""
    ours = {name: found for name, found in authorities.items() if node.role != "worker" or name == "ca"}
    return Order(cluster=shared(cluster), authorities=ours, node=node)
