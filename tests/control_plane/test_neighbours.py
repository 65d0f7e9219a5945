"""
No restart takes a second control-plane node down, and no two nodes restart at once.

Real etcd members on loopback; the API is a strict double here, and a real one in `e2e/three_nodes/test_neighbours_node.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from bridge.cluster import lease, local_url
from bridge.cluster.api import Api
from bridge.control_plane import neighbours, turns
from bridge.control_plane.neighbours import Instance, InstanceState, NeighbourError, Neighbours
from bridge.control_plane.turns import LeaseHeldError, Turn, claim_in_kubernetes
from bridge.errors import Exit, SettingsError
from bridge.node.endpoints import Server
from bridge.node.inventory import Node
from bridge.settings.load import parse
from bridge.settings.tables import ClusterSettings, Settings
from bridge.specs import Component
from bridge.system import http
from bridge.system.waiting import wait_until
from tests.kit import apiserver, members
from tests.kit.loopback import free_port
from tests.kit.members import Cluster, Place

ETCD, APISERVER, KUBELET = Component.ETCD, Component.APISERVER, Component.KUBELET
NAME = "ca-bridge"


def made(directory: Path, count: int) -> Cluster:
    client_port, peer_port, api_port = free_port(), free_port(), free_port()
    return members.make(directory, count, client_port=client_port, peer_port=peer_port, api_port=api_port)


def silent(_: str) -> None:
    """Drop the note."""


# --- the rule --------------------------------------------------------------------------------------------------------


def instance(
    component: Component, state: InstanceState = "healthy", *, own: bool = False, voter: bool = True, name: str = "cp-2"
) -> Instance:
    return Instance(component=component, name=name, url="https://192.0.2.2", own=own, state=state, voter=voter)


def seen(*instances: Instance, alarms: tuple[str, ...] = (), unseen: tuple[Component, ...] = ()) -> Neighbours:
    return Neighbours(instances=instances, alarms=alarms, unseen=dict.fromkeys(unseen, "why"))


@pytest.mark.parametrize(
    ("others", "component", "count"),
    [
        (seen(), ETCD, 0),
        (seen(instance(ETCD), instance(APISERVER)), ETCD, 0),
        (seen(instance(ETCD, "unhealthy")), ETCD, 1),
        (seen(instance(ETCD, "unhealthy"), instance(APISERVER, "unhealthy")), Component.SCHEDULER, 2),
        (seen(instance(APISERVER, "unhealthy", own=True)), APISERVER, 0),
        (seen(instance(ETCD, "unhealthy", own=True)), APISERVER, 0),
        (seen(instance(APISERVER, "unhealthy")), KUBELET, 0),
        (seen(instance(APISERVER, "unknown")), APISERVER, 0),
        (seen(instance(ETCD, "unknown")), APISERVER, 0),
        (seen(instance(ETCD, "unknown")), ETCD, 1),
        (seen(unseen=(APISERVER,)), APISERVER, 0),
        (seen(unseen=(APISERVER,)), ETCD, 0),
        (seen(unseen=(ETCD,)), APISERVER, 0),
        (seen(unseen=(ETCD,)), ETCD, 1),
        (seen(alarms=("etcd of cp-1: alarm NOSPACE",)), APISERVER, 1),
    ],
    ids=str,
)
@pytest.mark.rotation("the next etcd too early")
def test_what_is_not_well_elsewhere_is_an_obstacle(others: Neighbours, component: Component, count: int) -> None:
    """Trouble on another node holds up a restart, and trouble on this one does not; of members that can't be seen only etcd's count, and for etcd alone."""
    assert len(neighbours.obstacles(others, component)) == count


@pytest.mark.parametrize(
    ("others", "quorum"),
    [
        (seen(), None),
        (seen(instance(ETCD, own=True), unseen=(ETCD,)), None),
        (seen(instance(ETCD, own=True)), False),
        (seen(instance(ETCD, own=True), instance(ETCD)), False),
        (seen(instance(ETCD, own=True), instance(ETCD), instance(ETCD)), True),
        (seen(instance(ETCD, own=True), instance(ETCD), instance(ETCD, "unhealthy")), False),
        (seen(instance(ETCD, own=True), instance(ETCD), instance(ETCD), instance(ETCD, voter=False)), True),
        (seen(instance(ETCD, own=True), *[instance(ETCD)] * 2, *[instance(ETCD, "unhealthy")] * 2), False),
        (seen(instance(ETCD, own=True), *[instance(ETCD)] * 3, instance(ETCD, "unknown")), True),
    ],
    ids=str,
)
def test_a_quorum_is_more_than_half_of_the_voters(others: Neighbours, quorum: bool | None) -> None:
    """The member of this node does not count while it restarts."""
    assert others.quorum_without_own is quorum


# --- etcd ------------------------------------------------------------------------------------------------------------

needs_etcd = pytest.mark.kube("etcd")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with members.running(made(tmp_path_factory.mktemp("cluster"), 3)) as running:
        yield running


@pytest.fixture
def three(shared: Cluster) -> Iterator[Cluster]:
    """Three members that are well, and are made so again."""
    yield shared
    shared.mend()


def eventually(ask: Callable[[], http.Answer]) -> http.Answer:
    """Members that have just come back are not trusted with changes for five seconds."""
    end = time.monotonic() + 120
    while (answer := ask()).status != 200 and time.monotonic() < end:
        time.sleep(0.5)
    assert answer.status == 200, answer.body
    return answer


def etcd_of(others: Neighbours) -> list[tuple[str, bool, InstanceState]]:
    return sorted((one.name, one.own, one.state) for one in others.instances if one.component is ETCD)


def may_restart(place: Place, component: Component = ETCD, rules: str = 'neighbours = "refuse"') -> list[str]:
    notes: list[str] = []
    neighbours.assert_may_restart(component, place.node, place.settings(rules), note=notes.append)
    return notes


@needs_etcd
def test_sees_each_member_of_etcd(three: Cluster) -> None:
    """Every node sees the same members, except which one is its own."""
    for own in three.places:
        others = neighbours.look(own.node, own.settings())
        assert etcd_of(others) == [(place.name, place is own, "healthy") for place in three.places]
        assert others.quorum_without_own
        may_restart(own)


@needs_etcd
def test_refuses_to_take_a_second_member_down(three: Cluster) -> None:
    """With one of three away a restart is refused, and the other two can say who it is; the dead one may be repaired."""
    first, second, third = three.places
    third.kill_etcd()
    for own in (first, second):
        three.wait_until_healthy(own)  # there may have to be a new leader
        with pytest.raises(
            NeighbourError, match=rf"etcd of {third.name} .*connection refused.*without its quorum"
        ) as e:
            may_restart(own)
        assert e.value.exit_code == Exit.UNAVAILABLE
        with pytest.raises(NeighbourError, match=third.name):
            may_restart(own, Component.CONTROLLER_MANAGER)
        may_restart(own, KUBELET)
        may_restart(own, rules='neighbours = "ignore"')
    others = neighbours.look(third.node, third.settings())
    assert others.own_is_down(ETCD)
    assert etcd_of(others) == [
        (first.name, False, "healthy"), (second.name, False, "healthy"), (third.name, True, "unhealthy")
    ]  # fmt: skip
    may_restart(third)


@needs_etcd
def test_waits_for_a_member_that_comes_back(three: Cluster) -> None:
    """A neighbour in the middle of its own restart is waited for, and the operator reads so once."""
    first, second, _ = three.places
    second.kill_etcd()
    three.wait_until_healthy(first)
    notes: list[str] = []

    def note(text: str) -> None:
        if not notes:
            second.start_etcd()
        notes.append(text)

    neighbours.assert_may_restart(ETCD, first.node, first.settings('neighbour_wait = "3m"'), note=note)
    assert [text for text in notes if "waiting up to 3m for etcd of cp-2" in text] == notes[:1]
    assert ("cp-2", False, "healthy") in etcd_of(neighbours.look(first.node, first.settings()))


@needs_etcd
def test_a_member_that_keeps_silent_for_a_moment_is_needed(three: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose leader has just died: with another one away, it is not taken for dead before an election is over."""
    first, _, third = three.places
    third.kill_etcd()
    three.wait_until_healthy(first)
    process, real, seen = first.process, neighbours.look, []
    assert process is not None

    def look(node: Node, settings: Settings) -> Neighbours:
        seen.append(real(node, settings))
        process.send_signal(signal.SIGCONT)
        return seen[-1]

    monkeypatch.setattr("bridge.cluster.TIMEOUT_SECONDS", 2)
    monkeypatch.setattr(neighbours, "look", look)
    monkeypatch.setattr(neighbours, "_ELECTION_SECONDS", 180)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(NeighbourError, match=third.name):
        may_restart(first)
    assert (seen[0].own_is_down(ETCD), seen[-1].own_is_down(ETCD)) == (True, False)


@needs_etcd
def test_gives_up_in_time(three: Cluster) -> None:
    """The wait has an end."""
    first, second, _ = three.places
    second.kill_etcd()
    begin = time.monotonic()
    with pytest.raises(NeighbourError, match="within 3s"):
        may_restart(first, rules='neighbour_wait = "3s"')
    assert time.monotonic() - begin >= 3


@needs_etcd
def test_a_node_without_quorum_can_be_repaired(three: Cluster) -> None:
    """When all have failed, say because all certificates expired, the first one is not held up by the others."""
    first, second, third = three.places
    second.kill_etcd()
    third.kill_etcd()
    while (
        three.etcd(first, "/v3/kv/range", b'{"key": "YQ=="}').status == 200
    ):  # for a moment, as if nothing had happened
        time.sleep(0.1)
    begin = time.monotonic()
    notes = may_restart(first, rules='neighbour_wait = "1h"')
    assert time.monotonic() - begin < 300  # it waits for an election, and not for the members that it is to help
    assert any("etcd is down on this node" in note and "cp-2" in note for note in notes)
    with pytest.raises(NeighbourError):
        may_restart(first, Component.SCHEDULER)


@needs_etcd
def test_an_alarm_is_an_obstacle(three: Cluster) -> None:
    """An alarm holds up the restart, even of a healthy member, and the message names the member."""
    own, other = three.places[0], three.places[1]
    header = json.loads(three.etcd(other, "/v3/maintenance/status").body)["header"]
    alarm = {"memberID": header["member_id"], "alarm": "NOSPACE"}
    raise_it = json.dumps({"action": "ACTIVATE", **alarm}).encode()
    assert three.etcd(other, "/v3/maintenance/alarm", raise_it).status == 200
    try:
        with pytest.raises(NeighbourError, match=f"etcd of {other.name}: alarm NOSPACE"):
            may_restart(own)
        assert etcd_of(neighbours.look(own.node, own.settings())) == [
            (place.name, place is own, "healthy") for place in three.places
        ]
    finally:
        clear = json.dumps({"action": "DEACTIVATE", **alarm}).encode()
        assert three.etcd(other, "/v3/maintenance/alarm", clear).status == 200
    may_restart(own)


@needs_etcd
def test_a_member_that_has_not_joined_yet_is_an_obstacle(three: Cluster) -> None:
    """etcd counts a member between `member add` and its start."""
    own = three.places[0]
    body = json.dumps({"peerURLs": ["https://127.0.0.9:1"], "isLearner": True}).encode()
    added = json.loads(eventually(lambda: three.etcd(own, "/v3/cluster/member/add", body)).body)["member"]
    try:
        with pytest.raises(NeighbourError, match=r"etcd of 127\.0\.0\.9 \(no address yet\).*not started"):
            may_restart(own)
        assert neighbours.look(own.node, own.settings()).quorum_without_own  # a learner has no vote
    finally:
        three.etcd(own, "/v3/cluster/member/remove", json.dumps({"ID": added["ID"]}).encode())
    may_restart(own)


@needs_etcd
def test_takes_another_certificate_when_the_first_is_gone(three: Cluster, tmp_path: Path) -> None:
    """The healthcheck client's pair is not on every node; without any nothing is known, and etcd is not touched."""
    own = three.places[0]
    copy = Place(name=own.name, address=own.address, directory=tmp_path / "copy", cas=own.cas)
    shutil.copytree(own.kubeconfig_dir, copy.kubeconfig_dir)
    for base in ("etcd/healthcheck-client", "apiserver-etcd-client"):
        (copy.pki_dir / f"{base}.key").unlink()
        may_restart(copy)
    (copy.pki_dir / "etcd/server.key").unlink()
    others = neighbours.look(copy.node, copy.settings())
    assert etcd_of(others) == [(own.name, True, "unknown")]
    with pytest.raises(
        NeighbourError, match=r"etcd's other members are not known.*etcd-server: .*server\.key: there is no such file"
    ):
        may_restart(copy)
    assert any("etcd of other nodes" in note for note in may_restart(copy, Component.SCHEDULER))


@needs_etcd
def test_a_single_member_waits_for_no_other(tmp_path: Path) -> None:
    """One node's etcd may be restarted, though it has no quorum meanwhile."""
    with members.running(made(tmp_path, 1)) as one:
        [place] = one.places
        others = neighbours.look(place.node, place.settings())
        assert etcd_of(others) == [(place.name, True, "healthy")]
        assert others.quorum_without_own is False
        may_restart(place)


@needs_etcd
def test_finds_the_port_for_http_where_grpc_has_one_of_its_own(tmp_path: Path) -> None:
    """The URLs that members publish then answer no request of ours."""
    files = made(tmp_path, 2)
    grpc_port, http_port = files.client_port, free_port()
    for place in files.places:
        place.add_etcd_flags(listen_client_http_urls=f"https://{place.address}:{http_port}")
    files.client_port = http_port
    with members.running(files):
        own, other = files.places
        others = neighbours.look(own.node, own.settings())
        assert etcd_of(others) == [(own.name, True, "healthy"), (other.name, False, "healthy")]
        assert {one.url for one in others.others if one.component is ETCD} == {f"https://{other.address}:{http_port}"}
        assert grpc_port != http_port


# --- API servers -----------------------------------------------------------------------------------------------------


class Servers:
    """The double's servers of a cluster, without etcd."""

    def __init__(self, files: Cluster) -> None:
        self.places = files.places
        self.state = apiserver.State(
            nodes=[(place.name, place.address) for place in files.places],
            endpoints=[place.address for place in files.places],
            port=files.api_port,
        )
        self.failing: dict[str, list[str]] = {}
        self.up: dict[str, contextlib.ExitStack] = {}

    def start(self, place: Place) -> None:
        """Bring one up."""
        stack = contextlib.ExitStack()
        self.failing[place.name] = stack.enter_context(apiserver.serving(place, self.state))
        self.up[place.name] = stack

    def stop(self, place: Place) -> None:
        """Take one down."""
        self.up.pop(place.name).close()

    def stop_all(self) -> None:
        """Take all down that are up."""
        for stack in self.up.values():
            stack.close()
        self.up.clear()

    def look(self, place: Place) -> dict[str, tuple[InstanceState, str]]:
        """What a node sees of them: state and reason by name."""
        others = neighbours.look(place.node, place.settings())
        return {one.name: (one.state, one.reason) for one in others.instances if one.component is APISERVER}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Three nodes without etcd's manifest: an external etcd."""
    made_files = made(tmp_path_factory.mktemp("files"), 3)
    for place in made_files.places:
        (place.kubeconfig_dir / "manifests/etcd.yaml").unlink()
    return made_files


@pytest.fixture
def servers(files: Cluster) -> Iterator[Servers]:
    found = Servers(files)
    for place in found.places:
        found.start(place)
    yield found
    found.stop_all()


@pytest.mark.rotation("two API servers behind one balancer")
def test_sees_each_api_server(servers: Servers) -> None:
    """Every node sees the same API servers, and all may be restarted."""
    for own in servers.places:
        assert servers.look(own) == {place.name: ("healthy", "") for place in servers.places}
        assert may_restart(own, APISERVER) == []


def test_an_api_server_that_is_down_is_seen_though_it_is_no_endpoint(servers: Servers) -> None:
    """The API servers forget each other within seconds; a control-plane node stays one."""
    first, second, third = servers.places
    servers.stop(second)
    servers.state.endpoints.remove(second.address)
    assert servers.look(first)[second.name] == ("unhealthy", "connection refused")
    with pytest.raises(NeighbourError, match=f"kube-apiserver of {second.name}"):
        may_restart(third, APISERVER)


def test_an_api_server_beside_the_list_of_nodes_is_seen(servers: Servers) -> None:
    """Where nodes have no labels, an API server is known by its address, and none is counted twice."""
    first, second, third = servers.places
    servers.state.nodes = servers.state.nodes[:1]
    servers.failing[third.name].append("etcd")
    assert servers.look(first) == {
        first.name: ("healthy", ""),
        second.address: ("healthy", ""),
        third.address: ("unhealthy", "not ready: etcd"),
    }


def test_a_node_whose_own_api_server_is_down_can_be_repaired(servers: Servers) -> None:
    """It asks another one, and its own failure is no obstacle; another's still is to what works."""
    first, second, third = servers.places
    servers.stop(third)
    assert servers.look(third)[third.name][0] == "unhealthy"
    assert servers.look(third)[first.name][0] == "healthy"
    assert may_restart(third, APISERVER) == []
    servers.failing[second.name].append("etcd")
    assert any("kube-apiserver is down on this node" in note for note in may_restart(third, APISERVER))
    with pytest.raises(NeighbourError, match=second.name):
        may_restart(third, Component.SCHEDULER)


def test_an_api_that_does_not_answer_is_no_obstacle(servers: Servers) -> None:
    """Nothing is known then, and a note says so."""
    servers.stop_all()
    [note] = may_restart(servers.places[0], APISERVER)
    assert "kube-apiserver of other nodes" in note
    assert "connection refused" in note


def test_asks_as_super_admin_when_admin_lost_its_rights(servers: Servers) -> None:
    """An RBAC binding that is gone does not blind us."""
    servers.state.refused = {"kubernetes-admin"}
    assert servers.look(servers.places[0]) == {place.name: ("healthy", "") for place in servers.places}
    servers.state.refused = {"kubernetes-admin", "kubernetes-super-admin"}
    [note] = may_restart(servers.places[0], APISERVER)
    assert "turns admin.conf away" in note
    assert "turns super-admin.conf away" in note


def test_a_node_without_admin_conf_says_so(servers: Servers, tmp_path: Path) -> None:
    """Some operators move admin.conf away; then a note says that nothing can be checked."""
    own = servers.places[0]
    copy = Place(name=own.name, address=own.address, directory=tmp_path / "copy", cas=own.cas)
    shutil.copytree(own.kubeconfig_dir, copy.kubeconfig_dir)
    (copy.kubeconfig_dir / "admin.conf").unlink()
    assert may_restart(copy, APISERVER) == []
    (copy.kubeconfig_dir / "super-admin.conf").write_text("kind: [")
    [note] = may_restart(copy, APISERVER)
    assert "super-admin.conf: " in note
    (copy.kubeconfig_dir / "super-admin.conf").unlink()
    [note] = may_restart(copy, APISERVER)
    assert "wanted admin.conf or super-admin.conf, found neither" in note


# --- the lease -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of tests."""
    monkeypatch.setattr(turns, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(turns, "_BLINK_SECONDS", 0.5)


def api(servers: Servers, *places: Place) -> Api:
    """The API client of these servers, in this order."""
    known = Api.of_node(servers.places[0].node, servers.places[0].kubeconfig_dir)
    return Api(known.clients, [Server(f"https://{p.address}:{servers.state.port}") for p in places])


def rules(duration: float, wait: float) -> ClusterSettings:
    return ClusterSettings(lease_duration=timedelta(seconds=duration), lease_wait=timedelta(seconds=wait))


@contextlib.contextmanager
def hold(
    servers: Servers,
    holder: str = "cp-1_run",
    *places: Place,
    duration: float = 30,
    wait: float = 0,
    note: Callable[[str], None] = silent,
) -> Iterator[Turn]:
    ours = rules(duration, wait)
    turn = Turn(claim_in_kubernetes(api(servers, *(places or servers.places)), holder, ours), ours, note)
    try:
        turn.assert_held()
        yield turn
    finally:
        turn.release()


def spec(servers: Servers) -> dict[str, object]:
    found: dict[str, object] = servers.state.leases[NAME]["spec"]
    return found


def test_a_lease_is_made_held_and_given_back(servers: Servers) -> None:
    """The next one has it at once, and the change of hands is counted."""
    with hold(servers, "cp-1_a") as held:
        assert held.held
        assert spec(servers)["holderIdentity"] == "cp-1_a"
        assert spec(servers)["leaseDurationSeconds"] == 30
        first = spec(servers)
        held.assert_held()
        assert spec(servers)["acquireTime"] == first["acquireTime"]
        assert spec(servers)["renewTime"] != first["renewTime"]
    assert spec(servers)["holderIdentity"] == ""
    with hold(servers, "cp-2_b"):
        assert spec(servers)["holderIdentity"] == "cp-2_b"
        assert spec(servers)["leaseTransitions"] == 2
        assert spec(servers)["acquireTime"] != first["acquireTime"]


def test_what_others_wrote_on_the_lease_stays(servers: Servers) -> None:
    """Labels on the lease stay, since they are not ours."""
    servers.state.put(NAME, "")
    servers.state.leases[NAME]["metadata"]["labels"] = {"team": "platform"}
    with hold(servers):
        assert servers.state.leases[NAME]["metadata"]["labels"] == {"team": "platform"}


@pytest.mark.parametrize("renewed", ["1970-01-01T00:00:00.000000Z", "2099-01-01T00:00:00.000000Z"])
def test_no_clock_of_another_node_is_believed(servers: Servers, renewed: str) -> None:
    """A lease that looks long expired is not, one from the future does: who sees it unchanged for its time may take it."""
    servers.state.put(NAME, "cp-2_b", seconds=600, renewed=renewed)
    with pytest.raises(LeaseHeldError, match="cp-2_b has it") as e, hold(servers, wait=1):
        pass
    assert e.value.exit_code == Exit.UNAVAILABLE
    servers.state.put(NAME, "cp-2_b", seconds=2, renewed=renewed)
    begin = time.monotonic()
    with hold(servers, wait=180) as held:
        assert held.held
        assert time.monotonic() - begin >= 2


def test_a_killed_run_of_the_same_node_delays_no_other(servers: Servers) -> None:
    """The next run of that node takes the lease at once; another node waits for its end."""
    killed = hold(servers, "cp-1_killed", duration=30)
    killed.__enter__()
    with pytest.raises(LeaseHeldError), hold(servers, "cp-2_other", wait=0.2):
        pass
    with hold(servers, "cp-1_next", wait=180):
        assert spec(servers)["holderIdentity"] == "cp-1_next"
    killed.__exit__(None, None, None)


def test_a_holder_that_renews_keeps_it(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change begins the time anew."""
    now = 0.0
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now))
    with contextlib.closing(api(servers, *servers.places)) as asked:
        claim = claim_in_kubernetes(asked, "cp-1_run", rules(3, 0))
        for number in range(4):
            servers.state.put(NAME, "cp-2_b", seconds=3, renewed=f"2026-01-01T00:00:0{number}.000000Z")
            assert claim.take() == "cp-2_b"
            now += 2.9
            assert claim.take() == "cp-2_b"
        now += 0.1
        assert claim.take() == ""


def test_a_lease_is_waited_for(servers: Servers) -> None:
    """The operator reads once which run holds it."""
    notes: list[str] = []
    other = contextlib.ExitStack()
    other.enter_context(hold(servers, "cp-2_b"))

    def note(text: str) -> None:
        notes.append(text)
        other.close()

    with hold(servers, wait=180, note=note) as held:
        assert held.held
    assert notes == [f"waiting for the lease {NAME}, which cp-2_b has"]


@pytest.mark.parametrize("there", [False, True], ids=["no lease yet", "a free one"])
def test_of_two_at_the_same_time_one_gets_it(servers: Servers, there: bool) -> None:
    """The other was faster between our look and our write: the API says conflict."""
    if there:
        servers.state.put(NAME, "")
    servers.state.before_write.append(lambda: servers.state.put(NAME, "cp-2_b"))
    with pytest.raises(LeaseHeldError, match="cp-2_b"), hold(servers):
        pass
    assert spec(servers)["holderIdentity"] == "cp-2_b"


def test_a_write_whose_answer_got_lost_is_ours(servers: Servers) -> None:
    """It was carried out, and made again with the next server: no conflict with ourselves."""
    servers.state.answers_to_lose = 1
    with hold(servers) as held:
        assert held.held
        servers.state.answers_to_lose = 1
        held.assert_held()
        assert spec(servers)["holderIdentity"] == "cp-1_run"


def test_a_lease_that_was_lost_stops_the_run(servers: Servers) -> None:
    """Taken by another while it could not be renewed; it is not taken back, nor given away."""
    with hold(servers, duration=1.5) as held:
        servers.state.put(NAME, "cp-2_b", seconds=1)
        with pytest.raises(LeaseHeldError, match="lost to cp-2_b"):
            held.assert_held()
        assert not held.held
        time.sleep(2)  # it has expired, and the thread leaves it alone
        with pytest.raises(LeaseHeldError, match="lost to cp-2_b"):
            held.assert_held()
    assert spec(servers)["holderIdentity"] == "cp-2_b"


def test_a_lease_that_another_has_by_now_is_not_given_back(servers: Servers) -> None:
    """A lease that another run has taken stays with it, though this run has not noticed its loss."""
    with hold(servers):
        servers.state.put(NAME, "cp-2_b")
    assert spec(servers)["holderIdentity"] == "cp-2_b"


def test_a_lease_that_was_deleted_is_made_again(servers: Servers) -> None:
    """A script that cleans up kube-system may delete it; the next renewal makes it again."""
    with hold(servers) as held:
        servers.state.leases.clear()
        held.assert_held()
        assert spec(servers)["holderIdentity"] == "cp-1_run"


def test_without_an_api_there_is_no_lease_and_no_obstacle(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note says so; and when the API is back, the run takes the lease."""
    notes: list[str] = []
    servers.stop_all()
    with hold(servers, note=notes.append) as held:
        assert not held.held
        monkeypatch.setattr(turns, "_BLINK_SECONDS", 600)
        begin = time.monotonic()
        held.assert_held()
        assert time.monotonic() - begin < 300  # the patience was for the first time
        assert len(notes) == 1
        assert "no lease was taken" in notes[0]
        servers.start(servers.places[1])
        held.assert_held()
        assert held.held
        assert spec(servers)["holderIdentity"] == "cp-1_run"
    assert spec(servers)["holderIdentity"] == ""


def test_an_api_that_goes_away_does_not_let_a_second_one_in(servers: Servers) -> None:
    """The holder of the lease may be restarting the very server that we ask."""
    first = servers.places[0]
    servers.state.put(NAME, "cp-2_b")

    def note(_: str) -> None:
        """It waits."""
        servers.stop(first)

    with pytest.raises(LeaseHeldError, match="cp-2_b has it"), hold(servers, "cp-1_run", first, wait=3, note=note):
        pass
    assert first.name not in servers.up


def test_a_lease_is_kept_through_the_restart_of_a_server(servers: Servers) -> None:
    """The other API servers renew it."""
    first, second, _ = servers.places
    with hold(servers, "cp-1_run", first, second, duration=2) as held:
        servers.stop(first)
        before = spec(servers)["renewTime"]
        renewed = wait_until(
            lambda: spec(servers)["renewTime"],
            lambda found: found != before,
            timedelta(seconds=120),
            pause_seconds=0.05,
        )
        assert renewed != before
        held.assert_held()


def test_a_lease_that_can_not_be_given_back_expires(servers: Servers) -> None:
    """A note says so, and the run ends as it would otherwise."""
    notes: list[str] = []
    with hold(servers, note=notes.append) as held:
        servers.stop_all()
        held.assert_held()  # no obstacle
    assert ["could not be renewed" in notes[0], "was not given back and expires in 30s" in notes[1]] == [True, True]


def test_no_right_to_the_lease_is_no_obstacle(servers: Servers) -> None:
    """Only another holder is one; a note names the kubeconfig that the API turned away."""
    notes: list[str] = []
    servers.state.refused = {"kubernetes-admin", "kubernetes-super-admin"}
    with hold(servers, note=notes.append) as held:
        assert not held.held
    assert "turns admin.conf away" in notes[0]


@contextlib.contextmanager
def ticking() -> Iterator[Callable[[], float]]:
    """A clock that stands still while this process does, as the clocks of nodes do not: one machine stalls at a time."""
    ticks, over = [0], threading.Event()

    def tick() -> None:
        while not over.wait(0.01):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield lambda: ticks[0] / 100
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_never_two_at_once(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many nodes that contend, die with the lease and come again, only one has it at any time."""
    inside: list[str] = []
    turns: list[str] = []
    overlaps: list[list[str]] = []
    problems: list[BaseException] = []

    def work(number: int) -> None:
        dice, attempt = random.Random(number), 0  # noqa: S311 (dice)
        while len(turns) < 20 and not problems:
            attempt += 1
            name = f"cp-{number}_{attempt}"
            claim = claim_in_kubernetes(api(servers, *servers.places), name, rules(2, 180))
            entered = Turn(claim, rules(2, 180), silent)
            try:
                entered.assert_held()
                inside.append(name)
                overlaps.append([one for one in inside if one != name])
                time.sleep(dice.uniform(0, 0.3))
                entered.assert_held()
                inside.remove(name)
                turns.append(name)
                if dice.random() < 0.2:  # dies: the lease is neither renewed nor given back
                    entered._keeper.stop()
                    continue
                entered.release()
            except BaseException as e:  # noqa: BLE001 (it is asserted below that there is none)
                problems.append(e)
                return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    with ticking() as clock:
        monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=clock))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems
    assert not [overlap for overlap in overlaps if overlap]
    assert len(turns) >= 20
    assert len({turn.split("_")[0] for turn in turns}) == 5


# --- both, and the settings ------------------------------------------------------------------------------------------


def test_a_turn_is_the_lease_and_a_look_at_the_others(servers: Servers) -> None:
    """Before each restart both are asked; the holder is the node's name, its API server's place and the run's id."""
    first, second, third = servers.places
    settings = first.settings('neighbours = "refuse"')
    with turns.turn(first.node, settings, "run-1", note=silent) as may:
        holder = f"cp-1_{urlsplit(local_url(first.node) or '').netloc}_run-1"
        assert spec(servers)["holderIdentity"] == holder
        may(APISERVER)
        servers.failing[third.name].append("etcd")
        with pytest.raises(NeighbourError, match=third.name):
            may(APISERVER)
        servers.failing[third.name].clear()
        with (
            pytest.raises(LeaseHeldError, match=holder),
            turns.turn(second.node, second.settings('lease_wait = "1s"'), "run-2", note=silent),
        ):
            pass
        servers.state.put(NAME, "cp-3_run-3")
        with pytest.raises(LeaseHeldError, match="cp-3_run-3"):
            may(APISERVER)


def test_nodes_of_the_same_name_have_their_turns_one_after_the_other(servers: Servers) -> None:
    """As hosts that are called alike, or settings that were copied from one node to the next."""
    first, second, _ = servers.places
    alike = second.settings('neighbours = "refuse"\nlease_wait = "1s"')
    alike = dataclasses.replace(alike, node=dataclasses.replace(alike.node, name=first.name))
    with turns.turn(first.node, first.settings('neighbours = "refuse"'), "run-1", note=silent):
        with pytest.raises(LeaseHeldError, match="run-1"), turns.turn(second.node, alike, "run-2", note=silent):
            pass
        assert str(spec(servers)["holderIdentity"]).endswith("_run-1")
    with turns.turn(second.node, alike, "run-2", note=silent):
        assert str(spec(servers)["holderIdentity"]).endswith("_run-2")


def test_a_turn_without_a_lease_looks_at_the_others(servers: Servers) -> None:
    """`lease = false` writes nothing into the cluster."""
    first, second, _ = servers.places
    with turns.turn(first.node, first.settings('neighbours = "refuse"\nlease = false'), "run-1", note=silent) as may:
        may(APISERVER)
        servers.failing[second.name].append("etcd")
        with pytest.raises(NeighbourError, match=second.name):
            may(APISERVER)
    assert {method for method, _, _ in servers.state.requests} == {"GET"}
    assert not servers.state.leases


@pytest.mark.parametrize(
    "line",
    ['neighbours = "hope"', 'lease = "yes"', 'lease_name = "A_b"', 'lease_duration = "5s"', 'lease_duration = "1d"'],
)
def test_settings_that_can_not_work_are_refused(line: str) -> None:
    """The error names the key."""
    with pytest.raises(SettingsError) as e:
        parse(f"[cluster]\n{line}\n")
    assert [problem.key for problem in e.value.problems] == [f"cluster.{line.partition(' ')[0]}"]
