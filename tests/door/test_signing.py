"""The door's rounds: what is read, judged and signed, also while the database can't be written to."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography import x509

from bridge.contract import Issued
from bridge.desk.workers import ReadBundle, Workers
from bridge.door.fleet import fleet, unnamed
from bridge.door.signing import Signing
from bridge.door.store import DatabaseError, DoorDatabase, sqlite_url
from bridge.pki.bundle import BundleError, Refusal, RequestBundle
from bridge.pki.bundle_format import digest, dumps, loads_answer
from bridge.pki.csr import build, generate_key
from bridge.pki.expiry import Before
from bridge.settings.load import load
from bridge.system.waiting import wait_until
from tests.kit.bundles import make_bundle, old_pairs
from tests.kit.desks import Desk
from tests.kit.pki import Pki

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


_PATIENCE = timedelta(minutes=3)


def now() -> datetime:
    return datetime.now(UTC)


def received(memory: DoorDatabase, digest_: str = "aa", **more: Any) -> str:
    values = {"digest": digest_, "node": "cp-1", "cluster": "kubernetes", "peer": "192.0.2.1", "now": NOW, **more}
    return memory.receive(values.pop("data", b"bundle"), **values)


def forbid(memory: DoorDatabase, what: str) -> None:
    """Let the database itself refuse, from now on, to do this."""
    statements = [f"CREATE TRIGGER too_full BEFORE {what} BEGIN SELECT RAISE(FAIL, 'full'); END"]
    if memory.engine.dialect.name == "postgresql":
        function = "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'full'; END $$"
        statements = [function, f"CREATE TRIGGER too_full BEFORE {what} FOR EACH ROW EXECUTE FUNCTION fail()"]
    with memory.engine.begin() as connection:
        for one in statements:
            connection.execute(sa.text(one))


def allow(memory: DoorDatabase, what: str) -> None:
    """Let it do this again."""
    table = what.rpartition(" ")[2] if memory.engine.dialect.name == "postgresql" else ""
    with memory.engine.begin() as connection:
        connection.execute(sa.text(f"DROP TRIGGER too_full{' ON ' + table if table else ''}"))


def unjudged(bundle: RequestBundle) -> ReadBundle:
    return ReadBundle(bundle=bundle, digest=digest(bundle))


@pytest.mark.attack("D1", "D4")
def test_a_stolen_node_takes_no_other_name_at_the_door(desk: Desk, memory: DoorDatabase, pki: Pki) -> None:
    """
    The door renewed cp-1; its keys say that they are cp-2, and nothing is stored. Under its own name they are received,
    also after `serve.keep`. A request that nothing proves is in no node's row of `fleet`.
    """
    pairs = old_pairs(pki, ["etcd-server", "admin.conf"])
    keys = {old.serial_number: generate_key("ecdsa-p256") for old, _ in pairs.values()}
    first = make_bundle(pairs, build=lambda old: x509.load_pem_x509_csr(build(old, keys[old.serial_number])))
    signing = Signing(load(desk.config), memory, desk.policy, now)
    signing.look()
    place = received(memory, digest(first), data=dumps(first), now=now())
    signing.round()
    kept = memory.find(place)
    assert kept is not None
    issued = loads_answer(kept.answer or b"").answers["admin.conf"]
    assert isinstance(issued, Issued)
    renewed = {"admin.conf": (issued.leaf, keys[pairs["admin.conf"][0].serial_number])}

    def answer(node: str) -> tuple[str, bool]:
        read = signing.judged(unjudged(make_bundle(renewed, node=node)))
        identity = signing.identity(read, is_named=False)
        return signing.refused(read, identity), identity.is_proven

    wanted = "admin.conf: node: wanted certificates of cp-2 (cluster kubernetes) alone, found some of cp-1 (cluster kubernetes)"
    for _ in range(2):
        assert answer("cp-2") == (wanted, False)
        assert answer("cp-1") == ("", True)
        memory.forget(now() + timedelta(days=1), now())
    memory.forget(now(), now() + timedelta(days=4000))
    assert answer("cp-2") == ("", False)

    claim = make_bundle(renewed, node="cp-3")
    received(memory, digest(claim), data=dumps(claim), node="cp-3", now=now())
    signing.round()
    signing.close()
    nodes = [(one.node, one.state) for one in fleet(memory, Before(remaining=timedelta(hours=1)), now())]
    assert nodes == [("cp-1", "ok")]  # and not cp-3, since the records of its keys are forgotten
    assert unnamed(memory) == 1


def test_a_database_that_can_not_be_written_to_asks_no_ca(
    desk: Desk, memory: DoorDatabase, bundle: RequestBundle
) -> None:
    """The round ends before a CA is asked; when the database is back, the next one signs."""
    place = memory.receive(
        dumps(bundle), digest=digest(bundle), node=bundle.node, cluster=bundle.cluster, peer="192.0.2.1", now=now()
    )
    signing = Signing(load(desk.config), memory, desk.policy, now)
    forbid(memory, "UPDATE ON requests")
    with pytest.raises(DatabaseError, match="full"):
        signing.round()
    before = len(desk.issued())
    allow(memory, "UPDATE ON requests")
    after = signing.round()
    signing.close()

    kept = memory.find(place)
    assert before == 0
    assert after == "idle"
    assert kept is not None
    assert kept.answer is not None
    assert isinstance(loads_answer(kept.answer).answers["apiserver"], Issued)
    assert len(desk.issued()) == 1


def test_an_answer_that_can_not_be_remembered_is_found_in_the_archive(
    desk: Desk, memory: DoorDatabase, bundle: RequestBundle
) -> None:
    """The CA has signed, and the database failed: the next round answers with the same certificate."""
    memory.receive(
        dumps(bundle), digest=digest(bundle), node=bundle.node, cluster=bundle.cluster, peer="192.0.2.1", now=now()
    )
    signing = Signing(load(desk.config), memory, desk.policy, now)
    forbid(memory, "INSERT ON certificates")
    first = signing.round()
    waiting = memory.counts()
    allow(memory, "INSERT ON certificates")
    second = signing.round()
    signing.close()

    assert (first, waiting) == ("down", {"waiting": 1})
    assert (second, memory.counts()) == ("idle", {"answered": 1})
    assert signing.outcomes == {"again": 1}
    assert len(desk.issued()) == 1


@pytest.mark.parametrize(("when", "kind"), [("before it", Refusal), ("while it begins", Refusal), ("after it", Issued)])
def test_a_round_is_by_one_policy(
    desk: Desk, memory: DoorDatabase, pki: Pki, monkeypatch: pytest.MonkeyPatch, when: str, kind: type[Issued | Refusal]
) -> None:
    """A policy that comes while a round begins counts for all of it."""
    signing, places = Signing(load(desk.config), memory, desk.policy, now), []
    signing.look()
    for _ in range(2):
        one = make_bundle(old_pairs(pki, ["apiserver"]))
        places.append(received(memory, digest(one), data=dumps(one), now=now()))

    def change(*_: object) -> None:
        desk.policy.write_text(desk.policy.read_text().replace("cp-*", "other-*"))

    if when == "before it":
        change()
    elif when == "while it begins":
        monkeypatch.setattr("bridge.door.signing.assert_elsewhere", change)  # the policy was read then
    signing.round()
    change()
    signing.close()

    kept = [one for one in map(memory.find, places) if one is not None]
    assert [type(loads_answer(one.answer or b"").answers["apiserver"]) for one in kept] == [kind, kind]


def test_a_round_begins_by_cas_that_took_long_to_reach(
    desk: Desk, memory: DoorDatabase, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CA that took longer to reach than it is kept for is asked, and not reached again and again."""
    monkeypatch.setattr("bridge.door.signing._OPEN_SECONDS", 0.0)
    signing, one = Signing(load(desk.config), memory, desk.policy, now), make_bundle(old_pairs(pki, ["apiserver"]))
    place = received(memory, digest(one), data=dumps(one), now=now())
    signing.round()
    signing.close()

    kept = memory.find(place)
    assert kept is not None
    assert isinstance(loads_answer(kept.answer or b"").answers["apiserver"], Issued)


class Counted(Workers):
    """Counts the tasks that were not done when another one came."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[Future[Any]] = []
        self.most = 0

    def submit(self, task: Callable[..., Any], *arguments: object) -> Future[Any]:
        """As any workers, and count."""
        self.tasks.append(super().submit(task, *arguments))
        self.most = max(self.most, sum(not one.done() for one in self.tasks))
        return self.tasks[-1]


@pytest.mark.parametrize("room", [3, 12])
def test_few_requests_wait_at_the_workers(
    desk: Desk, bundle: RequestBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """So many at most, however many come; each gets its own answer."""
    monkeypatch.setattr("bridge.door.signing._AT_WORKERS", room)
    monkeypatch.setattr("bridge.door.signing._WORKER_SECONDS", 300.0)
    every = [replace(bundle, batch=f"{number:032x}") for number in range(12)]
    with closing(DoorDatabase(sqlite_url(tmp_path / "door.db"))) as memory, closing(Counted()) as workers:
        signing = Signing(load(desk.config), memory, desk.policy, now)
        signing.workers = workers
        workers.begin(1)
        signing.look()
        process = workers._workers[0].process
        process.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(len(every)) as clients:
            answers = clients.map(signing.read, map(dumps, every), map(str, range(len(every))))
            wait_until(lambda: len(workers.tasks), lambda count: count >= room, _PATIENCE, pause_seconds=0.01)
            process.send_signal(signal.SIGCONT)
            found = list(answers)
        signing.close()

    assert workers.most == room
    assert [(one.bundle, one.digest) for one in found] == [(one, digest(one)) for one in every]
    assert all(one.by is not None for one in found)


def test_a_malformed_bundle_is_read_by_a_worker_alone(
    desk: Desk, memory: DoorDatabase, bundle: RequestBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error has the same text as without a worker; the door's own process, which signs, does not read it."""
    signing, malformed = (
        Signing(load(desk.config), memory, desk.policy, now),
        dumps(bundle).replace(b'"csr"', b'"crs"', 1),
    )
    signing.look()
    with pytest.raises(BundleError) as alone:
        signing.read(malformed, "192.0.2.1")
    with closing(Workers()) as workers:
        signing.workers = workers
        workers.begin(1)
        monkeypatch.setattr("bridge.door.signing._WORKER_SECONDS", 300.0)
        monkeypatch.setattr("bridge.door.signing.loads_digested", lambda _: pytest.fail("read by the door itself"))
        with pytest.raises(BundleError) as by_worker:
            signing.read(malformed, "192.0.2.1")
        assert signing.read(dumps(bundle), "192.0.2.1").bundle == bundle
    signing.close()
    assert (str(by_worker.value), by_worker.value.hint) == (str(alone.value), alone.value.hint)
