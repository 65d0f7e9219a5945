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

from typer import BadParameter
from typer.core import TyperCommand, TyperGroup

from bridge.cli.guide import EXAMPLES, EXCLUDES, NEEDS, TASKS

if TYPE_CHECKING:
    from typer import Context

#: Names of the parameters that `options.command` gives to every command, and click's own.
COMMON = frozenset(("config", "pki_dir", "kubeconfig_dir", "state_dir", "verbose", "log_format", "help"))

#: The program's name.
PROGRAM = "ca-bridge"

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
    """A command whose help ends with examples, and whose options are checked against each other by the guide."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse options that can't be combined, or that lack another one."""
        rest: list[str] = super().parse_args(ctx, args)
        given = {
            option for one in self.params if _is_given(ctx, one.name) for option in (*one.opts, *one.secondary_opts)
        }
        for option, others in EXCLUDES.get(name_of(ctx), {}).items():
            clash = [other for other in others if other in given]
            if option in given and clash:
                raise BadParameter(f"{option} can't be combined with {', '.join(clash)}", ctx)
        for option, other in NEEDS.get(name_of(ctx), {}).items():
            if option in given and other not in given:
                raise BadParameter(f"{option} needs {other}", ctx)
        return rest

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
        parts["Options together"] = list(_together(name_of(ctx)))
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


def _is_given(context: Any, parameter: str | None) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def _together(command: str) -> Iterator[tuple[str, str]]:
    """Which options of a command need or exclude others."""
    needs, excludes = NEEDS.get(command, {}), EXCLUDES.get(command, {})
    for option in dict.fromkeys([*needs, *excludes]):
        parts = [f"needs {needs[option]}"] if option in needs else []
        parts += [f"not with {', '.join(excludes[option])}"] if option in excludes else []
        yield option, _hard("; ".join(parts))


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
    """A group of commands, each with a sentence; those of the program are listed by task."""

    def get_help(self, ctx: Any) -> str:
        """The whole help text."""
        return super().get_help(ctx).replace(_HARD, "-")

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 (typer calls it)
        """The commands' names in the order of the help."""
        return list(sentences_of(self))

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write a section for each task, or one for a group within the program."""
        sections = TASKS if self.name == PROGRAM else {"Commands": sentences_of(self)}
        width = max(len(name) for ours in sections.values() for name in ours)
        for heading, ours in sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), _hard(sentence)) for name, sentence in ours.items()])


def sentences_of(group: Any) -> dict[str, str]:
    """The first sentence of each command of a group; the program's own are in the guide, and load no file."""
    if group.name == PROGRAM:
        return {name: sentence for ours in TASKS.values() for name, sentence in ours.items()}
    return {name: first_sentence(one.help or "") for name, one in group.commands.items()}
