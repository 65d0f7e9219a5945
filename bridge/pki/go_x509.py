"""
Certificates that Go's crypto/x509 and crypto/tls, and so all components of Kubernetes, refuse to read or verify (pure).

The library that verifies our paths accepts more in places, and no component would start with such a certificate. The
rules are those of Go 1.26 (`parser.go`, `verify.go`, `constraints.go`); `docs/certificates.md` lists where ours are
stricter. `tests/attack/test_judge.py` compares them with Go itself on thousands of mutated answers.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from bridge.errors import Violation
from bridge.pki import der
from bridge.pki.certificates import UNREADABLE, extension, oid_label
from bridge.pki.csr import address, algorithm_name, issuer_line, subject_line
from bridge.specs import EKU
from bridge.words import one_line

#: crypto/tls makes no connection if any certificate that is sent has a longer key.
MAX_RSA_BITS = 8192

#: The curves of crypto/x509; it reads no file with a certificate on another one (`parsePublicKey` in parser.go).
_CURVES = (ec.SECP224R1, ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)

#: crypto/tls reads no certificate message of more than 256 KiB; certificates of this kind have 1 to 2 KiB.
MAX_CHAIN_BYTES = 64 * 1024

#: CAs whose parts are kept, as a CA desk compares thousands of answers with the same few.
_MOST_ISSUERS = 16

ANY_EKU = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE.dotted_string
_ANY_POLICY = "2.5.29.32.0"

#: Extensions that only CAs may have (RFC 5280 §4.2.1.5, §4.2.1.10, §4.2.1.11, §4.2.1.14).
_CA_ONLY = (
    ExtensionOID.NAME_CONSTRAINTS,
    ExtensionOID.POLICY_MAPPINGS,
    ExtensionOID.POLICY_CONSTRAINTS,
    ExtensionOID.INHIBIT_ANY_POLICY,
)
#: Critical extensions that make Go refuse the certificate (RFC 5280 §4.2.1.1, §4.2.1.2, §4.2.2.1).
_NEVER_CRITICAL = (
    ExtensionOID.SUBJECT_KEY_IDENTIFIER,
    ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
    ExtensionOID.AUTHORITY_INFORMATION_ACCESS,
)
#: Critical extensions that Go handles; any other makes the certificate invalid (RFC 5280 §4.2).
_HANDLED = {
    ExtensionOID.KEY_USAGE,
    ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.BASIC_CONSTRAINTS,
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    ExtensionOID.CERTIFICATE_POLICIES,
    ExtensionOID.CRL_DISTRIBUTION_POINTS,
    *_CA_ONLY,
}
#: Types of SANs and name constraints that Go supports.
_NAMES = (x509.DNSName, x509.IPAddress, x509.RFC822Name, x509.UniformResourceIdentifier)

_VERSION = der.context(0, constructed=True)
_UTF8, _NUMERIC, _PRINTABLE, _T61, _IA5, _BMP = 0x0C, 0x12, 0x13, 0x14, 0x16, 0x1E
#: String types of a leaf's subject, which all parsers read alike.
_LEAF_STRINGS = (_UTF8, _PRINTABLE, _IA5)
_STRING_NAMES = {
    _NUMERIC: "NumericString",
    _T61: "T61String",
    0x1A: "VisibleString",
    0x1C: "UniversalString",
    _BMP: "BMPString",
    der.OCTET_STRING: "OCTET STRING",
    der.BIT_STRING: "BIT STRING",
}
_PRINTABLE_VALUE = re.compile(rb"[A-Za-z0-9 '()+,\-./:=?*&]*")
_NUMERIC_VALUE = re.compile(rb"[0-9 ]*")
#: A host name that Go accepts in constraints; `domainNameValid` in its parser.go.
_DOMAIN = re.compile(r"(?:[!-\-/-~]{1,63}\.)*[!-\-/-~]{1,63}")
#: A URI that Go parses: a scheme, and, if there is a host, a plain name or address.
_URI = re.compile(r"[a-z][a-z0-9+.-]*:(?://[\w-]+(?:\.[\w-]+)*(?:/[\w/.~:@-]*)?|[\w.~:@-][\w/.~:@-]*)", re.ASCII)


# --- a single certificate ---------------------------------------------------------------------------------------------


def form(certificate: x509.Certificate, *, leaf: bool) -> Iterator[Violation]:
    """Parts of one certificate that Go can't read or does not support."""
    try:
        parts = _parts(certificate)
        _assert_small(_oids(certificate))
        yield from _identifiers(certificate, parts, leaf=leaf)
        yield from _name("issuer", parts.fields[2], leaf=False)
        yield from _name("subject", parts.fields[4], leaf=leaf)
        yield from _encodings(certificate, parts.fields)
        if not leaf:  # a leaf's key is ours
            yield from _kind_of_key(certificate)
        yield from _extensions(certificate, leaf=leaf)
    except ValueError as e:
        yield Violation("form", want="DER that Kubernetes can read", got=str(e))


@lru_cache(maxsize=_MOST_ISSUERS)
def _issuer_form(issuer: x509.Certificate) -> tuple[Violation, ...]:
    """`form` of a CA."""
    return tuple(form(issuer, leaf=False))


class _Parts(NamedTuple):
    """A certificate's encoded parts (RFC 5280 §4.1)."""

    size: int  #: The size of the whole certificate.
    algorithm: bytes  #: The outer signatureAlgorithm, which the signature does not cover.
    fields: tuple[der.Element, ...]  #: serialNumber, signature, issuer, validity, subject, subjectPublicKeyInfo, …


@lru_cache(maxsize=_MOST_ISSUERS)
def _parts(certificate: x509.Certificate) -> _Parts:
    encoded = certificate.public_bytes(serialization.Encoding.DER)
    signed, algorithm, *_ = der.one(encoded, der.SEQUENCE).children()
    fields = tuple(field for field in signed.children() if field.tag != _VERSION)
    return _Parts(len(encoded), algorithm.encoded, fields)


def _oids(certificate: x509.Certificate) -> Iterator[x509.ObjectIdentifier]:
    """The OIDs that Go reads."""
    yield certificate.signature_algorithm_oid
    yield from (attribute.oid for name in (certificate.issuer, certificate.subject) for attribute in name)
    for each in certificate.extensions:
        yield each.oid
        if isinstance(each.value, x509.ExtendedKeyUsage):
            yield from each.value
        if isinstance(each.value, x509.AuthorityInformationAccess):
            yield from (description.access_method for description in each.value)


def _assert_small(oids: Iterable[x509.ObjectIdentifier]) -> None:
    """Refuse an OID with a number of more than 31 bits (as in OIDs made of UUIDs), which Go can't read."""
    for oid in oids:
        first, second, *rest = map(int, oid.dotted_string.split("."))
        if max(40 * first + second, *rest) >= 1 << 31:  # the first two are one number (X.690 §8.19.4)
            raise ValueError("an object identifier with a number of more than 31 bits")


def _identifiers(certificate: x509.Certificate, parts: _Parts, *, leaf: bool) -> Iterator[Violation]:
    """The serial number is not negative (old CAs of kubeadm have 0); the signature's two algorithm names are equal."""
    if not leaf and certificate.serial_number < 0:
        yield Violation("serial number", want="a positive number", got=str(certificate.serial_number))
    if parts.algorithm != parts.fields[1].encoded:
        yield Violation("signature", want="one algorithm", got="two that differ")


def _name(label: str, name: der.Element, *, leaf: bool) -> Iterator[Violation]:
    """Each attribute has a string type that Go reads, with content that the type allows."""
    for rdn in name.children():
        for attribute in rdn.children():
            _, value = attribute.children()
            if not _is_readable(value, leaf=leaf):
                got = _STRING_NAMES.get(value.tag, f"type {value.tag}" if value.tag not in _LEAF_STRINGS else "")
                want = "UTF8String, PrintableString or IA5String" if leaf else "a string type that Go reads"
                yield Violation(label, want=want, got=got or "a value that its string type does not allow")


def _is_readable(value: der.Element, *, leaf: bool) -> bool:
    if leaf and value.tag not in _LEAF_STRINGS:
        return False
    allowed = _ALLOWED.get(value.tag)
    return allowed is not None and allowed(value.content)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_bmp(content: bytes) -> bool:
    """UCS-2 without surrogates and noncharacters; a zero at the end is removed."""
    points = [int.from_bytes(content[i : i + 2]) for i in range(0, len(content), 2)]
    odd = (range(0xD800, 0xE000), range(0xFDD0, 0xFDF0), range(0xFFFE, 0x10000))
    return len(content) % 2 == 0 and not any(point in some for point in points for some in odd)


#: The allowed content of each string type.
_ALLOWED: dict[int, Callable[[bytes], bool]] = {
    _UTF8: _is_utf8,
    _PRINTABLE: lambda content: _PRINTABLE_VALUE.fullmatch(content) is not None,
    _IA5: bytes.isascii,
    _NUMERIC: lambda content: _NUMERIC_VALUE.fullmatch(content) is not None,
    _T61: lambda _: True,
    _BMP: _is_bmp,
}


def _encodings(certificate: x509.Certificate, fields: Sequence[der.Element]) -> Iterator[Violation]:
    """The encoding of the key follows RFC 3279 §2.3, and of times RFC 5280 §4.1.2.5, since Go reads no other."""
    key = certificate.public_key()
    plain = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if fields[5].encoded != plain:
        yield Violation("public key", want="one in its usual encoding", got="one that Go can't read")
    if isinstance(key, rsa.RSAPublicKey):
        exponent = key.public_numbers().e
        if key.key_size > MAX_RSA_BITS:
            yield Violation("key size", want=f"RSA of at most {MAX_RSA_BITS} bits", got=f"{key.key_size} bits")
        if exponent % 2 == 0 or not 1 < exponent < 1 << 31:
            yield Violation("public key", want="an odd exponent below 2^31", got=f"{exponent:#x}"[:40])


def _kind_of_key(ca: x509.Certificate) -> Iterator[Violation]:
    key = ca.public_key()
    is_curve = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES)
    if not is_curve and not isinstance(key, rsa.RSAPublicKey | ed25519.Ed25519PublicKey):
        want = "RSA, ECDSA on P-224, P-256, P-384 or P-521, or Ed25519, which Kubernetes can read"
        yield Violation("public key", want=want, got=algorithm_name(key))


def _extensions(certificate: x509.Certificate, *, leaf: bool) -> Iterator[Violation]:
    for each in certificate.extensions:
        if each.critical:
            yield from _critical(each)
        if leaf and each.oid in _CA_ONLY:
            yield Violation("extension", want="none that is for CAs", got=_label(each.oid))
        if (check := _VALUE_CHECKS.get(type(each.value))) is not None:
            yield from check(each.value, each.critical)
    _mappings(certificate)  # raises if they are no pairs


def _critical(each: x509.Extension[x509.ExtensionType]) -> Iterator[Violation]:
    """Go refuses some extensions that are critical against the RFC, and every unknown critical extension."""
    if each.oid in _NEVER_CRITICAL:
        yield Violation("critical extension", want=f"{_label(each.oid)} not critical", got="it is")
    elif each.oid not in _HANDLED:
        yield Violation("critical extension", want="none that Kubernetes does not know", got=_label(each.oid))


def _label(oid: x509.ObjectIdentifier) -> str:
    return oid_label(oid.dotted_string)


def _sans(names: x509.SubjectAlternativeName, critical: bool) -> Iterator[Violation]:
    """A critical SAN extension needs a name that Go supports; URIs and addresses must be well-formed."""
    if critical and not any(isinstance(name, _NAMES) for name in names):
        yield Violation("SAN", want="a name that Kubernetes knows, since it is critical", got="none")
    for name in names:
        if isinstance(name, x509.UniformResourceIdentifier) and not _URI.fullmatch(name.value):
            yield Violation("SAN", want="a URI with a plain host name", got=one_line(repr(name.value), 80))
        if isinstance(name, x509.IPAddress) and isinstance(name.value, ipaddress.IPv4Network | ipaddress.IPv6Network):
            yield Violation("SAN", want="IP addresses", got=f"a network, {name.value}")


def _constraints(constraints: x509.NameConstraints, critical: bool) -> Iterator[Violation]:
    """Name constraints are of types that Go supports, with readable values."""
    subtrees = [*(constraints.permitted_subtrees or ()), *(constraints.excluded_subtrees or ())]
    for base in subtrees:
        if not isinstance(base, _NAMES):
            if critical:
                got = f"{type(base).__name__}"
                yield Violation("name constraints", want="DNS, IP, email and URI names alone", got=got)
        elif not _is_constraint(base):
            yield Violation("name constraints", want="names that Go can compare", got=one_line(repr(base.value), 80))


def _is_constraint(base: x509.GeneralName) -> bool:
    if isinstance(base, x509.IPAddress):
        return isinstance(base.value, ipaddress.IPv4Network | ipaddress.IPv6Network)
    value = str(base.value)
    if isinstance(base, x509.UniformResourceIdentifier) and address(value) is not None:
        return False
    return value == "" or _DOMAIN.fullmatch(value.removeprefix(".")) is not None


def _crl_points(points: x509.CRLDistributionPoints, _: bool) -> Iterator[Violation]:
    """Go reads no distribution point whose name is relative to its issuer (RFC 5280 §4.2.1.13)."""
    if any(point.relative_name is not None for point in points):
        yield Violation("CRL distribution points", want="full names", got="one relative to its issuer")


def _certificate_policies(policies: x509.CertificatePolicies, _: bool) -> Iterator[Violation]:
    """Policies do not repeat (RFC 5280 §4.2.1.4)."""
    twice = [oid for oid, count in Counter(policy.policy_identifier for policy in policies).items() if count > 1]
    if twice:
        yield Violation("certificate policies", want="each once", got=f"{_label(twice[0])} twice")


#: Checks by type of extension; each also gets whether the extension is critical.
_VALUE_CHECKS: dict[type[x509.ExtensionType], Callable[[Any, bool], Iterator[Violation]]] = {
    x509.SubjectAlternativeName: _sans,
    x509.NameConstraints: _constraints,
    x509.CRLDistributionPoints: _crl_points,
    x509.CertificatePolicies: _certificate_policies,
}


# --- a path -----------------------------------------------------------------------------------------------------------


def path(
    leaf: x509.Certificate, intermediates: Sequence[x509.Certificate], anchor: x509.Certificate, ekus: Iterable[EKU]
) -> Iterator[Violation]:
    """Steps that Go does not follow in a path that the library has built."""
    for issuer in (*intermediates, anchor):
        who = "the CA" if issuer is anchor else f"intermediate {subject_line(issuer)}"
        for violation in _issuer_form(issuer):
            want = f"{violation.subject} with {violation.want} in each issuer"
            yield Violation("chain", want=want, got=f"{violation.got} in {who}")
        yield from _covers(issuer, who, ekus)
    whole = (leaf, *intermediates, anchor)
    try:
        yield from _links(whole)
        yield from _policies((leaf, *intermediates))
        yield from _constrained(whole)
    except UNREADABLE as e:
        yield Violation("chain", want="issuers that can be read", got=str(e))


def limits(issuer: x509.Certificate, ekus: Iterable[EKU], names: Iterable[x509.GeneralName]) -> Iterator[Violation]:
    """Limits of a CA by which no certificate with these usages and SANs can work below it."""
    wanted = list(ekus)
    listed = {usage.dotted_string for usage in extension(issuer, x509.ExtendedKeyUsage) or ()}
    lacking = sorted(eku.label for eku in wanted if eku.value not in listed)
    if ANY_EKU in listed and lacking:
        got = "anyExtendedKeyUsage, which OpenSSL does not accept in a CA"
        yield Violation("EKU", want=f"{' and '.join(lacking)}, or no EKU", got=got)
    yield from _covers(issuer, "the CA", wanted)
    yield from _outside(names, issuer)


def _covers(issuer: x509.Certificate, who: str, ekus: Iterable[EKU]) -> Iterator[Violation]:
    """An issuer's EKUs, if it has any, limit those below it, anchors included (`checkChainForKeyUsage` in verify.go)."""
    listed = extension(issuer, x509.ExtendedKeyUsage)
    if listed is None:
        return
    found = {usage.dotted_string for usage in listed}
    lacking = sorted(eku.label for eku in ekus if eku.value not in found)
    if lacking and ANY_EKU not in found:
        got = f"{who} with EKU {', '.join(sorted(map(oid_label, found)))} alone"
        yield Violation("chain", want=f"issuers whose EKU covers {' and '.join(lacking)}", got=got)


def _links(whole: Sequence[x509.Certificate]) -> Iterator[Violation]:
    """Names are equal byte by byte, path lengths count every issuer, no CA is repeated, and all fit into a message."""
    parts = [_parts(each) for each in whole]
    for child, below, above in zip(whole, parts, parts[1:], strict=False):
        if below.fields[2] != above.fields[4]:
            yield Violation("chain", want="issuer names that are encoded alike", got=issuer_line(child))
    for count, issuer in enumerate(whole[1:]):
        constraints = extension(issuer, x509.BasicConstraints)
        if constraints and constraints.path_length is not None and count > constraints.path_length:
            got = f"{count} below {subject_line(issuer)}"
            yield Violation("chain", want=f"at most {constraints.path_length} intermediates", got=got)
    if len({(part.fields[4].encoded, part.fields[5].encoded) for part in parts}) < len(whole):
        yield Violation("chain", want="each CA once", got="two certificates of one name and key")
    size = sum(part.size for part in parts[:-1])
    if size > MAX_CHAIN_BYTES:
        yield Violation("chain", want=f"at most {MAX_CHAIN_BYTES} bytes", got=f"{size} bytes")


def _policies(sent: Sequence[x509.Certificate]) -> Iterator[Violation]:
    """If an issuer requires policies, all certificates below it must share one (RFC 5280 §6.1 allows more)."""
    mapped = [(each, pairs) for each in sent if (pairs := _mappings(each))]
    constraints = [(each, extension(each, x509.PolicyConstraints)) for each in sent]
    demanded = [each for each, own in constraints if own is not None and own.require_explicit_policy is not None]
    if any(_ANY_POLICY_DER in pair for _, pairs in mapped for pair in pairs):
        yield Violation("chain", want="no policy mapped from or to anyPolicy", got=subject_line(mapped[0][0]))
    if not demanded:
        return
    common = set.intersection(*map(_policy_oids, sent)) - {_ANY_POLICY}
    if mapped or not common:
        got = f"none, and policyConstraints in {subject_line(demanded[0])}"
        yield Violation("chain", want="one certificate policy in the whole path, not mapped", got=got)


_ANY_POLICY_DER = bytes([0x55, 0x1D, 32, 0])


def _mappings(certificate: x509.Certificate) -> list[tuple[bytes, bytes]]:
    """The pairs of policies in policyMappings (RFC 5280 §4.2.1.5), which the library does not read."""
    values = [each.value for each in certificate.extensions if each.oid == ExtensionOID.POLICY_MAPPINGS]
    pairs = [pair for value in values for pair in der.one(value.public_bytes(), der.SEQUENCE).children()]
    found = [der.one(pair.encoded, der.SEQUENCE).children() for pair in pairs]
    if any([part.tag for part in pair] != [der.OID, der.OID] for pair in found):
        raise ValueError("policyMappings that are no pairs of policies")
    return [(issuer.content, subject.content) for issuer, subject in found]


def _policy_oids(certificate: x509.Certificate) -> set[str]:
    policies = extension(certificate, x509.CertificatePolicies)
    return {policy.policy_identifier.dotted_string for policy in policies or ()}


# --- name constraints -------------------------------------------------------------------------------------------------


def _constrained(whole: Sequence[x509.Certificate]) -> Iterator[Violation]:
    """All SANs below a constrained issuer satisfy its constraints (RFC 5280 §4.2.1.10), as in Go."""
    for index, issuer in enumerate(whole):
        for below in whole[:index]:
            yield from _outside(extension(below, x509.SubjectAlternativeName) or (), issuer)


def _outside(names: Iterable[x509.GeneralName], issuer: x509.Certificate) -> Iterator[Violation]:
    """Names that an issuer's constraints exclude."""
    constraints = extension(issuer, x509.NameConstraints)
    if constraints is None:
        return
    for name in names:
        if isinstance(name, _NAMES) and not _is_within(name, constraints):
            want = f"names within the constraints of {subject_line(issuer)}"
            yield Violation("chain", want=want, got=one_line(repr(name.value), 80))


def _is_within(name: x509.GeneralName, constraints: x509.NameConstraints) -> bool:
    if isinstance(name, x509.RFC822Name | x509.UniformResourceIdentifier):
        return False  # kubeadm makes none, and only Go knows how to compare them
    if isinstance(name, x509.DNSName) and not _DOMAIN.fullmatch(name.value):
        return False
    permitted = [base for base in constraints.permitted_subtrees or () if type(base) is type(name)]
    excluded = [base for base in constraints.excluded_subtrees or () if type(base) is type(name)]
    if any(_matches(name, base) or _is_wildcard_of(name, base) for base in excluded):
        return False
    return not permitted or any(_matches(name, base) for base in permitted)


def _matches(name: x509.GeneralName, base: x509.GeneralName) -> bool:
    if isinstance(name, x509.IPAddress):
        return isinstance(base.value, ipaddress.IPv4Network | ipaddress.IPv6Network) and name.value in base.value
    value, end = str(name.value).lower(), str(base.value).lower()
    return end in ("", value) or value.endswith(end if end.startswith(".") else f".{end}")


def _is_wildcard_of(name: x509.GeneralName, base: x509.GeneralName) -> bool:
    if not isinstance(name, x509.DNSName) or not name.value.startswith("*"):
        return False
    return str(base.value).lower().partition(".")[2] == name.value.lower().partition(".")[2]
