"""What nodes have said of their certificates counts for an hour, until the phase has begun."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import pytest

from bridge.pki.expiry import rfc3339
from bridge.rotation.gate import LATELY, Word, late_words
from bridge.rotation.objects import SEEN_AT, SIGNED_BY
from bridge.rotation.phases import Phase
from tests.kit.issuing import NOW

SECOND = timedelta(seconds=1)


def said(ago: timedelta, phase: Phase = Phase.ISSUED) -> Word:
    """A node's word of some time ago, read off its object."""
    return word({SIGNED_BY: "ab", SEEN_AT: f"{rfc3339(NOW - ago)} {phase.value}"})


def word(annotations: Mapping[str, object]) -> Word:
    return Word.of({"metadata": {"annotations": annotations}})


def test_a_word_counts_for_an_hour() -> None:
    """Older ones are named, and so are those from the future: a clock is wrong."""
    words = {"now": said(LATELY), "late": said(LATELY + SECOND), "ahead": said(-LATELY - SECOND)}
    assert late_words(words, Phase.NEW, NOW) == ["late", "ahead"]


@pytest.mark.parametrize(
    "annotations",
    [{}, {SEEN_AT: ""}, {SEEN_AT: "yesterday issued"}, {SEEN_AT: "2026-11-24T12:00:00 issued"}, {SEEN_AT: ["2026"]}],
)
def test_a_word_without_a_time_is_late(annotations: Mapping[str, object]) -> None:
    """Whatever somebody has written into the object."""
    assert late_words({"cp-2": word(annotations)}, Phase.NEW, NOW) == ["cp-2"]


def test_a_phase_that_has_begun_goes_on() -> None:
    """A large cluster takes longer than an hour; going back from it begins another phase."""
    words = {"cp-1": said(5 * LATELY, Phase.NEW), "cp-2": said(2 * LATELY)}
    assert late_words(words, Phase.NEW, NOW) == []
    assert late_words(words, Phase.OLD, NOW) == ["cp-1", "cp-2"]
