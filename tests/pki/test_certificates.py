"""PEM as Kubernetes reads it, and certificates as plain values."""

from __future__ import annotations

import ipaddress
import re
import subprocess
import sys
from base64 import b64encode
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.serialization import pkcs7
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID, ObjectIdentifier
from hypothesis import given
from hypothesis import strategies as st

from bridge.pki import der
from bridge.pki.certificates import (
    attributes,
    certificates_in,
    csr_fingerprint,
    extended_key_usages,
    extension,
    fingerprint,
    has_key_of,
    is_ca,
    is_for,
    is_signed_by,
    load_der_certificate,
    load_pem_certificates,
    name_text,
    oid_label,
    pem,
    san_counts,
    san_entries,
    serial_hex,
    spki,
)
from bridge.pki.csr import build, generate_key, key_pem
from bridge.specs import KEY_ALGORITHMS, KeyAlgorithm
from tests.kit.issuing import NOW, Signer, odd_certificates
from tests.kit.mutants import Draft, Tree, value

ROOT, OTHER = Signer.make("root"), Signer.make("other")
A, B = pem(ROOT.certificate), pem(OTHER.certificate)
KEY = key_pem(ROOT.key)
ODD = odd_certificates(ROOT.certificate)


def certificate(*extensions: x509.ExtensionType, subject: x509.Name | None = None, number: int = 1) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject or x509.Name([]))
        .issuer_name(ROOT.certificate.subject)
        .public_key(ROOT.key.public_key())
        .serial_number(number)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1000))
    )
    for one in extensions:
        builder = builder.add_extension(one, critical=False)
    return builder.sign(ROOT.key, hashes.SHA256())


READABLE = {
    "as written": A + B,
    "CRLF": (A + B).replace(b"\n", b"\r\n"),
    "text around": b"Certificate:\n    Data: \xff\n" + A + b"\nbetween\n" + B + b"\nafter",
    "a byte order mark and a blank line": b"\xef\xbb\xbf\n" + A + B,
    "keys between": KEY + A + KEY + B + KEY,
    "a damaged key between": A + KEY.replace(b"M", b"*") + B,
    "blanks at the ends of lines": (A + B).replace(b"\n", b" \t\n"),
    "blank lines within": A.replace(b"\n", b"\n\n") + B,
    "no line break at the end": A + B.rstrip(),
    "one long line": A + re.sub(rb"(?<=[A-Za-z0-9+/])\n(?=[A-Za-z0-9+/=])", b"", B),
    "a block with headers, which Go skips": A.replace(b"E-----\nM", b"E-----\nA: b\n\nM", 1) + A + B,
    "a block of another type": A.replace(b"CERTIFICATE", b"TRUSTED CERTIFICATE") + A + B,
}


@pytest.mark.parametrize("data", READABLE.values(), ids=READABLE.keys())
def test_reads(data: bytes) -> None:
    """Every form that Go's reader takes is read, in its order."""
    assert load_pem_certificates(data) == [ROOT.certificate, OTHER.certificate]


UNREADABLE = {
    "nothing": b"",
    "text": b"hello",
    "a key": KEY,
    "DER": ROOT.certificate.public_bytes(serialization.Encoding.DER),
    "no end": A[:200],
    "no end, and another": A[:200] + b"\n" + B,
    "not base64": A.replace(b"M", b"*", 1),
    "a letter to spare that is none of base64": A.replace(b"M", b"*M", 1),
    "cut base64": re.sub(rb".\n-----END", b"\n-----END", A),
    "not a certificate": b"-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n",
    "an empty block": b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
    "a good one and a damaged one": A + B.replace(b"M", b"*", 1),
    "a damaged one and a good one": A.replace(b"MII", b"MIJ", 1) + B,
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_refuses(data: bytes) -> None:
    """No certificate, or a damaged one; a good one beside it does not hide that."""
    assert load_pem_certificates(A) == [ROOT.certificate]
    with pytest.raises(ValueError, match=r"\w"):
        load_pem_certificates(data)


def test_der_is_a_certificate_or_a_value_error() -> None:
    """The error is a ValueError also where the library raises another one."""
    assert load_der_certificate(UNREADABLE["DER"]) == ROOT.certificate
    for data in (ODD["an unknown version"], A, b""):
        with pytest.raises(ValueError, match=r"\w"):
            load_der_certificate(data)


@given(st.lists(st.tuples(st.integers(0, len(A + B)), st.integers(0, 40), st.binary(max_size=4)), max_size=3))
def test_any_bytes_are_certificates_or_a_value_error(damages: list[tuple[int, int, bytes]]) -> None:
    """Damage of any kind gives certificates or a ValueError, nothing else."""
    data = A + B
    for place, length, piece in damages:
        data = data[:place] + piece + data[place + length :]
    try:
        found = load_pem_certificates(data)
    except ValueError:
        return
    assert found


def test_a_ca_of_old_kubeadm_is_read_without_a_warning(tmp_path: Path) -> None:
    """Serial number 0 is in use for ten years; neither loading nor looking at it warns, in any thread."""
    path = tmp_path / "ca.crt"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=kubernetes",
        "-set_serial",
        "0",
    ]
    subprocess.run([*command, "-keyout", tmp_path / "ca.key", "-out", path], check=True, capture_output=True)
    script = """
import sys
from concurrent.futures import ThreadPoolExecutor
from bridge.pki.certificates import load_pem_certificates, serial_hex
data = open(sys.argv[1], "rb").read()
with ThreadPoolExecutor(4) as pool:
    print(*set(pool.map(lambda _: (load_pem_certificates(data)[0].serial_number, serial_hex(load_pem_certificates(data)[0])), range(40))))
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-W", "ignore::ResourceWarning", "-c", script, path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout, run.stderr) == ("(0, '00')\n", "")


@pytest.mark.parametrize(
    ("number", "text"), [(1, "01"), (0xF, "0F"), (0xABC, "0ABC"), (0x7FEDCBA987654321, "7FEDCBA987654321")]
)
def test_serial_numbers(tmp_path: Path, number: int, text: str) -> None:
    """Serial numbers are shown as openssl prints them."""
    one = certificate(number=number)
    path = tmp_path / "x.crt"
    path.write_bytes(pem(one))
    shown = subprocess.run(
        ["openssl", "x509", "-in", path, "-noout", "-serial"], capture_output=True, text=True, check=True
    )
    assert (one.serial_number, serial_hex(one)) == (number, text)
    assert shown.stdout == f"serial={text}\n"


@pytest.mark.parametrize(("content", "text"), [(b"\x00", "00"), (b"\xff", "-01"), (b"\x80", "-80")])
def test_serial_numbers_that_no_ca_should_give(content: bytes, text: str) -> None:
    """The number 0, as old CAs of kubeadm have it, and negative ones are shown."""
    draft = Draft.of(ROOT.certificate, ROOT.key)
    draft.tbs[Draft.SERIAL].content = content
    assert serial_hex(load_der_certificate(draft.signed(ROOT.key))) == text


def test_a_value_that_is_no_text_is_shown_in_hex() -> None:
    """A value that is no text, such as the bits of a unique identifier, is shown in hex."""
    odd = x509.NameAttribute(NameOID.X500_UNIQUE_IDENTIFIER, b"\x00\xff", _ASN1Type.BitString)
    assert attributes(x509.Name([odd])) == [("2.5.4.45", "#00ff")]


def test_pem_is_kubeadms() -> None:
    """One block, 64 characters a line, LF, a line break at the end; and read again it is the same certificate."""
    lines = A.decode().split("\n")
    assert (lines[0], lines[-2], lines[-1]) == ("-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----", "")
    assert {len(line) for line in lines[1:-3]} == {64}
    assert load_pem_certificates(A) == [ROOT.certificate]
    assert len(fingerprint(ROOT.certificate)) == 64


def test_san_entries_of_every_type() -> None:
    """Entries are grouped by type; IP addresses are normalised, and names stay as they stand there."""
    directory = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a,b")])
    names: list[x509.GeneralName] = [
        x509.DNSName("*.Example.com"),
        x509.DNSName("*.Example.com"),
        x509.IPAddress(ipaddress.ip_address("2001:db8:0::7")),
        x509.IPAddress(ipaddress.ip_address("192.0.2.10")),
        x509.RFC822Name("a@example.com"),
        x509.UniformResourceIdentifier("spiffe://x/y"),
        x509.DirectoryName(directory),
        x509.RegisteredID(ObjectIdentifier("1.2.3.4")),
        x509.OtherName(ObjectIdentifier("1.2.3"), b"\x0c\x01a"),
    ]
    one = certificate(x509.SubjectAlternativeName(names))
    assert san_entries(one) == {
        ("DNS", "*.Example.com"),
        ("IP", "2001:db8::7"),
        ("IP", "192.0.2.10"),
        ("email", "a@example.com"),
        ("URI", "spiffe://x/y"),
        ("dirName", r"CN=a\,b"),
        ("registeredID", "1.2.3.4"),
        ("otherName", "1.2.3:0c0161"),
    }
    assert san_counts(one)["DNS", "*.Example.com"] == 2
    assert san_entries(certificate()) == set()


def test_extended_key_usages() -> None:
    """No extension is not the same as none of them."""
    assert extended_key_usages(certificate()) is None
    one = certificate(x509.ExtendedKeyUsage([ObjectIdentifier("1.3.6.1.5.5.7.3.2"), ObjectIdentifier("1.2.3")]))
    assert extended_key_usages(one) == frozenset({"1.3.6.1.5.5.7.3.2", "1.2.3"})


def test_is_ca() -> None:
    """A certificate is a CA's only if its extension says so and can be read."""
    assert is_ca(ROOT.certificate)
    assert not is_ca(certificate())
    assert not is_ca(certificate(x509.BasicConstraints(ca=False, path_length=None)))
    assert not is_ca(load_der_certificate(ODD["an extension twice"]))


def test_names() -> None:
    """Every attribute in its order, several of a kind too; for people the last one first, with escapes."""
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:masters"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "a+b"),
            x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes-admin"),
        ]
    )
    one = certificate(subject=name)
    assert attributes(one.subject) == [
        ("2.5.4.10", "system:masters"),
        ("2.5.4.10", "a+b"),
        ("2.5.4.3", "kubernetes-admin"),
    ]
    assert name_text(one.subject) == r"CN=kubernetes-admin,O=a\+b,O=system:masters"
    assert (attributes(x509.Name([])), name_text(x509.Name([]))) == ([], "")


def test_damaged_extensions_are_a_value_error() -> None:
    """A damaged extension is a ValueError, whichever error the library raises."""
    good = x509.UnrecognizedExtension(ObjectIdentifier("1.2.3"), b"x")
    bad = x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.17"), b"\x30\x05nonsense")
    assert extension(certificate(good), x509.SubjectAlternativeName) is None
    with pytest.raises(ValueError, match=r"\w"):
        san_entries(certificate(bad))


FORMS = {
    "PEM": A + B,
    "PEM under text": b"Bag Attributes\n" + A + B,
    "PKCS#7": pkcs7.serialize_certificates([ROOT.certificate, OTHER.certificate], serialization.Encoding.DER),
}
PKCS7_PEM = pkcs7.serialize_certificates([ROOT.certificate, OTHER.certificate], serialization.Encoding.PEM)
FORMS |= {
    f"PEM of {label}": PKCS7_PEM.replace(b"PKCS7", label.encode()) for label in ("PKCS7", "CMS", "PKCS #7 SIGNED DATA")
}


@pytest.mark.parametrize("form", FORMS)
def test_certificates_are_read_in_every_form_that_cas_send(form: str) -> None:
    """Certificates are read under any file name; a single one as DER, too."""
    assert set(certificates_in(FORMS[form])) == {ROOT.certificate, OTHER.certificate}
    assert certificates_in(UNREADABLE["DER"]) == [ROOT.certificate]


@pytest.mark.parametrize("data", [b"", b"hello", FORMS["PKCS#7"][:-1], PKCS7_PEM.replace(b"M", b"*", 1)])
def test_a_file_without_certificates_is_named_so(data: bytes) -> None:
    """A file without certificates in any form is an error that says so."""
    with pytest.raises(ValueError, match=r"^no certificate in PEM, DER or PKCS#7$"):
        certificates_in(data)


def test_a_pkcs7_whose_certificate_cannot_be_read_is_refused() -> None:
    """The library looks only when it is asked for a name."""
    with pytest.raises(ValueError, match=r"^no certificate in PEM, DER or PKCS#7$"):
        certificates_in(ODD["an unknown version, PKCS#7"])


def test_a_refusal_of_pem_names_the_block() -> None:
    """The refusal gives the block's number, or where it begins."""
    for data, reads in (
        (b"", "no PEM block of type CERTIFICATE"),
        (A + B.replace(b"M", b"*", 1), "PEM block 2 is not base64"),
        (A + A[:200], f"a PEM block that begins at byte {len(A)} and has no end"),
        (A[:200] + b"\n" + B, "a PEM block that begins at byte 0 and has no end"),
    ):
        with pytest.raises(ValueError, match=f"^{reads}$"):
            load_pem_certificates(data)
    with pytest.raises(ValueError, match=r"^PEM block 2 is not an X.509 certificate: .*ParseError"):
        load_pem_certificates(A + UNREADABLE["not a certificate"])


@pytest.mark.parametrize("algorithm", KEY_ALGORITHMS)
def test_a_key_is_seen_by_its_public_half(algorithm: KeyAlgorithm) -> None:
    """The key is found in each form, among other blocks; another key is not, and an encrypted one can't be read."""
    key, other = generate_key(algorithm), generate_key(algorithm)
    own = Signer.make(key=key).certificate
    for form in (serialization.PrivateFormat.TraditionalOpenSSL, serialization.PrivateFormat.PKCS8):
        plain, wrong = (
            each.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()) for each in (key, other)
        )
        assert has_key_of(A + plain + wrong, own) is True
        assert has_key_of(wrong, own) is False
        assert has_key_of(plain.replace(b"M", b"*", 1), own) is None
        assert has_key_of(plain.replace(b"\nM", b"\n*M", 1), own) is None
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    assert has_key_of(secret, own) is not True
    assert has_key_of(A, own) is False


VERSION = value(der.INTEGER, b"\x01")
INNER = value(der.OCTET_STRING, bytes(32))
HALVES: dict[str, tuple[Tree, bool | None]] = {
    "a curve's point": (value(der.SEQUENCE, VERSION, INNER, value(0xA1, value(der.BIT_STRING, bytes(64)))), False),
    "a point that is too short": (value(der.SEQUENCE, VERSION, INNER, value(0xA1, value(der.BIT_STRING, bytes(63)))), None),
    "no point": (value(der.SEQUENCE, VERSION, INNER), None),
    "another field than the point": (value(der.SEQUENCE, VERSION, INNER, value(0xA0, value(der.BIT_STRING, bytes(64)))), None),
    "an empty point": (value(der.SEQUENCE, VERSION, INNER, value(0xA1)), None),
    "a modulus": (value(der.SEQUENCE, VERSION, value(der.INTEGER, bytes(64))), False),
    "a modulus that is too short": (value(der.SEQUENCE, VERSION, value(der.INTEGER, bytes(63))), None),
    "a version alone": (value(der.SEQUENCE, VERSION), None),
    "nothing": (value(der.SEQUENCE), None),
    "no version": (value(der.SEQUENCE, INNER, value(der.INTEGER, bytes(64))), None),
    "no sequence": (VERSION, None),
    "PKCS#8 without a key": (value(der.SEQUENCE, VERSION, value(der.SEQUENCE)), None),
}  # fmt: skip


@pytest.mark.parametrize("half", HALVES)
def test_a_key_without_its_public_half_cannot_be_seen(half: str) -> None:
    """One with a half of that size is another key's."""
    tree, is_seen = HALVES[half]
    body = b64encode(tree.encoded())
    block = b"-----BEGIN EC PRIVATE KEY-----\n" + body + b"\n-----END EC PRIVATE KEY-----\n"
    assert has_key_of(block, ROOT.certificate) is is_seen


def test_who_signed_it_and_for_which_key() -> None:
    """Names and signature both count for the one, the public key alone for the other."""
    leaf = Signer.make("leaf", parent=ROOT, ca=False)
    namesake = Signer.make("root")
    assert is_signed_by(leaf.certificate, ROOT.certificate)
    assert is_signed_by(ROOT.certificate, ROOT.certificate)
    assert not is_signed_by(leaf.certificate, OTHER.certificate)
    assert not is_signed_by(leaf.certificate, namesake.certificate)
    assert not is_signed_by(leaf.certificate, Signer.make("other name", key=ROOT.key).certificate)
    request = x509.load_pem_x509_csr(build(leaf.certificate, leaf.key))
    assert is_for(leaf.certificate, request)
    assert not is_for(ROOT.certificate, request)
    assert spki(leaf.key.public_key()) == leaf.key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def test_what_strangers_send_is_kept_nowhere() -> None:
    """
    A door reads thousands of different CSRs, and certificates that they are to replace, each with up to a megabyte of
    names, which take thirty of memory.
    """
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(ROOT.key, hashes.SHA256())
    old = Signer.make("stranger").certificate
    before = sys.getrefcount(request), sys.getrefcount(old)
    assert re.fullmatch("[0-9a-f]{64}", csr_fingerprint(request))
    assert (san_counts(request), san_entries(request)) == (Counter(), set())
    assert (san_counts(old), pem(old)) == (Counter(), old.public_bytes(serialization.Encoding.PEM))
    assert (sys.getrefcount(request), sys.getrefcount(old)) == before


def test_oids_have_names_where_there_are_some() -> None:
    """The number is there in any case."""
    assert oid_label("1.3.6.1.5.5.7.3.3") == "codeSigning (1.3.6.1.5.5.7.3.3)"
    assert oid_label("1.2.3.4") == "1.2.3.4"
