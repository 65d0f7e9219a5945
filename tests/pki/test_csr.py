"""CSRs carry all of the live certificate's subject and SANs, or an error says what they can't carry."""

from __future__ import annotations

import ipaddress
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from bridge.pki import csr
from bridge.pki.certificates import attributes, san_counts
from bridge.specs import KEY_ALGORITHMS, KeyAlgorithm
from tests.kit.issuing import NOW, cn

KEY = csr.generate_key("ecdsa-p256")


def live(
    subject: x509.Name,
    sans: list[x509.GeneralName] | None = None,
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | None = None,
    end: timedelta = timedelta(days=1),
) -> x509.Certificate:
    """A certificate as it may be on a node."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(cn("kubernetes"))
        .public_key(key or KEY.public_key())
        .serial_number(1)
        .not_valid_before(NOW - timedelta(days=400))
        .not_valid_after(NOW + end)
    )
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    return builder.sign(KEY, hashes.SHA256())


def built(certificate: x509.Certificate) -> x509.CertificateSigningRequest:
    return x509.load_pem_x509_csr(csr.build(certificate, KEY))


def attribute(oid: x509.ObjectIdentifier, value: str, kind: _ASN1Type | None = None) -> x509.NameAttribute[str]:
    return x509.NameAttribute(oid, value, kind)


def test_carries_every_attribute_as_it_was_encoded() -> None:
    """Several O values in one RDN, other attributes, string types: the subject is the same to the byte."""
    subject = x509.Name(
        [
            x509.RelativeDistinguishedName(
                [
                    attribute(NameOID.ORGANIZATION_NAME, "system:masters", _ASN1Type.PrintableString),
                    attribute(NameOID.ORGANIZATION_NAME, "kubeadm:cluster-admins", _ASN1Type.PrintableString),
                ]
            ),
            x509.RelativeDistinguishedName([attribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Bücher")]),
            x509.RelativeDistinguishedName([attribute(NameOID.SERIAL_NUMBER, "7", _ASN1Type.PrintableString)]),
            x509.RelativeDistinguishedName([attribute(NameOID.COMMON_NAME, "x", _ASN1Type.PrintableString)]),
        ]
    )
    assert built(live(subject)).subject.public_bytes() == subject.public_bytes()


def test_carries_every_type_of_san() -> None:
    """kubeadm itself would lose all but names and addresses."""
    sans: list[x509.GeneralName] = [
        x509.DNSName("*.wild.example.com"),
        x509.DNSName("cp-1"),
        x509.IPAddress(ipaddress.ip_address("192.0.2.1")),
        x509.IPAddress(ipaddress.ip_address("2001:db8::7")),
        x509.RFC822Name("a@example.com"),
        x509.UniformResourceIdentifier("spiffe://example/x"),
        x509.OtherName(x509.ObjectIdentifier("1.3.6.1.4.1.311.20.2.3"), b"\x0c\x01x"),
        x509.DirectoryName(cn("x")),
        x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
    ]
    request = built(live(cn("kube-apiserver"), sans))
    assert list(request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value) == sans


@pytest.mark.filterwarnings(
    "ignore:Attribute's length must be:UserWarning"
)  # as bridge.pki.certificates does at run time
def test_carries_a_cn_that_is_longer_than_the_standard_allows() -> None:
    """`system:node:` and a long host name; only making such a name anew would be refused."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"system:node:{'n' * 60}", _validate=False)])
    assert attributes(built(live(subject)).subject) == [("2.5.4.3", f"system:node:{'n' * 60}")]


def test_asks_for_nothing_but_sans() -> None:
    """Usages reach the CA by its own means; without SANs there is no extension at all, as in kubeadm's CSRs."""
    assert list(built(live(cn("front-proxy-client"))).extensions) == []


def test_an_expired_certificate_is_good_input() -> None:
    """That is when it is needed most."""
    assert built(live(cn("x"), end=timedelta(days=-1))).is_signature_valid


def test_an_empty_subject_needs_a_san() -> None:
    """Somebody has to be named."""
    name = x509.DNSName("cp-1")
    extension = built(live(x509.Name([]), [name])).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert extension.critical
    with pytest.raises(csr.CannotCarryError):
        csr.build(live(x509.Name([])), KEY)


def test_the_key_is_of_the_old_ones_kind() -> None:
    """`same` follows the certificate, so that no old key is read."""
    for algorithm in KEY_ALGORITHMS:
        certificate = live(cn("x"), key=csr.generate_key(algorithm).public_key())
        assert csr.key_algorithm(certificate, "same") == algorithm
        assert csr.key_algorithm(certificate, "ecdsa-p384") == "ecdsa-p384"


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP521R1()).public_key(),
        ed25519.Ed25519PrivateKey.generate().public_key(),
        rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key(),
    ],
)
def test_a_key_that_kubeadm_does_not_make_is_named(
    key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey,
) -> None:
    """`same` is refused for it, a named algorithm is not."""
    certificate = live(cn("x"), key=key)
    with pytest.raises(csr.CannotCarryError) as e:
        csr.key_algorithm(certificate, "same")
    assert csr.algorithm_name(key) in str(e.value)
    assert csr.key_algorithm(certificate, "rsa-2048") == "rsa-2048"


@pytest.mark.parametrize(
    ("algorithm", "label", "digest"),
    [("rsa-2048", b"RSA PRIVATE KEY", "sha256"), ("ecdsa-p256", b"EC PRIVATE KEY", "sha256"),
     ("ecdsa-p384", b"EC PRIVATE KEY", "sha384")],
)  # fmt: skip
def test_keys_and_signatures_are_as_kubeadms(algorithm: KeyAlgorithm, label: bytes, digest: str) -> None:
    """PKCS#1 or SEC1, and the hash that fits."""
    key = csr.generate_key(algorithm)
    assert csr.key_pem(key).startswith(b"-----BEGIN " + label + b"-----\n")
    assert serialization.load_pem_private_key(csr.key_pem(key), None).public_key() == key.public_key()
    request = x509.load_pem_x509_csr(csr.build(live(cn("x")), key))
    assert request.signature_hash_algorithm is not None
    assert request.signature_hash_algorithm.name == digest
    assert request.public_key() == key.public_key()


def test_each_key_is_new() -> None:
    """A renewal never reuses a key."""
    assert csr.key_pem(csr.generate_key("ecdsa-p256")) != csr.key_pem(csr.generate_key("ecdsa-p256"))


_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20)
_ATTRIBUTES = st.lists(
    st.tuples(
        st.sampled_from([NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.COMMON_NAME]), _TEXT
    ),
    min_size=1,
    max_size=4,
)
_NAMES = st.lists(
    st.from_regex(r"(\*\.)?[a-z0-9-]{1,10}(\.[a-z]{1,5}){0,2}", fullmatch=True).map(x509.DNSName)
    | st.ip_addresses().map(x509.IPAddress),
    max_size=5,
)


@given(_ATTRIBUTES, _NAMES)
def test_nothing_is_lost(subject: list[tuple[x509.ObjectIdentifier, str]], sans: list[x509.GeneralName]) -> None:
    """Whatever is in the certificate is in the CSR, as often."""
    certificate = live(x509.Name([x509.NameAttribute(oid, value) for oid, value in subject]), sans)
    request = built(certificate)
    assert attributes(request.subject) == attributes(certificate.subject)
    assert san_counts(request) == san_counts(certificate)


def spoilt(certificate: x509.Certificate, old: bytes, new: bytes) -> x509.Certificate:
    """The same, with other bytes in one place; its signature is wrong, which nobody asks of a live certificate."""
    der = certificate.public_bytes(serialization.Encoding.DER)
    assert der.count(old) == 1
    return x509.load_der_x509_certificate(der.replace(old, new))


def test_a_key_that_cannot_be_read_is_told() -> None:
    """Of a damaged one nothing is known; a named algorithm needs nothing of it."""
    curve = bytes.fromhex("06082a8648ce3d030107")  # P-256
    certificate = spoilt(live(cn("x")), curve, curve[:-1] + b"\x7f")
    with pytest.raises(csr.CannotCarryError, match="found one that can't be read"):
        csr.key_algorithm(certificate, "same")
    assert csr.key_algorithm(certificate, "rsa-2048") == "rsa-2048"


def test_an_extension_that_is_there_twice_is_told() -> None:
    """Which of the two would count, nobody knows."""
    two = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    builder = x509.CertificateBuilder().subject_name(cn("x")).issuer_name(cn("kubernetes")).public_key(KEY.public_key())
    builder = builder.serial_number(1).not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    builder = builder.add_extension(two, critical=False)
    builder = builder.add_extension(
        x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.5"), b"\x05\x00"), critical=False
    )
    certificate = spoilt(builder.sign(KEY, hashes.SHA256()), b"\x06\x03\x2a\x03\x05", b"\x06\x03\x2a\x03\x04")
    with pytest.raises(csr.CannotCarryError, match="SAN: wanted"):
        csr.build(certificate, KEY)
