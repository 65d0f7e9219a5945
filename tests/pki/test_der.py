"""DER is read as X.690 has it: every length in its shortest form, every value whole."""

from __future__ import annotations

import pytest

from bridge.pki import der


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 255, 256, 257, 65535, 65536, 70000])
def test_lengths_of_all_sizes_are_read(size: int) -> None:
    """With the short form up to 127, and as few bytes as will do above; what follows is the next value."""
    octets = size.to_bytes((size.bit_length() + 7) // 8)
    length = bytes([size]) if size < 128 else bytes([0x80 | len(octets)]) + octets
    value = bytes([der.OCTET_STRING]) + length + bytes(size)
    found = der.elements(value + b"\x05\x00")
    assert found == [der.Element(der.OCTET_STRING, bytes(size), value), der.Element(5, b"", b"\x05\x00")]


NOT_DER = {
    "a tag alone": "04",
    "content that is cut": "0402ff",
    "content of a long length that is cut": "048180" + "00" * 127,
    "a length that is cut": "0482ff",
    "a length whose last byte is cut": "048201",
    "the long form for a short length": "04817f" + "00" * 127,
    "the long form for nothing": "048100",
    "a zero before the length": "04820080" + "00" * 128,
    "a zero before a length of two bytes": "0483000100" + "00" * 256,
    "an indefinite length": "308005000000",
    "an indefinite length before 128 bytes": "0480" + "00" * 128,
    "the first byte of a long length as a length": "0481" + "00" * 129,
    "a tag of several bytes": "1f8101020500",
    "a constructed tag of several bytes": "bf8101020500",
    "a good value, then a cut one": "05000401",
}


@pytest.mark.parametrize("data", NOT_DER.values(), ids=NOT_DER.keys())
def test_refuses(data: str) -> None:
    """A value that is not whole, or whose length or tag has another form."""
    with pytest.raises(ValueError, match=r"^not DER$"):
        der.elements(bytes.fromhex(data))


def test_values_inside_are_read_where_they_are_asked_for() -> None:
    """A sequence's content is not looked at before."""
    [sequence] = der.elements(bytes.fromhex("3005" + "020107" + "0500"))
    assert [(each.tag, each.content) for each in sequence.children()] == [(der.INTEGER, b"\x07"), (5, b"")]
    [spoilt] = der.elements(bytes.fromhex("30020401"))
    with pytest.raises(ValueError, match="DER"):
        spoilt.children()


def test_one_value_of_one_type() -> None:
    """No value, two values or another type are refused."""
    assert der.one(b"\x02\x01\x07", der.INTEGER).content == b"\x07"
    for data in (b"", b"\x02\x01\x07\x02\x01\x07", b"\x04\x01\x07"):
        with pytest.raises(ValueError, match=r"^not DER of the type that was expected$"):
            der.one(data, der.INTEGER)


def test_tags_by_their_number() -> None:
    """As `[3]` of a certificate's extensions, which is constructed, and `[2]` of a DNS name, which is not."""
    assert (der.context(3, constructed=True), der.context(2)) == (0xA3, 0x82)
