"""
How many cases the suites try: printed at the end of each run, kept in `counts.json`, shown in `README.md`.

`python -m tests.counts` runs the suites and writes both; with paths it runs only those, and leaves the rest as it was.
A run in which a test function tries another number than the file tells, with all its parameters, fails.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import pytest

#: function (`tests/…::test_…`) → kind → how many of its tests told one, and how many cases that makes.
Counts = dict[str, dict[str, tuple[int, int]]]

TESTS = Path(__file__).parent
FILE, README = TESTS / "counts.json", TESTS / "README.md"
#: Where a run leaves what it counted.
WRITE_TO = "CA_BRIDGE_COUNTS"
SUITES = (
    "tests/attack",
    "tests/backends/test_cmp_failures.py",
    "tests/backends/test_est.py",
    "tests/backends/test_exec.py",
    "tests/fuzz",
    "tests/pki/test_verify.py",
    "tests/test_secrets.py",
)
BEGIN, END = "<!-- counts: `python -m tests.counts` writes them, each run compares them -->", "<!-- end of counts -->"

_EXACT, _ABOUT = "tried: ", "tried, about: "


class Tried(Protocol):
    """The fixture `tried`."""

    def __call__(self, what: str, count: int, *, exact: bool = True) -> None:
        """
        Tell how many cases of a kind a test has tried.

        Args:
            what: The kind.
            count: How many.
            exact: Each run has as many; otherwise the number is printed and not kept.
        """


def property_of(what: str, count: int, *, exact: bool) -> tuple[str, object]:
    """For a test's report."""
    return f"{_EXACT if exact else _ABOUT}{what}", count


def of(reports: Iterable[pytest.TestReport]) -> tuple[Counts, Counter[str]]:
    """The exact ones by function, and all by kind."""
    found: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    kinds: Counter[str] = Counter()
    for report in reports:
        for name, value in report.user_properties if report.when == "call" else ():
            what, count = re.sub(f"^({_EXACT}|{_ABOUT})", "", name), int(str(value))
            if what == name:
                continue
            kinds[what] += count
            if name.startswith(_EXACT):
                function = report.nodeid.partition("[")[0]
                tests, cases = found[function].get(what, (0, 0))
                found[function][what] = tests + 1, cases + count
    return dict(found), kinds


def differences(counted: Counts) -> list[str]:
    """Functions that ran with all their parameters, and tried another number than the file tells."""
    kept = read()
    wrong = []
    for function, kinds in counted.items():
        for what, (tests, cases) in kinds.items():
            wanted_tests, wanted = kept.get(function, {}).get(what, (0, 0))
            if tests > wanted_tests or (tests == wanted_tests and cases != wanted):
                wrong.append(f"{function}: {what}: wanted {wanted}, as in {FILE.name}, found {cases}")
    return wrong


def read() -> Counts:
    """What is kept."""
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        function: {what: (tests, cases) for what, (tests, cases) in kinds.items()} for function, kinds in kept.items()
    }


def table(counts: Counts) -> str:
    """Markdown, a line a kind."""
    kinds: dict[tuple[str, str], int] = defaultdict(int)
    for function, found in counts.items():
        for what, (_, cases) in found.items():
            kinds[what, function.partition("::")[0].removeprefix("tests/")] += cases
    rows = [f"| {count} | {what} | `{file}` |" for (what, file), count in sorted(kinds.items())]
    return "\n".join(["| cases | of what | where |", "| ---: | --- | --- |", *rows])


def shown() -> str:
    """The table in the README."""
    return README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


def write(counts: Mapping[str, Mapping[str, tuple[int, int]]]) -> None:
    """Into both files."""
    ordered = {function: dict(sorted(kinds.items())) for function, kinds in sorted(counts.items())}
    FILE.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n\n{table(read())}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    """Run suites; what is no path is pytest's, such as `-n=4`."""
    paths = [word for word in sys.argv[1:] if word.startswith("tests/")]
    options = [word for word in sys.argv[1:] if word not in paths]
    counted = TESTS / ".counts.json"
    command = [sys.executable, "-m", "pytest", "-q", *(paths or SUITES), *options]
    try:
        subprocess.run(command, cwd=TESTS.parent, env={**os.environ, WRITE_TO: str(counted)}, check=True)
        found = json.loads(counted.read_text(encoding="utf-8"))
    finally:
        counted.unlink(missing_ok=True)
    rest = {function: kinds for function, kinds in read().items() if paths and not function.startswith(tuple(paths))}
    write(rest | found)


if __name__ == "__main__":
    main()
