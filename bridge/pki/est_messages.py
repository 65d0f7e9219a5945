"""The bodies of EST, "Enrollment over Secure Transport" (RFC 7030, RFC 8951), as a server reads and writes them (pure)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from bridge.pki import der
from bridge.pki.certificates import UNREADABLE, attributes, san_counts
from bridge.pki.csr import sans_line, subject_line
from bridge.words import one_line

#: In base64; a CSR with RSA-4096 and a hundred names has a tenth of it.
MOST_BYTES = 64 << 10

#: The operations, which no label may be called like (RFC 7030 §3.2.2).
OPERATIONS = ("cacerts", "csrattrs", "simpleenroll", "simplereenroll", "serverkeygen", "fullcmc")

_RSA, _EC = bytes.fromhex("06092a864886f70d010101"), bytes.fromhex("06072a8648ce3d0201")
#: Key algorithms as attributes: the type's OID, and an encoded value.
_KEYS = {
    "rsa-2048": (_RSA, bytes.fromhex("02020800")),
    "rsa-3072": (_RSA, bytes.fromhex("02020c00")),
    "rsa-4096": (_RSA, bytes.fromhex("02021000")),
    "ecdsa-p256": (_EC, bytes.fromhex("06082a8648ce3d030107")),
    "ecdsa-p384": (_EC, bytes.fromhex("06052b81040022")),
}


def csr_of(body: bytes) -> x509.CertificateSigningRequest:
    """The CSR of an enrolment: base64 of its DER with any white space (RFC 8951 §3.1; ValueError says what was found)."""
    wanted = "wanted the base64 of one CSR in DER, with neither PEM's lines around it nor a byte more"
    try:
        encoded = base64.b64decode(b"".join(body.split()), validate=True)
    except binascii.Error:
        found = "PEM" if b"-----BEGIN" in body else "other characters, or base64 that is cut off"
        raise ValueError(f"{wanted}; found {found}") from None
    try:
        der.one(encoded, der.SEQUENCE)
        csr = x509.load_der_x509_csr(encoded)
        is_signed = csr.is_signature_valid
        _ = (attributes(csr.subject), san_counts(csr))  # which are read only now
    except (*UNREADABLE, UnicodeError) as e:
        raise ValueError(f"{wanted}; found something else ({one_line(e, 100)})") from None
    if csr.public_bytes(Encoding.DER) != encoded:
        raise ValueError(f"{wanted}; found another encoding than DER")
    if not is_signed:
        raise ValueError("wanted a CSR that is signed with its own key, found another signature")
    return csr


def certs_only(certificates: Sequence[x509.Certificate]) -> bytes:
    """A PKCS#7 with these certificates, a set, in lines of base64 as all clients take it (RFC 7030 §4.1.3, §4.2.3)."""
    return _lines(pkcs7.serialize_certificates(list(certificates), Encoding.DER))


def csr_attributes(keys: Sequence[str]) -> bytes:
    """`CsrAttrs` (RFC 7030 §4.5.2) that names the key algorithms which may be, such as `rsa-2048`; others are left out."""
    values: dict[bytes, list[bytes]] = {}
    for kind, value in (_KEYS[key] for key in keys if key in _KEYS):
        values.setdefault(kind, []).append(value)
    found = [der.encoded(der.SEQUENCE, kind, der.encoded(der.SET, *sorted(some))) for kind, some in values.items()]
    return _lines(der.encoded(der.SEQUENCE, *found))


def _lines(data: bytes) -> bytes:
    return base64.encodebytes(data).replace(b"\n", b"\r\n")


def other_names(csr: x509.CertificateSigningRequest, certificate: x509.Certificate) -> str:
    """Why a CSR does not renew a certificate, by the values of subject and SANs (RFC 7030 §4.2.2); empty: it does."""
    text = "wanted that of the certificate which is replaced"
    try:
        if attributes(certificate.subject) != attributes(csr.subject):
            return f"subject: {text} ({subject_line(certificate)}), found {subject_line(csr)}"
        if san_counts(certificate) != san_counts(csr):
            return f"SAN: {text} ({sans_line(certificate)}), found {sans_line(csr)}"
    except UNREADABLE as e:
        return f"wanted names that can be read, found: {one_line(e)}"
    return ""
