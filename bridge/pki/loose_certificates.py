"""Certificates from what people carry: PEM, DER or PKCS#7, whatever the file is called (pure: bytes in)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, pkcs7

from bridge.contract import Issued
from bridge.pki.certificates import UNREADABLE, load_der_certificate, load_pem_certificates

_PKCS7_PEM = (b"-----BEGIN PKCS7-----", b"-----BEGIN CMS-----", b"-----BEGIN PKCS #7 SIGNED DATA-----")


def certificates_in(data: bytes) -> list[x509.Certificate]:
    """
    All certificates in a file.

    Raises:
        ValueError: None, or one that can't be read; the text says which and why.
    """
    for label in _PKCS7_PEM:
        if label in data:
            standard = data.replace(label, _PKCS7_PEM[0]).replace(
                label.replace(b"BEGIN", b"END"), _PKCS7_PEM[0].replace(b"BEGIN", b"END")
            )
            return _of_pkcs7(pkcs7.load_pem_pkcs7_certificates, standard)
    if b"-----BEGIN" in data:
        return load_pem_certificates(data)
    try:
        return [load_der_certificate(data)]
    except ValueError:
        return _of_pkcs7(pkcs7.load_der_pkcs7_certificates, data)


def _of_pkcs7(load: Callable[[bytes], list[x509.Certificate]], data: bytes) -> list[x509.Certificate]:
    try:
        found = load(data)
        _ = [(one.subject, one.issuer) for one in found]  # which are read only now
    except UNREADABLE:
        raise ValueError("no certificate in PEM, DER or PKCS#7") from None
    return found


def is_for(certificate: x509.Certificate, csr: x509.CertificateSigningRequest) -> bool:
    """Whether it certifies the key that the CSR was made with."""
    try:
        return _key(certificate) == _key(csr)
    except UNREADABLE:  # a key of a type that nobody here makes
        return False


def _key(one: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    return one.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def newest(matching: Sequence[x509.Certificate], others: Sequence[x509.Certificate]) -> Issued:
    """
    The answer that loose certificates make: the latest for the key, and all that might lead to its CA.

    What of the others is needed is for `verify` to find out.
    """
    leaf = max(matching, key=lambda certificate: certificate.not_valid_before_utc)
    return Issued(leaf=leaf, intermediates=tuple(others))
