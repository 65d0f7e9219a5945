"""
Whether the other nodes are ready for a phase, by looking at them: each API server, kubelet and etcd member is shown the
very certificates that are to be installed, or asked for the one that it serves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

from cryptography import x509

from bridge.cluster.access import ANONYMOUS, Client
from bridge.cluster.api import Api, NoAnswerError
from bridge.control_plane import kubelets, neighbours
from bridge.control_plane.probes import Etcd
from bridge.errors import BridgeError, Exit, SettingsError, SettingsProblem
from bridge.node import endpoints, kubeconfig
from bridge.node.endpoints import Address, Server
from bridge.node.inventory import Node
from bridge.node.kubeconfig import KubeconfigError
from bridge.node.processes import file_contents
from bridge.pki import identity
from bridge.pki.certificates import fingerprint
from bridge.pki.expiry import duration_text
from bridge.rotation.objects import SEEN_AT, SIGNED_BY
from bridge.rotation.phases import Kind, Phase, text
from bridge.specs import CA, ETCD_CA, KUBELET_CONF, SPECS, Component
from bridge.state import audit
from bridge.state.session import Run
from bridge.system.console import doing
from bridge.system.http import ClientRefusedError, HttpsError
from bridge.system.paths import UnreadableError

if TYPE_CHECKING:
    from bridge.rotation.steps import Step

_AT_ONCE = 8
#: What was proven counts for so long: a phase begins by what is there now.
LATELY = timedelta(hours=1)
#: Client certificates that are shown to each kind of server: the first that is issued here.
_PROBES = {
    "kubelet": ("apiserver-kubelet-client",),
    "api": ("admin.conf", "controller-manager.conf", KUBELET_CONF),
    "etcd": ("apiserver-etcd-client", "etcd-healthcheck-client"),
}


#: The CA of what a kind of server shows; kubelets may have made theirs themselves.
_SERVED_BY = {"api": CA.name, "etcd": ETCD_CA.name}


class NotReadyEverywhereError(BridgeError):
    """Another node is not in the phase before, or can't be asked."""

    exit_code: ClassVar[int] = Exit.UNAVAILABLE
    hint = (
        "`ca-bridge rotate-ca status` on that node says what is left there; --without NODE goes on without a node that "
        "is gone for good, or that you have looked at; nothing was replaced"
    )


class SplitError(BridgeError):
    """etcd's members would no longer know each other."""

    exit_code: ClassVar[int] = Exit.USAGE
    hint = (
        "`ca-bridge rotate-ca trust --ca etcd-ca` on every member, then `issue`, then `drop`: no pause is needed between "
        "them, and etcd goes on; the other CAs are named with --ca meanwhile; nothing was replaced"
    )


class Spot(NamedTuple):
    """A server of another node, or of this one."""

    node: str
    kind: str  #: `api`, `kubelet` or `etcd`.
    server: Server

    def __str__(self) -> str:
        return f"{_KINDS[self.kind]} of {self.node} ({self.server.url})"


_KINDS = {"api": "API server", "kubelet": "kubelet", "etcd": "etcd"}


class Word(NamedTuple):
    """What a node's own run has written about its certificates into its Node object."""

    signer: str  #: The SHA-256 of the CA; empty: it has said nothing.
    seen: str  #: When, and in which phase.

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Word:
        """Read one; each user who may write to the Node object may have written it."""
        signer, seen = (kubelets.text_of(node, "metadata", "annotations", key) for key in (SIGNED_BY, SEEN_AT))
        return cls(signer, seen)

    def is_late(self, now: datetime) -> bool:
        """Whether it is older than what was proven may be, or has no time."""
        try:
            at = datetime.fromisoformat(self.seen.partition(" ")[0])
            return abs(now - at) > LATELY
        except (ValueError, TypeError, OverflowError):  # no time, or one without a zone
            return True


def late_words(words: Mapping[str, Word], target: Phase, now: datetime) -> list[str]:
    """
    The nodes that have said nothing lately (pure); none, once the phase has begun on another node: then it was proven at
    that moment, and a node that goes back says another CA.
    """
    if any(word.seen.partition(" ")[2] == target.value for word in words.values()):
        return []
    return [name for name, word in words.items() if word.is_late(now)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What an operator allows: how long to wait for another run, which nodes are left out, and whether all are."""

    without: frozenset[str] = frozenset()
    wait: timedelta = timedelta()
    keys_to: Path | None = None  #: Where a former CA's key goes that kubeadm has left on this node.
    emergency: bool = False  #: A CA's key has leaked: no other node is asked, and nothing goes back by itself.

    def assert_open(self, run: Run, node: Node, steps: Sequence[Step]) -> None:
        """Before one CA alone is trusted: each server of the cluster has a certificate of that one (NotReadyEverywhereError)."""
        if self.emergency:
            run.record.add(
                audit.TRUSTED, result="an emergency: no other node is asked, and nothing goes back by itself"
            )
            _assert_together(node, steps)
            return
        alone = {step.ca.name: step for step in steps
                 if step.target in (Phase.OLD, Phase.NEW) and step.ca.change.kind is Kind.NEW_KEY}  # fmt: skip
        left = {name: step.ca.change.signer(step.target) for name, step in alone.items()}
        kinds = [kind for kind, name in _SERVED_BY.items() if name in left]

        def judge(spot: Spot) -> str:
            parts, ca = urlsplit(spot.server.url), left[_SERVED_BY[spot.kind]]
            shown = ANONYMOUS.served(Address(parts.hostname or "", parts.port or 0))
            return "" if identity.leads_to((shown,), (ca,)) else f"it has a certificate of another CA than {text(ca)}"

        self._assert_all(run, node, kinds, judge)
        if CA.name in left and not node.is_worker and not node.is_etcd_host:
            self._assert_signed(run, node, left[CA.name], alone[CA.name].target)

    def _assert_signed(self, run: Run, node: Node, ca: x509.Certificate, target: Phase) -> None:
        """Each node has said that its certificates, a kubelet's too, are of this CA, and lately."""
        with _cluster(run, node) as api:
            words = {kubelets.name_of(one): Word.of(one) for one in kubelets.nodes(api)}
        asked = {name: word for name, word in words.items() if name not in self.without}
        behind = [name for name, word in asked.items() if word.signer != fingerprint(ca)]
        if behind:
            names = ", ".join(behind)
            raise NotReadyEverywhereError(
                f"wanted nodes whose certificates are of {text(ca)}, found others that have not said so: {names}"
            )
        others = {name: word for name, word in asked.items() if name != run.settings.node.node_name}
        if late := late_words(others, target, run.now()):
            raise NotReadyEverywhereError(
                f"wanted nodes that have said within {duration_text(LATELY)} whose their certificates are, found others: "
                f"{', '.join(late)}",
                hint="the verb of their phase, run again there, changes nothing and says it; nothing was replaced",
            )

    def assert_accepted(self, run: Run, node: Node, pairs: Mapping[str, tuple[bytes, bytes]]) -> None:
        """Each server of the cluster accepts these certificates and keys (PEM), by name (NotReadyEverywhereError)."""
        if self.emergency:
            return
        named = {kind: next((name for name in names if name in pairs), None) for kind, names in _PROBES.items()}
        clients = {kind: _client(name, *pairs[name]) for kind, name in named.items() if name is not None}
        self._assert_all(run, node, clients, lambda spot: refusal(clients[spot.kind], spot))

    def _assert_all(self, run: Run, node: Node, kinds: Collection[str], judge: Callable[[Spot], str]) -> None:
        if not kinds:
            return
        every = list(spots_of(run, node))
        if unknown := self.without - {spot.node for spot in every}:
            problem = SettingsProblem("--without", "names of the cluster's nodes", ", ".join(sorted(unknown)))
            raise SettingsError([problem])
        asked = [spot for spot in every if spot.kind in kinds and spot.node not in self.without]
        for name in sorted(self.without):
            run.record.add(audit.TRUSTED, result=f"node {name} is left out, as --without says")
        with doing("asking every node"), ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
            found = [
                f"{spot}: {why}"
                for spot, why in zip(asked, pool.map(lambda one: _said(judge, one), asked), strict=True)
                if why
            ]
        if found:
            raise NotReadyEverywhereError("; ".join(found))


def _assert_together(node: Node, steps: Sequence[Step]) -> None:
    """The members of etcd, where there are several, go on as one (SplitError)."""
    alone = next((step for step in steps if step.ca.name == ETCD_CA.name), None)
    if alone is None or alone.ca.standing.phase is Phase.ISSUED:
        return
    with contextlib.suppress(NotReadyEverywhereError):  # it is away already
        members = list(_members(node))
        if len(members) > 1:
            raise SplitError(
                f"etcd-ca: wanted one member of etcd, or the phase “issued”, found {len(members)} members and the phase "
                f"“{alone.ca.standing.text}”: those that trust one CA alone would know no other"
            )


def _said(judge: Callable[[Spot], str], spot: Spot) -> str:
    try:
        return judge(spot)
    except (HttpsError, ValueError) as e:
        return str(e)


def _client(name: str, certificate_pem: bytes, key_pem: bytes) -> Client:
    return Client(name=name, certificate_pem=certificate_pem, key_pem=key_pem, trust_pem=None)


def refusal(client: Client, spot: Spot) -> str:
    """
    Why a server does not take a client certificate; empty: it does, whatever it allows.

    Raises:
        HttpsError, ValueError: It does not answer.
    """
    path = {"api": "/version", "kubelet": "/healthz", "etcd": "/health"}[spot.kind]
    try:
        answer = client.ask(spot.server, path)
    except ClientRefusedError as e:
        return f"it refuses {client.name}: {e}"
    if answer.status == HTTPStatus.UNAUTHORIZED:
        return f"it does not know {client.name} (HTTP 401): its CA is not trusted there"
    return ""


def spots_of(run: Run, node: Node) -> Iterator[Spot]:
    """
    The servers of all nodes, by the cluster's own lists (NotReadyEverywhereError: these can't be read); a worker knows its
    API server alone, a host of etcd the members.
    """
    if node.is_worker:
        yield from _own_api(run)
    elif not node.is_etcd_host:
        yield from _nodes(run, node)
    yield from _members(node)


def _own_api(run: Run) -> Iterator[Spot]:
    path = run.settings.node.kubeconfig_dir / SPECS[KUBELET_CONF].base
    try:
        url = kubeconfig.parse(file_contents(path)).server
    except (KubeconfigError, UnreadableError, ValueError) as e:
        raise NotReadyEverywhereError(f"{path}: wanted the API server's address, found {e}") from None
    yield Spot("the cluster", "api", Server(url.rstrip("/")))


def _nodes(run: Run, node: Node) -> Iterator[Spot]:
    """Where API servers reach the kubelets, and clients the API servers, those that are down among them."""
    flags = node.manifests[Component.APISERVER].flags if Component.APISERVER in node.manifests else {}
    with _cluster(run, node) as api:
        for one in kubelets.nodes(api):
            name, place = kubelets.name_of(one), kubelets.place_of(one, flags)
            if place is None:
                raise NotReadyEverywhereError(f"node {name}: wanted its address in its Node object, found none")
            yield Spot(name, "kubelet", Server(f"https://{place}"))
        for name, url in neighbours.api_servers(api, node):
            yield Spot(name, "api", Server(url))


@contextlib.contextmanager
def _cluster(run: Run, node: Node) -> Iterator[Api]:
    """The cluster's own lists (NotReadyEverywhereError: they can't be read)."""
    try:
        yield neighbours.connect(node, run.settings)
    except NoAnswerError as e:
        raise NotReadyEverywhereError(f"wanted the list of all nodes, found {e}") from None


def _members(node: Node) -> Iterator[Spot]:
    if not node.local_etcd or Component.ETCD not in node.manifests:
        return
    own = Server(endpoints.etcd_url(node.manifests[Component.ETCD].flags))
    try:
        members = Etcd.of(node).members(own)
    except HttpsError as e:
        raise NotReadyEverywhereError(f"{own.url}: wanted the list of etcd's members, found {e}") from None
    for member in members:
        for url in member.client_urls[:1]:
            yield Spot(member.name or member.id, "etcd", Server(url))
