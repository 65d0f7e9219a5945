"""The checks of the contract's suite: a backend that does as it should passes each, one that does not fails that one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from bridge.ca import conformance
from bridge.ca.conformance import CHECKS, NotConformingError, NotSupportedError, Trial
from bridge.contract import Issued, Pending, SignRequest
from bridge.errors import BackendError, BackendRefusedError, BridgeError, WaitingError
from bridge.pki import verify
from bridge.specs import SPECS
from tests.kit.issuing import Signer

NAMES = ("apiserver", "admin.conf", "etcd-peer")


class GoodBackend:
    """Signs each request with a key of its own, and can do all that the checks are about."""

    def __init__(self) -> None:
        self.signer = Signer.make()
        self.closed = 0

    def sign(self, request: SignRequest) -> Issued | Pending:
        """At once."""
        if not request.csr.is_signature_valid:
            raise BackendRefusedError("wanted a CSR that is signed with its own key")
        now = datetime.now(UTC)
        return self.signer.issue(request, begin=now - timedelta(minutes=5), end=now + request.validity)

    def collect(self, request: SignRequest, reference: str) -> Issued | Pending:
        """The certificate that `sign` had postponed."""
        del reference
        return GoodBackend.sign(self, request)

    def sign_many(self, requests: Sequence[SignRequest]) -> Sequence[Issued | Pending | BackendError]:
        """One after the other."""
        return [self._signed(request) for request in requests]

    def _signed(self, request: SignRequest) -> Issued | Pending | BackendError:
        try:
            return self.sign(request)
        except BackendError as e:
            return e

    def issuers(self) -> list[x509.Certificate]:
        """The one."""
        return [self.signer.certificate]

    def close(self) -> None:
        """As often as one likes."""
        self.closed += 1


class WithoutExtras:
    """Signs, and can do nothing else."""

    def __init__(self) -> None:
        self.signer = Signer.make()

    def sign(self, request: SignRequest) -> Issued | Pending:
        """As it should."""
        del request
        raise AssertionError("not asked")


def trial(backend: GoodBackend | WithoutExtras, patience: timedelta = timedelta()) -> Trial:
    """Three certificates of all usage classes."""
    live_ca, now = Signer.make(), datetime.now(UTC)
    wanted = {name: _live(live_ca, name, now) for name in NAMES}
    expected = verify.Expectation(
        anchors=(backend.signer.certificate,), anchor_name="ca.crt", now=now, min_validity=timedelta(days=7)
    )
    return Trial(backend=backend, live=wanted, expected=expected, validity=timedelta(days=30), patience=patience)


def _live(ca: Signer, name: str, now: datetime) -> x509.Certificate:
    sample = conformance.sign_request(_self(name), SPECS[name], "ecdsa-p256", timedelta(days=1))
    return ca.issue(sample, begin=now - timedelta(days=1), end=now + timedelta(days=1)).leaf


def _self(name: str) -> x509.Certificate:
    return Signer.make(name, ca=False).certificate


def test_a_good_backend_passes_every_check() -> None:
    """A good backend passes every check, also the one that closes it twice."""
    backend = GoodBackend()
    good = trial(backend)
    for check in CHECKS:
        check.run(good)
    assert backend.closed == 2
    assert len(good.issued) == 3 * len(NAMES) + 1 + 1 + 2 + 2 * len(NAMES) - 1 + 1


class OtherUsages(GoodBackend):
    """Signs for code."""

    def sign(self, request: SignRequest) -> Issued | Pending:
        """With another usage."""
        super().sign(request)
        return self.signer.issue(request, ekus=["1.3.6.1.5.5.7.3.3"])


class AnotherSigner(GoodBackend):
    """Tells another CA's certificate."""

    def issuers(self) -> list[x509.Certificate]:
        """Not its own."""
        return [Signer.make().certificate]


class NotSoLong(GoodBackend):
    """Gives less than was asked for."""

    def sign(self, request: SignRequest) -> Issued | Pending:
        """A day less."""
        return super().sign(replace(request, validity=request.validity - timedelta(days=1)))


class OneSerialNumber(GoodBackend):
    """Numbers nothing."""

    def sign(self, request: SignRequest) -> Issued | Pending:
        """Always the same number."""
        super().sign(request)
        now = datetime.now(UTC)
        return self.signer.issue(request, serial=77, begin=now - timedelta(minutes=5), end=now + request.validity)


class MixesThreads(GoodBackend):
    """Gives the second caller the certificate that the first one asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._both = threading.Barrier(2, timeout=180)
        self._asked: list[SignRequest] = []

    def sign(self, request: SignRequest) -> Issued | Pending:
        """The first two callers wait for each other; the third one waits for none."""
        self._asked.append(request)
        if len(self._asked) <= 2:
            self._both.wait()
        return super().sign(self._asked[0])


class SignsAnything(GoodBackend):
    """Does not look at the CSR's signature."""

    def sign(self, request: SignRequest) -> Issued | Pending:
        """Sign without a look at the signature."""
        now = datetime.now(UTC)
        return self.signer.issue(request, begin=now - timedelta(minutes=5), end=now + request.validity)


class TurnsBatches(GoodBackend):
    """Answers a batch in its own order."""

    def sign_many(self, requests: Sequence[SignRequest]) -> Sequence[Issued | Pending | BackendError]:
        """The last one first."""
        bad, *good = super().sign_many(requests)
        return [bad, *reversed(good)]


class ClosesOnce(GoodBackend):
    """Bears to be closed once."""

    def close(self) -> None:
        """A second time is refused."""
        super().close()
        if self.closed > 1:
            raise BackendRefusedError("closed already")


FAULTS: dict[str, tuple[type[GoodBackend], Callable[[Trial], None]]] = {
    "usages": (OtherUsages, lambda given: conformance.signs_exactly_what_was_asked(given, "ecdsa-p256")),
    "preflight": (AnotherSigner, conformance.preflight_finds_nothing_wrong),
    "issuers": (AnotherSigner, conformance.issuers_start_with_the_one_that_signs),
    "validity": (NotSoLong, conformance.gives_the_validity_that_was_asked_for),
    "again": (OneSerialNumber, conformance.signs_the_same_csr_again),
    "threads": (MixesThreads, conformance.signs_from_several_threads),
    "signature": (SignsAnything, conformance.refuses_a_csr_with_a_bad_signature),
    "bad one of a batch": (SignsAnything, conformance.signs_many_in_the_order_asked),
    "order of a batch": (TurnsBatches, conformance.signs_many_in_the_order_asked),
    "close": (ClosesOnce, conformance.close_can_be_called_twice),
    "dead": (GoodBackend, conformance.a_dead_ca_is_unavailable),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_check_can_fail(fault: str) -> None:
    """Each check fails with the backend that has its fault."""
    faulty, check = FAULTS[fault]
    with pytest.raises(BridgeError):
        check(trial(faulty()))


def test_what_a_backend_can_not_do_is_no_failure() -> None:
    """Optional abilities are optional, one by one."""
    poor = trial(WithoutExtras())
    for check in (
        conformance.preflight_finds_nothing_wrong,
        conformance.issuers_start_with_the_one_that_signs,
        conformance.signs_many_in_the_order_asked,
        conformance.close_can_be_called_twice,
    ):
        with pytest.raises(NotSupportedError):
            check(poor)
    assert conformance.abilities(poor.backend) == []


class Later(GoodBackend):
    """Answers when it was asked three times."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 3

    def sign(self, request: SignRequest) -> Issued | Pending:
        """Not yet."""
        del request
        return Pending(reference="17", note="bob has it")

    def collect(self, request: SignRequest, reference: str) -> Issued | Pending:
        """The third time."""
        self.left -= 1
        return self.sign(request) if self.left else super().collect(request, reference)


class NeverAskedAgain(WithoutExtras):
    """Answers later, and can't be asked then."""

    def sign(self, request: SignRequest) -> Issued | Pending:
        """Later."""
        del request
        return Pending(reference="17")


def test_an_answer_that_comes_later_is_waited_for() -> None:
    """The trial waits as long as its patience; a backend that can't be asked again does not conform."""
    patient = trial(Later(), patience=timedelta(minutes=5))
    assert patient.signed(patient.request(SPECS["apiserver"])).leaf in patient.issued
    hasty = trial(Later())
    with pytest.raises(WaitingError, match="bob has it"):
        hasty.signed(hasty.request(SPECS["apiserver"]))
    with pytest.raises(NotConformingError, match="cannot be asked later"):
        trial(NeverAskedAgain()).signed(hasty.request(SPECS["apiserver"]))
