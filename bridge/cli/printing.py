"""What goes to standard output, and the only place that prints there; messages go through `bridge.system.console`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from bridge.pki.expiry import left_text, minute

#: Of what `-o json` prints; grows when a key changes its meaning or goes.
SCHEMA_VERSION = 1


def end_text(end: datetime, now: datetime) -> str:
    """When a certificate ends, and how long that is from now; dates for people are `minute`, for programs `rfc3339`."""
    return f"{'expires' if end > now else 'expired'} {minute(end)} ({left_text(end, now).removeprefix('expired ')})"


def say(text: str) -> None:
    """Print lines; the last one needs no line break, and no text is no line."""
    import typer  # noqa: PLC0415 (what makes the text can be had without a command line)

    typer.echo(text.removesuffix("\n"), nl=bool(text))


def say_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows, if there are any."""
    if rows:
        say("\n".join(columns(rows)))


def say_json(structure: dict[str, Any]) -> None:
    """Print a structure for programs."""
    say(json.dumps({"schemaVersion": SCHEMA_VERSION, **structure}, indent=4))


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines with the cells of each column below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def under_headings(rows: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    """Rows, each with a sentence; a sentence of several rows stands once, above them."""
    cells = list(columns([row for _, row in rows]))
    for heading in dict.fromkeys(heading for heading, _ in rows):
        yield f"{heading}:"
        yield from (f"  {line}" for line, (about, _) in zip(cells, rows, strict=True) if about == heading)
