"""A door whose database is a PostgreSQL server: its password, its absence, and doors that start together."""

from __future__ import annotations

import contextlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from bridge.contract import Issued
from bridge.door.approvals import query
from bridge.door.store import DatabaseError, DoorDatabase
from bridge.errors import Exit
from bridge.pki.bundle import AnswerBundle
from bridge.pki.bundle_format import dumps, loads_answer
from bridge.secret import Secret
from bridge.system.waiting import wait_until
from tests.kit.bundles import make_bundle, old_pairs
from tests.kit.desks import Desk
from tests.kit.pki import Pki
from tests.kit.serving import Database, ServeProgram, add_door, running

if TYPE_CHECKING:
    from tests.kit.postgresql import PostgreSql

_PATIENCE = timedelta(minutes=3)


def test_the_password_is_in_no_message(shared_database: Database, desk: Desk) -> None:
    """The errors for a wrong password and for a missing file do not show it; with the right one the door begins."""
    door = add_door(desk.config, desk.directory, shared_database.settings)
    assert shared_database.password_file is not None
    right = shared_database.password_file.read_text()
    shared_database.password_file.write_text("a wrong passphrase")
    wrong = desk.run("serve", "-v")
    shared_database.password_file.unlink()
    missing = desk.run("serve", "-v")
    shared_database.password_file.write_text(right)
    with running(door):
        assert door.ask("GET", "/readyz").status == 200
    said = "".join([wrong.stderr, wrong.stdout, missing.stderr, *door.said])

    assert (wrong.returncode, missing.returncode) == (Exit.UNAVAILABLE, Exit.UNAVAILABLE), said
    assert "authentication failed" in wrong.stderr
    assert str(shared_database.password_file) in missing.stderr
    assert right.strip() not in said
    assert "a wrong passphrase" not in said


def test_a_database_that_is_away_takes_no_request_and_comes_back(
    desk: Desk, shared_database: Database, postgresql: PostgreSql, pki: Pki
) -> None:
    """503 while it is down, and nothing is signed; when it is back the same door answers."""
    door = add_door(desk.config, desk.directory, shared_database.settings)
    bundle = dumps(make_bundle(old_pairs(pki, ["apiserver"])))
    with running(door):
        postgresql.stop()
        try:
            away = door.post_once(bundle)
            ready = door.ask("GET", "/readyz")
        finally:
            postgresql.start()
        taken = wait_until(lambda: door.post(bundle), lambda one: one.status == 202, _PATIENCE, pause_seconds=0.2)
        place = taken.headers["location"]
        answer = wait_until(lambda: door.ask("GET", place), lambda one: one.status == 200, _PATIENCE, pause_seconds=0.2)

    assert (away.status, ready.status) == (503, 503)
    assert away.headers["retry-after"] == "30"
    assert isinstance(loads_answer(answer.body).answers["apiserver"], Issued)
    assert len(desk.issued()) == 1


def test_a_dump_that_was_restored_signs_nothing_until_people_say_so(
    desk: Desk, shared_database: Database, postgresql: PostgreSql, pki: Pki
) -> None:
    """After `pg_dump` and `pg_restore`, as on the page, and `restored`, the door asks the CA first, and signs only what the CA has not signed."""
    door, copy = add_door(desk.config, desk.directory, shared_database.settings), desk.directory / "door.dump"
    name = shared_database.url.rpartition("/")[2]
    early, late, new = (dumps(make_bundle(old_pairs(pki, ["apiserver"]))) for _ in range(3))
    with running(door):
        answered(door, early)
    copy.write_bytes(postgresql.program("pg_dump", ["--format=custom", name]))
    with running(door):
        before = answered(door, late)
    postgresql.program("pg_restore", ["--clean", f"--dbname={name}", str(copy)])
    for place in ("desk-answered", "desk-done"):  # nor does the archive know
        shutil.rmtree(desk.state / place)
    with running(door):
        taken = [door.post(one) for one in (late, new)]
        unready = wait_until(
            lambda: door.ask("GET", "/readyz"), lambda one: one.status == 503, _PATIENCE, pause_seconds=0.1
        )
        waiting = [door.ask("GET", one.headers["location"]).status for one in taken]
        signed = len(desk.issued())
        restored = desk.run("serve-database", "restored")
        after = [answered(door, one) for one in (late, new, early)]

    assert ([one.status for one in taken], unready.status, waiting, signed) == ([202, 202], 503, [202, 202], 2)
    assert any("which is in the audit log" in line["message"] for line in door.lines())
    assert restored.returncode == Exit.DONE, restored.stderr
    assert after[0].answers == before.answers
    assert all(isinstance(one.answers["apiserver"], Issued) for one in after)
    assert len(desk.issued()) == 3
    assert desk.run("audit", "verify").returncode == 0


def answered(door: ServeProgram, bundle: bytes) -> AnswerBundle:
    place = door.post(bundle).headers["location"]
    answer = wait_until(lambda: door.ask("GET", place), lambda one: one.status == 200, _PATIENCE, pause_seconds=0.2)
    return loads_answer(answer.body)


def test_a_search_for_what_no_text_has_finds_all(shared_database: Database) -> None:
    """PostgreSQL refuses a NUL in any text; the page leaves it out of the query."""
    with contextlib.closing(DoorDatabase(shared_database.url, shared_database.password)) as memory:
        with pytest.raises(DatabaseError):
            memory.search("\0", 1)
        assert memory.search(query({"QUERY_STRING": "q=%00cp-1"}), 1) == []


def test_doors_that_start_together_make_the_tables_once(shared_database: Database) -> None:
    """Each begins, and none finds them half made."""
    with ThreadPoolExecutor(4) as pool:
        memories = list(pool.map(lambda _: DoorDatabase(shared_database.url, shared_database.password), range(4)))
    for one in memories:
        assert one.counts() == {}
        one.close()


def test_a_database_of_another_kind_is_refused() -> None:
    """The message says which packages there are; its twin is a server that does not answer."""
    with pytest.raises(DatabaseError, match="wanted a database") as e:
        DoorDatabase("oracle://db.example/door")
    assert "requirements-serve.lock" in e.value.hint
    with pytest.raises(DatabaseError, match=r"[Cc]onnection refused"):
        DoorDatabase("postgresql://door@127.0.0.1:9/door", Secret("env", "PATH"))
