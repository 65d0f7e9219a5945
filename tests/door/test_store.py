"""The door's database: its tables, another program's, and a request from waiting to answered."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from bridge.door import store
from bridge.door.doors import Doors
from bridge.door.store import METADATA, DatabaseError, DoorDatabase, IssuedRow, sqlite_url
from bridge.state import Store
from tests.kit.serving import Database

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def received(memory: DoorDatabase, digest_: str = "aa", **more: Any) -> str:
    values = {"digest": digest_, "node": "cp-1", "cluster": "kubernetes", "peer": "192.0.2.1", "now": NOW, **more}
    return memory.receive(values.pop("data", b"bundle"), **values)


def issued(**more: Any) -> IssuedRow:
    values: dict[str, Any] = {
        "fingerprint": "ff",
        "csr": "cc",
        "key": "dd",
        "name": "apiserver",
        "authority": "ca",
        "node": "cp-1",
    }
    values |= {"cluster": "kubernetes", "serial": "01", "begins": NOW, "ends": NOW, "chain": b"pem", **more}
    return IssuedRow(**values)


def test_a_new_database_has_the_tables_of_this_version(memory: DoorDatabase) -> None:
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
    with pytest.raises(DatabaseError, match="wanted tables of revision initial_2, found of tomorrow"):
        database.memory(tmp_path)


def test_a_new_file_has_all_tables_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A door that is killed while it makes them leaves none; the next one would take a table without its index for whole."""
    place = tmp_path / "door.db"
    with monkeypatch.context() as patched:
        patched.setattr("alembic.command.stamp", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            DoorDatabase(sqlite_url(place))
    with closing(sqlite3.connect(place)) as file:
        assert file.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    with closing(DoorDatabase(sqlite_url(place))) as memory, memory.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_a_database_of_this_version_is_opened_while_another_program_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ca-bridge fleet` waits for no door's write; only a database that gets tables is locked."""
    place = tmp_path / "door.db"
    with closing(DoorDatabase(sqlite_url(place))) as first:
        request = received(first)
    monkeypatch.setattr(store, "_BUSY_SECONDS", 0)
    with closing(sqlite3.connect(place, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with closing(DoorDatabase(sqlite_url(place))) as second:
            assert second.find(request) is not None
        with pytest.raises(DatabaseError, match="locked"), closing(DoorDatabase(sqlite_url(place))) as third:
            received(third, "bb")


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    """A database with a table of our names, and no form of ours, is refused, and gets none of our tables."""
    place = tmp_path / "door.db"
    with closing(sqlite3.connect(place)) as file:
        file.execute("CREATE TABLE certificates (serial TEXT)")
    with pytest.raises(DatabaseError, match="certificates already exists"):
        DoorDatabase(sqlite_url(place))
    with closing(sqlite3.connect(place)) as file:
        assert file.execute("SELECT name FROM sqlite_master").fetchall() == [("certificates",)]


def test_the_same_bundle_has_one_id(memory: DoorDatabase) -> None:
    """Another bundle has another."""
    assert received(memory, "aa") == received(memory, "aa") != received(memory, "bb")


def test_a_request_goes_from_waiting_to_answered(memory: DoorDatabase, tmp_path: Path) -> None:
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
    assert memory.unanswered("192.0.2.1") == (1, 1)
    assert memory.unanswered("192.0.2.2") == (1, 0)
    assert memory.issued_among(["cc"]) == {("cc", "apiserver"): b"pem"}
