"""
A node's word that one of its certificates may be revoked, since its successor is in use (pure).

The successor's key signs the node's name, its cluster's, the certificate's, and both certificates, so that the word is
good for nothing else. It covers no time: what is revoked stays so, and the same word once more changes nothing.
"""

from __future__ import annotations

import json
from base64 import b64encode

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from bridge.contract import Revocation
from bridge.pki import signatures
from bridge.pki.bundle import is_carried
from bridge.pki.bundle_format import Fields, certificate, parse
from bridge.pki.certificates import fingerprint, pem

SCHEMA = "ca-bridge/revocation"
_CONTEXT = b"ca-bridge revocation 1"


def signed(
    key: PrivateKeyTypes, *, name: str, node: str, cluster: str, old: x509.Certificate, successor: x509.Certificate
) -> Revocation:
    """The word, by the successor's key (ValueError: a key that can't sign)."""
    proof = signatures.sign(key, _message(name, node, cluster, old, successor))
    return Revocation(name=name, certificate=old, successor=successor, proof=proof)


def is_proven(asked: Revocation, node: str, cluster: str) -> bool:
    """Whether the successor's key has signed it for this node."""
    try:
        key = asked.successor.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return False
    message = _message(asked.name, node, cluster, asked.certificate, asked.successor)
    return signatures.is_by(key, asked.proof, message)


def _message(name: str, node: str, cluster: str, old: x509.Certificate, successor: x509.Certificate) -> bytes:
    texts = (name, node, cluster, fingerprint(old), fingerprint(successor))
    return signatures.framed([_CONTEXT, *(text.encode() for text in texts)])


def dumps(asked: Revocation) -> bytes:
    """As it goes to a door."""
    document = {
        "schema": SCHEMA,
        "name": asked.name,
        "certificate": pem(asked.certificate).decode(),
        "successor": pem(asked.successor).decode(),
        "proof": b64encode(asked.proof).decode(),
    }
    return json.dumps(document).encode()


def loads(data: bytes) -> Revocation:
    """What `dumps` wrote (BundleError: something else)."""
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
