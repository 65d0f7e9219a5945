"""Reading DER, and writing a little of it, where the library gives values and the bytes count (X.690 §8 and §10). Pure."""

from __future__ import annotations

from typing import NamedTuple

#: Tags, with the bit for "constructed" where the type has it.
BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, OID, SEQUENCE, SET = 0x01, 0x02, 0x03, 0x04, 0x06, 0x30, 0x31

_CONSTRUCTED = 0x20
_CONTEXT = 0x80
_LONG_TAG = 0x1F


def context(number: int, *, constructed: bool = False) -> int:
    """The tag `[number]`."""
    return _CONTEXT | number | (_CONSTRUCTED if constructed else 0)


class Element(NamedTuple):
    """One value: tag, length, content; a desk reads millions of them."""

    tag: int
    content: bytes
    encoded: bytes  #: All three.

    def children(self) -> list[Element]:
        """The values inside."""
        return elements(self.content)


#: What `Element(…)` does, without a call of Python's own.
_new = tuple.__new__


def elements(data: bytes) -> list[Element]:
    """Values that follow each other."""
    found, position, size = [], 0, len(data)
    while position < size:
        begin = position
        tag = data[position]
        position += 1
        if position < size and data[position] < 0x80:  # noqa: PLR2004 (X.690 §8.1.3.4: the short form, as a rule)
            length, position = data[position], position + 1
        else:
            length, position = _length(data, position)
        end = position + length
        if tag & _LONG_TAG == _LONG_TAG or end > size:
            raise ValueError("not DER")
        found.append(_new(Element, (tag, data[position:end], data[begin:end])))
        position = end
    return found


def _length(data: bytes, position: int) -> tuple[int, int]:
    """A length in the long form, which is the shortest for 128 and more, and where the content begins."""
    if position >= len(data):
        raise ValueError("not DER")
    size = data[position] & 0x7F
    end = position + 1 + size
    value = int.from_bytes(data[position + 1 : end])
    if end > len(data) or value.bit_length() <= 8 * (size - 1) or value < 0x80:  # noqa: PLR2004
        raise ValueError("not DER")
    return value, end


def one(data: bytes, tag: int) -> Element:
    """The one value that the bytes are."""
    found = elements(data)
    if len(found) != 1 or found[0].tag != tag:
        raise ValueError("not DER of the type that was expected")
    return found[0]


def encoded(tag: int, *contents: bytes) -> bytes:
    """One value; its content is all of `contents`."""
    content = b"".join(contents)
    size = len(content)
    if size < 0x80:  # noqa: PLR2004 (X.690 §8.1.3.4)
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(length)]) + length + content
