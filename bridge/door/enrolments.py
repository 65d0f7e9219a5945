"""
Enrolments: with a one-time secret from `ca-bridge enroll` at the door's host, a node requests its first certificates.

The operator sets the node and the cluster; the request can't choose them. An enrolment replaces continuity proofs, as
`ca-bridge sign --without-proof` does, and the policy decides everything else. `DoorDatabase.receive` binds an enrolment to
one request, in the transaction that stores the request.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import sqlalchemy as sa

from bridge.desk.files import load_policy
from bridge.desk.policy import node_problems
from bridge.door.store import ENROLMENTS, DoorDatabase, EnrolmentError, open_memory
from bridge.errors import SettingsError, SettingsProblem
from bridge.pki import node_proofs
from bridge.pki.bundle import RequestBundle
from bridge.pki.expiry import duration_text, minute
from bridge.pki.kubeadm_names import is_node_name
from bridge.settings.tables import Settings
from bridge.specs import SPECS, USER
from bridge.state import audit
from bridge.state.session import recording

LONGEST = timedelta(days=30)
#: How long to wait for a signing round, which holds the state directory's lock.
_WAIT = timedelta(minutes=1)
#: The first number that SQLite's integers can't hold.
_BEYOND = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """One enrolment; its fields are the table's columns."""

    id: int
    node: str
    cluster: str
    certificates: tuple[str, ...]  #: Empty: all that the policy allows.
    created: datetime
    created_by: str
    ends: datetime
    used: datetime | None
    request: str | None  #: The id of the request that used it.
    withdrawn: datetime | None

    @classmethod
    def of(cls, row: sa.RowMapping) -> Enrolment:
        """Read a row of the table."""
        named = {key: row[key] for key in cls.__slots__}
        return cls(**{**named, "certificates": tuple(filter(None, row["certificates"].split(",")))})

    def state(self, now: datetime) -> str:
        """`open`, `used`, `withdrawn` or `ended`."""
        if self.withdrawn is not None:
            return "withdrawn"
        if self.used is not None:
            return "used"
        return "open" if now < self.ends else "ended"

    def assert_for(self, node: str, cluster: str, now: datetime) -> None:
        """Refuse another node's secret, and a used, withdrawn or expired one (EnrolmentError)."""
        if (node, cluster) != (self.node, self.cluster):
            raise EnrolmentError(
                f"enrolment: wanted a request of {self.node} in {self.cluster}, found one of {node} in {cluster}",
                hint="`ca-bridge enroll NODE --cluster NAME` names both as the node's settings have them",
            )
        if (state := self.state(now)) != "open":
            when = minute(self.withdrawn or self.used or self.ends)
            raise EnrolmentError(f"enrolment: wanted a secret that is open, found one that is {state} since {when}")

    def vouches(self, bundle: RequestBundle) -> dict[str, str]:
        """Return why requests of a bundle need no continuity proof, for the record, by certificate name; never a user's."""
        if self.withdrawn is not None or (bundle.node, bundle.cluster) != (self.node, self.cluster):
            return {}
        names = {request.name for request in bundle.requests} - {USER.name}
        allowed = names.intersection(self.certificates) if self.certificates else names
        return dict.fromkeys(allowed, f"by enrolment {self.id} of {self.created_by}")


def find(memory: DoorDatabase, secret_hash: str) -> Enrolment | None:
    """Return the enrolment whose secret has this hash, in any state."""
    return next(iter(_found(memory, ENROLMENTS.c.secret_hash == secret_hash)), None)


def proven_by(memory: DoorDatabase, authorization: str, bundle: RequestBundle, digest: str, now: datetime) -> Enrolment:
    """Return the open enrolment that the header proves (EnrolmentError: there is none, or it is for another request)."""
    secret_hash = node_proofs.enrolled_by(authorization, digest)
    found = find(memory, secret_hash) if secret_hash is not None else None
    if found is None:
        raise EnrolmentError("enrolment: wanted a proof of this request by a secret of this door, found another text")
    found.assert_for(bundle.node, bundle.cluster, now)
    return found


def for_requests(memory: DoorDatabase, ids: Collection[str]) -> dict[str, Enrolment]:
    """Return the enrolments that these requests used, by request id."""
    return {
        enrolment.request: enrolment
        for enrolment in _found(memory, ENROLMENTS.c.request.in_(ids))
        if enrolment.request is not None
    }


def _found(memory: DoorDatabase, which: sa.ColumnElement[bool]) -> list[Enrolment]:
    query = sa.select(ENROLMENTS).where(which).order_by(ENROLMENTS.c.id.desc())
    return [Enrolment.of(row) for row in memory.select(query)]


# --- at the door's host -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An enrolment as the operator wants it."""

    node: str
    cluster: str
    certificates: tuple[str, ...]
    lasts: timedelta


def enroll(settings: Settings, policy_file: Path | None, wanted: Wanted, now: datetime) -> tuple[Enrolment, str]:
    """Make an enrolment and its secret, which is stored nowhere (SettingsError: the policy has no such node)."""
    _assert_sensible(wanted, settings, policy_file)
    secret, doer = secrets.token_urlsafe(node_proofs.SECRET_BYTES), audit.person()
    row = {
        "node": wanted.node,
        "cluster": wanted.cluster,
        "certificates": ",".join(wanted.certificates),
        "secret_hash": node_proofs.secret_hash(secret),
        "created": now.replace(microsecond=0),
        "created_by": doer,
        "ends": (now + wanted.lasts).replace(microsecond=0),
    }
    limit = f", for {', '.join(wanted.certificates)}" if wanted.certificates else ""
    about = f"node {wanted.node}, cluster {wanted.cluster}{limit}, until {minute(now + wanted.lasts)}"
    with closing(open_memory(settings, may_make=True)) as memory:
        _record(settings, audit.ENROLLED, about)
        memory.change(ENROLMENTS.insert().values(**row))
        [made] = _found(memory, ENROLMENTS.c.secret_hash == row["secret_hash"])
    return made, secret


def listed(settings: Settings) -> list[Enrolment]:
    """Return all enrolments, the newest first."""
    with closing(open_memory(settings)) as memory:
        return _found(memory, sa.true())


def withdraw(settings: Settings, number: int, now: datetime) -> Enrolment:
    """Withdraw an enrolment; the door refuses its request, unless that is signed already."""
    with closing(open_memory(settings)) as memory:
        found = _found(memory, ENROLMENTS.c.id == number) if number < _BEYOND else []
        if not found:
            raise SettingsError([SettingsProblem("NUMBER", "an enrolment of `ca-bridge enrolments`", str(number))])
        _record(settings, audit.WITHDRAWN, f"enrolment {number} of node {found[0].node}, cluster {found[0].cluster}")
        is_open = (ENROLMENTS.c.id == number, ENROLMENTS.c.withdrawn.is_(None))
        memory.change(ENROLMENTS.update().where(*is_open).values(withdrawn=now))
        if found[0].request is not None:  # the next round refuses it
            memory.move(found[0].request, "waiting", before=["undecided"])
        return _found(memory, ENROLMENTS.c.id == number)[0]


def _record(settings: Settings, event: str, about: str) -> None:
    """Write an event to the audit log before it takes effect."""
    with recording(settings, _WAIT) as (_, record):
        record.add(event, result=about)
        record.write()


def _assert_sensible(wanted: Wanted, settings: Settings, policy_file: Path | None) -> None:
    problems, policy = [], load_policy(settings, policy_file)
    if not timedelta(minutes=1) <= wanted.lasts <= LONGEST:
        problems.append(SettingsProblem("--for", f"1m to {duration_text(LONGEST)}", duration_text(wanted.lasts)))
    if not is_node_name(wanted.node):
        problems.append(SettingsProblem("NODE", "the name of one node, as kubeadm gets it", repr(wanted.node)))
    known = [*policy.allow.names, *(name for name in policy.certificates if name not in SPECS)]
    unknown = [name for name in wanted.certificates if name not in known]
    problems += [SettingsProblem("--certificate", f"one of {', '.join(known)}", repr(name)) for name in unknown]
    for text in node_problems(wanted.node, wanted.cluster, policy):
        (about, found), key = text.rsplit(", found ", 1), text.partition(":")[0]
        allowed = about.removeprefix(f"{key}: wanted ")
        problems.append(SettingsProblem(key, f"{allowed}, as the policy has it", found))
    if problems:
        raise SettingsError(problems)
