"""The bodies of EST: what is a CSR in base64, what a server answers, and what a renewal may not change."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Sequence
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7
from cryptography.x509.oid import NameOID

from bridge.contract import SignRequest
from bridge.desk.est_rules import other_names
from bridge.door.est import certs_only, csr_attributes, csr_of
from bridge.pki.csr import generate_key
from bridge.specs import SPECS
from tests.kit.issuing import Signer, cn, name

_DAY = timedelta(days=1)
_KEY = generate_key("ecdsa-p256")


def made(subject: x509.Name | None = None, sans: Sequence[str] = ("a.example",)) -> x509.CertificateSigningRequest:
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject or cn("web"))
    names = x509.SubjectAlternativeName([x509.DNSName(one) for one in sans])
    return builder.add_extension(names, critical=False).sign(_KEY, hashes.SHA256())


_CSR = made()
_DER = _CSR.public_bytes(Encoding.DER)
_BODY = base64.encodebytes(_DER)


@pytest.mark.parametrize("body", [_BODY, b"".join(_BODY.split()), b"\r\n\t " + _BODY.replace(b"\n", b" \r\n")])
def test_a_csr_in_base64_is_read(body: bytes) -> None:
    """White space does not count (RFC 8951 §3.1)."""
    assert csr_of(body) == _CSR


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (_CSR.public_bytes(Encoding.PEM), "found PEM$"),
        (_BODY.replace(b"M", b"!", 1), "found other characters, or base64 that is cut off$"),
        (_BODY[:-3], "found other characters, or base64 that is cut off$"),
        (b"", r"found something else \(.+\)$"),
        (base64.b64encode(_DER[:-1]), "found something else"),
        (base64.b64encode(_DER + b"\x00"), "found something else"),
        (base64.b64encode(_DER + _DER), "found something else"),
        (base64.b64encode(b"\x30\x03\x02\x01\x01"), "found something else"),
        (base64.b64encode(b"\x04" + _DER[1:]), "found something else"),
        (base64.b64encode(_DER[:-1] + bytes([_DER[-1] ^ 1])), "^wanted a CSR that is signed with its own key, found another signature$"),
    ],
)  # fmt: skip
def test_another_body_is_refused(body: bytes, found: str) -> None:
    """The error says what was wanted: one CSR, whole, in DER, signed with its own key."""
    with pytest.raises(ValueError, match=found) as e:
        csr_of(body)
    assert str(e.value).startswith("wanted the base64 of one CSR in DER, with neither PEM's") or "own key" in str(
        e.value
    )


def test_a_csr_in_another_encoding_than_der_is_refused() -> None:
    """A length in more bytes than it needs is BER: what is signed must have one form."""
    assert _DER[:2] == b"\x30\x81", "a CSR of 128 to 255 bytes"
    with pytest.raises(ValueError, match=r"^wanted the base64 of one CSR in DER, .*; found ") as e:
        csr_of(base64.b64encode(b"\x30\x82\x00" + _DER[2:]))
    assert "other characters" not in str(e.value)


def test_certificates_go_in_a_pkcs7() -> None:
    """A set in lines of base64 that end with CR and LF."""
    found = [Signer.make(f"ca-{number}").certificate for number in range(2)]
    body = certs_only(found)
    assert set(pkcs7.load_der_pkcs7_certificates(base64.b64decode(body))) == set(found)
    assert body.endswith(b"\r\n")
    assert b"\n" not in body.replace(b"\r\n", b"")
    assert max(map(len, body.split(b"\r\n"))) == 76


#: By `openssl asn1parse` of the answer.
_WORDS = {
    "rsa-2048": ["rsaEncryption", ":0800"],
    "rsa-3072": ["rsaEncryption", ":0C00"],
    "rsa-4096": ["rsaEncryption", ":1000"],
    "ecdsa-p256": ["id-ecPublicKey", "prime256v1"],
    "ecdsa-p384": ["id-ecPublicKey", "secp384r1"],
}


@pytest.mark.parametrize("keys", [*([one] for one in _WORDS), list(_WORDS), ["ed25519"], ["ed25519", "rsa-3072"]])
def test_attributes_name_key_algorithms(keys: list[str]) -> None:
    """OpenSSL reads those that are asked for, each type once with its values, and no others."""
    data = base64.b64decode(csr_attributes(keys))
    parse = ["openssl", "asn1parse", "-inform", "DER"]
    read = subprocess.run(parse, input=data, capture_output=True, check=True).stdout.decode()
    wanted = {word for key in keys for word in _WORDS.get(key, [])}
    assert {word for words in _WORDS.values() for word in words if word in read} == wanted
    assert read.count("rsaEncryption") == any(key.startswith("rsa") for key in keys)


def test_a_renewal_has_the_same_names() -> None:
    """Subject and SANs are compared by their values; the answer names what differs, and both values."""
    request = SignRequest(spec=SPECS["apiserver"], csr_pem=_CSR.public_bytes(Encoding.PEM), validity=_DAY)
    leaf = Signer.make().issue(request).leaf
    assert other_names(_CSR, leaf) == ""
    other = other_names(made(name((NameOID.COMMON_NAME, "other"))), leaf)
    assert other == "subject: wanted that of the certificate which is replaced (CN=web), found CN=other"
    more = other_names(made(sans=["a.example", "b.example"]), leaf)
    assert (
        more
        == "SAN: wanted that of the certificate which is replaced (DNS:a.example), found DNS:a.example, DNS:b.example"
    )
    assert other_names(made(sans=["a.example", "a.example"]), leaf) != ""
