"""Whether a live certificate has its name's identity (pure), so that no renewal copies an intruder's; dates don't count."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from cryptography import x509

from bridge.errors import Violation
from bridge.pki.certificates import O_OID, UNREADABLE, attributes, common_names, is_ca, is_signed_by, san_entries
from bridge.specs import CertificateSpec
from bridge.words import one_line

#: No CA has longer chains, and a circle must end.
_MOST_INTERMEDIATES = 8
#: A node's name in the cluster (RFC 1123 subdomain, which is what Kubernetes takes).
_NODE = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


def check(
    spec: CertificateSpec,
    certificates: Sequence[x509.Certificate],
    anchors: Sequence[x509.Certificate],
    anchor_name: str,
    extra: frozenset[tuple[str, str]] = frozenset(),
) -> list[Violation]:
    """Violations of a live certificate: another CA, another user, or other groups."""
    leaf = certificates[0]
    try:
        return [*_issuer(certificates, anchors, anchor_name), *_user(spec, leaf), *_groups(spec, leaf, extra)]
    except UNREADABLE as e:
        return [Violation(subject="subject", want="one that can be read", got=one_line(e))]


def _issuer(
    certificates: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate], anchor_name: str
) -> Iterator[Violation]:
    leaf = certificates[0]
    if not leads_to(certificates, anchors):
        from bridge.pki.csr import issuer_line  # noqa: PLC0415 (for what is wrong alone)

        yield Violation(
            subject="issuer",
            want=f"a signature of a CA in {anchor_name}, expired or not",
            got=f"one of {issuer_line(leaf)}" if leaf.issuer != leaf.subject else "a self-signed certificate",
        )


def leads_to(certificates: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate]) -> bool:
    """Whether the certificates (the leaf, then intermediates) lead to one of these CAs, at any time."""
    return anchor_of(certificates, anchors) is not None


def anchor_of(certificates: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate]) -> x509.Certificate | None:
    """The CA that the certificates (the leaf, then intermediates) lead to; of several, the last to end."""
    current, *intermediates = certificates
    found: list[x509.Certificate] = []
    for _ in range(_MOST_INTERMEDIATES + 1):
        found += [anchor for anchor in anchors if is_signed_by(current, anchor)]
        above = [each for each in intermediates if each != current and is_ca(each) and is_signed_by(current, each)]
        if found or not above:
            break
        current = above[0]
    return max(found, key=lambda anchor: anchor.not_valid_after_utc, default=None)


def _user(spec: CertificateSpec, leaf: x509.Certificate) -> Iterator[Violation]:
    """Kubernetes takes the CN as the user, and so does etcd with users."""
    found = common_names(leaf.subject)
    if len(found) != 1 or not any(_is_user(found[0], wanted, leaf) for wanted in spec.common_names):
        want = " or ".join(spec.common_names).replace("{node}", "the node's name")
        yield Violation(subject="CN", want=want, got=one_line(", ".join(found)) or "none")


def _is_user(found: str, wanted: str, leaf: x509.Certificate) -> bool:
    """Whether a CN is the wanted one; a bare node name must also be a DNS SAN, so that `root` does not count."""
    begin, placeholder, end = wanted.partition("{node}")
    if not placeholder:
        return found == wanted
    node = found.removeprefix(begin).removesuffix(end)
    is_named = bool(begin) or ("DNS", node) in san_entries(leaf)
    return found == f"{begin}{node}{end}" and _NODE.fullmatch(node) is not None and is_named


def _groups(spec: CertificateSpec, leaf: x509.Certificate, extra: frozenset[tuple[str, str]]) -> Iterator[Violation]:
    """Kubernetes takes each O as a group; kubeadm's versions differ in them."""
    found = frozenset(value for oid, value in attributes(leaf.subject) if oid == O_OID and (oid, value) not in extra)
    if not any(found <= allowed for allowed in spec.groups):
        want = " or ".join(", ".join(sorted(allowed)) or "none" for allowed in spec.groups)
        yield Violation(subject="O", want=want, got=one_line(", ".join(sorted(found))))
