"""Signatures of a desk and of a node: whose they are, and by which keys; tests/pki/test_bundle.py has the proofs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed448, ed25519
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from bridge.pki import signatures
from bridge.pki.bundle import RequestBundle
from bridge.pki.csr import Naming, build_for, generate_key, subject_of
from tests.kit.bundles import make_bundle, old_pairs
from tests.kit.issuing import Signer
from tests.kit.pki import Pki, handmade_pki


def public(key: PrivateKeyTypes) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


MAKE: dict[str, Callable[[], PrivateKeyTypes]] = {
    "rsa": lambda: generate_key("rsa-2048"),
    "ecdsa": lambda: generate_key("ecdsa-p256"),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


@pytest.mark.parametrize("kind", MAKE)
def test_a_signature_is_by_its_key_over_its_message(kind: str) -> None:
    """Another message, another key of the same type, and other bytes are none; a key's file says which key it is."""
    first, second = (MAKE[kind](), MAKE[kind]())
    signature, key = signatures.sign(first, b"message"), signatures.public_key(public(first))
    assert signatures.is_by(key, signature, b"message")
    assert not signatures.is_by(key, signature, b"another")
    assert not signatures.is_by(key, b"x" + signature, b"message")
    assert not signatures.is_by(signatures.public_key(public(second)), signature, b"message")


def test_keys_of_other_types_sign_and_prove_nothing() -> None:
    """A signature that such a key can make is not looked at."""
    key = ed448.Ed448PrivateKey.generate()
    assert not signatures.is_by(key.public_key(), key.sign(b"message"), b"message")
    with pytest.raises(ValueError, match=r"^wanted an RSA, ECDSA or Ed25519 key, found Ed448PrivateKey$"):
        signatures.sign(key, b"message")


def test_a_public_key_is_read_from_a_certificate_or_a_key() -> None:
    """Anything else is refused by the two that are wanted, and so is a key that can't be checked with."""
    signer = Signer.make()
    found = signatures.public_key(signer.certificate.public_bytes(Encoding.PEM))
    assert found == signatures.public_key(public(signer.key)) == signer.key.public_key()
    for pem in (b"", b"PUBLIC KEY", b"hello"):
        with pytest.raises(ValueError, match=r"^a certificate or a public key in PEM$"):
            signatures.public_key(pem)
    with pytest.raises(ValueError, match=r"^an RSA, ECDSA or Ed25519 key$"):
        signatures.public_key(public(ed448.Ed448PrivateKey.generate()))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return handmade_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def bundle(pki: Pki) -> RequestBundle:
    return make_bundle(old_pairs(pki, ("apiserver", "admin.conf")))


def test_each_problem_is_reported_in_full(bundle: RequestBundle) -> None:
    """A person at the desk decides by these sentences."""
    request = next(one for one in bundle.requests if one.name == "apiserver")
    bare = replace(request, replaces=None, proof=None)
    assert signatures.proof_problem(request, bundle) is None
    for problem in (
        signatures.proof_problem(bare, bundle),
        signatures.usages_problem(bare),
        signatures.origin_problem(bare, []),
    ):
        assert problem == "the certificate that is replaced is missing"
    assert signatures.proof_problem(replace(request, proof=b"x" * 64), bundle) == (
        "wanted a continuity proof by the replaced certificate's key over this CSR, found another signature"
    )
    roots = [Signer.make(name).certificate for name in ("one", "two")]
    for cas, wanted in (([], "a CA certificate of ca"), (roots, "CN=one or CN=two")):
        assert signatures.origin_problem(request, cas) == (
            f"wanted a replaced certificate that {wanted} signed, found CN=kube-apiserver by CN=kubernetes, not signed by it"
        )


def test_a_key_that_can_sign_no_proof_is_named(bundle: RequestBundle) -> None:
    """The replaced certificate's, with its type."""
    odd = Signer.make(parent=Signer.make(), key=ed448.Ed448PrivateKey.generate())  # type: ignore[arg-type]
    problem = signatures.proof_problem(replace(bundle.requests[0], replaces=odd.certificate), bundle)
    assert problem == "wanted an RSA, ECDSA or Ed25519 key to prove with, found ed448"


@pytest.mark.parametrize(("cn", "proves"), [("kubernetes-admin", True), ("another", False)])
def test_a_proof_is_by_the_same_cn_whatever_the_groups(pki: Pki, cn: str, proves: bool) -> None:
    """A newer kubeadm gives the admin another group, and the holder is the same; another CN is another holder."""
    naming = Naming(subject=subject_of(cn, ["another:group"]), sans=())
    made = make_bundle(
        old_pairs(pki, ("admin.conf",)),
        build=lambda _: x509.load_pem_x509_csr(build_for(naming, generate_key("ecdsa-p256"))),
    )
    assert (signatures.proof_problem(made.requests[0], made) is None) is proves
