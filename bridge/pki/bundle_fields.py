"""
JSON documents read strictly: each key once, none missing, none to spare, and each value of its kind (pure).

PEM text is taken only if it is one block and not a byte more.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.pki.bundle import LONGEST_TEXT, BundleError, IncompleteBundleError
from bridge.pki.certificates import UNREADABLE, extended_key_usages, name_text, pem, san_counts, serial_hex
from bridge.pki.expiry import minute
from bridge.words import one_line

#: The requests of one node, a dozen with long chains, are a tenth of it.
MAX_BUNDLE_BYTES = 1 << 20
_LONGEST_FOUND = 60

TIME = "%Y-%m-%dT%H:%M:%SZ"
_TIME_SHAPE = re.compile(r"[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z")

#: For what is no bundle, and is a CSR.
_CSR_HINT = (
    "this is a CSR: a person's is signed by `ca-bridge kubeconfig user NAME --csr FILE`, kubeadm's by `ca-bridge sign` "
    "of the directory that they are in"
)


def parse(data: bytes) -> dict[str, Any]:
    """
    The JSON object that the bytes are.

    Raises:
        IncompleteBundleError: They are no JSON document.
        BundleError: They are too many, or another value than an object, or one with a key twice.
    """
    if len(data) > MAX_BUNDLE_BYTES:
        raise BundleError("", f"at most {MAX_BUNDLE_BYTES} bytes", f"{len(data)}")
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise BundleError("", "a bundle", "nesting without end") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        reason = "bytes that are no UTF-8" if isinstance(e, UnicodeDecodeError) else f"none: {e.msg} at byte {e.pos}"
        hint = _CSR_HINT if b"CERTIFICATE REQUEST-----" in data else "is it still being copied?"
        raise IncompleteBundleError("", "one JSON document", reason, hint=hint) from None
    except ValueError:  # a number of thousands of digits
        raise BundleError("", "a bundle", "a number without end") from None
    if not isinstance(document, dict):
        raise BundleError("", "a JSON object", excerpt(document))
    return document


def excerpt(value: object) -> str:
    """A value from a document as errors show it: short, and nothing that a terminal would obey."""
    text = repr(value)
    return text if len(text) <= _LONGEST_FOUND else f"{text[:_LONGEST_FOUND]}…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two values, two readers may each take another."""
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BundleError(excerpt(twice), "each key once", "it twice")
    return values


def _no_constant(text: str) -> NoReturn:
    raise BundleError("", "numbers", text)


@dataclass(frozen=True, slots=True)
class Fields:
    """
    One JSON object, whose values are asked for by key and kind.

    Each method returns the value of one key, or raises a `BundleError` that says where it is, what was wanted and found.
    """

    values: Mapping[str, Any]
    place: str  #: Of the object in the bundle, such as `requests[2].`; empty for the whole.

    @classmethod
    def of(cls, value: object, place: str, keys: Sequence[str]) -> Fields:
        """An object that has exactly these keys."""
        if not isinstance(value, dict):
            raise BundleError(place.rstrip("."), "an object", excerpt(value))
        for key in value:
            if key not in keys:
                raise BundleError(f"{place}{one_line(key)}", f"one of {', '.join(keys)}", excerpt(key))
        for key in keys:
            if key not in value:
                raise BundleError(f"{place}{key}", "a value", "nothing")
        return cls(value, place)

    def fail(self, key: str, wanted: str, found: str | None = None) -> NoReturn:
        """Refuse the key's value; what was found is shown as it is unless it is told in words."""
        raise BundleError(f"{self.place}{key}", wanted, excerpt(self.values[key]) if found is None else found)

    def text(self, key: str, longest: int = LONGEST_TEXT) -> str:
        """A text that is not empty, and printable: it is shown on terminals."""
        value = self.values[key]
        if not isinstance(value, str) or not value.strip():
            self.fail(key, "a text")
        if len(value) > longest:
            self.fail(key, f"at most {longest} characters", f"{len(value)}")
        if not value.isprintable():
            self.fail(key, "a text without control characters")
        return value

    def shaped(self, key: str, shape: re.Pattern[str], wanted: str) -> str:
        """A text of this shape, which `wanted` names."""
        value = self.values[key]
        if not isinstance(value, str) or not shape.fullmatch(value):
            self.fail(key, wanted)
        return value

    def choice(self, key: str, choices: Sequence[object]) -> Any:
        """One of these, of its type, too: `true` is not 1."""
        value = self.values[key]
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            self.fail(key, f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0]))
        return value

    def time(self, key: str) -> datetime:
        """A time in UTC, whole seconds, written as `TIME` writes it."""
        value = self.shaped(key, _TIME_SHAPE, "a time such as 2026-01-31T12:00:00Z")
        try:
            time = datetime.strptime(value, TIME).replace(tzinfo=UTC)
        except ValueError:
            self.fail(key, "a time that there is")
        if time.strftime(TIME) != value:
            self.fail(key, "a time after the year 1000")
        return time

    def items(self, key: str, read: Callable[[object, str], Any]) -> list[Any]:
        """A list that is not empty, each item read by a function of the item and its place (`requests[2]`)."""
        value = self.values[key]
        if not isinstance(value, list) or not value:
            self.fail(key, "a list, not empty")
        return [read(item, f"{self.place}{key}[{number}]") for number, item in enumerate(value)]

    def encoded(self, key: str) -> bytes | None:
        """Base64 in its one plain form, or null."""
        value = self.values[key]
        if value is None:
            return None
        try:
            decoded = b64decode(value, validate=True) if isinstance(value, str) else b""
        except ValueError:
            decoded = b""
        if not decoded or b64encode(decoded).decode() != value:
            self.fail(key, "base64 or null")
        return decoded

    def csr(self, key: str) -> x509.CertificateSigningRequest:
        """A CSR as one PEM block, all of which can be read."""
        value, wanted = self.values[key], "a CSR as one PEM block, and not a byte more"
        try:
            csr = x509.load_pem_x509_csr(_ascii(value))
        except (ValueError, x509.InvalidVersion) as e:
            self.fail(key, wanted, f"something else ({one_line(e)})")
        if csr.public_bytes(Encoding.PEM).decode() != value:
            self.fail(key, wanted, "more than that, or other line breaks")
        if (damage := _damage(csr)) is not None:
            self.fail(key, "a CSR that can be read", damage)
        return csr


def certificate(value: object, place: str, or_else: str = "") -> x509.Certificate:
    """
    A certificate as one PEM block, all of which can be read.

    Args:
        value: From the document.
        place: Where in the document, for errors.
        or_else: What might stand there instead, for errors; such as " or null".
    """
    wanted = f"a certificate as one PEM block, and not a byte more{or_else}"
    try:
        found = x509.load_pem_x509_certificate(_ascii(value))
    except (ValueError, x509.InvalidVersion) as e:
        raise BundleError(place, wanted, f"something else ({one_line(e)})") from None
    if pem(found).decode() != value:
        raise BundleError(place, wanted, "more than that, or other line breaks")
    if (damage := _damage(found)) is not None:
        raise BundleError(place, "a certificate that can be read", damage)
    return found


def _damage(one: x509.Certificate | x509.CertificateSigningRequest) -> str | None:
    """
    Why a part of a CSR or certificate can't be read; None if all of it can.

    The library reads names, keys, dates and extensions when they are asked for, and each has its own way to fail: it is
    found out here, once, and not by whoever judges, shows or records the request.
    """
    try:
        _ = name_text(one.subject), one.public_key(), san_counts(one), extended_key_usages(one)
        if isinstance(one, x509.Certificate):
            _ = (
                name_text(one.issuer),
                serial_hex(one),
                minute(one.not_valid_before_utc),
                minute(one.not_valid_after_utc),
            )
    except (*UNREADABLE, OverflowError) as e:
        return f"{type(e).__name__}: {one_line(e)}"
    return None


def _ascii(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("no text")  # noqa: TRY004 (like what is no PEM)
    return value.encode("ascii")
