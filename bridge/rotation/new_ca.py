"""
Whether a new CA can take the old one's place (pure): asked before anything is replaced.

Each rule has its source in measurements against Kubernetes 1.37 and OpenSSL 3.0: Go tries every CA of a name, OpenSSL
takes the first whose key identifier does not contradict, and kubeadm compares certificates whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta

from cryptography import x509

from bridge.errors import Violation
from bridge.pki import go_x509
from bridge.pki.certificates import UNREADABLE, extension, is_ca, spki
from bridge.pki.expiry import minute
from bridge.rotation.phases import Change, Kind, text

#: Nodes' clocks differ; the reference of Kubernetes' own CAs is five minutes, and a CA is made once.
OLD_ENOUGH = timedelta(hours=1)


def violations(
    change: Change,
    leaves: Mapping[str, x509.Certificate],
    others: Mapping[str, Iterable[x509.Certificate]],
    now: datetime,
) -> Iterator[Violation]:
    """
    Why the new CA can't take the old one's place, whenever that is.

    Args:
        change: Both CAs.
        leaves: The leaves of the old CA on this node, by name.
        others: The CAs of the cluster's other authorities, old and new ones, by the authority's name.
        now: The time.

    Yields:
        What was wanted of the new CA, and found.
    """
    new = change.new
    try:
        yield from _is_a_ca(new)
        yield from _valid(new, now)
        yield from _keys(new, others)
        yield from _same_key(change) if change.kind is Kind.SAME_KEY else _same_name(change, leaves)
    except UNREADABLE as e:
        yield Violation(subject="new CA", want="a certificate that can be read", got=str(e))


def _is_a_ca(new: x509.Certificate) -> Iterator[Violation]:
    """Kubernetes refuses a trust bundle with a certificate that is no CA (ClusterTrustBundle's validation)."""
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
    """Why a new CA, which `outlasts` the old one, should not begin to take its place, unless that can't wait."""
    begin, end = change.new.not_valid_before_utc, change.new.not_valid_after_utc
    if now - OLD_ENOUGH < begin <= now:
        want = f"at the latest {minute(now - OLD_ENOUGH)}, since clocks of nodes differ"
        yield Violation(subject="notBefore", want=want, got=minute(begin))
    if outlasts and now < end <= change.old.not_valid_after_utc:
        want = f"later than the old CA's ({minute(change.old.not_valid_after_utc)})"
        yield Violation(subject="notAfter", want=want, got=minute(end))


def _keys(new: x509.Certificate, others: Mapping[str, Iterable[x509.Certificate]]) -> Iterator[Violation]:
    """One key for two of the cluster's CAs: each kubeconfig would open etcd, or speak for every user at the front proxy."""
    ours = spki(new.public_key())
    for name, certificates in others.items():
        if any(spki(one.public_key()) == ours for one in certificates):
            yield Violation(subject="key", want=f"another than {name}'s", got="the same")


def _same_name(change: Change, leaves: Mapping[str, x509.Certificate]) -> Iterator[Violation]:
    """With one name for both, OpenSSL tells the CAs apart by key identifiers alone, and tries one only."""
    old, new = change.old, change.new
    if old.subject != new.subject:
        return
    what = "another subject than the old CA's, or key identifiers in both CAs and each certificate"
    for which, ca in (("old", old), ("new", new)):
        if _key_id(ca) is None:
            yield Violation(
                subject="subject", want=what, got=f"the same, and no subjectKeyIdentifier in the {which} CA"
            )
    lacking = [name for name, leaf in leaves.items() if _authority_key_id(leaf) is None]
    if lacking:
        got = f"the same, and no authorityKeyIdentifier in {', '.join(lacking)}"
        yield Violation(subject="subject", want=what, got=got)


def _same_key(change: Change) -> Iterator[Violation]:
    """A renewed CA: leaves stay, and must lead to it for Go (the subject's bytes) and for OpenSSL (the key identifier)."""
    old, new = change.old, change.new
    if old.subject.public_bytes() != new.subject.public_bytes():
        got = f"{text(new)}, encoded in another way" if old.subject == new.subject else text(new)
        yield Violation(subject="subject", want=f"the bytes of {text(old)}, whose key it has", got=got)
    if _key_id(new) not in (None, _key_id(old)):
        yield Violation(
            subject="subjectKeyIdentifier", want="the old CA's, or none", got="another one for the same key"
        )


def _key_id(ca: x509.Certificate) -> bytes | None:
    found = extension(ca, x509.SubjectKeyIdentifier)
    return None if found is None else found.digest


def _authority_key_id(leaf: x509.Certificate) -> bytes | None:
    found = extension(leaf, x509.AuthorityKeyIdentifier)
    return None if found is None else found.key_identifier
