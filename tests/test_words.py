"""What comes from outside is shown on one line, without a blank to spare, and cut."""

from __future__ import annotations

import pytest

from bridge.words import counted, one_line


@pytest.mark.parametrize(
    ("outside", "shown"),
    [
        ("kubernetes", "kubernetes"),
        ("two words", "two words"),
        ("Müller GmbH", "Müller GmbH"),
        ("a\nb\r\x1b[31m\x07c", "a b [31m c"),
        ("a" + " " * 200 + "proof       holds", "a proof holds"),
        ("a\u3164\u2800\u00a0\u2003proof", "a proof"),
        ("\u202egnp.exe\u200b", "gnp.exe"),
        ("x" * 301, "x" * 299 + "…"),
        (ValueError("a\tb"), "a b"),
        ("\n", ""),
    ],
)
def test_one_line(outside: object, shown: str) -> None:
    """It draws no line of its own, steers no terminal, and has an end; plain words stay as they are."""
    assert one_line(outside) == shown


def test_a_number_has_its_noun() -> None:
    """One is singular, and everything else is plural, 0 too."""
    assert [counted(number, "certificate") for number in (0, 1, 2)] == [
        "0 certificates",
        "1 certificate",
        "2 certificates",
    ]
