"""The manual: `ca-bridge(1)` and a page for each command, as troff, of the same words as help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from bridge.cli.app import COMMON, examples_of, first_sentence, sections_of
from tests.kit.commands import NAME, Command, commands

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "share/man/man1"
#: Of the last change of what is not generated; a date of the machine's would change the pages every day.
_DATE = "2026-11-26"

_MAIN = """\
.SH EXIT STATUS
{codes}
.SH ENVIRONMENT
.TP
.B CA_BRIDGE_CONFIG
The settings file, where no \\fB\\-\\-config\\fR names one.
.TP
.B NO_COLOR
No colours, if it is set and not empty.
.TP
.B COLUMNS
How wide tables may be; by default the terminal's width, and endless in a file or a pipe.
.TP
.B TERM
With \\fBdumb\\fR no line is written over, and there are no colours.
.SH FILES
.TP
.I /etc/ca\\-bridge/config.toml
Settings; \\fBca\\-bridge settings init\\fR writes one with comments.
.TP
.I /var/lib/ca\\-bridge
Backups of replaced files (they hold keys), journal, lock and audit log.
"""


def pages() -> dict[str, str]:
    """File name and text of each."""
    return {f"{_title(one)}.1": _page(one) for one in commands()}


def _title(command: Command) -> str:
    return "-".join((NAME, *command.words))


def _page(command: Command) -> str:
    help_text = inspect.cleandoc(command.context.command.help or "")
    sentence = first_sentence(help_text).rstrip(".")
    usage = " ".join(command.context.command.collect_usage_pieces(command.context))
    parts = [
        f'.TH {_escaped(_title(command).upper())} 1 {_DATE} {NAME} "User commands"',
        f".SH NAME\n{_escaped(_title(command))} \\- {_words(sentence)}",
        f".SH SYNOPSIS\n.B {_escaped(' '.join((NAME, *command.words)))}\n{_escaped(usage)}",
        ".SH DESCRIPTION\n" + "\n.PP\n".join(_words(" ".join(one.split())) for one in help_text.split("\n\n")),
        *_parameters(command),
        *_subcommands(command),
        *_examples(command),
    ]
    if not command.words:
        parts.append(_MAIN.format(codes=_exit_codes()).rstrip("\n"))
    parts.append(f".SH SEE ALSO\n{_see_also(command)}")
    return '.\\" Written by `python -m tests.test_docs`.\n' + "\n".join(parts) + "\n"


def _parameters(command: Command) -> Iterator[str]:
    found: dict[str, list[str]] = {"ARGUMENTS": [], "OPTIONS": [], "OPTIONS OF EVERY COMMAND": []}
    for one in command.context.command.get_params(command.context):
        record = one.get_help_record(command.context)
        if record is not None:
            is_common = one.name in COMMON and bool(command.words)
            heading = "ARGUMENTS" if one.param_type_name == "argument" else "OPTIONS"
            heading = "OPTIONS OF EVERY COMMAND" if is_common else heading
            found[heading].append(_item(record[0], record[1]))
    yield from (f".SH {heading}\n" + "\n".join(items) for heading, items in found.items() if items)


def _subcommands(command: Command) -> Iterator[str]:
    if hasattr(command.context.command, "commands"):
        for heading, sentences in sections_of(command.context.command).items():
            items = [_item(name, sentence) for name, sentence in sentences.items()]
            yield f".SH {_escaped(heading.upper())}\n" + "\n".join(items)


def _examples(command: Command) -> Iterator[str]:
    is_group = hasattr(command.context.command, "commands")
    if examples := [] if is_group else examples_of(command.name):
        yield ".SH EXAMPLES\n" + "\n".join(_item(line, sentence) for line, sentence in examples)


def _exit_codes() -> str:
    text = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", (ROOT / "docs/trouble.md").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| ([\d, ]+) \| (.*?) \|", text, re.MULTILINE)
    return "\n".join(_item(code, meaning) for code, meaning in rows)


def _see_also(command: Command) -> str:
    titles = [_title(one) for one in commands() if one.words != command.words and _is_near(one, command)]
    return ",\n".join(f".BR {_escaped(title)} (1)" for title in titles).replace("(1),", "(1),")


def _is_near(one: Command, command: Command) -> bool:
    """Whether it is above, below or beside it."""
    return one.words[:-1] == command.words or command.words[:-1] == one.words or one.words == ()


def _item(term: str, text: str) -> str:
    return f".TP\n.B {_escaped(term)}\n{_words(text)}"


def _words(text: str) -> str:
    """Prose; what is between backticks is bold."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(f"\\fB{_escaped(one)}\\fR" if number % 2 else _escaped(one) for number, one in enumerate(parts))


def _escaped(text: str) -> str:
    """As troff reads it: no command at a line's begin, hyphens that can be copied, ASCII alone."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq").replace("'", "\\(aq")
    text = "".join(one if ord(one) < 128 else f"\\[u{ord(one):04X}]" for one in text)
    return f"\\&{text}" if text.startswith((".", "'")) else text


def write() -> None:
    """All of them, and none that is no command's any more."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    texts = pages()
    for path in DIRECTORY.glob("*.1"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (DIRECTORY / name).write_text(text, encoding="utf-8")
