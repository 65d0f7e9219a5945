"""From an allowed request to a proven certificate: asked of the CA, recalled, or collected when it answers later."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from bridge.contract import Continuity, Issued, Pending, SignRequest
from bridge.errors import BackendRefusedError, BackendUnavailableError, VerificationError
from bridge.gateway.authorities import AuthorityOfSigners
from bridge.gateway.context import Place
from bridge.gateway.ledger import About
from bridge.gateway.objects import SigningRequest
from bridge.gateway.outcomes import GoneError, LeftError, after_refusal
from bridge.gateway.pending_at_ca import MOST_TICKETS, Ticket
from bridge.gateway.queue import Job
from bridge.gateway.signer_policy import Allowed
from bridge.gateway.writing import Writing
from bridge.pki.verify import CLOCK_SKEW, Verified
from bridge.state import audit

_RECALLED = "the CA had signed it already, and its answer was lost"


@dataclass(frozen=True, kw_only=True)
class _Asking:
    """One request to a CA."""

    job: Job
    request: SignRequest
    authority: AuthorityOfSigners
    about: About
    longest: timedelta  #: That the policy gives.
    digest: str  #: Of the CSR.
    ticket: Ticket | None  #: The CA has it already.


class Issuing:
    """May be used by several threads."""

    def __init__(self, place: Place, writing: Writing) -> None:
        self._place = place
        self._writing = writing

    def signed(self, job: Job, verdict: Allowed, authority: AuthorityOfSigners, ticket: Ticket | None) -> Verified:
        """
        Have the CA sign, and verify the answer.

        Raises:
            LeftError: It has not.
            GoneError: It has not in time.
            AuditError, StateError: It can't be recorded.
        """
        place = self._place
        digest = hashlib.sha256(verdict.asked.pem).hexdigest()
        if ticket is not None and (ticket.csr_sha256 != digest or ticket.object_name != job.one.name):
            ticket = None
        asking = _Asking(
            job=job,
            request=self._request(job.one, verdict, ticket),
            authority=authority,
            about=place.about(job.one, authority),
            longest=verdict.longest,
            digest=digest,
            ticket=ticket,
        )
        try:
            if (recalled := self._recalled(asking)) is not None:
                return recalled
            answers = self._answers(asking)
        except BackendUnavailableError as e:
            place.record_quietly(asking.about, audit.UNAVAILABLE, e)
            raise LeftError("ca-unavailable", str(e), authority.rest_seconds() + 0.5) from None
        except BackendRefusedError as e:
            place.record_quietly(asking.about, audit.REFUSED, e)
            place.drop_ticket(job.one.uid)
            hint = f" ({e.hint})" if e.hint else ""
            raise LeftError("ca-refused", f"{e}{hint}", after_refusal(job)) from None
        return self._accepted(asking, answers)

    def _accepted(self, asking: _Asking, answers: Sequence[Issued]) -> Verified:
        place, ticket = self._place, asking.ticket
        try:
            found = self._verified(asking, answers)
        except VerificationError as e:
            place.record_quietly(asking.about, audit.REFUSED, e)
            if ticket is None or len(answers) == 1:
                place.drop_ticket(asking.job.one.uid)
            raise LeftError("bad-answer", f"{e}; {e.hint}", after_refusal(asking.job)) from None
        if ticket is not None:
            asking.authority.accepted(asking.request, ticket.reference)
        place.ledger.write(asking.about.line(audit.ISSUED, new=found.leaf))
        return found

    def _verified(self, asking: _Asking, answers: Sequence[Issued]) -> Verified:
        place = self._place
        return asking.authority.verified(
            answers, asking.request, asking.longest, place.settings.gateway.min_validity, place.now()
        )

    def _request(self, one: SigningRequest, verdict: Allowed, ticket: Ticket | None) -> SignRequest:
        validity = timedelta(seconds=ticket.validity_seconds) if ticket is not None else verdict.validity
        return SignRequest(
            spec=verdict.spec,
            csr_pem=verdict.asked.pem,
            validity=timedelta(seconds=int(validity.total_seconds())),
            continuity=Continuity(
                batch=_batch(one.uid),
                node=verdict.name,
                cluster=self._place.settings.node.cluster,
                proof=None,
                asked=one.created.replace(microsecond=0),
            ),
        )

    # --- asking -----------------------------------------------------------------------------------------------------

    def _recalled(self, asking: _Asking) -> Verified | None:
        """
        An answer that the CA has given before, to one who could not take it; None: there is none, and the CA is asked.

        Looked for where there may be something: a gateway that had the lease before us died, or our own question was
        not answered.

        Raises:
            BackendError: As the contract has it.
            AuditError: It can't be recorded.
        """
        job, authority = asking.job, asking.authority
        doubtful = self._place.holder.doubtful_before()
        if not authority.recalls or asking.ticket is not None or job.was_recalled:
            return None
        if not job.was_asked and (doubtful is None or job.one.created > doubtful + CLOCK_SKEW):
            return None
        self._assert_may_ask(authority)
        answer = authority.recall(asking.request, job.one.created - CLOCK_SKEW)
        job.was_recalled = True
        if answer is None:
            return None
        try:
            found = self._verified(asking, [answer])
        except VerificationError:  # such as too short a life by now: another one is asked for
            return None
        self._place.ledger.write(asking.about.line(audit.ISSUED, new=found.leaf, result=_RECALLED))
        return found

    def _answers(self, asking: _Asking) -> Sequence[Issued]:
        """
        The CA's answer, or answers.

        Raises:
            BackendError: As the contract has it.
            LeftError: It comes later.
        """
        place, job, authority, ticket = self._place, asking.job, asking.authority, asking.ticket
        self._assert_may_ask(authority)
        answer: Issued | Pending | Sequence[Issued]
        if ticket is not None:
            self._assert_in_time(job, ticket)
            answer = authority.collect(asking.request, ticket.reference)
        else:
            place.ledger.write(asking.about.line(audit.ASKED))
            job.was_asked, job.was_recalled = True, False
            answer = authority.sign(asking.request)
            job.was_asked = False
        if isinstance(answer, Issued):
            return [answer]
        if not isinstance(answer, Pending):
            return answer
        self._keep(asking, answer)
        self._writing.waits(job)
        raise LeftError("pending", "the CA answers later", place.settings.gateway.collect_every.total_seconds())

    def _assert_may_ask(self, authority: AuthorityOfSigners) -> None:
        if (rest := authority.rest_seconds()) > 0:
            raise LeftError("ca-unavailable", f"{authority.label} was not there a moment ago", rest + 0.1)
        self._place.assert_ours()

    def _keep(self, asking: _Asking, answer: Pending) -> None:
        """The ticket is on disk before anybody hears of it."""
        place, ticket, one = self._place, asking.ticket, asking.job.one
        if ticket is None and len(place.tickets.all()) >= MOST_TICKETS:
            raise LeftError("left", f"more than {MOST_TICKETS} requests are at the CA")
        if ticket is None or ticket.reference != answer.reference:
            place.tickets.put(
                Ticket(
                    uid=one.uid,
                    object_name=one.name,
                    signer=one.request.signer,
                    csr_sha256=asking.digest,
                    reference=answer.reference,
                    validity_seconds=int(asking.request.validity.total_seconds()),
                    asked=ticket.asked if ticket is not None else place.now().isoformat(),
                )
            )
        if ticket is None:
            place.ledger.write(asking.about.line(audit.PENDING, result=answer.note or "the CA answers later"))

    def _assert_in_time(self, job: Job, ticket: Ticket) -> None:
        """
        Nobody waits for ever.

        Raises:
            GoneError: It waited too long, and that was written.
        """
        place, why = self._place, "the CA has not answered in time (gateway.pending_for)"
        if place.now() - ticket.asked_at < place.settings.gateway.pending_for:
            return
        place.ledger.write(place.about(job.one).line(audit.CANCELLED, result=why))
        self._writing.failed_unanswered(job)
        place.drop_ticket(job.one.uid)
        raise GoneError(why)


def _batch(uid: str) -> str:
    """32 hex digits, the same for the same object."""
    try:
        return UUID(uid).hex
    except ValueError:
        return hashlib.sha256(uid.encode()).hexdigest()[:32]
