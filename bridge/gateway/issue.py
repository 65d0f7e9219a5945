"""
The way of an object to its certificate: `Issuing._answer`, from its first line to its last in one thread of the pool.

| the job | the next step | who writes, and what |
| --- | --- | --- |
| has our answer, or a newer request of its node has come | it is left | |
| is new | it waits until the rate limits let it proceed | |
| may proceed | the policy judges it | |
| is refused | it is recorded, then denied | `Ledger`: refused; `Writer.deny` |
| is allowed, and the CA may have signed it for a gateway that died | the CA is searched for it | |
| is allowed | it is recorded, then the CA signs | `Ledger`: asked; `AuthorityOfSigners.sign` |
| waits at the CA | its reference is stored, then the object says so | `PendingRequests`; `Ledger`: pending; `Writer.mark` |
| is signed (`unrecorded`) | the answer is verified and recorded | `Ledger`: issued |
| is recorded (`verified`) | the policy judges it once more, and the answer is written | `Writer.issue` |
| is answered | it is recorded with the next line | `Ledger`: installed |

An exception ends the work on a job: GoneError for good, each other one until later. The job keeps what it has by then.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from bridge.ca import UntrustedAnswerError
from bridge.cluster.api import NoAnswerError
from bridge.contract import Continuity, Issued, Pending, SignRequest
from bridge.errors import BackendRefusedError, BackendUnavailableError, BridgeError, NoVerdictError, VerificationError
from bridge.gateway import watch
from bridge.gateway.authorities import AuthorityOfSigners
from bridge.gateway.context import (
    MOST_PENDING_AT_CA,
    Context,
    GoneError,
    LeftError,
    NotAllowedError,
    PendingAtCa,
    after_refusal,
    extra,
    facts_of,
)
from bridge.gateway.csrs import Judge, Writer, name_in
from bridge.gateway.pods import PodJudge, PodWriter
from bridge.gateway.policy import Allowed, Hostile, Later
from bridge.gateway.queue import Job
from bridge.gateway.watch import AnyObject, PodObject, SigningRequest, chain_of
from bridge.pki.certificates import load_pem_certificates
from bridge.pki.expiry import minute
from bridge.pki.verify import CLOCK_SKEW, Verified
from bridge.state import audit
from bridge.state.audit import AuditError
from bridge.system.files import digest
from bridge.system.state_file import StateError
from bridge.system.waiting import back_off_seconds, remember
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

#: The pause before a job that was left is taken up again; it doubles each time, and any change ends it.
_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 1.0, 300.0
#: The pause for a job when too many already wait for their turn.
_CROWDED_SECONDS = 60.0
_MOST_ANSWERED = 10_000
_RECALLED = "the CA had signed it already, and its answer was lost"


@dataclass(frozen=True, kw_only=True)
class _Asking:
    job: Job
    request: SignRequest
    authority: AuthorityOfSigners
    longest: timedelta  #: The policy's limit.
    at_ca: PendingAtCa | None  #: The request that the CA already has.


class Issuing:
    """Works on the queue's jobs; several threads use it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._judges: Mapping[type, Judge | PodJudge] = {SigningRequest: Judge(context), PodObject: PodJudge(context)}
        self._writers: Mapping[type, Writer] = {SigningRequest: Writer(context), PodObject: PodWriter(context)}
        self._mutex = threading.Lock()
        #: Uids of objects with our certificate or refusal; the watch may still deliver older versions of them.
        self._answered: OrderedDict[str, None] = OrderedDict()

    # --- events of the watch ----------------------------------------------------------------------------------------

    def changed(self, request: AnyObject) -> None:
        """Take in an object that is new or has changed."""
        context = self._context
        if request.uid in self._answered:
            return  # the event is our own write, or older
        if request.is_finished:
            if context.queue.remove(request.uid):
                return  # usually our own write, which is counted where it is made
            context.give_up(request.uid, "the object was deleted, or another client has answered it")
            if request.certificate:
                with contextlib.suppress(ValueError, BridgeError):
                    leaf = load_pem_certificates(chain_of(request))[0]
                    context.metrics.saw(request.request.signer, name_in(request, leaf), leaf.not_valid_after_utc)
            return
        for uid in context.queue.put(request, self._judges[type(request)].look):
            context.give_up(uid, "a newer request of the same node has come")

    def deleted(self, uid: str) -> None:
        """Drop an object that was deleted."""
        self._context.queue.remove(uid)
        self._context.give_up(uid, "the object was deleted")

    # --- one job ----------------------------------------------------------------------------------------------------

    def work(self, seconds: float) -> bool:
        """Take the next job and work on it; False: none came in this time."""
        queue = self._context.queue
        job = queue.take(seconds)
        if job is None:
            return False
        try:
            seconds_until = self._attempt(job)
        except Exception as e:  # noqa: BLE001 (a bug in one job must not stop the others)
            [*_, where] = traceback.extract_tb(e.__traceback__)
            text = f"internal error: {type(e).__name__} at {where.filename}:{where.lineno}"
            log.error("%s (a bug: report it)", text, extra=extra(job))  # noqa: TRY400 (a traceback may hold secrets)
            seconds_until = _LONGEST_LOOK_SECONDS
        if seconds_until is None:
            queue.done(job)
        else:
            queue.delay(job, seconds_until)
        return True

    def _attempt(self, job: Job) -> float | None:
        """Work on a job; return the seconds until it is taken up again, or None: it is done."""
        try:
            self._answer(job)
        except GoneError as e:
            job.verified = None
            self._context.metrics.count(job.one.request.signer, "conflict")
            log.info("left to the client that changed it: %s", e, extra=extra(job, "conflict"))
            self._context.give_up(job.one.uid, "another client has answered, deleted or replaced the object")
        except LeftError as e:
            return self._left(job, e, str(e))
        except (NoAnswerError, AuditError, StateError) as e:
            return self._left(job, LeftError("left", str(e)), "the gateway itself has a problem; its log says which")
        return None

    def _left(self, job: Job, error: LeftError, for_owner: str) -> float:
        reason = str(error)
        if job.said != reason:
            job.said = reason
            self._context.metrics.count(job.one.request.signer, error.outcome)
            level = logging.WARNING if error.outcome in {"ca-refused", "bad-answer"} else logging.INFO
            log.log(level, "left alone: %s", reason, extra=extra(job, error.outcome))
        if job.attempts:  # not for troubles that pass within a second
            self._writers[type(job.one)].tell(job, error.outcome, for_owner)
        job.attempts += 1
        usual = back_off_seconds(job.attempts - 1, _FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS)
        return usual if error.seconds is None else error.seconds

    def _answer(self, job: Job) -> None:
        context, writer = self._context, self._writers[type(job.one)]
        if job.one.uid in self._answered:
            return  # this version is older than our own write, and no CA should sign twice
        self._assert_current(job)
        at_ca = context.pending_at_ca.get(job.one.uid)
        if not job.begun and at_ca is None:
            self._assert_turn(job)
        verdict = self._allowed(job)
        if verdict is None:
            return
        is_new = job.verified is None
        if job.verified is None:
            job.verified = self._signed(job, verdict, at_ca)
        verified = job.verified
        for _ in writer.turns(job):
            self._assert_current(job)
            verdict = self._allowed(job)
            if verdict is None:
                raise GoneError("it was allowed when it was signed, and no longer is")
            self._assert_of_use(job, verdict, verified, is_new=is_new)
            if writer.issue(job, verdict, verified):
                self._remember(job)
                self._written(job, verdict.name, verified)
                return

    # --- its steps --------------------------------------------------------------------------------------------------

    def _allowed(self, job: Job) -> Allowed | None:
        """Judge the job now; None: we denied the request."""
        verdict = self._judges[type(job.one)].verdict(job)
        job.judged = time.monotonic()
        if isinstance(verdict, Later):
            raise LeftError("left", verdict.reason)
        if isinstance(verdict, Hostile):
            self._deny(job, verdict)
            return None
        return verdict

    def _deny(self, job: Job, hostile: Hostile) -> None:
        context, writer = self._context, self._writers[type(job.one)]
        context.ledger.write(facts_of(job.one), audit.REFUSED, error=NotAllowedError(hostile.reason))
        for _ in writer.turns(job):
            self._assert_current(job)
            if outcome := writer.deny(job, hostile).lower():
                self._remember(job)
                context.metrics.count(job.one.request.signer, outcome)
                log.info("%s: %s", outcome, one_line(hostile.reason), extra=extra(job, outcome))
                context.give_up(job.one.uid, "it was denied")
                return

    def _assert_turn(self, job: Job) -> None:
        wait = self._judges[type(job.one)].turn(job)
        job.begun = wait is not None
        if wait != 0:
            wait = wait if wait is not None else _CROWDED_SECONDS
            raise LeftError("left", "too many requests of this user, or for this node", wait)

    def _assert_current(self, job: Job) -> None:
        self._context.assert_ours()
        if not self._context.queue.is_newest(job):
            raise GoneError("a newer request of the same node has come")

    def _assert_of_use(self, job: Job, verdict: Allowed, verified: Verified, *, is_new: bool) -> None:
        refused, trouble = self._writers[type(job.one)].trouble(verdict, verified), ""
        if verified.leaf.not_valid_after_utc - self._context.now() < timedelta():
            trouble = "the certificate has ended before it could be written"
        elif job.signed_for != _content(verdict):
            trouble = "the policy gives another certificate than when it was signed"
        elif refused and not is_new:
            trouble = f"the certificate has waited for too long: {refused}"
        if trouble:
            job.verified = None
            raise LeftError("left", trouble, 1.0)
        if refused:
            job.verified = None
            raise LeftError("bad-answer", refused, after_refusal(job))

    def _remember(self, job: Job) -> None:
        with self._mutex:
            remember(self._answered, job.one.uid, None, _MOST_ANSWERED)

    def _written(self, job: Job, name: str, verified: Verified) -> None:
        context, end = self._context, verified.leaf.not_valid_after_utc
        context.metrics.signed(job.one.request.signer, name, end, time.monotonic() - job.arrived, context.now())
        log.info("signed %s, until %s", one_line(name), minute(end), extra=extra(job, "signed"))
        context.ledger.note(job.facts, audit.INSTALLED, new=verified.leaf)
        context.drop_pending(job.one.uid)

    # --- asking the CA ----------------------------------------------------------------------------------------------

    def _signed(self, job: Job, verdict: Allowed, at_ca: PendingAtCa | None) -> Verified:
        """Have the CA sign the job, unless it has, and record the certificate before anything is done with it."""
        result = ""
        if job.unrecorded is None:  # else the audit log could not be written, and the CA is not asked again
            job.signed_for = _content(verdict)
            job.unrecorded, result = self._verified(job, verdict, at_ca)
        self._context.ledger.write(
            job.facts, audit.ISSUED, new=job.unrecorded.leaf, **({"result": result} if result else {})
        )
        verified, job.unrecorded = job.unrecorded, None
        return verified

    def _verified(self, job: Job, verdict: Allowed, at_ca: PendingAtCa | None) -> tuple[Verified, str]:
        """Return the CA's certificate after all checks, and what the audit log says of it."""
        context, authority = self._context, self._context.authorities[verdict.spec.authority.name]
        if at_ca is not None and (at_ca.csr_sha256 != digest(verdict.csr.pem) or at_ca.object_name != job.one.name):
            at_ca = None
        job.facts, request = facts_of(job.one, authority), self._request(job.one, verdict, at_ca)
        asking = _Asking(job=job, request=request, authority=authority, longest=verdict.longest, at_ca=at_ca)
        try:
            if (recalled := self._recalled(asking)) is not None:
                return recalled, _RECALLED
            return authority.verified(self._from_ca(asking), request, verdict.longest, context.now()), ""
        except BackendUnavailableError as e:
            context.record_quietly(job.facts, audit.UNAVAILABLE, e)
            rest = authority.rest.seconds_left()  # 0: it has answered other requests meanwhile
            raise LeftError("ca-unavailable", str(e), rest + 0.5 if rest else None) from None
        except (BackendRefusedError, VerificationError) as e:
            context.record_quietly(job.facts, audit.REFUSED, e)
            if not isinstance(e, NoVerdictError):  # which says that the CA was not asked, or may still answer
                context.drop_pending(job.one.uid)
            if isinstance(e, UntrustedAnswerError | VerificationError):
                raise LeftError("bad-answer", f"{e}; {e.hint}", after_refusal(job)) from None
            hint = f" ({e.hint})" if e.hint else ""
            raise LeftError("ca-refused", f"{e}{hint}", after_refusal(job)) from None

    def _request(self, request: AnyObject, verdict: Allowed, at_ca: PendingAtCa | None) -> SignRequest:
        validity = timedelta(seconds=at_ca.validity_seconds) if at_ca is not None else verdict.validity
        return SignRequest(
            spec=verdict.spec,
            csr_pem=verdict.csr.pem,
            names=verdict.names,
            validity=timedelta(seconds=int(validity.total_seconds())),
            continuity=Continuity(
                batch=_batch(request.uid),
                node=verdict.name,
                cluster=self._context.settings.node.cluster,
                proof=None,
                asked=request.created.replace(microsecond=0),
            ),
        )

    def _recalled(self, asking: _Asking) -> Verified | None:
        """Find a certificate that the CA signed for a gateway that died, or whose answer was lost; None: ask the CA."""
        context, job, authority = self._context, asking.job, asking.authority
        doubtful = context.holder.doubtful_before
        if not authority.recalls or asking.at_ca is not None or job.was_recalled:
            return None
        if not job.was_asked and (doubtful is None or job.one.created > doubtful + CLOCK_SKEW):
            return None
        self._assert_may_ask(authority)
        answer = authority.recall(asking.request, job.one.created - CLOCK_SKEW)
        job.was_recalled = True
        if answer is None:
            return None
        try:
            return authority.verified(answer, asking.request, asking.longest, context.now())
        except VerificationError:  # for example, too little of its life is left: ask the CA for another
            return None

    def _from_ca(self, asking: _Asking) -> Issued:
        context, job, authority, at_ca = self._context, asking.job, asking.authority, asking.at_ca
        self._assert_may_ask(authority)
        if at_ca is not None:
            self._assert_in_time(job, at_ca)
            answer = authority.collect(asking.request, at_ca.reference, asking.longest, context.now())
        else:
            context.ledger.write(job.facts, audit.ASKED)
            context.assert_ours()  # the line may have taken a while
            job.was_asked, job.was_recalled = True, False
            answer = authority.sign(asking.request)
            job.was_asked = False
        if isinstance(answer, Issued):
            return answer
        self._keep(asking, answer)
        self._writers[type(job.one)].mark(job, watch.PENDING_AT_CA, watch.WAITS)
        raise LeftError("pending", "the CA answers later", context.settings.gateway.collect_every.total_seconds())

    def _assert_may_ask(self, authority: AuthorityOfSigners) -> None:
        if (rest := authority.rest.turn()) > 0:
            raise LeftError("ca-unavailable", f"{authority.ca.label} did not answer a moment ago", rest + 0.1)
        self._context.assert_ours()

    def _keep(self, asking: _Asking, answer: Pending) -> None:
        """Store the CA's reference before the object says that it waits."""
        context, at_ca, request = self._context, asking.at_ca, asking.job.one
        if at_ca is None and len(context.pending_at_ca) >= MOST_PENDING_AT_CA:
            raise LeftError("left", f"more than {MOST_PENDING_AT_CA} requests are at the CA")
        if at_ca is None or at_ca.reference != answer.reference:
            context.pending_at_ca.put(
                PendingAtCa(
                    uid=request.uid,
                    object_name=request.name,
                    signer=request.request.signer,
                    csr_sha256=digest(asking.request.csr_pem),
                    reference=answer.reference,
                    validity_seconds=int(asking.request.validity.total_seconds()),
                    asked=at_ca.asked if at_ca is not None else context.now(),
                )
            )
            context.pending_at_ca.save()
        if at_ca is None:
            context.ledger.write(asking.job.facts, audit.PENDING, result=answer.note or "the CA answers later")

    def _assert_in_time(self, job: Job, at_ca: PendingAtCa) -> None:
        """Give up the request if the CA has not answered within `gateway.pending_for`."""
        context, why = self._context, "the CA has not answered in time (gateway.pending_for)"
        if context.now() - at_ca.asked < context.settings.gateway.pending_for:
            return
        context.ledger.write(facts_of(job.one), audit.CANCELLED, result=why)
        if self._writers[type(job.one)].mark(job, watch.FAILED, watch.NOT_ANSWERED):
            self._remember(job)
        context.drop_pending(job.one.uid)
        raise GoneError(why)


def _content(verdict: Allowed) -> tuple[object, ...]:
    """Return what a verdict puts into a certificate, except its dates."""
    return verdict.csr.pem, verdict.spec, verdict.longest, verdict.names


def _batch(uid: str) -> str:
    """Return 32 hex digits, always the same for one object."""
    try:
        return UUID(uid).hex
    except ValueError:
        return digest(uid.encode())[:32]
