"""`ca-bridge help`: the pages are where the program is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bridge.cli import pages
from bridge.cli.app import app
from tests.kit import terminals

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.first_use("1")
def test_each_page_is_there_and_listed_with_its_title() -> None:
    """The installed program has and lists each page, without the clone."""
    result = CliRunner().invoke(app, ["help"])

    topics = {path.stem for path in DOCS.glob("*.md")} - {"README"}
    assert result.exit_code == 0
    assert {line.split()[0] for line in result.stdout.splitlines()} == topics
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert any(
        line.split(maxsplit=1) == ["exec", "Any program as a CA: the backend `exec`"]
        for line in result.stdout.splitlines()
    )
    assert DOCS not in pages.topics()["exec"].parents


def test_a_page_is_printed_whole() -> None:
    """A pipe gets the whole page without a pager."""
    result = CliRunner().invoke(app, ["help", "trouble"])

    assert result.exit_code == 0
    assert result.stdout == (DOCS / "trouble.md").read_text(encoding="utf-8")


@pytest.mark.first_use("1")
def test_a_page_that_is_longer_than_the_terminal_is_paged(tmp_path: Path) -> None:
    """The pager that is installed shows it, which is one of two paths; a short page and a pipe need none."""
    pager = tmp_path / "pager"
    pager.write_text("#!/bin/sh\necho paged $LESSSECURE; wc -l\n")
    pager.chmod(0o755)

    def command(lines: int) -> list[str]:
        script = f"from bridge.cli import pages; pages._PAGERS = ({str(pager)!r},); pages.show('line\\n' * {lines})"
        return [sys.executable, "-c", script]

    assert terminals.run(command(100)).text.split() == ["paged", "1", "100"]
    assert terminals.run(command(20)).text.split() == ["line"] * 20
    assert subprocess.check_output(command(100), text=True).split() == ["line"] * 100
    assert {Path(path).name for path in pages._PAGERS} == {"less"}


def test_a_chapter_is_printed_alone() -> None:
    """A chapter's heading, as links have it, prints it up to the next one; those of the index, too."""
    result = CliRunner().invoke(app, ["help", "exit-codes"])

    assert result.exit_code == 0
    assert result.stdout.startswith("## Exit codes\n")
    assert "### 130, 143: interrupted" in result.stdout
    assert "Everything has expired" not in result.stdout
    assert CliRunner().invoke(app, ["help", "glossary"]).stdout.startswith("## Glossary\n")


def test_a_section_of_any_depth_is_printed_with_what_is_in_it() -> None:
    """As a link in a page has it, so that of several pages' the right one is shown; a comment in a block is no heading."""
    begin = {page: CliRunner().invoke(app, ["help", f"{page}#begin"]).stdout for page in ("door", "air-gap.md")}

    assert all(text.startswith("#") and " Begin\n" in text for text in begin.values())
    assert begin["door"] != begin["air-gap.md"]
    expired = CliRunner().invoke(app, ["help", "everything-has-expired"]).stdout
    assert expired.startswith("### Everything has expired\n")
    assert "### Keys have leaked" not in expired
    assert list(pages._parts(["# a", "```sh", "# b", "```", "## c", "d", "# e"])) == [
        ("a", "# a\n```sh\n# b\n```\n## c\nd\n"),
        ("c", "## c\nd\n"),
        ("e", "# e\n"),
    ]


@pytest.mark.first_use("10")
def test_a_page_fits_a_terminal() -> None:
    """Words are not broken: what is longer than 80 columns is one word or stands in a block, which stays as it is."""
    for topic, path in pages.topics().items():
        text = path.read_text(encoding="utf-8")
        in_code, wide = False, []
        for line in pages.fitted(text, 80, topic):
            in_code ^= line == "```"
            wide += [line] if len(line) > 80 and not in_code and len(line.split()) > 1 else []
        assert wide == [], topic
        blocks = re.findall(r"^```console[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        assert all(block in "\n".join(pages.fitted(text, 80, topic)) for block in blocks)
    shown = CliRunner().invoke(app, ["help", "trouble#5-refused"], env={"COLUMNS": "80"}).stdout
    assert max(map(len, shown.splitlines())) <= 80


def test_what_the_administrator_of_vault_does_is_there_too() -> None:
    """Pages name it by the topic under which it is shown, though it is installed among the examples."""
    shown = CliRunner().invoke(app, ["help", "first-renewal"], env={"COLUMNS": "80"}).stdout

    assert "(config/vault/README)" in shown
    assert CliRunner().invoke(app, ["help", "config/vault/README"]).stdout.startswith("# Vault and OpenBao")


def test_a_comment_that_is_too_long_is_above_its_command() -> None:
    """The line can be pasted either way; what has no comment stays."""
    line = "ca-bridge plan        # what would be renewed"

    assert list(pages._code(line, 40)) == ["# what would be renewed", "ca-bridge plan"]
    assert list(pages._code(line, 80)) == [line]
    assert list(pages._code("x" * 90, 80)) == ["x" * 90]


def test_lines_for_a_terminal() -> None:
    """A link is its words and its topic, a list goes on below its words, and a wide table is a list."""
    text = "1. See [the door](door.md#begin) or [here](#x),\n\n   ```sh\n   ls\n   ```\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    wide = f"| a | b | c |\n| --- | --- | --- |\n| 1 | {'word ' * 20} | |\n"

    assert list(pages.fitted(text, 40, "exec")) == [
        *("1. See the door (door#begin) or here", "   (exec#x),", "", "```", "ls", "```", "", "a  b", "1  2"),
    ]
    assert list(pages.fitted(wide, 80, "exec"))[:2] == ["a: 1", f"  b: {'word ' * 15}".rstrip()]


def test_a_page_that_is_not_there_is_answered_with_the_one_that_may_be_meant() -> None:
    """The answer suggests a page also for a path, which is no topic."""
    for wrong in ("emergancy", "../emergency", "/etc/passwd"):
        result = CliRunner().invoke(app, ["help", wrong])

        assert result.exit_code == 2
        assert "ca-bridge help" in result.stderr
    assert "'emergency'" in CliRunner().invoke(app, ["help", "emergancy"]).stderr


def test_an_installation_without_pages_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no empty list."""
    monkeypatch.setattr(pages, "pages", lambda: None)

    result = CliRunner().invoke(app, ["help"])

    assert result.exit_code == 1
    assert "are not installed" in result.stderr
