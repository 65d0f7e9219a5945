"""README, examples and change log say what is true: usage, settings, exit codes."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bridge import plugins
from bridge.cli import app
from bridge.errors import Exit
from bridge.settings import parse

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLE = ROOT / "config/config.toml"

START, END = "<!-- usage: `python -m tests.test_docs` writes it, a test compares it -->", "<!-- end of usage -->"
COMMANDS = ((), ("check-expiration",), ("renew",))


def usage() -> str:
    """The help texts, as an 80 columns wide terminal shows them."""
    runner = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    texts = []
    for command in COMMANDS:
        result = runner.invoke(app, [*command, "--help"], prog_name="ca-bridge")
        texts.append(f"$ {' '.join(('ca-bridge', *command, '--help'))}\n{result.output.strip()}")
    return "```\n" + "\n\n".join(texts) + "\n```"


def test_the_usage_in_the_readme_is_the_programs() -> None:
    """An option that is not in the README, or no longer in the program, fails here."""
    between = README.read_text(encoding="utf-8").split(START)[1].split(END)[0]
    assert between.strip() == usage()


def settings_in_the_readme() -> list[str]:
    """Its TOML blocks."""
    return re.findall(r"```toml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_settings_in_the_readme_are_complete() -> None:
    """Each quick start can be pasted as it is."""
    texts = settings_in_the_readme()
    assert len(texts) == 4
    for text in texts:
        settings = parse(text)
        assert set(plugins.configured(settings, settings.authorities)) == {"ca", "etcd-ca", "front-proxy-ca"}


def test_the_example_settings_load_as_they_are() -> None:
    """`ca-bridge settings init` writes this file."""
    settings = parse(EXAMPLE.read_text(encoding="utf-8"))
    assert set(plugins.configured(settings, settings.authorities)) == {"ca", "etcd-ca", "front-proxy-ca"}


def _uncommented(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield line[2:] if re.match(r"# (\[.*\]|\"?[\w.]+\"? = .*)$", line) else line


def test_every_key_in_the_example_exists_and_shows_its_default() -> None:
    """With all comments taken away it still loads; the tables that are not a CA's then say what an empty file means."""
    text = "\n".join(_uncommented(iter(EXAMPLE.read_text(encoding="utf-8").splitlines())))
    assert len(tomllib.loads(text)["backend"]) == 3
    text = text.replace('label = ""', 'label = "x"')
    settings = parse(text.replace('kubernetes_version = "1.37"', ""))
    plugins.configured(settings, settings.authorities)
    empty = parse("")
    settings = dataclasses.replace(settings, restart=dataclasses.replace(settings.restart, commands={}))
    for table in ("node", "renewal", "restart", "hooks", "cluster", "audit", "backups"):
        assert getattr(settings, table) == getattr(empty, table)


def settings_in_sentences(text: str) -> set[str]:
    """Keys in such as `[restart] method = "none"`."""
    return set(re.findall(r"`(?:\[\w+\] )?(\w+) = [^`]+`", text))


@pytest.mark.parametrize("path", ["README.md", "CHANGELOG.md"])
def test_a_setting_that_a_sentence_names_is_in_the_examples(path: str) -> None:
    """The examples are loaded by tests; a sentence is not."""
    examples = "\n".join(found.read_text(encoding="utf-8") for found in (ROOT / "config").rglob("*.toml"))
    known = set(re.findall(r"^\W*(\w+) = ", examples, re.MULTILINE))
    named = settings_in_sentences((ROOT / path).read_text(encoding="utf-8"))
    assert len(named) >= 3
    assert named <= known
    assert not settings_in_sentences('say `[backend] kye = "x"`') <= known


def test_the_exit_codes_in_the_readme_are_the_programs() -> None:
    """A code is a promise."""
    rows = re.findall(r"^\| ([0-9]) \| ", README.read_text(encoding="utf-8"), re.MULTILINE)
    promised = {value for name, value in vars(Exit).items() if name.isupper() and isinstance(value, int)}
    assert {int(row) for row in rows} == promised
    order = ", ".join(map(str, Exit.PRECEDENCE))
    assert f"the first of {order} counts" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", ["README.md", "CHANGELOG.md", "tests/README.md"])
def test_one_sentence_a_line(path: str) -> None:
    """As prose is written here, so that a change is seen sentence by sentence."""
    text = re.sub(r"```.*?```", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.DOTALL)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "- ", "#", "<"))]
    assert not [line for line in prose if re.search(r"[a-z]\. [A-Z]", line)]


def main() -> None:
    """Write the usage into the README."""
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(START)
    README.write_text(f"{head}{START}\n\n{usage()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
