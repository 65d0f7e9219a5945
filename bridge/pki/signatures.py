"""Signatures over messages of our own: continuity proofs, and a desk's answer bundles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from hashlib import sha256

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes, PrivateKeyTypes, PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_public_key

from bridge.pki.bundle import BundledRequest, RequestBundle
from bridge.pki.certificates import CN_OID, UNREADABLE, attributes, extended_key_usages, is_signed_by, name_text
from bridge.pki.csr import algorithm_name, issuer_line, subject_line
from bridge.pki.expiry import rfc3339
from bridge.words import one_line

_PSS = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)


def framed(parts: Iterable[bytes]) -> bytes:
    """Build a message to sign: each part follows its length, so that no other parts give the same message."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def sign(key: PrivateKeyTypes, message: bytes) -> bytes:
    """Sign with RSA-PSS, ECDSA or Ed25519, the first two with SHA-256."""
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(message, _PSS, hashes.SHA256())
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(message, ec.ECDSA(hashes.SHA256()))
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(message)
    raise ValueError(f"wanted an RSA, ECDSA or Ed25519 key, found {type(key).__name__}")


_PROVING = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


def is_by(key: CertificatePublicKeyTypes | PublicKeyTypes, signature: bytes, message: bytes) -> bool:
    """Whether `sign` made the signature with this key; False for a key of another type, which proves nothing."""
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, message, _PSS, hashes.SHA256())
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)
        else:
            return False
    except (InvalidSignature, ValueError):  # ValueError: an RSA key too small to have made any
        return False
    return True


def public_key(pem: bytes) -> PublicKeyTypes:
    """Load the key of a certificate, or a public key, in PEM."""
    try:
        found = load_pem_public_key(pem) if b"PUBLIC KEY" in pem else x509.load_pem_x509_certificate(pem).public_key()
    except UNREADABLE:
        raise ValueError("a certificate or a public key in PEM") from None
    if not isinstance(found, _PROVING):
        raise ValueError("an RSA, ECDSA or Ed25519 key")  # noqa: TRY004 (the file is wrong, not the caller)
    return found


#: The prefix differs from all other messages that such a key signs.
_PROOF_CONTEXT = b"ca-bridge continuity proof v2"


def sign_proof(
    old_key: PrivateKeyTypes,
    csr: x509.CertificateSigningRequest,
    *,
    name: str,
    batch: str,
    node: str,
    cluster: str,
    validity: timedelta,
    created: datetime,
) -> bytes:
    """
    Sign this CSR with the key of the certificate that it replaces, for one request of one bundle.

    The proof also covers the validity, and the bundle's time, so that it can't be made to look younger.
    """
    return sign(old_key, _proof_message(csr, (batch, node, cluster, name), validity, created))


def proof_problem(request: BundledRequest, bundle: RequestBundle) -> str | None:
    """Why the continuity proof fails; None: the bundle's maker has the key of `replaces`, whose CN is the new one's."""
    if request.replaces is None:
        return "the certificate that is replaced is missing"
    if request.proof is None:
        return "there is no continuity proof"
    who = (bundle.batch, bundle.node, bundle.cluster, request.name)
    message = _proof_message(request.csr, who, request.validity, bundle.created)
    try:
        key = request.replaces.public_key()
    except (ValueError, UnsupportedAlgorithm) as e:
        return f"wanted a public key in the replaced certificate, found one that can't be read: {one_line(e)}"
    if not isinstance(key, _PROVING):
        return f"wanted an RSA, ECDSA or Ed25519 key to prove with, found {algorithm_name(key)}"
    if not is_by(key, request.proof, message):
        return "wanted a continuity proof by the replaced certificate's key over this CSR, found another signature"
    return _other_holder(request.csr, request.replaces)


def _other_holder(csr: x509.CertificateSigningRequest, replaces: x509.Certificate) -> str | None:
    """Compare the CN, which is the identity; groups may have changed."""
    try:
        is_same = _who(csr) == _who(replaces)
    except UNREADABLE as e:
        return f"wanted one by a certificate whose subject can be read, found: {one_line(e)}"
    if is_same:
        return None
    return f"wanted one by the certificate of {subject_line(csr)}, found one by that of {subject_line(replaces)}"


def _who(subject: x509.Certificate | x509.CertificateSigningRequest) -> list[tuple[str, str]]:
    """The CN, or the whole subject if there is none."""
    parts = attributes(subject.subject)
    return [part for part in parts if part[0] == CN_OID] or parts


def _proof_message(
    csr: x509.CertificateSigningRequest, who: Sequence[str], validity: timedelta, created: datetime
) -> bytes:
    csr_digest = sha256(csr.public_bytes(Encoding.DER)).digest()
    terms = (str(int(validity.total_seconds())), rfc3339(created))
    return framed([_PROOF_CONTEXT, *(part.encode() for part in who), csr_digest, *(part.encode() for part in terms)])


def usages_problem(request: BundledRequest) -> str | None:
    """Why the replaced certificate does not prove a right to these usages; without EKUs it proves every usage."""
    if request.replaces is None:
        return "the certificate that is replaced is missing"
    try:
        usages = extended_key_usages(request.replaces)
    except UNREADABLE as e:
        return f"wanted usages in the replaced certificate, found some that can't be read: {one_line(e)}"
    lacking = sorted(eku.label for eku in request.spec.ekus if usages is not None and eku.value not in usages)
    if not lacking:
        return None
    return f"wanted one by a certificate with the same usages, found one without {', '.join(lacking)}"


def origin_problem(request: BundledRequest, cas: Sequence[x509.Certificate]) -> str | None:
    """Why no CA of the authority signed the replaced certificate, expired or not; None: one did."""
    if request.replaces is None:
        return "the certificate that is replaced is missing"
    if any(is_signed_by(request.replaces, ca) for ca in cas):
        return None
    names = dict.fromkeys(name_text(ca.subject) for ca in cas)
    wanted = " or ".join(names) or f"a CA certificate of {request.authority}"
    return (
        f"wanted a replaced certificate that {wanted} signed, found "
        f"{subject_line(request.replaces)} by {issuer_line(request.replaces)}, not signed by it"
    )
