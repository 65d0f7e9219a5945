"""Several doors on one database, a database that went back in time, and its upkeep: nothing is signed twice."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from pathlib import Path

import pytest
import sqlalchemy as sa

from bridge.ca import CA
from bridge.contract import Issued
from bridge.desk.records import Journal, Submitted
from bridge.door.doors import (
    STALE_SECONDS,
    BehindError,
    Doors,
    NotOursError,
    assert_not_behind,
    is_foreign,
    newest_round,
)
from bridge.door.signing import Signing
from bridge.door.store import CERTIFICATES, DOORS, REQUESTS, DoorDatabase, Kept, database_file, open_memory
from bridge.errors import BackendUnavailableError, Exit
from bridge.pki.bundle import AnswerBundle, RequestBundle, sign_request
from bridge.pki.bundle_format import digest, dumps, loads_answer
from bridge.pki.certificates import pem
from bridge.settings.load import load
from bridge.state import Store
from bridge.system.waiting import wait_until
from tests.kit.bundles import make_bundle, old_pairs
from tests.kit.desks import POLICY, SIGNING_STEPS, Desk, killing
from tests.kit.est import Tls
from tests.kit.est_door import LABELS, certificates, make_csr, make_est_door
from tests.kit.issuing import Signer
from tests.kit.people import Team
from tests.kit.pki import Pki
from tests.kit.serving import Database, ServeProgram, add_door, running

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
_PATIENCE = timedelta(minutes=3)


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def bundle(pki: Pki) -> RequestBundle:
    return make_bundle(old_pairs(pki, ["apiserver", "etcd-server"]))


def second(desk: Desk, settings: str) -> ServeProgram:
    """A door on another host, as far as its state directory goes, with the same CAs and the same database."""
    directory = desk.directory.with_name("second")
    directory.mkdir()
    text = desk.config.read_text().partition("[serve]")[0]
    (directory / "config.toml").write_text(text.replace(str(desk.state), str(directory / "state")))
    shutil.copy(desk.policy, directory)
    return add_door(directory / "config.toml", directory, settings)


def awaited(door: ServeProgram, place: str) -> AnswerBundle:
    answer = wait_until(
        lambda: door.ask("GET", place), lambda one: one.status not in {202, 503}, _PATIENCE, pause_seconds=0.1
    )
    assert answer.status == 200, (answer.body, door.said)
    return loads_answer(answer.body)


def silence(memory: DoorDatabase) -> None:
    """Let all doors have been silent for long."""
    with memory.engine.begin() as connection:
        connection.execute(DOORS.update().values(seen=now() - timedelta(minutes=5)))


# --- the rules --------------------------------------------------------------------------------------------------------


def kept(**more: object) -> Kept:
    one = Kept(
        id="a", digest="d" * 64, node="cp-1", cluster="kubernetes", peer="192.0.2.1", received=NOW, state="waiting",
        begun=None, note="", answered=None, bundle=b"", answer=None,
    )  # fmt: skip
    return replace(one, **more)  # type: ignore[arg-type]


HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("one", "restored", "expected"),
    [
        (kept(), None, False),
        (kept(signer="us", begun=NOW), None, False),
        (kept(signer="another", begun=NOW), None, True),
        (kept(signer="", begun=NOW), None, False),  # people have looked
        (kept(), NOW + HOUR, True),  # the database may have forgotten who has begun it
        (kept(), NOW - 2 * HOUR, False),  # it was made after the restore
        (kept(), NOW - HOUR / 2, True),  # by a clock that may be wrong
        (kept(signer="us", begun=NOW), NOW + HOUR, True),
        (kept(signer="us", begun=NOW + 2 * HOUR), NOW + HOUR, False),  # this door has asked the CA since
        (kept(signer=""), NOW + HOUR, False),
    ],
)
def test_what_another_may_have_had_signed_is_asked_for_first(
    one: Kept, restored: datetime | None, expected: bool
) -> None:
    """The signer and the time of a restore decide which requests the CA is asked about first."""
    assert is_foreign(one, NOW, "us", restored) is expected


def test_the_audit_log_is_compared_with_the_database() -> None:
    """Its newest round of this door may be in the database, and no later one; other doors' and other lines don't count."""
    lines: list[dict[str, object]] = [
        {"door": "us", "round": 3},
        {"event": "issued"},
        {"door": "another", "round": 9},
        {"door": "us", "round": 2},
    ]
    recorded = newest_round(lines, "us")
    assert_not_behind(recorded, 3)
    with pytest.raises(BehindError, match="round 3"):
        assert_not_behind(recorded, 2)


def test_a_door_that_the_database_does_not_hear_of_asks_no_ca(memory: DoorDatabase, tmp_path: Path) -> None:
    """Another door may be signing in its place; a door whose sign of life arrived asks, unless it is ending."""
    doors = Doors(memory, Store(tmp_path), "us")
    doors.alive()
    doors.assert_ours()
    doors.is_ending = True
    with pytest.raises(NotOursError, match="shutting down"):
        doors.assert_ours()
    doors.is_ending = False
    doors._heard -= STALE_SECONDS + 1
    with pytest.raises(NotOursError, match="heartbeat"):
        doors.assert_ours()


def test_a_journal_lets_no_ca_be_asked_after_an_error(bundle: RequestBundle, tmp_path: Path) -> None:
    """A request that can't be written down is not sent; an answer is still recorded."""
    journal, request = Journal(tmp_path / "journal", now()), sign_request(bundle.requests[0], bundle)

    def fail() -> None:
        raise NotOursError("not ours")

    journal.before_asking = fail
    with pytest.raises(NotOursError):
        journal.add([(request, Submitted(now()))])
    assert journal.get(request) is None
    journal.before_asking = lambda: None
    journal.add([(request, Submitted(now()))])
    assert journal.get(request) is not None


# --- several doors ----------------------------------------------------------------------------------------------------


def test_a_request_is_one_doors(memory: DoorDatabase, tmp_path: Path) -> None:
    """A door begins what is new, its own, and what a silent door has begun; never what a living one has."""
    us, they = (Doors(memory, Store(tmp_path), name) for name in ("us", "they"))
    us.alive()
    they.alive()
    ids = [
        memory.receive(b"bundle", digest=f"{i}", node="cp-1", cluster="kubernetes", peer="192.0.2.1", now=NOW)
        for i in range(3)
    ]
    assert us.begin(ids[:2], now()) == (1, set(ids[:2]))
    assert they.begin(ids, now()) == (1, {ids[2]})
    assert [{one.id for one in doors.to_sign(10)} for doors in (us, they)] == [set(ids[:2]), {ids[2]}]
    with memory.engine.begin() as connection:
        connection.execute(DOORS.update().where(DOORS.c.id == "us").values(seen=now() - timedelta(minutes=5)))

    assert {one.id for one in they.to_sign(10)} == set(ids)
    assert they.begin(ids, now()) == (2, set(ids))
    us.alive()
    assert us.to_sign(10) == []
    assert us.begin(ids, now()) == (2, set())


def test_one_door_signs_at_a_time(shared_database: Database, tmp_path: Path) -> None:
    """While one has its turn no other gets one; after it, or when its connection ends, another does."""
    first, other = shared_database.memory(tmp_path), shared_database.memory(tmp_path)
    with contextlib.closing(first), contextlib.closing(other):
        us, they = Doors(first, Store(tmp_path), "us"), Doors(other, Store(tmp_path), "they")
        with us.turn() as ours, they.turn() as theirs:
            assert (ours, theirs) == (True, False)
        with they.turn() as theirs, us.turn() as ours:
            assert (ours, theirs) == (False, True)
            kill = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
            with first.engine.begin() as connection:
                connection.execute(sa.text(kill))
            assert wait_until(lambda: _has_turn(us), bool, _PATIENCE, pause_seconds=0.1)


def _has_turn(doors: Doors) -> bool:
    with doors.turn() as is_ours:
        return is_ours


@pytest.mark.parametrize(
    ("module", "function", "before"),
    SIGNING_STEPS,
)
def test_a_door_takes_over_what_a_killed_one_has_begun(
    desk: Desk,
    shared_database: Database,
    bundle: RequestBundle,
    tmp_path: Path,
    module: str,
    function: str,
    before: bool,
) -> None:
    """Wherever the first was killed, the other one answers, and by the CA's index each request has one certificate."""
    settings = shared_database.settings
    first, other = add_door(desk.config, desk.directory, settings), second(desk, settings)
    first.start([sys.executable, str(killing(tmp_path, module, function, before=before))])
    with contextlib.suppress(OSError, HTTPException):
        first.post(dumps(bundle))
    assert first.ended() == -signal.SIGKILL
    with contextlib.closing(shared_database.memory(tmp_path)) as memory:
        silence(memory)
    with running(other):
        answer = awaited(other, other.post(dumps(bundle)).headers["location"])
    with running(first):  # it comes back, and has nothing to add
        again = awaited(first, first.post(dumps(bundle)).headers["location"])

    assert all(isinstance(one, Issued) for one in answer.answers.values())
    assert again == answer
    assert len(desk.issued()) == 2
    for state in (desk.state, desk.directory.with_name("second") / "state"):
        assert desk.run("audit", "verify", "--state-dir", state).returncode == 0


def test_two_doors_share_the_work(desk: Desk, shared_database: Database, pki: Pki) -> None:
    """Each takes requests, and gives the answers of both; by the CA's index nothing is signed twice."""
    settings = shared_database.settings
    one, other = add_door(desk.config, desk.directory, settings), second(desk, settings)
    bundles = [dumps(make_bundle(old_pairs(pki, ["apiserver"]))) for _ in range(6)]
    with running(one), running(other):
        places = [door.post(data).headers["location"] for data in bundles for door in (one, other)]
        answers = [awaited(door, place) for place in places for door in (other, one)]

    assert len({*places}) == len(bundles)
    assert all(isinstance(answer.answers["apiserver"], Issued) for answer in answers)
    assert len(desk.issued()) == len(bundles)


def test_what_people_approved_by_est_outlives_the_door_that_has_begun_it(
    shared_database: Database, pki: Pki, tmp_path: Path
) -> None:
    """
    The client sends the same request again, hears 202 with Retry-After from both doors, and gets one certificate, though
    the first one was killed when the CA had signed.
    """
    begin = now() - timedelta(days=1)
    people = Signer.make("security-team", begin=begin, end=begin + timedelta(days=3))
    anchors = tmp_path / "people.crt"
    anchors.write_bytes(pem(people.certificate))
    settings = f'{shared_database.settings}approvers_ca = "{anchors}"\n'
    policy = POLICY + LABELS.replace("[certificate.web]", '[certificate.web]\napproval = "required"')
    policy += '\n[approvals]\napprovers = ["alice"]\n'
    est = make_est_door(tmp_path / "est", pki, policy=policy, settings=settings)
    desk, first, agent, csr = est.desk, est.program, est.agent(), make_csr()
    other = second(desk, settings)
    tls = Tls(signer=people, directory=tmp_path, ca=first.ca, server_cert=first.certificate, server_key=first.key)
    team = Team(desk=desk, door=first, tls=tls, signer=people)
    alice = team.agent("alice")
    first.start([sys.executable, str(killing(tmp_path, "ca", "CA.ask", before=False))])
    waiting = [est.enrol(csr, agent)]
    [asked] = wait_until(
        lambda: team.ask(alice, "GET", "/v1/approvals").document["requests"], bool, _PATIENCE, pause_seconds=0.2
    )
    waiting.append(est.enrol(csr, agent))
    team.run(alice, "approve", str(asked["digest"]))  # the door may be killed before it answers
    assert first.ended() == -signal.SIGKILL
    signed = len(desk.issued())
    with running(other):
        est = replace(est, program=other)
        waiting.append(est.enrol(csr, agent))
        with contextlib.closing(shared_database.memory(tmp_path)) as memory:
            silence(memory)
        decided = wait_until(lambda: est.enrol(csr, agent), lambda one: one.status != 202, _PATIENCE, pause_seconds=0.2)
        again = est.enrol(csr, agent)
        unapproved = est.enrol(make_csr(), agent)

    assert [one.status for one in (*waiting, unapproved)] == [202] * 4
    assert all(int(one.headers["retry-after"]) >= 1 for one in waiting)
    assert certificates(decided) == certificates(again)
    assert signed == len(desk.issued()) == 1
    assert f"{certificates(decided)[0].serial_number:X}" in desk.issued()[0]
    for state in (desk.state, desk.directory.with_name("second") / "state"):
        assert desk.run("audit", "verify", "--state-dir", state).returncode == 0


def received(memory: DoorDatabase, bundle: RequestBundle) -> str:
    asked = digest(bundle)
    return memory.receive(
        dumps(bundle), digest=asked, node=bundle.node, cluster=bundle.cluster, peer="192.0.2.1", now=now()
    )


@pytest.fixture
def signing(desk: Desk, memory: DoorDatabase) -> Iterator[Signing]:
    one = Signing(load(desk.config), memory, desk.policy, now)
    yield one
    one.close()


def test_people_decide_where_a_ca_can_not_tell(
    signing: Signing, desk: Desk, memory: DoorDatabase, bundle: RequestBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that another door has begun is left, with a note that says where to look, until people have it signed."""
    monkeypatch.setattr(CA, "tells", lambda _: False)
    signing.close()  # the CAs were asked at the start what they can tell
    another = Doors(memory, Store(desk.state), "another")
    another.alive()
    place = received(memory, bundle)
    another.begin([place], now())
    silence(memory)
    assert signing.round() == "idle"
    left = memory.find(place)
    signed = len(desk.issued())
    assert another.to_sign(1), "the door that has begun it may go on"
    count = signing.doors.again(digest(bundle)[:16])
    signing.round()

    assert left is not None
    assert left.state == "left"
    assert re.search("can't tell: start that door again, .* serve-database again", left.note)
    assert (signed, count, len(desk.issued())) == (0, 1, 2)
    answered = memory.find(place)
    assert answered is not None
    assert answered.state == "answered"


def test_a_passing_error_leaves_nothing_to_people(
    signing: Signing, desk: Desk, memory: DoorDatabase, bundle: RequestBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CA that fails when it is asked what it can tell is asked again by the next round, and meanwhile the request waits."""
    tells, errors = CA.tells, [BackendUnavailableError("a hiccup")]

    def fails_once(ca: CA) -> bool:
        if errors and ca.authority == "ca":
            raise errors.pop()
        return tells(ca)

    monkeypatch.setattr(CA, "tells", fails_once)
    signing.close()
    another = Doors(memory, Store(desk.state), "another")
    another.alive()
    place = received(memory, bundle)
    another.begin([place], now())
    silence(memory)

    assert [signing.round() for _ in range(2)] == ["down", "idle"]
    answered = memory.find(place)
    assert answered is not None
    assert (answered.state, len(desk.issued())) == ("answered", 2)


def test_what_a_restore_leaves_to_people_is_said_once(
    signing: Signing, memory: DoorDatabase, pki: Pki, bundle: RequestBundle, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A request that this door had begun before is judged in each round, with one line in all, and holds up no other."""
    monkeypatch.setattr("bridge.door.signing._MOST", 1)
    monkeypatch.setattr(CA, "tells", lambda _: False)
    signing.close()
    signing.doors.alive()
    ours, other = received(memory, bundle), make_bundle(old_pairs(pki, ["apiserver"]))
    signing.doors.begin([ours], now())
    signing.doors.reconcile(now(), "root")
    signing.round()
    later = received(memory, other)
    for _ in range(2):
        signing.round()
    assert signing.doors.again("") == 0  # as it begins the digests of both
    assert signing.doors.again(digest(other)[:16]) == 1
    signing.round()

    found = [memory.find(place) for place in (ours, later)]
    assert [one and one.state for one in found] == ["left", "answered"]
    said = [text for text in caplog.messages if "is left to people" in text]
    assert [digest(one)[:16] in text for one, text in zip((bundle, other), said, strict=True)] == [True, True]


def test_what_waits_for_a_ca_to_tell_holds_up_no_other(
    signing: Signing, desk: Desk, memory: DoorDatabase, pki: Pki, bundle: RequestBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much another door has begun at a CA that can't be used now, other CAs go on signing."""
    monkeypatch.setattr("bridge.door.signing._MOST", 1)
    (desk.ca("etcd-ca") / "ca.key").rename(desk.directory / "away")
    another = Doors(memory, Store(desk.state), "another")
    another.alive()
    begun = received(memory, bundle)
    another.begin([begun], now())
    silence(memory)
    other = received(memory, make_bundle(old_pairs(pki, ["apiserver"])))
    rounds = [signing.round() for _ in range(2)]

    found = [memory.find(place) for place in (begun, other)]
    assert [one and one.state for one in found] == ["waiting", "answered"], rounds


def test_a_ca_that_is_away_holds_up_no_other(
    signing: Signing, desk: Desk, memory: DoorDatabase, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More wait than a round takes: what the other CA signs is signed round after round, without a pause."""
    monkeypatch.setattr("bridge.door.signing._MOST", 2)
    for name in ("etcd-server", "apiserver", "apiserver", "apiserver"):
        received(memory, make_bundle(old_pairs(pki, [name])))
    away = desk.ca("etcd-ca").rename(desk.directory / "away")
    rounds, waiting = [signing.round() for _ in range(3)], memory.counts()
    away.rename(desk.ca("etcd-ca"))
    signing.round()

    assert (rounds, waiting) == (["more", "more", "down"], {"waiting": 1, "answered": 3})
    assert memory.counts() == {"answered": 4}


def test_a_csr_that_another_door_has_answered_is_known(
    signing: Signing, memory: DoorDatabase, bundle: RequestBundle, pki: Pki
) -> None:
    """The certificates of the database answer the same CSRs in any bundle, though our archive has none; other CSRs have none."""
    place = received(memory, bundle)
    signing.round()
    kept_ = memory.find(place)
    assert kept_ is not None
    assert kept_.answer is not None
    known = {name: one.issued for name, one in signing._answered(bundle).items()}

    assert known == loads_answer(kept_.answer).answers
    assert signing._answered(make_bundle(old_pairs(pki, ["apiserver"]))) == {}


# --- the past ---------------------------------------------------------------------------------------------------------


def test_a_database_that_went_back_signs_nothing_until_people_say_so(desk: Desk, bundle: RequestBundle) -> None:
    """The door takes requests and says what is wrong; after `restored` CAs are asked first, and nothing is signed twice."""
    door, place = add_door(desk.config, desk.directory), desk.state / "door.db"
    with running(door):
        assert door.stop() == Exit.DONE
    assert desk.run("serve-database", "backup", desk.directory / "copy").returncode == Exit.DONE
    with running(door):
        first = awaited(door, door.post(dumps(bundle)).headers["location"])
        assert door.stop() == Exit.DONE
    for end in ("", "-wal", "-shm"):
        place.with_name(place.name + end).unlink(missing_ok=True)
    shutil.copy(desk.directory / "copy", place)
    for name in ("desk-answered", "desk-done"):  # nor does the archive know
        shutil.rmtree(desk.state / name)
    with running(door):
        again = door.post(dumps(bundle)).headers["location"]
        unready = wait_until(
            lambda: door.ask("GET", "/readyz"), lambda one: one.status == 503, _PATIENCE, pause_seconds=0.1
        )
        waiting = door.ask("GET", again).status
        assert desk.run("serve-database", "restored").returncode == Exit.DONE
        second_ = awaited(door, again)

    assert (unready.status, waiting) == (503, 202)
    assert any("which is in the audit log" in line["message"] for line in door.lines())
    assert second_.answers == first.answers
    assert len(desk.issued()) == 2
    assert desk.run("audit", "verify").returncode == 0
    assert "restored" in desk.run("audit", "show").stdout


def test_a_copy_is_put_back_while_no_door_works(desk: Desk, bundle: RequestBundle) -> None:
    """`restore` refuses beside a door; after it the door goes on, and asks CAs about what is older."""
    door, copy = add_door(desk.config, desk.directory), desk.directory / "copy"
    with running(door):
        place = door.post(dumps(bundle)).headers["location"]
        first = awaited(door, place)
        backup = desk.run("serve-database", "backup", copy)
        beside = desk.run("serve-database", "restore", copy)
    restored = desk.run("serve-database", "restore", copy)
    damaged = desk.directory / "damaged"
    damaged.write_bytes(b"no database")
    refused = desk.run("serve-database", "restore", damaged)
    with running(door):
        second_ = awaited(door, place)

    assert [one.returncode for one in (backup, restored)] == [Exit.DONE, Exit.DONE], restored.stderr
    assert copy.stat().st_mode & 0o777 == 0o600
    assert (beside.returncode, refused.returncode) == (Exit.LOCKED, Exit.USAGE), (beside.stderr, refused.stderr)
    assert first == second_
    assert len(desk.issued()) == 2
    assert list(desk.state.glob(".door*")) == []
    database = database_file(Store(desk.state))
    assert f"what was there before is in {database}.old" in " ".join(restored.stdout.split())
    database.unlink()
    again = desk.run("serve-database", "restore", copy)
    assert (again.returncode, "what was there before" in again.stdout) == (Exit.DONE, False), (
        again.stdout + again.stderr
    )


def upkept(desk: Desk) -> Path:
    """A door that does not work, and its database."""
    add_door(desk.config, desk.directory)
    with contextlib.closing(open_memory(load(desk.config), may_make=True)):
        return database_file(Store(desk.state))


@pytest.mark.skipif(os.geteuid() != 0, reason="makes another user's link")
def test_a_copy_goes_through_no_other_users_link(desk: Desk, tmp_path: Path) -> None:
    """The copy is not there, and neither is half of one; through a link of ours it is."""
    upkept(desk)
    own, link = tmp_path / "own", tmp_path / "link"
    own.mkdir()
    link.symlink_to(own)
    os.lchown(link, 12345, 0)
    refused = desk.run("serve-database", "backup", link / "copy")
    left = list(own.iterdir())
    os.lchown(link, 0, 0)

    assert (refused.returncode, left) == (Exit.FAILED, []), refused.stdout
    assert f"{link}: wanted no link" in refused.stderr
    assert desk.run("serve-database", "backup", link / "copy").returncode == Exit.DONE
    assert (own / "copy").stat().st_mode & 0o777 == 0o600
    assert desk.run("serve-database", "backup", tmp_path / "none/copy").returncode == Exit.USAGE


def test_a_look_at_the_database_says_of_no_door_that_it_lives(desk: Desk) -> None:
    """Else the requests of a door that has ended would wait longer for another one; `restored` makes its row."""
    database = upkept(desk)

    def doors() -> int:
        with contextlib.closing(sqlite3.connect(database)) as connection:
            return len(connection.execute("SELECT * FROM doors").fetchall())

    assert doors() == 0
    assert desk.run("serve-database", "restored").returncode == Exit.DONE
    assert doors() == 1


def test_a_copy_that_can_not_be_used_replaces_nothing(desk: Desk) -> None:
    """A newer version's, another program's, and any copy where an earlier restore has left the file of before."""
    database, copy = upkept(desk), desk.directory / "copy"
    assert desk.run("serve-database", "backup", copy).returncode == Exit.DONE
    newer = Path(shutil.copy(copy, desk.directory / "newer"))
    with contextlib.closing(sqlite3.connect(newer)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'later'")
    other = desk.directory / "other"
    with contextlib.closing(sqlite3.connect(other)) as connection, connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("CREATE TABLE requests (id TEXT)")
    before = database.read_bytes()

    for one in (newer, other):
        refused = desk.run("serve-database", "restore", one)
        assert (refused.returncode, "nothing was replaced" in " ".join(refused.stderr.split())) == (Exit.USAGE, True), (
            refused.stderr
        )
    assert database.read_bytes() == before
    assert [*desk.state.glob("door.db.*")] == []
    assert desk.run("serve-database", "restore", copy).returncode == Exit.DONE
    refused = desk.run("serve-database", "restore", copy)
    assert (refused.returncode, "move it away" in refused.stderr) == (Exit.USAGE, True), refused.stderr
    assert database.with_name("door.db.old").read_bytes() == before


@pytest.mark.parametrize("target", ["/dev/full", "door.db", "no/copy"])
def test_a_backup_goes_to_a_file_of_its_own(desk: Desk, target: str) -> None:
    """A device, the database itself and a directory that is not there are named, and stay as they are."""
    database = upkept(desk)
    before, device = database.stat().st_ino, Path("/dev/full").stat().st_mode
    refused = desk.run("serve-database", "backup", desk.state / target)

    assert refused.returncode == Exit.USAGE, refused.stderr
    problem = "can't make a copy there" if target == "no/copy" else "wanted a file for the copy"
    assert f"{desk.state / target}: {problem}" in " ".join(refused.stderr.split())
    assert (database.stat().st_ino, Path("/dev/full").stat().st_mode) == (before, device)


def test_postgresql_is_copied_by_its_own_programs(desk: Desk, shared_database: Database) -> None:
    """`backup` names them, and so does the page."""
    add_door(desk.config, desk.directory, shared_database.settings)
    refused = desk.run("serve-database", "backup", desk.directory / "copy")

    assert refused.returncode == Exit.USAGE
    assert "pg_dump" in refused.stderr
    assert not (desk.directory / "copy").exists()


def test_two_programs_are_not_one_door(desk: Desk) -> None:
    """A second one with the same state directory does not begin."""
    with running(add_door(desk.config, desk.directory)):
        assert desk.run("serve").returncode == Exit.LOCKED


# --- retention --------------------------------------------------------------------------------------------------------


def test_what_is_old_is_forgotten(signing: Signing, memory: DoorDatabase, bundle: RequestBundle) -> None:
    """Answered requests lose what they hold, and certificates go when they have ended; what waits stays, however old."""
    answered = received(memory, bundle)
    signing.round()
    waiting = memory.receive(b"bundle", digest="dd", node="cp-1", cluster="kubernetes", peer="192.0.2.1", now=NOW)
    memory.forget(now() - timedelta(days=1), now() - timedelta(days=1))
    young = memory.find(answered)
    memory.forget(now() + timedelta(days=1), now() + timedelta(days=1))
    old, still = memory.find(answered), memory.find(waiting)
    with memory.engine.connect() as connection:
        certificates = connection.execute(sa.select(sa.func.count()).select_from(CERTIFICATES)).scalar()
    memory.forget(now() + timedelta(days=4000), now() + timedelta(days=4000))
    with memory.engine.connect() as connection:
        ended = connection.execute(sa.select(sa.func.count()).select_from(CERTIFICATES)).scalar()
        requests = connection.execute(sa.select(sa.func.count()).select_from(REQUESTS)).scalar()

    assert young is not None
    assert old is not None
    assert still is not None
    assert young.answer is not None
    assert (old.state, old.bundle, old.answer) == ("answered", b"", None)
    assert (still.state, still.bundle) == ("waiting", b"bundle")
    assert (certificates, ended, requests) == (2, 0, 2)
