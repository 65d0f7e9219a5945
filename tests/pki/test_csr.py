"""CSRs carry all of the live certificate's subject and SANs, or an error says what they can't carry."""

from __future__ import annotations

import ipaddress
import re
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from bridge.pki import csr
from bridge.pki.certificates import attributes, san_counts, san_entry
from bridge.pki.csr import subject_of
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


def test_carries_a_cn_that_is_longer_than_the_standard_allows() -> None:
    """`system:node:` and a long host name, in a live certificate and in a subject that is made anew."""
    subject = subject_of(f"system:node:{'n' * 60}")
    assert attributes(built(live(subject)).subject) == [("2.5.4.3", f"system:node:{'n' * 60}")]


def test_asks_for_nothing_but_sans() -> None:
    """Usages reach the CA by its own means; without SANs there is no extension at all, as in kubeadm's CSRs."""
    assert list(built(live(cn("front-proxy-client"))).extensions) == []


def test_an_expired_certificate_is_good_input() -> None:
    """An expired certificate can be renewed, since that is when it is needed most."""
    assert built(live(cn("x"), end=timedelta(days=-1))).is_signature_valid


def test_an_empty_subject_needs_a_san() -> None:
    """A certificate has to name its holder."""
    name = x509.DNSName("cp-1")
    extension = built(live(x509.Name([]), [name])).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert extension.critical
    reads = "^subject: the live certificate has neither a subject nor a SAN$"
    with pytest.raises(csr.CannotCarryError, match=reads):
        csr.build(live(x509.Name([])), KEY)


def test_what_a_csr_cannot_say_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name that would be lost, as often as it would, and both subjects."""
    certificate = live(cn("x"), [x509.DNSName("a"), x509.DNSName("b"), x509.DNSName("c")])
    lost = re.escape("SAN: wanted DNS:a, DNS:c, a CSR can't say it")
    without, other = built(live(cn("x"), [x509.DNSName("b")])), built(live(cn("y")))
    monkeypatch.setattr(csr, "_signed", lambda *_: without)
    with pytest.raises(csr.CannotCarryError, match=f"^{lost}$"):
        csr.build(certificate, KEY)
    monkeypatch.setattr(csr, "_signed", lambda *_: other)
    with pytest.raises(csr.CannotCarryError, match=r"^subject: wanted CN=x, a CSR can only say CN=y$"):
        csr.build(certificate, KEY)


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
    wanted = f"wanted one of {', '.join(KEY_ALGORITHMS)}, found {csr.algorithm_name(key)}"
    assert str(e.value) == f"key: {wanted} in the live certificate"
    assert e.value.hint == 'set renewal.key to one of them instead of "same"'
    assert csr.key_algorithm(certificate, "rsa-2048") == "rsa-2048"


@pytest.mark.parametrize(
    ("algorithm", "label", "digest"),
    [("rsa-2048", b"RSA PRIVATE KEY", "sha256"), ("ecdsa-p256", b"EC PRIVATE KEY", "sha256"),
     ("ecdsa-p384", b"EC PRIVATE KEY", "sha384")],
)  # fmt: skip
def test_keys_and_signatures_are_as_kubeadms(algorithm: KeyAlgorithm, label: bytes, digest: str) -> None:
    """Keys are PKCS#1 or SEC1, and signatures have the hash that fits."""
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
    """The CSR has every name of the certificate, as often."""
    certificate = live(x509.Name([x509.NameAttribute(oid, value) for oid, value in subject]), sans)
    request = built(certificate)
    assert attributes(request.subject) == attributes(certificate.subject)
    assert san_counts(request) == san_counts(certificate)


def spoilt(certificate: x509.Certificate, old: bytes, new: bytes) -> x509.Certificate:
    """The same, with other bytes in one place; its signature is wrong, which is not checked of a live certificate."""
    der = certificate.public_bytes(serialization.Encoding.DER)
    assert der.count(old) == 1
    return x509.load_der_x509_certificate(der.replace(old, new))


def test_a_key_that_cannot_be_read_is_reported() -> None:
    """A live key that can't be read is an error, unless the settings name the new key's algorithm."""
    curve = bytes.fromhex("06082a8648ce3d030107")  # P-256
    certificate = spoilt(live(cn("x")), curve, curve[:-1] + b"\x7f")
    with pytest.raises(csr.CannotCarryError, match="found one that can't be read"):
        csr.key_algorithm(certificate, "same")
    assert csr.key_algorithm(certificate, "rsa-2048") == "rsa-2048"


def test_an_extension_that_is_there_twice_is_reported() -> None:
    """A certificate with an extension twice is refused, because it is unknown which of the two counts."""
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


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("cp-1", ("DNS", "cp-1")),
        ("API.example.com", ("DNS", "API.example.com")),
        ("*.example.com", ("DNS", "*.example.com")),
        ("1.example", ("DNS", "1.example")),
        ("192.0.2.1", ("IP", "192.0.2.1")),
        ("2001:DB8:0::7", ("IP", "2001:db8::7")),
        ("IP:192.0.2.1", ("IP", "192.0.2.1")),
        ("IP:2001:db8::7", ("IP", "2001:db8::7")),
        ("DNS:cp-1", ("DNS", "cp-1")),
        ("a" * 253, ("DNS", "a" * 253)),
    ],
)
def test_a_san_is_an_address_or_a_name(text: str, entry: tuple[str, str]) -> None:
    """A SAN is read as kubeadm reads `certSANs`; a type in front of it decides."""
    assert san_entry(csr.general_name(text)) == entry


@pytest.mark.parametrize(
    "text",
    [
        *("", "a_b", "-a", "a-", "a..b", ".a", "a.", "*", "*.", "a.*.b", "**.b", "a b", "URI:a"),
        *("1.2.3", "10", "DNS:192.0.2.1", "DNS:", "a" * 254, "fe80::1%eth0", "IP:fe80::1%eth0"),
    ],
)
def test_what_is_neither_is_refused(text: str) -> None:
    """The error quotes what was found, cut if it is long."""
    found = text.removeprefix("DNS:")
    with pytest.raises(ValueError, match=f"^{re.escape(f'{WANTED_SAN}, found {found[:60]!r}')}$"):
        csr.general_name(text)


WANTED_SAN = "wanted an IP address, or a DNS name such as api.example.com"


def test_an_address_by_its_kind_is_nothing_else() -> None:
    """A name is no address, and an address is read as one."""
    with pytest.raises(ValueError, match="cp-1"):
        csr.general_name("IP:cp-1")


def test_sans_are_there_once_and_in_their_order() -> None:
    """An address in two spellings is one."""
    names = csr.alternative_names(["b", "2001:db8::7", "a", "b", "2001:DB8:0::7"])
    assert list(map(san_entry, names)) == [("DNS", "b"), ("IP", "2001:db8::7"), ("DNS", "a")]
    assert csr.names_of(names) == {("DNS", "b"), ("IP", "2001:db8::7"), ("DNS", "a")}


def test_a_subject_is_as_go_writes_it() -> None:
    """All groups in one RDN, before the CN."""
    subject = csr.subject_of("admin", ["system:masters", "a"])
    assert [sorted((a.oid, a.value) for a in rdn) for rdn in subject.rdns] == [
        [(NameOID.ORGANIZATION_NAME, "a"), (NameOID.ORGANIZATION_NAME, "system:masters")],
        [(NameOID.COMMON_NAME, "admin")],
    ]
    assert csr.subject_of("admin") == cn("admin")


def test_a_naming_is_of_what_says_exactly_that() -> None:
    """A naming fits in any order, with no name or attribute more, and none less."""
    groups = [attribute(NameOID.ORGANIZATION_NAME, "g"), attribute(NameOID.COMMON_NAME, "x")]
    a, b = x509.DNSName("a"), x509.IPAddress(ipaddress.ip_address("192.0.2.1"))
    naming = csr.Naming(subject=x509.Name(groups), sans=(a, b))
    assert naming.is_of(live(x509.Name(groups[::-1]), [b, a]))
    assert naming.is_of(x509.load_pem_x509_csr(csr.build_for(naming, KEY)))
    wrong: list[tuple[int, list[x509.GeneralName]]] = [(0, [a]), (0, []), (0, [a, b, x509.DNSName("c")]), (1, [a, b])]
    for first, sans in wrong:
        assert not naming.is_of(live(x509.Name(groups[first:]), sans))
    bare = csr.Naming(subject=cn("x"))
    assert bare.is_of(live(cn("x")))
    assert not bare.is_of(live(cn("x"), [a]))
    assert (naming.text, bare.text) == ("CN=x,O=g with DNS:a, IP:192.0.2.1", "CN=x")
    assert csr.Naming(subject=x509.Name([]), sans=(a,)).text == "(empty subject) with DNS:a"
    assert csr.naming_of(live(x509.Name(groups), [a, b])) == naming


def test_the_first_key_of_a_text_is_read() -> None:
    """As kubelets keep theirs behind certificates; a text that is longer than such a key is not read at all."""
    certificate, other = live(cn("x")).public_bytes(serialization.Encoding.PEM), csr.generate_key("ecdsa-p256")
    block = csr.key_pem(KEY)
    text = certificate + block + csr.key_pem(other)
    assert csr.key_block(text) == block
    assert csr.key_block(certificate) == certificate
    for each in (text, block):
        found = csr.load_key(each, KEY.public_key())
        assert isinstance(found, ec.EllipticCurvePrivateKey)
        assert found.public_key() == KEY.public_key()
    rsa_key = csr.generate_key("rsa-2048")
    pkcs8 = rsa_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    assert isinstance(csr.load_key(pkcs8, rsa_key.public_key()), rsa.RSAPrivateKey)
    with pytest.raises(ValueError, match=rf"^wanted a private key of at most 400 bytes, found {len(pkcs8)}$"):
        csr.load_key(pkcs8, KEY.public_key())
    with pytest.raises(ValueError, match="at most 2448 bytes, found 2449"):
        csr.load_key(bytes(2449), rsa_key.public_key())
    with pytest.raises(ValueError, match="PEM"):
        csr.load_key(bytes(2448), rsa_key.public_key())


def _spoiled(key: rsa.RSAPrivateKey, name: str) -> bytes:
    """The key in PKCS #1, with one number off by two, so that an odd one stays odd."""
    values = {one: getattr(key.private_numbers(), one) for one in ("p", "q", "d", "dmp1", "dmq1", "iqmp")}
    values[name] += 2
    numbers = rsa.RSAPrivateNumbers(**values, public_numbers=key.public_key().public_numbers())
    return csr.key_pem(numbers.private_key(unsafe_skip_rsa_key_validation=True))


def test_an_rsa_key_whose_numbers_do_not_fit_each_other_is_broken() -> None:
    """As Go's `Validate` has it, without the test of primes, which takes as long as making a key."""
    key = rsa.generate_private_key(65537, 2048)
    assert csr.load_key(csr.key_pem(key), key.public_key()).public_key() == key.public_key()
    for name in ("d", "dmp1", "dmq1", "iqmp"):
        with pytest.raises(ValueError, match="numbers fit each other"):
            csr.load_key(_spoiled(key, name), key.public_key())


def test_kinds_of_keys_have_names() -> None:
    """kubeadm's kinds of keys have names, and so do others."""
    for algorithm in KEY_ALGORITHMS:
        key = csr.generate_key(algorithm).public_key()
        assert csr.algorithm_name(key) == csr.known_algorithm(key) == algorithm
    for other, label in (
        (ec.generate_private_key(ec.SECP521R1()), "ecdsa-secp521r1"),
        (ed25519.Ed25519PrivateKey.generate(), "ed25519"),
    ):
        assert (csr.algorithm_name(other.public_key()), csr.known_algorithm(other.public_key())) == (label, None)


@pytest.mark.attack("N5")
def test_a_file_of_beginnings_is_read_once() -> None:
    """A further pair's key file may be its program's own: a megabyte of BEGIN lines would hold up root's runs for minutes."""
    begin, key = b"-----BEGIN RSA PRIVATE KEY-----\n", csr.key_pem(csr.generate_key("rsa-2048"))
    text, began = begin * 10_000, time.process_time()
    assert csr.key_block(text) == text
    assert csr.key_block(text + key) == key
    assert time.process_time() - began < 5


def test_a_megabyte_of_attributes_is_looked_through_once() -> None:
    """A stranger's CSR with tens of thousands of them would keep a door's process for a quarter of a minute."""
    other, usual = x509.ObjectIdentifier("1.2.3"), x509.ObjectIdentifier("1.2.840.113549.1.9.14")
    asked: Any = SimpleNamespace(attributes=[SimpleNamespace(oid=one) for one in [other, usual] for _ in range(20_000)])
    began = time.process_time()
    found = csr.odd_attributes(asked)

    assert found == [*["1.2.3"] * 20_000, *[usual.dotted_string] * 19_999]
    assert time.process_time() - began < 2
