"""
The conformance suite that every backend passes against its real CA, ours and third parties' alike.

```python
class TestMyBackend(BackendConformance):
    unsupported = frozenset({"sign_many"})

    @pytest.fixture
    def backend(self, ca: TestCA, live: dict[str, x509.Certificate]) -> MyBackend: ...

    @pytest.fixture
    def dead_backend(self) -> MyBackend: ...
```

Needs pytest; nothing of the program itself imports this module.
"""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import ClassVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from bridge.contract import (
    Backend,
    Carries,
    Checks,
    Closes,
    Collects,
    Continuity,
    Identifies,
    Issued,
    ListsIssuers,
    Pending,
    SignRequest,
    SignsMany,
)
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError
from bridge.node.sample_pki import Cluster, ThrowawayCA, ca_certificate, leaf_certificate
from bridge.pki import csr, verify
from bridge.specs import SPECS, CertificateSpec, KeyAlgorithm

#: Optional abilities by the name that `BackendConformance.unsupported` takes.
ABILITIES = {
    "sign_many": SignsMany,
    "collect": Collects,
    "check": Checks,
    "issuers": ListsIssuers,
    "identity": Identifies,
    "close": Closes,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TestCA(ThrowawayCA):
    """A CA in kubeadm's shape, and certificates of it as they may be on a node."""

    __test__ = False

    @classmethod
    def make(cls, name: str = "kubernetes", algorithm: KeyAlgorithm = "rsa-2048", days: int = 3650) -> TestCA:
        """A self-signed CA that began a day ago."""
        key, now = csr.generate_key(algorithm), datetime.now(UTC)
        certificate = ca_certificate(name, key, now - timedelta(days=1), now + timedelta(days=days))
        return cls(certificate=certificate, key=key)

    def leaf(self, spec: CertificateSpec, algorithm: KeyAlgorithm = "ecdsa-p256") -> x509.Certificate:
        """A live certificate with a day left; the API server's has a wildcard and an IPv6 address, too."""
        key, now = csr.generate_key(algorithm), datetime.now(UTC)
        begin, end = now - timedelta(hours=12), now + timedelta(days=1)
        return leaf_certificate(spec, key, self, _CLUSTER, not_before=begin, not_after=end)


_CLUSTER = Cluster(extra_sans=("*.wild.example.com", "2001:db8::7"))


def sign_request(
    live: x509.Certificate, spec: CertificateSpec, algorithm: KeyAlgorithm, validity: timedelta
) -> SignRequest:
    """A request to renew a live certificate with a new key, which is thrown away."""
    pem = csr.build(live, csr.generate_key(algorithm))
    return SignRequest(spec=spec, csr_pem=pem, validity=validity, replaces=live)


def signed(backend: Backend, request: SignRequest, patience: timedelta = timedelta()) -> Issued:
    """The certificate, be it at once or so much later."""
    request = _carried(backend, [request])[0]
    return _awaited(backend, request, backend.sign(request), patience)


def _carried(backend: Backend, requests: Sequence[SignRequest]) -> list[SignRequest]:
    """One batch; without a proof, as the live certificates' keys are nowhere."""
    if not isinstance(backend, Carries):
        return list(requests)
    who = Continuity(batch=secrets.token_hex(16), node=_CLUSTER.node, cluster="kubernetes", proof=None)
    return [replace(request, continuity=who) for request in requests]


def _awaited(
    backend: Backend, request: SignRequest, answer: Issued | Pending | BackendError, patience: timedelta
) -> Issued:
    if isinstance(answer, BackendError):
        raise answer
    end = time.monotonic() + patience.total_seconds()
    while isinstance(answer, Pending):
        assert isinstance(backend, Collects), "answers later, and can't be asked later"
        assert time.monotonic() < end, f"still pending: {answer.note}"
        time.sleep(0.05)
        answer = backend.collect(request, answer.reference)
    return answer


class BackendConformance:
    """
    What every backend does alike.

    A subclass gives the fixtures `backend` (signs with the key of fixture `ca`; may use fixture `live`, the live
    certificates by name, to set up roles) and `dead_backend` (its CA can't be reached; `timeout` at most 3 s).
    """

    #: Optional abilities that the backend does not have, of `ABILITIES`.
    unsupported: ClassVar[frozenset[str]] = frozenset()
    #: What the CA behind `backend` is asked to sign; fewer where one CA can't do all.
    specs: ClassVar[Sequence[CertificateSpec]] = tuple(SPECS.values())
    validity: ClassVar[timedelta] = timedelta(days=30)
    #: How long the CA behind `backend` may take, if it answers later.
    patience: ClassVar[timedelta] = timedelta()

    @pytest.fixture(scope="session")
    @classmethod
    def ca(cls) -> TestCA:
        """The CA that the backend signs with, also the node's trust anchor."""
        return _shared_ca()

    @pytest.fixture(scope="session")
    @classmethod
    def live(cls, ca: TestCA) -> dict[str, x509.Certificate]:
        """The certificates to renew, by kubeadm's name."""
        return {spec.name: ca.leaf(spec) for spec in cls.specs}

    @pytest.fixture
    def expected(self, ca: TestCA) -> verify.Expectation:
        """What the node demands."""
        return verify.Expectation(
            anchors=(ca.certificate,), anchor_name="ca.crt", now=datetime.now(UTC), min_validity=timedelta(days=7)
        )

    @pytest.mark.parametrize("algorithm", ["rsa-2048", "ecdsa-p256", "ecdsa-p384"])
    def test_signs_exactly_what_was_asked(
        self,
        backend: Backend,
        live: dict[str, x509.Certificate],
        expected: verify.Expectation,
        algorithm: KeyAlgorithm,
    ) -> None:
        """Each kubeadm certificate comes back with its own subject, SANs and usages, whatever the key's type."""
        for spec in self.specs:
            request = sign_request(live[spec.name], spec, algorithm, self.validity)
            verify.check(signed(backend, request, self.patience), request, expected)

    def test_gives_the_validity_that_was_asked_for(self, backend: Backend, live: dict[str, x509.Certificate]) -> None:
        """The certificate ends when the asked validity does, to the hour."""
        request = sign_request(live[self.specs[0].name], self.specs[0], "ecdsa-p256", self.validity)
        end = signed(backend, request, self.patience).leaf.not_valid_after_utc
        assert abs(end - (datetime.now(UTC) + self.validity)) < timedelta(hours=1)

    def test_signs_the_same_csr_again(self, backend: Backend, live: dict[str, x509.Certificate]) -> None:
        """A repeated request is a new certificate for the same key, so that a lost answer can be asked for again."""
        request = sign_request(live[self.specs[0].name], self.specs[0], "ecdsa-p256", self.validity)
        first, second = (signed(backend, request, self.patience).leaf for _ in range(2))
        assert first.public_key() == second.public_key()
        assert first.serial_number != second.serial_number

    def test_signs_from_several_threads(
        self, backend: Backend, live: dict[str, x509.Certificate], expected: verify.Expectation
    ) -> None:
        """Answers are not mixed up between threads."""
        requests = [sign_request(live[spec.name], spec, "ecdsa-p256", self.validity) for spec in self.specs]
        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(lambda request: signed(backend, request, self.patience), requests)
            for request, issued in zip(requests, answers, strict=True):
                verify.check(issued, request, expected)

    def test_refuses_a_csr_with_a_bad_signature(self, backend: Backend, live: dict[str, x509.Certificate]) -> None:
        """A CSR whose holder does not hold the key is refused; its untouched twin is signed."""
        good = sign_request(live[self.specs[0].name], self.specs[0], "ecdsa-p256", self.validity)
        signed(backend, good, self.patience)
        with pytest.raises(BackendRefusedError):
            signed(backend, tampered(good), self.patience)

    def test_a_dead_ca_is_unavailable(self, dead_backend: Backend, live: dict[str, x509.Certificate]) -> None:
        """No answer is "try again", not "no"."""
        request = sign_request(live[self.specs[0].name], self.specs[0], "ecdsa-p256", self.validity)
        with pytest.raises(BackendUnavailableError):
            signed(dead_backend, request)

    def test_abilities_are_as_declared(self, backend: Backend) -> None:
        """An ability is there or declared unsupported, never both."""
        found = {name for name, protocol in ABILITIES.items() if isinstance(backend, protocol)}
        assert found == set(ABILITIES) - self.unsupported

    def test_signs_many_in_the_order_asked(
        self, backend: Backend, live: dict[str, x509.Certificate], expected: verify.Expectation
    ) -> None:
        """A batch is answered in its order, and one bad CSR in it fails alone."""
        if not isinstance(backend, SignsMany):
            pytest.xfail("signs one by one")
        requests = [sign_request(live[spec.name], spec, "ecdsa-p256", self.validity) for spec in self.specs]
        requests = _carried(backend, [tampered(requests[0]), *requests[1:]])
        bad, *answers = backend.sign_many(requests)
        for request, answer in zip(requests[1:], answers, strict=True):
            verify.check(_awaited(backend, request, answer, self.patience), request, expected)
        with pytest.raises(BackendRefusedError):
            _awaited(backend, requests[0], bad, self.patience)

    def test_check_finds_nothing_wrong(self, backend: Backend) -> None:
        """The preflight is silent about a CA that signs as it should."""
        if not isinstance(backend, Checks):
            pytest.xfail("has no preflight")
        assert backend.check(list(self.specs)) == {}

    def test_issuers_start_with_the_one_that_signs(self, backend: Backend, ca: TestCA) -> None:
        """The first of the CA's certificates is the issuer of what it signs."""
        if not isinstance(backend, ListsIssuers):
            pytest.xfail("can't tell the CA's certificates")
        assert backend.issuers()[0] == ca.certificate

    def test_close_can_be_called_twice(self, backend: Backend) -> None:
        """Giving back what was given back does no harm."""
        if not isinstance(backend, Closes):
            pytest.xfail("has nothing to give back")
        backend.close()
        backend.close()


@functools.cache
def _shared_ca() -> TestCA:
    return TestCA.make()


def tampered(request: SignRequest) -> SignRequest:
    """The same request with a CSR whose signature is wrong."""
    der = bytearray(request.csr.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    pem = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    return SignRequest(spec=request.spec, csr_pem=pem, validity=request.validity, replaces=request.replaces)
