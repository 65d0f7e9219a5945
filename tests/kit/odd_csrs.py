"""CSRs with attributes that the library would not write."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ObjectIdentifier

from bridge.pki import der

EXTENSION_REQUEST = ObjectIdentifier("1.2.840.113549.1.9.14")
MICROSOFTS = ObjectIdentifier("1.3.6.1.4.1.311.2.1.14")
_ECDSA_WITH_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")


def asking(oid: ObjectIdentifier, *extensions: x509.ExtensionType) -> bytes:
    """An attribute (DER) that asks for these extensions; of none, an empty list."""
    asked = [_tlv(der.SEQUENCE, _oid(one.oid), _tlv(der.OCTET_STRING, one.public_bytes())) for one in extensions]
    return _tlv(der.SEQUENCE, _oid(oid), _tlv(der.SET, _tlv(der.SEQUENCE, *asked)))


def with_attributes(key: ec.EllipticCurvePrivateKey, subject: x509.Name, *attributes: bytes) -> bytes:
    """A CSR in PEM, signed with its key."""
    plain = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    parts = der.one(plain.tbs_certrequest_bytes, der.SEQUENCE).children()
    asked = _tlv(der.context(0, constructed=True), *sorted(attributes))  # a SET OF
    info = _tlv(der.SEQUENCE, *(part.encoded for part in parts[:3]), asked)
    signature = _tlv(der.BIT_STRING, b"\x00", key.sign(info, ec.ECDSA(hashes.SHA256())))
    encoded = _tlv(der.SEQUENCE, info, _ECDSA_WITH_SHA256, signature)
    return x509.load_der_x509_csr(encoded).public_bytes(Encoding.PEM)


def _oid(oid: ObjectIdentifier) -> bytes:
    """As it is in a name of one attribute: behind three headers, before a string of one letter."""
    return x509.Name([x509.NameAttribute(oid, "x")]).public_bytes()[6:-3]


def _tlv(tag: int, *content: bytes) -> bytes:
    value = b"".join(content)
    size = len(value).to_bytes((len(value).bit_length() + 7) // 8, "big")
    return bytes([tag, len(value)] if len(value) < 128 else [tag, 0x80 | len(size), *size]) + value
