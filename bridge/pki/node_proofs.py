"""
A node's proofs to a door, besides its requests: that it has a one-time secret, and that it has replaced a certificate (pure).

The secret is the seed of an Ed25519 key (RFC 8032), whose signature covers the request's digest. It never travels with a
bundle, the door's copy (the public key's SHA-256) can't forge a proof, and an overheard proof is only good for the same
request. An EST client sends the secret itself as its password, over TLS that it has verified; the door then computes the
same hash from it.

A certificate may be revoked once its successor is in use: the successor's key signs the names of node, cluster and
certificate, and both certificates, so that the proof is good for nothing else. It covers no time: a revocation is final,
and repeating the proof changes nothing.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from hashlib import sha256

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from bridge.contract import Revocation
from bridge.pki import signatures
from bridge.pki.bundle import is_carried
from bridge.pki.bundle_format import Fields, certificate, parse
from bridge.pki.certificates import fingerprint, pem
from bridge.pki.signatures import is_by

#: The scheme in the `Authorization` header (RFC 9110 §11.4).
SCHEME = "CA-Bridge-Enrolment"
SECRET_BYTES = 32
_SECRET = re.compile(r"[A-Za-z0-9_-]{43}")  # base64url of 32 bytes
_KEY_CONTEXT, _ENROLMENT_CONTEXT = b"ca-bridge enrolment key 1\n", b"ca-bridge enrolment 1\n"
_PUBLIC_BYTES, _SIGNATURE_BYTES = 32, 64


def secret_hash(secret: str) -> str | None:
    """The hash that the door keeps of a secret: the SHA-256 (hex) of its public key; None: not a secret of an enrolment."""
    return None if _SECRET.fullmatch(secret) is None else _key_hash(_secret_key(secret).public_key().public_bytes_raw())


def enrolment_proof(secret: str, request_digest: str) -> str:
    """The value of `Authorization` for a request with this digest (ValueError: not a secret of an enrolment)."""
    if _SECRET.fullmatch(secret) is None:
        raise ValueError("the 43 characters that `ca-bridge enroll` prints")
    key = _secret_key(secret)
    evidence = key.public_key().public_bytes_raw() + key.sign(_ENROLMENT_CONTEXT + request_digest.encode())
    return f"{SCHEME} {b64encode(evidence).decode()}"


def enrolled_by(authorization: str, request_digest: str) -> str | None:
    """The hash of the secret behind this proof for this request; None: the proof is invalid."""
    scheme, _, encoded = authorization.partition(" ")
    try:
        evidence = b64decode(encoded.strip(), validate=True) if scheme.lower() == SCHEME.lower() else b""
    except ValueError:
        return None
    if len(evidence) != _PUBLIC_BYTES + _SIGNATURE_BYTES:
        return None
    public, signature = evidence[:_PUBLIC_BYTES], evidence[_PUBLIC_BYTES:]
    message = _ENROLMENT_CONTEXT + request_digest.encode()
    return _key_hash(public) if is_by(Ed25519PublicKey.from_public_bytes(public), signature, message) else None


def _secret_key(secret: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(sha256(_KEY_CONTEXT + secret.encode()).digest())


def _key_hash(public: bytes) -> str:
    return sha256(public).hexdigest()


SCHEMA = "ca-bridge/revocation"
_REVOCATION_CONTEXT = b"ca-bridge revocation 1"


def revocation(
    key: PrivateKeyTypes, *, name: str, node: str, cluster: str, old: x509.Certificate, successor: x509.Certificate
) -> Revocation:
    """Make a revocation request, signed by the successor's key (ValueError: the key can't sign)."""
    proof = signatures.sign(key, _revocation_message(name, node, cluster, old, successor))
    return Revocation(name=name, certificate=old, successor=successor, proof=proof)


def is_revocation_proven(revocation: Revocation, node: str, cluster: str) -> bool:
    """Whether the successor's key has signed the request for this node."""
    try:
        key = revocation.successor.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return False
    message = _revocation_message(revocation.name, node, cluster, revocation.certificate, revocation.successor)
    return signatures.is_by(key, revocation.proof, message)


def _revocation_message(
    name: str, node: str, cluster: str, old: x509.Certificate, successor: x509.Certificate
) -> bytes:
    texts = (name, node, cluster, fingerprint(old), fingerprint(successor))
    return signatures.framed([_REVOCATION_CONTEXT, *(text.encode() for text in texts)])


def revocation_json(revocation: Revocation) -> bytes:
    """Encode a revocation request for a door."""
    document = {
        "schema": SCHEMA,
        "name": revocation.name,
        "certificate": pem(revocation.certificate).decode(),
        "successor": pem(revocation.successor).decode(),
        "proof": b64encode(revocation.proof).decode(),
    }
    return json.dumps(document).encode()


def revocation_of(data: bytes) -> Revocation:
    """Decode the output of `revocation_json` (BundleError: it is something else)."""
    fields = Fields.of(parse(data), "", ("schema", "name", "certificate", "successor", "proof"))
    fields.choice("schema", [SCHEMA])
    if not is_carried(fields.values["name"]):
        fields.fail("name", "the name of a node's certificate")
    return Revocation(
        name=fields.values["name"],
        certificate=certificate(fields.values["certificate"], "certificate"),
        successor=certificate(fields.values["successor"], "successor"),
        proof=fields.encoded("proof") or fields.fail("proof", "base64"),
    )
