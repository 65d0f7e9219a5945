"""Words from outside (a CA's, a name in a CSR or in a carried file), made fit to be shown."""

from __future__ import annotations

from collections.abc import Iterable

#: Printable as Unicode has it, and yet blank on a screen: padding with them draws lines of one's own.
_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
_LONGEST_LINE = 300


def one_line(value: object, longest: int = _LONGEST_LINE) -> str:
    """
    Make text from outside (a CA's words, a name in a CSR or a carried file) fit to be shown.

    On one line, so that it draws no line of its own; blanks collapsed; nothing that steers a terminal; cut.
    Secrets in it are the caller's to hide first.
    """
    text = "".join(c if c.isprintable() and c not in _BLANKS else " " for c in str(value))
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def name_found(name: str, known: Iterable[str]) -> str:
    """A name that is none, quoted, with the one that may have been meant."""
    import difflib  # noqa: PLC0415 (5 ms, for a wrong name alone)

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"{one_line(name)!r} (did you mean {close[0]!r}?)" if close else repr(one_line(name))
