"""`help`: the installed pages, whole or by section, in lines that fit a terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from bridge.cli.declare import Common, argument, command
from bridge.cli.printing import columns, say, width_here, wrapped
from bridge.errors import BridgeError
from bridge.system.files import pages, shipped
from bridge.words import name_found

commands = typer.Typer()

#: The only pagers that are tried; a pager that root's environment names is not run.
_PAGERS = ("/usr/bin/less", "/bin/less")
#: The page for the administrator of Vault or OpenBao, as other pages name it; it is installed among the examples.
_ADMINISTRATORS = "config/vault/README"


def topics() -> dict[str, Path]:
    """Return the pages by topic, such as `trouble`; empty if none are installed."""
    directory = pages()
    found = sorted(directory.glob("*.md")) if directory else []
    return {path.stem: path for path in found if path.stem != "README"}


def sections(found: Mapping[str, Path]) -> dict[str, str]:
    """
    Return the sections of all pages, with their subsections, by `page#heading` and by `heading`, spelled as in links.

    A `heading` on several pages is the first page's; `README` is the index of the pages.
    """
    parts: dict[str, str] = {}
    for page in [*found.values(), *(path.with_name("README.md") for path in list(found.values())[:1])]:
        for heading, text in _parts(page.read_text(encoding="utf-8").splitlines()):
            parts.setdefault(heading, text)
            parts[f"{page.stem}#{heading}"] = text
    return parts


def _parts(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each heading, and the lines from it up to the next heading of its level or above."""
    starts, in_code = [], False
    for number, line in enumerate(lines):
        in_code ^= line.lstrip().startswith("```")
        if not in_code and (match := re.match(r"(#+) (.*)", line)):
            heading = re.sub(r"[^\w\- ]", "", match[2].lower()).replace(" ", "-")
            starts.append((number, len(match[1]), heading))
    for begin, depth, heading in starts:
        end = next((number for number, deep, _ in starts if number > begin and deep <= depth), len(lines))
        yield heading, "\n".join(lines[begin:end]) + "\n"


# --- lines that fit ---------------------------------------------------------------------------------------------------


def fitted(text: str, width: int, page: str) -> Iterator[str]:
    """
    Yield a Markdown page's lines for a terminal, without breaking words; rows of wide tables become lists.

    Code blocks stay as they are, without their list's indentation. A link's topic follows it in parentheses; `page` is
    the topic of the text's own page.
    """
    lines, number, indent = text.splitlines(), 0, None
    while number < len(lines):
        line, number = lines[number], number + 1
        if line.lstrip().startswith("```"):
            indent = len(line) - len(line.lstrip()) if indent is None else None
            yield "```"
        elif indent is not None:
            yield from _code(line[indent:] if not line[:indent].strip() else line, width)
        elif line.startswith("| "):
            end = next((n for n in range(number, len(lines)) if not lines[n].startswith("|")), len(lines))
            yield from _table([_cells(_followed(row, page)) for row in [line, *lines[number + 1 : end]]], width)
            number = end
        elif not line.startswith("<!--"):
            mark = re.match(r"\s*(?:[-*] |\d+\. |)", line)
            yield from wrapped(_followed(line, page), width, len(mark[0]) if mark else 0)


def _code(line: str, width: int) -> Iterator[str]:
    """Yield a line of a code block; a line that is too long gets its comment above it."""
    before, _, comment = line.rpartition("  # ")
    if len(line) <= width or not before.strip():
        yield line
        return
    yield from (f"# {piece}" for piece in wrapped(comment, width - len("# "), 0))
    yield before.rstrip()


def _followed(line: str, page: str) -> str:
    """Replace links by their text and the topic to type."""

    def link(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        if match[0].startswith("!"):
            return f"(picture: {words})"
        if target == f"../{_ADMINISTRATORS}.md":
            return f"{words} ({_ADMINISTRATORS})"
        if target.startswith("../"):  # the target is not installed
            return words
        if "/" not in target:
            target = (f"{page}{target}" if target.startswith("#") else target).replace(".md", "")
        return words if words in {target, f"{target}.md"} else f"{words} ({target})"

    return re.sub(r"!?\[([^\]]*)\]\(([^)]+)\)", link, line)


def _cells(row: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def _table(rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Yield columns if they fit; otherwise the first cell of each row, and the others below it with their headings."""
    natural = sum(max(map(len, column)) for column in zip(*rows, strict=False)) + 2 * (len(rows[0]) - 1)
    if natural <= width:
        yield from columns(rows, width)
        return
    (first, *headings), *others = rows
    for row in others:
        yield from wrapped(f"{first}: {row[0]}" if first else row[0], width, 2)
        for heading, cell in zip(headings, row[1:], strict=False):
            if cell:
                yield from wrapped(f"  {heading}: {cell}" if heading and headings[1:] else f"  {cell}", width, 4)


def show(text: str) -> None:
    """Print a page, through a pager if it is longer than the terminal."""
    pager = next((path for path in _PAGERS if os.access(path, os.X_OK)), "")
    if not pager or not sys.stdout.isatty() or text.count("\n") < os.get_terminal_size().lines:
        say(text)
        return
    environment = {"LESSSECURE": "1", "LESS": "FR", "TERM": os.environ.get("TERM", "dumb"), "LANG": "C.UTF-8"}
    subprocess.run([pager], input=text, text=True, encoding="utf-8", env=environment, check=False)


@command(commands, "help")
def help_(
    _: Common, topic: Annotated[str, argument("A page or a section, such as `trouble` or `trouble#symptoms`.")] = ""
) -> None:
    """
    Show a page of the installed documents, one of its sections, or the list of the pages.

    Pages name other topics in parentheses, such as (trouble#symptoms). `ca-bridge help questions` says which section
    answers which question. On a terminal, `less` shows a page that does not fit, if it is installed.
    """
    found = topics()
    if not found:
        raise BridgeError("the program's pages are not installed", hint="install it again")
    texts = {name: page.read_text(encoding="utf-8") for name, page in found.items()}
    if not topic:
        widest = max(map(len, found))
        titles = {name: text.partition("\n")[0].removeprefix("#").strip() for name, text in texts.items()}
        say("\n".join(f"{name:{widest}}  {title}" for name, title in titles.items()))
        return
    parts = sections(found)
    known = parts | texts
    if (page := shipped(_ADMINISTRATORS.removeprefix("config/") + ".md")) is not None:
        known[_ADMINISTRATORS] = page.read_text(encoding="utf-8")
    name = topic.replace(".md", "")
    if name not in known:
        meant = name_found(topic, [*found, *(part for part in parts if "#" not in part)])
        raise typer.BadParameter(f"wanted a page or a section, found {meant}; `ca-bridge help` lists the pages")
    text, width = known[name], width_here()
    own = next((part.partition("#")[0] for part in parts if parts[part] == text and "#" in part), name)
    show(text if width is None else "\n".join(fitted(text, width, own)) + "\n")
