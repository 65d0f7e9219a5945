"""Signatures over messages of our own: continuity proofs, and a desk's answer bundles."""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import (
    CertificatePublicKeyTypes,
    PrivateKeyTypes,
    PublicKeyTypes,
)
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from bridge.pki.certificates import UNREADABLE

_PSS = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)


def sign(key: PrivateKeyTypes, message: bytes) -> bytes:
    """
    Sign with RSA-PSS, ECDSA or Ed25519, the first two with SHA-256.

    Raises:
        ValueError: A key of another type.
    """
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(message, _PSS, hashes.SHA256())
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(message, ec.ECDSA(hashes.SHA256()))
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(message)
    raise ValueError(f"wanted an RSA, ECDSA or Ed25519 key, found {type(key).__name__}")


def check(key: CertificatePublicKeyTypes | PublicKeyTypes, signature: bytes, message: bytes) -> bool:
    """
    Check what `sign` made.

    Returns:
        False: a key of a type that proves nothing.

    Raises:
        InvalidSignature: It is another signature.
        ValueError: An RSA key that is too small to have made any.
    """
    if isinstance(key, rsa.RSAPublicKey):
        key.verify(signature, message, _PSS, hashes.SHA256())
    elif isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    elif isinstance(key, ed25519.Ed25519PublicKey):
        key.verify(signature, message)
    else:
        return False
    return True


def is_by(key: PublicKeyTypes, signature: bytes, message: bytes) -> bool:
    """Whether this key's holder has made the signature."""
    try:
        return check(key, signature, message)
    except (InvalidSignature, ValueError):
        return False


def public_key(pem: bytes) -> PublicKeyTypes:
    """
    The key of a certificate, or a public key, in PEM.

    Raises:
        ValueError: Neither is there, or it is of a type that signs nothing here; its text says what was wanted.
    """
    try:
        found = load_pem_public_key(pem) if b"PUBLIC KEY" in pem else x509.load_pem_x509_certificate(pem).public_key()
    except UNREADABLE:
        raise ValueError("a certificate or a public key in PEM") from None
    if not isinstance(found, rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
        raise ValueError("an RSA, ECDSA or Ed25519 key")  # noqa: TRY004 (of a file, not of a caller)
    return found
