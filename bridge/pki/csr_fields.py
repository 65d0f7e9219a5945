"""Reads an untrusted CSR (pure), and refuses all that Go and OpenSSL would ignore or read in two ways."""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID

from bridge.pki import der
from bridge.pki.certificates import CN_OID, O_OID, attributes, san_counts
from bridge.pki.csr import algorithm_name

#: A kubelet's request has less than 1 kB, one with an RSA-4096 key and 64 names less than 5.
MAX_PEM_BYTES = 16 << 10
MAX_SANS = 64

_BLOCK = re.compile(
    rb"\s*-----BEGIN CERTIFICATE REQUEST-----[ \t]*\r?\n([A-Za-z0-9+/=\r\n \t]+)-----END CERTIFICATE REQUEST-----\s*"
)
#: PKCS#9 extensionRequest (RFC 2985 §5.4.2).
_EXTENSION_REQUEST = "1.2.840.113549.1.9.14"
_UTF8, _PRINTABLE = 0x0C, 0x13
_PRINTABLE_VALUE = re.compile(rb"[A-Za-z0-9 '()+,\-./:=?]*")
#: crypto/tls supports no larger exponent; a small one is weak with some paddings.
_EXPONENTS = range(65537, 1 << 31, 2)


class OddRequestError(ValueError):
    """The text says what is wrong, without any content of the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CsrData:
    """A CSR with all that it asks for, and its one encoding."""

    pem: bytes  #: Made again from the DER: one block, nothing round it.
    subject: tuple[tuple[str, str], ...]  #: (dotted OID, value), sorted.
    sans: frozenset[tuple[str, str]]  #: (type, value), as `certificates.san_entries`.
    key: str  #: Such as `ecdsa-p256`.

    @property
    def parsed(self) -> x509.CertificateSigningRequest:
        """The CSR, parsed again, which takes no time; kept, it would be most of what thousands of them need in memory."""
        return x509.load_pem_x509_csr(self.pem)

    @property
    def cn(self) -> str:
        """The CN; empty: no CN."""
        return next((value for oid, value in self.subject if oid == CN_OID), "")

    @property
    def organizations(self) -> tuple[str, ...]:
        """The O values."""
        return tuple(value for oid, value in self.subject if oid == O_OID)


def read(pem: bytes) -> CsrData:
    """Read a CSR, or raise OddRequestError."""
    encoded = _der(pem)
    try:
        csr = x509.load_der_x509_csr(encoded)
        subject, sans = _subject(csr), _sans(csr)
        key = _key(csr)
        is_signed = csr.is_signature_valid
    except OddRequestError:
        raise
    except Exception:  # noqa: BLE001 (whatever a library makes of bytes of a stranger, it is no CSR to sign)
        raise OddRequestError("a part of the CSR can't be read") from None
    if not is_signed:
        raise OddRequestError("the CSR is not signed with its own key")
    if csr.public_bytes(Encoding.DER) != encoded:
        raise OddRequestError("the CSR is not in DER")
    usual = csr.public_bytes(Encoding.PEM)
    return CsrData(pem=pem if pem == usual else usual, subject=subject, sans=sans, key=key)  # one copy in memory


def _der(pem: bytes) -> bytes:
    if len(pem) > MAX_PEM_BYTES:
        raise OddRequestError(f"the CSR has more than {MAX_PEM_BYTES >> 10} KiB")
    match = _BLOCK.fullmatch(pem)
    if match is None:
        raise OddRequestError("the request is not one PEM block of a CSR, and nothing else")
    try:
        encoded = base64.b64decode(b"".join(match[1].split()), validate=True)
        der.one(encoded, der.SEQUENCE)
    except (binascii.Error, ValueError):
        raise OddRequestError("the CSR is not in DER") from None
    return encoded


def _subject(csr: x509.CertificateSigningRequest) -> tuple[tuple[str, str], ...]:
    """Single values of string types that all read alike, at most one CN (RFC 5280 §4.1.2.4)."""
    name = der.one(csr.tbs_certrequest_bytes, der.SEQUENCE).children()[1]
    for rdn in name.children():
        values = rdn.children()
        if len(values) != 1:
            raise OddRequestError("the subject has several values in one RDN")
        _, value = values[0].children()
        if value.tag not in (_UTF8, _PRINTABLE):
            raise OddRequestError("the subject has a value that is neither PrintableString nor UTF8String")
        if value.tag == _PRINTABLE and not _PRINTABLE_VALUE.fullmatch(value.content):
            raise OddRequestError("the subject has a value that its string type does not allow")
        if not value.content or not value.content.decode("utf-8").isprintable():
            raise OddRequestError("the subject has a value that is empty or can't be printed")
    found = attributes(csr.subject)
    if sum(oid == CN_OID for oid, _ in found) > 1:
        raise OddRequestError("the subject has more than one CN")
    return tuple(sorted(found))


def odd_attributes(csr: x509.CertificateSigningRequest) -> list[str]:
    """OIDs of attributes other than one extensionRequest, since CAs in Go read each list of extensions."""
    found = [attribute.oid.dotted_string for attribute in csr.attributes]
    return [oid for position, oid in enumerate(found) if oid != _EXTENSION_REQUEST or oid in found[:position]]


def requested(csr: x509.CertificateSigningRequest, *besides: x509.ObjectIdentifier) -> list[str]:
    """OIDs of all that a CSR asks for, `besides` the extensions that it may ask for."""
    extensions = [extension.oid.dotted_string for extension in csr.extensions if extension.oid not in besides]
    return [*odd_attributes(csr), *extensions]


def _sans(csr: x509.CertificateSigningRequest) -> frozenset[tuple[str, str]]:
    """SANs, each once, and no other extension or attribute."""
    if odd_attributes(csr):
        raise OddRequestError("the CSR has attributes besides the requested extensions")
    if requested(csr, ExtensionOID.SUBJECT_ALTERNATIVE_NAME):
        raise OddRequestError("the CSR asks for extensions besides SANs")
    found: Counter[tuple[str, str]] = san_counts(csr)
    if found.total() > MAX_SANS:
        raise OddRequestError(f"the CSR has more than {MAX_SANS} SANs")
    if found.total() > len(found):
        raise OddRequestError("the CSR has a SAN twice")
    return frozenset(found)


def _key(csr: x509.CertificateSigningRequest) -> str:
    key = csr.public_key()
    if isinstance(key, rsa.RSAPublicKey) and key.public_numbers().e not in _EXPONENTS:
        raise OddRequestError("the CSR's key has an odd exponent")
    return algorithm_name(key)
