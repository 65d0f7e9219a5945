"""
Verifies that a CA's answer is exactly the requested certificate (pure: no file, no network, no clock).

kubeadm checks little more than the chain, so this module checks every property that makes a certificate work, and
reports all violations at once; `bridge.pki.go_x509` adds what Go can't read or verify. Not checked: revocation (no
control-plane component checks it).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import pairwise

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509 import verification
from cryptography.x509.oid import NameOID

from bridge.contract import Issued, SignRequest
from bridge.errors import VerificationError, Violation
from bridge.pki import expiry, go_x509
from bridge.pki.certificates import (
    UNREADABLE,
    attributes,
    extended_key_usages,
    extension,
    fingerprint,
    is_ca,
    is_signed_by,
    name_text,
    oid_label,
    san_counts,
    spki,
)
from bridge.pki.csr import algorithm_name, issuer_line
from bridge.pki.expiry import day
from bridge.specs import EKU
from bridge.words import one_line

#: How far a CA's clock may be ahead of the node's; the installation waits until then.
CLOCK_SKEW = expiry.CLOCK_SKEW

#: How much earlier than the replaced certificate's the new end may be: CAs count the validity from a backdated
#: beginning (cfssl by 5 minutes by default), and a certificate may be renewed right after it was issued.
BACKDATING = timedelta(hours=1)

#: CAs backdate by minutes, a few by hours; an earlier beginning means an old certificate or a wrong clock.
LONGEST_BACKDATING = timedelta(days=2)

#: CAs count the longest validity from their own beginning, and round.
_ROUNDING = timedelta(minutes=10)

MIN_RSA_BITS = 2048
_STRONG_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_TIME = "%Y-%m-%d %H:%M:%S"
_WEAK_HASHES = (hashes.MD5, hashes.SHA1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """The node's demands on every certificate below one authority."""

    #: All certificates of the CA file. Only the first is a trust anchor for kubeadm (1.21 and newer, measured on 1.37).
    anchors: tuple[x509.Certificate, ...]
    anchor_name: str  #: For messages, such as `etcd/ca.crt`.
    now: datetime  #: Aware, in UTC.
    min_validity: timedelta
    shorter_allowed: bool = False  #: The certificate may end before the one that it replaces.
    intermediates_allowed: bool = True  #: False below kubeadm 1.21, which reads one certificate a file.
    #: Pairs of (OID, value): subject attributes that this CA always adds, which the settings allow.
    extra_subject: frozenset[tuple[str, str]] = frozenset()
    longest: timedelta | None = None  #: The longest lifetime from now; None: the CA's profile decides.
    longest_name: str = ""  #: The setting with that limit, for messages.
    #: An earlier CA's certificate for the first anchor, appended to each leaf for clients that trust only that CA.
    cross: x509.Certificate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A leaf that passed, with the intermediates that follow it in its file, each certifying the one before it."""

    leaf: x509.Certificate
    intermediates: tuple[x509.Certificate, ...]
    cross: tuple[x509.Certificate, ...] = ()  #: At most one: see `Expectation.cross`.

    @property
    def chain(self) -> tuple[x509.Certificate, ...]:
        """The certificates for its file."""
        return (self.leaf, *self.intermediates, *self.cross)


def check(issued: Issued, request: SignRequest, expected: Expectation) -> Verified:
    """Compare a CA's answer with our request, never with other data from the CA (VerificationError)."""
    violations = list(_unreadable(issued, expected))
    path: tuple[x509.Certificate, ...] = ()
    if not violations:
        violations = list(_violations(issued, request, expected))
        path, broken = _chain(issued, expected, request.spec.ekus)
        violations += broken
        if expected.cross is not None:
            below = _below_cross((issued.leaf, *path), expected.cross)
            violations += [violation for violation in below if violation not in violations]
    if violations:
        raise VerificationError(request.spec.name, violations)
    return Verified(leaf=issued.leaf, intermediates=path, cross=(expected.cross,) if expected.cross is not None else ())


def error_of(issued: Issued, request: SignRequest, expected: Expectation) -> VerificationError | None:
    """Why an answer fails `check`; None: it passes."""
    try:
        check(issued, request, expected)
    except VerificationError as e:
        return e
    return None


#: Parts that the library parses on demand.
_PARTS: dict[str, Callable[[x509.Certificate], object]] = {
    "subject": lambda certificate: certificate.subject,
    "issuer": lambda certificate: certificate.issuer,
    "notBefore": lambda certificate: certificate.not_valid_before_utc,
    "notAfter": lambda certificate: certificate.not_valid_after_utc,
    "public key": lambda certificate: certificate.public_key(),
    "extensions": lambda certificate: certificate.extensions,
}


def _unreadable(issued: Issued, expected: Expectation) -> Iterator[Violation]:
    """Unreadable parts of the answer and of the node's CA certificate, with which no other check makes sense."""
    for part, why in _parts_unreadable(issued.leaf):
        yield Violation(part, want="one that can be read", got=why)
    for intermediate in issued.intermediates:
        for part, why in _parts_unreadable(intermediate):
            yield Violation(part, want="one that can be read", got=f"an intermediate's that can't: {why}")

    for anchor in expected.anchors[:1]:
        for part, why in _parts_unreadable(anchor):
            want = f"a CA certificate in {expected.anchor_name} that can be read"
            yield Violation("chain", want=want, got=f"one whose {part} can't: {why}")


@lru_cache(maxsize=16)  # a CA desk compares thousands of answers with the same few CAs
def _parts_unreadable(certificate: x509.Certificate) -> list[tuple[str, str]]:
    unreadable = []
    for part, read in _PARTS.items():
        try:
            read(certificate)
        except UNREADABLE as e:
            unreadable.append((part, str(e)))
    return unreadable


def _violations(issued: Issued, request: SignRequest, expected: Expectation) -> Iterator[Violation]:
    """All violations of the leaf itself, without its chain."""
    leaf, csr = issued.leaf, request.csr
    yield from _public_key(leaf, csr)
    yield from _subject(leaf, request, expected.extra_subject)
    yield from _form(leaf)
    yield from _dates(leaf, request, expected)
    yield from _sans(leaf, request)
    yield from _ekus(leaf, request)
    yield from _key_usage(leaf, encipherment=request.names is None)
    yield from _not_a_ca(leaf)
    yield from go_x509.form(leaf, leaf=True)


def _public_key(leaf: x509.Certificate, csr: x509.CertificateSigningRequest) -> Iterator[Violation]:
    """The key is the request's, compared in encoded form (RFC 5280 §4.1.2.7), and strong enough."""
    key = leaf.public_key()
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < MIN_RSA_BITS:
        yield Violation("key size", want=f"RSA of at least {MIN_RSA_BITS} bits", got=f"{key.key_size} bits")
    if isinstance(key, ec.EllipticCurvePublicKey) and not isinstance(key.curve, _STRONG_CURVES):
        yield Violation("curve", want="P-256, P-384 or P-521", got=key.curve.name)
    if spki(key) != spki(csr.public_key()):
        yield Violation("public key", want="the key of the CSR", got=f"another {algorithm_name(key)} key")


def _subject(leaf: x509.Certificate, request: SignRequest, extra: frozenset[tuple[str, str]]) -> Iterator[Violation]:
    """The subject has the same attributes and values, in any order, since CAs written in Go rebuild the name."""
    if request.names is None:
        subject = request.csr.subject
    else:
        cn = request.names.common_name
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)] if cn else [])
    want, got = Counter(attributes(subject)), Counter(attributes(leaf.subject))
    if {*(got - want), *(set(want) - set(got))} - extra:
        yield Violation("subject", want=name_text(subject) or "(empty)", got=name_text(leaf.subject) or "(empty)")


def _sans(leaf: x509.Certificate, request: SignRequest) -> Iterator[Violation]:
    """The SANs are the same, none repeated more often; critical with an empty subject (RFC 5280 §4.2.1.6)."""
    names = request.names
    if names is None:
        want = san_counts(request.csr)
    else:
        want = Counter([*(("URI", uri) for uri in names.uris), *(("DNS", name) for name in names.dns)])
    got = san_counts(leaf)
    if got - want or set(want) - set(got):
        yield Violation("SAN", want=_san_text(want), got=_san_text(got))
    is_critical = any(field.critical for field in leaf.extensions if field.oid == x509.SubjectAlternativeName.oid)
    if names is not None and not names.common_name and not is_critical:
        yield Violation("SAN", want="critical, since the subject is empty", got="not critical")


def _san_text(names: Counter[tuple[str, str]]) -> str:
    return ", ".join(f"{kind}:{value}" for kind, value in sorted(names.elements())) or "none"


def _ekus(leaf: x509.Certificate, request: SignRequest) -> Iterator[Violation]:
    """The EKUs are exactly the spec's; path validation would accept more, or none at all (RFC 5280 §4.2.1.12)."""
    want = frozenset(eku.value for eku in request.spec.ekus)
    got = extended_key_usages(leaf)
    if got != want:
        yield Violation("EKU", want=_eku_text(want), got=_eku_text(got) if got is not None else "no EKU extension")


def _eku_text(oids: Iterable[str]) -> str:
    labels = {eku.value: eku.label for eku in EKU} | {go_x509.ANY_EKU: "anyExtendedKeyUsage"}
    return ", ".join(sorted(labels.get(oid) or oid_label(oid) for oid in oids))


def _key_usage(leaf: x509.Certificate, *, encipherment: bool) -> Iterator[Violation]:
    """digitalSignature for TLS 1.3 and ECDHE, `encipherment` for RSA key exchange as in kubeadm, no right of a CA."""
    usage = extension(leaf, x509.KeyUsage)
    enciphers = encipherment and isinstance(leaf.public_key(), rsa.RSAPublicKey)
    want = "digitalSignature, keyEncipherment" if enciphers else "digitalSignature"
    if usage is None:
        yield Violation("KeyUsage", want=want, got="no KeyUsage extension")
    elif not usage.digital_signature or (enciphers and not usage.key_encipherment):
        yield Violation("KeyUsage", want=want, got=_key_usage_text(usage))
    elif usage.key_cert_sign or usage.crl_sign:
        yield Violation("KeyUsage", want=f"{want} without keyCertSign and cRLSign", got=_key_usage_text(usage))


def _key_usage_text(usage: x509.KeyUsage) -> str:
    names = {
        "digitalSignature": usage.digital_signature,
        "contentCommitment": usage.content_commitment,
        "keyEncipherment": usage.key_encipherment,
        "dataEncipherment": usage.data_encipherment,
        "keyAgreement": usage.key_agreement,
        "keyCertSign": usage.key_cert_sign,
        "cRLSign": usage.crl_sign,
    }
    return ", ".join(name for name, is_set in names.items() if is_set) or "none"


def _not_a_ca(leaf: x509.Certificate) -> Iterator[Violation]:
    """BasicConstraints may be absent (kubeadm up to 1.20 wrote none), but never has CA:TRUE."""
    constraints = extension(leaf, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        yield Violation("BasicConstraints", want="CA:FALSE", got="CA:TRUE")


def _form(leaf: x509.Certificate) -> Iterator[Violation]:
    """Version 3, a positive serial number (RFC 5280 §4.1.2.2), no signature by SHA-1 or MD5 (Go refuses both)."""
    if leaf.version is not x509.Version.v3:
        yield Violation("version", want="v3", got=leaf.version.name)
    if leaf.serial_number <= 0:
        yield Violation("serial number", want="a positive number", got=str(leaf.serial_number))
    if (weak := _weak_algorithm(leaf)) is not None:
        yield Violation("signature", want="SHA-256 or stronger", got=weak)


def _weak_algorithm(certificate: x509.Certificate) -> str | None:
    """The signature's algorithm, if its hash is weak or the library does not know it; None: it is strong."""
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return oid_label(certificate.signature_algorithm_oid.dotted_string)
    return algorithm.name if isinstance(algorithm, _WEAK_HASHES) else None


def _dates(leaf: x509.Certificate, request: SignRequest, expected: Expectation) -> Iterator[Violation]:
    """Valid now and for long enough, ending after the replaced one and before its CA; or the clock may be wrong."""
    begin, end, now = leaf.not_valid_before_utc, leaf.not_valid_after_utc, expected.now
    is_old = now - begin > LONGEST_BACKDATING
    clock = f" (it begins at {begin:{_TIME}} UTC, and {_which_clock(now)})" if is_old else ""
    if begin > now + CLOCK_SKEW:
        yield Violation("notBefore", want="not in the future", got=f"{begin:{_TIME}} UTC ({_which_clock(now)})")
    if end <= now:
        yield Violation("notAfter", want="in the future", got=f"{end:{_TIME}} UTC{clock}")
    elif end - now < expected.min_validity:
        want = f"at least {_days(expected.min_validity)} of validity"
        yield Violation("notAfter", want=want, got=f"{_days(end - now)}, until {end:{_TIME}} UTC{clock}")
    if expected.longest is not None and end - now > expected.longest + _ROUNDING:
        by = f" ({expected.longest_name})" if expected.longest_name else ""
        want = f"at most {expiry.duration_text(expected.longest)}{by}"
        yield Violation("notAfter", want=want, got=f"until {end:{_TIME}} UTC")
    old = request.replaces
    if old is not None and not expected.shorter_allowed and is_shorter(end, old):
        want = f"not before the replaced certificate's {old.not_valid_after_utc:{_TIME}} UTC"
        got = f'{end:{_TIME}} UTC (shorter = "allow" in [renewal] takes it, if the CA is meant to give less)'
        yield Violation("notAfter", want=want, got=got)
    if expected.anchors and end > expected.anchors[0].not_valid_after_utc:
        want = f"not after its CA's {expected.anchors[0].not_valid_after_utc:{_TIME}} UTC"
        yield Violation("notAfter", want=want, got=f"{end:{_TIME}} UTC")


def is_shorter(end: datetime, old: x509.Certificate) -> bool:
    """Whether a certificate with this end would end before the one that it replaces, apart from backdating."""
    return end <= old.not_valid_after_utc - BACKDATING


def _which_clock(now: datetime) -> str:
    return f"this node's clock says {now:{_TIME}} UTC; is one of the two wrong?"


def _days(duration: timedelta) -> str:
    if duration >= timedelta(days=2):
        return f"{duration.days}d"
    seconds = int(duration.total_seconds())
    return f"{seconds // 3600}h" if duration >= timedelta(hours=2) else f"{seconds}s"


def _chain(
    issued: Issued, expected: Expectation, ekus: Iterable[EKU]
) -> tuple[tuple[x509.Certificate, ...], list[Violation]]:
    """The intermediates of a path to the node's trust anchor (RFC 5280 §6), and violations."""
    if not expected.anchors:
        return (), [Violation("chain", want=f"a CA certificate in {expected.anchor_name}", got="none")]
    anchor = expected.anchors[0]
    # the leaf's own dates are checked separately
    leaf = issued.leaf
    time = min(max(expected.now, leaf.not_valid_before_utc), leaf.not_valid_after_utc)
    try:
        # other roots lead nowhere, and their cross certificates share name and key; the latest to end comes first, since
        # the path should use the newest version of an intermediate
        others = [intermediate for intermediate in issued.intermediates if not _is_root(intermediate)]
        newest = sorted(others, key=lambda certificate: certificate.not_valid_after_utc, reverse=True)
        path = verified_path(leaf, newest, anchor, time)
    except verification.VerificationError as e:
        want = f"a path to {expected.anchor_name} ({name_text(anchor.subject)}, SHA-256 {fingerprint(anchor)[:16]}…)"
        subject, got = _why_no_path(issued, expected, time, str(e))
        return (), [Violation(subject, want=want, got=got)]
    intermediates = tuple(path[1:-1])
    broken = _path_violations(leaf, intermediates, anchor, expected)
    return intermediates, [*broken, *go_x509.path(leaf, intermediates, anchor, ekus)]


def _path_violations(
    leaf: x509.Certificate, intermediates: Sequence[x509.Certificate], anchor: x509.Certificate, expected: Expectation
) -> Iterator[Violation]:
    """Violations beyond path validation: issuers that may not sign, or that end before the leaf."""
    for issuer in intermediates:
        if leaf.not_valid_after_utc > issuer.not_valid_after_utc:
            want = f"not after its intermediate {name_text(issuer.subject)}'s {issuer.not_valid_after_utc:{_TIME}} UTC"
            yield Violation("notAfter", want=want, got=f"{leaf.not_valid_after_utc:{_TIME}} UTC")
    for certificate, issuer in pairwise((leaf, *intermediates, anchor)):
        yield from _authority_key(certificate, issuer)
        usage = extension(issuer, x509.KeyUsage)
        if usage is not None and not usage.key_cert_sign:
            who = f"{name_text(issuer.subject)} with keyUsage {_key_usage_text(usage)}"
            yield Violation("chain", want="issuers that may sign certificates", got=who)
    if intermediates and not expected.intermediates_allowed:
        want = f"a leaf signed by {expected.anchor_name} itself (kubeadm below 1.21 reads one certificate a file)"
        yield Violation("chain", want=want, got=f"one signed through {name_text(intermediates[0].subject)}")


def _authority_key(certificate: x509.Certificate, issuer: x509.Certificate) -> Iterator[Violation]:
    """OpenSSL accepts no issuer with another key identifier, or another issuer and serial number (RFC 5280 §4.2.1.1)."""
    identifier = extension(certificate, x509.AuthorityKeyIdentifier)
    if identifier is None:
        return
    key_id = extension(issuer, x509.SubjectKeyIdentifier)
    if key_id is not None and identifier.key_identifier not in (None, key_id.digest):
        want = f"the subjectKeyIdentifier of {name_text(issuer.subject)}"
        yield Violation("authorityKeyIdentifier", want=want, got="another one")
    if identifier.authority_cert_serial_number not in (None, issuer.serial_number):
        want = f"the serial number of {name_text(issuer.subject)}, {issuer.serial_number:x}, or none"
        yield Violation("authorityKeyIdentifier", want=want, got=f"{identifier.authority_cert_serial_number:x}")


def _below_cross(chain: Sequence[x509.Certificate], cross: x509.Certificate) -> Iterator[Violation]:
    """Reasons for OpenSSL not to accept the cross certificate as issuer: the AKI (RFC 5280 §4.2.1.1), or its path length."""
    identifier = extension(chain[-1], x509.AuthorityKeyIdentifier)
    if identifier is not None and identifier.authority_cert_serial_number is not None:
        want = "a key identifier alone, since the cross certificate has another issuer and serial number"
        yield Violation("authorityKeyIdentifier", want=want, got="an issuer and serial number, too")
    else:
        yield from _authority_key(chain[-1], cross)
    length = getattr(extension(cross, x509.BasicConstraints), "path_length", None)
    if length is not None and length < len(chain) - 1:
        want, got = f"at most {length} intermediates below the cross certificate", str(len(chain) - 1)
        yield Violation("chain", want=want, got=got)


def _why_no_path(issued: Issued, expected: Expectation, time: datetime, reason: str) -> tuple[str, str]:
    """Whether chain or issuer is wrong, and what was found instead of a path; `reason` is the library's."""
    leaf, anchor, name = issued.leaf, expected.anchors[0], expected.anchor_name
    if not is_valid_at(anchor, expected.now):
        return "chain", f"{name} is valid only {validity_text(anchor, expected.now)}"
    if (other := next((other for other in expected.anchors[1:] if _leads_to(issued, other, time)), None)) is not None:
        found = f"a path to another certificate of the same file ({name_text(other.subject)})"
        return "chain", f"{found}; kubeadm takes only the first"
    candidates = [c for c in (*issued.intermediates, anchor) if c.subject == leaf.issuer]
    if not candidates:
        return "issuer", f"issuer {name_text(leaf.issuer)}, and no certificate of that name"
    if _weak_algorithm(leaf) is None:  # the library can't verify weak signatures
        signers = [candidate for candidate in candidates if is_signed_by(leaf, candidate)]
        if not signers:
            return "issuer", f"another key under the name {name_text(leaf.issuer)}"
        if anchor not in signers and all(signer.subject == signer.issuer for signer in signers):
            return "issuer", f"another root ({name_text(signers[0].subject)}, SHA-256 {fingerprint(signers[0])[:16]}…)"
    return "chain", reason.removeprefix("validation failed: ").removeprefix("candidates exhausted: ")


def is_valid_at(certificate: x509.Certificate, time: datetime) -> bool:
    """Whether a certificate's dates include this time."""
    return certificate.not_valid_before_utc <= time <= certificate.not_valid_after_utc


def validity_text(certificate: x509.Certificate, now: datetime) -> str:
    """Its dates and this node's clock, for messages: either may explain why it is not valid now."""
    dates = f"{day(certificate.not_valid_before_utc)} to {day(certificate.not_valid_after_utc)}"
    return f"from {dates} ({_which_clock(now)})"


def _is_root(certificate: x509.Certificate) -> bool:
    return certificate.subject == certificate.issuer and is_signed_by(certificate, certificate)


def _leads_to(issued: Issued, anchor: x509.Certificate, time: datetime) -> bool:
    try:
        verified_path(issued.leaf, issued.intermediates, anchor, time)
    except verification.VerificationError:
        return False
    return True


# An anchor needs basicConstraints (Go requires it too); the checks above cover all other extensions, since the
# library's own policies are those of the public web: a SAN everywhere, an AKI, no wildcard CAs
_ANY_EXTENSIONS = verification.ExtensionPolicy.permit_all()
_CA_EXTENSIONS = _ANY_EXTENSIONS.require_present(x509.BasicConstraints, verification.Criticality.AGNOSTIC, None)


def verified_path(
    leaf: x509.Certificate, intermediates: Sequence[x509.Certificate], anchor: x509.Certificate, time: datetime
) -> list[x509.Certificate]:
    """The path from leaf to anchor, by signatures, names, dates, CA:TRUE, path lengths, constraints; not KeyUsage."""
    if leaf == anchor:
        return [leaf]
    builder = verification.PolicyBuilder().store(verification.Store([anchor])).time(time)
    builder = builder.extension_policies(ca_policy=_CA_EXTENSIONS, ee_policy=_ANY_EXTENSIONS)
    return builder.build_client_verifier().verify(leaf, list(intermediates)).chain


def client_problem(leaf: x509.Certificate, anchors: Sequence[x509.Certificate], now: datetime) -> str:
    """Why a TLS client's certificate is refused; empty: an anchor itself signed it, it is for clients, and it is valid."""
    try:
        usages = extended_key_usages(leaf)
        if is_ca(leaf) or EKU.CLIENT_AUTH.value not in (usages or ()):
            found = "a CA's" if is_ca(leaf) else f"one for {_eku_text(usages or ()) or 'no named usage'}"
            return f"wanted a client's certificate (clientAuth), found {found}"
        if not is_valid_at(leaf, now):
            return f"wanted a certificate that is valid now, found one that is only {validity_text(leaf, now)}"
        for anchor in anchors:
            with contextlib.suppress(verification.VerificationError):
                verified_path(leaf, (), anchor, now)
                usage = extension(anchor, x509.KeyUsage)
                if usage is None or usage.key_cert_sign:
                    return ""
    except UNREADABLE as e:
        return f"wanted a certificate that can be read, found: {one_line(e)}"
    wanted = " or ".join(dict.fromkeys(name_text(anchor.subject) for anchor in anchors)) or "a CA that counts here"
    return f"wanted a certificate that {wanted} signed, found one by {issuer_line(leaf)}"
