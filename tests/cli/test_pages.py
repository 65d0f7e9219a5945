"""`ca-bridge help`: the pages are where the program is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bridge.cli import settings as pages
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
        script = (
            f"from bridge.cli import settings; settings._PAGERS = ({str(pager)!r},); settings.show('line\\n' * {lines})"
        )
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
    assert "found none" in result.stderr
