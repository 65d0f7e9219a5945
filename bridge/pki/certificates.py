"""Reads X.509: PEM files as Kubernetes reads them, and certificates as plain values. No files, no clock, no keys."""

from __future__ import annotations

import base64
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import NameOID

from bridge.pki import der
from bridge.specs import EKU

# Every CA that kubeadm made up to 1.20 has serial number 0 and is used for ten years. cryptography warns about that at
# each load and each access to the number; a filter for the whole process, since `warnings.catch_warnings` swaps
# global state and is not thread-safe.
warnings.filterwarnings(
    "ignore", message="Parsed a serial number which wasn't positive", category=CryptographyDeprecationWarning
)

# Long node names make a CN longer than the 64 characters of RFC 5280's upper bound, which Kubernetes accepts.
warnings.filterwarnings("ignore", message="Attribute's length must be", category=UserWarning)
# Servers and Windows write PKCS#7 in BER (RFC 5652 §10.1 allows it), which is read anyway.
warnings.filterwarnings("ignore", message="PKCS#7 certificates could not be parsed as DER", category=UserWarning)

CN_OID, O_OID = NameOID.COMMON_NAME.dotted_string, NameOID.ORGANIZATION_NAME.dotted_string

#: The shortest public half of a key, a P-256 point, has 65 bytes after a zero byte.
_SHORTEST_PUBLIC = 64

_BEGIN = re.compile(rb"^-----BEGIN CERTIFICATE-----[ \t]*\r?$", re.MULTILINE)
_END = b"-----END CERTIFICATE-----"

#: The library's errors for a certificate, and for parts of it that it parses on demand: a name or key that can't be
#: decoded, an attribute of the wrong type, an extension that occurs twice or is of an unknown kind.
UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


def load_pem_certificates(data: bytes) -> list[x509.Certificate]:
    """All certificates of a PEM text, in order; like Go's `cert.ParseCertsPEM` it skips all else; a damaged block is an error."""
    certificates = [_load(body, number) for number, body in enumerate(_bodies(data), start=1) if b":" not in body]
    if not certificates:
        raise ValueError("no PEM block of type CERTIFICATE")
    return certificates


def _bodies(data: bytes) -> Iterator[bytes]:
    """The bytes between the BEGIN and END lines of each PEM block."""
    for begin in _BEGIN.finditer(data):
        end = data.find(_END, begin.end())
        body = data[begin.end() : end]
        if end < 0 or b"-----" in body:
            raise ValueError(f"a PEM block that begins at byte {begin.start()} and has no end")
        yield body


def _load(body: bytes, number: int) -> x509.Certificate:
    try:
        der = base64.b64decode(b"".join(body.split()), validate=True)
    except ValueError:
        raise ValueError(f"PEM block {number} is not base64") from None
    try:
        return load_der_certificate(der)
    except ValueError as e:
        raise ValueError(f"PEM block {number} is not an X.509 certificate: {e}") from e


def load_der_certificate(der: bytes) -> x509.Certificate:
    """Load a certificate with readable names; its key and extensions may still be `UNREADABLE`."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        _ = certificate.subject, certificate.issuer  # or printing them would fail
    except UNREADABLE as e:
        raise ValueError(str(e)) from e
    return certificate


def pem(*certificates: x509.Certificate) -> bytes:
    """PEM blocks as kubeadm writes them: 64 characters a line, LF, a newline at the end."""
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def serial_hex(certificate: x509.Certificate) -> str:
    """The serial number as `openssl x509 -serial` prints it: upper-case pairs of hex digits."""
    number = certificate.serial_number  # 0 for a CA that kubeadm up to 1.20 made
    digits = f"{abs(number):X}"
    return f"{'-' if number < 0 else ''}{digits.zfill(len(digits) + len(digits) % 2)}"


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 over the DER bytes, lower-case hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def csr_fingerprint(csr: x509.CertificateSigningRequest) -> str:
    """SHA-256 over the DER bytes, lower-case hex."""
    return sha256(csr.public_bytes(Encoding.DER)).hexdigest()


def attributes(name: x509.Name) -> list[tuple[str, str]]:
    """The (dotted OID, value) of every attribute, in the certificate's order; a value that is no text as `#HEX`."""
    pairs = [(attribute.oid.dotted_string, attribute.value) for attribute in name]
    return [(oid, value if isinstance(value, str) else f"#{value.hex()}") for oid, value in pairs]


def subject_pattern(text: str, node: str) -> list[tuple[str, str]] | None:
    """A pattern's attributes in alphabetical order; None: it is not a subject."""
    try:
        return sorted(attributes(x509.Name.from_rfc4514_string(text.replace("{node}", node))))
    except ValueError:
        return None


def subject_text(items: Sequence[tuple[str, str]]) -> str:
    """A subject as text for people."""
    labels = {CN_OID: "CN", O_OID: "O"}
    return ",".join(f"{labels.get(oid, oid)}={value}" for oid, value in items) or "(empty)"


def common_names(name: x509.Name) -> list[str]:
    """The CNs of a name; a certificate has one CN, and of several Go uses the last."""
    return [value for oid, value in attributes(name) if oid == CN_OID]


def name_text(name: x509.Name) -> str:
    """A name as text for people (RFC 4514, so the last attribute comes first)."""
    return name.rfc4514_string()


def oid_label(oid: str) -> str:
    """An OID with its name if the library knows one, such as `codeSigning (1.3.6.1.5.5.7.3.3)`."""
    name = x509.ObjectIdentifier(oid)._name  # noqa: SLF001 (no public table of names exists)
    return oid if name == "Unknown OID" else f"{name} ({oid})"


def san_entries(subject: x509.Certificate | x509.CertificateSigningRequest) -> set[tuple[str, str]]:
    """The SANs as (type, value): DNS, IP (normalised), email, URI, otherName, dirName, registeredID."""
    return set(san_counts(subject))


def san_counts(subject: x509.Certificate | x509.CertificateSigningRequest) -> Counter[tuple[str, str]]:
    """How often each of `san_entries` occurs in the extension."""
    return Counter(map(san_entry, extension(subject, x509.SubjectAlternativeName) or ()))


_SAN_TYPES: dict[type[x509.GeneralName], str] = {
    x509.DNSName: "DNS",
    x509.IPAddress: "IP",
    x509.RFC822Name: "email",
    x509.UniformResourceIdentifier: "URI",
    x509.OtherName: "otherName",
    x509.DirectoryName: "dirName",
    x509.RegisteredID: "registeredID",
}


def san_entry(name: x509.GeneralName) -> tuple[str, str]:
    """One SAN as (type, value), like `san_entries`."""
    match name:
        case x509.DirectoryName():
            value = name_text(name.value)
        case x509.RegisteredID():
            value = name.value.dotted_string
        case x509.OtherName():
            value = f"{name.type_id.dotted_string}:{name.value.hex()}"
        case _:
            value = str(name.value)
    return _SAN_TYPES[type(name)], value


def extended_key_usages(subject: x509.Certificate | x509.CertificateSigningRequest) -> frozenset[str] | None:
    """The EKUs' OIDs in dotted form; None: the extension is missing, which allows any purpose."""
    usages = extension(subject, x509.ExtendedKeyUsage)
    return None if usages is None else frozenset(usage.dotted_string for usage in usages)


def is_ca(certificate: x509.Certificate) -> bool:
    """Whether BasicConstraints has CA:TRUE; False if the extensions can't be read."""
    try:
        constraints = extension(certificate, x509.BasicConstraints)
    except UNREADABLE:
        return False
    return constraints is not None and constraints.ca


def extension(subject: x509.Certificate | x509.CertificateSigningRequest, kind: type[_Extension]) -> _Extension | None:
    """The value of one extension, None if it is absent."""
    try:
        return subject.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except (x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as e:
        raise ValueError(str(e)) from e


def certificates_in(data: bytes) -> list[x509.Certificate]:
    """All certificates of a file from a person or program: PEM, DER or PKCS#7, under any name."""
    from cryptography.hazmat.primitives.serialization import pkcs7  # noqa: PLC0415 (it loads a parser of mail)

    standard = re.sub(rb"-----(BEGIN|END) (?:CMS|PKCS #7 SIGNED DATA)-----", rb"-----\1 PKCS7-----", data)
    if b"-----BEGIN PKCS7-----" in standard:
        return _of_pkcs7(pkcs7.load_pem_pkcs7_certificates, standard)
    if b"-----BEGIN" in data:
        return load_pem_certificates(data)
    try:
        return [load_der_certificate(data)]
    except ValueError:
        return _of_pkcs7(pkcs7.load_der_pkcs7_certificates, data)


def _of_pkcs7(load: Callable[[bytes], list[x509.Certificate]], data: bytes) -> list[x509.Certificate]:
    try:
        certificates = load(data)
        for certificate in certificates:
            _ = certificate.subject, certificate.issuer  # the library reads them only now
    except UNREADABLE:
        raise ValueError("no certificate in PEM, DER or PKCS#7") from None
    return certificates


def is_for(certificate: x509.Certificate, csr: x509.CertificateSigningRequest) -> bool:
    """Whether the certificate is for the CSR's key."""
    try:
        return spki(certificate.public_key()) == spki(csr.public_key())
    except UNREADABLE:  # a key of a type that Kubernetes can't use
        return False


def key_and_usages(certificate: x509.Certificate) -> tuple[bytes, frozenset[str] | None]:
    """SubjectPublicKeyInfo (DER) and EKUs, which identify a CA's answer to a lost request."""
    return spki(certificate.public_key()), extended_key_usages(certificate)


def asked_key_and_usages(csr_pem: bytes, ekus: Iterable[EKU]) -> tuple[bytes, frozenset[str]]:
    """Like `key_and_usages`, for a request; an empty key for an unreadable CSR, which no CA has signed."""
    try:
        return spki(x509.load_pem_x509_csr(csr_pem).public_key()), frozenset(eku.value for eku in ekus)
    except UNREADABLE:
        return b"", frozenset()


def spki(key: PublicKeyTypes) -> bytes:
    """A public key as certificates encode it (RFC 5280 §4.1.2.7)."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def is_signed(csr: x509.CertificateSigningRequest) -> bool:
    """Whether a CSR is signed with its own key."""
    try:
        return csr.is_signature_valid
    except (UnsupportedAlgorithm, ValueError, TypeError):
        return False


def is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether this issuer's key made the signature, and the certificate names this issuer; dates do not count."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # noqa: BLE001 (for whatever reason, this issuer did not sign it)
        return False
    return True


#: No CA has longer chains, and a loop must end.
_MOST_INTERMEDIATES = 8


def leads_to(certificates: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate]) -> bool:
    """Whether the certificates (leaf, then intermediates) lead to one of these CAs, at any time."""
    return anchor_of(certificates, anchors) is not None


def anchor_of(certificates: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate]) -> x509.Certificate | None:
    """The CA that the certificates (leaf, then intermediates) lead to; of several, the last to end."""
    current, *intermediates = certificates
    found: list[x509.Certificate] = []
    for _ in range(_MOST_INTERMEDIATES + 1):
        found += [anchor for anchor in anchors if is_signed_by(current, anchor)]
        above = [each for each in intermediates if each != current and is_ca(each) and is_signed_by(current, each)]
        if found or not above:
            break
        current = above[0]
    return max(found, key=lambda anchor: anchor.not_valid_after_utc, default=None)


_KEY = re.compile(rb"-----BEGIN ([A-Z ]*)PRIVATE KEY-----(.*?)-----END \1PRIVATE KEY-----", re.DOTALL)


def has_key_of(pem: bytes, certificate: x509.Certificate) -> bool | None:
    """Whether a PEM text holds the certificate's private key, by its public half; None: the key can't be compared."""
    match = _KEY.search(pem)
    if match is None:
        return False
    try:
        public = _public_half(base64.b64decode(b"".join(match[2].split()), validate=True))
    except (ValueError, IndexError):
        return None
    return None if public is None else public in certificate.tbs_certificate_bytes


def _public_half(encoded: bytes) -> bytes | None:
    """An RSA key's modulus (RFC 8017 §A.1.2), an elliptic curve key's point (RFC 5915 §3), or either in PKCS #8."""
    version, *parts = der.one(encoded, der.SEQUENCE).children()
    if version.tag != der.INTEGER or not parts:
        return None
    if parts[0].tag == der.INTEGER:
        return parts[0].content if len(parts[0].content) >= _SHORTEST_PUBLIC else None
    if parts[0].tag == der.SEQUENCE and len(parts) > 1:
        return _public_half(parts[1].content)
    points = [part.children()[0].content for part in parts if part.tag == der.context(1, constructed=True)]
    return points[0] if points and len(points[0]) >= _SHORTEST_PUBLIC else None
