"""
The picture of a terminal session in the README: what `ca-bridge demo` really shows, as SVG.

`python -m tests.kit.picture` runs it, and writes the steps from the renewal to the recovery to `docs/session.svg`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

from tests.kit import terminals

FILE = Path(__file__).parents[2] / "docs/session.svg"
_LINE, _LEFT, _TOP = 18, 14, 44
_CLASSES = {"1": "bold", "2": "faint", "31": "red", "32": "green", "33": "yellow", "34": "blue", "36": "cyan"}

_HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title">
  <title id="title">A session in a terminal: ca-bridge demo</title>
  <style>
    text {{ font: 13px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #d1d7e0; white-space: pre }}
    .frame {{ fill: #151b23 }} .bar {{ fill: #262c36 }}
    .bold {{ font-weight: bold }} .faint {{ fill: #9198a1 }} .red {{ fill: #f47067 }} .green {{ fill: #57ab5a }}
    .yellow {{ fill: #daaa3f }} .blue {{ fill: #6cb6ff }} .cyan {{ fill: #76e3ea }}
  </style>
  <rect class="frame" width="{width}" height="{height}" rx="8"/>
  <path class="bar" d="M8 0h{bar}a8 8 0 0 1 8 8v20H0V8a8 8 0 0 1 8-8z"/>
  <circle cx="18" cy="14" r="5" fill="#f47067"/>
  <circle cx="36" cy="14" r="5" fill="#daaa3f"/>
  <circle cx="54" cy="14" r="5" fill="#57ab5a"/>
"""


def steps(terminal: str) -> list[str]:
    """The lines of steps 2 to 4, with their colours."""
    lines = re.sub(r"[^\n]*\r(?!\n)\x1b\[K", "", terminal.replace("\r\n", "\n")).splitlines()
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    first, end = (next(n for n, line in enumerate(plain) if line.startswith(f"{step} ")) for step in (2, 5))
    return ["\x1b[36m$ ca-bridge demo\x1b[0m", "…", *lines[first : end - 1]]


def spans(line: str) -> Iterator[str]:
    """Its parts, each with the classes of its colour."""
    classes: list[str] = []
    for code, text in re.findall(r"(?:\x1b\[([0-9;]*)m)?([^\x1b]*)", line):
        if code:
            classes = [_CLASSES[one] for one in code.split(";") if one in _CLASSES]
        if text:
            yield f'<tspan class="{" ".join(classes)}">{escape(text)}</tspan>' if classes else escape(text)


def picture(terminal: str) -> str:
    """Of what a terminal showed."""
    lines = steps(terminal)
    width, height = 2 * _LEFT + 80 * 8, _TOP + len(lines) * _LINE + 6
    rows = [
        f'  <text x="{_LEFT}" y="{_TOP + 6 + number * _LINE}" xml:space="preserve">{"".join(spans(line))}</text>'
        for number, line in enumerate(lines)
        if line
    ]
    return _HEAD.format(width=width, height=height, bar=width - 16) + "\n".join([*rows, "</svg>", ""])


def main() -> None:
    """Run the demo, and write the picture."""
    shown = terminals.run([str(Path(sys.executable).with_name("ca-bridge")), "demo"])
    assert shown.exit_code == 0, shown.text
    FILE.write_text(picture(shown.terminal), encoding="utf-8")


if __name__ == "__main__":
    main()
