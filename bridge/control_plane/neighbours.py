"""
Regard for the other control-plane nodes: a restart here waits until they are well, and for its turn.

A restart on this node must not take a second one down. What is not well on this node itself is no obstacle: a node
whose API server is down because its certificate expired must be able to be repaired; nor is an API that can't be asked.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from urllib.parse import urlsplit

from bridge.cluster import access
from bridge.cluster.api import Api, NoAnswerError
from bridge.cluster.lease import Keeper, Lease
from bridge.control_plane.instances import Neighbours, api_servers, connect, look
from bridge.errors import PostponedError
from bridge.node.endpoints import Server
from bridge.node.inventory import Node
from bridge.pki.expiry import duration_text
from bridge.settings.tables import ClusterSettings, Settings
from bridge.specs import Component
from bridge.system.console import doing
from bridge.system.waiting import wait_until

_LOOK_SECONDS = 2.0
#: An API that does not answer is asked again for so long before that counts: an election in etcd takes about a second.
_BLINK_SECONDS = 10.0
#: etcd's take a second or two; on a slow disk they fail, and are held again.
_ELECTION_SECONDS = 15.0


class NeighbourError(PostponedError):
    """A restart would take a second control-plane node down."""

    hint = 'run again when they are well; `neighbours = "ignore"` in [cluster] restarts all the same'


def obstacles(neighbours: Neighbours, component: Component) -> list[str]:
    """
    Reasons against a restart of a component that works; pure.

    An etcd cluster of one or two members loses its quorum at every restart: that alone is no obstacle, since waiting
    does not help. The kubelet may always be restarted: pods go on without it.
    """
    if component is Component.KUBELET:
        return []
    found = [*(str(one) for one in neighbours.others if one.state == "unhealthy"), *neighbours.alarms]
    if component is Component.ETCD:
        found += [str(one) for one in neighbours.others if one.component is component and one.state == "unknown"]
        if component in neighbours.unseen:
            found.append(f"etcd's other members are not known: {neighbours.unseen[component]}")
    return found


def not_seen(neighbours: Neighbours, component: Component) -> list[str]:
    """Neighbours that could not be looked at, and hold nothing up; for the operator; pure."""
    quiet = {Component.ETCD} if component is Component.ETCD else set()  # an obstacle then
    found = [str(one) for one in neighbours.others if one.state == "unknown" and one.component not in quiet]
    return found + [
        f"{kind.value} of other nodes: {reason}" for kind, reason in neighbours.unseen.items() if kind not in quiet
    ]


def assert_may_restart(component: Component, node: Node, settings: Settings, *, note: Callable[[str], None]) -> None:
    """
    Look at the other control-plane nodes, and wait for them as the settings say.

    Raises:
        NeighbourError: One of them is not well.
    """
    rules = settings.cluster
    if rules.neighbours == "ignore" or component is Component.KUBELET:
        return
    neighbours, found = _after_waiting(component, node, settings, note)
    for text in not_seen(neighbours, component):
        note(f"could not be looked at: {text}")
    if found and neighbours.own_is_down(component):
        note(f"{component.value} is down on this node, and is restarted in spite of {'; '.join(found)}")
    elif found:
        raise NeighbourError(_refusal(component, neighbours, found, rules))


def _after_waiting(
    component: Component, node: Node, settings: Settings, note: Callable[[str], None]
) -> tuple[Neighbours, list[str]]:
    """Wait until nothing speaks against a restart or the time is over; a component that is down here does not wait."""
    rules, said = settings.cluster, list[str]()

    def tell(seen: tuple[Neighbours, list[str]]) -> None:
        if rules.neighbours == "wait" and not said:
            said.append(f"waiting up to {duration_text(rules.neighbour_wait)} for {'; '.join(seen[1])}")
            note(f"{component.value}: {said[0]}")

    with doing(f"{component.value}: looking whether the other nodes are well", is_plain=False):
        return wait_until(
            lambda: _after_an_election(component, node, settings),
            lambda seen: not seen[1] or seen[0].own_is_down(component),
            rules.neighbour_wait if rules.neighbours == "wait" else timedelta(),
            pause_seconds=_LOOK_SECONDS,
            between=tell,
        )


def _after_an_election(component: Component, node: Node, settings: Settings) -> tuple[Neighbours, list[str]]:
    """
    Look; where this node's is down as well, until it is well or was down for as long as etcd may need for a new leader.

    A member whose leader has just died has no answer, or no good one, and is needed all the more.
    """

    def seen() -> tuple[Neighbours, list[str]]:
        neighbours = look(node, settings)
        return neighbours, obstacles(neighbours, component)

    return wait_until(
        seen,
        lambda seen: not seen[1] or not seen[0].own_is_down(component),
        timedelta(seconds=_ELECTION_SECONDS),
        pause_seconds=_LOOK_SECONDS,
    )


def _refusal(component: Component, neighbours: Neighbours, found: Sequence[str], rules: ClusterSettings) -> str:
    waited = f" within {duration_text(rules.neighbour_wait)}" if rules.neighbours == "wait" else ""
    loses = component is Component.ETCD and neighbours.quorum_without_own is False
    quorum = "; etcd would be without its quorum" if loses else ""
    return (
        f"{component.value}: wanted all other control-plane nodes well before its restart{waited}, "
        f"found {'; '.join(found)}{quorum}"
    )


class LeaseHeldError(PostponedError):
    """Another node has the lease."""

    hint = "run again later; the lease of a run that died can be taken when it has expired"


class Turn:
    """
    One control-plane node after the other, by a lease in kube-system, so that two nodes' timers never restart at once.

    Without an API server there is no lease, and the restart goes ahead: only another holder that was seen is an obstacle.
    """

    def __init__(self, api: Api, holder: str, rules: ClusterSettings, note: Callable[[str], None]) -> None:
        """
        Args:
            api: Of the cluster.
            holder: `NODE_RUN`: of one node only one run at a time has the state directory's lock.
            rules: The lease's name, its duration, and how long to wait for it.
            note: Called with sentences for the operator, from this thread alone.
        """
        owner = holder.rpartition("_")[0]
        self._lease = Lease(api, ("kube-system", rules.lease_name), holder, duration=rules.lease_duration, owner=owner)
        self._rules = rules
        self._note = note
        self._held = False
        self._lost_to = ""
        self._goes_without = False  # there was no API, and that was said
        self._mutex = threading.Lock()
        self._keeper = Keeper(self._renew, rules.lease_duration)

    @property
    def held(self) -> bool:
        """Whether it is ours, as far as we know."""
        return self._held and not self._lost_to

    def assert_held(self) -> None:
        """
        Take it, or renew it; call this before each restart.

        Raises:
            LeaseHeldError: Another node has it.
        """
        name = self._rules.lease_name
        if not self._held:
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
        self._held = True
        self._keeper.start()

    def _outlast(self, holder: str) -> None:
        """
        Wait for a holder that was seen; it stays an obstacle, answer or not: our own API server may be restarted.

        Raises:
            LeaseHeldError: It still is one.
        """
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
        """Who else has it, empty if it is ours now; an error of the API's is returned, not raised."""
        try:
            return self._lease.take()
        except NoAnswerError as e:
            return e

    def _renew(self) -> None:
        with self._mutex:
            if not self._lost_to:
                self._lost_to = self._lease.take()

    def release(self) -> None:
        """Let the next node have it at once; without an API it expires."""
        self._keeper.stop()
        if not self.held:
            return
        self._held = False
        try:
            self._lease.give_back()
        except NoAnswerError as e:
            text = duration_text(self._rules.lease_duration)
            self._note(f"the lease {self._rules.lease_name} was not given back and expires in {text}: {e}")


@contextlib.contextmanager
def turn(
    node: Node, settings: Settings, run_id: str, *, note: Callable[[str], None]
) -> Iterator[Callable[[Component], None]]:
    """
    Have this node's turn among the control-plane nodes while the block runs.

    Call the result with a component before each restart: it raises LeaseHeldError when another node has the turn, and
    NeighbourError when another node is not well.
    """
    rules = settings.cluster
    if not rules.lease:
        yield lambda component: assert_may_restart(component, node, settings, note=note)
        return
    api = connect(node, settings)
    with contextlib.suppress(NoAnswerError):  # the lease says so
        api.add([Server(url) for _, url in api_servers(api, node)])
    # No two nodes share an API server, but hosts may share a name, and then settings that were copied.
    place = urlsplit(access.local_url(node) or "").netloc
    holder = f"{settings.node.node_name}_{place}_{run_id}"
    held = Turn(api, holder, rules, note)

    def may_restart(component: Component) -> None:
        held.assert_held()
        assert_may_restart(component, node, settings, note=note)

    try:
        held.assert_held()
        yield may_restart
    finally:
        held.release()
