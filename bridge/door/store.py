"""
The door's memory: requests, decisions, issued certificates and enrolments, in a database (SQLAlchemy Core).

SQLite is one file in the state directory; the settings name PostgreSQL by its URL. The door stores a request before a
round judges it, and an answer before it sends it. The database proves nothing: the desk's journal and archive, through
which all CA answers go, keep a request from being signed twice, even after a restore of an old database. The audit log
stays the proof.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
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

from bridge.desk.node_identity import Owner
from bridge.errors import BridgeError, Exit
from bridge.secret import Secret, SecretUnavailableError
from bridge.settings.tables import Settings
from bridge.state import Store
from bridge.system.files import SECRET_MODE
from bridge.words import one_line

#: `waiting` for the next signing round, `undecided` by approvers, `approved` or `refused` by them: the next round
#: judges these two again, and verifies the decisions, since the database proves nothing. `left` to an operator: a CA
#: may have signed the request for another door, and can't tell.
State = Literal["waiting", "undecided", "approved", "refused", "left", "answered"]
#: The next round takes requests in these states.
TO_SIGN: tuple[State, ...] = ("waiting", "approved", "refused")
UNANSWERED: tuple[State, ...] = (*TO_SIGN, "undecided", "left")

_MIGRATIONS = Path(__file__).with_name("migrations")
_BUSY_SECONDS = 10
#: Limits for PostgreSQL: neither a silent server nor a lock that is never free may block a thread for long.
_PATIENCE = {
    "connect_timeout": _BUSY_SECONDS,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "options": "-c statement_timeout=30s -c lock_timeout=10s -c idle_in_transaction_session_timeout=60s",
}
_NO_DRIVER = "serve.database names it; PostgreSQL's driver is in requirements-serve.lock (`ca-bridge help door#begin`)"
#: The number of PostgreSQL's advisory lock for migrations.
_FORM_LOCK = 0x0CAB_0001
#: The types of digests in hex, of names, and of texts for people.
_DIGEST, _NAME, _TEXT = sa.String(64), sa.String(253), sa.String(2000)


class _Moment(sa.TypeDecorator[datetime]):
    """A time in UTC, even if the database stores no time zone."""

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
    sa.Column("id", sa.String(64), primary_key=True),  # unguessable, since it alone gets the answer
    sa.Column("digest", _DIGEST, nullable=False, unique=True),  # the bundle's, so that the same bundle has one id
    sa.Column("node", _NAME, nullable=False),  # as the bundle says
    sa.Column("cluster", _NAME, nullable=False),
    sa.Column("peer", sa.String(64), nullable=False),  # the client's address
    sa.Column("received", _Moment, nullable=False),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("begun", _Moment),  # when a round last took it
    sa.Column("note", _TEXT, nullable=False, default=""),  # why there is no answer yet; what was refused
    sa.Column("answered", _Moment),
    sa.Column("bundle", sa.LargeBinary, nullable=False),  # as received
    sa.Column("answer", sa.LargeBinary),  # an answer bundle
    sa.Column("signer", sa.String(64)),  # the door that has begun it; empty: an operator says no CA signed it
    sa.Column("origin", sa.LargeBinary),  # an EST request's requester, as `bridge.door.signing.asker_json` writes it
    sa.Column("named", sa.Boolean, nullable=False),  # something proves that the bundle is of its node
    sa.Column("again", _DIGEST, index=True, unique=True),  # an EST request's hash; a repeated request has the same
)
DECISIONS = sa.Table(
    "decisions",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("request", sa.String(64), sa.ForeignKey("requests.id"), nullable=False, index=True),
    sa.Column("approver", _NAME, nullable=False),
    sa.Column("verdict", sa.String(16), nullable=False),  # approved, refused; asked: this person submitted the request
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
    sa.Column("key", _DIGEST, nullable=False, index=True),  # SHA-256 of the public key
    sa.Column("name", _NAME, nullable=False),  # as kubeadm names it
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
    sa.Column("secret_hash", _DIGEST, nullable=False, unique=True),  # of the one-time secret, which is stored nowhere
    sa.Column("created", _Moment, nullable=False),
    sa.Column("created_by", _NAME, nullable=False),
    sa.Column("ends", _Moment, nullable=False),
    sa.Column("used", _Moment),
    sa.Column("request", sa.String(64), sa.ForeignKey("requests.id")),  # the request that used the secret
    sa.Column("certificates", _TEXT, nullable=False, server_default=""),  # names with commas; empty: all that may be
    sa.Column("withdrawn", _Moment),
)
DOORS = sa.Table(
    "doors",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),  # of its state directory
    sa.Column("host", _NAME, nullable=False),
    sa.Column("seen", _Moment, nullable=False),  # its last heartbeat
    sa.Column("round", sa.Integer, nullable=False),  # its newest signing round, also in the audit log
)
RESTORES = sa.Table(
    "restores",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("restored", _Moment, nullable=False),  # requests from before may have been signed already
    sa.Column("by", _NAME, nullable=False),
)


class DatabaseError(BridgeError):
    """The database can't be used now, and the door signs nothing that it can't record."""

    exit_code = Exit.UNAVAILABLE
    hint = "is its disk full, or its server down? requests that were accepted are kept, and go on by themselves"


class EnrolmentError(BridgeError):
    """The one-time secret is not valid for this request; the door stored nothing."""

    exit_code = Exit.REFUSED
    hint = "have `ca-bridge enroll NODE` run again at the door's host, and put the new secret into the node's file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One request as stored."""

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
    named: bool = False
    again: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedRow:
    """One issued certificate as stored; its fields are the table's columns."""

    fingerprint: str
    csr: str
    key: str
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


_ISSUED = sa.select(*(CERTIFICATES.c[name] for name in IssuedRow.__slots__))


class DoorDatabase:
    """The database; thread-safe."""

    def __init__(self, url: str, password: Secret | None = None) -> None:
        """Connect, and migrate the tables to this version; each new connection reads the password again."""
        try:
            self.engine = _engine(url)
        except (SQLAlchemyError, ImportError) as e:
            raise DatabaseError(f"wanted a database, found: {one_line(e)}", hint=_NO_DRIVER) from None
        is_file = self.engine.dialect.name == "sqlite"
        self.insert = sqlite.insert if is_file else postgresql.insert
        if is_file:
            sa.event.listen(self.engine, "connect", _set_pragmas)
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

    def select(self, query: sa.Executable) -> Sequence[sa.RowMapping]:
        """Return all rows of a query."""
        with asking(), self.engine.connect() as connection:
            return connection.execute(query).mappings().all()

    def change(self, statement: sa.Executable) -> int:
        """Execute one statement, and return the number of rows that it changed."""
        with asking(), self.engine.begin() as connection:
            return connection.execute(statement).rowcount

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
        named: bool = False,
        enrolment: int | None = None,
        origin: bytes | None = None,
        again: str | None = None,
        asked_by: str = "",
    ) -> str:
        """
        Store a request on disk, with the approver who brought it, if any; return its id. A repeated bundle keeps its
        first id, and also has the approver who repeats it.

        The same transaction uses up the enrolment with this number (EnrolmentError: another request used it first).
        An EST request has an origin, and repeats an earlier one if `again` is the same.
        """
        request_id = secrets.token_urlsafe(32)
        row = {"id": request_id, "digest": digest, "node": node, "cluster": cluster, "peer": peer, "received": now}
        row |= {"state": "waiting", "note": "", "bundle": bundle, "origin": origin, "named": named, "again": again}
        with asking(), self.engine.begin() as connection:
            add = self.insert(REQUESTS).values(row).on_conflict_do_nothing()
            is_new = connection.execute(add.returning(REQUESTS.c.id)).first() is not None
            if not is_new:
                same = REQUESTS.c.digest == digest if again is None else REQUESTS.c.again == again
                request_id = str(connection.execute(sa.select(REQUESTS.c.id).where(same)).scalar_one())
            if asked_by:
                asked = {"request": request_id, "approver": asked_by, "verdict": "asked", "reason": "", "decided": now}
                connection.execute(self.insert(DECISIONS).values(asked).on_conflict_do_nothing())
            if is_new and enrolment is not None:
                _use_up(connection, enrolment, request_id, now)
        return request_id

    def find(self, value: str, column: Literal["id", "digest", "again"] = "id") -> Kept | None:
        """Return the request with this id, with this digest of its bundle, or with this `again` of EST."""
        return next(iter(self._kept(REQUESTS.c[column] == value)), None)

    def in_state(self, state: State) -> list[Kept]:
        """Return the requests in this state, the oldest first."""
        return self._kept(REQUESTS.c.state == state, REQUESTS.c.received)

    def undecided(self, text: str, most: int) -> tuple[list[Kept], int]:
        """
        Return requests that wait for people, at most `most`, and how many there are, whose node contains this text or whose
        digest begins with it. Nodes come in turn, each with its oldest first; requests of which nothing proves the node
        come in the turn of their address.
        """
        ours = REQUESTS.c
        named = sa.or_(ours.node.contains(text, autoescape=True), ours.digest.startswith(text, autoescape=True))
        which = sa.and_(ours.state == "undecided", named)
        source = sa.case((ours.named, ours.node), else_=ours.peer)
        turn = sa.func.row_number().over(partition_by=source, order_by=ours.received)
        [count] = self.select(sa.select(sa.func.count().label("count")).where(which))
        return self._kept(which, turn, ours.received, most=most), count["count"]

    def undecided_of(self, node: str, cluster: str) -> int:
        """Return how many requests that are proven to be of this node wait for people."""
        ours = REQUESTS.c
        which = (ours.state == "undecided", ours.named, ours.node == node, ours.cluster == cluster)
        [row] = self.select(sa.select(sa.func.count().label("count")).where(*which))
        return int(row["count"])

    def _kept(self, which: sa.ColumnElement[bool], *order: Any, most: int | None = None) -> list[Kept]:
        return [Kept(**row) for row in self.select(sa.select(REQUESTS).where(which).order_by(*order).limit(most))]

    def note(self, request_id: str, text: str) -> None:
        """Store why a request has no answer yet."""
        self.change(REQUESTS.update().where(REQUESTS.c.id == request_id).values(note=text[:2000]))

    def conclude(
        self,
        request_id: str,
        answer: bytes,
        issued: Sequence[IssuedRow],
        now: datetime,
        note: str = "",
        *,
        named: bool = False,
    ) -> None:
        """Store an answer, the issued certificates and the refusals in one transaction; rows that exist stay as they are."""
        which = (REQUESTS.c.id == request_id, REQUESTS.c.state != "answered")  # the first answer stays
        values = {"state": "answered", "answer": answer, "answered": now, "note": note[:2000], "named": named}
        rows = [asdict(row) | {"request": request_id} for row in issued]
        with asking(), self.engine.begin() as connection:
            connection.execute(REQUESTS.update().where(*which).values(values))
            if rows:
                connection.execute(self.insert(CERTIFICATES).on_conflict_do_nothing(), rows)

    def counts(self) -> dict[str, int]:
        """Return the number of requests in each state."""
        query = sa.select(REQUESTS.c.state, sa.func.count().label("count")).group_by(REQUESTS.c.state)
        return {row["state"]: row["count"] for row in self.select(query)}

    def forget(self, before: datetime, ended: datetime) -> None:
        """
        Delete the contents of requests that were answered before a time, and certificates that ended before another, when
        they prove nothing any more; the requests' rows stay.
        """
        old = sa.and_(REQUESTS.c.state == "answered", REQUESTS.c.answered < before, REQUESTS.c.answer.is_not(None))
        with asking(), self.engine.begin() as connection:
            connection.execute(REQUESTS.update().where(old).values(bundle=b"", answer=None))
            connection.execute(CERTIFICATES.delete().where(CERTIFICATES.c.ends < ended))

    def unanswered(self, peer: str) -> tuple[int, int]:
        """Return the numbers of unanswered requests: all, and this address's."""
        count = sa.func.count()
        theirs = count.filter(REQUESTS.c.peer == peer).label("theirs")
        # by the indexed state, because most requests are answered
        [row] = self.select(sa.select(count.label("every"), theirs).where(REQUESTS.c.state.in_(UNANSWERED)))
        return row["every"], row["theirs"]

    def ahead_of(self, received: datetime) -> int:
        """Return how many requests for the next signing rounds were received before this time."""
        which = (REQUESTS.c.state.in_(TO_SIGN), REQUESTS.c.received < received)
        [row] = self.select(sa.select(sa.func.count().label("count")).where(*which))
        return int(row["count"])

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
        void: Sequence[DecisionRow] = (),
    ) -> bool:
        """
        Store a person's action on a request; False: an earlier action of that person stays instead.

        `void` are the person's earlier decisions that do not count; exactly these are replaced, and none that came since.
        """
        ours = DECISIONS.c
        earlier = (ours.request == request_id) & (ours.approver == approver) & (ours.verdict != "asked")
        replaced = [
            earlier & (ours.decided == row.decided) & (ours.signature == row.signature) for row in void
        ]  # not by the number, which SQLite gives to the next row
        row = {"request": request_id, "approver": approver, "verdict": verdict, "reason": reason}
        add = self.insert(DECISIONS).values(**row, signature=evidence, decided=now).on_conflict_do_nothing()
        with asking(), self.engine.begin() as connection:
            if replaced:
                connection.execute(DECISIONS.delete().where(sa.or_(*replaced)))
            return connection.execute(add.returning(DECISIONS.c.id)).first() is not None

    def decisions(self, request_id: str) -> list[DecisionRow]:
        """Return the people's actions on a request, the earliest first."""
        columns = [DECISIONS.c[name] for name in DecisionRow.__slots__]
        query = sa.select(*columns).where(DECISIONS.c.request == request_id).order_by(DECISIONS.c.id)
        return [DecisionRow(**row) for row in self.select(query)]

    def move(self, request_id: str, state: State, *, before: Sequence[State], note: str = "") -> None:
        """Move a request from one of the states `before` to another; a request in any other state stays there."""
        which = (REQUESTS.c.id == request_id) & REQUESTS.c.state.in_(before)
        self.change(REQUESTS.update().where(which).values(state=state, note=note[:2000]))

    def search(self, text: str, most: int) -> list[Kept]:
        """Return requests whose node, cluster, digest, state or approver contains this text, the newest first."""
        people = sa.select(DECISIONS.c.request).where(DECISIONS.c.approver.contains(text, autoescape=True))
        ours = REQUESTS.c
        named = [
            column.contains(text, autoescape=True) for column in (ours.node, ours.cluster, ours.digest, ours.state)
        ]
        return self._kept(sa.or_(*named, ours.id.in_(people)), ours.received.desc(), most=most)

    # --- certificates -------------------------------------------------------------------------------------------------

    def issued_among(self, csrs: Sequence[str]) -> dict[tuple[str, str], bytes]:
        """Return the newest certificate's chain for each CSR and name, by the CSRs' digests."""
        query = _ISSUED.where(CERTIFICATES.c.csr.in_(csrs)).order_by(CERTIFICATES.c.begins)
        return {(row["csr"], row["name"]): row["chain"] for row in self.select(query)}

    def owners(self, keys: Collection[str]) -> dict[str, list[Owner]]:
        """Return the nodes for which these keys were signed, by `node_identity.key_digest`."""
        ours = CERTIFICATES.c
        query = sa.select(ours.key, ours.node, ours.cluster, REQUESTS.c.named).distinct()
        found: dict[str, list[Owner]] = {}
        for row in self.select(query.join(REQUESTS, REQUESTS.c.id == ours.request).where(ours.key.in_(sorted(keys)))):
            owner = Owner(node=row["node"], cluster=row["cluster"], is_proven=row["named"])
            found.setdefault(row["key"], []).append(owner)
        return found

    def ending(self, text: str, now: datetime, most: int) -> list[IssuedRow]:
        """Return valid certificates, next to expire first, whose node, cluster, name or serial number contains this text."""
        ours = CERTIFICATES.c
        named = [column.contains(text, autoescape=True) for column in (ours.node, ours.cluster, ours.name, ours.serial)]
        query = _ISSUED.where(sa.or_(*named), ours.ends > now).order_by(ours.ends).limit(most)
        return [IssuedRow(**row) for row in self.select(query)]

    def signed_for(self, text: str) -> tuple[IssuedRow, bytes, bool] | None:
        """Return the certificate with this fingerprint, its request's bundle (empty once it was dropped), and `named`."""
        query = _ISSUED.add_columns(REQUESTS.c.bundle, REQUESTS.c.named).join(
            REQUESTS, REQUESTS.c.id == CERTIFICATES.c.request
        )
        for row in self.select(query.where(CERTIFICATES.c.fingerprint == text)):
            columns = dict(row)
            bundle, named = columns.pop("bundle"), columns.pop("named")
            return IssuedRow(**columns), bundle, named
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
    """Give the password to the driver only, not in the URL, which an error could show."""

    def connect(_dialect: Any, _record: Any, _args: Any, parameters: dict[str, Any]) -> None:
        try:
            parameters["password"] = password.read()
        except SecretUnavailableError as e:
            raise DatabaseError(f"serve.database_password: {e}", hint="the password of the database's user") from None

    return connect


def _set_pragmas(connection: Any, _: ConnectionPoolEntry) -> None:
    """Make SQLite sync each commit to disk, and let no reader block a writer."""
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Turn any database error into a DatabaseError, whose text has none of the query's values."""
    try:
        yield
    except SQLAlchemyError as e:
        cause = getattr(e, "orig", None) or e
        raise DatabaseError(f"the database: wanted an answer, found: {one_line(cause)}") from e


def _migrate(connection: sa.Connection) -> None:
    """Migrate the tables to this version; if they are up to date, take no lock and wait for no writer."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    revisions = MigrationContext.configure(connection).get_current_heads()
    head = ScriptDirectory.from_config(config).get_current_head()
    if revisions == (head,):
        return
    if connection.dialect.name == "postgresql":  # doors that start at the same time migrate one after the other
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_FORM_LOCK)))
    else:  # likewise, and all or nothing: SQLite's driver begins no transaction before the first row
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    try:
        if sa.inspect(connection).has_table("alembic_version"):
            alembic.command.upgrade(config, "head")
        else:
            METADATA.create_all(connection, checkfirst=False)  # fails on another program's table
            alembic.command.stamp(config, "head")
    except alembic.util.CommandError:
        text = f"the database: wanted tables of revision {head}, found {one_line(', '.join(revisions) or 'none')}"
        raise DatabaseError(text, hint="another version of ca-bridge has used it: install that one") from None


def sqlite_url(path: Path) -> str:
    """Return the URL of an SQLite file."""
    return sa.URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


def open_memory(settings: Settings, *, may_make: bool = False) -> DoorDatabase:
    """Open the settings' database, which the caller closes (DatabaseError: also if no door has made its file)."""
    store = Store(settings.node.state_dir)
    file, url = database_file(store), settings.serve.database
    if may_make or url or store.directory.exists():
        store.prepare()
    if not url and not file.exists():
        if not may_make:
            hint = "run this at the door's host, with the door's settings; `ca-bridge serve` and `enroll` make the database"
            text = f"{file}: there is no database of a door"
            raise DatabaseError(text, hint=hint, exit_code=Exit.USAGE)
        file.touch(SECRET_MODE)  # SQLite's own mode would let all users read it
    return DoorDatabase(url or sqlite_url(file), settings.serve.database_password)


def database_file(store: Store) -> Path:
    """Return the path of SQLite's file, which a door uses unless the settings name another database."""
    return store.directory / "door.db"
