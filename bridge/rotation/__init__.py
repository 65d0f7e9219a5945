"""
The replacement of a CA while the cluster runs (trust both, issue from the new one, trust it alone), and its rules (pure).

We read the phase off the CA file, the CA data of kubeconfigs and the issuers of the leaves, and record it nowhere.
kubeadm and our own checks take the first certificate of a CA file as the CA that signs (measured on 1.37), so the order
in the file matters; the order in a kubeconfig does not.

The rules about a new CA come from measurements on Kubernetes 1.37 and OpenSSL 3.0: Go tries every CA with the issuer's
name, OpenSSL takes the first without a conflicting key identifier, and kubeadm compares whole certificates.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509

from bridge.errors import BridgeError, Violation
from bridge.pki import go_x509
from bridge.pki.certificates import UNREADABLE, extension, fingerprint, is_ca, is_signed_by, name_text, spki
from bridge.pki.expiry import minute
from bridge.specs import CA, EKU, SPECS, Authority

Bundle = tuple[x509.Certificate, ...]

#: The certificates of the cluster's other CAs, and of their next ones, by name; an error: they can't be read.
OtherCas = Mapping[str, Bundle | BridgeError]


class Phase(enum.Enum):
    """A state in which a node can stay; kubeadm's commands work in each."""

    OLD = "old"
    TRUSTED = "trusted"  #: The node trusts both CAs; the old CA signs.
    ISSUED = "issued"  #: The node trusts both CAs; the new CA signs.
    NEW = "new"


@dataclass(frozen=True, slots=True)
class Change:
    """The old CA and the new one."""

    old: x509.Certificate
    new: x509.Certificate
    cross: x509.Certificate | None = None  #: The new CA's name and key, signed by the old CA.

    @property
    def keeps_key(self) -> bool:
        """Whether both have the same key, and only the certificate is new."""
        return spki(self.old.public_key()) == spki(self.new.public_key())

    @property
    def path(self) -> tuple[Phase, ...]:
        """The phases from the old CA to the new one; a CA that keeps its key needs no new leaves."""
        return (Phase.OLD, Phase.NEW) if self.keeps_key else (Phase.OLD, Phase.TRUSTED, Phase.ISSUED, Phase.NEW)

    @property
    def spares(self) -> Phase | None:
        """The phase that a node may skip: with a cross certificate, clients of the old CA accept new leaves."""
        return Phase.TRUSTED if self.cross is not None and not self.keeps_key else None

    @property
    def steps(self) -> Iterator[tuple[Phase, Phase]]:
        """The steps from phase to phase that a node can take."""
        yield from itertools.pairwise(self.path)
        if self.spares is not None:
            yield from itertools.pairwise(phase for phase in self.path if phase is not self.spares)

    def bundle(self, phase: Phase) -> Bundle:
        """Return the certificates of the CA file in a phase, in order."""
        return {
            Phase.OLD: (self.old,),
            Phase.TRUSTED: (self.old, self.new),
            Phase.ISSUED: (self.new, self.old),
            Phase.NEW: (self.new,),
        }[phase]

    @property
    def bundles(self) -> set[frozenset[x509.Certificate]]:
        """The CAs of each phase, in any order."""
        return {frozenset(self.bundle(phase)) for phase in self.path}

    def signer(self, phase: Phase) -> x509.Certificate:
        """Return the CA that issued all leaves of a phase."""
        return self.bundle(phase)[0]

    def before(self, phase: Phase) -> Phase | None:
        """Return the phase to which `back` leads; None: this is the first."""
        earlier = self.path[: self.path.index(phase)]
        return earlier[-1] if earlier else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a node's files say about one CA."""

    bundle: Bundle  #: The certificates of the CA file.
    kubeconfigs: Mapping[str, Bundle]  #: The CA data of each kubeconfig with any, by path; only for `ca`.
    leaves: Mapping[str, x509.Certificate | None]  #: The CA to which each leaf leads, by name; None: neither.


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The progress of one CA's replacement on a node."""

    phase: Phase | None  #: The last phase that the files reached; None: they match no phase.
    next: Phase | None = None  #: The phase that is half done; None: none.
    differing: tuple[str, ...] = ()  #: Differences from the nearest phase, as sentences, if `phase` is None.

    @property
    def text(self) -> str:
        """`trusted`, `trusted → issued`, or `unknown`."""
        if self.phase is None:
            return "unknown"
        return self.phase.value if self.next is None else f"{self.phase.value} → {self.next.value}"


def standing(seen: Seen, change: Change) -> Standing:
    """Find the phase of the files; a phase is half done if each file is as in that phase or in the one before it."""
    path = change.path
    lacking = {phase: differences(seen, change, phase) for phase in path}
    for phase in reversed(path):  # without leaves and kubeconfigs, the CA file alone decides
        if not lacking[phase]:
            return Standing(phase=phase)
    for phase, later in change.steps:
        if lacking[phase].keys().isdisjoint(lacking[later]):
            return Standing(phase=phase, next=later)
    return Standing(phase=None, differing=tuple(min(lacking.values(), key=len).values()))


def differences(seen: Seen, change: Change, phase: Phase) -> dict[str, str]:
    """Describe what differs from a phase, by path or leaf name, in sentences and in the order of installation."""
    bundle, signer = change.bundle(phase), change.signer(phase)
    held = {path: data for path, data in seen.kubeconfigs.items() if set(data) != set(bundle)}
    if seen.bundle != bundle:
        held = {"CA file": seen.bundle, **held}
    lines = {place: f"{place}: wanted {texts(bundle)}, found {texts(data)}" for place, data in held.items()}
    for name, ca in seen.leaves.items():
        if ca != signer and not change.keeps_key:  # with one key, each leaf leads to both CAs
            of_what = text(ca) if ca else "neither"
            lines[name] = f"{name}: wanted a certificate of {text(signer)}, found one of {of_what}"
    return lines


def texts(bundle: Sequence[x509.Certificate]) -> str:
    """Format the CAs of a bundle for the screen."""
    return ", then ".join(map(text, bundle)) or "no CA"


def text(ca: x509.Certificate) -> str:
    """Format a CA for the screen, with its fingerprint, since two CAs may share a name."""
    return f"{name_text(ca.subject)} ({fingerprint(ca)[:8]})"


#: The least age of a new CA: clocks of nodes differ (Kubernetes reckons with five minutes), and this wait comes once.
OLD_ENOUGH = timedelta(hours=1)


def new_ca_violations(
    change: Change, authority: Authority, chains: Mapping[str, Bundle], others: OtherCas, now: datetime
) -> Iterator[Violation]:
    """Yield why the new CA can't replace the old one, by the old CA's leaves here and the cluster's other CAs."""
    new, leaves = change.new, {name: chain[0] for name, chain in chains.items()}
    try:
        unfit = [*_is_a_ca(new), *_valid(new, now), *_kinds(new, authority, leaves)]
        yield from unfit
        yield from _keys(new, others)
        # a fault of the CA itself appears once, and not again with each certificate in use
        yield from _same_key(change, {} if unfit else chains) if change.keeps_key else _another_key(change, leaves)
        if change.cross is not None and not change.keeps_key:
            yield from _cross(change, change.cross, now)
    except UNREADABLE as e:
        yield Violation(subject="new CA", want="a certificate that can be read", got=str(e))


def _is_a_ca(new: x509.Certificate) -> Iterator[Violation]:
    """Kubernetes rejects a trust bundle with a certificate that is no CA (ClusterTrustBundle validation)."""
    if not is_ca(new):
        yield Violation(subject="basicConstraints", want="CA:TRUE", got="none, or CA:FALSE")
    usage = extension(new, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        yield Violation(subject="keyUsage", want="keyCertSign", got="a CA that may not sign certificates")
    yield from go_x509.form(new, leaf=False)


def _valid(new: x509.Certificate, now: datetime) -> Iterator[Violation]:
    begin, end = new.not_valid_before_utc, new.not_valid_after_utc
    if begin > now:
        yield Violation(subject="notBefore", want=f"at the latest {minute(now)}", got=minute(begin))
    if end <= now:
        yield Violation(subject="notAfter", want=f"later than {minute(now)}", got=minute(end))


def untimely(change: Change, now: datetime, *, outlasts: bool = True) -> Iterator[Violation]:
    """Yield why a replacement should not begin yet except in an emergency; `outlasts`: the new CA must end later."""
    begin, end = change.new.not_valid_before_utc, change.new.not_valid_after_utc
    if now - OLD_ENOUGH < begin <= now:
        want = f"at the latest {minute(now - OLD_ENOUGH)}, since clocks of nodes differ"
        yield Violation(subject="notBefore", want=want, got=minute(begin))
    if outlasts and now < end <= change.old.not_valid_after_utc:
        want = f"later than the old CA's ({minute(change.old.not_valid_after_utc)})"
        yield Violation(subject="notAfter", want=want, got=minute(end))


def _keys(new: x509.Certificate, others: OtherCas) -> Iterator[Violation]:
    """If two of the cluster's CAs share a key, each kubeconfig can open etcd, or be any user at the front proxy."""
    key = spki(new.public_key())
    for name, certificates in others.items():
        if isinstance(certificates, BridgeError):
            yield Violation(subject="key", want=f"another than {name}'s", got=f"not known: {certificates}")
        elif any(spki(certificate.public_key()) == key for certificate in certificates):
            yield Violation(subject="key", want=f"another than {name}'s", got="the same")


#: A name that each API server's certificate has (kubeadm, `GetAPIServerAltNames`).
_API_SERVER = x509.DNSName("kubernetes.default.svc")


def _kinds(new: x509.Certificate, authority: Authority, leaves: Mapping[str, x509.Certificate]) -> Iterator[Violation]:
    """A certificate of each kind must work below the new CA, also of kinds that this node does not have."""
    ekus = {eku for spec in SPECS.values() if spec.authority == authority for eku in spec.ekus}
    names = [name for leaf in leaves.values() for name in extension(leaf, x509.SubjectAlternativeName) or ()]
    yield from go_x509.limits(new, ekus, dict.fromkeys([*names, _API_SERVER] if authority == CA else names))


def stops_openssl(change: Change) -> bool:
    """
    Whether programs with OpenSSL's usual rules accepted the old CA, and refuse the new one.

    Without X509_V_FLAG_PARTIAL_CHAIN a path has to end in a self-signed certificate (`verify_chain` of OpenSSL 3.0:
    "unable to get issuer certificate"). Go, curl, and Python from 3.13 on accept any trusted certificate.
    """
    return _is_self_signed(change.old) and not _is_self_signed(change.new)


def _is_self_signed(ca: x509.Certificate) -> bool:
    return is_signed_by(ca, ca) and _authority_key_id(ca) in (None, _key_id(ca))


def _cross(change: Change, cross: x509.Certificate, now: datetime) -> Iterator[Violation]:
    """Yield why old clients can't use the cross: OpenSSL compares key identifiers, Go EKUs and path lengths."""
    old, new = change.old, change.new
    same = {
        "subject": new.subject.public_bytes() == cross.subject.public_bytes(),
        "key": spki(new.public_key()) == spki(cross.public_key()),
        "subjectKeyIdentifier": _key_id(new) == _key_id(cross),
    }
    for subject in (name for name, is_same in same.items() if not is_same):
        yield Violation(subject=f"cross certificate's {subject}", want="the new CA's", got="another one, or none")
    if not is_signed_by(cross, old):
        got = f"one of {name_text(cross.issuer)}"
        yield Violation(subject="cross certificate", want=f"a signature of {text(old)}", got=got)
    if _key_id(old) is not None and _authority_key_id(cross) != _key_id(old):
        want = "the old CA's subjectKeyIdentifier, which clients look for"
        yield Violation(subject="cross certificate's authorityKeyIdentifier", want=want, got="another one, or none")
    for violation in (*_is_a_ca(cross), *_valid(cross, now), *_unlimited(old, cross)):
        yield Violation(subject=f"cross certificate's {violation.subject}", want=violation.want, got=violation.got)


def _unlimited(old: x509.Certificate, cross: x509.Certificate) -> Iterator[Violation]:
    """A limit in the new CA's certificate binds all clients; one in the old CA or the cross only old clients."""
    limits = extension(old, x509.BasicConstraints)
    if limits is not None and limits.path_length == 0:
        got = "pathlen:0 in the old CA, which forbids it"
        yield Violation(subject="path", want="an old CA that may certify another one", got=got)
    for name, kind in (("nameConstraints", x509.NameConstraints), ("extendedKeyUsage", x509.ExtendedKeyUsage)):
        if extension(cross, kind) is not None:
            yield Violation(subject=name, want="none", got="one, which old clients alone would obey")


def _another_key(change: Change, leaves: Mapping[str, x509.Certificate]) -> Iterator[Violation]:
    """If both CAs have one name, OpenSSL tells them apart only by key identifiers, and tries only one."""
    lacking: list[str] = []
    if change.old.subject == change.new.subject:
        cas = {"old": change.old, "new": change.new}
        lacking = [f"subjectKeyIdentifier in the {which} CA" for which, ca in cas.items() if _key_id(ca) is None]
        if names := [name for name, leaf in leaves.items() if _authority_key_id(leaf) is None]:
            lacking.append(f"authorityKeyIdentifier in {', '.join(names)}")
    for what in lacking:
        want = "another subject than the old CA's, or key identifiers in both CAs and each certificate"
        yield Violation(subject="subject", want=want, got=f"the same, and no {what}")
    if _key_id(change.new) is None:
        want = "one (RFC 5280 §4.2.1.2), by which OpenSSL and Python find the CA of a certificate"
        yield Violation(subject="subjectKeyIdentifier", want=want, got="none")


def _same_key(change: Change, chains: Mapping[str, Bundle]) -> Iterator[Violation]:
    """If a CA keeps its key, old leaves must lead to it in Go (subject's bytes) and OpenSSL (key identifier)."""
    old, new = change.old, change.new
    if old.subject.public_bytes() != new.subject.public_bytes():
        got = f"{text(new)}, encoded in another way" if old.subject == new.subject else text(new)
        yield Violation(subject="subject", want=f"the bytes of {text(old)}, whose key it has", got=got)
    if _key_id(new) not in (None, _key_id(old)):
        got = "another one for the same key"
        yield Violation(subject="subjectKeyIdentifier", want="the old CA's, or none", got=got)
    for name, (leaf, *above) in chains.items():
        yield from (dataclasses.replace(each, subject=f"{name} below it") for each in _still_works(leaf, above, new))


def _still_works(
    leaf: x509.Certificate, above: Sequence[x509.Certificate], new: x509.Certificate
) -> Iterator[Violation]:
    """A certificate in use, with its own usages, must work below the new certificate from the first moment."""
    listed = {usage.dotted_string for usage in extension(leaf, x509.ExtendedKeyUsage) or ()}
    intermediates = [ca for ca in above if spki(ca.public_key()) != spki(new.public_key())]
    yield from go_x509.path(leaf, intermediates, new, [eku for eku in EKU if eku.value in listed])
    last = [leaf, *intermediates][-1]
    identifier = extension(last, x509.AuthorityKeyIdentifier)
    serial = None if identifier is None else identifier.authority_cert_serial_number
    if serial not in (None, new.serial_number):
        want = f"the serial number {serial:x} of its CA, which its authorityKeyIdentifier names to OpenSSL"
        yield Violation(subject="serial number", want=want, got=f"{new.serial_number:x}")


def _key_id(ca: x509.Certificate) -> bytes | None:
    identifier = extension(ca, x509.SubjectKeyIdentifier)
    return None if identifier is None else identifier.digest


def _authority_key_id(leaf: x509.Certificate) -> bytes | None:
    identifier = extension(leaf, x509.AuthorityKeyIdentifier)
    return None if identifier is None else identifier.key_identifier
