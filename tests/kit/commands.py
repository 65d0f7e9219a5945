"""The program's commands as its help has them, and whether a line that a document shows can be typed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer
from typer.testing import CliRunner

from bridge.cli.app import app

#: typer's own Context and Command; it gives them no public names.
PROGRAM: Any = typer.main.get_command(app)
NAME = "ca-bridge"


@dataclass(frozen=True)
class Command:
    """One command."""

    words: tuple[str, ...]  #: Such as ("audit", "show"); none for the program.
    context: Any

    @property
    def name(self) -> str:
        """Without the program's."""
        return " ".join(self.words)


def context_of(words: tuple[str, ...]) -> Any:
    """A command's context, in which nothing is parsed or asked for."""
    context = PROGRAM.context_class(PROGRAM, info_name=NAME, help_option_names=["-h", "--help"])
    for word in words:
        command = context.command.commands[word]
        context = command.context_class(command, info_name=word, parent=context)
    return context


def commands() -> Iterator[Command]:
    """The program, its commands, and those within groups, in the order of its help; hidden ones are none."""

    def below(words: tuple[str, ...]) -> Iterator[Command]:
        context = context_of(words)
        yield Command(words, context)
        for name in context.command.list_commands(context) if hasattr(context.command, "commands") else ():
            if not context.command.commands[name].hidden:
                yield from below((*words, name))

    return below(())


def help_of(words: tuple[str, ...]) -> str:
    """The help text, as an 80 columns wide terminal shows it."""
    runner = CliRunner(env={"COLUMNS": "80"})
    return runner.invoke(app, [*words, "--help"], prog_name=NAME).output.strip()


def why_not(line: str) -> str | None:
    """What is wrong with a command line: the command, an option, or an option's missing value; None if nothing is."""
    words = shlex.split(line, comments=True)
    context = context_of(())
    while hasattr(context.command, "commands"):
        words = words[1:] if context.parent is None or words else words
        if not words or words[0].startswith("-"):
            break
        command = context.command.commands.get(words[0])
        if command is None:
            return f"no command {words[0]}"
        context = command.context_class(command, info_name=words[0], parent=context)
    rest = words if hasattr(context.command, "commands") else words[1:]
    try:
        context.command.make_parser(context).parse_args(args=list(rest))
    except Exception as e:  # noqa: BLE001 (typer's usage errors have no public base)
        return f"{context.command_path}: {e}"
    return None


#: Where a shell begins another command, or leaves this one's words.
_ENDS = re.compile(r"\s(?:[|;>]|&&|2>).*$")


def lines_in(document: str) -> list[str]:
    """Command lines that begin with the program's name, in Markdown: of blocks for a shell, and between backticks."""
    blocks = re.findall(r"```sh\n(.*?)```", document, re.DOTALL)
    text = re.sub(r"```.*?```", "", document, flags=re.DOTALL)
    typed = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`\n]+)`", text)
    lines = [re.sub(r"^(\$ |sudo |(\w+=\S+ )+)", "", line.strip()) for line in (*typed, *inline)]
    ours = [re.sub(r"^\S*/ca-bridge ", f"{NAME} ", line) for line in lines]
    return [_ENDS.sub("", line) for line in ours if line.startswith(f"{NAME} ")]
