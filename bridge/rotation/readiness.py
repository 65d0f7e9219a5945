"""Whether other nodes are ready for a phase: by their servers, their statement in Node objects, the cluster's objects."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

from bridge.cluster import ANONYMOUS, Client, mapping
from bridge.cluster.api import Api, NoAnswerError
from bridge.control_plane import kubelet_serving, neighbours
from bridge.control_plane.probes import Etcd
from bridge.errors import BridgeError, Exit, SettingsError, SettingsProblem, converted
from bridge.node import endpoints, kubeconfig
from bridge.node.endpoints import Server
from bridge.node.inventory import Node
from bridge.node.kubeconfig import KubeconfigError
from bridge.node.processes import file_contents
from bridge.pki.certificates import fingerprint, leads_to
from bridge.pki.expiry import duration_text
from bridge.renewal import NotReadyError
from bridge.renewal.gate import next_ca_file
from bridge.rotation import Bundle, Change, Phase, objects, text, texts, trust_copies
from bridge.rotation.objects import KEYS, LATELY, NodeStatement
from bridge.rotation.planning import Step
from bridge.specs import CA, ETCD_CA, KUBELET_CONF, SPECS, Component
from bridge.state import audit
from bridge.state.session import Run
from bridge.system.console import doing
from bridge.system.paths import UnreadableError
from bridge.system.tls import ClientRefusedError, HttpsError
from bridge.system.waiting import wait_until, workers
from bridge.words import some

Statements = Mapping[str, NodeStatement]  #: By the node's name.
_AT_ONCE = 8


class _Kind(NamedTuple):
    """A kind of server."""

    text: str
    path: str  #: The path to request.
    clients: tuple[str, ...]  #: Our client certificates for it; we present the first that this step issues.
    ca: str = ""  #: The CA of its serving certificate; empty: none, since kubelets may sign their own.


_KINDS = {
    "kubelet": _Kind("kubelet", "/healthz", ("apiserver-kubelet-client",)),
    "api": _Kind("API server", "/version", ("admin.conf", "controller-manager.conf", KUBELET_CONF), CA.name),
    "front-proxy": _Kind("API server", "/version", ("front-proxy-client",)),
    "etcd": _Kind("etcd", "/health", ("apiserver-etcd-client", "etcd-healthcheck-client"), ETCD_CA.name),
    "peer": _Kind("etcd, for its peers,", "/version", ("etcd-peer",), ETCD_CA.name),
}
#: A controller manager writes kube-root-ca.crt when it becomes the leader: 28 s for 205 namespaces (measured on 1.37).
_FOLLOWS = timedelta(seconds=90)
_LOOK_SECONDS = 2.0
_MOST_NAMED = 10


class NotReadyEverywhereError(NotReadyError):
    """Another node is not in the previous phase, or does not answer."""

    exit_code: ClassVar[int] = Exit.UNAVAILABLE
    hint = (
        "`ca-bridge rotate-ca status` on that node says what is left there; --without NODE goes on without a node that "
        "is gone for good, or that you have checked; nothing was replaced"
    )


class SplitError(BridgeError):
    """etcd's members would no longer trust each other."""

    exit_code: ClassVar[int] = Exit.USAGE
    hint = (
        "`ca-bridge rotate-ca trust --ca etcd-ca` on every member, then `issue`, then `drop`: no need to wait for clients, and "
        "etcd goes on; name the other CAs with --ca meanwhile; nothing was replaced"
    )


class Spot(NamedTuple):
    """A server of another node, or of this one."""

    node: str
    kind: str  #: A key of `_KINDS`.
    server: Server
    user_header: str = ""  #: The header in which a front proxy names the user to the API server; empty: unused.

    def __str__(self) -> str:
        return f"{_KINDS[self.kind].text} of {self.node} ({self.server.url})"


def late_statements(statements: Statements, target: Phase, now: datetime) -> list[str]:
    """Return nodes without a recent statement (pure); none once another node has begun the phase, since that proved it."""
    if any(said.phase == target.value for said in statements.values()):
        return []
    # in the future, too: a clock is wrong
    return [name for name, said in statements.items() if abs(now - said.at) > LATELY]


@dataclass(frozen=True, slots=True, kw_only=True)
class RotationOptions:
    """The operator's options: how long to wait for another run, and which nodes to leave out, or all."""

    without: frozenset[str] = frozenset()
    wait: timedelta = timedelta()
    keys_to: Path | None = None  #: The directory for a former CA's key that kubeadm left on this node.
    emergency: bool = False  #: A CA's key has leaked: we check no other node, and nothing rolls back by itself.

    def assert_open(self, run: Run, node: Node, steps: Sequence[Step]) -> None:
        """Before only one CA is trusted, check that each server has a certificate of it (NotReadyEverywhereError)."""
        if self.emergency:
            result = "an emergency: no other node is asked, and nothing goes back by itself"
            run.record.add(audit.TRUSTED, result=result)
            _assert_together(node, steps)
            return
        alone = {step.ca.name: step for step in steps
                 if step.target in (Phase.OLD, Phase.NEW) and not step.ca.change.keeps_key}  # fmt: skip
        kinds = [name for name, kind in _KINDS.items() if kind.ca in alone]

        def judge(spot: Spot) -> str:
            step = alone[_KINDS[spot.kind].ca]
            signer = step.ca.change.signer(step.target)
            # a handshake shows us only the leaf; other nodes' leaves have the same intermediates as ours
            above = [ca for item in step.ca.items for ca in item.certificates[1:] if ca != step.ca.change.cross]
            chain = (ANONYMOUS.served(spot.server.place), *above)
            return "" if leads_to(chain, (signer,)) else f"it has a certificate of another CA than {text(signer)}"

        self._assert_all(run, node, kinds, judge)
        if not node.is_worker and not node.is_etcd_host:
            self._assert_cluster(run, node, [step for step in steps if _asks_the_cluster(step)])

    def _assert_cluster(self, run: Run, node: Node, steps: Sequence[Step]) -> None:
        """Check that nodes said recently they are in the previous phase, and the cluster's objects have its CAs."""
        if not steps:
            return
        with _cluster(run, node) as api:
            nodes = [each for each in kubelet_serving.nodes(api) if kubelet_serving.name_of(each) not in self.without]
            for step in (step for step in steps if step.target is not Phase.TRUSTED):
                name, now = step.ca.name, run.now()
                statements = statements_of(nodes, name, node.bundles[CA.name], now)
                own, has_begun = run.settings.node.node_name, step.target is Phase.ISSUED and has_asked(run, name)
                assert_said(name, step.ca.change, step.target, statements, own, None if has_begun else now)
            for step in steps:
                if step.target is not Phase.OLD:
                    assert_followed(api, step.ca.name, step.ca.change, step.target)

    def assert_accepted(self, run: Run, node: Node, pairs: Mapping[str, tuple[bytes, bytes]]) -> None:
        """Check that all servers accept these client certificates and keys (PEM), by name (NotReadyEverywhereError)."""
        if self.emergency:
            return
        clients = {
            kind: Client(name=name, certificate_pem=pairs[name][0], key_pem=pairs[name][1], trust_pem=None)
            for kind, server in _KINDS.items()
            for name in [name for name in server.clients if name in pairs][:1]
        }
        self._assert_all(run, node, clients, lambda spot: refusal(clients[spot.kind], spot))

    def _assert_all(self, run: Run, node: Node, kinds: Collection[str], judge: Callable[[Spot], str]) -> None:
        if not kinds:
            return

        def judged(spot: Spot) -> str:
            try:
                return judge(spot)
            except (HttpsError, ValueError) as e:
                return str(e)

        every = list(spots_of(run, node))
        if unknown := self.without - {spot.node for spot in every}:
            problem = SettingsProblem("--without", "names of the cluster's nodes", ", ".join(sorted(unknown)))
            raise SettingsError([problem])
        spots = [spot for spot in every if spot.kind in kinds and spot.node not in self.without]
        for name in sorted(self.without):
            run.record.add(audit.TRUSTED, result=f"node {name} is left out, as --without says")
        with doing("asking every node"), workers(_AT_ONCE) as pool:
            found = [f"{spot}: {why}" for spot, why in zip(spots, pool.map(judged, spots), strict=True) if why]
        if found:
            raise NotReadyEverywhereError("; ".join(found))


def has_asked(run: Run, authority: str) -> bool:
    """Whether the next CA already has requests of this node; other nodes' statements were recent when it got them."""
    taken = {request.request.spec.authority.name for request in run.requests if request.was_taken}
    return authority in taken and authority in (next_ca_file(run.store).read() or ())


def _asks_the_cluster(step: Step) -> bool:
    """Whether nodes and objects must be in the previous phase; behind a cross, new leaves work for old clients."""
    change, here = step.ca.change, step.ca.standing.phase
    if step.ca.name not in KEYS or change.keeps_key:
        return False
    is_first_leaf = step.target is Phase.ISSUED and here is Phase.TRUSTED and change.cross is None
    is_return = step.target is Phase.TRUSTED and here is Phase.ISSUED  # perhaps from “new”, a minute ago
    return is_first_leaf or is_return or step.target in (Phase.OLD, Phase.NEW)


def statements_of(
    nodes: Iterable[Mapping[str, Any]], authority: str, anchors: Bundle, now: datetime
) -> dict[str, NodeStatement]:
    """Return the statement in the Node object of each node that has certificates of this CA (pure)."""
    return {
        kubelet_serving.name_of(node): objects.statement_of(node, authority, anchors, now)
        for node in nodes
        if authority == CA.name or "node-role.kubernetes.io/control-plane" in mapping(node, "metadata", "labels")
    }


def assert_said(
    authority: str, change: Change, target: Phase, statements: Statements, own: str, now: datetime | None
) -> None:
    """Check that nodes said they are in the previous phase, recently unless `now` is None (NotReadyEverywhereError)."""
    signer, others = change.signer(target), {node: said for node, said in statements.items() if node != own}
    if target is Phase.ISSUED:
        what = f"trust {text(change.new)}"
        behind = [node for node, said in others.items() if fingerprint(change.new) not in said.trusted]
    else:
        what = f"have certificates of {text(signer)}"
        behind = [node for node, said in statements.items() if said.signer != fingerprint(signer)]
    if behind:
        named = [f"{node} ({why})" if (why := statements[node].trouble) else node for node in behind]
        raise NotReadyEverywhereError(
            f"{authority}: wanted nodes whose components {what}, found others that have not said so: {', '.join(named)}",
            hint=_again(target, behind),
        )
    # people at a CA may take longer than an hour; before an installation we try the certificates on each server
    late = [] if now is None else late_statements(others, target, now)
    if late:
        raise NotReadyEverywhereError(
            f"{authority}: wanted nodes that have said within {duration_text(LATELY)} that their components {what}, found "
            f"others: {', '.join(late)}",
            hint=_again(target, late),
        )


def _again(target: Phase, nodes: Sequence[str]) -> str:
    """Return a hint with the command to run, and the nodes to run it on."""
    command = "`ca-bridge rotate-ca issue`" if target is Phase.NEW else "`ca-bridge rotate-ca trust`"
    return (
        f"{command} on {some(nodes, _MOST_NAMED)}, which changes nothing where that is done, but reports it; then this "
        "command again; --without NODE goes on without a node that is gone for good, or that you have checked; nothing was replaced"
    )


def assert_followed(api: Api, authority: str, change: Change, target: Phase, limit: timedelta = _FOLLOWS) -> None:
    """Wait up to `limit` for a phase's CAs in the cluster's own objects (NotReadyEverywhereError, NoAnswerError)."""
    wanted = {Phase.ISSUED: change.bundle(Phase.TRUSTED), Phase.TRUSTED: (change.old,)}.get(target, (change.new,))
    with doing("looking whether the cluster's objects have the CAs"):
        lagging = functools.partial(trust_copies.behind, api, authority, wanted)
        behind = wait_until(lagging, operator.not_, limit, pause_seconds=_LOOK_SECONDS)
    if behind:
        again = "`ca-bridge rotate-ca trust`" if target is Phase.ISSUED else "`ca-bridge rotate-ca issue`"
        raise NotReadyEverywhereError(
            f"{authority}: wanted {texts(wanted)} in the cluster's objects, found others in {some(behind, _MOST_NAMED)}",
            hint="the controller manager writes kube-root-ca.crt when it becomes the leader: restart the leader; "
            f"{again}, run again, writes cluster-info; nothing was replaced",
        )


def _assert_together(node: Node, steps: Sequence[Step]) -> None:
    """Check that an emergency does not split etcd's members (SplitError)."""
    alone = next((step for step in steps if step.ca.name == ETCD_CA.name), None)
    if alone is None or alone.ca.standing.phase is Phase.ISSUED:
        return
    with contextlib.suppress(NotReadyEverywhereError):  # etcd is down already
        members = [spot for spot in _members(node) if spot.kind == "etcd"]
        if len(members) > 1:
            raise SplitError(
                f"etcd-ca: wanted one member of etcd, or the phase “issued”, found {len(members)} members and the phase "
                f"“{alone.ca.standing.text}”: members that trust only one CA would reject the others"
            )


def refusal(client: Client, spot: Spot) -> str:
    """Return why a server rejects a client certificate; empty: it accepts it (HttpsError, ValueError: no answer)."""
    headers = {spot.user_header: "system:anonymous"} if spot.user_header else {}  # a user without rights
    try:
        answer = client.ask(spot.server, _KINDS[spot.kind].path, headers)
    except ClientRefusedError as e:
        return f"it refuses {client.name}: {e}"
    if answer.status == HTTPStatus.UNAUTHORIZED:
        return f"it does not know {client.name} (HTTP 401): its CA is not trusted there"
    return ""


def spots_of(run: Run, node: Node) -> Iterator[Spot]:
    """List all nodes' servers; a worker knows its API server, an etcd host the members (NotReadyEverywhereError)."""
    if node.is_worker:
        path = run.settings.node.kubeconfig_dir / SPECS[KUBELET_CONF].base
        prefix = f"{path}: wanted the API server's address, found "
        with converted((KubeconfigError, UnreadableError, ValueError), NotReadyEverywhereError, prefix):
            url = kubeconfig.parse(file_contents(path)).server
        yield Spot("the cluster", "api", Server(url.rstrip("/")))
    elif not node.is_etcd_host:
        yield from _nodes(run, node)
    yield from _members(node)


def _nodes(run: Run, node: Node) -> Iterator[Spot]:
    """List the addresses of all kubelets and API servers, including those that are down."""
    flags = node.flags(Component.APISERVER)
    with _cluster(run, node) as api:
        for item in kubelet_serving.nodes(api):
            name, place = kubelet_serving.name_of(item), kubelet_serving.place_of(item, flags)
            if place is None:
                raise NotReadyEverywhereError(f"node {name}: its Node object has no address")
            yield Spot(name, "kubelet", Server(f"https://{place}"))
        header = flags.get("--requestheader-username-headers", "X-Remote-User").partition(",")[0]  # kubeadm's
        for name, url in neighbours.api_servers(api, node):
            yield Spot(name, "api", Server(url))
            yield Spot(name, "front-proxy", Server(url), header)


@contextlib.contextmanager
def _cluster(run: Run, node: Node) -> Iterator[Api]:
    """Connect to the cluster's API (NotReadyEverywhereError: its lists and objects can't be read)."""
    with converted(NoAnswerError, NotReadyEverywhereError, "wanted the cluster's nodes and objects, found "):
        yield neighbours.connect(node, run.settings)


def _members(node: Node) -> Iterator[Spot]:
    if not node.local_etcd and Component.APISERVER in node.manifests:  # its etcd is on other hosts
        for url in endpoints.urls(node.flags(Component.APISERVER), "--etcd-servers"):
            yield Spot(urlsplit(url).hostname or url, "etcd", Server(url))
    if not node.local_etcd or Component.ETCD not in node.manifests:
        return
    own = Server(endpoints.etcd_url(node.manifests[Component.ETCD].flags))
    with converted(HttpsError, NotReadyEverywhereError, f"{own.url}: wanted the list of etcd's members, found "):
        members = Etcd.of(node).members(own)
    for member in members:
        peers = [url for url in member.peer_urls if url.startswith("https:")]
        for kind, urls in (("etcd", member.client_urls), ("peer", peers)):
            for url in urls[:1]:
                yield Spot(member.name or member.id, kind, Server(url))
