"""
Rounds of signing: what waits in the database goes through a run of the desk, by the desk's own functions.

A round is what `ca-bridge sign DIR` does with an inbox: the same policy, proofs, journal, archive and record, with
the state directory's lock held, so that both may work on one machine. A request leaves the round answered, or waits for
the next one with a note that says why. The answer is in the archive before it is in the database: a door that was
killed between both finds it there, and no CA is asked again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509

from bridge.contract import Issued
from bridge.desk import approval
from bridge.desk.approval import Decision, Matter, Standing, Trust, UndecidedError
from bridge.desk.desk import Desk, Job, Origin, OtherDeskError
from bridge.desk.est_rules import Asker, asker_problem
from bridge.desk.files import Received, books_open, load_answer_key, load_policy
from bridge.desk.policy import Policy, PolicyVerdict
from bridge.desk.records import Answered, Archive, Journal, archive_directory
from bridge.desk.workers import Judgement, ReadAhead, ReadBundle, Workers, read, verdicts
from bridge.door import enrolments
from bridge.door.doors import Doors, ask_first, assert_not_behind, identity, is_foreign, left_text, unanswered
from bridge.door.enrolments import Enrolment
from bridge.door.store import TO_SIGN, DatabaseError, DecisionRow, IssuedRow, Kept, Memory
from bridge.errors import BridgeError, Exit, WaitingError
from bridge.pki.bundle import AnswerBundle, BundledRequest, BundleError, Refusal, RequestBundle
from bridge.pki.bundle_format import digest, loads_digested, loads_request
from bridge.pki.certificates import csr_fingerprint, fingerprint, is_signed_by, pem, serial_hex
from bridge.settings.tables import Settings
from bridge.state import Store, audit
from bridge.system.paths import UnreadableError, read_ca_file
from bridge.system.waiting import Places

log = logging.getLogger("ca-bridge")

#: Requests of a round; the answers of a round are there together.
_MOST = 200
#: Bundles that are kept in memory, as they were read when they came, and the longest of them.
_MOST_READ, _LONGEST_READ_BYTES = 3 * _MOST, 64 << 10
#: Bundles that this process reads or judges at the same time: with more, the thread that signs hardly gets a turn, and
#: the CA has to wait for it.
_JUDGED_AT_ONCE = 2
#: Bundles that workers have or that wait for one, so that the answers of a round, which they compare, wait for few.
_AT_WORKERS = 8
#: After this time a client is to come again with a bundle that no worker has read.
_WORKER_SECONDS = 10.0
#: A judgement of when a request came counts in a round for so long; a limit of the policy has hours, or days.
_FRESH = timedelta(minutes=1)
#: After this time CAs are reached anew, since their certificates and our rights may have changed.
_OPEN_SECONDS = 300.0
#: For a `sign` that works on the same state directory.
_WAIT = timedelta(seconds=5)
#: Where a pod has the CA certificate of its cluster.
POD_CA = Path("/var/run/secrets/kubernetes.io/serviceaccount/ca.crt")


#: After a round: nothing waits; more than one round takes; requests wait for a CA that answers later; a CA is down.
#: `busy`: another door signs now.
Next = Literal["idle", "more", "later", "down", "busy"]


class OwnClusterError(BridgeError):
    """The door runs in the cluster that it serves, whose failure would take it away when it is needed."""

    exit_code = Exit.REFUSED
    hint = "run it outside of the cluster, as a CA desk: nodes must get certificates while their cluster does not work"


class BusyError(BridgeError):
    """A bundle was not read in time, and nothing was kept of it."""

    exit_code = Exit.UNAVAILABLE
    hint = "send the same request again"

    def __init__(self) -> None:
        super().__init__(f"wanted to read the bundle within {_WORKER_SECONDS:g} s, found too much to do")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A bundle as it was read and judged when it came."""

    bundle: RequestBundle
    refused: str = ""  #: Why no request of it can be signed; empty: some may be, or a CA is not there to say it.
    by: Judgement | None = None  #: By what it was judged; None: the CAs were not there yet.
    verdicts: Mapping[str, PolicyVerdict] = field(default_factory=dict)  #: By certificate name.
    number: int | None = None  #: By which a worker knows the bundle.


class Signing:
    """The rounds; used by one thread."""

    def __init__(
        self,
        settings: Settings,
        memory: Memory,
        policy_file: Path | None,
        now: Callable[[], datetime],
        trust: Callable[[], Trust] | None = None,
    ) -> None:
        """Read the policy and its keys (SettingsError); no CA is asked yet. Without `trust` no decision counts."""
        self._settings = settings
        self._memory = memory
        self._policy_file = policy_file
        self._now = now
        self._trust = trust or (lambda: Trust(anchors=(), secret=b"", now=now()))
        self._policy = load_policy(settings, policy_file)
        self._answer_key = load_answer_key(self._policy)
        self._store = Store(settings.node.state_dir)
        self.doors = Doors(memory, self._store, identity(self._store))
        self._desk: Desk | None = None
        self._opened = 0.0
        self._is_prepared = False
        self._judgement: Judgement | None = None  #: By the policy and the CAs of now.
        #: The CAs' certificates by authority, as they were found last; from any thread. They sign nodes' certificates.
        self.cas: Mapping[str, tuple[x509.Certificate, ...]] = {}
        self.troubles: Mapping[str, str] = {}  #: What is wrong with CAs, by authority.
        #: Each CA's certificates as they were found last, for those who verify what it signs; from any thread.
        self.chains: Mapping[str, tuple[x509.Certificate, ...]] = {}
        self.workers: Workers | None = None  #: Processes that read and judge what comes.
        self._turns = itertools.count()
        #: Held while this process reads or judges, never while a network or a database is waited for.
        self._judging = threading.Semaphore(_JUDGED_AT_ONCE)
        self._at_workers = Places(_AT_WORKERS)
        #: Bundles of requests that came lately, by the bytes that they were read from.
        self._read: dict[bytes, Judged] = {}
        self.answered: Callable[[str], object] = lambda _: None  #: Called with the digest of each answered request.
        self._recorded: set[x509.Certificate] = set()  #: See `Journal.recorded`.
        self._held = 0  #: Requests that wait for a CA or people to tell, and keep no place in a round from others.
        self.outcomes: Counter[str] = Counter()  #: Certificates that were signed, answered again or refused.

    def look(self) -> Desk:
        """Reach the CAs by the policy of now (OwnClusterError: this is the cluster that they sign for)."""
        desk = self._desk_of_now()
        desk.open_all()
        self.troubles = {name: str(error) for name, error in desk.troubles().items()}
        chains = {name: desk.chain(name) for name in self._settings.authorities}
        self.chains = {**self.chains, **{name: chain for name, chain in chains.items() if chain}}
        assert_elsewhere(self._settings, desk.certificates)
        found = {name: desk.certificates(name) for name in self._settings.authorities}
        self.cas = {**self.cas, **{name: some for name, some in found.items() if some}}
        # a CA that is down now has the certificates that it had
        self._judgement = replace(desk.judgement(), cas=self.cas)
        return desk

    def read(self, data: bytes, peer: str) -> tuple[RequestBundle, str, Judged | None]:
        """
        A bundle from this address, its digest, and the judgement where a worker has made it; from any thread.

        BundleError: it is none. BusyError: it was not read in time.
        """
        over = time.monotonic() + _WORKER_SECONDS
        with self._at_workers.taken(peer, _WORKER_SECONDS) as has_place:
            if not has_place:
                raise BusyError
            if self.workers and (by := self._judgement) is not None:
                by, number = replace(by, now=self._now()), next(self._turns)
                if (one := self._by_worker(self.workers, number, data, by, over)) is not None:
                    refused = self._refused(one.bundle, one.verdicts)
                    judged = Judged(bundle=one.bundle, refused=refused, by=by, verdicts=one.verdicts, number=number)
                    return one.bundle, one.digest, judged
            with self._judging:
                return *loads_digested(data), None

    def _by_worker(self, workers: Workers, number: int, data: bytes, by: Judgement, over: float) -> ReadBundle | None:
        """The bundle as a worker has read it (BundleError: it is none); None: the worker is no more."""
        answer = workers.submit(number, read, {number: data}, by)
        try:
            found = answer.result(over - time.monotonic())
        except TimeoutError:
            answer.cancel()  # or the worker, which has too much to do, did later what is asked again
            raise BusyError from None
        if found is None:
            return None
        [one] = found
        if isinstance(one, BundleError):
            raise one
        return one

    def judged(
        self, bundle: RequestBundle, without_proof: frozenset[str] = frozenset(), *, held: bool = False
    ) -> Judged:
        """
        The desk's judgement before a request is kept, from any thread: a client that proves nothing fills no disk.

        Those in `without_proof` need no continuity proof; `held` as in `bridge.desk.policy.judge`.
        """
        by = self._judgement
        if by is not None:
            by = replace(by, now=self._now(), without_proof=without_proof)
        with self._judging:
            found = verdicts(bundle, by, held=held) if by is not None else {}
        return Judged(bundle=bundle, refused=self._refused(bundle, found), by=by, verdicts=found)

    def _refused(self, bundle: RequestBundle, found: Mapping[str, PolicyVerdict]) -> str:
        reasons = dict[str, str]()
        for request in bundle.requests:
            verdict = found.get(request.name)
            if request.authority not in self._settings.authorities:
                wanted = " or ".join(sorted(self._settings.authorities))
                reasons[request.name] = f"wanted a request for {wanted}, found one for {request.authority}"
            elif verdict is None or not verdict.problems:
                return ""
            else:
                reasons[request.name] = "; ".join(verdict.problems)
        return "; ".join(f"{name}: {text}" for name, text in reasons.items())

    def judges(self, bundle: RequestBundle) -> bool:
        """Whether each request of a bundle can be judged, from any thread: its CA was reached, or is not this door's."""
        ours = self._settings.authorities
        return all(one.authority in self.cas or one.authority not in ours for one in bundle.requests)

    def expect(self, data: bytes, judged: Judged) -> None:
        """Keep a bundle that a round will want, so that it is not read and judged twice; from any thread."""
        if len(self._read) >= _MOST_READ:  # other doors signed them, or people refused them
            self._read.clear()
        if len(data) <= _LONGEST_READ_BYTES:
            self._read[data] = judged

    def _taken(self, one: Kept) -> Judged:
        """The bundle of a request (BundleError); it is the database's content that is signed."""
        return self._read.pop(one.bundle, None) or Judged(bundle=loads_request(one.bundle))

    def _foreseen(self, judged: Judged, request_digest: str) -> ReadAhead | None:
        """
        The verdicts of when a request came, where judging it now would find the same: by the same policy and CAs, with
        nothing waived, moments ago. Whether a certificate is revoked is no part of them, and is asked in each round.
        """
        by, now = judged.by, self._judgement
        if by is None or now is None or abs(self._now() - by.now) > _FRESH:
            return None
        if (by.policy, by.cas, by.without_proof) != (now.policy, now.cas, frozenset()):
            return None
        found = ReadBundle(bundle=judged.bundle, digest=request_digest, verdicts=judged.verdicts)
        return ReadAhead(number=judged.number or 0, chunk=judged.number, read=found)

    def round(self) -> Next:
        """Judge and sign what waits."""
        self.doors.alive()
        if not self.doors.to_sign(1):
            return self._look_again() if self.troubles or self._has_new_policy() else "idle"
        with self.doors.turn() as is_ours:
            return self._round() if is_ours else "busy"

    def _round(self) -> Next:
        desk, left = self.look(), _Left(self)
        while self._has_new_policy():  # to reach a CA takes time, in which the policy may change
            desk = self.look()
        with books_open(self._settings, self._store, self._now, _WAIT, "ca-bridge serve") as (journal, record):
            archive = Archive(self._policy.desk.archive or archive_directory(self._store), self._store.directory)
            if not self._is_prepared:  # while the lock is held: it removes what a killed process left unfinished
                archive.prepare()
                self._is_prepared = True
            journal.recorded = self._recorded
            kept = self._begun(desk, archive, journal, record)
            desk.run(self._jobs(kept, archive), journal, record, left, self.workers)
        self._note(kept, left)
        if len(kept) >= _MOST and left.has_answered:  # those behind may be for a CA that is there
            return "more"
        if left.is_down or (self.troubles and not kept):
            self.close()
            return "down"
        return "later" if left.notes else "idle"

    def _begun(self, desk: Desk, archive: Archive, journal: Journal, record: audit.Record) -> list[Kept]:
        """The requests of this round, written down as ours; what another door has begun is asked for at its CA first."""
        assert_not_behind(self.doors.recorded(), self.doors.round())
        restored, ours = self.doors.restored(), []
        most, self._held = _MOST + self._held, 0
        for one in self.doors.to_sign(most):
            if restored is None and one.signer in {None, "", self.doors.door}:  # the rule's answer, without the bundle
                ours.append(one)
                continue
            try:
                bundle = loads_request(one.bundle)
            except BundleError as e:  # it was whole when it came
                log.error("request %s of %s: %s", one.digest[:16], one.node, e)  # noqa: TRY400
                continue
            if is_foreign(one, bundle.created, self.doors.door, restored):
                known = {**self._answered(bundle), **archive.answers(bundle)}
                unknown = unanswered([r for r in bundle.requests if r.name not in known], bundle, journal)
                if any(request.spec.authority.name in self.troubles for request in unknown):
                    self._held += 1  # whether its CA can tell is not known now
                    continue
                if not all(desk.recalls(request.spec.authority.name) for request in unknown):
                    self._held += 1
                    if one.state != "left":
                        text = left_text(one, self.doors.names())
                        log.error("request %s of %s is left to people: %s", one.digest[:16], one.node, text)
                        self.doors.leave(one.id, text)
                    continue
                ask_first(unknown, bundle.created, journal)
            ours.append(one)
        number, claimed = self.doors.begin([one.id for one in ours], self._now())
        self.doors.began(number)
        record.common = {"door": self.doors.door, "round": number}
        journal.before_asking = self.doors.assert_ours
        return [one for one in ours if one.id in claimed]

    def _look_again(self) -> Next:
        """Find out whether CAs that could not be used are back, and judge by the policy of now."""
        self.close()
        self.look()
        return "down" if self.troubles else "idle"

    def close(self) -> None:
        """Close the backends; the next round opens them again."""
        if self._desk is not None:
            self._desk.close()
        self._desk = None

    def _has_new_policy(self) -> bool:
        return load_policy(self._settings, self._policy_file) != self._policy

    def _desk_of_now(self) -> Desk:
        policy = load_policy(self._settings, self._policy_file)
        is_old = time.monotonic() - self._opened > _OPEN_SECONDS
        if self._desk is None or is_old or policy != self._policy:
            self.close()
            self._policy, self._answer_key = policy, load_answer_key(policy)
            self._desk = Desk(self._settings, policy, self._now, answer_key=self._answer_key, waits=False)
            self._opened, self._is_prepared = time.monotonic(), False
        return self._desk

    @property
    def policy(self) -> Policy:
        """The policy as it was read last."""
        return self._policy

    def _jobs(self, kept: Sequence[Kept], archive: Archive) -> Iterator[Job]:
        used = enrolments.for_requests(self._memory, [one.id for one in kept])
        for one in kept:
            try:
                judged = self._taken(one)
                bundle = judged.bundle
                received = Received(
                    bundle=bundle, digest=one.digest, data=one.bundle, label=f"request {one.digest[:16]}", where=one.id
                )
                job = received.job(archive, lambda _: (), self._conclusion(one, bundle))
                job.origin, job.vouched = self._proven(one, bundle, used.get(one.id))
                job.answered = {**self._answered(bundle), **job.answered}
                if job.origin is None and not job.vouched:
                    job.ahead = self._foreseen(judged, one.digest)
                job.standing = self.standing(one, bundle)
                job.noted = one.note or ""
                yield job
            except (BundleError, DatabaseError) as e:  # it was whole when it came
                log.error("request %s of %s: %s", one.digest[:16], one.node, e)  # noqa: TRY400

    def _answered(self, bundle: RequestBundle) -> dict[str, Answered]:
        """Any door's answers to the same CSRs, by certificate name; the archive has this one's."""
        csrs = {one.name: csr_fingerprint(one.csr) for one in bundle.requests}
        chains = self._memory.issued_among([*csrs.values()])
        found = {}
        for name, csr in csrs.items():
            if (chain := chains.get((csr, name))) is not None:
                leaf, *intermediates = x509.load_pem_x509_certificates(chain)
                issued = Issued(leaf=leaf, intermediates=tuple(intermediates))
                found[name] = Answered(signed=leaf.not_valid_before_utc, issued=issued)
        return found

    def _conclusion(self, one: Kept, bundle: RequestBundle) -> Callable[[AnswerBundle, bytes], None]:
        def conclude(answer: AnswerBundle, written: bytes) -> None:
            refused = [f"{name}: {each.reason}" for name, each in answer.answers.items() if isinstance(each, Refusal)]
            self._memory.conclude(one.id, written, rows(bundle, answer), self._now(), "; ".join(refused))

        return conclude

    def _note(self, kept: Sequence[Kept], left: _Left) -> None:
        for one in kept:
            if one.digest in left.undecided:
                self._memory.move(one.id, "undecided", before=TO_SIGN, note=left.notes[one.digest])
            elif (text := left.notes.get(one.digest)) is not None and text != one.note:
                self._memory.note(one.id, text)

    def standing(self, one: Kept, bundle: RequestBundle) -> Standing:
        """The people's decisions about a request, verified by the present policy; from any thread."""
        rows = self._memory.decisions(one.id)
        decided = [row for row in rows if row.verdict != "asked"]
        if not decided:  # most requests need no people
            return Standing()
        decisions: list[Decision | str] = []
        for row in decided:
            about = {"approver": row.approver, "verdict": row.verdict, "reason": row.reason}
            try:
                decisions.append(Decision.kept(**about, decided=row.decided, evidence=row.signature or b""))
            except ValueError as e:
                decisions.append(str(e))
        rules = self._policy.approvals
        matter = Matter(bundle=bundle, digest=digest(bundle), rules=rules, asked_by=self._asked_by(one, rows))
        found = approval.standing(decisions, matter, self._trust())
        for text in found.void:
            log.warning("request %s: a decision does not count: %s", one.digest[:16], text)
        return found

    def asked_by(self, one: Kept) -> set[str]:
        """The people who brought a request, or gave its node the secret for it; from any thread."""
        return self._asked_by(one, self._memory.decisions(one.id))

    def _asked_by(self, one: Kept, decisions: Sequence[DecisionRow]) -> set[str]:
        brought = {row.approver for row in decisions if row.verdict == "asked"}
        return brought | {used.created_by for used in enrolments.for_requests(self._memory, [one.id]).values()}

    def verdicts(self, one: Kept, bundle: RequestBundle) -> Mapping[str, PolicyVerdict]:
        """The policy's judgement of now, by certificate name, as far as it can be had; from any thread."""
        by, used = self._judgement, enrolments.for_requests(self._memory, [one.id]).get(one.id)
        if by is None:
            return {}
        origin, vouched = self._proven(one, bundle, used)
        rules = replace(by, now=self._now(), without_proof=by.without_proof | frozenset(vouched))
        found = verdicts(bundle, rules, held=origin is not None and origin.held)
        if origin is not None and origin.problem:
            return {name: replace(one, problems=(origin.problem, *one.problems)) for name, one in found.items()}
        return found

    def _proven(
        self, one: Kept, bundle: RequestBundle, used: Enrolment | None
    ) -> tuple[Origin | None, Mapping[str, str]]:
        """The origin of an EST request by the policy and the CAs of now, and what TLS or an enrolment vouches for."""
        vouched = used.vouches(bundle) if used is not None else {}
        if one.origin is None:
            return None, vouched
        asker, [request] = _asker(one), bundle.requests
        problem = origin_problem(asker, request, bundle.node, self._policy, self.cas)
        signers, shown = self.cas.get(request.authority, ()), asker.certificate
        is_ours = shown is not None and any(is_signed_by(shown, ca) for ca in signers)
        origin = Origin(problem=problem, held=asker.renews, certificate=shown if is_ours else None)
        return origin, {request.name: asker.text} if shown is not None else vouched


class _Left:
    """The desk's observer: counts what was answered, and keeps why the rest was not."""

    def __init__(self, signing: Signing) -> None:
        self._signing = signing
        self.notes: dict[str, str] = {}  #: By digest.
        self.undecided: set[str] = set()  #: Digests of those that people decide about.
        self.is_down = False  #: Something else than a CA's "later" keeps a request waiting.
        self.has_answered = False

    def answered(self, job: Job, where: str) -> None:
        """One bundle went through the desk."""
        node, counts = job.bundle.node, Counter[str]()
        if not where:
            text = self.notes[job.digest] = job.trouble_text or "it waits for its turn"
            if any(isinstance(one, UndecidedError) for one in job.troubles.values()):
                self.undecided.add(job.digest)
            self.is_down |= not all(isinstance(one, WaitingError | OtherDeskError) for one in job.troubles.values())
            if text != job.noted:
                log.info("%s: %s waits: %s", job.label, node, text, extra={"request": job.digest[:16]})
            return
        for name, answer in job.answers.items():
            kind = "refused" if isinstance(answer, Refusal) else "again" if name in job.again else "signed"
            counts[kind] += 1
            if isinstance(answer, Refusal):
                log.warning("%s: %s: %s is refused: %s", job.label, node, name, answer.reason)
        self.has_answered = True
        self._signing.outcomes += counts
        self._signing.answered(job.digest)
        text = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        log.info("%s: %s: %s", job.label, node, text, extra={"request": job.digest[:16]})


def rows(bundle: RequestBundle, answer: AnswerBundle) -> list[IssuedRow]:
    """The issued certificates of an answer, as they are remembered (pure)."""
    found = []
    for request in bundle.requests:
        issued = answer.answers.get(request.name)
        if isinstance(issued, Issued):
            leaf = issued.leaf
            found.append(
                IssuedRow(
                    fingerprint=fingerprint(leaf),
                    csr=csr_fingerprint(request.csr),
                    name=request.name,
                    authority=request.authority,
                    node=bundle.node,
                    cluster=bundle.cluster,
                    serial=serial_hex(leaf),
                    begins=leaf.not_valid_before_utc,
                    ends=leaf.not_valid_after_utc,
                    chain=b"".join(map(pem, (leaf, *issued.intermediates))),
                )
            )
    return found


def assert_elsewhere(
    settings: Settings, certificates: Callable[[str], Sequence[x509.Certificate]], pod_ca: Path = POD_CA
) -> None:
    """Refuse to serve a cluster from one of its own nodes or pods: their CA certificate is one of those that sign here."""
    for path in (pod_ca, settings.node.pki_dir / "ca.crt"):
        with contextlib.suppress(UnreadableError):
            if here := set(read_ca_file(path)).intersection(certificates("ca")):
                serial = serial_hex(next(iter(here)))
                raise OwnClusterError(
                    f"wanted a place outside of the cluster, found its CA (serial {serial}) in {path}"
                )


_Cas = Mapping[str, Sequence[x509.Certificate]]


def asker_json(asker: Asker) -> bytes:
    """For the database, which has the time of receipt in a column of its own."""
    certificate_pem = pem(asker.certificate).decode() if asker.certificate is not None else None
    return json.dumps({"label": asker.label, "renews": asker.renews, "certificate": certificate_pem}).encode()


def _asker(kept: Kept) -> Asker:
    found = json.loads(kept.origin or b"{}")
    certificate_pem = found["certificate"]
    certificate = None if certificate_pem is None else x509.load_pem_x509_certificate(certificate_pem.encode())
    return Asker(label=found["label"], renews=found["renews"], certificate=certificate, received=kept.received)


def origin_problem(asker: Asker, request: BundledRequest, node: str, policy: Policy, cas: _Cas) -> str:
    """Why the policy of now does not let this client ask for this node; see `asker_problem`."""
    ours = cas.get(request.authority, ())  # by which the one that is replaced always is
    known = ours if asker.renews else policy.est_cas.get(asker.label) or ours
    return asker_problem(asker, request, node, policy.est.get(asker.label), known)
