"""
The CA desk: request bundles in, answer bundles out, by a policy. Each CA gets a window of bundles in one lot; its
answers are written to the journal first.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property, partial
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from bridge.ca import CA, PARALLEL_REQUESTS, Answer, registry
from bridge.contract import Issued, Pending, SignRequest
from bridge.desk import approval
from bridge.desk.approval import Standing, UndecidedError
from bridge.desk.node_identity import Identity, Owner, identify
from bridge.desk.policy import Policy, PolicyVerdict, judge
from bridge.desk.records import Answered, Journal, NewFile, Submitted, write_together
from bridge.desk.workers import Judgement, Workers, reason_against, reasons
from bridge.errors import (
    BackendError,
    BackendUnavailableError,
    BridgeError,
    Exit,
    NoVerdictError,
    WaitingError,
)
from bridge.pki import signatures
from bridge.pki.bundle import LONGEST_TEXT, AnswerBundle, BundledRequest, Refusal, RequestBundle, refusal, sign_request
from bridge.pki.bundle_format import answer_message, describe
from bridge.pki.certificates import is_signed_by, serial_hex
from bridge.pki.expiry import minute
from bridge.pki.verify import Expectation
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, SIGNING_AUTHORITIES, SPECS, USER
from bridge.state import audit
from bridge.system.console import log
from bridge.system.paths import UnreadableError, read_ca_file
from bridge.system.state_file import StateError
from bridge.system.waiting import workers
from bridge.words import one_line

#: Requests that are signed together: with more, `openssl ca` starts and rewrites its long index less often, but nodes
#: wait longer for the first answers.
_WINDOW = 1000
#: The size of a window's files, which are in memory, where a byte of a stranger's SANs may take 35.
_LARGEST_WINDOW_BYTES = 2 << 20
#: A run notices within this time that a certificate was revoked after the run began.
_LISTED_SECONDS = 1.0
#: Requests to a backend that signs one by one; they are in the journal before the CA gets them.
_SLICE = 100
#: Answers that a worker compares at once.
_COMPARED = 50

#: Events of the audit log: a certificate that this run signed, and one of an earlier run that goes out again.
SIGNED, DELIVERED = "signed for others", "delivered again"

DeskAnswer = Issued | Refusal
_Item = TypeVar("_Item")


class RefusedByPolicyError(BridgeError):
    """The policy does not allow a request, or no operator approved it."""

    exit_code = Exit.REFUSED
    hint = "the answer says so to the node; the policy file says what is allowed"


class OtherDeskError(BridgeError):
    """A request for a CA that is not this desk's."""

    exit_code = Exit.REFUSED
    hint = "carry the request to the other desk as well, or add an [authority.NAME] table to the settings"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """The files of one answer, and a function to call after they are written."""

    where: str  #: For messages.
    files: Sequence[NewFile]  #: Written together with other bundles' files.
    conclude: Callable[[], None]  #: Called when the files are safe on disk.


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """How TLS or a one-time secret proved the requester's identity, for a bundle of one request without a continuity proof."""

    problem: str = ""  #: Why today's policy does not let this requester ask; empty: it does.
    held: bool = False  #: The requester has the key of the certificate that is replaced.
    certificate: x509.Certificate | None = None  #: The requester's, if the CA of the request signed it.
    names_node: bool = False  #: TLS, the secret or the operator of a CSR directory gave the bundle its node's name.


@dataclass(kw_only=True, eq=False)
class Job:
    """One request bundle on its way through the desk."""

    bundle: RequestBundle
    digest: str  #: The bundle's digest.
    label: str  #: For messages, such as the bundle's file name.
    delivery: Callable[[AnswerBundle, Identity], Delivery]
    size_bytes: int = 0  #: The file's size.
    foreseen: Mapping[str, PolicyVerdict] = field(default_factory=dict)  #: A worker's verdicts, from moments ago.
    earlier: Mapping[str, Issued] = field(default_factory=dict)  #: Certificates of an existing answer.
    #: Certificates that were signed before, and are given out again.
    answered: Mapping[str, Answered] = field(default_factory=dict)
    reissued: set[str] = field(default_factory=set)  #: Names whose answer comes from an earlier run or an earlier job.
    #: By certificate name, the earlier job of this run that signs the same CSR.
    duplicates: dict[str, Job] = field(default_factory=dict)
    #: Names whose certificate is in the audit log, but was not delivered.
    recorded: set[str] = field(default_factory=set)
    verdicts: dict[str, PolicyVerdict] = field(default_factory=dict)
    answers: dict[str, DeskAnswer] = field(default_factory=dict)
    #: Certificates that a CA signed wrongly, for the audit log.
    withheld: dict[str, x509.Certificate] = field(default_factory=dict)
    troubles: dict[str, BridgeError] = field(default_factory=dict)  #: Why there is no answer yet.
    #: Troubles that an earlier run recorded; they are not recorded again while a CA is away.
    earlier_note: str = ""
    approved_by: str = ""
    #: Requests that need no continuity proof, by certificate name, with a text for the audit log.
    vouched_for: Mapping[str, str] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    owners: Mapping[str, Collection[Owner]] = field(default_factory=dict)  #: Of its keys, by `key_digest`.
    identity: Identity = field(default_factory=Identity)
    standing: Standing = field(default_factory=Standing)  #: People's verified decisions from elsewhere.

    @cached_property
    def requests(self) -> dict[str, SignRequest]:
        """The requests for backends, by certificate name."""
        return {request.name: sign_request(request, self.bundle) for request in self.bundle.requests}

    @property
    def to_sign(self) -> list[BundledRequest]:
        """The requests that have no answer, no trouble and no earlier job that signs the same CSR."""
        decided = self.answers.keys() | self.troubles.keys() | self.duplicates.keys()
        return [request for request in self.bundle.requests if request.name not in decided]

    def take_from_duplicates(self) -> None:
        """Take the earlier job's answers, which are signed by now."""
        for name, earlier_job in self.duplicates.items():
            if (answer := earlier_job.answers.get(name)) is not None:
                self.answers[name] = answer
                self.reissued.add(name)
            else:
                self.troubles[name] = earlier_job.troubles[name]

    @property
    def trouble_text(self) -> str:
        """All troubles in one line."""
        return "; ".join(dict.fromkeys(one_line(error.reason) for error in self.troubles.values()))

    def was_recorded(self, name: str) -> bool:
        """Whether the audit log already has this certificate of a waiting bundle, this refusal or this trouble."""
        if isinstance(self.answers.get(name), Issued):
            return not self.is_complete if name in self.reissued else name in self.recorded
        return not self.is_complete and self.trouble_text == self.earlier_note

    @property
    def is_complete(self) -> bool:
        """Whether every request for a CA of this desk is answered."""
        return bool(self.answers) and all(isinstance(error, OtherDeskError) for error in self.troubles.values())


#: Shows a result: a job, and the answer's place; without a place, it is not answered yet.
Observer = Callable[[Job, str], object]
#: Asks a person whether to sign a bundle (None: later), and returns the person's name or reason, too.
Approver = Callable[[Job, str], tuple[bool | None, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Authority:
    ca: CA
    anchors: tuple[x509.Certificate, ...]  #: The cluster's CA certificates.
    certificates: tuple[x509.Certificate, ...]  #: CA certificates that may have issued a replaced certificate.
    tells: bool  #: See `CA.tells`.


class Desk:
    """One run of a desk: judges bundles, has them signed, and answers."""

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        now: Callable[[], datetime],
        *,
        without_proof: frozenset[str] = frozenset(),
        approve: Approver | None = None,
        answer_key: PrivateKeyTypes | None = None,
        waits: bool = True,
    ) -> None:
        """`approve` asks an operator; `answer_key` signs the answers; without `waits` the desk waits for no CA."""
        self._settings = settings
        self._policy = policy
        self._now = now
        self._without_proof = without_proof
        self._approve = approve
        self._answer_key = answer_key
        self._configured = registry.configured(settings, settings.authorities)
        if not waits:
            self._configured = {name: at_once(ca) for name, ca in self._configured.items()}
        self._cas: dict[str, _Authority] = {}
        #: Jobs in progress at CAs, by certificate name, CSR and a user's lifetime, until their answers are in the archive.
        self._asking: dict[tuple[str, bytes, timedelta | None], Job] = {}
        #: Revoked serial numbers by authority, and when they were read.
        self._lists: dict[str, tuple[Collection[int] | None, float]] = {}
        self._lookups = ThreadPoolExecutor(PARALLEL_REQUESTS)

    # --- before anything is signed ------------------------------------------------------------------------------------

    def judged(self, job: Job) -> Job:
        """Refuse requests that the policy forbids; a request whose CA is unavailable gets a trouble."""
        for request in job.bundle.requests:
            trouble = self._trouble(request)
            if trouble is not None:
                job.troubles[request.name] = trouble
            else:
                job.verdicts[request.name] = self._verdict(job, request)
        job.identity = identify(job.bundle, job.verdicts, job.owners, self._policy, is_named=job.origin.names_node)
        vouched_for = self._without_proof | job.vouched_for.keys()
        problems = {
            name: [*filter(None, [job.origin.problem]), *verdict.problems,
                   *job.identity.problems(verdict, is_vouched=name in vouched_for)]
            for name, verdict in job.verdicts.items()
        }  # fmt: skip
        self._find_revoked(job, problems)
        for request in [request for request in job.bundle.requests if request.name not in job.troubles]:
            if problems[request.name]:
                job.answers[request.name] = refusal("; ".join(problems[request.name]))
            elif request.name in job.answered:
                self._answer_again(job, request, job.answered[request.name])
        if self._approve is not None and job.to_sign:
            self._ask_person(self._approve, job)
        self._assert_approved(job)
        return job

    def _assert_approved(self, job: Job) -> None:
        """If one request needs approval, the whole bundle waits for it; a bundle that people refused is refused."""
        needed = [request.name for request in job.to_sign if self._policy.needs_approval(request.name)]
        refused = job.standing.refused
        if refused is not None:
            text = refusal(f"not approved: {refused.reason} ({refused.approver})")
            job.answers |= {request.name: text for request in job.to_sign}
        elif lacking := needed and approval.lacking(needed, self._policy.approvals, job.standing, job.approved_by):
            error = UndecidedError(str(lacking))
            job.troubles |= {request.name: error for request in job.to_sign}
        else:
            job.approved_by = approval.summary(job.standing, job.approved_by)

    def judgement(self) -> Judgement:
        """Reach all CAs, and return the rules for workers."""
        self.open_all()
        cas = {name: ca.certificates for name, ca in self._cas.items() if ca.ca.trouble is None}
        return Judgement(policy=self._policy, cas=cas, now=self._now(), without_proof=self._without_proof)

    def _verdict(self, job: Job, request: BundledRequest) -> PolicyVerdict:
        if (foreseen := job.foreseen.get(request.name)) is not None:
            return foreseen
        certificates = self._cas[request.authority].certificates
        try:
            waived = self._without_proof | job.vouched_for.keys()
            return judge(request, job.bundle, self._policy, certificates, self._now(), waived, held=job.origin.held)
        except Exception as e:  # noqa: BLE001 (one request's error must not stop the others)
            text = f"wanted a request that can be judged, found {type(e).__name__}: {e}"
            return PolicyVerdict(problems=(text,), proven=False)

    def _find_revoked(self, job: Job, problems: Mapping[str, list[str]]) -> None:
        """Add a problem to each request whose proof is by a revoked certificate; all CAs are queried at once."""
        proofs = {request.name: _proof_of(job, request) for request in job.to_sign if not problems[request.name]}
        proven = {name: old for name, old in proofs.items() if old is not None}

        requests = [request for request in job.to_sign if request.name in proven]
        lists = {authority: self._listed(authority) for authority in {request.authority for request in requests}}

        def look(request: BundledRequest) -> None:
            old, authority = proven[request.name], self._cas[request.authority]
            try:
                if _is_revoked(old, lists[request.authority], authority):
                    found = f"found the revoked one with serial {serial_hex(old)}"
                    problems[request.name].append(f"proof: wanted one by a certificate that is not revoked, {found}")
            except BackendError as e:
                job.troubles[request.name] = e

        list(self._lookups.map(look, requests))

    def _listed(self, authority: str) -> Collection[int] | None:
        """The CA's list of revoked certificates, at most a second old; None: it is asked about each certificate."""
        listed, read = self._lists.get(authority, (None, -_LISTED_SECONDS))
        if time.monotonic() - read > _LISTED_SECONDS:
            read, listed = time.monotonic(), None
            with contextlib.suppress(BackendError):  # checking each certificate reports the error
                listed = self._cas[authority].ca.revoked()
            self._lists[authority] = listed, read
        return listed

    def _answer_again(self, job: Job, request: BundledRequest, answered: Answered) -> None:
        """Answer with the certificate that was signed for this CSR, so that an old bundle never gets a second certificate."""
        issued = answered.issued
        if issued is not None and not self._reason_against(job.requests[request.name], issued):
            job.reissued.add(request.name)
            self._hand_out(job, job.requests[request.name], issued)
            return
        if request.name == USER.name:  # whose certificates end after hours; the CSR is the person's, and stays
            return
        job.answers[request.name] = refusal(
            f"wanted a request that was not answered before, found one whose certificate was signed {minute(answered.signed)}"
            " and is no longer valid: `ca-bridge pending cancel` at the node, then a new request"
        )

    def _hand_out(self, job: Job, request: SignRequest, issued: Issued) -> None:
        """Answer with a certificate that was signed before, unless its CA has revoked it since."""
        name, authority = request.spec.name, request.spec.authority.name
        try:
            is_revoked = _is_revoked(issued.leaf, self._listed(authority), self._cas[authority])
        except BackendError as e:
            job.troubles[name] = e
            return
        then = "make a new CSR" if name == USER.name else "`ca-bridge pending cancel` at the node, then a new request"
        job.answers[name] = issued if not is_revoked else refusal(
            f"wanted a request that was not answered before, found one whose certificate {serial_hex(issued.leaf)} was"
            f" revoked: {then}"
        )  # fmt: skip

    def _trouble(self, request: BundledRequest) -> BridgeError | None:
        if request.authority not in self._configured:
            wanted = f"a request for {' or '.join(self._configured)}"
            return OtherDeskError(f"wanted {wanted}, found one for {request.authority}")
        if request.authority not in self._cas:
            self._cas[request.authority] = self._open(request.authority)
        return self._cas[request.authority].ca.error(request.name)

    def open_all(self) -> None:
        """Reach all CAs now, each in a thread, so that `certificates` and `troubles` know them."""

        def open_(name: str) -> None:
            self._cas[name] = self._open(name)

        with workers(len(AUTHORITIES)) as pool:
            list(pool.map(open_, self._configured.keys() - self._cas.keys()))

    def certificates(self, authority: str) -> tuple[x509.Certificate, ...]:
        """The CA's certificates, if it was reached."""
        ca = self._cas.get(authority)
        return ca.certificates if ca is not None else ()

    def chain(self, authority: str) -> tuple[x509.Certificate, ...]:
        """The CA's certificates, if it was reached: the one that signs, all above it, and the cluster's."""
        ca = self._cas.get(authority)
        return () if ca is None else tuple(dict.fromkeys((*ca.ca.certificates, *ca.anchors)))

    def recalls(self, authority: str) -> bool:
        """Whether a reached CA can list what it signed for a killed run; also true of a CA that is not this desk's."""
        return authority not in self._configured or self._cas[authority].tells

    def troubles(self) -> dict[str, BridgeError]:
        """Why reached CAs can't be used, by authority."""
        return {name: ca.ca.trouble for name, ca in self._cas.items() if ca.ca.trouble is not None}

    def _open(self, authority: str) -> _Authority:
        """Reach a CA, and check everything that can be checked before a signature is spent."""
        configured, anchors = self._configured[authority], list[x509.Certificate]()
        specs = [spec for spec in SPECS.values() if spec.authority.name == authority]
        if self._policy.users is not None and USER.authority.name == authority:
            specs.append(USER)

        def expected(ca: CA) -> Expectation:
            anchors.extend(self._anchors(configured, ca.certificates))
            return self._expectation(authority, tuple(anchors))

        ca = CA.reach(configured, specs, expected)
        # not the CAs above the signing one: a company's root has signed for others, too
        certificates = tuple(dict.fromkeys((*anchors, *ca.certificates[:1])))
        tells = False
        try:
            tells = ca.trouble is None and ca.tells()
        except BackendError as e:  # it stands until the CA is reached again
            ca.trouble = e
        return _Authority(ca=ca, anchors=tuple(anchors), certificates=certificates, tells=tells)

    def _anchors(
        self, configured: registry.Configured, issuers: Sequence[x509.Certificate]
    ) -> Sequence[x509.Certificate]:
        """The CA's certificates in `desk.ca_dir`, or else the signing one."""
        directory = self._policy.desk.ca_dir
        if directory is None:
            if not issuers:
                raise BridgeError(
                    f"{configured.label}: this backend can't be asked for the CA's certificate",
                    hint="the policy's desk.ca_dir can have it",
                )
            return issuers[:1]
        path = directory / SIGNING_AUTHORITIES[configured.authority].certificate_file
        try:
            return read_ca_file(path)
        except UnreadableError as e:
            raise BridgeError(f"{path}: wanted the cluster's CA certificate, found: {e}") from e

    def _expectation(self, authority: str, anchors: tuple[x509.Certificate, ...]) -> Expectation:
        file = SIGNING_AUTHORITIES[authority].certificate_file
        return self._settings.expectation(authority, anchors, file, self._now())

    def anchor(self, authority: str) -> x509.Certificate | None:
        """The cluster's CA certificate, once its CA was reached."""
        ca = self._cas.get(authority)
        return ca.anchors[0] if ca is not None and ca.anchors else None

    def _ask_person(self, approve: Approver, job: Job) -> None:
        cas = {name: ca.certificates for name, ca in self._cas.items()}
        refused = [f"{name}: the policy refuses it: {answer.reason}"
                   for name, answer in job.answers.items() if isinstance(answer, Refusal)]  # fmt: skip
        allowed, words = approve(job, "\n".join([describe(job.bundle, self._now(), cas), *refused]))
        if allowed is None:
            later = WaitingError(f"{words} has not decided yet", hint="run it again with --approve")
            job.troubles |= {request.name: later for request in job.bundle.requests}
        elif allowed:
            job.approved_by = words
        else:
            job.answers |= {request.name: refusal(f"not approved: {words}") for request in job.to_sign}

    # --- signing ------------------------------------------------------------------------------------------------------

    def run(
        self,
        jobs: Iterable[Job],
        journal: Journal,
        record: audit.Record,
        observer: Observer,
        processes: Workers | None = None,
    ) -> None:
        """
        Sign allowed requests, and deliver the answers; a job's own errors are in its `troubles`.

        While CAs sign a window, the next one is judged, and the one before is delivered.
        """
        self._lists.clear()
        self._asking.clear()
        processes, before = processes or Workers(), list[Job]()
        with workers(1) as signing:
            signed = signing.submit(self._sign, before, journal)
            judged = map(self._to_be_asked, map(self.judged, jobs))
            for window in windows(
                judged, lambda job: (len(job.requests), job.size_bytes), _WINDOW, _LARGEST_WINDOW_BYTES
            ):
                signed.result()
                signed = signing.submit(self._sign, window, journal)
                if before:
                    self._finish(before, journal, record, observer, processes)
                before = window
            signed.result()
        if before:
            self._finish(before, journal, record, observer, processes)
        journal.tidy()

    def close(self) -> None:
        """Close the backends."""
        self._lookups.shutdown(wait=False, cancel_futures=True)
        for authority in self._cas.values():
            authority.ca.close()

    def _to_be_asked(self, job: Job) -> Job:
        """Give a job the answer of an earlier job of this run that has the same CSR."""
        for request in job.to_sign:
            one = job.requests[request.name]
            lifetime = one.validity if one.spec == USER else None
            earlier_job = self._asking.setdefault((one.spec.name, one.csr_pem, lifetime), job)
            if earlier_job is not job:
                job.duplicates[request.name] = earlier_job
        return job

    def _sign(self, window: Sequence[Job], journal: Journal) -> None:
        """Have all CAs sign at the same time, each for all requests of the window."""
        lots: dict[str, list[tuple[Job, SignRequest]]] = defaultdict(list)
        for job in window:
            for request in job.to_sign:
                earlier = job.earlier.get(request.name)
                if earlier is not None and not self._reason_against(job.requests[request.name], earlier):
                    job.reissued.add(request.name)
                    self._hand_out(job, job.requests[request.name], earlier)
                else:
                    lots[request.authority].append((job, job.requests[request.name]))
        with ThreadPoolExecutor(len(AUTHORITIES)) as pool:
            list(pool.map(lambda lot: self._sign_or_leave(self._cas[lot[0]], lot[1], journal), lots.items()))

    def _sign_or_leave(self, authority: _Authority, lot: Sequence[tuple[Job, SignRequest]], journal: Journal) -> None:
        try:
            self._sign_lot(authority, lot, journal)
        except StateError:
            raise
        except Exception as e:  # noqa: BLE001 (a bug in one backend must not keep back what the other CAs sign)
            trouble = BridgeError(f"{authority.ca.label}: wanted an answer, found {type(e).__name__}: {e}")
            for job, request in lot:
                if request.spec.name not in job.answers:
                    job.troubles.setdefault(request.spec.name, trouble)

    def _sign_lot(self, authority: _Authority, lot: Sequence[tuple[Job, SignRequest]], journal: Journal) -> None:
        ca, new, submitted = authority.ca, [], []
        for job, request in lot:
            known = journal.get(request)
            if isinstance(known, Submitted):
                submitted.append((job, request, known.since))
            elif isinstance(known, Pending) and ca.backend.can("collect"):
                expected = self._expectation(request.spec.authority.name, authority.anchors)
                _note(job, request, ca.collect(request, known.reference, expected), journal)
            elif isinstance(known, Issued) and not self._reason_against(request, known):
                self._hand_out(job, request, known)
                if known.leaf in journal.recorded:
                    job.recorded.add(request.spec.name)
            else:  # nothing is known, the entry is too old, or the backend is another by now, which knows nothing
                new.append((job, request))
        new += self._recalled(authority, submitted, journal)
        size = len(new) if ca.backend.can("sign_many") else _SLICE
        for start in range(0, len(new), size or 1):
            part = new[start : start + size]
            journal.add((request, Submitted(self._now())) for _, request in part)
            answers = ca.ask([request for _, request in part], partial(_keep, journal))
            for (job, request), answer in zip(part, answers, strict=True):
                _note(job, request, answer, None)

    def _recalled(
        self, authority: _Authority, submitted: Sequence[tuple[Job, SignRequest, datetime]], journal: Journal
    ) -> list[tuple[Job, SignRequest]]:
        """Take the certificates that the CA signed for a killed run; return the requests that it must sign again."""
        ca = authority.ca
        if not submitted:
            return []
        try:
            found = ca.recall([request for _, request, _ in submitted], min(moment for _, _, moment in submitted))
        except BackendError as e:
            for job, request, _ in submitted:
                job.troubles[request.spec.name] = e
            return []
        rest = []
        for (job, request, _), issued in zip(submitted, found, strict=True):
            if issued is None or self._reason_against(request, issued):  # it is for the same key, but another request
                rest.append((job, request))
            else:
                _note(job, request, issued, journal)
        if rest and not authority.tells:
            text = "%s can't tell what it has signed for a killed run: it is asked again for %d requests"
            log.warning(text, ca.label, len(rest))
        return rest

    def _finish(
        self, window: Sequence[Job], journal: Journal, record: audit.Record, observer: Observer, processes: Workers
    ) -> None:
        """Verify, record and deliver, in this order, so that nothing leaves unrecorded."""
        for job in window:
            job.take_from_duplicates()
        self._verify(window, processes)
        for job in window:
            self._record(job, record)
        record.write()
        for job, where in zip(window, self._delivered(window), strict=True):
            certificates = {answer.leaf for answer in job.answers.values() if isinstance(answer, Issued)}
            if where:
                journal.forget(job.requests.values())
                journal.recorded -= certificates
            else:
                journal.recorded |= certificates
            observer(job, where)
        delivered = frozenset(window)  # the archive has their answers
        self._asking = {key: job for key, job in self._asking.items() if job not in delivered}

    def _delivered(self, window: Sequence[Job]) -> list[str]:
        """Write the answers; return each one's path, safe on disk, or an empty text if there is no answer yet."""
        deliveries = [
            job.delivery(self._answer_bundle(job), job.identity) if job.is_complete else None for job in window
        ]
        errors = write_together([delivery.files if delivery is not None else () for delivery in deliveries])
        return [
            _concluded(job, delivery, error) if delivery is not None else ""
            for job, delivery, error in zip(window, deliveries, errors, strict=True)
        ]

    def _verify(self, window: Sequence[Job], processes: Workers) -> None:
        """Withhold wrong certificates from a CA, which the node would refuse, too."""
        answered = [(job, job.requests[name], answer) for job in window
                    for name, answer in job.answers.items() if isinstance(answer, Issued)]  # fmt: skip
        by = {name: self._expectation(name, ca.anchors) for name, ca in self._cas.copy().items()}
        parts = [answered[start : start + _COMPARED] for start in range(0, len(answered), _COMPARED)]
        pairs = [[(request, issued) for _, request, issued in part] for part in parts]
        compared = [processes.submit(reasons, part, by) for part in pairs]
        for part, pair, answer in zip(parts, pairs, compared, strict=True):
            for (job, request, issued), reason in zip(part, answer.result() or reasons(pair, by), strict=True):
                if reason:
                    job.withheld[request.spec.name] = issued.leaf
                    job.answers[request.spec.name] = refusal(f"the desk's CA signed something else: {reason}")

    def _reason_against(self, request: SignRequest, issued: Issued) -> str:
        authority = request.spec.authority.name
        return reason_against(request, issued, self._expectation(authority, self._cas[authority].anchors))

    def _record(self, job: Job, record: audit.Record) -> None:
        node = job.bundle.node if job.identity.is_proven else f"{job.bundle.node} (not proven)"
        about = f"node {node}, cluster {job.bundle.cluster}, request {job.digest[:16]}"
        about += f", approved by {job.approved_by}" if job.approved_by else ""
        if job.is_complete:
            for decision in job.standing.decisions:
                event = audit.APPROVED if decision.verdict == "approved" else audit.NOT_APPROVED
                record.add(event, result=f"{about}, digest {job.digest}", more=approval.audit_facts(decision))
        for request in [request for request in job.bundle.requests if not job.was_recorded(request.name)]:
            answer, trouble = job.answers.get(request.name), job.troubles.get(request.name)
            configured = self._configured.get(request.authority)
            record.describe(request.name, job.requests[request.name], configured.label if configured else "", None)
            verdict = job.verdicts.get(request.name)
            is_proven = verdict is not None and verdict.proven
            vouched = job.vouched_for.get(request.name, "" if is_proven else "without a continuity proof")
            unproven = f", {vouched}" if vouched else ""
            event = DELIVERED if request.name in job.reissued else SIGNED
            common = {"authority": request.authority, "old": request.replaces}
            if isinstance(answer, Issued):
                record.add(event, request.name, new=answer.leaf, result=f"{about}{unproven}", **common)  # type: ignore[arg-type]
            elif isinstance(answer, Refusal):
                error, withheld = RefusedByPolicyError(f"{about}: {answer.reason}"), job.withheld.get(request.name)
                record.add(audit.REFUSED, request.name, error=error, new=withheld, **common)  # type: ignore[arg-type]
            elif trouble is not None and not isinstance(trouble, WaitingError | OtherDeskError):
                kind = BackendUnavailableError if trouble.exit_code == Exit.UNAVAILABLE else BridgeError
                record.add(audit.event_of(trouble), request.name, error=kind(f"{about}: {trouble.reason}"), **common)  # type: ignore[arg-type]

    def _answer_bundle(self, job: Job) -> AnswerBundle:
        labels = {self._configured[request.authority].label for request in job.bundle.requests
                  if isinstance(job.answers.get(request.name), Issued)}  # fmt: skip
        name = self._policy.desk.name or os.uname().nodename
        approved = f", approved by {job.approved_by}" if job.approved_by else ""
        answer = AnswerBundle(
            request_digest=job.digest,
            batch=job.bundle.batch,
            node=job.bundle.node,
            cluster=job.bundle.cluster,
            signer=one_line(f"{name}: {', '.join(sorted(labels)) or 'nothing signed'}{approved}", LONGEST_TEXT),
            signed=self._now().replace(microsecond=0),
            answers={name: job.answers[name] for name in job.requests if name in job.answers},
        )
        if self._answer_key is None:
            return answer
        return replace(answer, signature=signatures.sign(self._answer_key, answer_message(answer)))


def _concluded(job: Job, delivery: Delivery, error: OSError | None) -> str:
    """Conclude a delivery, and return the answer's path; empty: it was not written, and its requests get a trouble."""
    try:
        if error is not None:
            raise error
        delivery.conclude()
    except (OSError, BridgeError) as e:
        trouble = e if isinstance(e, BridgeError) else BridgeError(f"{e.filename or 'the answer'}: {e.strerror}")
        job.troubles |= dict.fromkeys(job.answers, trouble)
        return ""
    return delivery.where


def size_of(job: Job) -> tuple[int, int]:
    """A job's number of requests, and its file's size in bytes."""
    return len(job.bundle.requests), job.size_bytes


def windows(
    items: Iterable[_Item], size_of: Callable[[_Item], tuple[int, int]], most: int, most_bytes: int
) -> Iterator[list[_Item]]:
    """The items in lots, each ended by the item with which it reaches `most` or `most_bytes`."""
    window, size, size_bytes = list[_Item](), 0, 0
    for item in items:
        window.append(item)
        more, more_bytes = size_of(item)
        size, size_bytes = size + more, size_bytes + more_bytes
        if size >= most or size_bytes >= most_bytes:
            yield window
            window, size, size_bytes = [], 0, 0
    if window:
        yield window


def at_once(configured: registry.Configured) -> registry.Configured:
    """Make a CA get each request once, without waiting for it."""
    return replace(configured, settings=replace(configured.settings, retry_for=timedelta()))


def _proof_of(job: Job, request: BundledRequest) -> x509.Certificate | None:
    """The certificate that proved the requester's identity, if the request's CA can tell whether it is revoked."""
    return request.replaces if job.verdicts[request.name].proven else job.origin.certificate


def _is_revoked(old: x509.Certificate, listed: Collection[int] | None, by: _Authority) -> bool:
    """
    Whether a certificate is revoked, by the CA's list or else the CA itself; BackendError, like `CA.is_revoked`.

    A former CA may have used a listed number. A CA's list may have a certificate of its own that it no longer
    knows, as in OpenBao and Vault after they have tidied up an expired one.
    """
    if listed is not None:
        if old.serial_number not in listed:
            return False
        if any(is_signed_by(old, certificate) for certificate in by.ca.certificates[:1]):
            return True
    return by.ca.is_revoked(old)


def _keep(journal: Journal, answered: Sequence[tuple[SignRequest, Answer]]) -> None:
    """Write answers to the journal at once: after a kill, the CA might have to sign the others again."""
    if good := [(request, answer) for request, answer in answered if isinstance(answer, Issued | Pending)]:
        journal.add(good)


def _note(job: Job, request: SignRequest, answer: Answer, journal: Journal | None) -> None:
    """Put an answer into its job; an error that may be gone in the next run is a trouble, any other a refusal."""
    name = request.spec.name
    if isinstance(answer, Issued | Pending) and journal is not None:
        journal.add([(request, answer)])
    if isinstance(answer, Issued):
        job.answers[name] = answer
    elif isinstance(answer, Pending):
        job.troubles[name] = WaitingError(answer.note or "the CA answers later")
    elif isinstance(answer, BackendUnavailableError | NoVerdictError) or answer.is_for_all:
        job.troubles[name] = answer
    else:
        job.answers[name] = refusal(f"the CA refused: {answer.reason}")
