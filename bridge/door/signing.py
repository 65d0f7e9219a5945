"""
Signing rounds: the requests that wait in the database go through a run of the desk, with the desk's own functions.

A round does what `ca-bridge sign DIR` does with an inbox, with the same policy, proofs, journal, archive and record. It
holds the state directory's lock, so that both may work on one machine. It answers a request, or leaves it for the next
round with a note that says why. It writes an answer to the archive before the database: a door that was killed in
between finds the answer in the archive, and asks no CA again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal

from cryptography import x509

from bridge.contract import Issued, Pending, SignRequest
from bridge.desk import approval
from bridge.desk.approval import Decision, Matter, Standing, Trust, UndecidedError
from bridge.desk.desk import Desk, Job, Origin, OtherDeskError
from bridge.desk.est_rules import Asker, asker_problem
from bridge.desk.files import books_open, job_of, load_answer_key, load_policy
from bridge.desk.node_identity import Identity, Owner, identify, key_digest, keys_in
from bridge.desk.policy import Policy, PolicyVerdict
from bridge.desk.records import Answered, Archive, Journal, Submitted, archive_directory
from bridge.desk.workers import Judgement, ReadBundle, Workers, read, verdicts
from bridge.door import doors, enrolments
from bridge.door.doors import Doors, assert_not_behind, is_foreign, left_text
from bridge.door.enrolments import Enrolment
from bridge.door.store import TO_SIGN, UNANSWERED, DatabaseError, DecisionRow, DoorDatabase, IssuedRow, Kept
from bridge.errors import BridgeError, Exit, WaitingError
from bridge.pki.bundle import AnswerBundle, BundledRequest, BundleError, Refusal, RequestBundle, sign_request
from bridge.pki.bundle_format import digest, loads_digested, loads_request
from bridge.pki.certificates import csr_fingerprint, fingerprint, is_signed_by, pem, serial_hex
from bridge.settings.tables import Settings
from bridge.specs import USER
from bridge.state import Store, audit
from bridge.system.codec import from_json, to_json
from bridge.system.paths import UnreadableError, read_ca_file
from bridge.system.waiting import FairSemaphore

log = logging.getLogger("ca-bridge")

#: Most requests of a round; all answers of a round arrive together.
_MOST = 200
#: Bundles that this process parses or judges at the same time; with more, the signing thread hardly gets a turn, and
#: the CA waits for it.
_JUDGED_AT_ONCE = 2
#: Most bundles at workers or waiting for one, so that each waits for few others.
_AT_WORKERS = 8
#: If no worker has parsed a bundle after this time, the client has to send it again.
_WORKER_SECONDS = 10.0
#: How often the door reaches its CAs anew, since their certificates and our rights may have changed.
_OPEN_SECONDS = 300.0
#: How long to wait for a `sign` on the same state directory.
_WAIT = timedelta(seconds=5)
#: How far a node's clock may be behind ours.
_SLACK = timedelta(minutes=5)
#: The CA certificate of its cluster in a pod.
POD_CA = Path("/var/run/secrets/kubernetes.io/serviceaccount/ca.crt")


#: After a round: nothing waits; more requests wait than one round takes; requests wait for a CA that answers later; a
#: CA is down; another door signs now.
Next = Literal["idle", "more", "later", "down", "busy"]


class OwnClusterError(BridgeError):
    """The door runs in the cluster that it serves, and would fail with it when nodes need it."""

    exit_code = Exit.REFUSED
    hint = "run it outside of the cluster, as a CA desk: nodes must get certificates while their cluster does not work"


class BusyError(BridgeError):
    """The door had no time to parse a bundle, and stored nothing of it."""

    exit_code = Exit.UNAVAILABLE
    hint = "send the same request again"

    def __init__(self) -> None:
        super().__init__(f"the bundle can't be read within {_WORKER_SECONDS:g} s: it is too much to do")


class Signing:
    """The signing rounds, run by one thread."""

    def __init__(
        self,
        settings: Settings,
        memory: DoorDatabase,
        policy_file: Path | None,
        now: Callable[[], datetime],
        trust: Callable[[], Trust] | None = None,
    ) -> None:
        """Read the policy (SettingsError), and ask no CA yet; without `trust` no decision counts."""
        self._settings = settings
        self._memory = memory
        self._policy_file = policy_file
        self._now = now
        self.trust = trust or (lambda: Trust(anchors=(), secret=b"", now=now()))
        self.policy = load_policy(settings, policy_file)  #: As last read; for any thread.
        self._store = Store(settings.node.state_dir)
        self.doors = Doors(memory, self._store, doors.identity(self._store))
        self._desk: Desk | None = None
        self._opened = 0.0
        self._is_prepared = False
        self._judgement: Judgement | None = None  #: By the current policy and CAs.
        #: The certificates that sign for nodes, by authority, as last seen at the CAs; for any thread.
        self.cas: Mapping[str, tuple[x509.Certificate, ...]] = {}
        self.troubles: Mapping[str, str] = {}  #: Why CAs can't be used, by authority.
        #: The certificates that verify what a CA signs, by authority, as last seen; for any thread.
        self.chains: Mapping[str, tuple[x509.Certificate, ...]] = {}
        self.workers = Workers()  #: Processes that parse and judge requests.
        #: Held while this process parses or judges, never while it waits for a network or a database.
        self._judging = threading.Semaphore(_JUDGED_AT_ONCE)
        self._at_workers = FairSemaphore(_AT_WORKERS)
        self.arrived = threading.Event()  #: Set when there is something to sign.
        self._recorded: set[x509.Certificate] = set()  #: See `Journal.recorded`.
        self._held = 0  #: Requests of the last round that wait for a CA or people; the next takes as many more.
        self.outcomes: Counter[str] = Counter()  #: Certificates that were signed, answered again or refused.

    def look(self) -> Desk:
        """Reach the CAs of the current policy (OwnClusterError: the door runs in the cluster that they sign for)."""
        desk = self._desk_of_now()
        desk.open_all()
        self.troubles = {name: str(error) for name, error in desk.troubles().items()}
        names = self._settings.authorities
        self.chains = {**self.chains, **{name: chain for name in names if (chain := desk.chain(name))}}
        assert_elsewhere(self._settings, desk.certificates)
        self.cas = {**self.cas, **{name: some for name in names if (some := desk.certificates(name))}}
        # a CA that is down keeps its last certificates
        self._judgement = Judgement(policy=self.policy, cas=self.cas, now=self._now(), without_proof=frozenset())
        return desk

    def read(self, data: bytes, peer: str) -> ReadBundle:
        """
        Parse a bundle from this address, judged if a worker parsed it; from any thread.

        BundleError: it is not a bundle. BusyError: nothing parsed it in time.
        """
        over = time.monotonic() + _WORKER_SECONDS
        with self._at_workers.taken(peer, _WORKER_SECONDS) as has_place:
            if not has_place:
                raise BusyError
            if self.workers and self._judgement is not None:
                by = replace(self._judgement, now=self._now())
                answer = self.workers.submit(read, data, by)
                try:
                    judged = answer.result(over - time.monotonic())
                except TimeoutError:
                    answer.cancel()  # or the busy worker would do this later, besides the client's retry
                    raise BusyError from None
                if isinstance(judged, BundleError):
                    raise judged
                if judged is not None:
                    return replace(judged, by=by)
            with self._judging:
                bundle, request_digest = loads_digested(data)
                return ReadBundle(bundle=bundle, digest=request_digest)

    def judged(
        self, read: ReadBundle, without_proof: frozenset[str] = frozenset(), *, held: bool = False
    ) -> ReadBundle:
        """
        Add the desk's verdicts to a bundle before it is stored, so that a client without a proof can't fill the disk;
        from any thread. Before the CAs are reached, there are no verdicts.

        Requests in `without_proof` need no continuity proof; `held` as in `bridge.desk.policy.judge`.
        """
        if self._judgement is None:
            return read
        by = replace(self._judgement, now=self._now(), without_proof=without_proof)
        with self._judging:
            return replace(read, by=by, verdicts=verdicts(read.bundle, by, held=held))

    def identity(self, read: ReadBundle, *, is_named: bool) -> Identity:
        """Identify a judged bundle's node by the database's records; from any thread; `is_named` as in `identify`."""
        owners = self._memory.owners(keys_in(read.bundle))
        return identify(read.bundle, read.verdicts, owners, self.policy, is_named=is_named)

    def refused(self, read: ReadBundle, identity: Identity, vouched: Collection[str] = ()) -> str:
        """
        Return why no request of a bundle can be signed, or why one of them is too long for people to look at; empty: some
        may be signed, or their CA was not reached yet.
        """
        reasons = dict[str, str]()
        if long := [f"{name}: {one.problems[-1]}" for name, one in read.verdicts.items() if one.is_too_long]:
            return "; ".join(long)
        for request in read.bundle.requests:
            verdict = read.verdicts.get(request.name)
            if request.authority not in self._settings.authorities:
                wanted = " or ".join(sorted(self._settings.authorities))
                reasons[request.name] = f"wanted a request for {wanted}, found one for {request.authority}"
            elif verdict is None or not (problems := _problems(verdict, identity, request.name in vouched)):
                return ""
            else:
                reasons[request.name] = "; ".join(problems)
        return "; ".join(f"{name}: {text}" for name, text in reasons.items())

    def judges(self, bundle: RequestBundle) -> bool:
        """Return whether each request can be judged: its CA was reached, or is not this door's; from any thread."""
        ours = self._settings.authorities
        return all(request.authority in self.cas or request.authority not in ours for request in bundle.requests)

    def round(self) -> Next:
        """Judge and sign the waiting requests."""
        self.doors.alive()
        if not self.doors.to_sign(1):
            if self.troubles or self._has_new_policy():  # try the CAs again, or load the new policy
                self.close()
                self.look()
            return "down" if self.troubles else "idle"
        with self.doors.turn() as is_ours:
            return self._round() if is_ours else "busy"

    def _round(self) -> Next:
        desk, left = self.look(), RoundObserver(self)
        while self._has_new_policy():  # the policy may have changed while the CAs were reached
            desk = self.look()
        with books_open(self._settings, self._store, self._now, _WAIT, "ca-bridge serve") as (journal, record):
            archive = Archive(self.policy.desk.archive or archive_directory(self._store), self._store.directory)
            if not self._is_prepared:  # under the lock, since it removes what a killed process left unfinished
                archive.prepare()
                self._is_prepared = True
            journal.recorded = self._recorded
            kept = self._begun(desk, archive, journal, record)
            desk.run(self._jobs(kept, archive), journal, record, left.answered)
        self._note(kept, left)
        if len(kept) >= _MOST and left.has_answered:  # later ones may be for a CA that answers
            return "more"
        if left.is_down or (self.troubles and not kept):
            self.close()
            return "down"
        return "later" if left.notes else "idle"

    def _begun(self, desk: Desk, archive: Archive, journal: Journal, record: audit.Record) -> list[Kept]:
        """Claim and return this round's requests; if another door has begun one, the desk asks its CA first."""
        assert_not_behind(self.doors.recorded, self.doors.round())
        restored, ours = self.doors.restored(), []
        most, self._held = _MOST + self._held, 0
        own = {None, "", self.doors.door}  # as is_foreign says, without the bundle
        for kept in self.doors.to_sign(most):
            if restored is None and kept.signer in own:
                ours.append(kept)
                continue
            try:
                bundle = loads_request(kept.bundle)
            except BundleError as e:  # it was intact when it came
                log.error("request %s of %s: %s", kept.digest[:16], kept.node, e)  # noqa: TRY400
                continue
            if is_foreign(kept, bundle.created, self.doors.door, restored):
                unknown = self._unanswered(bundle, archive, journal)
                if any(request.spec.authority.name in self.troubles for request in unknown):
                    self._held += 1  # whether the CA can tell is unknown while it is down
                    continue
                if not all(desk.recalls(request.spec.authority.name) for request in unknown):
                    self._held += 1
                    if kept.state != "left":
                        text = left_text(kept, self.doors.names())
                        log.error("request %s of %s is left to people: %s", kept.digest[:16], kept.node, text)
                        self._memory.move(kept.id, "left", before=UNANSWERED, note=text)
                    continue
                # CAs may have signed these: the desk asks them before it requests anything
                journal.add((request, Submitted(bundle.created - _SLACK)) for request in unknown)
            ours.append(kept)
        number, claimed = self.doors.begin([kept.id for kept in ours], self._now())
        self.doors.recorded = max(number, self.doors.recorded)
        record.common = {"door": self.doors.door, "round": number}
        journal.before_asking = self.doors.assert_ours
        return [kept for kept in ours if kept.id in claimed]

    def _unanswered(self, bundle: RequestBundle, archive: Archive, journal: Journal) -> list[SignRequest]:
        """Return the requests whose certificate is neither in a door's answers nor in our archive and journal."""
        known = {**self._answered(bundle), **archive.answers(bundle)}
        requests = [sign_request(request, bundle) for request in bundle.requests if request.name not in known]
        return [request for request in requests if not isinstance(journal.get(request), Issued | Pending)]

    def close(self) -> None:
        """Close the backends; the next round opens them again."""
        if self._desk is not None:
            self._desk.close()
        self._desk = None

    def _has_new_policy(self) -> bool:
        return load_policy(self._settings, self._policy_file) != self.policy

    def _desk_of_now(self) -> Desk:
        policy = load_policy(self._settings, self._policy_file)
        is_old = time.monotonic() - self._opened > _OPEN_SECONDS
        if policy != self.policy or not self._opened:  # it has changed, perhaps while no door ran
            self.doors.judge_again()
        if self._desk is None or is_old or policy != self.policy:
            self.close()
            self._desk = Desk(self._settings, policy, self._now, answer_key=load_answer_key(policy), waits=False)
            self.policy, self._opened, self._is_prepared = policy, time.monotonic(), False
        return self._desk

    def _jobs(self, kept: Sequence[Kept], archive: Archive) -> Iterator[Job]:
        used = enrolments.for_requests(self._memory, [row.id for row in kept])
        for row in kept:
            try:
                bundle = loads_request(row.bundle)
                job = job_of(
                    bundle, row.digest, row.bundle, archive, label=f"request {row.digest[:16]}", where=row.id,
                    conclude=partial(self._conclude, row, bundle),
                )  # fmt: skip
                origin, vouched_for = self._proven(row, bundle, used.get(row.id))
                yield replace(
                    job,
                    origin=origin,
                    vouched_for=vouched_for,
                    owners=_all_owners(self._memory.owners(keys_in(bundle)), job.owners),
                    answered={**self._answered(bundle), **job.answered},
                    standing=self.standing(row, bundle),
                    earlier_note=row.note,
                )
            except (BundleError, DatabaseError) as e:  # it was intact when it came
                log.error("request %s of %s: %s", row.digest[:16], row.node, e)  # noqa: TRY400

    def _answered(self, bundle: RequestBundle) -> dict[str, Answered]:
        """Return any door's answers to the same CSRs of nodes, by name; the archive has this door's, and users'."""
        csrs = {request.name: csr_fingerprint(request.csr) for request in bundle.requests if request.name != USER.name}
        chains = self._memory.issued_among([*csrs.values()])
        found = {}
        for name, csr in csrs.items():
            if (chain := chains.get((csr, name))) is not None:
                leaf, *intermediates = x509.load_pem_x509_certificates(chain)
                issued = Issued(leaf=leaf, intermediates=tuple(intermediates))
                found[name] = Answered(signed=leaf.not_valid_before_utc, issued=issued)
        return found

    def _conclude(
        self, kept: Kept, bundle: RequestBundle, answer: AnswerBundle, written: bytes, identity: Identity
    ) -> None:
        refused = [f"{name}: {each.reason}" for name, each in answer.answers.items() if isinstance(each, Refusal)]
        self._memory.conclude(
            kept.id, written, rows(bundle, answer), self._now(), "; ".join(refused), named=identity.is_proven
        )

    def _note(self, kept: Sequence[Kept], left: RoundObserver) -> None:
        for row in kept:
            if row.digest in left.undecided:
                self._memory.move(row.id, "undecided", before=TO_SIGN, note=left.notes[row.digest])
            elif (text := left.notes.get(row.digest)) is not None and text != row.note:
                self._memory.note(row.id, text)

    def standing(self, kept: Kept, bundle: RequestBundle) -> Standing:
        """Return people's decisions about a request, verified by the current policy; from any thread."""
        rows = self._memory.decisions(kept.id)
        decided = [row for row in rows if row.verdict != "asked"]
        if not decided:  # most requests need no approval
            return Standing()
        decisions: list[Decision | str] = []
        for row in decided:
            about = {"approver": row.approver, "verdict": row.verdict, "reason": row.reason}
            try:
                decisions.append(Decision.kept(**about, decided=row.decided, evidence=row.signature or b""))
            except ValueError as e:
                decisions.append(str(e))
        found = approval.standing(decisions, self.matter(kept, bundle, rows), self.trust())
        for text in found.void:
            log.warning("request %s: a decision does not count: %s", kept.digest[:16], text)
        return found

    def matter(self, kept: Kept, bundle: RequestBundle, decisions: Sequence[DecisionRow]) -> Matter:
        """Return a request for approvers, with the people who submitted it or enrolled its node; from any thread."""
        asked_by = {row.approver for row in decisions if row.verdict == "asked"}
        asked_by |= {used.created_by for used in enrolments.for_requests(self._memory, [kept.id]).values()}
        return Matter(bundle=bundle, digest=digest(bundle), rules=self.policy.approvals, asked_by=asked_by)

    def verdicts(self, kept: Kept, bundle: RequestBundle) -> tuple[Mapping[str, PolicyVerdict], Identity]:
        """
        Return the current policy's verdicts by certificate name, and the node's identity; from any thread. Before a CA is
        reached, there are no verdicts, and nothing proves the node.
        """
        by, used = self._judgement, enrolments.for_requests(self._memory, [kept.id]).get(kept.id)
        if by is None:
            return {}, Identity()
        origin, vouched = self._proven(kept, bundle, used)
        rules = replace(by, now=self._now(), without_proof=by.without_proof | frozenset(vouched))
        before = (origin.problem,) if origin.problem else ()
        found = verdicts(bundle, rules, held=origin.held)
        read = ReadBundle(bundle=bundle, digest=kept.digest, verdicts=found)
        identity = self.identity(read, is_named=origin.names_node)
        return {
            name: replace(verdict, problems=(*before, *_problems(verdict, identity, name in vouched)))
            for name, verdict in found.items()
        }, identity

    def _proven(self, kept: Kept, bundle: RequestBundle, used: Enrolment | None) -> tuple[Origin, Mapping[str, str]]:
        """Return an EST request's origin by the current policy and CAs, and what TLS or an enrolment vouches for."""
        vouched = used.vouches(bundle) if used is not None else {}
        if kept.origin is None:
            return Origin(names_node=used is not None), vouched
        asker, [request] = _asker(kept), bundle.requests
        problem = origin_problem(asker, request, bundle.node, self.policy, self.cas)
        signers, shown = self.cas.get(request.authority, ()), asker.certificate
        is_ours = shown is not None and any(is_signed_by(shown, ca) for ca in signers)
        origin = Origin(
            problem=problem, held=asker.renews, certificate=shown if is_ours else None, names_node=not problem
        )
        return origin, {request.name: asker.text} if shown is not None else vouched


class RoundObserver:
    """The desk's observer: counts answers, and notes why the other requests have none."""

    def __init__(self, signing: Signing) -> None:
        self._signing = signing
        self.notes: dict[str, str] = {}  #: Why a request waits, by digest.
        self.undecided: set[str] = set()  #: Digests of requests that wait for people.
        self.is_down = False  #: A request waits, and not because its CA said "later".
        self.has_answered = False

    def answered(self, job: Job, where: str) -> None:
        """Count a job's answers; without a place for them, note why it waits."""
        node, counts = job.bundle.node, Counter[str]()
        if not where:
            text = self.notes[job.digest] = job.trouble_text or "it waits for its turn"
            if any(isinstance(trouble, UndecidedError) for trouble in job.troubles.values()):
                self.undecided.add(job.digest)
            usual = (WaitingError, OtherDeskError)
            self.is_down |= not all(isinstance(trouble, usual) for trouble in job.troubles.values())
            if text != job.earlier_note:
                log.info("%s: %s waits: %s", job.label, node, text, extra={"request": job.digest[:16]})
            return
        for name, answer in job.answers.items():
            kind = "refused" if isinstance(answer, Refusal) else "again" if name in job.reissued else "signed"
            counts[kind] += 1
            if isinstance(answer, Refusal):
                log.warning("%s: %s: %s is refused: %s", job.label, node, name, answer.reason)
        self.has_answered = True
        self._signing.outcomes += counts
        text = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        log.info("%s: %s: %s", job.label, node, text, extra={"request": job.digest[:16]})


def rows(bundle: RequestBundle, answer: AnswerBundle) -> list[IssuedRow]:
    """Return an answer's issued certificates as the database stores them (pure)."""
    return [
        IssuedRow(
            fingerprint=fingerprint(issued.leaf),
            csr=csr_fingerprint(request.csr),
            key=key_digest(request.csr.public_key()),
            name=request.name,
            authority=request.authority,
            node=bundle.node,
            cluster=bundle.cluster,
            serial=serial_hex(issued.leaf),
            begins=issued.leaf.not_valid_before_utc,
            ends=issued.leaf.not_valid_after_utc,
            chain=pem(issued.leaf, *issued.intermediates),
        )
        for request in bundle.requests
        if isinstance(issued := answer.answers.get(request.name), Issued)
    ]


def _problems(verdict: PolicyVerdict, identity: Identity, is_vouched: bool) -> list[str]:
    """Return a request's problems: the identity's first, since people read the first sentence."""
    return [*identity.problems(verdict, is_vouched=is_vouched), *verdict.problems]


def _all_owners(*records: Mapping[str, Collection[Owner]]) -> dict[str, set[Owner]]:
    keys = {key for record in records for key in record}
    return {key: {owner for record in records for owner in record.get(key, ())} for key in keys}


def assert_elsewhere(
    settings: Settings, certificates: Callable[[str], Sequence[x509.Certificate]], pod_ca: Path = POD_CA
) -> None:
    """Refuse to serve a cluster from its own nodes or pods, which have one of the CA certificates that sign here."""
    for path in (pod_ca, settings.node.pki_dir / "ca.crt"):
        with contextlib.suppress(UnreadableError):
            if here := set(read_ca_file(path)).intersection(certificates("ca")):
                serial = serial_hex(next(iter(here)))
                text = f"that cluster's CA (serial {serial}) is in {path}"
                raise OwnClusterError(f"this door runs inside the cluster it signs for: {text}")


def asker_json(asker: Asker) -> bytes:
    """Encode a requester for the database, which has a column for the time of receipt."""
    return json.dumps({name: value for name, value in to_json(asker).items() if name != "received"}).encode()


def _asker(kept: Kept) -> Asker:
    return from_json(Asker, {**json.loads(kept.origin or b"{}"), "received": to_json(kept.received)})


def origin_problem(
    asker: Asker, request: BundledRequest, node: str, policy: Policy, cas: Mapping[str, Sequence[x509.Certificate]]
) -> str:
    """Return why the current policy does not let this client request for this node; see `asker_problem`."""
    ours = cas.get(request.authority, ())  # which always signed the replaced certificate
    known = ours if asker.renews else policy.est_cas.get(asker.label) or ours
    return asker_problem(asker, request, node, policy.est.get(asker.label), known)
