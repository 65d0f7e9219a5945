"""CSRs before `openssl ca` sees them: only those that stop no other of their run, and ask for nothing but SANs (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from bridge.contract import SignRequest
from bridge.errors import BackendRefusedError

_SAN = x509.SubjectAlternativeName.oid
_EXTENSION_REQUEST = x509.ObjectIdentifier("1.2.840.113549.1.9.14")
# With challengePassword and unstructuredName, which go nowhere. openssl takes extensions from Microsoft's
# 1.3.6.1.4.1.311.2.1.14 as well, which cryptography does not show as extensions.
_ATTRIBUTES = {_EXTENSION_REQUEST, *map(x509.ObjectIdentifier, ("1.2.840.113549.1.9.7", "1.2.840.113549.1.9.2"))}
_STRINGS = {"UTF8String", "PrintableString", "T61String", "BMPString"}
#: What reading a CSR may raise.
CSR_ERRORS = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True)
class CheckedCsr:
    """A CSR that may be signed, and its place among the requests."""

    position: int
    csr_pem: bytes
    public_key: bytes


def checked(position: int, request: SignRequest) -> CheckedCsr:
    """
    A CSR that won't stop the others of its run, and brings nothing but subject and SANs into a certificate.

    Its signature is openssl's to verify: it issues nothing for a CSR whose signature is bad, and goes on.

    Raises:
        BackendRefusedError: It would.
    """
    try:
        csr = request.csr
        wrong = _wrong_with(request.csr_pem, csr)
    except CSR_ERRORS as e:
        wrong = f"a well-formed CSR, found: {e}"
    if wrong:
        raise BackendRefusedError(f"wanted {wrong}", hint="make the CSR anew")
    # written anew, so that openssl reads what was looked through
    return CheckedCsr(position, csr.public_bytes(Encoding.PEM), public_key(csr))


def _wrong_with(pem: bytes, csr: x509.CertificateSigningRequest) -> str:
    if (blocks := pem.count(b"-----BEGIN ")) != 1:
        return f"one PEM block, found {blocks}"  # openssl signs the first and says nothing
    attributes = [attribute.oid for attribute in csr.attributes]
    others = {oid.dotted_string for oid in attributes if oid not in _ATTRIBUTES}
    others |= {extension.oid.dotted_string for extension in csr.extensions if extension.oid != _SAN}
    if others:
        return f"a CSR that asks for SANs and nothing else, found {', '.join(sorted(others))} too"
    if attributes.count(_EXTENSION_REQUEST) > 1:
        return "one list of extensions, found several"
    subject = list(csr.subject)
    if not subject:
        return "a subject, found an empty one"
    odd = [_attribute_text(attribute) for attribute in subject if not _is_readable(attribute)]
    return f"a subject in strings that openssl ca reads, found {', '.join(odd)}" if odd else ""


def _is_readable(attribute: x509.NameAttribute[str | bytes]) -> bool:
    """Whether openssl ca reads its string; at any other, or an e-mail address that is no IA5String, it ends and signs none."""
    kind = _string_type(attribute)
    if kind == "IA5String":
        return isinstance(attribute.value, str) and attribute.value.isascii()
    return not kind or (kind in _STRINGS and attribute.oid != NameOID.EMAIL_ADDRESS)


def _string_type(attribute: x509.NameAttribute[str | bytes]) -> str:
    """Its ASN.1 string type; empty if the library no longer tells: then halving a run finds what openssl can't read."""
    return getattr(getattr(attribute, "_type", None), "name", "")


def _attribute_text(attribute: x509.NameAttribute[str | bytes]) -> str:
    return f"{attribute.rfc4514_attribute_name} as {_string_type(attribute)}"


def public_key(subject: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """The public key of a certificate or a CSR as DER."""
    return subject.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
