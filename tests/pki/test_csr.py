"""CSRs carry all of the live certificate's subject and SANs, or an error says what they can't carry."""

from __future__ import annotations

import base64
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
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import AttributeOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from bridge.pki import csr
from bridge.pki.certificates import attributes, load_der_certificate, san_counts, san_entry
from bridge.pki.csr import (
    OddRequestError,
    fingerprint_text,
    issuer_line,
    key_line,
    read_strictly,
    sans_line,
    subject_line,
    subject_of,
)
from bridge.specs import KEY_ALGORITHMS, KeyAlgorithm
from tests.kit.issuing import NOW, Signer, cn, odd_certificates

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


# --- display -------------------------------------------------------------------------------------------------------------


def request(*names: str, subject: x509.Name | None = None) -> x509.CertificateSigningRequest:
    naming = csr.Naming(subject=cn("x") if subject is None else subject, sans=csr.alternative_names(names))
    return x509.load_pem_x509_csr(csr.build_for(naming, KEY))


def spoilt_display(request: x509.CertificateSigningRequest, old: bytes, new: bytes) -> x509.CertificateSigningRequest:
    """With other bytes of the same number in one place."""
    der = request.public_bytes(Encoding.DER)
    assert der.count(old) == 1
    return x509.load_der_x509_csr(der.replace(old, new))


def test_names() -> None:
    """An empty subject is shown as empty; characters that steer a terminal are not printed."""
    certificate = Signer.make("leaf", parent=Signer.make("root"), ca=False).certificate
    assert (subject_line(certificate), issuer_line(certificate)) == ("CN=leaf", "CN=root")
    assert subject_line(request("a", subject=x509.Name([]))) == "(no subject)"
    assert "\x1b" not in subject_line(request(subject=cn("a\x1b[2J")))


def test_sans_are_sorted() -> None:
    """They are sorted by type, then by name; an empty list is shown as none."""
    assert sans_line(request("b", "192.0.2.1", "a")) == "DNS:a, DNS:b, IP:192.0.2.1"
    assert sans_line(request()) == "none"


def test_of_many_sans_the_first_hundred_are_reported() -> None:
    """The text has the first hundred SANs, and the number of the others."""
    names = [f"n{number:03}" for number in range(101)]
    texts = [f"DNS:{name}" for name in names]
    assert sans_line(request(*names[:100])) == ", ".join(texts[:100])
    assert sans_line(request(*names)) == ", ".join([*texts[:100], "and 1 more"])


def test_keys() -> None:
    """A key is shown by algorithm and size."""
    assert key_line(request()) == "ecdsa-p256"


def test_what_cannot_be_read_is_reported_with_its_reason() -> None:
    """The reason stands in the place of the value."""
    curve = bytes.fromhex("06082a8648ce3d030107")  # P-256
    twice = load_der_certificate(odd_certificates(Signer.make().certificate)["an extension twice"])
    odd = spoilt_display(request(subject=cn("kubernetes")), b"\x0c\x0akubernetes", b"\x0c\x0akubernete\xff")
    der = Signer.make("leaf", parent=Signer.make("a root")).certificate.public_bytes(Encoding.DER)
    below = x509.load_der_x509_certificate(der.replace(b"\x0c\x06a root", b"\x0c\x06a roo\xff"))
    for text, what, reason in (
        (key_line(spoilt_display(request(), curve, curve[:-1] + b"\x7f")), "one that", "1.2.840.10045.3.1.127"),
        (sans_line(twice), "extensions that", "Duplicate"),
        (subject_line(odd), "a subject that", "InvalidValue"),
        (issuer_line(below), "an issuer that", "InvalidValue"),
    ):
        assert text.startswith(f"({what} can't be read: ")
        assert reason in text


@pytest.mark.parametrize(
    ("digest", "text"),
    [
        ("00" * 32, "00000-00000-00000-00000"),
        ("ff" * 32, "ZZZZZ-ZZZZZ-ZZZZZ-ZZZZZ"),
        ("00443214c74254b635cf84653a56d7c675be77df", "01234-56789-ABCDE-FGHJK"),
    ],
)
def test_fingerprints_are_read_out_in_groups(digest: str, text: str) -> None:
    """A fingerprint is twenty digits and letters."""
    assert fingerprint_text(digest) == text


# --- csr fields ----------------------------------------------------------------------------------------------------------


ONE = (("O", "a"), ("CN", "one"))


def name(*attributes: tuple[str, str], kind: _ASN1Type = _ASN1Type.UTF8String) -> list[x509.NameAttribute[str]]:
    oids = {"O": NameOID.ORGANIZATION_NAME, "CN": NameOID.COMMON_NAME}
    return [x509.NameAttribute(oids[which], value, kind) for which, value in attributes]


def csr_with(
    subject: x509.Name | None = None, *extensions: x509.ExtensionType, key: rsa.RSAPrivateKey | None = None
) -> bytes:
    """In DER."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name(name(*ONE)) if subject is None else subject
    )
    for each in extensions:
        builder = builder.add_extension(each, critical=False)
    return builder.sign(key or KEY, hashes.SHA256()).public_bytes(Encoding.DER)


def pem(der: bytes) -> bytes:
    return x509.load_der_x509_csr(der).public_bytes(Encoding.PEM)


def raw_pem(der: bytes) -> bytes:
    head = b"-----%b CERTIFICATE REQUEST-----\n"
    return head % b"BEGIN" + base64.encodebytes(der) + head % b"END"


def with_password() -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(name(*ONE)))
    return (
        builder.add_attribute(AttributeOID.CHALLENGE_PASSWORD, b"secret")
        .sign(KEY, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )


def sans(count: int) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.DNSName(f"n{number}") for number in range(count)])


def spoilt_csr_fields(der: bytes, old: bytes, new: bytes) -> bytes:
    assert der.count(old) == 1
    assert len(old) == len(new)
    return raw_pem(der.replace(old, new))


PRINTABLE = csr_with(x509.Name(name(*ONE, kind=_ASN1Type.PrintableString)))


TWICE = x509.SubjectAlternativeName([x509.DNSName("a"), x509.DNSName("a")])


CHANGED = (CSR := csr_with())[:-1] + bytes([CSR[-1] ^ 1])


UNREADABLE = "a part of the CSR can't be read"


ODD = {
    "too large": (b" " * 16385, "the CSR has more than 16 KiB"),
    "two blocks": (pem(csr_with()) * 2, "the request is not one PEM block of a CSR, and nothing else"),
    "text before it": (b"x" + pem(csr_with()), "the request is not one PEM block of a CSR, and nothing else"),
    "no base64": (pem(csr_with()).replace(b"\nMI", b"\n=I"), "the CSR is not in DER"),
    "a byte more": (raw_pem(csr_with() + b"\0"), "the CSR is not in DER"),
    "another sequence": (raw_pem(b"\x30\x03\x02\x01\x00"), UNREADABLE),
    "another curve": (
        spoilt_csr_fields(csr_with(), b"\x2a\x86\x48\xce\x3d\x03\x01\x07", b"\x2a\x86\x48\xce\x3d\x03\x01\x7f"),
        UNREADABLE,
    ),
    "another signature": (raw_pem(CHANGED), "the CSR is not signed with its own key"),
    "two values in an RDN": (
        pem(csr_with(x509.Name([x509.RelativeDistinguishedName(name(*ONE))]))),
        "the subject has several values in one RDN",
    ),
    "a BMPString": (
        pem(csr_with(x509.Name(name(*ONE, kind=_ASN1Type.BMPString)))),
        "the subject has a value that is neither PrintableString nor UTF8String",
    ),
    "no PrintableString": (spoilt_csr_fields(PRINTABLE, b"\x13\x03one", b"\x13\x03on@"), UNREADABLE),
    "an escape": (
        pem(csr_with(x509.Name(name(("CN", "a\x1b[2J"))))),
        "the subject has a value that is empty or can't be printed",
    ),
    "two CNs": (pem(csr_with(x509.Name(name(("CN", "a"), ("CN", "b"))))), "the subject has more than one CN"),
    "a password": (pem(with_password()), "the CSR has attributes besides the requested extensions"),
    "a CA": (
        pem(csr_with(None, x509.BasicConstraints(ca=True, path_length=None))),
        "the CSR asks for extensions besides SANs",
    ),
    "65 SANs": (pem(csr_with(None, sans(65))), "the CSR has more than 64 SANs"),
    "a SAN twice": (pem(csr_with(None, TWICE)), "the CSR has a SAN twice"),
    "an exponent of 3": (
        pem(csr_with(key=rsa.generate_private_key(3, 2048))),
        "the CSR's key has an odd exponent",
    ),
}


@pytest.mark.parametrize(("data", "sentence"), ODD.values(), ids=ODD.keys())
def test_what_readers_could_take_in_two_ways_is_refused(data: bytes, sentence: str) -> None:
    """Each ambiguous form is refused with its own sentence."""
    with pytest.raises(OddRequestError) as e:
        read_strictly(data)
    assert str(e.value) == sentence


@pytest.mark.parametrize("kind", [_ASN1Type.UTF8String, _ASN1Type.PrintableString])
def test_a_plain_request_says_all_that_it_asks_for(kind: _ASN1Type) -> None:
    """A plain request is one block, with any text round it; 64 SANs are not too many, nor is a list of groups."""
    groups = (("O", "b"), ("O", "a"), ("CN", "one"))
    der = csr_with(x509.Name(name(*groups, kind=kind)), sans(64))
    found = read_strictly(b"\n" + pem(der).replace(b"\n", b"\r\n") + b" \n")
    assert (found.cn, found.organizations, found.key) == ("one", ("a", "b"), "ecdsa-p256")
    assert found.sans == {("DNS", f"n{number}") for number in range(64)}
    assert found.pem == pem(der)
    assert found.parsed.public_bytes(Encoding.DER) == der
    bare = read_strictly(pem(csr_with(x509.Name(name(("O", "a"))))))
    assert (bare.cn, bare.organizations, bare.sans) == ("", ("a",), frozenset())


def test_the_largest_request_is_read() -> None:
    """White space up to the limit does no harm."""
    data = pem(csr_with())
    assert read_strictly(data + b" " * (16384 - len(data))).cn == "one"
