"""Names, SANs, keys and digests as one printable line for people, also where a certificate can't be read (pure)."""

from __future__ import annotations

from base64 import b32encode

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


#: Crockford's alphabet, without I, L, O and U, so that nothing is heard or written for something else.
_CROCKFORD = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", "0123456789ABCDEFGHJKMNPQRSTVWXYZ")


def fingerprint_text(digest_hex: str) -> str:
    """The first 100 bits of a digest (hex), as four groups of five digits and letters: `7ZK3M-…`."""
    letters = b32encode(bytes.fromhex(digest_hex)).decode().translate(_CROCKFORD)
    return "-".join(letters[start : start + 5] for start in range(0, 20, 5))
