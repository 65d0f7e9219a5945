"""What a door's tests run with: a node's files, a desk's settings, and databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bridge.door.store import DoorDatabase
from bridge.pki.bundle import RequestBundle
from tests.kit.bundles import make_bundle, old_pairs
from tests.kit.desks import Desk, make_desk
from tests.kit.pki import Pki, handmade_pki
from tests.kit.serving import Database

if TYPE_CHECKING:
    from tests.kit.postgresql import PostgreSql


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return handmade_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def desk(tmp_path: Path, pki: Pki) -> Desk:
    return make_desk(tmp_path / "desk", pki)


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
def memory(database: Database, tmp_path: Path) -> Iterator[DoorDatabase]:
    """A door's memory in it."""
    one = database.memory(tmp_path)
    yield one
    one.close()


# --- a bundle ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(pki: Pki) -> RequestBundle:
    return make_bundle(old_pairs(pki, ["apiserver"]))
