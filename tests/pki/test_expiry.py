"""When a certificate ends, in kubeadm's words, and when it is due."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from bridge.pki.expiry import Before, is_due, residual, seconds_left
from tests.kit.issuing import NOW, Signer

YEAR = timedelta(days=365)
SECOND = timedelta(seconds=1)
MONTH = Before(remaining=timedelta(days=30))
THIRD = Before(share=0.33)

# Every row was seen in the output of kubeadm 1.37.2.
MEASURED = {
    -86400: "<invalid>",
    -3: "<invalid>",
    -2: "<invalid>",
    -1: "0s",
    0: "0s",
    58: "58s",
    119: "119s",
    121: "2m1s",
    599: "9m59s",
    601: "10m",
    10799: "179m",
    10804: "3h",
    28799: "7h59m",
    28804: "8h",
    36000: "10h",
    172799: "47h",
    172805: "2d",
    345600: "4d",
    691198: "7d23h",
    691205: "8d",
    34559999: "399d",
    63071999: "729d",
    63072004: "2y",
    126144000: "4y",
    252287998: "7y364d",
    252288005: "8y",
    315359999: "9y",
}


@pytest.mark.parametrize(("seconds", "text"), MEASURED.items())
def test_residual_time_is_in_the_words_of_kubeadm(seconds: int, text: str) -> None:
    """Each form of Go's HumanDuration, at its edges."""
    assert residual(seconds) == text


@given(st.integers(-(10**6), 10**9))
def test_residual_time_never_says_more_than_is_left(seconds: int) -> None:
    """It is cut, not rounded, and by less than a tenth from two minutes up."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "y": 365 * 86400}
    text = residual(seconds)
    if text == "<invalid>":
        assert seconds < -1
        return
    said, number = 0, ""
    for character in text:
        number = number + character if character.isdigit() else number
        if not character.isdigit():
            said, number = said + int(number) * units[character], ""
    assert said <= max(seconds, 0) < said + max(2, said // 8)


@pytest.mark.parametrize(
    ("microseconds", "seconds"), [(0, 0), (999_999, 0), (1_000_000, 1), (-1, 0), (-1_999_999, -1), (-2_000_000, -2)]
)
def test_seconds_are_cut_toward_zero(microseconds: int, seconds: int) -> None:
    """As Go divides durations, and not down as Python divides integers."""
    assert seconds_left(NOW + timedelta(microseconds=microseconds), NOW) == seconds


def certificate(*, begin: timedelta, end: timedelta) -> x509.Certificate:
    """One that is valid between these times from now."""
    return Signer.make(begin=NOW + begin, end=NOW + end).certificate


@pytest.mark.parametrize(
    ("begin", "end", "before", "due"),
    [
        pytest.param(-YEAR, timedelta(days=30), MONTH, False, id="30 days are not less than 30 days"),
        pytest.param(-YEAR, timedelta(days=30) - SECOND, MONTH, True, id="a second less is"),
        pytest.param(-YEAR, -SECOND, MONTH, True, id="expired"),
        pytest.param(-YEAR, -SECOND, Before(remaining=timedelta()), True, id="expired, however late it is wanted"),
        pytest.param(timedelta(days=1), YEAR, MONTH, False, id="not valid yet, and far from its end"),
        pytest.param(-timedelta(days=67), timedelta(days=33), THIRD, False, id="33 % of 100 days are left"),
        pytest.param(-timedelta(days=67) - SECOND, timedelta(days=33) - SECOND, THIRD, True, id="a second less is due"),
        pytest.param(-9 * YEAR, timedelta(days=121), THIRD, False, id="a share of what is asked for, not of ten years"),
        pytest.param(-9 * YEAR, timedelta(days=120), THIRD, True, id="a third of a year is 120.45 days"),
    ],
)
def test_due(begin: timedelta, end: timedelta, before: Before, *, due: bool) -> None:
    """A certificate is due when less is left than a time or a share of its lifetime, or when it has expired."""
    assert is_due([certificate(begin=begin, end=end)], before, YEAR, NOW) is due


@pytest.mark.parametrize(("end", "due"), [(29, True), (31, False)])
def test_an_intermediate_that_ends_takes_its_leaf_with_it(end: int, *, due: bool) -> None:
    """The leaf's own 300 days do not count."""
    leaf = certificate(begin=-YEAR, end=timedelta(days=300))
    above = certificate(begin=-YEAR, end=timedelta(days=end))
    assert is_due([leaf, above], MONTH, YEAR, NOW) is due


@pytest.mark.parametrize(
    ("setting", "before"),
    [
        ("30d", MONTH),
        ("12h", Before(remaining=timedelta(hours=12))),
        ("33%", THIRD),
        ("1%", Before(share=0.01)),
        ("99%", Before(share=0.99)),
    ],
)
def test_setting(setting: str, before: Before) -> None:
    """The setting is a duration or a share."""
    assert Before.from_setting(setting) == before


@pytest.mark.parametrize("setting", ["", "%", "0%", "100%", "-1%", "1.5%", "33 %", "30", "d", "٣%", 30, None, True])
def test_what_is_no_setting(setting: object) -> None:
    """Anything else is refused, with words that say what was wanted."""
    assert Before.from_setting("33%") == THIRD
    with pytest.raises(ValueError, match="a duration such as"):
        Before.from_setting(setting)
