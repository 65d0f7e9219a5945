"""Output of commands: results on standard output, which only this module prints, and progress on standard error."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import sys
import textwrap
import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from bridge.errors import Exit
from bridge.pki.expiry import day, left_text, minute, rfc3339
from bridge.system import console
from bridge.system.codec import to_json
from bridge.words import steady

#: The version of the documents of `-o json`; it grows when a key is removed or changes its meaning.
SCHEMA_VERSION = 1


#: The column where values begin in the description of a bundle.
VALUES_BEGIN = 14

#: Errors of writing standard output: the command goes on to its errors and its exit code.
unwritten: list[OSError] = []


def end_text(end: datetime | None, now: datetime) -> str:
    """Say when a certificate ends, to the minute if that is near, and how far away that is; empty without an end."""
    if end is None:
        return ""
    moment = minute(end) if end - now < _NEAR else day(end)
    verb, left = "expires" if end > now else "expired", left_text(end, now).removeprefix("expired ")
    return f"{verb} {moment} ({left})"


_NEAR = timedelta(days=2)


def say(text: str, *, is_styled: bool = False) -> None:
    """Print lines; the last one needs no line break. Control characters of text that is not `is_styled` are escaped."""
    import typer  # noqa: PLC0415 (`bridge.entry` uses this module without a command line)

    console.clear_status()
    try:
        if not unwritten:
            typer.echo((text if is_styled else steady(text)).removesuffix("\n"), nl=bool(text))
    except OSError as e:
        unwritten.append(e)


def exit_code(code: int) -> int:
    """Return a command's exit code: that of its result, or of a failure to write standard output if that is worse."""
    return Exit.worst([code, Exit.FAILED]) if unwritten and code in Exit.PRECEDENCE else code


def say_usage(error: Any) -> None:
    """Print a usage error of Typer's, which has no public class, in the form of all errors."""
    text = io.StringIO()
    error.show(file=text)
    found = re.sub("^Error: ", "error: ", text.getvalue(), flags=re.MULTILINE)
    with contextlib.suppress(OSError):
        sys.stderr.write(found.replace("error: ", f"{console.styled('error:', 'error', sys.stderr)} ", 1))


def say_sentence(text: str, indent: str = "", *, hanging: int = 2, style: str = "") -> None:
    """Print prose, its first word in a style; a long line wraps, and goes on `hanging` columns further right."""
    lines = wrapped(f"{indent}{text}", width_here(), len(indent) + hanging)
    say("\n".join(_styled(lines, text.partition(" ")[0], style)), is_styled=True)


def say_sentences(texts: Iterable[str], indent: str = "  ") -> None:
    """Print sentences one after the other, below what was said before."""
    for text in texts:
        say_sentence(text, indent)


def _styled(lines: Sequence[str], word: str, style: str) -> list[str]:
    """Escape lines, so that they steer no terminal, and style a word of the first line."""
    first, *others = map(steady, lines)
    before, found, after = first.partition(steady(word)) if word else (first, "", "")
    return [f"{before}{console.styled(found, style, sys.stdout)}{after}", *others]


def wrapped(line: str, width: int | None, hanging: int) -> list[str]:
    """Wrap a line between words; all lines but the first are indented by `hanging`."""
    if width is None or len(line) <= width:
        return [line]
    lines = textwrap.wrap(line, width, subsequent_indent=" " * hanging, break_long_words=False, break_on_hyphens=False)
    return [text for text in lines if text.strip()]


def say_table(
    rows: Sequence[Sequence[str]], optional: Sequence[int] | None = None, styles: Sequence[str] = (), *, styled: int = 0
) -> None:
    """Print rows, the cell of column `styled` in the row's style; a narrow terminal drops `optional` columns."""
    width, lines = width_here(), []
    shown = _rows(_fitting(rows, optional, width), width)
    for row, style, line in zip(rows, styles or [""] * len(rows), shown, strict=True):
        lines += _styled(line, row[styled], style)
    say("\n".join(lines), is_styled=True)


def _fitting(rows: Sequence[Sequence[str]], optional: Sequence[int] | None, width: int | None) -> list[list[str]]:
    """Drop optional columns for which there is no room, and cut the last cell of a row that is still too long."""
    if not rows or optional is None or width is None or console.is_verbose():
        return [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    kept = list(range(len(widths)))

    def needed() -> int:
        return sum(widths[column] + len(_GAP) for column in kept) - len(_GAP)

    for column in optional:
        if needed() > width:
            kept.remove(column)
    room = width - (needed() - widths[kept[-1]])
    found = [[row[column] for column in kept] for row in rows]
    if room >= _LEAST_ROOM:
        found = [[*row[:-1], row[-1] if len(row[-1]) <= room else f"{row[-1][: room - 1]}…"] for row in found]
    return found


def width_here() -> int | None:
    """Return the terminal's width; None for a file or a pipe, in which every row is one line."""
    named = os.environ.get("COLUMNS", "")
    if named.isdecimal() and int(named):
        return int(named)
    return console.columns() if sys.stdout.isatty() else None


def say_json(**structure: Any) -> None:
    """Print a structure for programs, in the form of the state files, with times in whole seconds."""
    say(json.dumps({"schemaVersion": SCHEMA_VERSION, **to_json(structure, rfc3339)}, indent=4))


_GAP = "  "
_LEAST_ROOM = 6  #: The least width to which the last cell is cut.
_CONTINUED = "    "


def columns(rows: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    """Yield lines with aligned columns; cells that don't fit go on below their row."""
    return itertools.chain.from_iterable(_rows(rows, width))


def _rows(rows: Sequence[Sequence[str]], width: int | None) -> Iterator[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    parts = _parts(widths, width)
    for row in rows:
        cells = [cell.ljust(wide) for cell, wide in zip(row, widths, strict=True)]
        texts = [_GAP.join(cells[column] for column in part).rstrip() for part in parts]
        lines = [texts[0], *(f"{_CONTINUED}{text}" for text in texts[1:] if text)]
        yield [piece for line in lines for piece in wrapped(line, width, len(_CONTINUED) + 2)]


def _parts(widths: Sequence[int], most: int | None) -> list[list[int]]:
    """Group columns into lines: as many as fit, and at least one a line."""
    parts: list[list[int]] = [[]]
    used = 0
    for column, width in enumerate(widths):
        if most is not None and parts[-1] and used + len(_GAP) + width > most:
            parts.append([])
            used = len(_CONTINUED)
        used += width + (len(_GAP) if parts[-1] else 0)
        parts[-1].append(column)
    return parts


def say_verdict(text: str, style: str) -> None:
    """Print the overall result, on a line in one style."""
    say(console.styled(steady(text), style, sys.stdout), is_styled=True)


def say_headed(rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Print rows below their headings; rows with the same heading share it."""
    width = width_here()
    groups: dict[str, list[str]] = {}
    for (heading, _), lines in zip(rows, _rows([row for _, row in rows], width - 2 if width else None), strict=True):
        groups.setdefault(heading, wrapped(f"{heading}:", width, len(_CONTINUED))).extend(f"  {line}" for line in lines)
    say("\n".join(itertools.chain.from_iterable(groups.values())))


_URLS_AND_TIMES = re.compile(r"https?://\S+|\d\d:\d\d:\d\d")


class _Progress:
    def __init__(self, line: console.Doing) -> None:
        self._line = line
        self._lock = threading.Lock()
        self._unanswered: dict[str, str] = {}  #: By certificate, the backend that has not answered.
        self._total = 0
        self._noted: set[str] = set()

    def signing(self, backend: str, names: Sequence[str]) -> None:
        console.log.debug("asking %s for %s", backend, ", ".join(names))
        with self._lock:
            self._unanswered |= dict.fromkeys(names, backend)
            self._total += len(names)
            self._line.text = self._text()

    def signed(self, name: str) -> None:
        console.log.debug("%s was answered", name)
        with self._lock:
            self._unanswered.pop(name, None)
            self._line.text = self._text()

    def note(self, text: str) -> None:
        """Log a warning, but once for authorities of a CA whose warnings differ only in a URL and a time."""
        about = _URLS_AND_TIMES.sub("", text)
        with self._lock:
            is_new = about not in self._noted
            self._noted.add(about)
        if is_new:
            console.log.warning("%s", text)

    def _text(self) -> str:
        if not self._unanswered:
            return f"all {self._total} requests are answered; verifying and installing"
        backends, done = dict.fromkeys(self._unanswered.values()), self._total - len(self._unanswered)
        return f"asking {' and '.join(backends)}: {done} of {self._total} requests are answered"


@contextlib.contextmanager
def progress_shown(text: str = "making new keys and requests") -> Iterator[console.Progress]:
    """Show progress on standard error; a terminal's status line disappears at the end."""
    with console.doing(text, is_plain=False) as line:
        yield _Progress(line)
