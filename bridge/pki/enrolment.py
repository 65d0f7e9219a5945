"""
The one-time secret of a node that has no certificate yet, and the proof that a request's maker knows it (pure).

The secret is the seed of an Ed25519 key (RFC 8032), whose signature covers the request's digest. It never travels with a
bundle, what the door keeps (the public key's SHA-256) forges no proof, and a proof that was overheard is good for the
same request alone. A client of EST sends the secret itself as its password, over TLS that it has verified; the door then
computes the same hash from it.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bridge.pki.signatures import is_by

#: The scheme of the header `Authorization` (RFC 9110 §11.4).
SCHEME = "CA-Bridge-Enrolment"
SECRET_BYTES = 32
_SECRET = re.compile(r"[A-Za-z0-9_-]{43}")  # base64url of 32 bytes
_KEY_CONTEXT, _PROOF_CONTEXT = b"ca-bridge enrolment key 1\n", b"ca-bridge enrolment 1\n"
_PUBLIC_BYTES, _SIGNATURE_BYTES = 32, 64


def hash_of(secret: str) -> str | None:
    """What the door keeps of a secret: the SHA-256 (hex) of its public key; None: the text is no secret of an enrolment."""
    return None if _SECRET.fullmatch(secret) is None else _hash(_key(secret).public_key().public_bytes_raw())


def proof(secret: str, request_digest: str) -> str:
    """The value of `Authorization` for a request with this digest (ValueError: the text is no secret of an enrolment)."""
    if _SECRET.fullmatch(secret) is None:
        raise ValueError("the 43 characters that `ca-bridge enroll` prints")
    key = _key(secret)
    shown = key.public_key().public_bytes_raw() + key.sign(_PROOF_CONTEXT + request_digest.encode())
    return f"{SCHEME} {b64encode(shown).decode()}"


def proven(authorization: str, request_digest: str) -> str | None:
    """The hash of the secret that made this proof for this request; None: it proves nothing."""
    scheme, _, encoded = authorization.partition(" ")
    try:
        shown = b64decode(encoded.strip(), validate=True) if scheme.lower() == SCHEME.lower() else b""
    except ValueError:
        return None
    if len(shown) != _PUBLIC_BYTES + _SIGNATURE_BYTES:
        return None
    public, signature = shown[:_PUBLIC_BYTES], shown[_PUBLIC_BYTES:]
    message = _PROOF_CONTEXT + request_digest.encode()
    return _hash(public) if is_by(Ed25519PublicKey.from_public_bytes(public), signature, message) else None


def _key(secret: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(sha256(_KEY_CONTEXT + secret.encode()).digest())


def _hash(public: bytes) -> str:
    return sha256(public).hexdigest()
