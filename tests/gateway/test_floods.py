"""One identity floods the API server, at whatever rate and size that takes: every other node's certificate comes soon."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509

from bridge.cluster.api import NoAnswerError, Reply
from bridge.gateway.context import Leader
from bridge.gateway.rules import CLIENT_KUBELET, SERVING
from bridge.gateway.service import Service
from bridge.gateway.watch import Watch
from bridge.system.waiting import wait_until
from tests.kit import cluster_api, gateways, hostile_csrs
from tests.kit.api_client import CSRS
from tests.kit.cluster_api import ClusterApi
from tests.kit.desk_program import DeskProgram
from tests.kit.gateways import Gateway, Place, csr_pem, node_subject, read, state_of
from tests.kit.small_disk import fill, tmpfs

pytestmark = pytest.mark.kube("kube-apiserver", "etcd")

NODES = "system:nodes"
#: A certificate of another node has to be there by then, and so much memory is enough.
SOON_SECONDS, MOST_MB = 90.0, 150.0
TOKEN = "system:bootstrap:abcdef"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ClusterApi]:
    """With the rights that the documents name, and the nodes w1 and w2."""
    with cluster_api.running(tmp_path / "cluster") as found:
        gateways.grant_rights(found)
        found.add_node("w1")
        found.add_node("w2")
        yield found


@pytest.fixture
def place(cluster: ClusterApi, tmp_path: Path) -> Place:
    """For a gateway that knows w1 to w3, with the rates that there are without settings."""
    desk = DeskProgram.make(tmp_path / "desk", cluster.ca, cluster.cas["front-proxy-ca"])
    inventory = gateways.INVENTORY + gateways.workers("w1", "w2", "w3")
    return Place(cluster=cluster, directory=tmp_path / "gateway", inventory=inventory, tables=[desk.tables])


def flood(cluster: ClusterApi, count: int, body: Callable[[int], dict[str, Any]], user: str = "system:node:w1") -> None:
    """As one identity, from several connections."""
    group = NODES if user.startswith("system:node:") else cluster_api.BOOTSTRAP_GROUP
    headers = {"Impersonate-User": user, "Impersonate-Group": group}
    own = threading.local()

    def make(number: int) -> int:
        if not hasattr(own, "client"):
            own.client = cluster.client()
        return int(own.client.ask("POST", CSRS, body(number), **headers).status)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(make, range(count))) == {201}


def small_with_annotations(number: int) -> dict[str, Any]:
    """What no bound on the CSR's length keeps out."""
    made = gateways.body(UNKNOWN, SERVING, name=f"aaa-{number:05}")
    made["metadata"]["annotations"] = {"x": "x" * 55_000}
    return made


def well_formed(number: int) -> dict[str, Any]:
    """A CSR of 14 kB in base64, below the 16 KiB of the admission policy, and another one each time."""
    sans = [x509.DNSName(f"n{number}-{one}.{'x' * 40}.{'y' * 40}.{'z' * 30}.example") for one in range(60)]
    return gateways.body(csr_pem(node_subject("w1"), sans), SERVING, name=f"aaa-{number:05}")


SMALL = csr_pem(node_subject("w1"), hostile_csrs.honest_sans("w1"))
#: The inventory may have this name tomorrow, so that the request is looked at for a day.
UNKNOWN = csr_pem(node_subject("w1"), [x509.DNSName("auth.company.example")])


def honest(cluster: ClusterApi, worker: str, signer: str = SERVING) -> str:
    """As the worker itself."""
    asking = hostile_csrs.honest(worker, signer)
    headers = {"Impersonate-User": f"system:node:{worker}", "Impersonate-Group": NODES}
    return str(cluster.client().create(CSRS, gateways.body(asking.pem, signer), **headers)["metadata"]["name"])


def soon(gateway: Gateway, cluster: ClusterApi) -> float:
    """How long an honest request may take: on a machine that is busy with other work, as many times as long as without a flood."""
    begin = time.monotonic()
    gateway.until(is_signed(cluster, honest(cluster, "w2", CLIENT_KUBELET)), 180, "before the flood")
    return max(SOON_SECONDS, 20 * (time.monotonic() - begin))


def is_signed(cluster: ClusterApi, name: str) -> Callable[[], bool]:
    return lambda: state_of(read(cluster, name)) == "signed"


@pytest.mark.attack("G1", "G2")
@pytest.mark.parametrize(("count", "body"), [(1_800, small_with_annotations), (2_500, well_formed)])
def test_a_flood_of_one_identity(
    cluster: ClusterApi, place: Place, count: int, body: Callable[[int], dict[str, Any]]
) -> None:
    """Another node's certificate comes before most of the flood is looked at, and soon after it, and for a new gateway, too."""
    with gateways.running(place) as gateway:
        limit = soon(gateway, cluster)
        running = threading.Thread(target=flood, args=(cluster, count, body))
        running.start()
        gateway.until(lambda: gateway.metric("queue", state="waiting") > 100, 180)
        gateway.until(is_signed(cluster, honest(cluster, "w2")), limit, "during the flood")
        running.join()
        for _ in range(2):
            gateway.until(is_signed(cluster, honest(cluster, "w2")), limit, "after the flood")
        gateway.until(lambda: gateway.metric("watch_complete") == 1, 180)
        gateway.until(lambda: gateway.page("readyz")[0] == gateway.page("healthz")[0] == 200)
        assert gateway.peak_mb() < MOST_MB
        assert gateway.end() == 0
    name = honest(cluster, "w2", CLIENT_KUBELET)
    with gateways.running(place, "two") as gateway:
        gateway.until(is_signed(cluster, name), limit, "by a new gateway")
        assert gateway.peak_mb() < MOST_MB


@pytest.mark.attack("G6")
def test_a_copy_of_the_token_keeps_no_new_node_out(cluster: ClusterApi, place: Place) -> None:
    """Requests that are refused for their own words delay only their like, though all have the token's name."""
    odd = csr_pem([(hostile_csrs.CN, "x")])
    with gateways.running(place) as gateway:
        limit = soon(gateway, cluster)
        flood(cluster, 400, lambda number: gateways.body(odd, CLIENT_KUBELET, name=f"aaa-{number:04}"), TOKEN)
        gateway.until(lambda: "too many requests" in gateway.text())
        headers = {"Impersonate-User": TOKEN, "Impersonate-Group": cluster_api.BOOTSTRAP_GROUP}
        asking = gateways.body(csr_pem(node_subject("w3")), CLIENT_KUBELET)
        name = cluster.client().create(CSRS, asking, **headers)["metadata"]["name"]
        gateway.until(is_signed(cluster, name), limit)
        assert gateway.metric("queue", state="waiting") > 100


@pytest.mark.attack("G3")
def test_what_an_administrator_has_deleted_is_not_signed(cluster: ClusterApi, place: Place) -> None:
    """A finalizer keeps the object; its twin without a deletion is signed, finalizer or not."""
    headers = {"Impersonate-User": "system:node:w1", "Impersonate-Group": NODES}
    names = ("deleted", "kept")
    for name in names:
        made = gateways.body(SMALL if name == "kept" else csr_pem(node_subject("w1")), SERVING, name=name)
        made["spec"]["signerName"] = SERVING if name == "kept" else CLIENT_KUBELET
        made["spec"]["usages"] = list(gateways.USAGES[made["spec"]["signerName"]])
        made["metadata"]["finalizers"] = ["example.com/mine"]
        cluster.client().create(CSRS, made, **headers)
    assert cluster.client().ask("DELETE", f"{CSRS}/deleted").ok
    assert read(cluster, "deleted")["metadata"]["deletionTimestamp"]
    with gateways.running(place) as gateway:
        gateway.until(is_signed(cluster, "kept"), 180)
        assert (state_of(read(cluster, "deleted")), read(cluster, "deleted")["status"]) == ("open", {})


@pytest.mark.attack("G4")
def test_a_record_without_room_gives_the_lease_to_another(cluster: ClusterApi, place: Place) -> None:
    """The replica says so and stands back, the other one works; with room again it is ready to."""
    with tmpfs(place.directory / "state-one") as directory, gateways.running(place) as one:
        with gateways.begun(place, "two") as two:
            two.until(lambda: "standing by" in two.page("readyz")[1])
            filler = fill(directory)
            name = honest(cluster, "w2")
            two.until(is_signed(cluster, name), 180)
            one.until(
                lambda: one.page("readyz")[0] == 503 and "audit log could not be written" in one.page("readyz")[1]
            )
            two.until(two.is_working)
            assert "the audit log can't be written" in one.text()
            filler.unlink()
            one.until(lambda: one.page("readyz")[1] == "ok: standing by\n", 180)
            assert two.end() == 0
        one.until(is_signed(cluster, honest(cluster, "w2", CLIENT_KUBELET)), 180)


class Quiet(Service):
    """The service without anything round it."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._started = self._ending = False
        self._threads = []
        self._watching = [Watch(None, [CLIENT_KUBELET])]  # type: ignore[arg-type]
        self._watching[0].alive, self._watching[0].trouble = 0.0, ""
        self._now = lambda: datetime.now(UTC)
        self.nodes = SimpleNamespace(files=lambda: (SimpleNamespace(pod_signers={}), None))  # type: ignore[assignment]
        self.looks = 0

    def look(self, *_: object) -> list[str]:
        """As a CA's `check`; the third is the last."""
        self.looks += 1
        if self.looks > 2:
            self._stop.set()
        return []


@pytest.mark.attack("G11")
def test_the_issuers_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new intermediate of the CA lives longer than the one that was there when the gateway began."""
    monkeypatch.setattr("bridge.gateway.service._ISSUERS_SECONDS", 0.01)
    service = Quiet()
    ca: Any = SimpleNamespace(check=service.look, anchors=lambda: ())
    service._keep_looking(ca, threading.Event())
    assert service.looks == 3
    monkeypatch.undo()  # an hour; another root in `pods.crt` makes it look at once
    service, roots = Quiet(), itertools.count(1)
    ca = SimpleNamespace(check=service.look, anchors=lambda: (next(roots),))
    service._keep_looking(ca, threading.Event())
    assert service.looks == 3


def test_a_ca_that_hangs_holds_up_no_other_when_the_gateway_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are looked at together, and waited for for a while: with one that never answers, the others' looks are there."""
    monkeypatch.setattr("bridge.gateway.service._FIRST_LOOK_SECONDS", 0.5)
    service, released, silent = Quiet(), threading.Event(), threading.Event()

    def hang(*_: object) -> list[str]:
        silent.set()
        released.wait(600)
        return []

    checks = {"ca": hang, "etcd-ca": service.look, "front-proxy-ca": hang, "pods": service.look}
    cas: Any = {name: SimpleNamespace(name=name, check=check, anchors=tuple) for name, check in checks.items()}
    service.authorities = cas
    threads = list(service._look_at_cas())
    wait_until(lambda: service.looks, lambda count: count == 2, timedelta(minutes=3), pause_seconds=0.01)
    assert (silent.wait(180), service.looks, [one.is_alive() for one in threads]) == (True, 2, [True] * 4)
    service._stop.set()
    released.set()
    for one in threads:
        one.join(180)
        assert not one.is_alive()


@pytest.mark.attack("G12", "G17")
def test_a_watch_that_hangs_and_a_thread_that_ended_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """`/healthz` fails whatever trouble was noted before, so that the process is started anew."""
    service = Quiet()
    monkeypatch.setattr("bridge.gateway.service.time.monotonic", lambda: 100.0)
    service._watching[0].trouble = "the watch broke"
    assert service._healthz() == (200, "ok\n")
    monkeypatch.setattr("bridge.gateway.service.time.monotonic", lambda: 200.0)
    assert service._healthz() == (503, "nothing was heard from the watch for 200 s\n")
    service._watching[0].alive = 200.0
    service._threads = [threading.Thread(name="lease")]
    assert service._healthz() == (503, "threads have ended: lease\n")


@pytest.mark.attack("G1")
def test_a_replica_that_does_not_get_to_the_end_of_what_is_there_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a flood that is read for minutes others may wait; at its end the API server sends a bookmark."""
    service, clock = Quiet(), [100.0]
    monkeypatch.setattr("bridge.gateway.service.time.monotonic", lambda: clock[0])
    service.nodes, service._started = SimpleNamespace(trouble=""), True  # type: ignore[assignment]
    service.context = SimpleNamespace(ledger=SimpleNamespace(trouble=""))  # type: ignore[assignment]
    service.holder = SimpleNamespace(is_ours=lambda: True)  # type: ignore[assignment]
    [round_] = service._watching
    round_.began = clock[0]
    clock[0] += 120
    assert service._readyz() == (200, "ok: this replica works\n")
    clock[0] += 1
    assert service._readyz() == (503, "the watch has not read all requests for 121 s\n")
    assert round_._found(b'{"type":"BOOKMARK","object":{}}') is None
    assert service._readyz() == (200, "ok: this replica works\n")


def test_a_replica_that_can_not_have_the_lease_says_why() -> None:
    """An API server that refuses it answers all the same."""
    service = Quiet()
    service.nodes, service._started = SimpleNamespace(trouble=""), True  # type: ignore[assignment]
    service.context = SimpleNamespace(ledger=SimpleNamespace(trouble=""))  # type: ignore[assignment]
    answers = [Reply(status=404, body=b"{}"), Reply(status=404, body=b'{"message": "no such namespace"}')]
    api: Any = SimpleNamespace(ask=lambda *_: answers.pop(0))
    service.holder = Leader(api, ("nowhere", "one"), "me", timedelta(seconds=10))
    service.holder.last_answer = -1000.0
    assert service._readyz() == (503, "the API server does not answer\n")
    with pytest.raises(NoAnswerError):
        service.holder._renew()
    assert service._readyz() == (503, "wanted the lease one, found HTTP 404 no such namespace\n")


@pytest.mark.attack("G4")
def test_a_process_that_can_not_write_its_record_for_a_minute_is_sick() -> None:
    """A new pod has an empty directory; a moment without room is none."""
    service, seconds = Quiet(), [60.0]
    service._started = True
    service._watching.clear()
    trouble = "the audit log could not be written: No space left on device"
    ledger = SimpleNamespace(trouble=trouble, failing_seconds=lambda: seconds[0])
    service.context = SimpleNamespace(ledger=ledger)  # type: ignore[assignment]
    assert service._healthz() == (200, "ok\n")
    seconds[0] = 61.0
    assert service._healthz() == (503, f"{trouble}\n")
