"""Reads and writes DER where the library gives only values, and the bytes count (X.690 §8 and §10). Pure."""

from __future__ import annotations

from typing import NamedTuple

#: Tags, with the "constructed" bit if the type has it.
BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, OID, SEQUENCE, SET = 0x01, 0x02, 0x03, 0x04, 0x06, 0x30, 0x31

_CONSTRUCTED = 0x20
_CONTEXT = 0x80
_LONG_TAG = 0x1F


def context(number: int, *, constructed: bool = False) -> int:
    """The context-specific tag `[number]`."""
    return _CONTEXT | number | (_CONSTRUCTED if constructed else 0)


class Element(NamedTuple):
    """One value: tag, length and content; a named tuple, since a desk reads millions of them."""

    tag: int
    content: bytes
    encoded: bytes  #: Tag, length and content.

    def children(self) -> list[Element]:
        """The values inside."""
        return elements(self.content)


def elements(data: bytes) -> list[Element]:
    """Split concatenated values."""
    found, position = [], 0
    while position < len(data):
        found.append(first(data, position))
        position += len(found[-1].encoded)
    return found


def first(data: bytes, begin: int = 0) -> Element:
    """Read the value that begins there; anything may follow it."""
    length, position = _length(data, begin + 1)
    end = position + length
    if data[begin] & _LONG_TAG == _LONG_TAG or end > len(data):
        raise ValueError("not DER")
    return Element(data[begin], data[position:end], data[begin:end])


def _length(data: bytes, position: int) -> tuple[int, int]:
    """A length, in its shortest form (X.690 §8.1.3 and §10.1), and the content's start."""
    if position >= len(data):
        raise ValueError("not DER")
    size, is_long = data[position] & 0x7F, data[position] & 0x80
    if not is_long:
        return size, position + 1
    end = position + 1 + size
    value = int.from_bytes(data[position + 1 : end])
    if end > len(data) or value.bit_length() <= 8 * (size - 1) or value < 0x80:  # noqa: PLR2004
        raise ValueError("not DER")
    return value, end


def one(data: bytes, tag: int) -> Element:
    """Parse bytes that are exactly one value."""
    found = elements(data)
    if len(found) != 1 or found[0].tag != tag:
        raise ValueError("not DER of the type that was expected")
    return found[0]


def encoded(tag: int, *contents: bytes) -> bytes:
    """Encode one value; `contents` are joined."""
    content = b"".join(contents)
    size = len(content)
    if size < 0x80:  # noqa: PLR2004 (X.690 §8.1.3.4)
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(length)]) + length + content
