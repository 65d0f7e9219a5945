"""
Certificates in an EST server's answers: pure rules.

An answer is a PKCS#7 without a signature (RFC 7030 §4.1.3, §4.2.3), a *set*: its order says nothing, so that what a
certificate is has to be told by keys and signatures.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, pkcs7

#: A chain has three or four, a roll-over of its keys twice as many; each more costs signatures to be looked at.
MAX_CERTIFICATES = 50

_PEM_ARMOUR = re.compile(rb"-----[A-Z0-9 ]+-----")


def certificates(body: bytes) -> list[x509.Certificate]:
    """
    The certificates of an answer, in its order.

    Servers send base64 in lines or in one (RFC 8951 §3.1), some PEM, some bare DER or BER; Content-Type and
    Content-Transfer-Encoding tell them apart only where they are right.

    Raises:
        ValueError: It is something else; says what.
    """
    try:
        found = pkcs7.load_der_pkcs7_certificates(_der(body))
        _ = [(certificate.subject, certificate.issuer) for certificate in found]  # which are read only now
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm) as e:
        # TypeError: a type that does not fit an attribute
        raise ValueError(f"{len(body)} bytes that are none") from e
    if len(found) > MAX_CERTIFICATES:
        raise ValueError(f"{len(found)} certificates, where {MAX_CERTIFICATES} are too many")
    return found


def _der(body: bytes) -> bytes:
    if body[:1] == b"\x30":  # a SEQUENCE; no base64 of one begins so
        return body
    text = re.sub(rb"\s", b"", _PEM_ARMOUR.sub(b"", body))
    return base64.b64decode(text, validate=True)  # or foreign characters would be skipped


def leaf_of(found: Sequence[x509.Certificate], csr: x509.CertificateSigningRequest) -> x509.Certificate | None:
    """The certificate for the CSR's key; of several the one that began last. None: there is none."""
    wanted = csr.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    ours = [certificate for certificate in found if _public_key(certificate) == wanted]
    return max(ours, key=lambda certificate: certificate.not_valid_before_utc, default=None)


def intermediates_of(leaf: x509.Certificate, pool: Sequence[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """
    All that may be needed between a leaf and an anchor: first those that certify one another from the leaf upwards.

    Roots are left out by their signature, not by their names: certificates of a roll-over (OldWithNew, RFC 7030 §4.1.3)
    have the same subject and issuer, too, and are needed.
    """
    left = [certificate for certificate in dict.fromkeys(pool) if certificate != leaf and not _is_root(certificate)]
    path: list[x509.Certificate] = []
    below = leaf
    while issuer := next((certificate for certificate in left if _certifies(certificate, below)), None):
        left.remove(issuer)
        path.append(issuer)
        below = issuer
    return (*path, *left)


def issuing_first(pool: Sequence[x509.Certificate]) -> list[x509.Certificate]:
    """
    The CA's certificates, those first that certify no other one; else in the order given.

    RFC 7030 §4.1.3 promises no order, and a serializer may sort them.
    """
    found = list(dict.fromkeys(pool))
    return sorted(found, key=lambda one: sum(_certifies(one, other) for other in found if other != one))


def _is_root(certificate: x509.Certificate) -> bool:
    return _certifies(certificate, certificate)


@functools.lru_cache(maxsize=256)  # the CA's own are asked about again with every leaf
def _certifies(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    if issuer.subject != certificate.issuer:
        return False
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _public_key(certificate: x509.Certificate) -> bytes:
    """The certificate's public key as DER; empty for a key that the library does not know, which is not ours."""
    try:
        return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, UnsupportedAlgorithm):
        return b""
