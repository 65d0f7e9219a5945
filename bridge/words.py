"""Text from outside (a CA's message, a name in a CSR or carried file) made safe to show; numbers with their nouns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

#: Printable according to Unicode but blank on a screen: padding with them could fake a line of output.
_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
_LONGEST_LINE = 300
#: C0 and C1, YAML's and Unicode's line ends; bytes of a path that are not UTF-8.
_CONTROLS = "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
#: The same without line ends and tabs, and with characters that change a line's direction (UAX #9).
_STEERS = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


def one_line(value: object, longest: int = _LONGEST_LINE) -> str:
    """
    Make text from outside (a CA's message, a name in a CSR or a carried file) safe to show: on one line, blanks
    collapsed, without terminal controls, cut. The caller hides secrets first.
    """
    text = str(value)
    if not text.isprintable() or not _BLANKS.isdisjoint(text):
        text = "".join(c if c.isprintable() and c not in _BLANKS else " " for c in text)
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def cause(text: str, name: str) -> str:
    """Strip a message of URLs, paths, and words with the certificate's name, so that one cause gives one text."""
    base = re.escape(name.partition(".")[0])
    return re.sub(rf"\S*(?:/|{base})\S*" if base else r"\S*/\S*", "…", text)


def has_controls(text: str) -> bool:
    """Whether the text has a control character or a line separator."""
    return re.search(_CONTROLS, text) is not None


def steady(text: str) -> str:
    """Replace characters in a multi-line text that would control a terminal or reorder what it shows."""
    return re.sub(_STEERS, "\N{REPLACEMENT CHARACTER}", text)


def escaped(json: str) -> str:
    """Escape characters of a JSON text that would control a terminal or end a line in YAML."""
    return re.sub(_STEERS, lambda match: f"\\u{ord(match[0]):04x}", json)


def counted(number: int, what: str) -> str:
    """A number with its noun, such as `1 certificate`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def some(things: Iterable[object], most: int = 3) -> str:
    """The first few things, and how many more there are."""
    texts = [*map(str, things)]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return f"{', '.join(texts[:most])}{more}"


def name_found(name: str, known: Iterable[str]) -> str:
    """Quote an unknown name, with the closest known name."""
    import difflib  # noqa: PLC0415 (5 ms, only for a wrong name)

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"{one_line(name)!r} (did you mean {close[0]!r}?)" if close else repr(one_line(name))


def one_of(texts: Sequence[str]) -> str:
    """The allowed patterns as one text, for messages."""
    return " or ".join(texts) or "none"
