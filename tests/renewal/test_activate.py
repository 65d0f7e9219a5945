"""The tables of what becomes of an installation, row by row, and over all that can be seen."""

from __future__ import annotations

from itertools import chain, combinations, product

import pytest

from bridge.control_plane.probes import ProofState
from bridge.renewal.activate import Meaning, Ruling, meaning, rule

WELL: tuple[ProofState, ...] = ("current", "next-connection", "not-ours")
WRONG: tuple[ProofState, ...] = ("stale", "refused", "no-answer", "unknown")
YES_OR_NO = (False, True)


@pytest.mark.parametrize(
    ("state", "postponed", "ours", "new", "expected"),
    [
        ("stale", False, True, True, Meaning.NOT_IN_USE),
        ("stale", True, True, True, Meaning.LATER),
        ("stale", True, False, True, Meaning.LATER),
        ("stale", False, False, True, Meaning.LEFT),
        ("refused", True, False, True, Meaning.BROKEN),
        ("no-answer", True, False, True, Meaning.BROKEN),
        ("unknown", True, False, True, Meaning.UNSEEN),
    ],
)
def test_a_finding_means(state: ProofState, postponed: bool, ours: bool, new: bool, expected: Meaning) -> None:
    """A restart that is postponed, or left to the operator, excuses an old certificate, not one that does not work."""
    assert meaning(state, postponed=postponed, ours=ours, new=new) is expected


def test_each_wrong_finding_has_one_row_and_a_good_one_none() -> None:
    """Each wrong finding has one row for every kind of restart; a fault from before the installation never counts against it."""
    for postponed, ours, new in product(YES_OR_NO, repeat=3):
        for state in WELL:
            assert meaning(state, postponed=postponed, ours=ours, new=new) is None
        for state in WRONG:
            found = meaning(state, postponed=postponed, ours=ours, new=new)
            assert (found is Meaning.AS_BEFORE) is (not new)
            assert found is not None


@pytest.mark.parametrize(
    ("meanings", "postponed", "failed", "expected"),
    [
        ([], False, False, Ruling.PROVEN),
        ([Meaning.AS_BEFORE], False, False, Ruling.PROVEN),
        ([Meaning.AS_BEFORE, Meaning.LEFT], False, False, Ruling.LEFT),
        ([Meaning.LEFT, Meaning.UNSEEN], False, False, Ruling.UNPROVEN),
        ([Meaning.UNSEEN, Meaning.NOT_IN_USE], False, False, Ruling.FAILED),
        ([Meaning.BROKEN], False, False, Ruling.FAILED),
        ([], False, True, Ruling.FAILED),
        ([Meaning.LATER, Meaning.NOT_IN_USE, Meaning.UNSEEN], True, False, Ruling.POSTPONED),
        ([Meaning.LATER, Meaning.BROKEN], True, False, Ruling.FAILED),
        ([Meaning.LATER], True, True, Ruling.FAILED),
    ],
)
def test_an_installation_becomes(meanings: list[Meaning], postponed: bool, failed: bool, expected: Ruling) -> None:
    """The worst that was seen decides; what is postponed waits, unless something does not work."""
    assert rule(meanings, postponed=postponed, failed=failed) is expected


@pytest.mark.parametrize(
    ("meanings", "expected"),
    [
        ([], Ruling.LEFT),
        ([Meaning.UNSEEN, Meaning.AS_BEFORE], Ruling.LEFT),
        ([Meaning.LEFT], Ruling.LEFT),
        ([Meaning.NOT_IN_USE], Ruling.FAILED),
        ([Meaning.BROKEN], Ruling.FAILED),
    ],
)
def test_a_restart_that_is_impossible_is_no_proof(meanings: list[Meaning], expected: Ruling) -> None:
    """The certificates stay, unless something else says that they are bad."""
    assert rule(meanings, postponed=False, failed=False, impossible=True) is expected
    assert rule(meanings, postponed=False, failed=True, impossible=True) is Ruling.FAILED


def test_nothing_that_does_not_work_ever_stays_unsaid() -> None:
    """Over all sets of meanings: a broken certificate or a failed restart is never anything else than a failure."""
    every = list(chain.from_iterable(combinations(Meaning, n) for n in range(len(Meaning) + 1)))
    for meanings, postponed, failed in product(every, YES_OR_NO, YES_OR_NO):
        ruling = rule(meanings, postponed=postponed, failed=failed)
        if failed or Meaning.BROKEN in meanings:
            assert ruling is Ruling.FAILED
        elif postponed:
            assert ruling is Ruling.POSTPONED
        else:
            assert (ruling is Ruling.PROVEN) is (set(meanings) <= {Meaning.AS_BEFORE, Meaning.LATER})
