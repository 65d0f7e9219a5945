"""
Help as plain text, the same in a terminal, a log and a document: commands by task, whole sentences, examples.

Options that every command has come last, under a heading of their own.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand, TyperGroup

from bridge.cli.guide import EXAMPLES, TASKS

if TYPE_CHECKING:
    from typer import Context

#: Names of the parameters that `options.command` gives to every command, and click's own.
COMMON = frozenset(("config", "pki_dir", "kubeconfig_dir", "state_dir", "verbose", "log_format", "help"))

#: How wide the left column may get before its text goes on the next line.
_WIDEST = 28


def first_sentence(text: str) -> str:
    """The first sentence of a help text, on one line."""
    paragraph = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    return re.split(r"(?<=[.]) (?=[A-Z])", paragraph)[0]


def name_of(context: Context) -> str:
    """A command without the program's name, such as `audit show`."""
    return context.command_path.partition(" ")[2]


#: A hyphen at which no line is broken, until the text is printed.
_HARD = "\N{NON-BREAKING HYPHEN}"


def _hard(text: str) -> str:
    """Keep words with hyphens whole: they are names of commands, files and options."""
    return re.sub(r"(?<=\w)-(?=\w)", _HARD, text)


class Command(TyperCommand):
    """A command whose help ends with examples."""

    def get_help(self, ctx: Any) -> str:
        """The whole help text."""
        return super().get_help(ctx).replace(_HARD, "-")

    def format_help_text(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 (typer calls it)
        """Write the command's description."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(_hard(inspect.cleandoc(self.help or "")))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, the command's own options, and those of every command."""
        parts: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], "Options of every command": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                own = "Arguments" if is_argument else "Options"
                whole = (record[0], _hard(record[1]))
                parts["Options of every command" if parameter.name in COMMON else own].append(whole)
        for heading, records in parts.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records, col_max=_WIDEST)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write each example on a line that can be copied, and what it does below it."""
        examples = EXAMPLES.get(name_of(ctx), ())
        if examples:
            with formatter.section("Examples"):
                for line, sentence in examples:
                    formatter.write(f"{_copied(line, formatter.width)}\n{_told(sentence, formatter.width)}\n")


def _copied(line: str, width: int) -> str:
    """An example, which a shell takes as it is shown: where it is too wide its lines end with a backslash."""
    return " \\\n".join(_wrapped(line, width - len(" \\"), "  ", "    "))


def _told(sentence: str, width: int) -> str:
    return "\n".join(_wrapped(sentence, width, " " * 6, " " * 6))


def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


class Group(TyperGroup):
    """Commands with a whole sentence each; those of the program by task."""

    def get_help(self, ctx: Any) -> str:
        """The whole help text."""
        return super().get_help(ctx).replace(_HARD, "-")

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands' names in the order of the guide."""
        names = super().list_commands(ctx)
        return [name for _, ours in by_task(names, is_program=ctx.parent is None) for name in ours]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Under the headings of the guide; what is not there comes last."""
        rows = {name: command for name in self.list_commands(ctx) if (command := self.get_command(ctx, name))}
        sentences = {name: first_sentence(command.help or "") for name, command in rows.items() if not command.hidden}
        width = max(map(len, sentences))
        for heading, names in by_task(list(sentences), is_program=ctx.parent is None):
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), _hard(sentences[name])) for name in names])


def by_task(names: list[str], *, is_program: bool) -> Iterator[tuple[str, list[str]]]:
    """Headings, and the commands below each; a group within the program has one heading."""
    if is_program:
        for heading, ours in TASKS.items():
            here = [name for name in ours if name in names]
            if here:
                yield heading, here
    told = {name for ours in TASKS.values() for name in ours} if is_program else set()
    others = [name for name in names if name not in told]
    if others:
        yield "More" if is_program else "Commands", others
