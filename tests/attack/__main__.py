"""
`python -m tests.attack [--docs] [PYTEST-ARGUMENT...]`: tries every attack, and prints how many were tried and how many held.

Attacks are the tests below `tests/attack`, the hostile requests and answers of `SUITES`, and each test with the mark
`attack`, which names the finding of a review that it repeats. With `--docs` the table goes into the security page.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import counts
from tests.measure.__main__ import write_between

TESTS = Path(__file__).parents[1]
SUITES = ("tests/attack", "tests/gateway/test_hostile.py", "tests/gateway/test_traps.py", "tests/pki/test_verify.py")
PAGE = TESTS.parent / "docs/security.md"
START = "<!-- attacks: written by `python -m tests.attack --docs` -->"


class Results:
    """Counts what was tried and what held, by the file of the test."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.held: Counter[str] = Counter()
        self.findings: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Each case that a test says it has tried; a test that says nothing is one case."""
        if report.when != "call" and not report.failed:
            return
        file = report.nodeid.partition("::")[0].removeprefix("tests/")
        cases = sum(counts.of([report]).values()) or 1
        self.tried[file] += cases
        self.held[file] += cases if report.passed else 0
        for name, value in report.user_properties:
            if name == "attack":
                self.findings[str(value)] = report.passed and self.findings.get(str(value), True)

    def table(self) -> str:
        """Markdown: a row a file, and the sum."""
        rows = [f"| `{file}` | {tried:,} | {self.held[file]:,} |" for file, tried in sorted(self.tried.items())]
        total = f"| **all** | **{self.tried.total():,}** | **{self.held.total():,}** |"
        held = sum(self.findings.values())
        return "\n".join(
            [
                f"Findings of the last review that are tried again: {len(self.findings)}, of which {held} hold.",
                "",
                "| where | attacks tried | held |",
                "| --- | ---: | ---: |",
                *rows,
                total,
                "",
            ]
        )


def marked() -> list[str]:
    """The tests with the mark `attack` outside of the suites, by their ids."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "attack", "tests"]
    listed = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "::" in line and not line.startswith(SUITES)]


def main() -> None:
    """Try, print, write; exits as pytest does."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--docs"]
    results = Results()
    code = pytest.main(["-q", *arguments, *SUITES, *marked()], plugins=[results])
    print(f"\n{results.table()}")
    if "--docs" in sys.argv and code == pytest.ExitCode.OK:
        write_between(PAGE, START, results.table())
    raise SystemExit(code)


if __name__ == "__main__":
    main()
