"""What an operator does with the door's database: a copy of SQLite's file, the way back to it, and what follows."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

from bridge.door.doors import Doors
from bridge.door.store import Memory, database_file, open_memory
from bridge.door.turns import identity
from bridge.errors import BridgeError, Exit
from bridge.settings.tables import Settings
from bridge.state import audit
from bridge.state.session import recording
from bridge.state.store import Store
from bridge.system.files import sync_directory
from bridge.system.locks import lock

#: A `sign` or a round that works on the same state directory.
_WAIT = timedelta(minutes=1)
_LEAST_DIGITS = 8


class UpkeepError(BridgeError):
    """A copy, or a request, that is not what it should be."""

    exit_code = Exit.USAGE
    hint = "`ca-bridge help door` has the way of each database"


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[tuple[Memory, Doors]]:
    """The database, and this host's door in it."""
    store = Store(settings.node.state_dir)
    with contextlib.closing(open_memory(settings)) as memory:
        doors = Doors(memory, store, identity(store))
        doors.alive()
        yield memory, doors


def back_up(settings: Settings, to: Path) -> None:
    """Copy SQLite's file while doors work; the copy is whole, or not there (UpkeepError: another database)."""
    _assert_file(settings)
    source = database_file(Store(settings.node.state_dir))
    if not source.exists():
        raise UpkeepError(f"{source}: wanted the door's database, found none")
    _copied(source, to)


def restore(settings: Settings, copy: Path, now: Callable[[], datetime]) -> tuple[Path | None, int]:
    """
    Put a copy in the place of SQLite's file, and write down that it was restored; where the file is now that was there
    (None: none was), and how many one-time secrets are withdrawn.

    No door works meanwhile (LockedError). A process that is killed here leaves a door that does not sign, and says so.
    """
    _assert_file(settings)
    store = Store(settings.node.state_dir)
    store.prepare()
    with lock(store.door_lock, "ca-bridge serve-database"):
        place = database_file(store)
        new, old = place.with_name(f"{place.name}.new"), place.with_name(f"{place.name}.old")
        _copied(copy, new)
        if is_there := place.exists():
            with contextlib.closing(sqlite3.connect(place)) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            place.replace(old)
        for end in ("-wal", "-shm"):  # the old file's, whose content is in it now
            place.with_name(place.name + end).unlink(missing_ok=True)
        new.replace(place)
        sync_directory(place.parent)
        return old if is_there else None, reconcile(settings, now)


def reconcile(settings: Settings, now: Callable[[], datetime]) -> int:
    """Write down, in the database and in the audit log, that it was restored; how many one-time secrets are withdrawn."""
    with opened(settings) as (_, doors), recording(settings, _WAIT) as (_, record):
        withdrawn = doors.reconcile(now(), audit.who()["user"])
        about = f"the door's database; round {doors.round()} is the newest one; one-time secrets withdrawn: {withdrawn}"
        record.add(audit.RESTORED, result=about)
    return withdrawn


def again(settings: Settings, digest: str) -> int:
    """Have requests signed that were left to people (UpkeepError: there is none); their number."""
    if len(digest) < _LEAST_DIGITS:
        raise UpkeepError(f"wanted at least {_LEAST_DIGITS} digits of a request's digest, found {len(digest)}")
    with opened(settings) as (_, doors), recording(settings, _WAIT) as (_, record):
        count = doors.again(digest)
        if not count:
            raise UpkeepError(f"wanted a request {digest} that was left to people, found none")
        record.add(audit.AGAIN, result=f"request {digest[:16]}: a person says that no CA has signed it")
    return count


def _assert_file(settings: Settings) -> None:
    if settings.serve.database:
        raise UpkeepError(
            "wanted SQLite's file in the state directory, found serve.database in the settings",
            hint="pg_dump and pg_restore copy PostgreSQL's; then `ca-bridge serve-database restored`",
        )


def _copied(source: Path, to: Path) -> None:
    """A copy of a database of the door by SQLite itself, which takes what is in its log, too."""
    descriptor, temporary = tempfile.mkstemp(dir=to.parent, prefix=f".{to.name}.")  # 0600
    os.close(descriptor)
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as old,
            contextlib.closing(sqlite3.connect(temporary)) as new,
        ):
            old.backup(new)
            [found] = new.execute("PRAGMA integrity_check").fetchone()
            new.execute("SELECT version_num FROM alembic_version").fetchone()
        if found != "ok":
            raise UpkeepError(f"{source}: wanted a whole database, found: {found}")
        with Path(temporary).open("rb") as file:
            os.fsync(file.fileno())
        Path(temporary).replace(to)
        sync_directory(to.parent)
    except (sqlite3.Error, OSError) as e:
        raise UpkeepError(f"{source}: wanted a database of a door, found: {e}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
