"""Names, SANs and keys of certificates and CSRs as one printable line, also where they can't be read."""

from __future__ import annotations

from cryptography import x509

from bridge.pki.certificates import UNREADABLE, name_text, san_counts
from bridge.pki.csr import algorithm_name
from bridge.words import one_line

_MOST_SANS = 100


def name(subject: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The subject."""
    try:
        return one_line(name_text(subject.subject)) or "(no subject)"
    except UNREADABLE as e:
        return f"(a subject that can't be read: {one_line(e)})"


def issuer(certificate: x509.Certificate) -> str:
    """The issuer's name."""
    try:
        return one_line(name_text(certificate.issuer))
    except UNREADABLE as e:
        return f"(an issuer that can't be read: {one_line(e)})"


def sans(subject: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The SANs in alphabetical order; of more than a policy allows, as many."""
    try:
        texts = [one_line(f"{kind}:{value}") for kind, value in sorted(san_counts(subject).elements())]
    except UNREADABLE as e:
        return f"(extensions that can't be read: {one_line(e)})"
    more = [f"and {len(texts) - _MOST_SANS} more"] if len(texts) > _MOST_SANS else []
    return ", ".join([*texts[:_MOST_SANS], *more]) or "none"


def key(csr: x509.CertificateSigningRequest) -> str:
    """The key's algorithm and size."""
    try:
        return algorithm_name(csr.public_key())
    except UNREADABLE as e:
        return f"(one that can't be read: {one_line(e)})"
