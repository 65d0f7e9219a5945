"""How many cases the tests try: each run prints them at its end, by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import pytest

_PREFIX = "tried: "


class Tried(Protocol):
    """The fixture `tried`."""

    def __call__(self, what: str, count: int) -> None:
        """
        Say how many cases of a kind a test has tried.

        Args:
            what: The kind.
            count: How many.
        """


def property_of(what: str, count: int) -> tuple[str, object]:
    """For a test's report."""
    return f"{_PREFIX}{what}", count


def of(reports: Iterable[pytest.TestReport]) -> Counter[str]:
    """All cases by kind."""
    kinds: Counter[str] = Counter()
    for report in reports:
        for name, value in report.user_properties if report.when == "call" else ():
            if name.startswith(_PREFIX):
                kinds[name.removeprefix(_PREFIX)] += int(str(value))
    return kinds
