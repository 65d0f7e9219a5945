"""The turn among hosts that have etcd alone, in a real cluster of three members."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.cluster.api import NoAnswerError
from bridge.control_plane import turns
from bridge.control_plane.neighbours import NeighbourError
from bridge.control_plane.turns import LeaseHeldError
from bridge.specs import Component
from tests.kit import members
from tests.kit.loopback import free_port
from tests.kit.members import Cluster, Place

RULES = "lease_wait = '1s'\nneighbours = 'refuse'"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three etcd hosts."""
    ports = [free_port() for _ in range(3)]
    cluster = members.make(
        tmp_path_factory.mktemp("hosts"), 3, client_port=ports[0], peer_port=ports[1], api_port=ports[2]
    )
    for place in cluster.places:
        place.become_etcd_host()
    with members.running(cluster):
        yield cluster


@pytest.fixture
def hosts(started: Cluster) -> Cluster:
    """All of them well."""
    started.mend()
    return started


def silent(_: str) -> None:
    """Take a note."""


def enter(place: Place, run: str = "run", rules: str = RULES) -> None:
    with turns.turn(place.node, place.settings(rules), run, note=silent) as may_restart:
        may_restart(Component.ETCD)


def test_one_host_at_a_time(hosts: Cluster) -> None:
    """While a host has the turn another one is refused, with its name; afterwards, or once it is gone, it is not."""
    first, second, _ = hosts.places
    with turns.turn(first.node, first.settings(RULES), "a", note=silent) as may_restart:
        may_restart(Component.ETCD)
        with pytest.raises(LeaseHeldError, match=r"found that cp-1_127\.0\.0\.1:\d+_a has it"):
            enter(second)
        enter(first, "b")  # a run of ours that died is not waited for
    enter(second)


def test_a_host_that_died_is_outlasted(hosts: Cluster) -> None:
    """etcd removes the key of a holder that renews it no more, after the lease's duration."""
    first, second, third = hosts.places
    rules = f"{RULES}\nlease_duration = '15s'"
    dead = turns._claim(first.node, first.settings(rules), "dead")
    assert dead.take() == ""
    with pytest.raises(LeaseHeldError):
        enter(second, rules=rules)
    begin = time.monotonic()
    enter(third, rules=rules.replace("lease_wait = '1s'", "lease_wait = '3m'"))
    assert time.monotonic() - begin > 1
    assert dead.take() == ""  # free again: with a new lease of etcd's


def test_the_turn_outlives_the_own_member(hosts: Cluster) -> None:
    """A holder whose own member is down keeps the turn by another one, and the restart of a second one is refused."""
    first, second, _ = hosts.places
    with turns.turn(first.node, first.settings(RULES), "a", note=silent) as may_restart:
        may_restart(Component.ETCD)
        first.kill_etcd()
        may_restart(Component.ETCD)
        with pytest.raises(LeaseHeldError):
            enter(second)
    with pytest.raises(NeighbourError, match="etcd would be without its quorum"):
        enter(second)


@pytest.mark.parametrize("has_lease", [True, False])
def test_hosts_that_restart_at_once_keep_the_quorum(hosts: Cluster, has_lease: bool) -> None:
    """Three hosts whose timers fire together restart one member after the other by the lease alone, and not without it."""
    rules = f"lease = {str(has_lease).lower()}\nlease_wait = '6m'\nneighbours = 'ignore'"
    together = threading.Barrier(len(hosts.places))
    wrong: list[str] = []
    down: list[str] = []

    def restart(place: Place) -> None:
        try:
            settings, node = place.settings(rules), place.node
            together.wait(timeout=180)
            with turns.turn(node, settings, "run", note=silent) as may_restart:
                may_restart(Component.ETCD)
                place.kill_etcd()
                down.append(place.name)
                if len(down) > 1:
                    wrong.append(f"down together: {down}")
                place.start_etcd()
                hosts.wait_until_healthy(place)
                down.remove(place.name)
        except Exception as e:  # noqa: BLE001 (in a thread: the assertion below tells it)
            wrong.append(f"{place.name}: {type(e).__name__}: {e}")

    threads = [threading.Thread(target=restart, args=[place]) for place in hosts.places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=400)
    assert (wrong == []) is has_lease, wrong


def test_without_an_answer_there_is_no_claim(hosts: Cluster) -> None:
    """A claim of a cluster that is down says which members were asked; the restart that mends it goes ahead."""
    first = hosts.places[0]
    claim = turns._claim(first.node, first.settings(RULES), "run")
    for place in hosts.places:
        place.kill_etcd()
    with pytest.raises(NoAnswerError, match=rf"found https://127\.0\.0\.1:{hosts.client_port}: "):
        claim.take()
    enter(first)


def test_a_control_plane_keeps_its_lease_in_the_cluster(tmp_path: Path) -> None:
    """The twin: with an API server's manifest the claim is one to an object of Kubernetes."""
    cluster = members.make(tmp_path, 1, client_port=1, peer_port=2, api_port=3)
    place = cluster.places[0]
    assert type(turns._claim(place.node, place.settings(RULES), "run")).__name__ == "Lease"
