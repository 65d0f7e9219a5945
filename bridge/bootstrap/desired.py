"""A new node as desired, the result of its bootstrap, and the errors that prevent it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509

from bridge.bootstrap import (
    Certificates,
    ConfigurationFacts,
    Places,
    Role,
    for_node,
    from_facts,
    join_configuration,
    read_configuration,
)
from bridge.bootstrap.orders import NewNode, Order, OrderError, new_node
from bridge.errors import BridgeError, Exit
from bridge.node.kubeadm_config import KubeadmConfig, KubeadmConfigError
from bridge.renewal.verify_and_install import Result
from bridge.settings.tables import Settings
from bridge.specs import KUBELET_CONF


class LeftoversError(BridgeError):
    """Some of the files exist, from an unknown source."""

    exit_code = Exit.USAGE
    hint = "move them away; kubeadm would use a mixture of files and fail minutes later"


class NotWholeError(BridgeError):
    """The node's files are not what kubeadm needs."""

    exit_code = Exit.REFUSED
    hint = "nothing was changed; kubeadm itself checks less than this"


class OtherNodeDesiredError(BridgeError):
    """An earlier run has begun another node, or another configuration."""

    exit_code = Exit.USAGE
    hint = "run it as before, or with --anew: that discards its keys, so answers for them are refused"


@dataclass(frozen=True, kw_only=True)
class NodeInputs:
    """The operator's options of `bootstrap init` and `bootstrap join`."""

    facts: ConfigurationFacts = field(default_factory=ConfigurationFacts)
    config: Path | None = None  #: kubeadm's configuration.
    order: Order | None = None
    given: Order | None = field(default=None, repr=False)  #: The output of `bootstrap share` on another node.
    ca_dir: Path | None = None
    kubeadm: str = "kubeadm"
    keep: Path | None = None
    request: Path | None = None
    answers: tuple[Path, ...] = ()
    anew: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredNode:
    """The new node that a bootstrap makes."""

    role: Role
    inputs: NodeInputs
    places: Places
    config: KubeadmConfig  #: The node's InitConfiguration and ClusterConfiguration; a worker's has the names only.
    text: bytes  #: `config` as kubeadm will read it.
    files: Mapping[Path, bytes] = field(default_factory=dict)  #: Files that kubeadm reads, by path.
    serving: tuple[str, ...] = ()  #: Names and addresses in the kubelet's serving certificate.
    carried: Certificates = field(default_factory=dict)  #: CA certificates that came with an order.

    @property
    def node(self) -> str:
        """The node's name in the cluster."""
        return self.config.name

    @property
    def server(self) -> str:
        """The server in a worker's kubelet.conf."""
        return f"https://{self.config.endpoint}" if self.role == "worker" else ""

    @property
    def sa(self) -> tuple[bytes, bytes] | None:
        """Another node's sa.key and sa.pub."""
        return self.inputs.given.sa if self.inputs.given is not None else None

    @property
    def mark(self) -> str:
        """Everything that determines the files, as one text, to compare with an earlier run's."""
        more = [other for other in self.serving if other != self.node]
        return "\n".join([self.text.decode(), *more, self.server])


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrapped(Result):
    """The result of `bootstrap init` or `bootstrap join`; errors are about answers to other requests, or the audit log."""

    node: str
    files: int = 0  #: The number of installed files.
    is_complete: bool = False
    from_kept: bool = False


#: A preflight error of `kubeadm join` about the pre-signed kubelet.conf, which replaces a bootstrap token.
_IGNORED = "FileAvailable--etc-kubernetes-kubelet.conf"


def of_init(settings: Settings, inputs: NodeInputs) -> DesiredNode:
    """Return the first control-plane node as desired."""
    node = None
    if inputs.order is not None:
        node = _ordered(inputs.order, ("init",))
        config = for_node(inputs.order.cluster, node.name, node.addresses[0], node.socket)
        data = config.text().encode()
    elif inputs.config is not None:
        config, data = read_configuration(inputs.config)
    else:
        config = from_facts(inputs.facts)
        data = config.text().encode()
    places = Places.of(settings, config)
    is_in_place = inputs.config is not None and inputs.config.absolute() == places.kubeadm_config
    files = {} if is_in_place else {places.kubeadm_config: data}
    addresses = node.addresses if node is not None else (config.address, *config.node_ips)
    serving, cas = settings.serving_sans or tuple(dict.fromkeys((config.name, *addresses))), _carried(inputs)
    return DesiredNode(
        role="init", inputs=inputs, places=places, config=config, text=data, files=files, serving=serving, carried=cas
    )


def of_join(settings: Settings, inputs: NodeInputs, role: Role | None) -> DesiredNode:
    """Return a further node as desired; without `role` the order decides."""
    cluster, own = _cluster(inputs)
    node = _joining(inputs, own, role)
    base = own.of_kind("JoinConfiguration")
    mine = KubeadmConfig.of([base] if base else [])  # an InitConfiguration beside it may be another node's
    config = for_node(cluster, node.name, node.addresses[0], node.socket, mine.bind_port or 0)
    if node.role == "worker" and not config.endpoint:
        raise KubeadmConfigError(
            "controlPlaneEndpoint is missing: the address by which a worker reaches the control plane",
            hint="it is in the ClusterConfiguration of the first node",
        )
    places = Places.of(settings, config)
    is_worker = node.role == "worker"
    discovery = places.kubeconfigs / (KUBELET_CONF if is_worker else "admin.conf")
    joining = join_configuration(config, str(discovery), _IGNORED, control_plane=not is_worker, base=base)
    text = config.text().encode()
    files = {places.join_config: joining.text().encode(), **({} if is_worker else {places.kubeadm_config: text})}
    serving = settings.serving_sans or tuple(dict.fromkeys((node.name, *node.addresses, *mine.node_ips)))
    role, cas = node.role, _carried(inputs)
    return DesiredNode(
        role=role, inputs=inputs, places=places, config=config, text=text, files=files, serving=serving, carried=cas
    )


def _cluster(inputs: NodeInputs) -> tuple[KubeadmConfig, KubeadmConfig]:
    """Return the cluster's configuration, which must be the same in all sources, and this node's own."""
    own = read_configuration(inputs.config)[0] if inputs.config is not None else KubeadmConfig()
    sources = [order.cluster for order in (inputs.order, inputs.given) if order is not None]
    sources += [own] if own.cluster else []
    if not sources:
        raise KubeadmConfigError(
            "the cluster's ClusterConfiguration is missing",
            hint="`ca-bridge bootstrap share` on a control-plane node gives it, or --kubeadm-config names its file",
        )
    if any(source.cluster != sources[0].cluster for source in sources):
        raise OrderError(
            "cluster: wanted the same ClusterConfiguration from all sources, found another one",
            hint="one of the files belongs to another cluster, or is older",
        )
    return sources[0], own


def _joining(inputs: NodeInputs, own: KubeadmConfig, role: Role | None) -> NewNode:
    if inputs.order is not None and inputs.order.node is not None:
        found = _ordered(inputs.order, (role,) if role else ("control-plane", "worker"))
        if inputs.facts.given():
            raise OrderError("wanted either an order or the facts themselves, found both", hint="leave the flags out")
        return found
    if role is None:
        raise OrderError("one of these is missing: --control-plane, --worker, or an order that says which", hint="")
    facts = inputs.facts
    address = facts.address or own.address
    try:
        return new_node(role, facts.name or own.name, [address] if address else [], facts.socket or own.socket)
    except OrderError as e:
        e.hint = "--name and --advertise-address say them, or a configuration that --kubeadm-config names"
        raise


def _ordered(order: Order, roles: tuple[Role, ...]) -> NewNode:
    node = order.node
    if node is None or node.role not in roles:
        found = f"one for {node.name} as {node.role}" if node is not None else "one without a node"
        right = "init" if node is not None and node.role == "init" else "join"
        hint = f"`ca-bridge bootstrap {right} --order FILE` takes that one" if node is not None else ""
        raise OrderError(f"wanted an order for a node as {' or '.join(roles)}, found {found}", hint=hint)
    return node


def _carried(inputs: NodeInputs) -> dict[str, tuple[x509.Certificate, ...]]:
    """Return the CAs of the order and of another node, which must agree, since each CA in a file is trusted."""
    cas: dict[str, tuple[x509.Certificate, ...]] = {}
    for order in (inputs.order, inputs.given):
        for name, certificates in order.authorities.items() if order is not None else ():
            if cas.setdefault(name, certificates) != certificates:
                raise OrderError(
                    f"authorities.{name}: wanted the same CA in the order and from the other node, found two",
                    hint="one of the two belongs to another cluster",
                )
    return cas
