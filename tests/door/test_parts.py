"""The door's parts in this process: its database, a disk that is full, and the extra that is missing."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from bridge.cli import serve
from bridge.contract import Issued
from bridge.desk.policy import PolicyVerdict
from bridge.desk.workers import Judgement, ReadBundle, Workers
from bridge.door import app, approvals, store
from bridge.door.app import Awaited, Door
from bridge.door.doors import Doors
from bridge.door.service import Service
from bridge.door.signing import Signing
from bridge.door.store import METADATA, DatabaseError, IssuedRow, Memory, sqlite_url
from bridge.errors import Exit
from bridge.pki.bundle import BundleError, Refusal, RequestBundle
from bridge.pki.bundle_format import digest, dumps, loads_answer, loads_request
from bridge.settings import Source
from bridge.settings.load import load
from bridge.settings.tables import ServeSettings, Settings
from bridge.state import Store
from bridge.system.waiting import wait_until
from tests.kit.bundles import make_bundle, old_pairs
from tests.kit.desks import Desk
from tests.kit.pki import Pki
from tests.kit.serving import Database

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
_PATIENCE = timedelta(minutes=3)


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def bundle(pki: Pki) -> RequestBundle:
    return make_bundle(old_pairs(pki, ["apiserver"]))


def received(memory: Memory, digest_: str = "aa", **more: Any) -> str:
    values = {"digest": digest_, "node": "cp-1", "cluster": "kubernetes", "peer": "192.0.2.1", "now": NOW, **more}
    return memory.receive(values.pop("data", b"bundle"), **values)


def issued(**more: Any) -> IssuedRow:
    values: dict[str, Any] = {"fingerprint": "ff", "csr": "cc", "name": "apiserver", "authority": "ca", "node": "cp-1"}
    values |= {"cluster": "kubernetes", "serial": "01", "begins": NOW, "ends": NOW, "chain": b"pem", **more}
    return IssuedRow(**values)


# --- the database -----------------------------------------------------------------------------------------------------


def test_a_new_database_has_the_tables_of_this_version(memory: Memory) -> None:
    """A new database has the tables that the program writes to; a missing table is noticed."""
    with memory.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
        connection.execute(sa.text("DROP TABLE enrolments"))
        assert compare_metadata(MigrationContext.configure(connection), METADATA) != []


def test_a_database_is_opened_again_and_one_of_another_revision_is_not(database: Database, tmp_path: Path) -> None:
    """Its requests are there; a form that this version does not know keeps the door from beginning."""
    first = database.memory(tmp_path)
    request = received(first)
    first.close()
    second = database.memory(tmp_path)
    kept = second.find(request)
    with second.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'of tomorrow'"))
    second.close()

    assert kept is not None
    assert (kept.state, kept.received, kept.bundle) == ("waiting", NOW, b"bundle")
    with pytest.raises(DatabaseError, match="wanted tables of revision initial, found of tomorrow"):
        database.memory(tmp_path)


def test_a_new_file_has_all_tables_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A door that is killed while it makes them leaves none; the next one would take a table without its index for whole."""
    place = tmp_path / "door.db"
    with monkeypatch.context() as patched:
        patched.setattr("alembic.command.stamp", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Memory(sqlite_url(place))
    with closing(sqlite3.connect(place)) as file:
        assert file.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    with closing(Memory(sqlite_url(place))) as memory, memory.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_a_database_of_this_version_is_opened_while_another_program_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ca-bridge fleet` waits for no door's write; only a database that gets tables is locked."""
    place = tmp_path / "door.db"
    with closing(Memory(sqlite_url(place))) as first:
        request = received(first)
    monkeypatch.setattr(store, "_BUSY_SECONDS", 0)
    with closing(sqlite3.connect(place, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with closing(Memory(sqlite_url(place))) as second:
            assert second.find(request) is not None
        with pytest.raises(DatabaseError, match="locked"), closing(Memory(sqlite_url(place))) as third:
            received(third, "bb")


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    """A database with a table of our names, and no form of ours, is refused, and gets none of our tables."""
    place = tmp_path / "door.db"
    with closing(sqlite3.connect(place)) as file:
        file.execute("CREATE TABLE certificates (serial TEXT)")
    with pytest.raises(DatabaseError, match="certificates already exists"):
        Memory(sqlite_url(place))
    with closing(sqlite3.connect(place)) as file:
        assert file.execute("SELECT name FROM sqlite_master").fetchall() == [("certificates",)]


def test_the_same_bundle_has_one_id(memory: Memory) -> None:
    """Another bundle has another."""
    assert received(memory, "aa") == received(memory, "aa") != received(memory, "bb")


def test_a_request_goes_from_waiting_to_answered(memory: Memory, tmp_path: Path) -> None:
    """The request that was tried least recently is next; an answer that is written twice is one."""
    first, second = received(memory, "aa"), received(memory, "bb", now=NOW + timedelta(seconds=1))
    doors = Doors(memory, Store(tmp_path), "us")
    doors.alive()
    doors.begin([first], NOW + timedelta(minutes=1))
    order = [one.id for one in doors.to_sign(10)]
    memory.note(first, "its CA is away")
    waits = memory.find(first)
    for _ in range(2):
        memory.conclude(first, b"answer", [issued()], NOW)
    kept = memory.find(first)

    assert order == [second, first]
    assert waits is not None
    assert waits.note == "its CA is away"
    assert kept is not None
    assert (kept.state, kept.answer, kept.note) == ("answered", b"answer", "")
    assert memory.counts() == {"answered": 1, "waiting": 1}
    assert memory.unanswered("192.0.2.1") == (1, 1, 1)
    assert memory.unanswered("192.0.2.2") == (1, 0, 1)
    assert memory.issued_among(["cc"]) == {("cc", "apiserver"): b"pem"}


# --- a disk that is full ----------------------------------------------------------------------------------------------


def fill(memory: Memory) -> None:
    """Let SQLite itself say that its disk is full, and let all that waits in its log be in the file."""
    with memory.engine.connect() as connection:
        connection.execute(sa.text("PRAGMA wal_checkpoint(TRUNCATE)"))
    memory.engine.dispose()

    @sa.event.listens_for(memory.engine, "connect")
    def limited(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # SQLite takes it as "no more than there are"


def forbid(memory: Memory, what: str) -> None:
    """Let the database itself refuse, from now on, to do this."""
    statements = [f"CREATE TRIGGER too_full BEFORE {what} BEGIN SELECT RAISE(FAIL, 'full'); END"]
    if memory.engine.dialect.name == "postgresql":
        function = "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'full'; END $$"
        statements = [function, f"CREATE TRIGGER too_full BEFORE {what} FOR EACH ROW EXECUTE FUNCTION fail()"]
    with memory.engine.begin() as connection:
        for one in statements:
            connection.execute(sa.text(one))


def allow(memory: Memory, what: str) -> None:
    """Let it do this again."""
    table = what.rpartition(" ")[2] if memory.engine.dialect.name == "postgresql" else ""
    with memory.engine.begin() as connection:
        connection.execute(sa.text(f"DROP TRIGGER too_full{' ON ' + table if table else ''}"))


def posted(door: Door, data: bytes, peer: str = "192.0.2.1") -> tuple[str, dict[str, str], dict[str, Any]]:
    """Status, headers and document of an answer."""
    started: list[Any] = []
    environ = {
        "REQUEST_METHOD": "POST", "PATH_INFO": "/v1/requests", "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(data)), "wsgi.input": BytesIO(data), "REMOTE_ADDR": peer,
    }  # fmt: skip
    body = b"".join(door(environ, lambda status, headers: started.extend([status, dict(headers)])))
    return started[0], started[1], json.loads(body)


def unjudged(bundle: RequestBundle) -> ReadBundle:
    return ReadBundle(bundle=bundle, digest=digest(bundle))


def make_application(memory: Memory, *, is_judged: bool = True, a_minute: int = 1000, waiting: int = 10) -> Door:
    serve = ServeSettings(waiting=waiting, waiting_per_peer=waiting, requests_per_minute=a_minute)
    signing: Any = SimpleNamespace(
        read=lambda data, _: unjudged(loads_request(data)),
        judged=lambda one, _: one,
        refused=lambda _: "",
        judges=lambda _: is_judged,
        expect=lambda *_: None,
    )
    return Door(Settings(source=Source(None, ""), serve=serve), memory, signing, now, {})


def test_one_address_has_a_rate(memory: Memory) -> None:
    """The answer to one more says when to come again; another address gets its answer."""
    door = make_application(memory, a_minute=3)
    statuses = [posted(door, b"text")[0] for _ in range(4)]
    late = posted(door, b"text")[1]

    assert statuses == [*["400 Bad Request"] * 3, "429 Too Many Requests"]
    assert 1 <= int(late["Retry-After"]) <= 20
    assert posted(door, b"text", peer="192.0.2.2")[0] == "400 Bad Request"


def test_what_can_not_be_judged_gets_a_tenth_of_the_room(memory: Memory, pki: Pki) -> None:
    """A stranger fills that while no CA was reached, and a node whose request can be judged still gets in."""
    first, second, third = (dumps(make_bundle(old_pairs(pki, ["apiserver"]))) for _ in range(3))
    unjudged = make_application(memory, is_judged=False)
    statuses = [posted(unjudged, first)[0], posted(unjudged, second)[0], posted(unjudged, second, peer="192.0.2.2")[0]]

    assert statuses == ["202 Accepted", "429 Too Many Requests", "503 Service Unavailable"]
    assert posted(make_application(memory), third)[0] == "202 Accepted"


def test_what_can_not_be_judged_is_not_long(memory: Memory, pki: Pki) -> None:
    """A stranger's, of which rounds hold two hundred, would take a door's memory; a node's comes again for its CA."""
    data = dumps(make_bundle(old_pairs(pki, ["apiserver"])))
    long = data + b" " * ((64 << 10) + 1 - len(data))
    unjudged = make_application(memory, is_judged=False, waiting=1000)
    status, headers, document = posted(unjudged, long)

    assert (status, headers["Retry-After"]) == ("503 Service Unavailable", "30")
    assert document["error"] == "wanted at most 65536 bytes for a CA that was not reached yet, found 65537"
    assert posted(make_application(memory), long)[0] == "202 Accepted"
    assert posted(unjudged, dumps(make_bundle(old_pairs(pki, ["apiserver"]))))[0] == "202 Accepted"


def test_a_list_for_people_reads_no_more_than_it_shows(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand bundles may wait for people, and a look at the first of them is not to take the memory of all."""
    for number in range(3):
        memory.move(received(memory, f"{number}"), "undecided", before=["waiting"])
    found: list[int] = []
    select = memory.select

    def counted(*query: Any) -> Any:
        rows = select(*query)
        found.append(len(rows))
        return rows

    monkeypatch.setattr(memory, "select", counted)
    monkeypatch.setattr(approvals, "MOST", 2)
    list(approvals.Approvals(memory, Mock(), Mock()).waiting())

    assert found == [2]


def test_a_look_at_readiness_counts_nothing(memory: Memory) -> None:
    """Strangers may ask: the database says in one step that it answers, however many requests it has."""
    statements: list[str] = []
    sa.event.listen(memory.engine, "before_cursor_execute", lambda *about: statements.append(about[2]))
    door: Any = SimpleNamespace(_door=Mock(ending=threading.Event()), _trouble="", memory=memory)

    assert list(Service._unready(door)) == []
    assert statements
    assert not any("count(" in one for one in statements)


def test_a_list_for_people_has_one_bundle_in_memory(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read when it is its turn: two hundred with a stranger's SANs would take more than a door's unit has."""
    for number in range(3):
        memory.move(received(memory, f"{number}"), "undecided", before=["waiting"])
    read = Mock(return_value=Mock(requests=[]))
    monkeypatch.setattr(approvals, "loads_request", read)
    waiting = iter(approvals.Approvals(memory, Mock(), Mock()).waiting())
    next(waiting)

    assert read.call_count == 1
    assert len(list(waiting)) == 2


def test_where_many_wait_nodes_look_again_later(memory: Memory, pki: Pki) -> None:
    """A second for each 60 that were there before; those for people don't count."""
    first, second = (dumps(make_bundle(old_pairs(pki, ["apiserver"]))) for _ in range(2))
    door = make_application(memory, waiting=250)
    waiting = [received(memory, f"{number}") for number in range(180)]
    many = posted(door, first)[1]["Retry-After"]
    for number in range(60):
        door.answered(f"{number}")
    fewer = posted(door, first)[1]["Retry-After"]
    for request in waiting:
        memory.move(request, "undecided", before=["waiting"])
    few = posted(door, second)[1]["Retry-After"]

    assert (many, fewer, few) == ("3", "2", "1")


def test_an_answer_that_comes_soon_is_waited_for(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """By as many threads as there are places; a further one gets the request as it is."""
    monkeypatch.setattr(app, "_LOOK_SECONDS", _PATIENCE.total_seconds())  # it is the round that says so
    kept = memory.find(received(memory, "aa"))
    assert kept is not None
    awaited = Awaited(memory, longest=_PATIENCE, places=1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(awaited.over, kept, _PATIENCE)
        wait_until(lambda: awaited._digests, bool, _PATIENCE, pause_seconds=0.01)
        second = awaited.over(kept, _PATIENCE)
        memory.conclude(kept.id, b"{}", [], now(), "")
        for other in ("bb", "aa"):
            awaited.answered(other)
        answered = first.result(_PATIENCE.total_seconds())

    assert (answered.answer, second) == (b"{}", kept)
    assert awaited.over(kept, timedelta()).answer == b"{}"


def test_a_full_disk_takes_no_request(tmp_path: Path, bundle: RequestBundle, caplog: pytest.LogCaptureFixture) -> None:
    """503 with Retry-After, and a sentence without the database's own words, which the log has."""
    memory = Memory(sqlite_url(tmp_path / "door.db"))
    door = make_application(memory)
    big = json.dumps({**json.loads(dumps(bundle)), "digest": digest(bundle)}).encode() + b" " * 100_000
    fill(memory)
    full = posted(door, big)
    with memory.engine.begin() as connection:
        connection.execute(sa.text("PRAGMA max_page_count = 100000"))
        assert connection.execute(REQUEST_COUNT).scalar() == 0
    memory.close()

    assert full[0] == "503 Service Unavailable"
    assert full[1]["Retry-After"] == "30"
    assert full[2]["error"] == "the database does not answer; the door's log says why"
    assert "is full" in caplog.text


REQUEST_COUNT = sa.text("SELECT count(*) FROM requests")


def test_a_database_that_can_not_be_written_to_asks_no_ca(desk: Desk, memory: Memory, bundle: RequestBundle) -> None:
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
    desk: Desk, memory: Memory, bundle: RequestBundle
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


#: What may have changed since a request was judged, so that it has to be judged anew.
CHANGES: dict[str, Callable[[Judgement], Judgement]] = {
    "nothing": lambda by: by,
    "the policy": lambda by: replace(by, policy=replace(by.policy, approvals=replace(by.policy.approvals, count=2))),
    "a CA": lambda by: replace(by, cas={}),
    "the time": lambda by: replace(by, now=by.now - timedelta(minutes=2)),
    "an enrolment": lambda by: replace(by, without_proof=frozenset({"apiserver"})),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_judgement_counts_in_the_round_while_nothing_has_changed(
    desk: Desk, memory: Memory, bundle: RequestBundle, what: str
) -> None:
    """A refusal that the policy does not give is taken over, or else the request is judged again, and signed; a long one, too."""
    data = dumps(bundle) + b" " * 100_000
    place = memory.receive(
        data, digest=digest(bundle), node=bundle.node, cluster=bundle.cluster, peer="192.0.2.1", now=now()
    )
    signing = Signing(load(desk.config), memory, desk.policy, now)
    signing.look()
    judged = signing.judged(unjudged(bundle))
    assert judged.by is not None
    assert not signing.refused(judged)
    refused = PolicyVerdict(problems=("judged when it came",), proven=True)
    signing.expect(data, replace(judged, by=CHANGES[what](judged.by), verdicts={"apiserver": refused}))
    signing.round()
    signing.close()

    kept = memory.find(place)
    assert kept is not None
    assert kept.answer is not None
    answer = loads_answer(kept.answer).answers["apiserver"]
    assert isinstance(answer, Refusal if what == "nothing" else Issued)


def test_what_came_takes_so_many_bytes_of_memory(
    desk: Desk, memory: Memory, bundle: RequestBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latest bundles are kept for a round, as long as the limit has room for all; the others are read again."""
    monkeypatch.setattr("bridge.door.signing._LARGEST_READ_BYTES", 25)
    signing = Signing(load(desk.config), memory, desk.policy, now)
    kept = []
    for number in range(5):
        signing.expect(b"%d" % number * 10, unjudged(bundle))
        kept.append([one[:1] for one in signing._read])

    assert kept == [[b"0"], [b"0", b"1"], [b"2"], [b"2", b"3"], [b"4"]]


@pytest.mark.parametrize(("when", "kind"), [("before it", Refusal), ("while it begins", Refusal), ("after it", Issued)])
def test_a_round_is_by_one_policy(
    desk: Desk, memory: Memory, pki: Pki, monkeypatch: pytest.MonkeyPatch, when: str, kind: type[Issued | Refusal]
) -> None:
    """A policy that comes while a round begins counts for all of it, whether a request was judged when it came or not."""
    signing, places = Signing(load(desk.config), memory, desk.policy, now), []
    signing.look()
    for number in range(2):
        one = make_bundle(old_pairs(pki, ["apiserver"]))
        data = dumps(one)
        places.append(received(memory, digest(one), data=data, now=now()))
        if number:
            signing.expect(data, signing.judged(unjudged(one)))

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
    desk: Desk, memory: Memory, pki: Pki, monkeypatch: pytest.MonkeyPatch
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
        super().__init__(1)
        self.tasks: list[Future[Any]] = []
        self.most = 0

    def submit(self, chunk: int, task: Callable[..., Any], *arguments: object) -> Future[Any]:
        """As any workers, and count."""
        self.tasks.append(super().submit(chunk, task, *arguments))
        self.most = max(self.most, sum(not one.done() for one in self.tasks))
        return self.tasks[-1]


@pytest.mark.parametrize("room", [3, 12])
def test_requests_that_come_do_not_hold_up_a_round(
    desk: Desk, bundle: RequestBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """So many at most are before a round's comparisons at a worker, however many come; each gets its own answer."""
    monkeypatch.setattr("bridge.door.signing._AT_WORKERS", room)
    monkeypatch.setattr("bridge.door.signing._WORKER_SECONDS", 300.0)
    every = [replace(bundle, batch=f"{number:032x}") for number in range(12)]
    with closing(Memory(sqlite_url(tmp_path / "door.db"))) as memory, closing(Counted()) as workers:
        signing = Signing(load(desk.config), memory, desk.policy, now)
        signing.workers = workers
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
    desk: Desk, memory: Memory, bundle: RequestBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error has the same text as without a worker; the door's own process, which signs, does not read it."""
    signing, malformed = (
        Signing(load(desk.config), memory, desk.policy, now),
        dumps(bundle).replace(b'"csr"', b'"crs"', 1),
    )
    signing.look()
    with pytest.raises(BundleError) as alone:
        signing.read(malformed, "192.0.2.1")
    with closing(Workers(1)) as workers:
        signing.workers = workers
        monkeypatch.setattr("bridge.door.signing._WORKER_SECONDS", 300.0)
        monkeypatch.setattr("bridge.door.signing.loads_digested", lambda _: pytest.fail("read by the door itself"))
        with pytest.raises(BundleError) as by_worker:
            signing.read(malformed, "192.0.2.1")
        assert signing.read(dumps(bundle), "192.0.2.1").bundle == bundle
    signing.close()
    assert (str(by_worker.value), by_worker.value.hint) == (str(alone.value), alone.value.hint)


# --- the extra --------------------------------------------------------------------------------------------------------


def test_without_the_extra_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the missing packages and how to install them; with them the door begins."""
    real = importlib.util.find_spec
    serve.assert_installed("ca-bridge serve")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cheroot" else real(name))

    with pytest.raises(
        serve.MissingExtraError, match="needs cheroot, Jinja2, SQLAlchemy, alembic, found no cheroot"
    ) as e:
        serve.assert_installed("ca-bridge serve")
    assert e.value.exit_code == Exit.USAGE
    page = (Path(__file__).parents[2] / "docs/door.md").read_text(encoding="utf-8")
    assert all(line in page for line in re.findall("`(pip install [^`]+)`", e.value.hint))
    assert "kubeadm-ca-bridge[" not in page + e.value.hint  # the name is not registered: a stranger could have it
