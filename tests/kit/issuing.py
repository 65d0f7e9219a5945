"""A CA that signs whatever a test wants, right or wrong in one way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import pkcs7
from cryptography.x509.oid import NameOID, ObjectIdentifier

from bridge.contract import Issued, SignRequest
from bridge.pki.csr import PrivateKey, generate_key

#: Noon of yesterday: also what the program judges by the real clock has begun, and does not end for a year.
NOW = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0) - timedelta(days=1)

SERVER, CLIENT = "1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"


def name(*attributes: tuple[ObjectIdentifier, str]) -> x509.Name:
    """A name with one attribute a RDN."""
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])


def cn(value: str) -> x509.Name:
    """A name with a CN alone."""
    return name((NameOID.COMMON_NAME, value))


def usage(*, ca: bool = False, **changes: bool) -> x509.KeyUsage:
    """KeyUsage as kubeadm sets it, with changes."""
    values = {
        "digital_signature": True, "key_encipherment": True, "key_cert_sign": ca, "crl_sign": False,
        "content_commitment": False, "data_encipherment": False, "key_agreement": False, "encipher_only": False,
        "decipher_only": False,
    }  # fmt: skip
    return x509.KeyUsage(**(values | changes))


@dataclass(frozen=True, kw_only=True)
class Signer:
    """A certificate with its key; a root, or an intermediate."""

    certificate: x509.Certificate
    key: PrivateKey

    @classmethod
    def make(
        cls,
        subject: str = "kubernetes",
        *,
        parent: Signer | None = None,
        key: PrivateKey | None = None,
        ca: bool = True,
        path_length: int | None = None,
        key_usage: x509.KeyUsage | None = None,
        constraints: x509.NameConstraints | None = None,
        extra: x509.ExtensionType | None = None,
        extra_critical: bool = False,
        begin: datetime = NOW - timedelta(days=100),
        end: datetime = NOW + timedelta(days=3000),
        hash_algorithm: hashes.SHA256 | hashes.SHA384 | None = None,
        key_id: bool = False,
    ) -> Signer:
        """A CA in kubeadm's shape up to 1.18, or with one thing different, such as a key identifier."""
        own = key or generate_key("ecdsa-p256")
        issuer = parent or cls.__new__(cls)
        issuer_name = parent.certificate.subject if parent else cn(subject)
        builder = (
            x509.CertificateBuilder()
            .subject_name(cn(subject))
            .issuer_name(issuer_name)
            .public_key(own.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
            .add_extension(key_usage or usage(ca=True), critical=True)
        )
        if key_id:
            builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), critical=False)
        if constraints is not None:
            builder = builder.add_extension(constraints, critical=True)
        if extra is not None:
            builder = builder.add_extension(extra, critical=extra_critical)
        certificate = builder.sign(issuer.key if parent else own, hash_algorithm or hashes.SHA256())
        return cls(certificate=certificate, key=own)

    @classmethod
    def load(cls, certificate_pem: bytes, key_pem: bytes) -> Signer:
        """One that there is."""
        key = serialization.load_pem_private_key(key_pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)
        return cls(certificate=x509.load_pem_x509_certificate(certificate_pem), key=key)

    def issue(
        self,
        request: SignRequest,
        *,
        subject: x509.Name | None = None,
        public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey | None = None,
        sans: Sequence[x509.GeneralName] | None = None,
        ekus: Sequence[str] | None = None,
        key_usage: x509.KeyUsage | None = None,
        no_key_usage: bool = False,
        basic_constraints: x509.BasicConstraints | None = None,
        extra: x509.ExtensionType | None = None,
        extra_critical: bool = False,
        begin: datetime = NOW - timedelta(minutes=5),
        end: datetime = NOW + timedelta(days=365),
        issuer: x509.Name | None = None,
        intermediates: Sequence[Signer] = (),
        hash_algorithm: hashes.SHA256 | hashes.SHA384 | None = None,
        serial: int | None = None,
    ) -> Issued:
        """
        The requested certificate, with the given changes.

        Args:
            request: The request.
            subject: Another subject.
            public_key: Another key.
            sans: Other SANs; empty: no extension.
            ekus: Other EKUs by OID; empty: no extension.
            key_usage: Another KeyUsage.
            no_key_usage: No KeyUsage extension.
            basic_constraints: Other than CA:FALSE.
            extra: One more extension.
            extra_critical: Whether it is critical.
            begin: notBefore.
            end: notAfter.
            issuer: Another issuer name over the same key's signature.
            intermediates: Sent along.
            hash_algorithm: Of the signature.
            serial: Serial number.
        """
        csr = request.csr
        builder = (
            x509.CertificateBuilder()
            .subject_name(csr.subject if subject is None else subject)
            .issuer_name(issuer or self.certificate.subject)
            .public_key(public_key or csr.public_key())
            .serial_number(serial or x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(basic_constraints or x509.BasicConstraints(ca=False, path_length=None), critical=True)
        )
        names = _requested(csr) if sans is None else sans
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        oids = sorted(eku.value for eku in request.spec.ekus) if ekus is None else ekus
        if oids:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([ObjectIdentifier(oid) for oid in oids]), critical=False
            )
        if not no_key_usage:
            builder = builder.add_extension(key_usage or usage(), critical=True)
        if extra is not None:
            builder = builder.add_extension(extra, critical=extra_critical)
        leaf = builder.sign(self.key, hash_algorithm or hashes.SHA256())
        return Issued(leaf=leaf, intermediates=tuple(signer.certificate for signer in intermediates))


def odd_certificates(ca: x509.Certificate) -> dict[str, bytes]:
    """A CA's certificate, made odd in ways that are no ValueError to the library; as DER."""
    der = ca.public_bytes(serialization.Encoding.DER)
    bag = pkcs7.serialize_certificates([ca], serialization.Encoding.DER)
    key_usage, basic_constraints = b"\x06\x03\x55\x1d\x0f", b"\x06\x03\x55\x1d\x13"
    version = b"\xa0\x03\x02\x01"
    other = der.replace(version + b"\x02", version + b"\x07", 1)
    return {
        "an extension twice": der.replace(key_usage, basic_constraints, 1),
        "an unknown version": other,
        "an unknown version, PKCS#7": bag.replace(der, other),
    }


def _requested(csr: x509.CertificateSigningRequest) -> Sequence[x509.GeneralName]:
    try:
        return list(csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def signed_again(
    old: x509.Certificate,
    signer: Signer,
    *,
    sans: Sequence[x509.GeneralName] | None = None,
    end: datetime | None = None,
) -> bytes:
    """
    A certificate like an old one, for the same key, with another serial number; as PEM.

    Args:
        old: What it is like.
        signer: The CA that has signed it, too.
        sans: Other SANs.
        end: Another notAfter than in a day.
    """
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(signer.certificate.subject)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(end or now + timedelta(days=1))
    )
    for extension in old.extensions:
        other = sans is not None and isinstance(extension.value, x509.SubjectAlternativeName)
        value = x509.SubjectAlternativeName(sans or ()) if other else extension.value
        builder = builder.add_extension(value, extension.critical)
    return builder.sign(signer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
