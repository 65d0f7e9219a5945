"""A node's turn to restart: a lease that all nodes see, in the cluster's API or, on an etcd-only host, in etcd."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from bridge.cluster import document, items, local_url
from bridge.cluster.api import Api, NoAnswerError
from bridge.cluster.lease import Claim, Keeper, Lease
from bridge.control_plane.neighbours import api_servers, assert_may_restart, connect, look_at_etcd
from bridge.control_plane.probes import Etcd
from bridge.errors import PostponedError
from bridge.node import endpoints
from bridge.node.endpoints import Server
from bridge.node.inventory import Node
from bridge.pki.expiry import duration_text
from bridge.settings.tables import ClusterSettings, Settings
from bridge.specs import Component
from bridge.system import tls
from bridge.system.console import doing
from bridge.system.waiting import wait_until

_PREFIX = "/ca-bridge/"  # Kubernetes keeps everything below /registry
_TURNS = 5  # each failed attempt means that another host was faster
_LOOK_SECONDS = 2.0
#: How long an API is asked again before its silence counts: an election in etcd takes about a second.
_BLINK_SECONDS = 10.0


class LeaseHeldError(PostponedError):
    """Another node has the lease."""

    hint = "run again later; the lease of a run that died can be taken when it has expired"


class Turn:
    """One node's turn, by a lease that all nodes see; without an API there is no lease, and the restart goes ahead."""

    def __init__(self, lease: Claim, rules: ClusterSettings, note: Callable[[str], None]) -> None:
        """Claim the lease; `note` gets sentences for the operator, in this thread."""
        self._rules = rules
        self._note = note
        self._is_taken = False
        self._lost_to = ""
        self._goes_without = False  # there was no API, and a note said so
        self._keeper = Keeper(lease, rules.lease_duration, self._renew)

    @property
    def held(self) -> bool:
        """Whether the lease is ours, as far as we know."""
        return self._is_taken and not self._lost_to

    def assert_held(self) -> None:
        """Take or renew the lease; call this before each restart (LeaseHeldError: another node has it)."""
        name = self._rules.lease_name
        if not self._is_taken:
            self._acquire()
            return
        try:
            self._renew()
        except NoAnswerError as e:  # our own restart may be the reason
            self._note(f"the lease {name} could not be renewed: {e}")
        if self._lost_to:
            raise LeaseHeldError(f"the lease {name} was lost to {self._lost_to}, since it could not be renewed")

    def _acquire(self) -> None:
        patience = timedelta(seconds=0 if self._goes_without else _BLINK_SECONDS)
        found = wait_until(
            self._tried, lambda seen: not isinstance(seen, NoAnswerError), patience, pause_seconds=_LOOK_SECONDS
        )
        if isinstance(found, NoAnswerError):
            if not self._goes_without:
                self._note(f"no lease was taken, other nodes may restart at the same time: {found}")
            self._goes_without = True
            return
        if found:
            self._outlast(found)
        self._is_taken = True
        self._keeper.start()

    def _outlast(self, holder: str) -> None:
        """Wait for a known holder, even if the API stops answering (LeaseHeldError: it still has the lease)."""
        name, holders = self._rules.lease_name, [holder]
        self._note(f"waiting for the lease {name}, which {holder} has")

        def tell(seen: str | NoAnswerError) -> None:
            if isinstance(seen, str) and seen != holders[-1]:
                holders.append(seen)
                self._note(f"waiting for the lease {name}, which {seen} has")

        with doing(f"waiting for the lease {name}", is_plain=False):
            found = wait_until(
                self._tried, lambda seen: seen == "", self._rules.lease_wait, pause_seconds=_LOOK_SECONDS, between=tell
            )
        if found:
            waited = duration_text(self._rules.lease_wait)
            raise LeaseHeldError(f"wanted the lease {name} within {waited}, found that {holders[-1]} has it")

    def _tried(self) -> str | NoAnswerError:
        """Try to take the lease; return another holder, an empty string if it is ours now, or the API's error."""
        try:
            return self._keeper.take()
        except NoAnswerError as e:
            return e

    def _renew(self) -> None:
        if not self._lost_to and (other := self._keeper.take()):
            self._lost_to = other

    def release(self) -> None:
        """Give the lease back; without an API it expires."""
        self._is_taken = False
        try:
            self._keeper.release()
        except NoAnswerError as e:
            text = duration_text(self._rules.lease_duration)
            self._note(f"the lease {self._rules.lease_name} was not given back and expires in {text}: {e}")


def claim_in_kubernetes(api: Api, holder: str, rules: ClusterSettings) -> Lease:
    """Return a claim to the lease in kube-system for the holder `NODE_RUN`."""
    owner, path = holder.rpartition("_")[0], ("kube-system", rules.lease_name)
    return Lease(api, path, holder, duration=rules.lease_duration, owner=owner)


def _claim(node: Node, settings: Settings, run_id: str) -> Claim:
    """Return this node's claim: in etcd on a host that has nothing else, in the cluster's API elsewhere."""
    name, rules = settings.node.node_name, settings.cluster
    if node.is_etcd_host and Component.ETCD in node.manifests:
        urls = [instance.url for instance in look_at_etcd(node).instances if instance.url]
        place = urlsplit(endpoints.etcd_url(node.manifests[Component.ETCD].flags)).netloc
        return EtcdClaim(Etcd.of(node), urls, f"{name}_{place}_{run_id}", rules)
    api = connect(node, settings)
    with contextlib.suppress(NoAnswerError):  # taking the lease reports it
        api.add([Server(url) for _, url in api_servers(api, node)])
    # The API server's address tells apart hosts that share a name, perhaps with settings that were copied.
    place = urlsplit(local_url(node) or "").netloc
    return claim_in_kubernetes(api, f"{name}_{place}_{run_id}", rules)


@contextlib.contextmanager
def turn(
    node: Node, settings: Settings, run_id: str, *, note: Callable[[str], None]
) -> Iterator[Callable[[Component], None]]:
    """Hold this node's turn while the block runs; yield a check that raises a LeaseHeldError or NeighbourError."""
    rules = settings.cluster
    if not rules.lease:
        yield lambda component: assert_may_restart(component, node, settings, note=note)
        return
    held = Turn(_claim(node, settings, run_id), rules, note)

    def may_restart(component: Component) -> None:
        held.assert_held()
        assert_may_restart(component, node, settings, note=note)

    try:
        held.assert_held()
        yield may_restart
    finally:
        held.release()


class EtcdClaim:
    """A claim to a key in etcd, as `cluster.lease.Lease` is a claim to a Kubernetes object."""

    def __init__(self, etcd: Etcd, urls: Sequence[str], holder: str, rules: ClusterSettings) -> None:
        """Claim the lease for the holder `NODE_RUN`; do not wait for an earlier claim of `NODE_…`."""
        self.name = rules.lease_name
        self._etcd = etcd
        self._urls = tuple(dict.fromkeys(urls))
        self._key = _text(f"{_PREFIX}{self.name}")
        self._holder = holder
        self._seconds = math.ceil(rules.lease_duration.total_seconds())
        self._id = ""  # of etcd's lease

    def take(self) -> str:
        """Take the lease if it is free, or keep it; return another holder, or an empty string if it is ours now."""
        self._keep_alive()
        for _ in range(_TURNS):
            holder = self._put_if({"target": "CREATE", "createRevision": "0"})
            if holder in {"", self._holder}:
                return ""
            if holder.rpartition("_")[0] != self._holder.rpartition("_")[0]:
                return holder
            if not self._put_if({"target": "VALUE", "value": _text(holder)}):
                return ""
        raise NoAnswerError(f"wanted the lease {self.name}, found that it changed each time")

    def give_back(self) -> None:
        """Release the lease at once, if it is ours: etcd deletes the key with it."""
        if self._id:
            self._call("/v3/lease/revoke", {"ID": self._id})
            self._id = ""

    def _keep_alive(self) -> None:
        """Keep etcd's lease alive, or get a new one if etcd has ended it."""
        if self._id:
            found = self._call("/v3/lease/keepalive", {"ID": self._id}).get("result")
            if not isinstance(found, dict):  # a stream's error comes with status 200; the lease may live
                text = f"can't keep the lease {self.name}: etcd does not say whether it lives"
                raise NoAnswerError(text)
            if found.get("TTL") not in (None, "0", 0):
                return
        self._id = str(self._call("/v3/lease/grant", {"TTL": self._seconds}).get("ID") or "")
        if not self._id:
            raise NoAnswerError(f"etcd's answer has no lease for {self.name}")

    def _put_if(self, condition: Mapping[str, str]) -> str:
        """Write the key if the condition holds; return an empty string if it was written, else the holder."""
        put = {"key": self._key, "value": _text(self._holder), "lease": self._id}
        body = {
            "compare": [{"key": self._key, "result": "EQUAL", **condition}],
            "success": [{"requestPut": put}],
            "failure": [{"requestRange": {"key": self._key}}],
        }
        found = self._call("/v3/kv/txn", body)
        if found.get("succeeded") is True:
            return ""
        for each in items(found, "responses"):
            for item in items(each, "response_range", "kvs"):
                return base64.b64decode(str(item.get("value"))).decode(errors="replace")
        return "a host that has just gone"

    def _call(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer of the first member that gives one (NoAnswerError: none did)."""
        troubles = []
        for url in self._urls:
            try:
                answer = self._etcd.ask(Server(url), path, json.dumps(body).encode())
                if answer.status == HTTPStatus.OK:
                    return document(answer.body)
            except tls.HttpsError as e:
                troubles.append(f"{url}: {e}")
            else:
                troubles.append(f"{url}: HTTP {answer.status}")
        raise NoAnswerError(f"wanted etcd's answer about the lease {self.name}, found {'; '.join(troubles)}")


def _text(value: str) -> str:
    return base64.b64encode(value.encode()).decode()
