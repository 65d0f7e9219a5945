"""Request bundles that only an attacker would make: a desk has to pass over them."""

from __future__ import annotations

import json
import random
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.pki.bundle import RequestBundle
from bridge.pki.bundle_format import dumps

_SEQUENCE, _SET, _BIT_STRING, _INTEGER, _GENERALIZED_TIME = 0x30, 0x31, 0x03, 0x02, 0x18
_RSA = bytes.fromhex("300d06092a864886f70d0101010500")
_CN = bytes.fromhex("0603550403")


def _element(tag: int, *content: bytes) -> bytes:
    """One element in DER."""
    body = b"".join(content)
    if len(body) < 0x80:
        return bytes([tag, len(body)]) + body
    length = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + body


def _elements(body: bytes) -> list[bytes]:
    """The elements that stand side by side."""
    found = []
    while body:
        size, head = body[1], 2
        if size >= 0x80:
            head = 2 + (size & 0x7F)
            size = int.from_bytes(body[2:head], "big")
        found.append(body[: head + size])
        body = body[head + size :]
    return found


def _inside(element: bytes) -> list[bytes]:
    head = 2 if element[1] < 0x80 else 2 + (element[1] & 0x7F)
    return _elements(element[head:])


#: Of a certificate's signed part with its version, RFC 5280 §4.1.
_ISSUER, _VALIDITY, _SUBJECT, _KEY = 3, 4, 5, 6


def with_field(certificate: x509.Certificate, number: int, value: bytes) -> str:
    """The certificate's PEM text with another field; its signature no longer holds."""
    signed, *rest = _inside(certificate.public_bytes(Encoding.DER))
    fields = _inside(signed)
    fields[number] = value
    return _pem(_element(_SEQUENCE, _element(_SEQUENCE, *fields), *rest))


def _pem(der: bytes) -> str:
    text = b64encode(der).decode()
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])


def rsa_key(bits: int) -> bytes:
    """A public key with a modulus of so many bits."""
    modulus = (1 << (bits - 1)) | 1
    number = modulus.to_bytes(bits // 8 + 1, "big")
    numbers = _element(_SEQUENCE, _element(_INTEGER, number.lstrip(b"\0") if not number[1] & 0x80 else number),
                       _element(_INTEGER, b"\x03"))  # fmt: skip
    return _element(_SEQUENCE, _RSA, _element(_BIT_STRING, b"\0", numbers))


def common_name(tag: int, value: bytes) -> bytes:
    """A subject with a CN of any type."""
    return _element(_SEQUENCE, _element(_SET, _element(_SEQUENCE, _CN, _element(tag, value))))


def validity(begin: bytes, end: bytes) -> bytes:
    """Any two dates."""
    return _element(_SEQUENCE, _element(_GENERALIZED_TIME, begin), _element(_GENERALIZED_TIME, end))


def sealed(document: dict[str, Any]) -> bytes:
    """A bundle's file from its values, with the digest that fits them."""
    values = {key: value for key, value in document.items() if key != "digest"}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return json.dumps({**values, "digest": sha256(text.encode()).hexdigest()}).encode()


def _replacing(bundle: RequestBundle, text: str) -> bytes:
    document = json.loads(dumps(bundle))
    document["requests"][0]["replaces"] = text
    return sealed(document)


def crafted(bundle: RequestBundle) -> Iterator[bytes]:
    """The bundle with a replaced certificate that can't be read, or whose key is too small to sign with."""
    old = bundle.requests[0].replaces
    assert old is not None
    for bits in (8, 16, 24, 64, 128, 256, 512):
        yield _replacing(bundle, with_field(old, _KEY, rsa_key(bits)))
    for tag, value in ((_BIT_STRING, b"\0x"), (0x04, b"x"), (0x1E, b"x"), (0x1C, b"x"), (0x0C, b"\xff"), (0x05, b"")):
        yield _replacing(bundle, with_field(old, _SUBJECT, common_name(tag, value)))
        yield _replacing(bundle, with_field(old, _ISSUER, common_name(tag, value)))
    for begin, end in ((b"00000101000000Z", b"20991231235959Z"), (b"20200101000000Z", b"00001231235959Z"),
                       (b"20200101000000Z", b"99991231235959Z"), (b"99991231235959Z", b"20200101000000Z")):  # fmt: skip
        yield _replacing(bundle, with_field(old, _VALIDITY, validity(begin, end)))


def mutated(bundle: RequestBundle, number: int, chance: random.Random) -> Iterator[bytes]:
    """The bundle with bytes of a certificate or CSR changed, or with a value of another kind; the digest fits."""
    for _ in range(number):
        document = json.loads(dumps(bundle))
        request = chance.choice(document["requests"])
        key = chance.choice(["replaces", "csr", "proof", "value"])
        if key == "value":
            where = chance.choice([document, request])
            where[chance.choice(sorted(where.keys() - {"digest", "requests"}))] = chance.choice(_ODD)
        elif key == "proof":
            request["proof"] = b64encode(chance.randbytes(chance.randrange(1, 600))).decode()
        else:
            request[key] = _damaged(request[key], chance)
        yield sealed(document)


_ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    2**63,
    1.5,
    "",
    " ",
    "x" * 3000,
    "\x1b[2J",
    [],
    [[]],
    {},
    {"a": 1},
    "0000-00-00T00:00:00Z",
]


def _damaged(text: str, chance: random.Random) -> str:
    """PEM text whose DER has one to three other bytes."""
    one = x509.load_pem_x509_csr(text.encode()) if "REQUEST" in text else x509.load_pem_x509_certificate(text.encode())
    der = bytearray(one.public_bytes(Encoding.DER))
    for _ in range(chance.randrange(1, 4)):
        der[chance.randrange(len(der))] = chance.choice([chance.randrange(256), 0x03, 0x30, 0x00])
    label = text.split("-----")[1].removeprefix("BEGIN ")
    return _pem(bytes(der)).replace("CERTIFICATE", label)
