"""The databases that a door's tests run with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bridge.door.store import Memory
from tests.kit.serving import Database

if TYPE_CHECKING:
    from tests.kit.postgresql import PostgreSql


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSql]:
    """One server for this process."""
    pytest.importorskip("psycopg")
    from tests.kit import postgresql as kit

    if not kit.is_installed():
        pytest.skip("needs Debian's package postgresql")
    with kit.running() as server:
        yield server


@pytest.fixture
def shared_database(tmp_path: Path, postgresql: PostgreSql) -> Database:
    """An empty PostgreSQL database."""
    from tests.kit.postgresql import PASSWORD

    password = tmp_path / "database-password"
    password.touch(mode=0o600)
    password.write_text(f"{PASSWORD}\n")
    return Database(url=postgresql.database(), password_file=password)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return Database(url="")
    found: Database = request.getfixturevalue("shared_database")
    return found


@pytest.fixture
def memory(database: Database, tmp_path: Path) -> Iterator[Memory]:
    """A door's memory in it."""
    one = database.memory(tmp_path)
    yield one
    one.close()
