"""Digests short enough to be read out over the phone (pure)."""

from __future__ import annotations

from base64 import b32encode

#: Crockford's alphabet, without I, L, O and U, so that nothing is heard or written for something else.
_CROCKFORD = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", "0123456789ABCDEFGHJKMNPQRSTVWXYZ")


def spoken(digest_hex: str) -> str:
    """The first 100 bits of a digest (hex), as four groups of five digits and letters: `7ZK3M-…`."""
    letters = b32encode(bytes.fromhex(digest_hex)).decode().translate(_CROCKFORD)
    return "-".join(letters[start : start + 5] for start in range(0, 20, 5))
