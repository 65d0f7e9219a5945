"""
From an object to its certificate: judged, signed, proven, recorded, written.

Each step begins with what is true at that moment: the object at one resourceVersion, the policy, the register, the Node
object, the lease. Whatever has changed when the certificate is to be written makes the API server refuse the write
(uid and resourceVersion stand in it), and the object is looked at anew. An approval that is there counts for nothing.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator
from datetime import timedelta

from bridge.cluster.errors import NoAnswerError
from bridge.desk.signer_rules import spec_of
from bridge.errors import BridgeError
from bridge.gateway import objects
from bridge.gateway.context import Place
from bridge.gateway.issuing import Issuing
from bridge.gateway.judging import Judging
from bridge.gateway.objects import SigningRequest
from bridge.gateway.outcomes import GoneError, LeftError, extra
from bridge.gateway.queue import Job
from bridge.gateway.signer_policy import Hostile, Later, node_of
from bridge.gateway.writing import Writing, name_in
from bridge.pki.certificates import load_pem_certificates
from bridge.pki.verify import Verified
from bridge.specs import CertificateSpec
from bridge.state.audit import AuditError
from bridge.system.state_file import StateError

log = logging.getLogger("ca-bridge")

#: What is left alone is looked at again after this, doubled each time; sooner if something changes.
_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 1.0, 300.0


class Gateway:
    """The work on the queue's jobs, done by several threads."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._judging = Judging(place)
        self._writing = Writing(place)
        self._issuing = Issuing(place, self._writing)

    # --- what the watch tells ---------------------------------------------------------------------------------------

    def changed(self, one: SigningRequest) -> None:
        """An object that is there, or has changed."""
        if one.is_settled:
            self._place.queue.remove(one.uid)
            if one.certificate and not self._writing.is_ours(one.uid):
                self._saw(one)
            return
        for uid in self._place.queue.put(one, lambda new: node_of(new.request), self._judging.counts):
            self._place.give_up(uid, "a newer request of the same node has come")

    def _saw(self, one: SigningRequest) -> None:
        """A certificate that is there: when it ends."""
        with contextlib.suppress(ValueError, BridgeError):
            leaf = load_pem_certificates(objects.decoded(one.certificate))[0]
            self._place.metrics.saw(one.request.signer, name_in(one, leaf), leaf.not_valid_after_utc)

    def gone(self, uid: str) -> None:
        """An object was deleted."""
        self._place.queue.remove(uid)
        self._place.give_up(uid, "the object is gone")

    # --- one job ----------------------------------------------------------------------------------------------------

    def work(self, seconds: float) -> bool:
        """Take the next one and work at it; False: there was none."""
        queue = self._place.queue
        job = queue.take(seconds)
        if job is None:
            return False
        try:
            seconds_until = self._worked(job)
        except Exception as e:  # noqa: BLE001 (one request's trouble is not the others')
            [*_, where] = traceback.extract_tb(e.__traceback__)
            text = f"internal error: {type(e).__name__} at {where.filename}:{where.lineno}"
            log.error("%s (a bug: report it)", text, extra=extra(job))  # noqa: TRY400 (a traceback may hold secrets)
            seconds_until = _LONGEST_LOOK_SECONDS
        if seconds_until is None:
            queue.done(job)
        else:
            queue.delay(job, seconds_until)
        return True

    def _worked(self, job: Job) -> float | None:
        """None: nothing more is to be done; else in how many seconds it is looked at again."""
        try:
            self._answer(job)
        except GoneError as e:
            job.verified = None
            self._place.metrics.count(job.one.request.signer, "conflict")
            log.info("left to whoever has changed it: %s", e, extra=extra(job, "conflict"))
            self._place.give_up(job.one.uid, "somebody else has settled the object")
        except LeftError as e:
            return self._left(job, e.outcome, e.reason, e.seconds)
        except (NoAnswerError, AuditError, StateError) as e:
            return self._left(job, "left", str(e))
        return None

    def _left(self, job: Job, outcome: str, reason: str, seconds: float | None = None) -> float:
        if job.said != reason:
            job.said = reason
            self._place.metrics.count(job.one.request.signer, outcome)
            level = logging.WARNING if outcome in {"ca-refused", "bad-answer"} else logging.INFO
            log.log(level, "left alone: %s", reason, extra=extra(job, outcome))
        job.attempts += 1
        usual = min(_FIRST_LOOK_SECONDS * 2.0 ** (job.attempts - 1), _LONGEST_LOOK_SECONDS)
        return usual if seconds is None else seconds

    # --- the steps --------------------------------------------------------------------------------------------------

    def _answer(self, job: Job) -> None:
        """
        Judge, have it signed and proven, write.

        Raises:
            GoneError, LeftError, NoAnswerError, AuditError, StateError: It was not answered.
        """
        place = self._place
        place.assert_ours()
        self._assert_newest(job)
        ticket = place.tickets.get(job.one.uid)
        if not job.begun and ticket is None and (wait := self._judging.seconds_to_wait(job)):
            raise LeftError("left", "too many requests of this user, or for this node", wait)
        verdict = self._judging.verdict(job)
        if isinstance(verdict, Hostile):
            self._writing.deny(job, verdict.reason)
            return
        if isinstance(verdict, Later):
            raise LeftError("left", verdict.reason)
        authority = place.authorities[verdict.spec.authority.name]
        if job.verified is None:
            job.verified = self._issuing.signed(job, verdict, authority, ticket)
        self._writing.issue(job, authority, self._assert_still)

    def _assert_newest(self, job: Job) -> None:
        if not self._place.queue.is_newest(job):
            raise GoneError("a newer request of the same node has come")

    def _assert_still(self, job: Job, found: Verified) -> None:
        """
        The policy allows it at this moment, too, and the certificate is still of use.

        Raises:
            LeftError, GoneError: Not so.
        """
        self._place.assert_ours()
        self._assert_newest(job)
        verdict = self._judging.verdict(job)
        if isinstance(verdict, Hostile):
            self._writing.deny(job, verdict.reason)
            raise GoneError("it was allowed when it was signed, and is not any more")
        if isinstance(verdict, Later):
            raise LeftError("left", verdict.reason)
        if found.leaf.not_valid_after_utc - self._place.now() < timedelta():
            job.verified = None
            raise LeftError("left", "the certificate has ended before it could be written", 1.0)
        if found.leaf.public_key() != verdict.asked.csr.public_key():
            job.verified = None
            raise LeftError("left", "the object has another CSR by now", 1.0)


def specs_of(signers: Iterator[str]) -> list[CertificateSpec]:
    """The specs of what a policy's signers sign."""
    return [spec for signer in signers if (spec := spec_of(signer)) is not None]
