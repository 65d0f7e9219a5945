"""The other control-plane nodes: a restart waits for their health; a silent API is no obstacle."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import urlsplit

from bridge.cluster import apiserver_port, items, local_url, text_of, url_of
from bridge.cluster.api import Api, NoAnswerError
from bridge.control_plane.probes import Etcd, Member
from bridge.errors import PostponedError
from bridge.node import endpoints
from bridge.node.endpoints import Server
from bridge.node.inventory import Node
from bridge.pki.expiry import duration_text
from bridge.settings.tables import ClusterSettings, Settings
from bridge.specs import Component
from bridge.system import http, tls
from bridge.system.console import doing
from bridge.system.waiting import wait_until, workers

_AT_ONCE = 8  # members and servers that are asked side by side

InstanceState = Literal["healthy", "unhealthy", "unknown"]

CONTROL_PLANE_NODES = "/api/v1/nodes?labelSelector=node-role.kubernetes.io/control-plane"
_ENDPOINTS = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices?labelSelector=kubernetes.io%2Fservice-name%3Dkubernetes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """An etcd member or an API server."""

    component: Component  #: ETCD or APISERVER.
    name: str  #: Its node's name, or else its address.
    url: str  #: Empty: it has not announced any.
    own: bool  #: On this node.
    state: InstanceState
    reason: str = ""  #: Why the state is not healthy.
    voter: bool = True  #: It counts for etcd's quorum.
    answers: bool = True  #: False: it does not answer.

    def __str__(self) -> str:
        return f"{self.component.value} of {self.name} ({self.url or 'no address yet'}): {self.reason or self.state}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """The instances of etcd and the API server on all nodes, as far as they could be seen."""

    instances: tuple[Instance, ...] = ()  #: This node's included.
    alarms: tuple[str, ...] = ()  #: Sentences about alarms of any etcd member.
    #: By component, ETCD or APISERVER, why the other instances are not known.
    unseen: Mapping[Component, str] = field(default_factory=dict)

    @property
    def others(self) -> list[Instance]:
        """The instances of other nodes."""
        return [instance for instance in self.instances if not instance.own]

    def own_is_down(self, component: Component) -> bool:
        """Whether this node's instance does not answer, or is an etcd member without a quorum, perhaps for a moment."""
        return any(
            instance.own
            and instance.component is component
            and (not instance.answers or (component is Component.ETCD and instance.state == "unhealthy"))
            for instance in self.instances
        )

    @property
    def quorum_without_own(self) -> bool | None:
        """Whether etcd has its quorum while this node's member restarts; None: not known."""
        voters = [instance for instance in self.instances if instance.component is Component.ETCD and instance.voter]
        if Component.ETCD in self.unseen or not voters:
            return None
        healthy = sum(not voter.own and voter.state == "healthy" for voter in voters)
        return healthy > len(voters) // 2


def look(node: Node, settings: Settings) -> Neighbours:
    """Look at the control plane from this node; a fault is a result, not an error."""
    etcd = look_at_etcd(node)
    if node.is_etcd_host:  # nothing on an etcd host may ask an API server
        return etcd
    servers = _look_at_api(_connected(node, settings, etcd), node, settings.node.node_name)
    instances = (*etcd.instances, *servers.instances)
    return Neighbours(instances=instances, alarms=etcd.alarms, unseen={**etcd.unseen, **servers.unseen})


def connect(node: Node, settings: Settings) -> Api:
    """Connect to the cluster's API: this node's server, admin.conf's, and those beside etcd's members."""
    return _connected(node, settings, look_at_etcd(node))


def _connected(node: Node, settings: Settings, etcd: Neighbours) -> Api:
    api = Api.of_node(node, settings.node.kubeconfig_dir)
    hosts = [urlsplit(member.url).hostname for member in etcd.others]  # kubeadm has an API server beside each
    api.add([Server(url_of(host, apiserver_port(node))) for host in hosts if host])
    return api


def look_at_etcd(node: Node) -> Neighbours:
    """Return the members that this node's own etcd lists, with their health."""
    if not node.local_etcd or Component.ETCD not in node.manifests:
        return Neighbours()
    etcd = Etcd.of(node)
    flags = node.manifests[Component.ETCD].flags
    own_url = endpoints.etcd_url(flags)
    own = Instance(component=Component.ETCD, name=flags.get("--name", ""), url=own_url, own=True, state="unknown")
    own = _member_state(etcd, own)
    try:
        listed, own_id, alarms = _members(etcd, flags, own)
    except tls.HttpsError as e:
        return Neighbours(instances=(own,), unseen={Component.ETCD: str(e)})
    others = [_as_instance(member) for member in listed if not _is_own(member, own_id, flags)]
    if endpoints.ETCD_HTTP_ONLY in flags:  # then the URLs that members announce are for gRPC only
        others = [replace(other, url=other.url and _beside(other.url, own_url)) for other in others]
    with workers(_AT_ONCE) as pool:
        states = list(pool.map(lambda member: _member_state(etcd, member), others))
    names = {member.id: member.name or member.id for member in listed}
    own = replace(own, voter=not any(member.learner for member in listed if _is_own(member, own_id, flags)))
    alarm_notes = tuple(f"etcd of {names.get(id_, id_)}: alarm {alarm}" for id_, alarm in alarms)
    return Neighbours(instances=(own, *states), alarms=alarm_notes)


def _members(
    etcd: Etcd, flags: Mapping[str, str], own: Instance
) -> tuple[list[Member], str, tuple[tuple[str, str], ...]]:
    """Ask any member in the manifest for the members, our own's ID ("": it is silent), and alarms as (ID, alarm)."""
    pairs = (pair.partition("=") for pair in flags.get("--initial-cluster", "").split(","))
    peers = [url for name, _, url in pairs if endpoints.is_url(url) and name != flags.get("--name")]
    for url in dict.fromkeys([own.url, *(_beside(peer, own.url) for peer in peers)]):
        try:
            listed, (member_id, alarms) = etcd.members(Server(url)), etcd.status(Server(url))
        except tls.HttpsError as e:
            last = type(e)(f"{url}: {e}")
            continue
        return listed, member_id if url == own.url else "", alarms
    raise last


def _beside(url: str, own_url: str) -> str:
    """Return the URL of the host in `url` with the port of `own_url`, which is probably the same there."""
    return url_of(urlsplit(url).hostname or "", urlsplit(own_url).port or 2379)


def _is_own(member: Member, own_id: str, flags: Mapping[str, str]) -> bool:
    return member.id == own_id if own_id else member.name == flags.get("--name")


def _as_instance(member: Member) -> Instance:
    host = next((urlsplit(url).hostname or "" for url in (*member.client_urls, *member.peer_urls)), "")
    reason = "a learner that has not caught up yet" if member.learner else ""
    if not member.client_urls:
        reason = "a member that has not started yet"
    return Instance(
        component=Component.ETCD,
        name=member.name or host,
        url=member.client_urls[0] if member.client_urls else "",
        own=False,
        state="unhealthy" if reason else "unknown",
        reason=reason,
        voter=not member.learner,
    )


def _member_state(etcd: Etcd, member: Instance) -> Instance:
    """Return a member with its state: healthy if it can read through the quorum, whatever the alarms."""
    if member.state != "unknown":
        return member
    try:
        reason = etcd.trouble(Server(member.url), alarms=False)
    except tls.HttpsError as e:
        return _without_answer(member, e)
    if reason is None:
        return replace(member, state="healthy")
    return replace(member, state="unhealthy", reason=reason.lower())


def _without_answer(instance: Instance, error: tls.HttpsError) -> Instance:
    """Return an instance that did not answer; a server that rejected our certificate may be healthy."""
    state: InstanceState = "unknown" if isinstance(error, tls.ClientRefusedError) else "unhealthy"
    return replace(instance, state=state, reason=str(error), answers=state == "unknown")


def _look_at_api(api: Api, node: Node, node_name: str) -> Neighbours:
    own_url = local_url(node)
    instances = [_api_server(node_name, own_url, own=True)] if own_url is not None else []
    unseen: dict[Component, str] = {}
    try:
        found = api_servers(api, node)
    except NoAnswerError as e:
        unseen = {Component.APISERVER: str(e)}
    else:
        instances += [_api_server(name, url, own=False) for name, url in found if name != node_name and url != own_url]
    if not api.clients:
        return Neighbours(unseen=unseen)
    with workers(_AT_ONCE) as pool:
        return Neighbours(instances=tuple(pool.map(lambda server: _ready(api, server), instances)), unseen=unseen)


def _api_server(name: str, url: str, *, own: bool) -> Instance:
    return Instance(component=Component.APISERVER, name=name, url=url, own=own, state="unknown")


def api_servers(api: Api, node: Node) -> list[tuple[str, str]]:
    """Return names and URLs of the API servers that are up, and of this node's (NoAnswerError: no server answers)."""
    nodes = api.get(CONTROL_PLANE_NODES)
    reply = api.ask("GET", _ENDPOINTS)
    # before 1.21 there is no such API, and the nodes' addresses have to do
    slices = {} if reply.status == HTTPStatus.NOT_FOUND else reply.found(_ENDPOINTS)
    endpoints = {
        address: str(port.get("port"))
        for piece in items(slices, "items")
        for port in items(piece, "ports")
        for endpoint in items(piece, "endpoints")
        for address in endpoint.get("addresses") or []
    }
    found = []
    for item in items(nodes, "items"):
        addresses = _addresses(item)
        here = [address for address in addresses if address in endpoints] or addresses[:1]
        name = text_of(item, "metadata", "name")
        found += [(name, url_of(address, endpoints.pop(address, apiserver_port(node)))) for address in here]
    return found + [(address, url_of(address, port)) for address, port in endpoints.items()]


def _addresses(node: Mapping[str, Any]) -> list[str]:
    addresses = sorted(items(node, "status", "addresses"), key=lambda address: address.get("type") != "InternalIP")
    return [str(address.get("address")) for address in addresses if address.get("type") != "Hostname"]


def _ready(api: Api, instance: Instance) -> Instance:
    """Return an API server with its state by its /readyz."""
    refused = instance
    for client in api.clients:
        try:
            answer = client.ask(Server(instance.url), "/readyz")
        except tls.ClientRefusedError as e:
            refused = _without_answer(instance, e)
            continue
        except tls.HttpsError as e:
            return _without_answer(instance, e)
        if answer.status == HTTPStatus.OK:
            return replace(instance, state="healthy")
        if answer.status not in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            return replace(instance, state="unhealthy", reason=_not_ready(answer))
        refused = replace(instance, reason=f"it turns {client.name} away (HTTP {answer.status})")
    return refused


def _not_ready(answer: http.Answer) -> str:
    """Name the checks that failed, as in `[-]etcd failed: reason withheld`."""
    failed = re.findall(r"^\[-\](\S+)", answer.body.decode(errors="replace"), re.MULTILINE)
    return f"not ready: {', '.join(failed)}" if failed else f"HTTP {answer.status}"


# --- may a component be restarted? -----------------------------------------------------------------------------------


_LOOK_SECONDS = 2.0
#: etcd's elections take a second or two; on a slow disk they fail, and are repeated.
_ELECTION_SECONDS = 15.0


class NeighbourError(PostponedError):
    """A restart would take a second control-plane node down."""

    hint = 'run again when they are healthy; `neighbours = "ignore"` in [cluster] restarts anyway'


def obstacles(neighbours: Neighbours, component: Component) -> list[str]:
    """Return reasons against restarting a working component (pure); a quorum that any restart would lose is none."""
    if component is Component.KUBELET:
        return []
    found = [*(str(other) for other in neighbours.others if other.state == "unhealthy"), *neighbours.alarms]
    if component is Component.ETCD:
        found += [
            str(other) for other in neighbours.others if other.component is component and other.state == "unknown"
        ]
        if component in neighbours.unseen:
            found.append(f"etcd's other members are not known: {neighbours.unseen[component]}")
    return found


def not_seen(neighbours: Neighbours, component: Component) -> list[str]:
    """Return neighbours that could not be seen, which is no obstacle (pure)."""
    quiet = {Component.ETCD} if component is Component.ETCD else set()  # an obstacle then
    found = [str(other) for other in neighbours.others if other.state == "unknown" and other.component not in quiet]
    return found + [
        f"{kind.value} of other nodes: {reason}" for kind, reason in neighbours.unseen.items() if kind not in quiet
    ]


def assert_may_restart(component: Component, node: Node, settings: Settings, *, note: Callable[[str], None]) -> None:
    """Look at the other control-plane nodes, and wait for them by the settings (NeighbourError: one is not healthy)."""
    rules = settings.cluster
    if rules.neighbours == "ignore" or component is Component.KUBELET:
        return
    neighbours = _after_waiting(component, node, settings, note)
    found = obstacles(neighbours, component)
    for text in not_seen(neighbours, component):
        note(f"could not be checked: {text}")
    if found and neighbours.own_is_down(component):
        note(f"{component.value} is down on this node, and is restarted in spite of {'; '.join(found)}")
    elif found:
        raise NeighbourError(_refusal(component, neighbours, found, rules))


def _after_waiting(component: Component, node: Node, settings: Settings, note: Callable[[str], None]) -> Neighbours:
    """Wait until nothing speaks against a restart or the time is over; a component that is down does not wait."""
    rules, notes = settings.cluster, list[str]()

    def tell(seen: Neighbours) -> None:
        if rules.neighbours == "wait" and not notes:
            notes.append(
                f"waiting up to {duration_text(rules.neighbour_wait)} for {'; '.join(obstacles(seen, component))}"
            )
            note(f"{component.value}: {notes[0]}")

    with doing(f"{component.value}: checking that the other nodes are healthy", is_plain=False):
        return wait_until(
            lambda: _after_an_election(component, node, settings),
            lambda seen: not obstacles(seen, component) or seen.own_is_down(component),
            rules.neighbour_wait if rules.neighbours == "wait" else timedelta(),
            pause_seconds=_LOOK_SECONDS,
            between=tell,
        )


def _after_an_election(component: Component, node: Node, settings: Settings) -> Neighbours:
    """Look; if this node's component is also down, look again for as long as etcd may need to elect a new leader."""
    return wait_until(
        lambda: look(node, settings),
        lambda seen: not obstacles(seen, component) or not seen.own_is_down(component),
        timedelta(seconds=_ELECTION_SECONDS),
        pause_seconds=_LOOK_SECONDS,
    )


def _refusal(component: Component, neighbours: Neighbours, reasons: Sequence[str], rules: ClusterSettings) -> str:
    waited = f" within {duration_text(rules.neighbour_wait)}" if rules.neighbours == "wait" else ""
    if component is Component.ETCD and neighbours.quorum_without_own is False:
        reasons = [*reasons, "etcd would be without its quorum"]
    wanted = f"wanted all other control-plane nodes healthy before its restart{waited}"
    return f"{component.value}: {wanted}, found {'; '.join(reasons)}"
