"""`ca-bridge help`: the pages that are installed with the program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from bridge.cli.options import Common, command
from bridge.cli.printing import say
from bridge.errors import BridgeError
from bridge.system.files import pages
from bridge.words import name_found

commands = typer.Typer()

#: The only pagers that are tried: root's environment names no program here.
_PAGERS = ("/usr/bin/less", "/bin/less")


def topics() -> dict[str, Path]:
    """The pages by their topic, such as `emergency`; empty where no pages are installed."""
    directory = pages()
    found = sorted(directory.glob("*.md")) if directory else []
    return {path.stem: path for path in found if path.stem != "README"}


def title_of(page: Path) -> str:
    """The heading of a page."""
    with page.open(encoding="utf-8") as lines:
        return next(lines, "").removeprefix("#").strip()


def show(text: str) -> None:
    """Print a page, by a pager where it is longer than the terminal."""
    pager = next((path for path in _PAGERS if os.access(path, os.X_OK)), "")
    if not pager or not sys.stdout.isatty() or text.count("\n") < os.get_terminal_size().lines:
        say(text)
        return
    environment = {"LESSSECURE": "1", "LESS": "FR", "TERM": os.environ.get("TERM", "dumb"), "LANG": "C.UTF-8"}
    subprocess.run([pager], input=text, text=True, encoding="utf-8", env=environment, check=False)


@command(commands, "help")
def help_(
    _: Common,
    topic: Annotated[str, typer.Argument(help="A page, such as `emergency`.", show_default=False)] = "",
) -> None:
    """
    Show a page of the documents that are installed with the program, or the list of them.

    On a terminal, `less` shows a page that does not fit, where that program is installed.
    """
    found = topics()
    if not found:
        raise BridgeError("wanted the pages that are installed with the program, found none", hint="install it again")
    if not topic:
        widest = max(map(len, found))
        say("\n".join(f"{name:{widest}}  {title_of(page)}" for name, page in found.items()))
        return
    if topic not in found:
        raise typer.BadParameter(f"wanted a page, found {name_found(topic, found)}; `ca-bridge help` lists them")
    show(found[topic].read_text(encoding="utf-8"))
