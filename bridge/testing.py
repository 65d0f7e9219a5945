"""
The conformance suite that every backend passes against its real CA, ours and third parties'.

```python
class TestMyBackend(BackendConformance):
    unsupported = frozenset({"sign_many"})

    @pytest.fixture
    def backend(self, ca: TestCA, live: dict[str, x509.Certificate]) -> MyBackend: ...

    @pytest.fixture
    def dead_backend(self) -> MyBackend: ...
```

Needs pytest; the program itself never imports this module.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import ClassVar

import pytest
from cryptography import x509

from bridge.ca import conformance
from bridge.ca.conformance import ABILITIES as ABILITIES  # noqa: PLC0414 (authors of backends import these from here)
from bridge.ca.conformance import Trial
from bridge.ca.conformance import sign_request as sign_request  # noqa: PLC0414
from bridge.ca.conformance import tampered as tampered  # noqa: PLC0414
from bridge.contract import Backend
from bridge.node.sample_pki import Cluster, ThrowawayCA, ca_certificate, leaf_certificate
from bridge.pki import csr, verify
from bridge.specs import SPECS, CertificateSpec, KeyAlgorithm


@dataclass(frozen=True, slots=True, kw_only=True)
class TestCA(ThrowawayCA):
    """A CA like kubeadm's, which can issue certificates as a node has them."""

    __test__ = False

    @classmethod
    def make(cls, name: str = "kubernetes", algorithm: KeyAlgorithm = "rsa-2048", days: int = 3650) -> TestCA:
        """Make a self-signed CA that has been valid for a day."""
        key, now = csr.generate_key(algorithm), datetime.now(UTC)
        certificate = ca_certificate(name, key, now - timedelta(days=1), now + timedelta(days=days))
        return cls(certificate=certificate, key=key)

    def leaf(self, spec: CertificateSpec, algorithm: KeyAlgorithm = "ecdsa-p256") -> x509.Certificate:
        """Issue a live certificate with a day left; the API server's also has a wildcard and an IPv6 address."""
        key, now = csr.generate_key(algorithm), datetime.now(UTC)
        begin, end = now - timedelta(hours=12), now + timedelta(days=1)
        return leaf_certificate(spec, key, self, _CLUSTER, not_before=begin, not_after=end)


_CLUSTER = Cluster(extra_sans=("*.wild.example.com", "2001:db8::7"))


class BackendConformance:
    """
    Tests that every backend passes.

    A subclass provides the fixtures `backend` (signs with the key of fixture `ca`; may use fixture `live`, the live
    certificates by name, to set up roles) and `dead_backend` (its CA can't be reached; `timeout` at most 3 s).
    """

    #: The optional abilities, of `ABILITIES`, that the backend lacks.
    unsupported: ClassVar[frozenset[str]] = frozenset()
    #: The certificates that the CA behind `backend` has to sign; fewer if one CA can't sign all.
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
        """The node's demands on an answer."""
        return verify.Expectation(
            anchors=(ca.certificate,), anchor_name="ca.crt", now=datetime.now(UTC), min_validity=timedelta(days=7)
        )

    @pytest.fixture
    def trial(self, backend: Backend, live: dict[str, x509.Certificate], expected: verify.Expectation) -> Trial:
        """The backend, and the certificates to renew with it."""
        chosen = {spec.name: live[spec.name] for spec in self.specs}
        return Trial(backend=backend, live=chosen, expected=expected, validity=self.validity, patience=self.patience)

    @pytest.mark.parametrize("algorithm", conformance.ALGORITHMS)
    def test_signs_exactly_what_was_asked(self, trial: Trial, algorithm: KeyAlgorithm) -> None:
        """Each kubeadm certificate comes back with its own subject, SANs and usages, whatever the key's type."""
        conformance.signs_exactly_what_was_asked(trial, algorithm)

    def test_gives_the_validity_that_was_asked_for(self, trial: Trial) -> None:
        """The certificate ends when the requested validity does, to the hour."""
        conformance.gives_the_validity_that_was_asked_for(trial)

    def test_signs_the_same_csr_again(self, trial: Trial) -> None:
        """A repeated request gets a certificate for the same key, so a lost answer can be requested again."""
        conformance.signs_the_same_csr_again(trial)

    def test_signs_from_several_threads(self, trial: Trial) -> None:
        """Answers are not mixed up between threads."""
        conformance.signs_from_several_threads(trial)

    def test_refuses_a_csr_with_a_bad_signature(self, trial: Trial) -> None:
        """A CSR with a wrong signature is refused; the same CSR with its own signature is signed."""
        conformance.refuses_a_csr_with_a_bad_signature(trial)

    def test_a_dead_ca_is_unavailable(
        self, dead_backend: Backend, live: dict[str, x509.Certificate], expected: verify.Expectation
    ) -> None:
        """No answer is "try again", not "no"."""
        chosen = {self.specs[0].name: live[self.specs[0].name]}
        dead = Trial(backend=dead_backend, live=chosen, expected=expected, validity=self.validity)
        conformance.a_dead_ca_is_unavailable(dead)

    def test_abilities_are_as_declared(self, backend: Backend) -> None:
        """Each ability is either there or declared unsupported."""
        assert set(conformance.abilities(backend)) == set(ABILITIES) - self.unsupported

    def test_signs_many_in_the_order_asked(self, trial: Trial) -> None:
        """Answers have the order of their batch, and one bad CSR in it does not fail the others."""
        with _unsupported():
            conformance.signs_many_in_the_order_asked(trial)

    def test_check_finds_nothing_wrong(self, trial: Trial) -> None:
        """The preflight is silent about a CA that signs as it should."""
        with _unsupported():
            conformance.preflight_finds_nothing_wrong(trial)

    def test_issuers_start_with_the_one_that_signs(self, trial: Trial, ca: TestCA) -> None:
        """The first of the CA's certificates issued what it signs, and is the node's trust anchor."""
        with _unsupported():
            conformance.issuers_start_with_the_one_that_signs(trial)
            assert trial.backend.issuers()[0] == ca.certificate

    def test_close_can_be_called_twice(self, trial: Trial) -> None:
        """A second `close` does no harm."""
        with _unsupported():
            conformance.close_can_be_called_twice(trial)


@contextlib.contextmanager
def _unsupported() -> Iterator[None]:
    """Make a missing ability an expected failure."""
    try:
        yield
    except conformance.NotSupportedError as e:
        pytest.xfail(str(e))


@functools.cache
def _shared_ca() -> TestCA:
    return TestCA.make()
