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
import ipaddress
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import ClassVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID, ObjectIdentifier

from bridge import csr, verify
from bridge.contract import Backend, Checks, Closes, Issued, ListsIssuers, SignRequest, SignsMany
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError
from bridge.specs import EKU, SPECS, CertificateSpec, KeyAlgorithm

#: Optional abilities by the name that `BackendConformance.unsupported` takes.
ABILITIES = {"sign_many": SignsMany, "check": Checks, "issuers": ListsIssuers, "close": Closes}

_NAMES: dict[str, tuple[str | None, str]] = {  # O, CN as kubeadm 1.37 sets them on node cp-1
    "admin.conf": ("kubeadm:cluster-admins", "kubernetes-admin"),
    "apiserver": (None, "kube-apiserver"),
    "apiserver-etcd-client": (None, "kube-apiserver-etcd-client"),
    "apiserver-kubelet-client": (None, "kube-apiserver-kubelet-client"),
    "controller-manager.conf": (None, "system:kube-controller-manager"),
    "etcd-healthcheck-client": (None, "kube-etcd-healthcheck-client"),
    "etcd-peer": (None, "cp-1"),
    "etcd-server": (None, "cp-1"),
    "front-proxy-client": (None, "front-proxy-client"),
    "scheduler.conf": (None, "system:kube-scheduler"),
    "super-admin.conf": ("system:masters", "kubernetes-super-admin"),
    "kubelet.conf": ("system:nodes", "system:node:cp-1"),
}
_SANS = {
    "apiserver": (
        *("*.wild.example.com", "api.example.com", "cp-1", "kubernetes", "kubernetes.default"),
        *("kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "10.96.0.1", "192.0.2.10", "2001:db8::7"),
    ),
    "etcd-peer": ("cp-1", "localhost", "192.0.2.10", "127.0.0.1", "::1"),
    "etcd-server": ("cp-1", "localhost", "192.0.2.10", "127.0.0.1", "::1"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TestCA:
    """A CA in kubeadm's shape (KeyUsage without cRLSign, subject with a CN alone)."""

    __test__ = False

    certificate: x509.Certificate
    key: csr.PrivateKey

    @classmethod
    def make(cls, name: str = "kubernetes", algorithm: KeyAlgorithm = "rsa-2048", days: int = 3650) -> TestCA:
        """A self-signed CA that began a day ago."""
        key, now = csr.generate_key(algorithm), datetime.now(UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(subject, subject, key.public_key(), now - timedelta(days=1), now + timedelta(days=days))
        certificate = (
            builder.add_extension(_key_usage(ca=True), critical=True)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate=certificate, key=key)

    @property
    def certificate_pem(self) -> bytes:
        """One PEM block."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """PKCS#1 or SEC1, unencrypted."""
        return csr.key_pem(self.key)

    def leaf(self, spec: CertificateSpec, algorithm: KeyAlgorithm = "ecdsa-p256") -> x509.Certificate:
        """A live certificate as kubeadm would have made it, with a day left."""
        organization, common_name = _NAMES[spec.name]
        attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
        if organization:
            attributes.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
        now, key = datetime.now(UTC), csr.generate_key(algorithm).public_key()
        names = x509.Name(attributes), self.certificate.subject
        builder = _builder(*names, key, now - timedelta(hours=12), now + timedelta(days=1))
        builder = builder.add_extension(_key_usage(ca=False), critical=True).add_extension(
            x509.ExtendedKeyUsage([ObjectIdentifier(eku.value) for eku in EKU if eku in spec.ekus]), critical=False
        )
        if spec.name in _SANS:
            san = x509.SubjectAlternativeName([_general_name(name) for name in _SANS[spec.name]])
            builder = builder.add_extension(san, critical=False)
        return builder.sign(self.key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: csr.PublicKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(begin).not_valid_after(end)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_encipherment=True, key_cert_sign=ca, crl_sign=False, content_commitment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def sign_request(
    live: x509.Certificate, spec: CertificateSpec, algorithm: KeyAlgorithm, validity: timedelta
) -> SignRequest:
    """A request to renew a live certificate with a new key, which is thrown away."""
    pem = csr.build(live, csr.generate_key(algorithm))
    return SignRequest(spec=spec, csr_pem=pem, validity=validity, replaces=live)


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
            verify.check(backend.sign(request), request, expected)

    def test_gives_the_validity_that_was_asked_for(self, backend: Backend, live: dict[str, x509.Certificate]) -> None:
        """The certificate ends when the asked validity does, to the hour."""
        request = sign_request(live[self.specs[0].name], self.specs[0], "ecdsa-p256", self.validity)
        end = backend.sign(request).leaf.not_valid_after_utc
        assert abs(end - (datetime.now(UTC) + self.validity)) < timedelta(hours=1)

    def test_signs_the_same_csr_again(self, backend: Backend, live: dict[str, x509.Certificate]) -> None:
        """A repeated request is a new certificate for the same key, so that a lost answer can be asked for again."""
        request = sign_request(live[self.specs[0].name], self.specs[0], "ecdsa-p256", self.validity)
        first, second = backend.sign(request).leaf, backend.sign(request).leaf
        assert first.public_key() == second.public_key()
        assert first.serial_number != second.serial_number

    def test_signs_from_several_threads(
        self, backend: Backend, live: dict[str, x509.Certificate], expected: verify.Expectation
    ) -> None:
        """Answers are not mixed up between threads."""
        requests = [sign_request(live[spec.name], spec, "ecdsa-p256", self.validity) for spec in self.specs]
        with ThreadPoolExecutor(4) as pool:
            for request, issued in zip(requests, pool.map(backend.sign, requests), strict=True):
                verify.check(issued, request, expected)

    def test_refuses_a_csr_with_a_bad_signature(self, backend: Backend, live: dict[str, x509.Certificate]) -> None:
        """A CSR whose holder does not hold the key is refused; its untouched twin is signed."""
        good = sign_request(live[self.specs[0].name], self.specs[0], "ecdsa-p256", self.validity)
        backend.sign(good)
        with pytest.raises(BackendRefusedError):
            backend.sign(tampered(good))

    def test_a_dead_ca_is_unavailable(self, dead_backend: Backend, live: dict[str, x509.Certificate]) -> None:
        """No answer is "try again", not "no"."""
        request = sign_request(live[self.specs[0].name], self.specs[0], "ecdsa-p256", self.validity)
        with pytest.raises(BackendUnavailableError):
            dead_backend.sign(request)

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
        answers = backend.sign_many([*requests, tampered(requests[0])])
        assert isinstance(answers.pop(), BackendError)
        for request, answer in zip(requests, answers, strict=True):
            assert isinstance(answer, Issued)
            verify.check(answer, request, expected)

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
