"""
From an object to its certificate: judged, signed, proven, recorded, written.

Each step begins with what is true at that moment: the object at one resourceVersion, the policy, the register, the Node
object, the lease. Whatever has changed when the certificate is to be written makes the API server refuse the write
(uid and resourceVersion stand in it), and the object is looked at anew. An approval that is there counts for nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Protocol
from urllib.parse import quote
from uuid import UUID

from cryptography import x509

from bridge.contract import Continuity, Issued, Pending, SignRequest
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError, BridgeError, VerificationError
from bridge.kubernetes import objects
from bridge.kubernetes.api import MERGE_PATCH, Api, ApiDownError, Reply
from bridge.kubernetes.authorities import AuthorityOfSigners
from bridge.kubernetes.known_nodes import Known
from bridge.kubernetes.ledger import About, Ledger
from bridge.kubernetes.metrics import Metrics
from bridge.kubernetes.objects import NotAnObjectError, SigningRequest
from bridge.kubernetes.queue import Job, Queue
from bridge.kubernetes.rates import Rate
from bridge.kubernetes.tickets import MOST_TICKETS, Ticket, Tickets
from bridge.pki.certificates import load_pem_certificates, pem
from bridge.pki.verify import Verified
from bridge.settings.tables import Settings
from bridge.signing.signer_policy import (
    Allowed,
    Hostile,
    Later,
    NodeState,
    Verdict,
    World,
    addresses_of,
    judge,
    node_of,
)
from bridge.signing.signer_rules import NODE_USER, spec_of
from bridge.specs import GATEWAY_SPECS, CertificateSpec
from bridge.state import audit
from bridge.state.audit import AuditError
from bridge.system.state_file import StateError
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

#: A Node object that was looked at so long ago is as good as one of now.
_NODE_SECONDS = 1.0
_MOST_NODES = 5_000
_MOST_OURS = 10_000
#: What is left alone is looked at again after this, doubled each time; sooner if something changes.
_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 1.0, 300.0
_AFTER_REFUSAL_SECONDS = 60.0
_TURNS = 5  # each 409 means that somebody else has written


class Holder(Protocol):
    """Says whether this replica works."""

    def is_ours(self) -> bool:
        """At this moment."""
        ...


class _LeftError(Exception):
    """The job ends here; it was said why."""

    def __init__(self, outcome: str, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
        self.seconds = seconds  #: None: as often as it was left before says.


class _GoneError(Exception):
    """The object is gone, settled by somebody else, or another one by now."""


@dataclass(eq=False, kw_only=True)
class Desk:
    """What works at the queue; from several threads."""

    settings: Settings
    api: Api
    known: Known
    authorities: dict[str, AuthorityOfSigners]
    ledger: Ledger
    tickets: Tickets
    metrics: Metrics
    holder: Holder
    now: Callable[[], datetime]
    queue: Queue = field(default_factory=Queue)
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        ours = self.settings.gateway
        self._requesters, self._nodes_rate = Rate(ours.requester_rate), Rate(ours.node_rate)
        self._nodes: dict[str, tuple[NodeState, float]] = {}
        self._ours: OrderedDict[str, None] = OrderedDict()  # uids whose certificates we wrote
        self._identities = {name: one.identity() for name, one in self.authorities.items()}

    # --- what the watch tells ---------------------------------------------------------------------------------------

    def changed(self, one: SigningRequest) -> None:
        """An object that is there, or has changed."""
        if one.is_settled:
            self.queue.remove(one.uid)
            if one.certificate and one.uid not in self._ours:
                self._saw(one)
            return
        for uid in self.queue.put(one, lambda new: node_of(new.request)):
            self._give_up(uid, "a newer request of the same node has come")

    def _saw(self, one: SigningRequest) -> None:
        """A certificate that is there: when it ends."""
        with contextlib.suppress(ValueError, BridgeError):
            leaf = load_pem_certificates(objects.decoded(one.certificate))[0]
            self.metrics.saw(one.request.signer, _name_in(one, leaf), leaf.not_valid_after_utc)

    def gone(self, uid: str) -> None:
        """An object was deleted."""
        self.queue.remove(uid)
        self._give_up(uid, "the object is gone")

    def _give_up(self, uid: str, why: str) -> None:
        """A ticket that nobody waits for any more."""
        ticket = self.tickets.get(uid)
        if ticket is None:
            return
        try:
            self.tickets.drop(uid)
        except StateError as e:
            log.error("%s", e, extra={"request": uid})  # noqa: TRY400
        log.info("the request at the CA is given up: %s", why, extra={"request": uid})

    # --- one job ----------------------------------------------------------------------------------------------------

    def work(self, seconds: float) -> bool:
        """Take the next one and work at it; False: there was none."""
        job = self.queue.take(seconds)
        if job is None:
            return False
        try:
            seconds_until = self._worked(job)
        except Exception as e:  # noqa: BLE001 (one request's trouble is not the others')
            [*_, place] = traceback.extract_tb(e.__traceback__)
            text = f"internal error: {type(e).__name__} at {place.filename}:{place.lineno}"
            log.error("%s (a bug: report it)", text, extra=_about(job))  # noqa: TRY400 (a traceback may hold secrets)
            seconds_until = _LONGEST_LOOK_SECONDS
        if seconds_until is None:
            self.queue.done(job)
        else:
            self.queue.delay(job, seconds_until)
        return True

    def _worked(self, job: Job) -> float | None:
        """None: nothing more is to be done; else in how many seconds it is looked at again."""
        signer = job.one.request.signer
        try:
            return self._answered(job)
        except _GoneError as e:
            job.verified = None
            self.metrics.count(signer, "conflict")
            log.info("left to whoever has changed it: %s", e, extra=_about(job, "conflict"))
            self._give_up(job.one.uid, "somebody else has settled the object")
            return None
        except _LeftError as e:
            return self._left(job, e.outcome, e.reason, e.seconds)
        except ApiDownError as e:
            return self._left(job, "left", str(e))
        except AuditError as e:
            return self._left(job, "left", str(e))
        except StateError as e:
            return self._left(job, "left", str(e))

    def _left(self, job: Job, outcome: str, reason: str, seconds: float | None = None) -> float:
        if job.said != reason:
            job.said = reason
            self.metrics.count(job.one.request.signer, outcome)
            level = logging.WARNING if outcome in {"ca-refused", "bad-answer"} else logging.INFO
            log.log(level, "left alone: %s", reason, extra=_about(job, outcome))
        job.attempts += 1
        usual = min(_FIRST_LOOK_SECONDS * 2.0 ** (job.attempts - 1), _LONGEST_LOOK_SECONDS)
        return usual if seconds is None else seconds

    def _answered(self, job: Job) -> float | None:
        if not self.holder.is_ours():
            raise _LeftError("left", "another replica works", 0.5)
        if not self.queue.is_newest(job):
            raise _GoneError("a newer request of the same node has come")
        ticket = self.tickets.get(job.one.uid)
        if not job.begun and ticket is None and (wait := self._rated(job)):
            raise _LeftError("left", "too many requests of this user, or for this node", wait)
        verdict = self._judged(job)
        if isinstance(verdict, Hostile):
            self._deny(job, verdict.reason)
            return None
        if isinstance(verdict, Later):
            raise _LeftError("left", verdict.reason)
        authority = self.authorities[verdict.spec.authority.name]
        if job.verified is None:
            job.verified = self._signed(job, verdict, authority, ticket)
        self._write(job, authority)
        return None

    def _rated(self, job: Job) -> float:
        """Seconds to wait; 0: it was counted, and goes on."""
        node, user, now = job.node, job.one.request.username, time.monotonic()
        with self._mutex:
            wait = self._requesters.wait_seconds(user, now)
            if node is not None:
                wait = max(wait, self._nodes_rate.wait_seconds(f"{job.one.request.signer} {node}", now))
            if wait:
                return max(wait, 0.1)
            self._requesters.take(user, now)
            if node is not None:
                self._nodes_rate.take(f"{job.one.request.signer} {node}", now)
        job.begun = True
        return 0.0

    # --- judging ----------------------------------------------------------------------------------------------------

    def _judged(self, job: Job) -> Verdict:
        """
        By what is true now.

        Raises:
            ApiDownError: The Node object can't be looked at.
        """
        known, one, node = self.known, job.one, job.node
        spec = spec_of(one.request.signer)
        if spec is None or spec.authority.name not in self.authorities:
            return Later("the policy had no table for this signer when the gateway was started; restart it")
        entry = state = None
        if node is not None:
            try:
                entry = known.entry(node)
            except BridgeError as e:
                return Later(str(e))
            if entry is not None:
                entry = known.with_dns(node, entry, addresses_of(one.request))
                # a token's node is not there, as a rule; one that asks for itself may have registered this moment
                state = self._node_state(node, itself=one.request.username == f"{NODE_USER}{node}")
        world = World(
            policy=known.policy,
            cluster=self.settings.node.cluster,
            register=known.register,
            ca_end=self.authorities[spec.authority.name].end(),
            min_validity=self.settings.gateway.min_validity,
            now=self.now(),
            entry=entry,
            state=state,
        )
        verdict = judge(one.request, world)
        rules = known.policy.signers.get(one.request.signer)
        needs_other = rules is not None and rules.approval == "required"
        if isinstance(verdict, Allowed) and needs_other and not one.has(objects.APPROVED):
            return Later("nobody has approved it yet (approval = required)")
        return verdict

    def _node_state(self, name: str, *, itself: bool) -> NodeState:
        now = time.monotonic()
        with self._mutex:
            known = self._nodes.get(name)
            if known is not None and now - known[1] < _NODE_SECONDS and (known[0].exists or not itself):
                return known[0]
        reply = self.api.ask("GET", f"/api/v1/nodes/{quote(name, safe='')}")
        if reply.status == HTTPStatus.OK:
            state = NodeState(exists=True, ready=objects.is_ready(reply.document))
        elif reply.status == HTTPStatus.NOT_FOUND:
            state = NodeState(exists=False)
        else:
            raise ApiDownError(f"wanted to look at node {name}, found HTTP {reply.status} {reply.message}")
        with self._mutex:
            if len(self._nodes) >= _MOST_NODES:
                self._nodes.clear()
            self._nodes[name] = (state, now)
        return state

    # --- no ---------------------------------------------------------------------------------------------------------

    def _deny(self, job: Job, reason: str) -> None:
        """
        Say no, in words that give nothing away; where somebody has approved it already, `Denied` is not possible.

        Raises:
            _GoneError, _LeftError, ApiDownError, AuditError: It was not written.
        """
        about = self._about(job.one)
        self.ledger.write(about.line(audit.REFUSED, error=_NotAllowedError(reason)))
        for _ in self._turns(job):
            one, now = job.one, self.now()
            if one.has(objects.APPROVED):
                reply = self._patch(one, "status", objects.failed(one, objects.NOT_ALLOWED, now))
                outcome = "failed"
            else:
                reply = self._patch(one, "approval", objects.denied(one, now))
                outcome = "denied"
            if reply.status == HTTPStatus.OK:
                self.metrics.count(one.request.signer, outcome)
                log.info("%s: %s", outcome, one_line(reason), extra=_about(job, outcome))
                self._give_up(one.uid, "it was denied")
                return

    # --- the CA -----------------------------------------------------------------------------------------------------

    def _signed(self, job: Job, verdict: Allowed, authority: AuthorityOfSigners, ticket: Ticket | None) -> Verified:
        """
        What the CA has signed, and is what was asked for.

        Raises:
            _LeftError: It has not.
            AuditError, StateError: It can't be recorded.
        """
        about = self._about(job.one, authority)
        digest = hashlib.sha256(verdict.asked.pem).hexdigest()
        if ticket is not None and (ticket.csr_sha256 != digest or ticket.object_name != job.one.name):
            ticket = None
        request = self._sign_request(job.one, verdict, ticket)
        try:
            answers = self._asked(job, request, authority, about, ticket, digest)
        except BackendUnavailableError as e:
            self._record_quietly(about, audit.UNAVAILABLE, e)
            raise _LeftError("ca-unavailable", str(e), authority.rest_seconds() + 0.5) from None
        except BackendRefusedError as e:
            self._record_quietly(about, audit.REFUSED, e)
            self._drop_ticket(job.one.uid)
            hint = f" ({e.hint})" if e.hint else ""
            raise _LeftError("ca-refused", f"{e}{hint}", _AFTER_REFUSAL_SECONDS * 2 ** min(job.attempts, 3)) from None
        longest = self._longest(job.one, verdict)
        try:
            found = authority.verified(answers, request, longest, self.settings.gateway.min_validity, self.now())
        except VerificationError as e:
            self._record_quietly(about, audit.REFUSED, e)
            if ticket is None or len(answers) == 1:
                self._drop_ticket(job.one.uid)
            raise _LeftError(
                "bad-answer", f"{e}; {e.hint}", _AFTER_REFUSAL_SECONDS * 2 ** min(job.attempts, 3)
            ) from None
        if ticket is not None:
            authority.accepted(request, ticket.reference)
        self.ledger.write(about.line(audit.ISSUED, new=found.leaf))
        return found

    def _longest(self, one: SigningRequest, verdict: Allowed) -> timedelta:
        """What the policy gives at most, whatever was asked for: CAs with profiles don't take our wish."""
        policy = self.known.policy
        rules = policy.signers.get(one.request.signer)
        return max((rules.max_validity if rules else None) or policy.allow.max_validity, verdict.validity)

    def _sign_request(self, one: SigningRequest, verdict: Allowed, ticket: Ticket | None) -> SignRequest:
        validity = timedelta(seconds=ticket.validity_seconds) if ticket is not None else verdict.validity
        return SignRequest(
            spec=verdict.spec,
            csr_pem=verdict.asked.pem,
            validity=timedelta(seconds=int(validity.total_seconds())),
            continuity=Continuity(
                batch=_batch(one.uid),
                node=verdict.name,
                cluster=self.settings.node.cluster,
                proof=None,
                asked=one.created.replace(microsecond=0),
            ),
        )

    def _asked(
        self,
        job: Job,
        request: SignRequest,
        authority: AuthorityOfSigners,
        about: About,
        ticket: Ticket | None,
        digest: str,
    ) -> list[Issued]:
        """
        The CA's answer, or answers.

        Raises:
            BackendError: As the contract has it.
            _LeftError: It comes later.
        """
        if (rest := authority.rest_seconds()) > 0:
            raise _LeftError("ca-unavailable", f"{authority.label} was not there a moment ago", rest + 0.1)
        if not self.holder.is_ours():
            raise _LeftError("left", "another replica works", 0.5)
        if ticket is not None:
            self._assert_in_time(job, ticket)
            answer = authority.collect(request, ticket.reference)
            if not isinstance(answer, Pending):
                return list(answer)
        else:
            self.ledger.write(about.line(audit.ASKED))
            signed = authority.sign(request)
            if isinstance(signed, Issued):
                return [signed]
            answer = signed
        self._keep(job, request, answer, ticket, about, digest)
        raise _LeftError("pending", "the CA answers later", self.settings.gateway.collect_every.total_seconds())

    def _keep(
        self, job: Job, request: SignRequest, answer: Pending, ticket: Ticket | None, about: About, digest: str
    ) -> None:
        """The ticket is on disk before anybody hears of it."""
        if ticket is None and len(self.tickets.all()) >= MOST_TICKETS:
            raise _LeftError("left", f"more than {MOST_TICKETS} requests are at the CA")
        if ticket is None or ticket.reference != answer.reference:
            self.tickets.put(
                Ticket(
                    uid=job.one.uid,
                    object_name=job.one.name,
                    signer=job.one.request.signer,
                    csr_sha256=digest,
                    reference=answer.reference,
                    validity_seconds=int(request.validity.total_seconds()),
                    asked=ticket.asked if ticket is not None else self.now().isoformat(),
                )
            )
        if ticket is None:
            self.ledger.write(about.line(audit.PENDING, result=answer.note or "the CA answers later"))
        if not job.one.has(objects.PENDING_AT_CA):
            for _ in self._turns(job):
                reply = self._patch(job.one, "status", objects.waiting(job.one, self.now()))
                if reply.status == HTTPStatus.OK:
                    self._take_over(job, reply)
                    return

    def _assert_in_time(self, job: Job, ticket: Ticket) -> None:
        """
        Nobody waits for ever.

        Raises:
            _GoneError: It waited too long, and that was written.
        """
        if self.now() - ticket.asked_at < self.settings.gateway.pending_for:
            return
        about = self._about(job.one)
        self.ledger.write(about.line(audit.CANCELLED, result="the CA has not answered in time (gateway.pending_for)"))
        for _ in self._turns(job):
            reply = self._patch(job.one, "status", objects.failed(job.one, objects.NOT_ANSWERED, self.now()))
            if reply.status == HTTPStatus.OK:
                break
        self._drop_ticket(job.one.uid)
        raise _GoneError("the CA has not answered in time (gateway.pending_for)")

    # --- yes --------------------------------------------------------------------------------------------------------

    def _write(self, job: Job, authority: AuthorityOfSigners) -> None:
        """
        Approve, unless somebody has, and write the certificate; each onto exactly the object that was judged.

        Raises:
            _GoneError, _LeftError, ApiDownError, AuditError: It was not written.
        """
        for _ in self._turns(job):
            found, one = job.verified, job.one
            if found is None:
                raise AssertionError("written is what was verified")
            self._assert_still(job, found)
            if not one.has(objects.APPROVED):
                reply = self._patch(one, "approval", objects.approved(one, self.now()))
                if reply.status != HTTPStatus.OK:
                    continue
                self._take_over(job, reply)
            if not self.holder.is_ours():
                raise _LeftError("left", "another replica works", 0.5)
            chain = b"".join(map(pem, (found.leaf, *found.intermediates)))
            reply = self._patch(job.one, "status", objects.issued(job.one, chain))
            if reply.status == HTTPStatus.OK:
                self._written(job, found, authority)
                return

    def _assert_still(self, job: Job, found: Verified) -> None:
        """
        The policy allows it at this moment, too, and the certificate is still of use.

        Raises:
            _LeftError, _GoneError: Not so.
        """
        if not self.holder.is_ours():
            raise _LeftError("left", "another replica works", 0.5)
        if not self.queue.is_newest(job):
            raise _GoneError("a newer request of the same node has come")
        verdict = self._judged(job)
        if isinstance(verdict, Hostile):
            self._deny(job, verdict.reason)
            raise _GoneError("it was allowed when it was signed, and is not any more")
        if isinstance(verdict, Later):
            raise _LeftError("left", verdict.reason)
        if found.leaf.not_valid_after_utc - self.now() < timedelta():
            job.verified = None
            raise _LeftError("left", "the certificate has ended before it could be written", 1.0)
        if found.leaf.public_key() != verdict.asked.csr.public_key():
            job.verified = None
            raise _LeftError("left", "the object has another CSR by now", 1.0)

    def _written(self, job: Job, found: Verified, authority: AuthorityOfSigners) -> None:
        signer, name = job.one.request.signer, _name_in(job.one, found.leaf)
        with self._mutex:
            self._ours[job.one.uid] = None
            if len(self._ours) > _MOST_OURS:
                self._ours.popitem(last=False)
        seconds = time.monotonic() - job.arrived
        self.metrics.signed(signer, name, found.leaf.not_valid_after_utc, seconds, self.now())
        text = f"signed {one_line(name)}, until {found.leaf.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC"
        log.info("%s", text, extra=_about(job, "signed"))
        self.ledger.note(self._about(job.one, authority).line(audit.INSTALLED, new=found.leaf))
        self._drop_ticket(job.one.uid)

    # --- objects ----------------------------------------------------------------------------------------------------

    def _turns(self, job: Job) -> Iterator[None]:
        """
        A few tries to write; before each but the first the object is read again.

        Raises:
            _GoneError: It is gone, settled, or another one.
            _LeftError: It changes each time, or we may not.
        """
        for turn in range(_TURNS):
            if turn:
                self._read_again(job)
            yield
        raise _LeftError("conflict", "somebody else changes the object each time", 1.0)

    def _read_again(self, job: Job) -> None:
        reply = self.api.ask("GET", job.one.path)
        if reply.status == HTTPStatus.NOT_FOUND:
            raise _GoneError("the object is gone")
        self._assert_ours(reply, "get the object")
        self._take_over(job, reply)
        if job.one.is_settled:
            raise _GoneError("somebody else has settled it")

    def _take_over(self, job: Job, reply: Reply) -> None:
        """The object as the API server has it now."""
        try:
            found = objects.parse(reply.document, job.one.size)
        except NotAnObjectError as e:
            raise ApiDownError(f"wanted a CertificateSigningRequest, found something else ({e})") from None
        if found.uid != job.one.uid or found.request != job.one.request:
            raise _GoneError("another object has its name by now")
        job.one = found

    def _patch(self, one: SigningRequest, subresource: str, body: dict[str, object]) -> Reply:
        """
        Write; 200, or that it has changed.

        Raises:
            _GoneError: There is no such object any more.
            _LeftError: We may not.
        """
        reply = self.api.ask("PATCH", f"{one.path}/{subresource}", body, MERGE_PATCH)
        if reply.status == HTTPStatus.NOT_FOUND:
            raise _GoneError("the object is gone")
        if reply.status not in {HTTPStatus.OK, HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY}:
            self._assert_ours(reply, f"write its {subresource}")
        return reply

    def _assert_ours(self, reply: Reply, what: str) -> None:
        if reply.status != HTTPStatus.OK:
            reason = f"wanted to {what}, found HTTP {reply.status} {reply.message}"
            log.error("%s (has the gateway the rights that docs/gateway.md names?)", reason)
            raise _LeftError("left", reason, _AFTER_REFUSAL_SECONDS)

    # --- the record -------------------------------------------------------------------------------------------------

    def _about(self, one: SigningRequest, authority: AuthorityOfSigners | None = None) -> About:
        spec = spec_of(one.request.signer)
        if spec is None:
            raise AssertionError("only signers that have a spec are looked at")
        if authority is None:
            return About.of(one, spec)
        return About.of(one, spec, authority.label, self._identities[authority.name])

    def _record_quietly(self, about: About, event: str, error: BackendError | VerificationError) -> None:
        """What has happened already; if it can't be recorded, that is said, and `/readyz` fails."""
        try:
            self.ledger.write(about.line(event, error=error))
        except AuditError as e:
            log.error("%s; the audit log lacks: %s", e, event, extra={"request": about.more["request"]})  # noqa: TRY400

    def _drop_ticket(self, uid: str) -> None:
        try:
            self.tickets.drop(uid)
        except StateError as e:
            log.error("%s", e, extra={"request": uid})  # noqa: TRY400


class _NotAllowedError(BridgeError):
    """For the record: the policy's reason."""

    exit_code = BackendRefusedError.exit_code


def _name_in(one: SigningRequest, leaf: x509.Certificate) -> str:
    """A node's or user's name, or kubeadm's of a certificate."""
    spec = spec_of(one.request.signer)
    if spec is not None and spec.name not in GATEWAY_SPECS:
        return spec.name
    return objects.cn_of(leaf).removeprefix(NODE_USER)


def _batch(uid: str) -> str:
    """32 hex digits, the same for the same object."""
    try:
        return UUID(uid).hex
    except ValueError:
        return hashlib.sha256(uid.encode()).hexdigest()[:32]


def _about(job: Job, outcome: str | None = None) -> dict[str, str | None]:
    """For the log's lines."""
    request = job.one.request
    return {
        "request": job.one.uid,
        "signer": request.signer,
        "requester": one_line(request.username),
        "outcome": outcome,
    }


def specs_of(signers: Iterator[str]) -> list[CertificateSpec]:
    """What the signers of a policy sign."""
    return [spec for signer in signers if (spec := spec_of(signer)) is not None]
