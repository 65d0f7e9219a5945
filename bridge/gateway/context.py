"""
The gateway's context, shared by all threads: settings, API server, CAs, lease, audit log, queue; and the errors that
end the work on a job for now.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from bridge.cluster.api import Api, NoAnswerError, Reply, Request
from bridge.cluster.lease import Keeper, Lease
from bridge.errors import BackendError, BackendRefusedError, BridgeError, VerificationError
from bridge.gateway.authorities import AuthorityOfSigners
from bridge.gateway.nodes import Nodes
from bridge.gateway.pages import Metrics
from bridge.gateway.queue import Job, Queue
from bridge.gateway.rules import spec_of
from bridge.gateway.watch import AnyObject, PodObject
from bridge.settings.tables import AuditSettings, Settings
from bridge.specs import POD_SPECS, CertificateSpec
from bridge.state import Store
from bridge.state.audit import AuditError, Record
from bridge.state.open_requests import Kind, RequestLog
from bridge.system.files import digest
from bridge.system.state_file import StateError
from bridge.system.waiting import back_off_seconds
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

# --- the lease --------------------------------------------------------------------------------------------------------

#: A renewed lease counts for this share of its duration, so that we stop before another replica starts.
_SHARE = 0.7
#: A replica waits this many of our lease durations for a holder that does not renew the lease.
_MOST_DURATIONS = 10


class Leader:
    """A replica's hold on the lease; a gateway without a lease is `Alone`."""

    def __init__(self, api: Api, path: tuple[str, str], identity: str, duration: timedelta) -> None:
        self.lease = Lease(api, path, identity, duration=duration, longest=_MOST_DURATIONS * duration)
        self._seconds = duration.total_seconds() * _SHARE
        self._is_settled = False  #: `doubtful_before` is about the lease as we have it now.
        self.said: str | None = None  #: The last trouble that was logged; None: nothing was logged yet.
        #: When we took the lease from a replica that had not released it, perhaps ourselves before a crash.
        self.doubtful_before: datetime | None = None
        self._can_work: Callable[[], bool] = lambda: True
        self._keeper = Keeper(self.lease, duration, self._renew)
        self.threads = (self._keeper.thread,)
        self.last_answer = time.monotonic()  #: When the API last answered.

    def start(self, can_work: Callable[[], bool]) -> None:
        """Start to compete for the lease; while `can_work` is false, another replica may have it."""
        self._can_work = can_work
        self._keeper.start()

    def is_ours(self) -> bool:
        """Whether we may work."""
        return self._is_settled and time.monotonic() < self._keeper.renewed + self._seconds

    def release(self) -> None:
        """Release the lease, so that another replica takes over at once; without an API server the lease expires."""
        self._keeper.stop()
        self._give_back()

    def _give_back(self) -> None:
        try:
            self._keeper.give_back()
        except NoAnswerError as e:
            log.warning("the lease %s was not released, and will expire: %s", self.lease.name, e)

    def _renew(self) -> None:
        if not self._can_work():
            self._give_back()
            self._say(f"the lease {self.lease.name} is left to others, since the audit log can't be written")
            return
        self._is_settled = self.is_ours()
        try:
            other = self._keeper.take()
        except NoAnswerError as e:
            self._say(str(e))
            raise
        self.last_answer = time.monotonic()
        if not other and not self._is_settled:
            self.doubtful_before = datetime.now(UTC) if self.lease.taken_from else None
            self._is_settled = True
        self._say(f"standing by: {other} has the lease {self.lease.name}" if other else "")

    def _say(self, trouble: str) -> None:
        if trouble != self.said:
            self.said = trouble
            (log.warning if trouble else log.info)("%s", trouble or f"the lease {self.lease.name} is ours")


class Alone:
    """A gateway without other replicas (`lease = false`)."""

    threads = ()

    def __init__(self) -> None:
        self.doubtful_before = datetime.now(UTC)  #: The run before this one may have died.

    def start(self, _: Callable[[], bool]) -> None:
        """Do nothing."""

    def is_ours(self) -> bool:
        """Return True."""
        return True

    def release(self) -> None:
        """Do nothing."""


# --- the audit log ----------------------------------------------------------------------------------------------------

#: The most lines about past events that are kept while the audit log can't be written.
_MOST_NOTED = 10_000
#: After a failure this much disk space must be free before we write again, or each line could move the lease.
_ROOM_BYTES = 256 << 10
_AGAIN_SECONDS = 5.0

Line = dict[str, Any]  #: One event of one request, for `Record.add`, with or without `event`.


def spec_for(subject: AnyObject) -> CertificateSpec:
    """Return the spec, which also names the CA, for an object of one of our signers."""
    spec = POD_SPECS["peer"] if isinstance(subject, PodObject) else spec_of(subject.request.signer)
    if spec is None:
        raise AssertionError("only signers that have a spec are looked at")
    return spec


def facts_of(subject: AnyObject, authority: AuthorityOfSigners | None = None) -> Line:
    """Return the fields that all audit lines about an object share; the requester chose the names in them."""
    spec = spec_for(subject)
    found = {
        "request": subject.uid,
        "object": one_line(subject.name),
        "signer": subject.request.signer,
        "requester": one_line(subject.request.username),
        "csrSha256": digest(subject.request.pem),
        "backend": authority.ca.label if authority is not None else "",
        "identity": authority.identity if authority is not None else "",
    }
    if isinstance(subject, PodObject):
        request = subject.request
        pod = {"namespace": request.namespace, "pod": request.pod, "serviceAccount": request.service_account}
        pod |= {"podUID": request.pod_uid, "requester": f"system:node:{request.node}"}
        found |= {key: one_line(value) for key, value in pod.items()}
    more = {key: value for key, value in found.items() if value}
    return {"name": spec.name, "authority": spec.authority.name, "more": more}


class Ledger:
    """The audit log; any thread may use it, and the caller holds the store's lock."""

    def __init__(self, store: Store, settings: AuditSettings) -> None:
        self.trouble = ""  #: Why the latest lines were not written.
        self._failing_since = self._tried = 0.0
        self._head_is_old = False
        self._path = store.audit
        self._record = Record(store, settings)
        self._noted: list[Line] = []
        self._mutex, self._writing = threading.Lock(), threading.Lock()

    def write(self, facts: Line, event: str, **values: Any) -> None:
        """Write a line; it is on disk when this returns."""
        self._write({**facts, "event": event, **values})

    def note(self, facts: Line, event: str, **values: Any) -> None:
        """Add a line about a past event; the next write or `flush` writes it."""
        with self._mutex:
            self._noted.append({**facts, "event": event, **values})

    def flush(self) -> None:
        """Write noted lines and the newest line's number; called each second, but tries less often after a failure."""
        if self.trouble:
            if time.monotonic() - self._tried < _AGAIN_SECONDS:
                return
            self._tried = time.monotonic()
            self._try_room()
        if self._noted or self._head_is_old or self.trouble:
            self._write(None)

    def failing_seconds(self) -> float:
        """Return the seconds since writes began to fail; 0: they work."""
        return time.monotonic() - self._failing_since if self.trouble else 0.0

    def _try_room(self) -> None:
        path = self._path.with_name(".gateway-room")
        try:
            with path.open("wb") as file:
                file.write(bytes(_ROOM_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise AuditError(f"{path}: the audit log could not be written: {e.strerror}") from None
        finally:
            path.unlink(missing_ok=True)

    def _write(self, line: Line | None) -> None:
        """Write a line, or for None only what was noted and the head."""
        with self._writing:
            with self._mutex:
                noted, self._noted = self._noted, []
            for each in [*noted, *([line] if line is not None else [])]:
                self._record.add(**each)
            try:
                self._record.write(head_later=True)
                noted, self._head_is_old = [], True
                if line is None or self.trouble:  # the trouble may be in the head's file, not the lines'
                    self._record.write_head()
                    self._head_is_old = False
            except AuditError as e:
                if not self.trouble:
                    self._failing_since = time.monotonic()
                self.trouble = str(e)
                with self._mutex:  # the caller writes its own line again
                    self._noted = [*noted, *self._noted][:_MOST_NOTED]
                raise
            self.trouble = ""


# --- how the work on a job may end, and what all of it shares ---------------------------------------------------------

#: The oldest verdict by which a certificate may be written.
_FRESH_SECONDS = 1.0
#: The pause before we ask a CA again that refused or gave a wrong answer; it doubles a few times.
AFTER_REFUSAL_SECONDS, _LONGEST_AFTER_REFUSAL_SECONDS = 60.0, 480.0


class LeftError(Exception):
    """The job stops here for now, and is taken up again later."""

    def __init__(self, outcome: str, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.seconds = seconds  #: The pause; None: it doubles with each attempt.


class GoneError(Exception):
    """Another client has answered, deleted or replaced the object."""


class NotAllowedError(BridgeError):
    """The policy does not allow the request; the audit log has the reason."""

    exit_code = BackendRefusedError.exit_code


def after_refusal(job: Job) -> float:
    """Return the seconds until we ask the CA once more."""
    return back_off_seconds(job.attempts, AFTER_REFUSAL_SECONDS, _LONGEST_AFTER_REFUSAL_SECONDS)


def extra(job: Job, outcome: str | None = None) -> dict[str, str | None]:
    """Return the fields of log lines about a job."""
    request = job.one.request
    return {
        "request": job.one.uid,
        "signer": request.signer,
        "requester": one_line(request.username),
        "outcome": outcome,
    }


#: The most requests that wait at CAs; a person has to approve each.
MOST_PENDING_AT_CA = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingAtCa:
    """A request that a CA answers later."""

    uid: str
    object_name: str
    signer: str
    csr_sha256: str
    reference: str  #: The backend's name for it.
    validity_seconds: int
    asked: datetime


class PendingRequests(RequestLog[PendingAtCa]):
    """All requests that CAs answer later; the caller holds the state directory's lock."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.pending_at_ca, _GATEWAY)


_GATEWAY = Kind(
    name="gateway",
    type=PendingAtCa,
    key_of=lambda pending: pending.uid,
    what="the requests that the gateway's CA answers later",
)


@dataclass(eq=False, kw_only=True)
class Context:
    """Everything that the threads share."""

    settings: Settings
    api: Api
    nodes: Nodes
    authorities: dict[str, AuthorityOfSigners]
    ledger: Ledger
    pending_at_ca: PendingRequests
    metrics: Metrics
    holder: Leader | Alone
    now: Callable[[], datetime]
    queue: Queue

    def assert_ours(self) -> None:
        """Raise LeftError if another replica has the lease."""
        if not self.holder.is_ours():
            raise LeftError("left", "another replica works", 0.5)

    def assert_fresh(self, job: Job) -> None:
        """Raise LeftError if the last verdict on a job is too old to be written."""
        if time.monotonic() - job.judged > _FRESH_SECONDS:
            raise LeftError("left", "its verdict was too old to be written", _FRESH_SECONDS)

    def write(self, request: Request) -> Reply:
        """Send a write while the lease is ours (LeftError), and no second time after it has ended (NoAnswerError)."""
        self.assert_ours()
        return self.api.answer(request, self.holder.is_ours)

    def record_quietly(self, facts: Line, event: str, error: BackendError | VerificationError) -> None:
        """Record a past event; if that fails, the log has it, and `/readyz` fails."""
        try:
            self.ledger.write(facts, event, error=error)
        except AuditError as e:
            log.error("%s; the audit log lacks: %s", e, event, extra={"request": facts["more"]["request"]})  # noqa: TRY400

    def drop_pending(self, uid: str) -> None:
        """Forget a request at a CA, because it was answered or never will be."""
        try:
            self.pending_at_ca.forget(uid)
            self.pending_at_ca.save()
        except StateError as e:
            log.error("%s", e, extra={"request": uid})  # noqa: TRY400

    def give_up(self, uid: str, why: str) -> None:
        """Forget a request at a CA whose certificate is no longer needed."""
        if self.pending_at_ca.get(uid) is not None:
            self.drop_pending(uid)
            log.info("the request at the CA is given up: %s", why, extra={"request": uid})
