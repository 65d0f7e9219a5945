"""What a person reads of a certificate or a CSR is one printable line, also where it can't be read."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.pki import csr
from bridge.pki.certificates import load_der_certificate
from bridge.pki.csr import fingerprint_text, issuer_line, key_line, sans_line, subject_line
from tests.kit.issuing import Signer, cn, odd_certificates

KEY = csr.generate_key("ecdsa-p256")


def request(*names: str, subject: x509.Name | None = None) -> x509.CertificateSigningRequest:
    naming = csr.Naming(subject=cn("x") if subject is None else subject, sans=csr.alternative_names(names))
    return x509.load_pem_x509_csr(csr.build_for(naming, KEY))


def spoilt(request: x509.CertificateSigningRequest, old: bytes, new: bytes) -> x509.CertificateSigningRequest:
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
    odd = spoilt(request(subject=cn("kubernetes")), b"\x0c\x0akubernetes", b"\x0c\x0akubernete\xff")
    der = Signer.make("leaf", parent=Signer.make("a root")).certificate.public_bytes(Encoding.DER)
    below = x509.load_der_x509_certificate(der.replace(b"\x0c\x06a root", b"\x0c\x06a roo\xff"))
    for text, what, reason in (
        (key_line(spoilt(request(), curve, curve[:-1] + b"\x7f")), "one that", "1.2.840.10045.3.1.127"),
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
