"""Writes into an object: onto exactly the one that was judged, with its uid and resourceVersion."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from threading import Lock
from typing import Any

from cryptography import x509

from bridge.cluster.api import MERGE_PATCH, Reply
from bridge.cluster.errors import NoAnswerError
from bridge.desk.signer_rules import NODE_USER, spec_of
from bridge.gateway import objects
from bridge.gateway.authorities import AuthorityOfSigners
from bridge.gateway.context import Place
from bridge.gateway.objects import NotAnObjectError, SigningRequest
from bridge.gateway.outcomes import AFTER_REFUSAL_SECONDS, GoneError, LeftError, NotAllowedError, extra
from bridge.gateway.queue import Job
from bridge.pki.certificates import pem
from bridge.pki.verify import Verified
from bridge.specs import GATEWAY_SPECS
from bridge.state import audit
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

_TURNS = 5  # each 409 means that somebody else has written
_MOST_OURS = 10_000


class Writing:
    """May be used by several threads."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._mutex = Lock()
        self._ours: OrderedDict[str, None] = OrderedDict()  # uids whose certificates we wrote

    def is_ours(self, uid: str) -> bool:
        """Whether we wrote its certificate, and so know it."""
        return uid in self._ours

    # --- no ---------------------------------------------------------------------------------------------------------

    def deny(self, job: Job, reason: str) -> None:
        """
        Say no, in words that give nothing away; where somebody has approved it already, `Denied` is not possible.

        Raises:
            GoneError, LeftError, NoAnswerError, AuditError: It was not written.
        """
        place = self._place
        place.ledger.write(place.about(job.one).line(audit.REFUSED, error=NotAllowedError(reason)))
        for _ in self._turns(job):
            one, now = job.one, place.now()
            if one.has(objects.APPROVED):
                reply = self._patch(one, "status", objects.failed(one, objects.NOT_ALLOWED, now))
                outcome = "failed"
            else:
                reply = self._patch(one, "approval", objects.denied(one, now))
                outcome = "denied"
            if reply.status == HTTPStatus.OK:
                place.metrics.count(one.request.signer, outcome)
                log.info("%s: %s", outcome, one_line(reason), extra=extra(job, outcome))
                place.give_up(one.uid, "it was denied")
                return

    def failed_unanswered(self, job: Job) -> None:
        """
        The CA has not answered in time.

        Raises:
            GoneError, LeftError, NoAnswerError: It was not written.
        """
        for _ in self._turns(job):
            body = objects.failed(job.one, objects.NOT_ANSWERED, self._place.now())
            if self._patch(job.one, "status", body).status == HTTPStatus.OK:
                return

    # --- later ------------------------------------------------------------------------------------------------------

    def waits(self, job: Job) -> None:
        """
        A CA has it, and answers later; nothing is written where that stands there already.

        Raises:
            GoneError, LeftError, NoAnswerError: It was not written.
        """
        if job.one.has(objects.PENDING_AT_CA):
            return
        for _ in self._turns(job):
            reply = self._patch(job.one, "status", objects.waiting(job.one, self._place.now()))
            if reply.status == HTTPStatus.OK:
                self._take_over(job, reply)
                return

    # --- yes --------------------------------------------------------------------------------------------------------

    def issue(self, job: Job, authority: AuthorityOfSigners, assert_still: Callable[[Job, Verified], None]) -> None:
        """
        Approve, unless somebody has, and write the certificate; each onto exactly the object that was judged.

        Args:
            job: With what was verified.
            authority: Of the CA that has signed.
            assert_still: Raises unless the policy allows it at this moment, too.

        Raises:
            GoneError, LeftError, NoAnswerError, AuditError: It was not written.
        """
        for _ in self._turns(job):
            found, one = job.verified, job.one
            if found is None:
                raise AssertionError("written is what was verified")
            assert_still(job, found)
            if not one.has(objects.APPROVED):
                reply = self._patch(one, "approval", objects.approved(one, self._place.now()))
                if reply.status != HTTPStatus.OK:
                    continue
                self._take_over(job, reply)
            self._place.assert_ours()
            chain = b"".join(map(pem, (found.leaf, *found.intermediates)))
            if self._patch(job.one, "status", objects.issued(job.one, chain)).status == HTTPStatus.OK:
                self._written(job, found, authority)
                return

    def _written(self, job: Job, found: Verified, authority: AuthorityOfSigners) -> None:
        place, signer, name = self._place, job.one.request.signer, name_in(job.one, found.leaf)
        end = found.leaf.not_valid_after_utc
        with self._mutex:
            self._ours[job.one.uid] = None
            if len(self._ours) > _MOST_OURS:
                self._ours.popitem(last=False)
        place.metrics.signed(signer, name, end, time.monotonic() - job.arrived, place.now())
        log.info("signed %s, until %s UTC", one_line(name), end.strftime("%F %T"), extra=extra(job, "signed"))
        place.ledger.note(place.about(job.one, authority).line(audit.INSTALLED, new=found.leaf))
        place.drop_ticket(job.one.uid)

    # --- objects ----------------------------------------------------------------------------------------------------

    def _turns(self, job: Job) -> Iterator[None]:
        """
        A few tries to write; before each but the first the object is read again.

        Raises:
            GoneError: It is gone, settled, or another one.
            LeftError: It changes each time, or we may not.
        """
        for turn in range(_TURNS):
            if turn:
                self._read_again(job)
            yield
        raise LeftError("conflict", "somebody else changes the object each time", 1.0)

    def _read_again(self, job: Job) -> None:
        reply = self._place.api.ask("GET", job.one.path)
        if reply.status == HTTPStatus.NOT_FOUND:
            raise GoneError("the object is gone")
        _assert_well(reply, "get the object")
        self._take_over(job, reply)
        if job.one.is_settled:
            raise GoneError("somebody else has settled it")

    def _take_over(self, job: Job, reply: Reply) -> None:
        """The object as the API server has it now."""
        try:
            found = objects.parse(reply.document, job.one.size)
        except NotAnObjectError as e:
            raise NoAnswerError(f"wanted a CertificateSigningRequest, found something else ({e})") from None
        if found.uid != job.one.uid or found.request != job.one.request:
            raise GoneError("another object has its name by now")
        job.one = found

    def _patch(self, one: SigningRequest, subresource: str, body: Mapping[str, Any]) -> Reply:
        """
        Write; 200, or that it has changed.

        Raises:
            GoneError: There is no such object any more.
            LeftError: We may not.
        """
        reply = self._place.api.ask("PATCH", f"{one.path}/{subresource}", body, MERGE_PATCH)
        if reply.status == HTTPStatus.NOT_FOUND:
            raise GoneError("the object is gone")
        if reply.status not in {HTTPStatus.OK, HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY}:
            _assert_well(reply, f"write its {subresource}")
        return reply


def _assert_well(reply: Reply, what: str) -> None:
    if reply.status != HTTPStatus.OK:
        reason = f"wanted to {what}, found HTTP {reply.status} {reply.message}"
        log.error("%s (has the gateway the rights that docs/gateway.md names?)", reason)
        raise LeftError("left", reason, AFTER_REFUSAL_SECONDS)


def name_in(one: SigningRequest, leaf: x509.Certificate) -> str:
    """A node's or user's name, or kubeadm's of a certificate."""
    spec = spec_of(one.request.signer)
    if spec is not None and spec.name not in GATEWAY_SPECS:
        return spec.name
    return objects.cn_of(leaf).removeprefix(NODE_USER)
