"""The gateway's context, which each step gets once: settings, API server, CAs, record, queue; and how a step may end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from bridge.cluster.api import Api
from bridge.errors import BackendError, BackendRefusedError, BridgeError, VerificationError
from bridge.gateway.authorities import AuthorityOfSigners
from bridge.gateway.leader import Alone, Leader
from bridge.gateway.ledger import About, Ledger
from bridge.gateway.nodes import Nodes
from bridge.gateway.pages import Metrics
from bridge.gateway.queue import Job, Queue
from bridge.gateway.watch import AnyObject
from bridge.settings.tables import Settings
from bridge.state.audit import AuditError
from bridge.state.open_requests import Kind, RequestLog
from bridge.state.store import Store
from bridge.system.state_file import StateError
from bridge.system.waiting import back_off_seconds
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

#: A CA that refused, or answered wrongly, is asked again after this, doubled a few times.
AFTER_REFUSAL_SECONDS, _LONGEST_AFTER_REFUSAL_SECONDS = 60.0, 480.0


class LeftError(Exception):
    """The job ends here for now, and is looked at again."""

    def __init__(self, outcome: str, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
        self.seconds = seconds  #: Until then; None: the longer, the more often it was left.


class GoneError(Exception):
    """Another client has answered, deleted or replaced the object."""


class NotAllowedError(BridgeError):
    """The policy does not allow it; the audit log has the reason."""

    exit_code = BackendRefusedError.exit_code


def after_refusal(job: Job) -> float:
    """Seconds until the CA is asked once more."""
    return back_off_seconds(job.attempts, AFTER_REFUSAL_SECONDS, _LONGEST_AFTER_REFUSAL_SECONDS)


def extra(job: Job, outcome: str | None = None) -> dict[str, str | None]:
    """The fields of the log's lines about a job."""
    request = job.one.request
    return {
        "request": job.one.uid,
        "signer": request.signer,
        "requester": one_line(request.username),
        "outcome": outcome,
    }


#: Each is a person's work.
MOST_PENDING_AT_CA = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingAtCa:
    """A request that a CA has."""

    uid: str
    object_name: str
    signer: str
    csr_sha256: str
    reference: str  #: The backend's.
    validity_seconds: int
    asked: datetime


class PendingRequests(RequestLog[PendingAtCa]):
    """All requests that CAs have; the state directory's lock is held."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.pending_at_ca, _GATEWAY)


_GATEWAY = Kind(
    name="gateway",
    type=PendingAtCa,
    key_of=lambda one: one.uid,
    what="the requests that the gateway's CA answers later",
    old_key="ticketsV1",
)


@dataclass(eq=False, kw_only=True)
class Context:
    """May be used by several threads."""

    settings: Settings
    api: Api
    nodes: Nodes
    authorities: dict[str, AuthorityOfSigners]
    ledger: Ledger
    pending_at_ca: PendingRequests
    metrics: Metrics
    holder: Leader | Alone
    now: Callable[[], datetime]
    queue: Queue = field(default_factory=Queue)

    def assert_ours(self) -> None:
        """Leave the job if another replica works."""
        if not self.holder.is_ours():
            raise LeftError("left", "another replica works", 0.5)

    def about(self, one: AnyObject, authority: AuthorityOfSigners | None = None) -> About:
        """The facts that the audit log's lines about a request repeat."""
        if authority is None:
            return About.of(one)
        return About.of(one, authority.ca.label, authority.identity)

    def record_quietly(self, about: About, event: str, error: BackendError | VerificationError) -> None:
        """Record what has happened already; if that fails, the log has it, and `/readyz` fails."""
        try:
            self.ledger.write(about.line(event, error=error))
        except AuditError as e:
            log.error("%s; the audit log lacks: %s", e, event, extra={"request": about.more["request"]})  # noqa: TRY400

    def drop_pending(self, uid: str) -> None:
        """Forget a request at a CA: it has been answered, or never will be."""
        try:
            self.pending_at_ca.forget(uid)
            self.pending_at_ca.save()
        except StateError as e:
            log.error("%s", e, extra={"request": uid})  # noqa: TRY400

    def give_up(self, uid: str, why: str) -> None:
        """Forget a request at a CA whose certificate is not wanted any more."""
        if self.pending_at_ca.get(uid) is not None:
            self.drop_pending(uid)
            log.info("the request at the CA is given up: %s", why, extra={"request": uid})
