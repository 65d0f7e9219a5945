"""
Keys and CSRs (pure: no file, no network, no clock): a renewal's, made from the live certificate alone; texts about any CSR
or certificate for people; and a stranger's CSR, which has one unambiguous reading or is refused.
"""

from __future__ import annotations

import binascii
import ipaddress
import re
from base64 import b32encode, b64decode
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes, PrivateKeyTypes, PublicKeyTypes
from cryptography.x509.oid import ExtensionOID, NameOID

from bridge.errors import BridgeError
from bridge.pki import der
from bridge.pki.certificates import CN_OID, O_OID, UNREADABLE, attributes, extension, name_text, san_counts, san_entry
from bridge.specs import KEY_ALGORITHMS, KeyAlgorithm
from bridge.words import one_line

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

_CURVES: dict[str, ec.EllipticCurve] = {"ecdsa-p256": ec.SECP256R1(), "ecdsa-p384": ec.SECP384R1()}
_KNOWN: dict[str, KeyAlgorithm] = {algorithm: algorithm for algorithm in KEY_ALGORITHMS}


class CannotCarryError(BridgeError):
    """Part of the live certificate can't be put into a CSR."""


def algorithm_name(key: CertificatePublicKeyTypes) -> str:
    """A key's algorithm and size, such as `rsa-2048` or `ecdsa-p256`; unusual keys get other names."""
    if isinstance(key, rsa.RSAPublicKey):
        return f"rsa-{key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        names = {curve.name: name for name, curve in _CURVES.items()}
        return names.get(key.curve.name, f"ecdsa-{key.curve.name}")
    return type(key).__name__.removesuffix("PublicKey").lower()


def key_algorithm(certificate: x509.Certificate, wanted: KeyAlgorithm | Literal["same"]) -> KeyAlgorithm:
    """The new key's algorithm, by the setting `renewal.key`; "same" is the live certificate's."""
    if wanted != "same":
        return wanted
    try:
        found = algorithm_name(certificate.public_key())
    except UNREADABLE as e:
        found = f"one that can't be read ({e})"
    if found in _KNOWN:
        return _KNOWN[found]
    raise CannotCarryError(
        f"key: wanted one of {', '.join(KEY_ALGORITHMS)}, found {found} in the live certificate",
        hint='set renewal.key to one of them instead of "same"',
    )


def known_algorithm(key: CertificatePublicKeyTypes) -> KeyAlgorithm | None:
    """A key's algorithm, if kubeadm makes such keys; None: it does not."""
    return _KNOWN.get(algorithm_name(key))


def generate_key(algorithm: KeyAlgorithm) -> PrivateKey:
    """Generate a private key; other threads run meanwhile."""
    if algorithm in _CURVES:
        return ec.generate_private_key(_CURVES[algorithm])
    return rsa.generate_private_key(public_exponent=65537, key_size=int(algorithm.removeprefix("rsa-")))


def key_block(pem: bytes) -> bytes:
    """The first private key of a PEM text, which may have certificates before it; without a key, the text itself."""
    # no BEGIN within a block, so that a file of BEGIN lines is read once, not once for each line
    match = re.search(rb"-----BEGIN ([A-Z ]*PRIVATE KEY)-----(?:(?!-----BEGIN ).)*?-----END \1-----", pem, re.DOTALL)
    return match[0] + b"\n" if match else pem


#: The size of PKCS #8 and PEM around an RSA key, which itself takes a byte for each bit of its modulus.
_KEY_OVERHEAD = 400


def load_key(pem: bytes, of: PublicKeyTypes) -> PrivateKeyTypes:
    """
    Load the first private key of a PEM text, for the caller to compare with this public key (ValueError: it is broken,
    or too long for the public key).

    OpenSSL's own check of an RSA key tests its primes, which takes as long as making a key. The factors of a certificate's
    modulus are known to be primes: it is enough that the key's numbers match each other, as for Go (`crypto/rsa`).
    """
    block = key_block(pem)
    most = (of.key_size if isinstance(of, rsa.RSAPublicKey) else 0) + _KEY_OVERHEAD
    if len(block) > most:
        raise ValueError(f"wanted a private key of at most {most} bytes, found {len(block)}")
    key = serialization.load_pem_private_key(block, None, unsafe_skip_rsa_key_validation=True)
    if isinstance(key, rsa.RSAPrivateKey) and not _fits_itself(key.private_numbers()):
        raise ValueError("wanted an RSA key whose numbers fit each other, found one where they do not")
    return key


def _fits_itself(key: rsa.RSAPrivateNumbers) -> bool:
    return (
        key.p * key.q == key.public_numbers.n
        and min(key.p, key.q) > 1
        and all(key.d * key.public_numbers.e % (prime - 1) == 1 for prime in (key.p, key.q))
        and (key.dmp1, key.dmq1) == (key.d % (key.p - 1), key.d % (key.q - 1))
        and key.iqmp * key.q % key.p == 1
    )


def key_pem(key: PrivateKey) -> bytes:
    """PKCS#1 or SEC1, unencrypted, as kubeadm writes it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def build(certificate: x509.Certificate, key: PrivateKey) -> bytes:
    """Make a CSR in PEM with only the subject and SANs of the live certificate, which may have expired."""
    return build_for(naming_of(certificate), key)


def build_for(naming: Naming, key: PrivateKey) -> bytes:
    """Make a CSR in PEM with exactly these names (CannotCarryError: the encoder changes rare string types)."""
    csr = _signed(naming, key)
    if attributes(csr.subject) != attributes(naming.subject):
        wanted, found = name_text(naming.subject), name_text(csr.subject)
        raise CannotCarryError(f"subject: wanted {wanted}, a CSR can only say {found}")
    if lost := Counter(map(san_entry, naming.sans)) - san_counts(csr):
        raise CannotCarryError(f"SAN: wanted {', '.join(f'{t}:{v}' for t, v in lost)}, a CSR can't say it")
    return csr.public_bytes(serialization.Encoding.PEM)


def naming_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> Naming:
    """The subject and SANs of a certificate or CSR."""
    try:
        subject = certificate.subject
    except UNREADABLE as e:
        raise CannotCarryError(f"subject: wanted attributes that can be read, found: {e}") from None
    try:
        san = extension(certificate, x509.SubjectAlternativeName)
    except UNREADABLE as e:
        raise CannotCarryError(f"SAN: wanted names of a type that a CSR can be made with, found: {e}") from None
    if san is None and not subject:
        raise CannotCarryError("subject: the live certificate has neither a subject nor a SAN")
    return Naming(subject=subject, sans=tuple(san or ()))


def _signed(naming: Naming, key: PrivateKey) -> x509.CertificateSigningRequest:
    builder = x509.CertificateSigningRequestBuilder().subject_name(naming.subject)
    if naming.sans:
        # RFC 5280 §4.2.1.6: critical only if the subject is empty
        builder = builder.add_extension(x509.SubjectAlternativeName(naming.sans), critical=not naming.subject)
    return builder.sign(key, signature_hash(key))


def signature_hash(key: PrivateKey) -> hashes.SHA256 | hashes.SHA384:
    """The hash of a signature by this key, as Go and kubeadm choose it: SHA-256, or SHA-384 for P-384."""
    is_p384 = isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP384R1)
    return hashes.SHA384() if is_p384 else hashes.SHA256()


#: kubeadm's rule for certSANs (`ValidateCertSANs`): an RFC 1123 subdomain, or `*.` and a subdomain.
_LABEL = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_DNS = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")
_LONGEST_NAME = 253


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """The subject and SANs of a CSR: whom its certificate is for."""

    subject: x509.Name
    sans: tuple[x509.GeneralName, ...] = ()

    def is_of(self, csr: x509.CertificateSigningRequest | x509.Certificate) -> bool:
        """Whether a CSR or certificate has exactly these names, in any order."""
        sans = set(extension(csr, x509.SubjectAlternativeName) or ())
        return sorted(attributes(csr.subject)) == sorted(attributes(self.subject)) and sans == set(self.sans)

    @property
    def text(self) -> str:
        """A text for people, such as `CN=kube-apiserver with DNS:cp-1, IP:192.0.2.10`."""
        sans = ", ".join(":".join(san_entry(san)) for san in self.sans)
        return f"{name_text(self.subject) or '(empty subject)'}{f' with {sans}' if sans else ''}"


def alternative_names(texts: Iterable[str]) -> tuple[x509.GeneralName, ...]:
    """SANs without duplicates, in their order."""
    return tuple(dict.fromkeys(map(general_name, texts)))


def subject_of(common_name: str, groups: Sequence[str] = ()) -> x509.Name:
    """A subject in Go's form of `pkix.Name`: all O values in one RDN, then CN; UTF8String, which Kubernetes accepts."""
    organizations = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    rdns = [x509.RelativeDistinguishedName(organizations)] if organizations else []
    return x509.Name([*rdns, x509.RelativeDistinguishedName([common_name_of(common_name)])])


def common_name_of(text: str) -> x509.NameAttribute[str]:
    """A CN of any length, as in Go: RFC 5280 allows 64 characters, and a kubelet's with a long node name has more."""
    return x509.NameAttribute(NameOID.COMMON_NAME, text, _validate=False)


def names_of(sans: Iterable[x509.GeneralName]) -> set[tuple[str, str]]:
    """SANs as (type, value), like `certificates.san_entries`."""
    return set(map(san_entry, sans))


def general_name(text: str) -> x509.GeneralName:
    """Parse an IP address, or else a DNS name, as in kubeadm's `certSANs`; a prefix `DNS:` or `IP:` decides which."""
    kind, colon, value = text.partition(":")
    if colon and kind == "DNS":
        return _dns(value)
    found = address(value if colon and kind == "IP" else text)
    return _dns(text) if found is None else x509.IPAddress(found)


def address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Parse an IP address; None: other text, such as an address with a zone, which only one machine knows (RFC 4007 §11)."""
    try:
        return ipaddress.ip_address(text) if "%" not in text else None
    except ValueError:
        return None  # a network, as in name constraints, is no host's address


def _dns(value: str) -> x509.DNSName:
    if not _DNS.fullmatch(value.lower()) or len(value) > _LONGEST_NAME or value.replace(".", "").isdigit():
        raise ValueError(f"wanted an IP address, or a DNS name such as api.example.com, found {value[:60]!r}")
    return x509.DNSName(value)


# --- for people: one printable line, even for unreadable parts --------------------------------------------------------

_MOST_SANS = 100


def subject_line(subject: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The subject."""
    return _line("a subject", lambda: one_line(name_text(subject.subject)) or "(no subject)")


def issuer_line(certificate: x509.Certificate) -> str:
    """The issuer's name."""
    return _line("an issuer", lambda: one_line(name_text(certificate.issuer)))


def sans_line(subject: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The SANs in alphabetical order; at most as many as a policy allows."""

    def line() -> str:
        texts = [one_line(f"{kind}:{value}") for kind, value in sorted(san_counts(subject).elements())]
        more = [f"and {len(texts) - _MOST_SANS} more"] if len(texts) > _MOST_SANS else []
        return ", ".join([*texts[:_MOST_SANS], *more]) or "none"

    return _line("extensions", line)


def key_line(csr: x509.CertificateSigningRequest) -> str:
    """The key's algorithm and size."""
    return _line("one", lambda: algorithm_name(csr.public_key()))


def _line(what: str, line: Callable[[], str]) -> str:
    try:
        return line()
    except UNREADABLE as e:
        return f"({what} that can't be read: {one_line(e)})"


#: Crockford's alphabet, without I, L, O and U, which are easily confused.
_CROCKFORD = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", "0123456789ABCDEFGHJKMNPQRSTVWXYZ")


def fingerprint_text(digest_hex: str) -> str:
    """The first 100 bits of a digest (hex), as four groups of five characters: `7ZK3M-…`."""
    letters = b32encode(bytes.fromhex(digest_hex)).decode().translate(_CROCKFORD)
    return "-".join(letters[start : start + 5] for start in range(0, 20, 5))


# --- a stranger's CSR: refused if Go and OpenSSL would ignore a part or read it in two ways ------------------------------

#: A kubelet's request has less than 1 kB, a request with an RSA-4096 key and 64 names less than 5.
MAX_PEM_BYTES = 16 << 10
MAX_SANS = 64

_BLOCK = re.compile(
    rb"\s*-----BEGIN CERTIFICATE REQUEST-----[ \t]*\r?\n([A-Za-z0-9+/=\r\n \t]+)-----END CERTIFICATE REQUEST-----\s*"
)
#: PKCS#9 extensionRequest (RFC 2985 §5.4.2).
_EXTENSION_REQUEST = "1.2.840.113549.1.9.14"
_UTF8, _PRINTABLE = 0x0C, 0x13
_PRINTABLE_VALUE = re.compile(rb"[A-Za-z0-9 '()+,\-./:=?]*")
#: crypto/tls supports no larger exponent; a small exponent is weak with some paddings.
_EXPONENTS = range(65537, 1 << 31, 2)


class OddRequestError(ValueError):
    """The CSR is refused; the message says why, without any content of the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CsrData:
    """A CSR with all its contents, in a single encoding."""

    pem: bytes  #: Encoded from the DER: one block without surrounding text.
    subject: tuple[tuple[str, str], ...]  #: Pairs of (dotted OID, value), sorted.
    sans: frozenset[tuple[str, str]]  #: Pairs of (type, value), like `certificates.san_entries`.
    key: str  #: Such as `ecdsa-p256`.

    @property
    def parsed(self) -> x509.CertificateSigningRequest:
        """The CSR, parsed again, which is fast; keeping thousands of parsed CSRs would take most of their memory."""
        return x509.load_pem_x509_csr(self.pem)

    @property
    def cn(self) -> str:
        """The CN; empty if it has none."""
        return next((value for oid, value in self.subject if oid == CN_OID), "")

    @property
    def organizations(self) -> tuple[str, ...]:
        """All O values."""
        return tuple(value for oid, value in self.subject if oid == O_OID)


def read_strictly(pem: bytes) -> CsrData:
    """Read a CSR (OddRequestError)."""
    encoded = _strict_der(pem)
    try:
        csr = x509.load_der_x509_csr(encoded)
        subject, sans = _strict_subject(csr), _strict_sans(csr)
        key = _strict_key(csr)
        is_signed = csr.is_signature_valid
    except OddRequestError:
        raise
    except Exception:  # noqa: BLE001 (whatever a library raises for a stranger's bytes, it is no CSR to sign)
        raise OddRequestError("a part of the CSR can't be read") from None
    if not is_signed:
        raise OddRequestError("the CSR is not signed with its own key")
    if csr.public_bytes(serialization.Encoding.DER) != encoded:
        raise OddRequestError("the CSR is not in DER")
    usual = csr.public_bytes(serialization.Encoding.PEM)
    return CsrData(pem=pem if pem == usual else usual, subject=subject, sans=sans, key=key)  # one copy in memory


def _strict_der(pem: bytes) -> bytes:
    if len(pem) > MAX_PEM_BYTES:
        raise OddRequestError(f"the CSR has more than {MAX_PEM_BYTES >> 10} KiB")
    match = _BLOCK.fullmatch(pem)
    if match is None:
        raise OddRequestError("the request is not one PEM block of a CSR, and nothing else")
    try:
        encoded = b64decode(b"".join(match[1].split()), validate=True)
        der.one(encoded, der.SEQUENCE)
    except (binascii.Error, ValueError):
        raise OddRequestError("the CSR is not in DER") from None
    return encoded


def _strict_subject(csr: x509.CertificateSigningRequest) -> tuple[tuple[str, str], ...]:
    """Single values of string types that all parsers read alike, at most one CN (RFC 5280 §4.1.2.4)."""
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
    """OIDs of attributes other than one extensionRequest, since CAs written in Go read each list of extensions."""
    oids = [attribute.oid.dotted_string for attribute in csr.attributes]
    if _EXTENSION_REQUEST in oids:
        oids.remove(_EXTENSION_REQUEST)  # only the first; searching back for each takes seconds for a megabyte of them
    return oids


def requested(csr: x509.CertificateSigningRequest, *besides: x509.ObjectIdentifier) -> list[str]:
    """OIDs of everything that a CSR requests, `besides` the extensions that it may request."""
    extensions = [extension.oid.dotted_string for extension in csr.extensions if extension.oid not in besides]
    return [*odd_attributes(csr), *extensions]


def _strict_sans(csr: x509.CertificateSigningRequest) -> frozenset[tuple[str, str]]:
    """SANs without duplicates; any other extension or attribute is refused."""
    if odd_attributes(csr):
        raise OddRequestError("the CSR has attributes besides the requested extensions")
    if requested(csr, ExtensionOID.SUBJECT_ALTERNATIVE_NAME):
        raise OddRequestError("the CSR asks for extensions besides SANs")
    sans = san_counts(csr)
    if sans.total() > MAX_SANS:
        raise OddRequestError(f"the CSR has more than {MAX_SANS} SANs")
    if sans.total() > len(sans):
        raise OddRequestError("the CSR has a SAN twice")
    return frozenset(sans)


def _strict_key(csr: x509.CertificateSigningRequest) -> str:
    key = csr.public_key()
    if isinstance(key, rsa.RSAPublicKey) and key.public_numbers().e not in _EXPONENTS:
        raise OddRequestError("the CSR's key has an odd exponent")
    return algorithm_name(key)
