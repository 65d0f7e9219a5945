"""Whether a certificate and its key are fit for use: the one judge of `doctor`, day 0 and backups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from bridge.contract import Issued, SignRequest
from bridge.errors import VerificationError, Violation
from bridge.pki import csr, verify
from bridge.pki.certificates import UNREADABLE, spki
from bridge.specs import CertificateSpec

#: `missing`: no key at all; `unreadable`: not PEM, or with a passphrase; `other`: another certificate's; `unusable`: an
#: algorithm that Kubernetes does not take; `certificate`: the certificate itself is wrong; `incomparable`: the
#: certificate to compare it with has something that a CSR can't say.
Kind = Literal["missing", "unreadable", "other", "unusable", "certificate", "incomparable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFinding:
    """One reason why a pair is not fit."""

    kind: Kind
    violation: Violation


def key_finding(certificate: x509.Certificate, key_pem: bytes | None) -> PairFinding | None:
    """The problem of a certificate's key (PEM, perhaps after certificates); None: it is the right one."""
    if key_pem is None:
        return _of_key("missing", "none")
    try:
        public = certificate.public_key()
        key = csr.load_key(key_pem, public)
        is_its_own = spki(key.public_key()) == spki(public)
    except UNREADABLE as e:
        return _of_key("unreadable", f"{type(e).__name__}: one that can't be read")
    if not is_its_own:
        return _of_key("other", "another certificate's")
    if not isinstance(key, csr.PrivateKey):
        return _of_key("unusable", f"a key that Kubernetes can't use ({type(key).__name__})")
    return None


def _of_key(kind: Kind, found: str) -> PairFinding:
    return PairFinding(kind=kind, violation=Violation(subject="key", want="the certificate's private key", got=found))


def findings(
    spec: CertificateSpec,
    certificates: Sequence[x509.Certificate],
    key_pem: bytes | None,
    expected: verify.Expectation,
    like: x509.Certificate | None = None,
) -> Iterator[PairFinding]:
    """Judge a pair as the answer to a new request, whatever its remaining validity."""
    leaf, *intermediates = certificates
    if (wrong := key_finding(leaf, key_pem)) is not None:
        yield wrong
        return
    key = csr.load_key(key_pem or b"", leaf.public_key())
    assert isinstance(key, csr.PrivateKey)  # noqa: S101 (looked at above)
    try:
        request = SignRequest(spec=spec, csr_pem=csr.build(like or leaf, key), validity=timedelta())
        verify.check(Issued(leaf=leaf, intermediates=tuple(intermediates)), request, expected)
    except csr.CannotCarryError as e:
        yield PairFinding(
            kind="incomparable",
            violation=Violation(subject="live certificate", want="one to compare it with", got=str(e)),
        )
    except VerificationError as e:
        for violation in e.violations:
            yield PairFinding(kind="certificate", violation=violation)


def is_sa_pair(key: bytes, public: bytes) -> bool:
    """Whether kube-apiserver can sign service-account tokens with the key and check them with the public key."""
    try:
        there = load_pem_public_key(public)
        loaded = csr.load_key(key, there)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return isinstance(loaded, csr.PrivateKey) and spki(loaded.public_key()) == spki(there)
