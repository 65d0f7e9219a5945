"""Checks that every backend must pass, for `bridge.testing` and for `ca-bridge backend test`."""

from __future__ import annotations

import contextlib
import functools
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from bridge.ca import CA
from bridge.ca.retry import NoWaitPolicy
from bridge.contract import Ability, Backend, Continuity, Issued, Pending, SignRequest
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError, BridgeError, Exit, WaitingError
from bridge.pki import csr, verify
from bridge.pki.certificates import name_text
from bridge.pki.expiry import minute
from bridge.specs import SPECS, CertificateSpec, KeyAlgorithm
from bridge.system.waiting import wait_until

#: Optional abilities by method name; a backend's suite declares which of them it lacks.
ABILITIES: tuple[Ability, ...] = ("sign_many", "collect", "check", "issuers", "identity", "close")
#: Abilities without a check.
FURTHER_ABILITIES: tuple[Ability, ...] = (*("put_away", "recall", "revoke", "revoke_proven", "is_revoked", "revoked"),)
#: One for each kind of CSR; the other algorithms differ only in size.
ALGORITHMS: tuple[KeyAlgorithm, ...] = ("rsa-2048", "ecdsa-p256", "ecdsa-p384")

_PAUSE_SECONDS = 0.05
_THREADS = 4


class NotConformingError(BridgeError):
    """A backend, or the CA behind it, does not do what the contract says."""

    exit_code = Exit.REFUSED


class NotSupportedError(BridgeError):
    """The check is about an optional ability that the backend does not have."""

    exit_code = Exit.DONE


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A backend, and the certificates to renew with it."""

    backend: Backend
    live: Mapping[str, x509.Certificate]  #: The certificates to renew, by kubeadm's name; never empty.
    expected: verify.Expectation  #: The node's demands on an answer.
    validity: timedelta
    patience: timedelta = timedelta()  #: How long a CA that answers later may take.
    node: str = "cp-1"  #: For a backend that `carries`.
    cluster: str = "kubernetes"
    issued: list[x509.Certificate] = field(default_factory=list)  #: All certificates that were signed.

    @property
    def specs(self) -> list[CertificateSpec]:
        """The specs of the live certificates."""
        return [SPECS[name] for name in self.live]

    def request(self, spec: CertificateSpec, algorithm: KeyAlgorithm = "ecdsa-p256") -> SignRequest:
        """A request with a new key, which is thrown away."""
        return sign_request(self.live[spec.name], spec, algorithm, self.validity)

    def carried(self, requests: Sequence[SignRequest]) -> list[SignRequest]:
        """The requests as one batch, without a proof, which would need the live certificates' keys."""
        if not self.backend.carries:
            return list(requests)
        now = datetime.now(UTC).replace(microsecond=0)
        who = Continuity(batch=secrets.token_hex(16), node=self.node, cluster=self.cluster, proof=None, asked=now)
        return [replace(request, continuity=who) for request in requests]

    def signed(self, request: SignRequest) -> Issued:
        """Have a request signed, at once or within the trial's patience."""
        [request] = self.carried([request])
        return self.awaited(request, self.backend.sign(request))

    def verify(self, issued: Issued, request: SignRequest) -> None:
        """Verify an answer as `renew` does, now; a VerificationError has every violation."""
        verify.check(issued, request, replace(self.expected, now=datetime.now(UTC)))

    def awaited(self, request: SignRequest, answer: Issued | Pending | BackendError) -> Issued:
        """The certificate of an answer, collected if pending (NotConformingError, WaitingError: there is none)."""
        if isinstance(answer, BackendError):
            raise answer
        if isinstance(answer, Pending):
            answer = self._collected(request, answer)
        self.issued.append(answer.leaf)
        return answer

    def _collected(self, request: SignRequest, waiting: Pending) -> Issued:
        backend, references = self.backend, [waiting.reference]
        if not backend.can("collect"):
            raise NotConformingError('the backend answers "later", and cannot be asked later')
        answer = wait_until(
            lambda: backend.collect(request, references[-1]),
            lambda answer: isinstance(answer, Issued),
            self.patience,
            pause_seconds=_PAUSE_SECONDS,
            between=lambda answer: references.append(answer.reference) if isinstance(answer, Pending) else None,
        )
        if isinstance(answer, Pending):
            raise WaitingError(f"still waiting: {answer.note or answer.reference}", hint="wait for it: --wait 10m")
        return answer


def sign_request(
    live: x509.Certificate, spec: CertificateSpec, algorithm: KeyAlgorithm, validity: timedelta
) -> SignRequest:
    """A request to renew a live certificate with a new key, which is thrown away."""
    pem = csr.build(live, csr.generate_key(algorithm))
    return SignRequest(spec=spec, csr_pem=pem, validity=validity, replaces=live)


def tampered(request: SignRequest) -> SignRequest:
    """The same request with a CSR whose signature is wrong."""
    der = bytearray(request.csr.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    pem = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    return SignRequest(spec=request.spec, csr_pem=pem, validity=request.validity, replaces=request.replaces)


def abilities(backend: Backend, known: Sequence[Ability] = ABILITIES) -> list[Ability]:
    """Names of the backend's abilities beside signing, in the order of `known`."""
    return [ability for ability in known if backend.can(ability)]


# --- the checks: each raises a BridgeError that says what is wrong ------------------------------------------------------


def preflight_finds_nothing_wrong(trial: Trial) -> None:
    """The preflight accepts a CA that is the right one and signs as it should."""
    if not trial.backend.can("check", "issuers", "issuers_of"):
        raise NotSupportedError("has no preflight")
    authority = trial.specs[0].authority.name
    ca = CA(label="the CA", backend=trial.backend, retry=NoWaitPolicy(), authority=authority)
    for name, error in ca.preflight(trial.specs, (), trial.expected).items():
        raise NotConformingError(f"{name}: {error}")


def issuers_start_with_the_one_that_signs(trial: Trial) -> None:
    """The first of the CA's certificates is the issuer of what it signs."""
    if not trial.backend.can("issuers"):
        raise NotSupportedError("can't tell the CA's certificates")
    issuers = trial.backend.issuers()
    if not issuers:
        raise NotSupportedError("does not tell the CA's certificates")
    leaf = trial.signed(trial.request(trial.specs[0])).leaf
    try:
        leaf.verify_directly_issued_by(issuers[0])
    except (ValueError, TypeError, InvalidSignature) as e:
        wanted = "the first of the CA's certificates to have signed"
        found = f"{name_text(issuers[0].subject)} first and a certificate of {name_text(leaf.issuer)}"
        raise NotConformingError(f"wanted {wanted}, found {found}") from e


def signs_exactly_what_was_asked(trial: Trial, algorithm: KeyAlgorithm) -> None:
    """Each kubeadm certificate comes back with its own subject, SANs and usages, whatever the key's type."""
    for spec in trial.specs:
        request = trial.request(spec, algorithm)
        trial.verify(trial.signed(request), request)


def gives_the_validity_that_was_asked_for(trial: Trial) -> None:
    """The certificate ends when the requested validity does, to the hour."""
    end = trial.signed(trial.request(trial.specs[0])).leaf.not_valid_after_utc
    wanted = datetime.now(UTC) + trial.validity
    if abs(end - wanted) >= timedelta(hours=1):
        raise NotConformingError(f"wanted a certificate until {minute(wanted)}, got one until {minute(end)}")


def signs_the_same_csr_again(trial: Trial) -> None:
    """A repeated request gets a certificate for the same key, new or the first one: a lost answer does no harm."""
    request = trial.request(trial.specs[0])
    first, second = (trial.signed(request).leaf for _ in range(2))
    if first.public_key() != second.public_key():
        raise NotConformingError("wanted two certificates for one key, found two keys")
    if first.serial_number == second.serial_number and first != second:
        raise NotConformingError(f"wanted a serial number for each certificate, found {first.serial_number:x} twice")


def signs_from_several_threads(trial: Trial) -> None:
    """Answers are not mixed up between threads."""
    requests = [trial.request(spec) for spec in trial.specs]
    with ThreadPoolExecutor(_THREADS) as pool:
        for request, issued in zip(requests, pool.map(trial.signed, requests), strict=True):
            trial.verify(issued, request)


def refuses_a_csr_with_a_bad_signature(trial: Trial) -> None:
    """A CSR with a wrong signature is refused; the same CSR with its own signature is signed."""
    good = trial.request(trial.specs[0])
    trial.signed(good)
    _is_refused(lambda: trial.signed(tampered(good)))


def _is_refused(ask: Callable[[], Issued]) -> None:
    with contextlib.suppress(BackendRefusedError):
        ask()
        raise NotConformingError("wanted a CSR with a wrong signature to be refused, found it signed")


def signs_many_in_the_order_asked(trial: Trial) -> None:
    """Answers have the order of their batch, and one bad CSR in it does not fail the others."""
    backend = trial.backend
    if not backend.can("sign_many"):
        raise NotSupportedError("signs one by one")
    spoilt, *others = [trial.request(spec) for spec in trial.specs]
    # a carried bundle has one request for each name
    good = others if others or trial.backend.carries else [trial.request(trial.specs[0])]
    requests = trial.carried([tampered(spoilt), *good])
    bad, *answers = backend.sign_many(requests)
    for request, answer in zip(requests[1:], answers, strict=True):
        trial.verify(trial.awaited(request, answer), request)
    _is_refused(lambda: trial.awaited(requests[0], bad))


def a_dead_ca_is_unavailable(trial: Trial) -> None:
    """No answer is "try again", not "no"; for a backend whose CA can't be reached."""
    with contextlib.suppress(BackendUnavailableError):
        trial.signed(trial.request(trial.specs[0]))
        raise NotConformingError("wanted a CA that can't be reached to be unavailable, found a certificate")


def close_can_be_called_twice(trial: Trial) -> None:
    """A second `close` does no harm."""
    if not trial.backend.can("close"):
        raise NotSupportedError("has nothing to give back")
    trial.backend.close()
    trial.backend.close()


@dataclass(frozen=True, slots=True)
class ConformanceCheck:
    """One check of a backend that is configured and in use."""

    name: str
    run: Callable[[Trial], None]
    must: bool = True  #: False: the contract lets a CA do otherwise.


#: In order: the check that spends no signature is the first, `close` the last.
CHECKS = (
    ConformanceCheck("its preflight finds nothing wrong", preflight_finds_nothing_wrong),
    *(
        ConformanceCheck(
            f"it signs exactly what was asked ({algorithm})",
            functools.partial(signs_exactly_what_was_asked, algorithm=algorithm),
        )
        for algorithm in ALGORITHMS
    ),
    ConformanceCheck("it tells the certificate that signs", issuers_start_with_the_one_that_signs),
    ConformanceCheck("it gives the validity that was asked for", gives_the_validity_that_was_asked_for, must=False),
    ConformanceCheck("it signs the same CSR again", signs_the_same_csr_again),
    ConformanceCheck("it signs from several threads", signs_from_several_threads),
    ConformanceCheck("it signs a batch in its order", signs_many_in_the_order_asked),
    ConformanceCheck("it refuses a CSR with a bad signature", refuses_a_csr_with_a_bad_signature),
    ConformanceCheck("it can be closed twice", close_can_be_called_twice),
)
