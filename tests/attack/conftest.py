"""Counts of cases: a test records how many it tried, and the end of the run says so, with several workers, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

Tried = Callable[[str, int], None]

_PREFIX = "tried: "


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Tried:
    """Tell how many cases of a kind a test has tried."""

    def tried(what: str, count: int) -> None:
        record_property(f"{_PREFIX}{what}", count)

    return tried


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a kind."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        if report.when == "teardown":
            continue
        for name, value in report.user_properties:
            if name.startswith(_PREFIX):
                counts[name.removeprefix(_PREFIX)] += int(str(value))
    if counts:
        terminalreporter.section("attacks that held")
    for what, count in sorted(counts.items()):
        terminalreporter.write_line(f"{count:6} {what}")
