"""
The door's memory: requests, decisions, issued certificates and enrolments, in a database by SQLAlchemy (Core).

SQLite is one file below the state directory; PostgreSQL is named by its URL. A request is here before it is
judged, and an answer before it is given. The database decides nothing by itself: that no request is signed twice is
proven by the desk's journal and archive, which the CA's own answers go through, so that a database which went back in
time asks for nothing anew; the audit chain stays the proof.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import alembic.command
import alembic.util
import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from bridge import dataclass
from bridge.errors import BridgeError, Exit
from bridge.secret import Secret, SecretUnavailableError
from bridge.settings.tables import Settings
from bridge.state import Store
from bridge.system.files import SECRET_MODE
from bridge.words import one_line

#: `waiting`: for the next round of signing. `undecided`: for people; `approved` and `refused`: by them; the next round
#: judges these once more, and verifies the decisions, since a word in the database proves nothing.
#: `left`: for people, since a CA may have signed it for another door, and can't tell.
State = Literal["waiting", "undecided", "approved", "refused", "left", "answered"]
#: Requests in these states are taken by the next round.
TO_SIGN: tuple[State, ...] = ("waiting", "approved", "refused")
UNANSWERED: tuple[State, ...] = (*TO_SIGN, "undecided", "left")

_MIGRATIONS = Path(__file__).with_name("migrations")
_BUSY_SECONDS = 10
#: For PostgreSQL: a server that does not answer, or a lock that is never free, keeps no thread for long.
_PATIENCE = {
    "connect_timeout": _BUSY_SECONDS,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "options": "-c statement_timeout=30s -c lock_timeout=10s -c idle_in_transaction_session_timeout=60s",
}
_NO_DRIVER = "serve.database names it; PostgreSQL's driver is in requirements-serve.lock (`ca-bridge help door#begin`)"
#: PostgreSQL's advisory locks have numbers: for the tables' form.
_FORM_LOCK = 0x0CAB_0001
#: A digest, a name and a serial number in hex; texts for people.
_DIGEST, _NAME, _TEXT = sa.String(64), sa.String(253), sa.String(2000)


class _Moment(sa.TypeDecorator[datetime]):
    """A time in UTC, also where the database keeps no zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, _: sa.Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=value.tzinfo or UTC)


METADATA = sa.MetaData()

REQUESTS = sa.Table(
    "requests",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),  # unguessable: who has it gets the answer
    sa.Column("digest", _DIGEST, nullable=False, unique=True),  # the bundle's, so that the same one has one id
    sa.Column("node", _NAME, nullable=False),  # the bundle's word; the proofs in it say whether that is true
    sa.Column("cluster", _NAME, nullable=False),
    sa.Column("peer", sa.String(64), nullable=False),  # the address that it came from
    sa.Column("received", _Moment, nullable=False),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("begun", _Moment),  # when it was last judged and signed
    sa.Column("note", _TEXT, nullable=False, default=""),  # why there is no answer yet; what was refused
    sa.Column("answered", _Moment),
    sa.Column("bundle", sa.LargeBinary, nullable=False),  # as it was received
    sa.Column("answer", sa.LargeBinary),  # an answer bundle
    sa.Column("signer", sa.String(64)),  # the door that has begun it; empty: people say that none has
    sa.Column("origin", sa.LargeBinary),  # of an EST request: who asked, as `bridge.door.signing.asker_json` writes it
    sa.Column("again", _DIGEST, index=True, unique=True),  # of an EST request: the same once more has the same
)
DECISIONS = sa.Table(
    "decisions",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("request", sa.String(64), sa.ForeignKey("requests.id"), nullable=False, index=True),
    sa.Column("approver", _NAME, nullable=False),
    sa.Column("verdict", sa.String(16), nullable=False),  # approved, refused; asked: this person brought the request
    sa.Column("reason", _TEXT, nullable=False, default=""),
    sa.Column("signature", sa.LargeBinary),  # the evidence: bridge.desk.approval.Decision.evidence_bytes
    sa.Column("decided", _Moment, nullable=False),
    sa.UniqueConstraint("request", "approver"),
)
CERTIFICATES = sa.Table(
    "certificates",
    METADATA,
    sa.Column("fingerprint", _DIGEST, primary_key=True),  # SHA-256 of its DER
    sa.Column("request", sa.String(64), sa.ForeignKey("requests.id"), nullable=False, index=True),
    sa.Column("csr", _DIGEST, nullable=False, index=True),  # SHA-256 of the CSR's DER
    sa.Column("name", _NAME, nullable=False),  # kubeadm's
    sa.Column("authority", sa.String(64), nullable=False),
    sa.Column("node", _NAME, nullable=False, index=True),
    sa.Column("cluster", _NAME, nullable=False),
    sa.Column("serial", sa.String(64), nullable=False),
    sa.Column("begins", _Moment, nullable=False),
    sa.Column("ends", _Moment, nullable=False, index=True),
    sa.Column("chain", sa.LargeBinary, nullable=False),  # PEM: the leaf, then its intermediates
)
ENROLMENTS = sa.Table(
    "enrolments",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("node", _NAME, nullable=False, index=True),
    sa.Column("cluster", _NAME, nullable=False),
    sa.Column("secret_hash", _DIGEST, nullable=False, unique=True),  # of the one-time secret, which is kept nowhere
    sa.Column("created", _Moment, nullable=False),
    sa.Column("created_by", _NAME, nullable=False),
    sa.Column("ends", _Moment, nullable=False),
    sa.Column("used", _Moment),
    sa.Column("request", sa.String(64), sa.ForeignKey("requests.id")),  # for which it was used
    sa.Column("certificates", _TEXT, nullable=False, server_default=""),  # names with commas; empty: all that may be
    sa.Column("withdrawn", _Moment),
)
DOORS = sa.Table(
    "doors",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),  # its state directory's
    sa.Column("host", _NAME, nullable=False),
    sa.Column("seen", _Moment, nullable=False),  # when it last said that it lives
    sa.Column("round", sa.Integer, nullable=False),  # of signing; the audit log has it, too
)
RESTORES = sa.Table(
    "restores",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("restored", _Moment, nullable=False),  # what was made before may have been signed already
    sa.Column("by", _NAME, nullable=False),
)


class DatabaseError(BridgeError):
    """The database can't be used now: nothing is signed that could not be remembered."""

    exit_code = Exit.UNAVAILABLE
    hint = "is its disk full, or its server down? requests that were accepted are kept, and go on by themselves"


class EnrolmentError(BridgeError):
    """A secret that lets this request in no longer, or never did; nothing was kept."""

    exit_code = Exit.REFUSED
    hint = "have `ca-bridge enroll NODE` run again at the door's host, and put the new secret into the node's file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One request as it is remembered."""

    id: str
    digest: str
    node: str
    cluster: str
    peer: str
    received: datetime
    state: State
    begun: datetime | None
    note: str
    answered: datetime | None
    bundle: bytes
    answer: bytes | None
    signer: str | None = None
    origin: bytes | None = None
    again: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedRow:
    """One issued certificate as it is remembered; fields as the table's columns."""

    fingerprint: str
    csr: str
    name: str
    authority: str
    node: str
    cluster: str
    serial: str
    begins: datetime
    ends: datetime
    chain: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRow:
    """One person's action on a request, as stored; nothing here is verified."""

    approver: str
    verdict: str
    reason: str
    signature: bytes | None
    decided: datetime


#: Statements that are asked for each request, made once: to make one takes longer than to have it answered.
_REQUEST_BY = {
    one.name: sa.select(REQUESTS).where(one == sa.bindparam("value"))
    for one in (REQUESTS.c.id, REQUESTS.c.digest, REQUESTS.c.again)
}
_CHANGE = REQUESTS.update().where(REQUESTS.c.id == sa.bindparam("which"))
_CONCLUDE = _CHANGE.where(REQUESTS.c.state != "answered")
_ISSUED = sa.select(*(CERTIFICATES.c[name] for name in IssuedRow.__slots__))
_ISSUED_AMONG = (
    sa.select(CERTIFICATES.c.csr, CERTIFICATES.c.name, CERTIFICATES.c.chain)
    .where(CERTIFICATES.c.csr.in_(sa.bindparam("csrs", expanding=True)))
    .order_by(CERTIFICATES.c.begins)
)
# by what is in the index: a door has many more that are answered
_UNANSWERED = sa.select(
    sa.func.count().label("every"),
    sa.func.count().filter(REQUESTS.c.peer == sa.bindparam("peer")).label("theirs"),
    sa.func.count().filter(REQUESTS.c.state.in_(TO_SIGN)).label("to_sign"),
).where(REQUESTS.c.state.in_(UNANSWERED))
_DECISIONS = (
    sa.select(*(DECISIONS.c[name] for name in DecisionRow.__slots__))
    .where(DECISIONS.c.request == sa.bindparam("of"))
    .order_by(DECISIONS.c.id)
)


class Memory:
    """The database; from any thread."""

    def __init__(self, url: str, password: Secret | None = None) -> None:
        """Connect, and bring the tables to this version's form; the password is read for each new connection."""
        try:
            self.engine = _engine(url)
        except (SQLAlchemyError, ImportError) as e:
            raise DatabaseError(f"wanted a database, found: {one_line(e)}", hint=_NO_DRIVER) from None
        is_file = self.engine.dialect.name == "sqlite"
        self.insert = sqlite.insert if is_file else postgresql.insert
        self._add = self.insert(REQUESTS).on_conflict_do_nothing().returning(REQUESTS.c.id)
        self._add_issued = self.insert(CERTIFICATES).on_conflict_do_nothing()
        if is_file:
            sa.event.listen(self.engine, "connect", _careful)
        if password is not None:
            sa.event.listen(self.engine, "do_connect", _with_password(password))
        try:
            with asking(), self.engine.begin() as connection:
                _migrate(connection)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()

    def select(self, query: sa.Executable, values: Mapping[str, Any] | None = None) -> Sequence[sa.RowMapping]:
        """All rows of a query."""
        with asking(), self.engine.connect() as connection:
            return connection.execute(query, values).mappings().all()

    def change(self, statement: sa.Executable, values: Mapping[str, Any] | None = None) -> int:
        """Execute one statement; the number of rows that it has changed."""
        with asking(), self.engine.begin() as connection:
            return connection.execute(statement, values).rowcount

    # --- requests -----------------------------------------------------------------------------------------------------

    def receive(
        self,
        bundle: bytes,
        *,
        digest: str,
        node: str,
        cluster: str,
        peer: str,
        now: datetime,
        enrolment: int | None = None,
        origin: bytes | None = None,
        again: str | None = None,
    ) -> str:
        """
        Remember a request, on disk when this returns; the id, which is the earlier one for the same bundle.

        In the same step the enrolment with this number is used up for it (EnrolmentError: another request was first).
        An EST request has an origin, and is the same as an earlier one by `again`.
        """
        request_id = secrets.token_urlsafe(32)
        row = {"id": request_id, "digest": digest, "node": node, "cluster": cluster, "peer": peer, "received": now}
        row |= {"state": "waiting", "note": "", "bundle": bundle, "origin": origin, "again": again}
        with asking(), self.engine.begin() as connection:
            if connection.execute(self._add, row).first() is None:
                same = REQUESTS.c.digest == digest if again is None else REQUESTS.c.again == again
                return str(connection.execute(sa.select(REQUESTS.c.id).where(same)).scalar_one())
            if enrolment is not None:
                _use_up(connection, enrolment, request_id, now)
        return request_id

    def find(self, value: str, column: Literal["id", "digest", "again"] = "id") -> Kept | None:
        """The request with this id, with this digest of its bundle, or the EST request that is the same as this one."""
        return next((Kept(**row) for row in self.select(_REQUEST_BY[column], {"value": value})), None)

    def in_state(self, state: State, most: int | None = None) -> list[Kept]:
        """All requests in this state, or so many, the oldest first."""
        return self._kept(REQUESTS.c.state == state, REQUESTS.c.received, most=most)

    def _kept(self, which: sa.ColumnElement[bool], *order: Any, most: int | None = None) -> list[Kept]:
        return [Kept(**row) for row in self.select(sa.select(REQUESTS).where(which).order_by(*order).limit(most))]

    def note(self, request_id: str, text: str) -> None:
        """Write down why there is no answer yet."""
        self.change(_CHANGE, {"which": request_id, "note": text[:2000]})

    def conclude(
        self, request_id: str, answer: bytes, issued: Sequence[IssuedRow], now: datetime, note: str = ""
    ) -> None:
        """Write down the answer, what was issued, and what was refused, in one step; what is known already stays as it is."""
        values = {"state": "answered", "answer": answer, "answered": now, "note": note[:2000]}
        rows = [asdict(one) | {"request": request_id} for one in issued]
        with asking(), self.engine.begin() as connection:
            connection.execute(_CONCLUDE, {"which": request_id, **values})  # the first answer stays
            if rows:
                connection.execute(self._add_issued, rows)

    def counts(self) -> dict[str, int]:
        """The number of requests in each state."""
        query = sa.select(REQUESTS.c.state, sa.func.count().label("count")).group_by(REQUESTS.c.state)
        return {row["state"]: row["count"] for row in self.select(query)}

    def forget(self, before: datetime) -> None:
        """Drop what answered requests hold, and ended certificates, from before this time; that they were there stays."""
        old = sa.and_(REQUESTS.c.state == "answered", REQUESTS.c.answered < before, REQUESTS.c.answer.is_not(None))
        with asking(), self.engine.begin() as connection:
            connection.execute(REQUESTS.update().where(old).values(bundle=b"", answer=None))
            connection.execute(CERTIFICATES.delete().where(CERTIFICATES.c.ends < before))

    def unanswered(self, peer: str) -> tuple[int, int, int]:
        """The numbers of requests without an answer: of all, of this address, and for the next rounds of signing."""
        [row] = self.select(_UNANSWERED, {"peer": peer})
        return row["every"], row["theirs"], row["to_sign"]

    # --- decisions ----------------------------------------------------------------------------------------------------

    def decide(
        self,
        request_id: str,
        *,
        approver: str,
        verdict: str,
        reason: str,
        evidence: bytes | None,
        now: datetime,
        again: bool = False,
    ) -> bool:
        """
        Remember what a person did about a request; False: the same person did something before, which stays.

        `again`: an earlier decision of theirs gives way to this one.
        """
        ours = DECISIONS.c
        earlier = (ours.request == request_id) & (ours.approver == approver) & (ours.verdict != "asked")
        row = {"request": request_id, "approver": approver, "verdict": verdict, "reason": reason}
        add = self.insert(DECISIONS).values(**row, signature=evidence, decided=now).on_conflict_do_nothing()
        with asking(), self.engine.begin() as connection:
            if again:
                connection.execute(DECISIONS.delete().where(earlier))
            return connection.execute(add.returning(DECISIONS.c.id)).first() is not None

    def decisions(self, request_id: str) -> list[DecisionRow]:
        """The people's actions on a request, the first one first."""
        return [DecisionRow(**row) for row in self.select(_DECISIONS, {"of": request_id})]

    def move(self, request_id: str, state: State, *, before: Sequence[State], note: str = "") -> None:
        """Bring a request from one of these states to another one; a request in a further state stays there."""
        which = (REQUESTS.c.id == request_id) & REQUESTS.c.state.in_(before)
        self.change(REQUESTS.update().where(which).values(state=state, note=note[:2000]))

    def search(self, text: str, most: int) -> list[Kept]:
        """Requests of which node, cluster, digest, state or an approver has this text, the newest first."""
        people = sa.select(DECISIONS.c.request).where(DECISIONS.c.approver.contains(text, autoescape=True))
        ours = REQUESTS.c
        named = [one.contains(text, autoescape=True) for one in (ours.node, ours.cluster, ours.digest, ours.state)]
        return self._kept(sa.or_(*named, ours.id.in_(people)), ours.received.desc(), most=most)

    # --- certificates -------------------------------------------------------------------------------------------------

    def issued_among(self, csrs: Sequence[str]) -> dict[tuple[str, str], bytes]:
        """The newest certificate for each CSR and name, by the CSRs' digests."""
        return {(row["csr"], row["name"]): row["chain"] for row in self.select(_ISSUED_AMONG, {"csrs": csrs})}

    def ending(self, text: str, now: datetime, most: int) -> list[IssuedRow]:
        """Certificates that are valid, the next to end first, of which node, cluster, name or serial number has this text."""
        ours = CERTIFICATES.c
        named = [one.contains(text, autoescape=True) for one in (ours.node, ours.cluster, ours.name, ours.serial)]
        query = _ISSUED.where(sa.or_(*named), ours.ends > now).order_by(ours.ends).limit(most)
        return [IssuedRow(**row) for row in self.select(query)]

    def signed_for(self, found: str) -> tuple[IssuedRow, bytes] | None:
        """The certificate with this fingerprint, and the bundle that asked for it, which is empty once it was dropped."""
        query = _ISSUED.add_columns(REQUESTS.c.bundle).join(REQUESTS, REQUESTS.c.id == CERTIFICATES.c.request)
        for row in self.select(query.where(CERTIFICATES.c.fingerprint == found)):
            columns = dict(row)
            bundle = columns.pop("bundle")
            return IssuedRow(**columns), bundle
        return None


def _use_up(connection: sa.Connection, enrolment: int, request_id: str, now: datetime) -> None:
    ours = ENROLMENTS.c
    is_open = (ours.id == enrolment, ours.used.is_(None), ours.withdrawn.is_(None), ours.ends > now)
    if connection.execute(ENROLMENTS.update().where(*is_open).values(used=now, request=request_id)).rowcount != 1:
        raise EnrolmentError("enrolment: wanted a secret that is open, found that another request was first")


def _engine(text: str) -> sa.Engine:
    url = sa.make_url(text)
    if url.get_backend_name() == "sqlite":
        return sa.create_engine(url, connect_args={"timeout": _BUSY_SECONDS})
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    return sa.create_engine(
        url, pool_pre_ping=True, pool_timeout=_BUSY_SECONDS, max_overflow=20, connect_args=_PATIENCE
    )


def _with_password(password: Secret) -> Callable[[Any, Any, Any, dict[str, Any]], None]:
    """The password goes to the driver alone, and is in no URL, which an error could show."""

    def connect(_dialect: Any, _record: Any, _args: Any, parameters: dict[str, Any]) -> None:
        try:
            parameters["password"] = password.read()
        except SecretUnavailableError as e:
            raise DatabaseError(f"serve.database_password: {e}", hint="the password of the database's user") from None

    return connect


def _careful(connection: Any, _: ConnectionPoolEntry) -> None:
    """A write is on disk when it is done, and a reader keeps no writer waiting."""
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Turn any error of the database into one of ours, whose text has none of the query's values."""
    try:
        yield
    except SQLAlchemyError as e:
        cause = getattr(e, "orig", None) or e
        raise DatabaseError(f"the database: wanted an answer, found: {one_line(cause)}") from e


def _migrate(connection: sa.Connection) -> None:
    """Bring the tables to this version's form; where they have it, nothing is locked, and no writer is waited for."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    forms = MigrationContext.configure(connection).get_current_heads()
    if forms == tuple(ScriptDirectory.from_config(config).get_heads()):
        return
    if connection.dialect.name == "postgresql":  # doors that start at the same time make the tables one after the other
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_FORM_LOCK)))
    else:  # likewise; and whole or not at all, for which SQLite's driver begins nothing before the first row
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    try:
        if sa.inspect(connection).has_table("alembic_version"):
            alembic.command.upgrade(config, "head")
        else:
            METADATA.create_all(connection, checkfirst=False)  # a table of that name is another program's
            alembic.command.stamp(config, "head")
    except alembic.util.CommandError as e:
        text = f"the database: wanted tables of this version or an earlier one, found: {one_line(e)}"
        raise DatabaseError(text, hint="another version of ca-bridge has used it: install that one") from None


def sqlite_url(path: Path) -> str:
    """The URL of a database in one file."""
    return sa.URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


def open_memory(settings: Settings, *, may_make: bool = False) -> Memory:
    """The database that the settings name, which the caller closes (DatabaseError: also where no door has made its file)."""
    store = Store(settings.node.state_dir)
    file, url = database_file(store), settings.serve.database
    if may_make or url or store.directory.exists():
        store.prepare()
    if not url and not file.exists():
        if not may_make:
            hint = "run this at the door's host, with the door's settings; `ca-bridge serve` and `enroll` make the database"
            text = f"{file}: wanted the door's database, found none"
            raise DatabaseError(text, hint=hint, exit_code=Exit.USAGE)
        file.touch(SECRET_MODE)  # SQLite's own mode would be for all users
    return Memory(url or sqlite_url(file), settings.serve.database_password)


def database_file(store: Store) -> Path:
    """The path of SQLite's file, unless the settings name another database."""
    return store.directory / "door.db"
