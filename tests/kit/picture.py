"""
Pictures of terminals, as SVG: what `ca-bridge demo` really shows, and three commands on a node of the pages.

`python -m tests.kit.picture` runs them, and writes the demo's steps from the renewal to the recovery to
`docs/session.svg`, and the commands to `docs/screen-NAME.svg`.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from tests.kit import shown, terminals

DOCS = Path(__file__).parents[2] / "docs"
#: As `shown.NODE` has them.
SCREENS = ("check-expiration", "doctor", "renew")
_LINE, _LEFT, _TOP = 18, 14, 44
_CLASSES = {"1": "bold", "2": "faint", "31": "red", "32": "green", "33": "yellow", "34": "blue", "36": "cyan"}

_HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title">
  <title id="title">A session in a terminal: {title}</title>
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


def lines_of(terminal: str) -> list[str]:
    """What is there in the end, with its colours."""
    return re.sub(r"[^\n]*\r(?!\n)(?:\x1b\[K)?", "", terminal.replace("\r\n", "\n")).splitlines()


def prompt(command: str) -> str:
    """A command as it is typed."""
    return f"\x1b[36m$ {command}\x1b[0m"


def steps(terminal: str) -> list[str]:
    """The lines of steps 2 to 4 of the demo."""
    lines = lines_of(terminal)
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    first, end = (next(n for n, line in enumerate(plain) if line.startswith(f"{step} ")) for step in (2, 5))
    return [prompt("ca-bridge demo"), "…", *lines[first : end - 1]]


def spans(line: str) -> Iterator[str]:
    """Its parts, each with the classes of its colour."""
    classes: list[str] = []
    for code, text in re.findall(r"(?:\x1b\[([0-9;]*)m)?([^\x1b]*)", line):
        if code:
            classes = [_CLASSES[one] for one in code.split(";") if one in _CLASSES]
        if text:
            yield f'<tspan class="{" ".join(classes)}">{escape(text)}</tspan>' if classes else escape(text)


def picture(title: str, lines: Sequence[str]) -> str:
    """A picture of a terminal's content."""
    width, height = 2 * _LEFT + 80 * 8, _TOP + len(lines) * _LINE + 6
    rows = [
        f'  <text x="{_LEFT}" y="{_TOP + 6 + number * _LINE}" xml:space="preserve">{"".join(spans(line))}</text>'
        for number, line in enumerate(lines)
        if line
    ]
    head = _HEAD.format(title=title, width=width, height=height, bar=width - 16)
    return head + "\n".join([*rows, "</svg>", ""])


def main() -> None:
    """Run the demo and the commands, and write the pictures."""
    demo = terminals.run([str(Path(sys.executable).with_name("ca-bridge")), "demo"])
    assert demo.exit_code == 0, demo.text
    (DOCS / "session.svg").write_text(picture("ca-bridge demo", steps(demo.terminal)), encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        node, normal = shown.node_with_openssl(Path(directory, "cp-1")), shown.Normal()
        for name, line in shown.NODE.items():
            terminal = normal.of(terminals.run(node.command(line), columns=shown.COLUMNS).terminal)
            if name in SCREENS:
                lines = [prompt(line), *lines_of(terminal)]
                (DOCS / f"screen-{name}.svg").write_text(picture(line, lines), encoding="utf-8")


if __name__ == "__main__":
    main()
