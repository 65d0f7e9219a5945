"""
The etcd members and API servers of all control-plane nodes, as far as this one can see them.

An etcd member is asked by this node's certificates, an API server for its own word at /readyz.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from bridge.cluster import access
from bridge.cluster.api import Api, NoAnswerError
from bridge.cluster.client import items
from bridge.control_plane.etcd import Etcd, Member
from bridge.node import endpoints
from bridge.node.endpoints import Server
from bridge.node.inventory import Node
from bridge.settings.tables import Settings
from bridge.specs import Component
from bridge.system import http

InstanceState = Literal["healthy", "unhealthy", "unknown"]

_CONTROL_PLANE_NODES = "/api/v1/nodes?labelSelector=node-role.kubernetes.io/control-plane"
_ENDPOINTS = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices?labelSelector=kubernetes.io%2Fservice-name%3Dkubernetes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """An etcd member or an API server."""

    component: Component  #: ETCD or APISERVER.
    name: str  #: Its node's, or else its address.
    url: str  #: Empty: it has not named any.
    own: bool  #: On this node.
    state: InstanceState
    reason: str = ""  #: Of a state that is not healthy.
    voter: bool = True  #: Counts for etcd's quorum.
    answers: bool = True  #: False: nothing comes from it.

    def __str__(self) -> str:
        return f"{self.component.value} of {self.name} ({self.url or 'no address yet'}): {self.reason or self.state}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """The instances of etcd and the API server on all nodes, as far as they could be seen."""

    instances: tuple[Instance, ...]  #: Those of this node among them.
    alarms: tuple[str, ...] = ()  #: Of any member of etcd.
    unseen: Mapping[Component, str]  #: ETCD, APISERVER: why it is not known who the others are.

    @property
    def others(self) -> list[Instance]:
        """The instances of other nodes."""
        return [one for one in self.instances if not one.own]

    def own_is_down(self, component: Component) -> bool:
        """
        Whether this node's gives no answer, or is an etcd member without a quorum, so that a restart takes nothing away.

        It may be so for a moment, while etcd elects a leader.
        """
        return any(
            one.own
            and one.component is component
            and (not one.answers or (component is Component.ETCD and one.state == "unhealthy"))
            for one in self.instances
        )

    @property
    def quorum_without_own(self) -> bool | None:
        """Whether etcd has its quorum while this node's member restarts; None: not known."""
        voters = [one for one in self.instances if one.component is Component.ETCD and one.voter]
        if Component.ETCD in self.unseen or not voters:
            return None
        healthy = sum(not one.own and one.state == "healthy" for one in voters)
        return healthy > len(voters) // 2


def look(node: Node, settings: Settings) -> Neighbours:
    """Look at the control plane from this node; what it finds is never an error."""
    etcd = _look_at_etcd(node) if node.local_etcd and Component.ETCD in node.manifests else _Seen()
    api = Api.of_node(node, settings.node.kubeconfig_dir)
    api.add([Server(url) for url in _beside_etcd(etcd.instances, node)])
    servers = _look_at_api(api, node, settings.node.node_name)
    return Neighbours(
        instances=(*etcd.instances, *servers.instances),
        alarms=etcd.alarms,
        unseen={
            kind: seen.trouble
            for kind, seen in ((Component.ETCD, etcd), (Component.APISERVER, servers))
            if seen.trouble
        },
    )


def connect(node: Node, settings: Settings) -> Api:
    """The cluster's API: this node's server, admin.conf's, and those beside etcd's members."""
    api = Api.of_node(node, settings.node.kubeconfig_dir)
    if node.local_etcd and Component.ETCD in node.manifests:
        api.add([Server(url) for url in _beside_etcd(_look_at_etcd(node).instances, node)])
    return api


def _beside_etcd(members: Iterable[Instance], node: Node) -> list[str]:
    """URLs of API servers beside etcd's members: kubeadm has one for each."""
    hosts = [urlsplit(member.url).hostname for member in members if not member.own]
    return [access.url_of(host, access.port(node)) for host in hosts if host]


class _Seen(NamedTuple):
    """The instances of one kind, as far as they could be seen."""

    instances: tuple[Instance, ...] = ()
    alarms: tuple[str, ...] = ()
    trouble: str = ""  #: Why the others are not known.


# --- etcd ------------------------------------------------------------------------------------------------------------


def _look_at_etcd(node: Node) -> _Seen:
    etcd = Etcd.of(node)
    flags = node.manifests[Component.ETCD].flags
    own_url = endpoints.etcd_url(flags)
    own = _member_state(
        etcd, Instance(component=Component.ETCD, name=flags.get("--name", ""), url=own_url, own=True, state="unknown")
    )
    try:
        listed, own_id, alarms = _members(etcd, flags, own)
    except http.HttpsError as e:
        return _Seen(instances=(own,), trouble=str(e))
    others = [_as_instance(member) for member in listed if not _is_own(member, own_id, flags)]
    if endpoints.ETCD_HTTP_ONLY in flags:  # then the URLs that members tell are for gRPC alone
        others = [replace(one, url=one.url and _beside(one.url, own_url)) for one in others]
    with ThreadPoolExecutor(max_workers=8) as pool:
        states = list(pool.map(lambda one: _member_state(etcd, one), others))
    names = {member.id: member.name or member.id for member in listed}
    own = replace(own, voter=not any(member.learner for member in listed if _is_own(member, own_id, flags)))
    return _Seen(
        instances=(own, *states),
        alarms=tuple(f"etcd of {names.get(who, who)}: alarm {what}" for who, what in alarms),
    )


def _members(
    etcd: Etcd, flags: Mapping[str, str], own: Instance
) -> tuple[list[Member], str, tuple[tuple[str, str], ...]]:
    """
    The members, our own member's id ("" when it does not answer), and alarms as (id, alarm).

    When our own is down, another member tells: those that the manifest names were there when this one joined.
    """
    urls = [own.url, *(_beside(url, own.url) for url in _initial_peers(flags))]
    for url in dict.fromkeys(urls):
        try:
            listed, status = etcd.members(Server(url)), etcd.status(Server(url))
        except http.HttpsError as e:
            last = type(e)(f"{url}: {e}")
            continue
        return listed, status.id if url == own.url else "", status.alarms
    raise last


def _initial_peers(flags: Mapping[str, str]) -> list[str]:
    pairs = (pair.partition("=") for pair in flags.get("--initial-cluster", "").split(","))
    return [url for name, _, url in pairs if endpoints.is_url(url) and name != flags.get("--name")]


def _beside(url: str, own_url: str) -> str:
    """The URL of the host in `url` with the port of `own_url`, if it has the same."""
    return access.url_of(urlsplit(url).hostname or "", urlsplit(own_url).port or 2379)


def _is_own(member: Member, own_id: str, flags: Mapping[str, str]) -> bool:
    return member.id == own_id if own_id else member.name == flags.get("--name")


def _as_instance(member: Member) -> Instance:
    host = next((urlsplit(url).hostname or "" for url in (*member.client_urls, *member.peer_urls)), "")
    instance = Instance(
        component=Component.ETCD,
        name=member.name or host,
        url=member.client_urls[0] if member.client_urls else "",
        own=False,
        state="unknown",
        voter=not member.learner,
    )
    if not member.client_urls:
        return replace(instance, state="unhealthy", reason="a member that has not started yet")
    if member.learner:
        return replace(instance, state="unhealthy", reason="a learner that has not caught up yet")
    return instance


def _member_state(etcd: Etcd, member: Instance) -> Instance:
    """A member with its state: well when it can read through the quorum. Alarms are a matter of their own."""
    if member.state != "unknown":
        return member
    try:
        reason = etcd.trouble(Server(member.url), alarms=False)
    except http.HttpsError as e:
        return _without_answer(member, e)
    return (
        replace(member, state="healthy")
        if reason is None
        else replace(member, state="unhealthy", reason=reason.lower())
    )


def _without_answer(instance: Instance, error: http.HttpsError) -> Instance:
    """A server that turns our certificate away may be well."""
    state: InstanceState = "unknown" if isinstance(error, http.ClientRefusedError) else "unhealthy"
    return replace(instance, state=state, reason=str(error), answers=state == "unknown")


# --- API servers -----------------------------------------------------------------------------------------------------


def _look_at_api(api: Api, node: Node, node_name: str) -> _Seen:
    own_url = access.local_url(node)
    instances = []
    if own_url is not None:
        instances.append(_api_server(node_name, own_url, own=True))
    trouble = ""
    try:
        found = api_servers(api, node)
    except NoAnswerError as e:
        trouble = str(e)
    else:
        instances += [_api_server(name, url, own=False) for name, url in found if name != node_name and url != own_url]
    if not api.clients:
        return _Seen(trouble=trouble)
    with ThreadPoolExecutor(max_workers=8) as pool:
        return _Seen(instances=tuple(pool.map(lambda one: _ready(api, one), instances)), trouble=trouble)


def _api_server(name: str, url: str, *, own: bool) -> Instance:
    return Instance(component=Component.APISERVER, name=name, url=url, own=own, state="unknown")


def api_servers(api: Api, node: Node) -> list[tuple[str, str]]:
    """
    The names and URLs of the cluster's API servers, this node's among them (NoAnswerError: no server answers).

    An API server that is down is no endpoint any more; so each control-plane node should have one.
    """
    nodes = _asked(api, _CONTROL_PLANE_NODES)
    # Not before 1.21, where nodes must do.
    slices = _asked(api, _ENDPOINTS, missing=True)
    endpoints = {
        address: str(one.get("port"))
        for piece in items(slices, "items")
        for one in items(piece, "ports")
        for endpoint in items(piece, "endpoints")
        for address in endpoint.get("addresses") or []
    }
    found = []
    for one in items(nodes, "items"):
        name, addresses = _name_and_addresses(one)
        here = [address for address in addresses if address in endpoints] or addresses[:1]
        found += [(name, access.url_of(address, endpoints.pop(address, access.port(node)))) for address in here]
    return found + [(address, access.url_of(address, port)) for address, port in endpoints.items()]


def _asked(api: Api, path: str, *, missing: bool = False) -> Mapping[str, Any]:
    reply = api.ask("GET", path)
    if missing and reply.status == HTTPStatus.NOT_FOUND:
        return {}
    if reply.status != HTTPStatus.OK:
        raise NoAnswerError(f"wanted {path.partition('?')[0]}, found HTTP {reply.status}")
    return reply.document


def _name_and_addresses(node: Mapping[str, Any]) -> tuple[str, list[str]]:
    """A Node object's, its internal addresses first."""
    metadata = node.get("metadata")
    addresses = sorted(items(node, "status", "addresses"), key=lambda one: one.get("type") != "InternalIP")
    return str(metadata.get("name") if isinstance(metadata, dict) else ""), [
        str(one.get("address")) for one in addresses if one.get("type") != "Hostname"
    ]


def _ready(api: Api, instance: Instance) -> Instance:
    """An API server with its state: its own word at /readyz."""
    refused = instance
    for client in api.clients:
        try:
            answer = client.ask(Server(instance.url), "/readyz")
        except http.ClientRefusedError as e:
            refused = _without_answer(instance, e)
            continue
        except http.HttpsError as e:
            return _without_answer(instance, e)
        if answer.status == HTTPStatus.OK:
            return replace(instance, state="healthy")
        if answer.status not in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            return replace(instance, state="unhealthy", reason=_not_ready(answer))
        refused = replace(instance, reason=f"it turns {client.name} away (HTTP {answer.status})")
    return refused


def _not_ready(answer: http.Answer) -> str:
    """The checks that failed, as in `[-]etcd failed: reason withheld`."""
    failed = re.findall(r"^\[-\](\S+)", answer.body.decode(errors="replace"), re.MULTILINE)
    return f"not ready: {', '.join(failed)}" if failed else f"HTTP {answer.status}"
