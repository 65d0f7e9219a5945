"""
The doors of one database: which of them are alive, which one signs now, and which requests each has begun.

Any door takes a request. The door that begins it records itself as its signer, since its state directory has the
journal and the archive that prove what was signed. Another door takes the request over if the signer has been silent
for a while: it asks the CA what it has signed before it has anything signed; if the CA can't tell, an operator decides.
The same applies to requests from before a restore of the database, which may have lost their signer.

Times come from the database if it has a clock of its own, so that hosts need not agree on the time. `Doors` is followed
by the operator's work on the database: copying SQLite's file, restoring it, and the work after a restore.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from bridge.door.store import (
    DOORS,
    ENROLMENTS,
    REQUESTS,
    RESTORES,
    TO_SIGN,
    UNANSWERED,
    DatabaseError,
    DoorDatabase,
    Kept,
    asking,
    database_file,
    open_memory,
    sqlite_url,
)
from bridge.errors import BridgeError, Exit
from bridge.settings.tables import Settings
from bridge.state import Store, audit
from bridge.state.session import recording
from bridge.system import paths
from bridge.system.files import reasons, sync_directory
from bridge.system.locks import lock
from bridge.system.state_file import OnDamage, coded

#: How long to wait for a `sign` or a round on the same state directory.
_WAIT = timedelta(minutes=1)
_LEAST_DIGITS = 16

#: The number of PostgreSQL's advisory lock that the signing door holds.
_TURN_LOCK = 0x0CAB_0002
#: A door without a heartbeat for this time counts as ended, by the database's clock.
SILENT = timedelta(seconds=60)
#: A door that could write no heartbeat for this time asks no CA: shorter than `SILENT` by the time of an exchange.
STALE_SECONDS = 30.0
#: How far a node's clock may be behind ours.
_NODE_SLACK = timedelta(hours=1)


class NotOursError(BridgeError):
    """The door is shutting down, or its last heartbeat is too old: another door may be signing in its place."""

    exit_code = Exit.UNAVAILABLE
    hint = "the database is slow or away; requests wait, and go on by themselves"


class BehindError(BridgeError):
    """The database is behind this door's audit log: an older copy was restored, or it is the wrong database."""

    exit_code = Exit.REFUSED
    hint = (
        "name the right database, or run `ca-bridge serve-database restored` on each host of a door: "
        "then CAs are asked what they have signed before anything older is signed"
    )


class Doors:
    """One door among the others; thread-safe."""

    def __init__(self, memory: DoorDatabase, store: Store, door: str) -> None:
        """`door` is the name of the state directory (`identity`)."""
        self._memory = memory
        self._engine = memory.engine
        self._store = store
        self.door = door
        self.is_ending = False  #: If set, the door asks no CA, but still takes answers to what it has asked.
        self._heard = 0.0  #: Time of the last heartbeat, by the monotonic clock.

    # --- heartbeats ---------------------------------------------------------------------------------------------------

    def alive(self) -> None:
        """Write this door's heartbeat to the database."""
        began = time.monotonic()
        with asking(), self._engine.begin() as connection:
            moment = _now(connection)
            row = self._memory.insert(DOORS).values(id=self.door, host=os.uname().nodename, seen=moment, round=0)
            connection.execute(row.on_conflict_do_update(index_elements=["id"], set_={"seen": moment}))
        self._heard = began

    def assert_ours(self) -> None:
        """Refuse to ask a CA if this door is shutting down, or another may have taken its requests (NotOursError)."""
        if self.is_ending:
            raise NotOursError("this door is shutting down", hint="")
        silent = time.monotonic() - self._heard
        if silent > STALE_SECONDS:
            text = f"the database has had no heartbeat of this door for {silent:.0f} seconds"
            raise NotOursError(text)

    def names(self) -> dict[str, str]:
        """Return the hosts of all doors, by door."""
        return {row["id"]: row["host"] for row in self._memory.select(sa.select(DOORS))}

    # --- turns --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def turn(self) -> Iterator[bool]:
        """Yield whether this door may sign now; PostgreSQL itself ends a killed door's turn, and SQLite has one door."""
        if self._engine.dialect.name != "postgresql":
            yield True
            return
        with asking(), self._engine.connect() as connection:
            is_ours = bool(connection.execute(sa.select(sa.func.pg_try_advisory_lock(_TURN_LOCK))).scalar())
            connection.commit()  # no transaction is open meanwhile
            try:
                yield is_ours
            finally:
                self._end_turn(connection, is_ours=is_ours)

    @staticmethod
    def _end_turn(connection: sa.Connection, *, is_ours: bool) -> None:
        try:
            if is_ours:
                connection.execute(sa.select(sa.func.pg_advisory_unlock(_TURN_LOCK)))
                connection.commit()
        except SQLAlchemyError:
            connection.invalidate()  # the end of the connection releases the lock, too

    # --- requests -----------------------------------------------------------------------------------------------------

    def to_sign(self, most: int) -> list[Kept]:
        """Return the requests this door may sign, least recently tried first: new, its own, and silent doors'."""
        with asking(), self._engine.begin() as connection:
            oldest = (sa.func.coalesce(REQUESTS.c.begun, REQUESTS.c.received), REQUESTS.c.received)
            query = sa.select(REQUESTS).where(self._ours(_now(connection))).order_by(*oldest).limit(most)
            return [Kept(**row) for row in connection.execute(query).mappings()]

    def _ours(self, moment: datetime) -> sa.ColumnElement[bool]:
        signer, state = REQUESTS.c.signer, REQUESTS.c.state
        living = sa.select(DOORS.c.id).where(DOORS.c.seen > moment - SILENT, DOORS.c.id != self.door)
        is_free = sa.or_(signer.is_(None), signer.not_in(living))
        return sa.or_(sa.and_(state.in_(TO_SIGN), is_free), sa.and_(state == "left", signer == self.door))

    def begin(self, ids: Sequence[str], now: datetime) -> tuple[int, set[str]]:
        """
        Begin a round: record this door as signer, and return the round's number and the requests that it has claimed.

        If the database can't be written to, the round ends before it asks a CA.
        """
        with asking(), self._engine.begin() as connection:
            mine = DOORS.update().where(DOORS.c.id == self.door).values(round=DOORS.c.round + 1)
            number = connection.execute(mine.returning(DOORS.c.round)).scalar_one()
            ours = REQUESTS.update().where(REQUESTS.c.id.in_(ids), self._ours(_now(connection)))
            # our own requests that were left to an operator wait again
            state = sa.case((REQUESTS.c.state == "left", "waiting"), else_=REQUESTS.c.state)
            claimed = ours.values(begun=now, signer=self.door, state=state).returning(REQUESTS.c.id)
            return int(number), set(connection.execute(claimed).scalars())

    def again(self, digest: str) -> int:
        """Let the one left request whose digest begins with this be signed without asking the CA first; 0: not just one."""
        others = REQUESTS.alias()
        count = sa.select(sa.func.count()).where(
            others.c.state == "left", others.c.digest.startswith(digest, autoescape=True)
        )
        left = sa.and_(REQUESTS.c.state == "left", REQUESTS.c.digest.startswith(digest, autoescape=True))
        which = sa.and_(left, count.scalar_subquery() == 1)
        return self._memory.change(REQUESTS.update().where(which).values(state="waiting", signer="", note=""))

    def judge_again(self, before: datetime | None = None) -> None:
        """Have the policy judge this door's undecided requests again, all or those received before a time."""
        ours = sa.and_(REQUESTS.c.state == "undecided", REQUESTS.c.signer == self.door)
        if before is not None:
            ours = sa.and_(ours, REQUESTS.c.received < before)
        self._memory.change(REQUESTS.update().where(ours).values(state="waiting"))

    # --- the past -----------------------------------------------------------------------------------------------------

    def round(self) -> int:
        """Return this door's newest round in the database."""
        found = self._memory.select(sa.select(DOORS.c.round).where(DOORS.c.id == self.door))
        return next((int(row["round"]) for row in found), 0)

    @cached_property
    def recorded(self) -> int:
        """The newest round of this door that may be in its audit log; each round adds its own number."""
        return newest_round(audit.events(self._store, None, None), self.door)

    def restored(self) -> datetime | None:
        """Return the time of the database's last restore; None: there was none."""
        found = self._memory.select(sa.select(RESTORES).order_by(RESTORES.c.id.desc()).limit(1))
        return next((row["restored"] for row in found), None)

    def reconcile(self, now: datetime, by: str) -> int:
        """
        Record the restore and this door's newest round in the database, and return the number of withdrawn enrolments.

        An enrolment that is open in the copy may have been used after the copy was made, and one whose request has no
        answer may have been used by another request since the restore: both kinds are withdrawn.
        """
        ours = ENROLMENTS.c
        unanswered = ours.request.in_(sa.select(REQUESTS.c.id).where(REQUESTS.c.state.in_(UNANSWERED)))
        with asking(), self._engine.begin() as connection:
            connection.execute(RESTORES.insert().values(restored=now, by=by[:253]))
            known = DOORS.update().where(DOORS.c.id == self.door, DOORS.c.round < self.recorded)
            connection.execute(known.values(round=self.recorded))
            is_open = sa.or_(sa.and_(ours.used.is_(None), ours.ends > now), unanswered)
            found = ENROLMENTS.update().where(ours.withdrawn.is_(None), is_open)
            return connection.execute(found.values(withdrawn=now)).rowcount


def _now(connection: sa.Connection) -> datetime:
    if connection.dialect.name == "postgresql":
        moment: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
        return moment.astimezone(UTC)
    return datetime.now(UTC)


# --- what a door must find out before it signs (pure) -----------------------------------------------------------------


def is_foreign(kept: Kept, created: datetime, door: str, restored: datetime | None) -> bool:
    """Return whether a CA may have signed a request for another door, or for one that the database has forgotten."""
    if kept.signer == "":  # an operator has looked
        return False
    if kept.signer not in {None, door}:
        return True
    is_older = restored is not None and created < restored + _NODE_SLACK
    return is_older and (kept.begun is None or restored is None or kept.begun < restored)


def left_text(kept: Kept, doors: Mapping[str, str]) -> str:
    """Return why an operator must decide about another door's request whose CA can't tell what it has signed."""
    where = doors.get(kept.signer or "", "a door that the database has forgotten")
    return (
        f"a CA may have signed it for {where}, and can't tell: start that door again, or look for the certificate at "
        f"the CA, then `ca-bridge serve-database again {kept.digest[:16]}` has it signed"
    )


def assert_not_behind(recorded: int, remembered: int) -> None:
    """Refuse a database that does not know the newest round in the audit log (BehindError)."""
    if recorded > remembered:
        text = f"wanted a database that knows of round {recorded}, which is in the audit log, found one at {remembered}"
        raise BehindError(text)


def newest_round(lines: Iterable[Mapping[str, object]], door: str) -> int:
    """Return a door's newest round in lines of the audit log."""
    numbers = (line.get("round") for line in lines if line.get("door") == door)
    return max((number for number in numbers if isinstance(number, int)), default=0)


# --- the operator's work on the database ------------------------------------------------------------------------------


class UpkeepError(BridgeError):
    """A copy or a request is not what it should be."""

    exit_code = Exit.USAGE
    hint = "`ca-bridge help door` has the way of each database"


def identity(store: Store) -> str:
    """Return the state directory's name among doors, which the first call makes."""
    store.prepare()
    afterwards = "then the door counts as a new one"
    file = coded(str, store.door, "which door this is", OnDamage.REFUSE, key="id", afterwards=afterwards)
    file = replace(file, by_command=False)
    found = file.read()
    if found is None:
        found = secrets.token_hex(8)
        file.put(found)
    return found


@contextlib.contextmanager
def opened(settings: Settings, *, may_make: bool = False) -> Iterator[tuple[DoorDatabase, Doors]]:
    """Open the database, with this host's door in it."""
    store = Store(settings.node.state_dir)
    with contextlib.closing(open_memory(settings, may_make=may_make)) as memory:
        yield memory, Doors(memory, store, identity(store))


def back_up(settings: Settings, to: Path) -> None:
    """Copy SQLite's file while the door runs; the copy is complete, or absent (UpkeepError: another database)."""
    _assert_file(settings)
    source = database_file(Store(settings.node.state_dir))
    if not source.exists():
        raise UpkeepError(f"{source}: there is no database of a door")
    if to.exists() and (to.samefile(source) or not to.is_file()):
        found = "the database itself" if to.samefile(source) else "something else"
        raise UpkeepError(f"{to}: wanted a file for the copy, or a path where nothing is, found {found}")
    with reasons(UpkeepError, f"{to}: can't make a copy there"), paths.opened(to) as place:
        _copy(source, place.path, to)


def restore(settings: Settings, copy: Path, now: Callable[[], datetime]) -> tuple[Path | None, int]:
    """
    Replace SQLite's file with a copy, and record the restore; return where the old file is now (None: there was none),
    and the number of withdrawn one-time secrets.

    No door may run meanwhile (LockedError). If this process is killed, the door refuses to sign, and says so.
    """
    _assert_file(settings)
    store = Store(settings.node.state_dir)
    store.prepare()
    with lock(store.door_lock, "ca-bridge serve-database"):
        place = database_file(store)
        new, old = place.with_name(f"{place.name}.new"), place.with_name(f"{place.name}.old")
        if (is_there := place.exists()) and old.exists():
            raise UpkeepError(
                f"{old}: wanted no file there, since the present database goes there, found one",
                hint="an earlier restore has left it: move it away, and restore again; nothing was replaced",
            )
        _copy(copy, new, new)
        try:  # don't replace the file with one that this version can't use
            with contextlib.closing(DoorDatabase(sqlite_url(new))) as memory:
                Doors(memory, store, "").names()
        except DatabaseError as e:
            for end in ("", "-wal", "-shm"):
                new.with_name(new.name + end).unlink(missing_ok=True)
            raise UpkeepError(f"{copy}: {e}", hint=f"{e.hint}; nothing was replaced") from None
        if is_there:
            with contextlib.closing(sqlite3.connect(place)) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            place.replace(old)
        for end in ("-wal", "-shm"):  # the old file's; the checkpoint has moved their content
            place.with_name(place.name + end).unlink(missing_ok=True)
        new.replace(place)
        sync_directory(place.parent)
        return old if is_there else None, reconcile(settings, now)


def reconcile(settings: Settings, now: Callable[[], datetime]) -> int:
    """Record a restore in the database and in the audit log; return the number of withdrawn one-time secrets."""
    with opened(settings, may_make=True) as (_, doors), recording(settings, _WAIT) as (_, record):
        doors.alive()  # an older database has no row for this door
        withdrawn = doors.reconcile(now(), audit.who()["user"])
        about = f"the door's database; round {doors.round()} is the newest one; one-time secrets withdrawn: {withdrawn}"
        record.add(audit.RESTORED, result=about)
    return withdrawn


def again(settings: Settings, digest: str) -> None:
    """Have a request signed that was left to an operator (UpkeepError: there is none, or the digits are of several)."""
    if len(digest) < _LEAST_DIGITS:
        raise UpkeepError(f"wanted at least {_LEAST_DIGITS} digits of a request's digest, found {len(digest)}")
    with opened(settings) as (_, doors), recording(settings, _WAIT) as (_, record):
        if not doors.again(digest):
            raise UpkeepError(f"wanted the digits of one request that was left to people, found {digest}")
        record.add(audit.AGAIN, result=f"request {digest[:16]}: a person says that no CA has signed it")


def _assert_file(settings: Settings) -> None:
    if settings.serve.database:
        raise UpkeepError(
            "wanted SQLite's file in the state directory, found serve.database in the settings",
            hint="pg_dump and pg_restore copy PostgreSQL's; then `ca-bridge serve-database restored`",
        )


def _copy(source: Path, to: Path, name: Path) -> None:
    """Copy a door's database with SQLite's own backup, which includes its WAL; errors call the copy `name`."""
    with reasons(UpkeepError, f"{name}: can't make a copy there"):
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
        wanted = f"wanted a database of a door, and room for its copy at {name}"
        raise UpkeepError(f"{source}: {wanted}, found: {e}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
