"""
One CA at work: check it, have it sign, collect and verify its answers, and put them away; `registry` makes its backend,
and `retry` decides when to ask it again.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.x509.verification import VerificationError as NoPathError

from bridge.ca import registry
from bridge.ca.registry import Configured
from bridge.ca.retry import Retry, T, WaitPolicy
from bridge.contract import (
    Ability,
    Backend,
    CredentialEnd,
    Issued,
    Pending,
    PlannedCertificate,
    Revocation,
    SignRequest,
)
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    BridgeError,
    Exit,
    NoVerdictError,
    SettingsError,
    VerificationError,
)
from bridge.pki import verify
from bridge.pki.certificates import fingerprint
from bridge.pki.csr import subject_line
from bridge.pki.verify import Expectation, Verified
from bridge.settings.tables import Settings
from bridge.specs import CertificateSpec
from bridge.state import Store
from bridge.state.obligations import Collected, collected_file
from bridge.state.open_requests import OpenRequests, OpenUsers
from bridge.system.console import log
from bridge.system.state_file import StateError
from bridge.system.waiting import workers

#: Concurrent requests to one CA. A desk's lot has more, since OpenBao with storage on disk then signs a quarter more;
#: for a node's few certificates, further connections cost more than they gain.
PARALLEL_REQUESTS, PARALLEL_REQUESTS_OF_LOT = 4, 8
_LOT = 25

Answer = Issued | Pending | BackendError
Answered = tuple[SignRequest, Answer]


class UntrustedAnswerError(NoVerdictError):
    """A refusal or a wrong certificate that another user may have written: it ends no request."""

    hint = (
        "other users may have written that, so the request and its key are kept, and a good answer is still installed; "
        "`ca-bridge pending cancel NAME` gives them up"
    )


class RefusedByCheckError(BackendRefusedError):
    """The CA would sign another certificate than we need, so it got no request."""


#: Stands for a backend that could not be opened; it can do nothing.
CLOSED = Backend()


@dataclass(slots=True, kw_only=True, eq=False)
class CA:
    """One authority's CA; any thread may use it."""

    label: str  #: For messages, such as `corp (vault)`.
    backend: Backend  #: `CLOSED`: it can't be opened; `trouble` has the reason.
    retry: Retry
    authority: str = ""  #: The authority that it signs for.
    trouble: BridgeError | None = None  #: Why this CA can't be used at all.
    #: Errors about certificates that it would sign wrongly, by certificate name.
    wrong: Mapping[str, BridgeError] = field(default_factory=dict)
    identity: str | None = None  #: Our name at the CA, if it shows it.
    certificates: tuple[x509.Certificate, ...] = ()  #: The CA's own, if it shows them; the signing one is the first.
    #: When our credentials expire, by settings key, if `ask_ends` was called.
    ends: Mapping[str, CredentialEnd] = field(default_factory=dict)

    @classmethod
    def of(cls, configured: Configured, retry: Retry | None = None) -> CA:
        """Open the backend, without asking the CA yet."""
        retry = retry or WaitPolicy(configured.settings.retry_for, configured.label)
        return cls(label=configured.label, authority=configured.authority, backend=configured.open(), retry=retry)

    @classmethod
    def reach(
        cls,
        configured: Configured,
        specs: Sequence[CertificateSpec],
        expected: Callable[[CA], Expectation],
        tell: Callable[[str], None] = lambda text: log.info("%s", text),
        opened: Backend = CLOSED,
    ) -> CA:
        """Open a backend, and check all that costs no signature; an error becomes part of the result."""
        retry = WaitPolicy(configured.settings.retry_for, configured.label, tell)
        ca = cls(label=configured.label, authority=configured.authority, backend=opened, retry=retry)
        try:
            ca.backend = configured.open() if opened is CLOSED else opened
            ca.look(specs, expected)
        except BridgeError as e:
            ca.trouble = e
        except Exception as e:  # noqa: BLE001 (a plug-in's bug is an error of its CA)
            ca.trouble = failed(ca.label, e)
        return ca

    def look(self, specs: Sequence[CertificateSpec], expected: Callable[[CA], Expectation]) -> None:
        """Check that it is the right CA, and find certificates that it would sign wrongly."""
        self.certificates = self.issuers()
        wanted = expected(self)
        if self.certificates:
            assert_right_ca(self.certificates, wanted)
        self.wrong = self._question(lambda: unfit(self.backend, specs))
        self.identity = self.ask_identity()

    def preflight(
        self, specs: Sequence[CertificateSpec], wanted: Sequence[PlannedCertificate], expected: Expectation | None
    ) -> Mapping[str, BridgeError]:
        """
        Compare what the CA shows of its profiles and roles with the `wanted` certificates: errors by certificate name;
        without specs, check the CA alone (BackendRefusedError: it is not the `expected` CA, or it rejects us).
        """
        backend = self.opened()
        self.certificates = self.issuers()
        if expected is not None and self.certificates:
            assert_right_ca(self.certificates, expected)
        return self._question(lambda: unfit(backend, specs, wanted))

    def ask_identity(self) -> str | None:
        """Ask for our name at the CA, for the audit log; None: the CA does not say."""
        with contextlib.suppress(Exception):  # a bug in the backend shows when it signs
            return self.backend.identity() or None
        return None

    def ask_ends(self, table: str) -> dict[str, CredentialEnd]:
        """Ask when our credentials expire, by settings key below `table`; empty if the CA does not show it."""
        if self.trouble is not None or self.backend.spends():
            return {}
        with contextlib.suppress(Exception):
            return {f"{table}.{end.key}": end for end in self.backend.credential_ends()}
        return {}

    def issuers(self) -> tuple[x509.Certificate, ...]:
        """The CA's own certificates, the signing one first; empty: this CA shows none."""
        return tuple(self._if_able(lambda: self.backend.issuers_of(self.authority), "issuers", "issuers_of"))

    def error(self, name: str) -> BridgeError | None:
        """Why this certificate can't be requested."""
        return self.trouble or self.wrong.get(name)

    # --- asking -------------------------------------------------------------------------------------------------------

    def ask(
        self, requests: Sequence[SignRequest], done: Callable[[Sequence[Answered]], None] = lambda _: None
    ) -> Sequence[Answer]:
        """Have the CA sign, in one batch if it can; `done` gets the answers as they come, from several threads."""
        backend = self.opened()
        if backend.can("sign_many"):
            answers = self._ask_many(backend, requests)
            done(list(zip(requests, answers, strict=True)))
            return answers

        def sign(request: SignRequest) -> Answer:
            answer: Answer
            try:
                answer = self._question(lambda: backend.sign(request))
            except BackendError as e:
                answer = e
            done([(request, answer)])
            return answer

        if len(requests) == 1:
            return [sign(requests[0])]
        with workers(PARALLEL_REQUESTS if len(requests) < _LOT else PARALLEL_REQUESTS_OF_LOT) as pool:
            return list(pool.map(sign, requests))

    def _ask_many(self, backend: Backend, requests: Sequence[SignRequest]) -> Sequence[Answer]:
        tries = list[datetime]()

        def sign() -> Sequence[Answer]:
            known: Sequence[Issued | None] = [None] * len(requests)
            if tries:  # a CA that broke off may have signed some
                known = backend.recall(requests, tries[0])
            tries.append(datetime.now(UTC))
            rest = [request for request, answer in zip(requests, known, strict=True) if answer is None]
            answers = backend.sign_many(rest) if rest else ()
            if len(answers) != len(rest):
                raise BridgeError(f"wanted {len(rest)} answers of the backend, got {len(answers)}: a bug in it")
            others = iter(answers)
            return [answer if answer is not None else next(others) for answer in known]

        try:
            return self._question(sign)
        except BackendError as e:
            e.is_for_all = True
            return [e] * len(requests)

    def collect(self, request: SignRequest, reference: str, expected: Expectation) -> Answer:
        """Collect a pending answer; a backend's error is an answer."""
        if not self.backend.can("collect"):
            name = request.spec.name
            raise BridgeError(f'{self.label}: answered {name} with "later", and can\'t be asked later: a bug in it')
        try:
            return self._question(lambda: _collected(self.backend, request, reference, expected))
        except BackendError as e:
            return e

    def tells(self) -> bool:
        """Whether `recall` can find what the CA signed for a run that was killed."""
        return self._if_able(self.backend.may_recall, "may_recall")

    def recall(self, requests: Sequence[SignRequest], since: datetime) -> Sequence[Issued | None]:
        """Find what the CA signed for a run that died before the answer, in the requests' order; None: nothing."""
        return self._if_able(lambda: self.backend.recall(requests, since), "recall") if requests else ()

    def verified(self, answer: Issued, request: SignRequest, expected: Expectation) -> Verified:
        """Verify an answer; an error's hint says what to check at this CA."""
        try:
            return verify.check(answer, request, expected)
        except VerificationError as e:
            e.hint = self.backend.advice(request.spec)
            raise

    def put_away(self, reference: str) -> None:
        """Have the backend remove a finished request and its answers."""
        self._if_able(lambda: self.backend.put_away(reference), "put_away")

    # --- revoking -----------------------------------------------------------------------------------------------------

    def revoke(self, certificate: x509.Certificate) -> None:
        """Revoke a certificate of this CA, whose backend can `revoke`."""
        self._question(lambda: self.backend.revoke(certificate))

    def revoke_proven(self, revocation: Revocation) -> None:
        """Revoke a superseded certificate at a CA whose backend can `revoke_proven`."""
        self._question(lambda: self.backend.revoke_proven(revocation))

    def is_revoked(self, certificate: x509.Certificate) -> bool:
        """Whether the CA has revoked the certificate; False if this CA can't tell."""
        return self._if_able(lambda: self.backend.is_revoked(certificate), "is_revoked")

    def revoked(self) -> Collection[int] | None:
        """Serial numbers of all certificates that the CA revoked; None: it does not list them, see `is_revoked`."""
        return self._if_able(self.backend.revoked, "revoked")

    def close(self) -> None:
        """Close the backend."""
        self.backend.close()

    def _question(self, question: Callable[[], T]) -> T:
        """Ask under the retry policy; a backend's bug becomes an error of this CA, so that other CAs go on."""
        try:
            return self.retry.ask(question)
        except BridgeError:
            raise
        except Exception as e:
            raise failed(self.label, e) from e

    def _if_able(self, question: Callable[[], T], *abilities: Ability) -> T:
        """Ask where the backend has one of these abilities; a default is no answer of the CA, and ends no outage."""
        return self._question(question) if self.backend.can(*abilities) else question()

    def opened(self) -> Backend:
        """Return the backend, or raise the error that kept it from being opened."""
        if self.backend is CLOSED:
            raise self.trouble or AssertionError("a CA without a backend has a reason for it")
        return self.backend


def failed(label: str, error: Exception) -> BackendError:
    """The error for a backend's own exception: unavailable for an OSError, else a bug, whose text may hold a secret."""
    if isinstance(error, OSError):
        return BackendUnavailableError(f"{label}: {error}")
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{label}: wanted an answer or an error of `bridge.errors`, found {type(error).__name__} at {place.filename}:{place.lineno}"
    return NoVerdictError(text, hint="a bug in the backend: report it to its author", exit_code=Exit.FAILED)


def signer_of(configured: Configured, retry: Retry | None = None) -> tuple[x509.Certificate, ...]:
    """The CA's signing certificate, if it shows it; not those above: a company's root also signs for others."""
    with contextlib.closing(CA.of(configured, retry)) as ca:
        return ca.issuers()[:1]


def _collected(
    backend: Backend, request: SignRequest, reference: str, expected: verify.Expectation
) -> Issued | Pending:
    """The CA's answer; of several candidates, the first that passes. Raises as `collect`, or UntrustedAnswerError."""
    wrong: list[VerificationError] = []
    for issued in backend.candidates(request, reference):
        error = verify.error_of(issued, request, expected)
        if error is None:
            backend.accepted(request, reference)
            return issued
        wrong.append(error)
    if wrong:
        more = f" ({len(wrong)} certificates, none of which passes)" if len(wrong) > 1 else ""
        raise UntrustedAnswerError(f"{wrong[0].reason}{more}")
    try:
        return backend.collect(request, reference)
    except BackendRefusedError as e:
        if backend.authenticated:
            raise
        raise UntrustedAnswerError(str(e)) from e


# --- before a signature is spent --------------------------------------------------------------------------------------


def unfit(
    backend: Backend, specs: Sequence[CertificateSpec], wanted: Sequence[PlannedCertificate] = ()
) -> dict[str, RefusedByCheckError]:
    """Find certificates that the CA would sign with other usages, or refuse as they are `wanted`; errors by name."""
    checked = backend.check(specs) if specs else {}  # finds the roles, too
    whole = backend.check_whole(wanted) if wanted else {}
    by_name = {spec.name: spec for spec in (*(planned.spec for planned in wanted), *specs)}
    return {name: RefusedByCheckError("; ".join(map(str, violations)), hint=backend.advice(spec))
            for name, spec in by_name.items() if (violations := checked.get(name) or whole.get(name))}  # fmt: skip


def assert_right_ca(issuers: Sequence[x509.Certificate], expected: verify.Expectation) -> None:
    """Check that a CA leads to the node's trust anchor (BackendRefusedError: it does not)."""
    anchor = expected.anchors[0]
    with contextlib.suppress(NoPathError):
        verify.verified_path(issuers[0], issuers[1:], anchor, expected.now)
        return
    got = f"{subject_line(issuers[0])}, SHA-256 {fingerprint(issuers[0])[:16]}…"
    hint = "the mount, issuer, label, URL or directory of this authority may be another one's"
    try:
        if not verify.is_valid_at(issuers[0], expected.now):
            got += f", valid only {verify.validity_text(issuers[0], expected.now)}"
            hint = "have the CA certificate renewed, or correct this node's clock"
    except ValueError as e:
        got += f", whose dates can't be read: {e}"
    want = f"the CA of {expected.anchor_name} ({subject_line(anchor)}, SHA-256 {fingerprint(anchor)[:16]}…)"
    raise BackendRefusedError(f"wanted {want}, got {got}", hint=hint)


# --- putting away finished requests and answers; if a run is killed before, the next one does it ----------------------


def owe_putting_away(settings: Settings, store: Store, answers: Iterable[tuple[str, str]]) -> None:
    """Record, before an installation or a cancellation, the answers (authority, reference) to put away after it."""
    collected = [Collected(authority=a, reference=r) for a, r in answers if r and a in settings.authorities]
    configured = (
        registry.configured(settings, dict.fromkeys(answer.authority for answer in collected)) if collected else {}
    )
    new = [answer for answer in collected if configured[answer.authority].backend_type.can("put_away")]
    if new:
        file = collected_file(store)
        file.put(tuple(dict.fromkeys([*(file.read() or ()), *new])))


def put_away(settings: Settings, store: Store, note: Callable[[str], None]) -> None:
    """Have backends remove files that belong to no open request; a failure is reported once."""
    if not store.collected.exists():
        return
    try:
        file = collected_file(store)
        every, waiting = file.read() or (), {request.reference for request in (*OpenRequests(store), *OpenUsers(store))}
        over = {answer.reference: answer.authority for answer in every if answer.reference not in waiting}
        names = [name for name in over.values() if name in settings.authorities]
        configured = registry.configured(settings, dict.fromkeys(names))
        for reference, name in over.items():
            try:
                if name in configured:
                    with contextlib.closing(CA.of(configured[name])) as ca:
                        ca.put_away(reference)
            except BackendError as e:
                note(f"requests and answers that are over stay where they are: {e}; {e.hint}")
        file.put(tuple(answer for answer in every if answer.reference in waiting))
    except (SettingsError, StateError) as e:
        note(str(e))
