"""The numbers in the README of the tests are those of a run."""

from __future__ import annotations

import re

from tests import counts


def test_the_numbers_in_the_readme_are_those_of_a_run() -> None:
    """A run compares the file with what it counts; this, the file with the README."""
    assert counts.shown() == counts.table(counts.read())


def test_every_function_that_counts_is_there() -> None:
    """One that was renamed or removed leaves no number behind."""
    for function in counts.read():
        file, _, name = function.partition("::")
        assert re.search(rf"^def {name}\(", (counts.TESTS.parent / file).read_text(encoding="utf-8"), re.MULTILINE), (
            name
        )


def test_another_number_is_noticed() -> None:
    """With all parameters of the function, or more than there were; fewer are a part of a run."""
    function, kinds = next((f, k) for f, k in counts.read().items() if next(iter(k.values()))[0] > 1)
    what, (tests, cases) = next(iter(kinds.items()))
    assert counts.differences({function: {what: (tests, cases)}}) == []
    assert counts.differences({function: {what: (tests - 1, cases - 1)}}) == []
    assert len(counts.differences({function: {what: (tests, cases + 1)}})) == 1
    assert len(counts.differences({function: {what: (tests + 1, cases)}})) == 1
    assert len(counts.differences({function: {"another kind": (1, 1)}})) == 1
