"""A stranger's CSR is read in one way or refused, by a sentence that says nothing of what is in it."""

from __future__ import annotations

import base64

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import AttributeOID, NameOID

from bridge.pki.csr import OddRequestError, generate_key, read_strictly

KEY = generate_key("ecdsa-p256")
ONE = (("O", "a"), ("CN", "one"))


def name(*attributes: tuple[str, str], kind: _ASN1Type = _ASN1Type.UTF8String) -> list[x509.NameAttribute[str]]:
    oids = {"O": NameOID.ORGANIZATION_NAME, "CN": NameOID.COMMON_NAME}
    return [x509.NameAttribute(oids[which], value, kind) for which, value in attributes]


def csr(
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


def spoilt(der: bytes, old: bytes, new: bytes) -> bytes:
    assert der.count(old) == 1
    assert len(old) == len(new)
    return raw_pem(der.replace(old, new))


PRINTABLE = csr(x509.Name(name(*ONE, kind=_ASN1Type.PrintableString)))
TWICE = x509.SubjectAlternativeName([x509.DNSName("a"), x509.DNSName("a")])
CHANGED = (CSR := csr())[:-1] + bytes([CSR[-1] ^ 1])
UNREADABLE = "a part of the CSR can't be read"
ODD = {
    "too large": (b" " * 16385, "the CSR has more than 16 KiB"),
    "two blocks": (pem(csr()) * 2, "the request is not one PEM block of a CSR, and nothing else"),
    "text before it": (b"x" + pem(csr()), "the request is not one PEM block of a CSR, and nothing else"),
    "no base64": (pem(csr()).replace(b"\nMI", b"\n=I"), "the CSR is not in DER"),
    "a byte more": (raw_pem(csr() + b"\0"), "the CSR is not in DER"),
    "another sequence": (raw_pem(b"\x30\x03\x02\x01\x00"), UNREADABLE),
    "another curve": (
        spoilt(csr(), b"\x2a\x86\x48\xce\x3d\x03\x01\x07", b"\x2a\x86\x48\xce\x3d\x03\x01\x7f"),
        UNREADABLE,
    ),
    "another signature": (raw_pem(CHANGED), "the CSR is not signed with its own key"),
    "two values in an RDN": (
        pem(csr(x509.Name([x509.RelativeDistinguishedName(name(*ONE))]))),
        "the subject has several values in one RDN",
    ),
    "a BMPString": (
        pem(csr(x509.Name(name(*ONE, kind=_ASN1Type.BMPString)))),
        "the subject has a value that is neither PrintableString nor UTF8String",
    ),
    "no PrintableString": (spoilt(PRINTABLE, b"\x13\x03one", b"\x13\x03on@"), UNREADABLE),
    "an escape": (
        pem(csr(x509.Name(name(("CN", "a\x1b[2J"))))),
        "the subject has a value that is empty or can't be printed",
    ),
    "two CNs": (pem(csr(x509.Name(name(("CN", "a"), ("CN", "b"))))), "the subject has more than one CN"),
    "a password": (pem(with_password()), "the CSR has attributes besides the requested extensions"),
    "a CA": (
        pem(csr(None, x509.BasicConstraints(ca=True, path_length=None))),
        "the CSR asks for extensions besides SANs",
    ),
    "65 SANs": (pem(csr(None, sans(65))), "the CSR has more than 64 SANs"),
    "a SAN twice": (pem(csr(None, TWICE)), "the CSR has a SAN twice"),
    "an exponent of 3": (
        pem(csr(key=rsa.generate_private_key(3, 2048))),
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
    der = csr(x509.Name(name(*groups, kind=kind)), sans(64))
    found = read_strictly(b"\n" + pem(der).replace(b"\n", b"\r\n") + b" \n")
    assert (found.cn, found.organizations, found.key) == ("one", ("a", "b"), "ecdsa-p256")
    assert found.sans == {("DNS", f"n{number}") for number in range(64)}
    assert found.pem == pem(der)
    assert found.parsed.public_bytes(Encoding.DER) == der
    bare = read_strictly(pem(csr(x509.Name(name(("O", "a"))))))
    assert (bare.cn, bare.organizations, bare.sans) == ("", ("a",), frozenset())


def test_the_largest_request_is_read() -> None:
    """White space up to the limit does no harm."""
    data = pem(csr())
    assert read_strictly(data + b" " * (16384 - len(data))).cn == "one"
