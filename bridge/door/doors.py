"""
The doors of one database: which of them live, whose turn it is to sign, and which requests each has begun.

The queries are here, the rules in `bridge.door.turns`. Times are the database's where it has a clock of its own, so
that hosts need not agree on the time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from bridge.door.store import DOORS, ENROLMENTS, REQUESTS, RESTORES, TO_SIGN, UNANSWERED, Kept, Memory, asking
from bridge.door.turns import SILENT, STALE_SECONDS, NotOursError, rounds
from bridge.state import audit
from bridge.state.store import Store

#: The number of PostgreSQL's advisory lock that the door has which signs.
_TURN_LOCK = 0x0CAB_0002


class Doors:
    """One door among the others; from any thread."""

    def __init__(self, memory: Memory, store: Store, door: str) -> None:
        """`door` is the name of the state directory (`turns.identity`)."""
        self._engine = memory.engine
        self._store = store
        self.door = door
        self.is_ending = False  #: From then on no CA is asked; what CAs were asked before is still taken.
        self._heard = 0.0  #: When the database last heard of us, by the monotonic clock.
        self._recorded: int | None = None

    # --- who lives ----------------------------------------------------------------------------------------------------

    def alive(self) -> None:
        """Tell the database that this door lives."""
        began = time.monotonic()
        with asking(), self._engine.begin() as connection:
            moment = _now(connection)
            insert = (postgresql if self._is_shared else sqlite).insert(DOORS)
            row = insert.values(id=self.door, host=os.uname().nodename, seen=moment, round=0)
            connection.execute(row.on_conflict_do_update(index_elements=["id"], set_={"seen": moment}))
        self._heard = began

    def assert_ours(self) -> None:
        """Refuse to ask a CA when this door is ending, or another one may have taken our requests over (NotOursError)."""
        if self.is_ending:
            raise NotOursError("wanted a running door, found one that is shutting down", hint="")
        silent = time.monotonic() - self._heard
        if silent > STALE_SECONDS:
            text = f"wanted a database that has heard of this door, found it silent for {silent:.0f} seconds"
            raise NotOursError(text)

    def names(self) -> dict[str, str]:
        """The hosts of all doors, by door."""
        with asking(), self._engine.connect() as connection:
            return {door: host for door, host in connection.execute(sa.select(DOORS.c.id, DOORS.c.host))}  # noqa: C416 (a row is no pair for mypy)

    @property
    def _is_shared(self) -> bool:
        return self._engine.dialect.name == "postgresql"

    # --- whose turn it is ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def turn(self) -> Iterator[bool]:
        """Whether this door signs now; PostgreSQL ends the turn of a door that was killed by itself. A file has one door."""
        if not self._is_shared:
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
            connection.invalidate()  # its end gives the lock back, too

    # --- requests -----------------------------------------------------------------------------------------------------

    def to_sign(self, most: int) -> list[Kept]:
        """
        The requests that this door may sign, those that were tried least recently first: new ones, its own, and those
        of doors that were not heard of for a while.
        """
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
        Begin a round: write down that this door signs these; its number, and those that no other door was faster for.

        A database that can't be written to stops it before a CA is asked.
        """
        with asking(), self._engine.begin() as connection:
            mine = DOORS.update().where(DOORS.c.id == self.door).values(round=DOORS.c.round + 1)
            number = connection.execute(mine.returning(DOORS.c.round)).scalar_one()
            ours = REQUESTS.update().where(REQUESTS.c.id.in_(ids), self._ours(_now(connection)))
            # one that was left to people and is ours waits again
            state = sa.case((REQUESTS.c.state == "left", "waiting"), else_=REQUESTS.c.state)
            claimed = ours.values(begun=now, signer=self.door, state=state).returning(REQUESTS.c.id)
            return int(number), set(connection.execute(claimed).scalars())

    def leave(self, request_id: str, text: str) -> None:
        """Leave a request to people, with the reason; the door that began it may still sign it."""
        with asking(), self._engine.begin() as connection:
            connection.execute(REQUESTS.update().where(REQUESTS.c.id == request_id).values(state="left", note=text))

    def again(self, digest: str) -> int:
        """Let requests that were left, and whose digest begins like this, be signed without a question; their number."""
        which = sa.and_(REQUESTS.c.state == "left", REQUESTS.c.digest.startswith(digest, autoescape=True))
        with asking(), self._engine.begin() as connection:
            done = connection.execute(REQUESTS.update().where(which).values(state="waiting", signer="", note=""))
            return done.rowcount

    # --- the past -----------------------------------------------------------------------------------------------------

    def round(self) -> int:
        """The newest round of this door that the database knows of."""
        with asking(), self._engine.connect() as connection:
            return int(connection.execute(sa.select(DOORS.c.round).where(DOORS.c.id == self.door)).scalar() or 0)

    def recorded(self) -> int:
        """The newest round of this door in its audit log."""
        if self._recorded is None:
            self._recorded = rounds(audit.events(self._store, None, None))(self.door)
        return self._recorded

    def began(self, number: int) -> None:
        """Remember that lines of this round may be in the audit log."""
        self._recorded = max(number, self._recorded or 0)

    def restored(self) -> datetime | None:
        """The time of the database's last restore."""
        with asking(), self._engine.connect() as connection:
            return connection.execute(sa.select(RESTORES.c.restored).order_by(RESTORES.c.id.desc()).limit(1)).scalar()

    def reconcile(self, now: datetime, by: str) -> int:
        """
        Write down that the database was restored, and that it knows of this door's rounds from now on.

        Enrolments that are open in it may have been used since it was copied, and those without an answer may have been
        used by another one since it was put back: they are withdrawn. Their number.
        """
        ours = ENROLMENTS.c
        unanswered = ours.request.in_(sa.select(REQUESTS.c.id).where(REQUESTS.c.state.in_(UNANSWERED)))
        with asking(), self._engine.begin() as connection:
            connection.execute(RESTORES.insert().values(restored=now, by=by[:253]))
            known = DOORS.update().where(DOORS.c.id == self.door, DOORS.c.round < self.recorded())
            connection.execute(known.values(round=self.recorded()))
            is_open = sa.or_(sa.and_(ours.used.is_(None), ours.ends > now), unanswered)
            found = ENROLMENTS.update().where(ours.withdrawn.is_(None), is_open)
            return connection.execute(found.values(withdrawn=now)).rowcount


def _now(connection: sa.Connection) -> datetime:
    if connection.dialect.name == "postgresql":
        moment: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
        return moment.astimezone(UTC)
    return datetime.now(UTC)
