"""Proofs of a node for a door: of a one-time secret by `Authorization`, and of a certificate that it has replaced."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.contract import Revocation
from bridge.pki import node_proofs
from bridge.pki.bundle import BundleError
from bridge.pki.node_proofs import SCHEME, enrolled_by, enrolment_proof, secret_hash
from tests.kit.issuing import Signer

_SECRET, _OTHER, _DIGEST = "A" * 43, "B" * 43, "0" * 64
_ENCODED = enrolment_proof(_SECRET, _DIGEST).removeprefix(f"{SCHEME} ")


def test_a_proof_is_for_one_request_by_one_secret() -> None:
    """The door computes the hash that it keeps from the proof; another digest or a changed byte proves nothing."""
    good = enrolment_proof(_SECRET, _DIGEST)
    assert enrolled_by(good, _DIGEST) == secret_hash(_SECRET) != secret_hash(_OTHER)
    assert enrolled_by(good, "1" * 64) is None
    assert enrolled_by(good.replace(good[-8], "z" if good[-8] != "z" else "y"), _DIGEST) is None
    assert _SECRET not in good


def test_a_scheme_is_read_in_any_case() -> None:
    """RFC 9110 §11.1: names of schemes have no case, and one or more spaces follow."""
    assert enrolled_by(f"{SCHEME.upper()}  {_ENCODED} ", _DIGEST) == secret_hash(_SECRET)


@pytest.mark.parametrize(
    "text",
    [
        "",
        SCHEME,
        _ENCODED,
        f"Bearer {_ENCODED}",
        f"{SCHEME}x {_ENCODED}",
        f"{SCHEME} AAAA",
        f"{SCHEME} ä",
        f"{SCHEME} {_ENCODED[:-4]}",
        f"{SCHEME} {_ENCODED}AAAA",
        f"{SCHEME} {_ENCODED[:8]}!{_ENCODED[8:]}",
        f"{SCHEME} {_ENCODED[:8]} {_ENCODED[8:]}",
        f"{SCHEME} {SCHEME} {_ENCODED}",
        "A " + "A" * 128,
    ],
)
def test_another_header_proves_nothing(text: str) -> None:
    """Another scheme proves nothing, nor does a text that is cut, longer, or has a character that base64 has not."""
    assert enrolled_by(text, _DIGEST) is None


@pytest.mark.parametrize("text", ["", "short", _SECRET + "\n", _SECRET + "A", _SECRET[:-1] + "=", "ä" * 43])
def test_a_text_of_another_form_is_no_secret(text: str) -> None:
    """It has no hash, and makes no proof."""
    assert secret_hash(text) is None
    with pytest.raises(ValueError, match="ca-bridge enroll"):
        enrolment_proof(text, _DIGEST)


# --- a certificate that the node has replaced -------------------------------------------------------------------------

_WHO = {"name": "apiserver", "node": "cp-1", "cluster": "kubernetes"}
_OLD, _NEW, _THIRD = (Signer.make("leaf", ca=False) for _ in range(3))


def made(signer: Signer = _NEW) -> Revocation:
    """What the node asks, by a key; the successor's, unless another is given."""
    return node_proofs.revocation(signer.key, old=_OLD.certificate, successor=_NEW.certificate, **_WHO)


def is_proven(asked: Revocation, node: str = "cp-1", cluster: str = "kubernetes") -> bool:
    return node_proofs.is_revocation_proven(asked, node, cluster)


def test_a_revocation_is_proven_by_the_successors_key() -> None:
    """It is proven for its node and cluster, its name and both certificates, and survives the way to a door."""
    asked = made()
    assert is_proven(asked)
    assert asked == Revocation(
        name="apiserver", certificate=_OLD.certificate, successor=_NEW.certificate, proof=asked.proof
    )
    assert node_proofs.revocation_of(node_proofs.revocation_json(asked)) == asked


@pytest.mark.parametrize(
    ("changes", "node", "cluster"),
    [
        ({}, "cp-2", "kubernetes"),
        ({}, "cp-1", "other"),
        ({}, "cp", "-1kubernetes"),
        ({"name": "etcd-server"}, "cp-1", "kubernetes"),
        ({"certificate": _THIRD.certificate}, "cp-1", "kubernetes"),
        ({"successor": _THIRD.certificate}, "cp-1", "kubernetes"),
        ({"certificate": _NEW.certificate, "successor": _OLD.certificate}, "cp-1", "kubernetes"),
        ({"proof": b""}, "cp-1", "kubernetes"),
    ],
)
def test_a_changed_revocation_is_not_proven(changes: dict[str, Any], node: str, cluster: str) -> None:
    """Nothing of it can be another, and the old key can't sign it."""
    assert not is_proven(replace(made(), **changes), node, cluster)
    assert not is_proven(made(_OLD))
    assert not is_proven(replace(made(), proof=made().proof[:-1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "ca-bridge/request"}, "schema: wanted ca-bridge/revocation"),
        ({"name": "a\nb"}, "name: wanted the name of a node's certificate"),
        ({"name": 1}, "name: wanted the name of a node's certificate"),
        ({"certificate": "x"}, "certificate: "),
        ({"successor": "x"}, "successor: "),
        ({"proof": ""}, "^proof: wanted base64"),
        ({"proof": "!"}, "^proof: wanted base64"),
        ({"more": "x"}, "more"),
    ],
)
def test_a_document_that_is_no_revocation_is_refused(changes: dict[str, object], message: str) -> None:
    """The error names the field."""
    document = {**json.loads(node_proofs.revocation_json(made())), **changes}
    with pytest.raises(BundleError, match=message):
        node_proofs.revocation_of(json.dumps(document).encode())


def test_a_successor_with_a_key_that_can_t_be_read_proves_nothing() -> None:
    """Its certificate is of a curve that cryptography does not know; a key that signs with another algorithm fails, too."""
    der = _NEW.certificate.public_bytes(Encoding.DER)
    unknown = x509.load_der_x509_certificate(
        der.replace(bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d03017f"))
    )
    assert not is_proven(replace(made(), successor=unknown))
    signature = b64encode(Ed25519PrivateKey.generate().sign(b"x"))
    assert not is_proven(replace(made(), proof=signature))
