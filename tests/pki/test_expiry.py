"""When a certificate ends, in kubeadm's words, and when it is due."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from bridge.pki.expiry import (
    CLOCK_SKEW,
    Before,
    due_from,
    duration_text,
    is_due,
    is_early,
    is_rotation_late,
    left_text,
    minute,
    parse_duration,
    residual,
    rfc3339,
    seconds_left,
)
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
    """Seconds are divided as Go divides durations, and not down as Python divides integers."""
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
        pytest.param(
            -9 * YEAR, timedelta(days=121), THIRD, False, id="a share of the requested validity, not of ten years"
        ),
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


def test_a_setting_is_refused_in_the_words_of_what_it_may_be() -> None:
    """A duration, or a share; a share of nothing is named as one."""
    wanted = 'a duration such as "30d", or a share of the lifetime such as "33%"'
    for setting, reads in ((30, wanted), ("x", wanted), ("0%", f"{wanted}, from 1% to 99%")):
        with pytest.raises(ValueError, match=f"^{re.escape(reads)}$"):
            Before.from_setting(setting)
    assert [str(Before.from_setting(setting)) for setting in ("30d", "36h", "5%", "99%")] == ["30d", "36h", "5%", "99%"]


DURATIONS = {
    "1s": SECOND,
    "90m": timedelta(minutes=90),
    "1h30m": timedelta(minutes=90),
    "2d": timedelta(days=2),
    "2w": timedelta(days=14),
    "1w1d1h1m1s": timedelta(days=8, hours=1, minutes=1, seconds=1),
    "36500d": timedelta(days=36500),
}


@pytest.mark.parametrize("text", DURATIONS)
def test_durations_are_read(text: str) -> None:
    """A duration is read in each unit, and in several together."""
    assert parse_duration(text) == DURATIONS[text]


@pytest.mark.parametrize("value", ["", "d", "5", "1 d", "1D", "-1d", "1.5h", "1d ", "1" * 13 + "s", 5, None])
def test_what_is_no_duration(value: object) -> None:
    """The words say what one looks like."""
    with pytest.raises(ValueError, match=r'^a duration such as "30d", "12h" or "30s"$'):
        parse_duration(value)


@pytest.mark.parametrize("value", ["0s", "0d0h", "36501d", "36500d1s", "9" * 12 + "w"])
def test_a_duration_is_more_than_nothing_and_at_most_100_years(value: str) -> None:
    """A number that is too large for any type is refused, too."""
    reads = 'a duration such as "30d", "12h" or "30s", more than nothing and at most 100 years'
    with pytest.raises(ValueError, match=f"^{reads}$"):
        parse_duration(value)


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (timedelta(days=14), "14d"),
        (timedelta(hours=36), "36h"),
        (timedelta(minutes=90), "90m"),
        (timedelta(seconds=61), "61s"),
        (timedelta(), "0s"),
        (timedelta(milliseconds=1500), "1.5s"),
    ],
)
def test_a_duration_is_shown_in_the_largest_unit_that_fits(duration: timedelta, text: str) -> None:
    """Durations are shown in days rather than weeks."""
    assert duration_text(duration) == text


@pytest.mark.parametrize(
    ("left", "text"),
    [
        (timedelta(days=364), "364d left"),
        (SECOND, "1s left"),
        (timedelta(microseconds=1), "0s left"),
        (timedelta(), "expired 0s ago"),
        (-SECOND, "expired 1s ago"),
        (-timedelta(hours=5), "expired 5h ago"),
        (-timedelta(days=2) + SECOND, "expired 47h ago"),
        (-timedelta(days=2), "expired 2 days ago"),
        (-timedelta(days=400), "expired 400 days ago"),
    ],
)
def test_what_is_left_for_people(left: timedelta, text: str) -> None:
    """For an expired certificate it says how long ago that was."""
    assert left_text(NOW + left, NOW) == text


def test_times_are_in_utc() -> None:
    """Times are in UTC in JSON and for people."""
    time = datetime(2027, 11, 25, 0, 39, 32, 999999, tzinfo=timezone(timedelta(hours=1)))
    assert rfc3339(time) == "2027-11-24T23:39:32Z"
    assert minute(datetime(2027, 11, 24, 23, 39, 59, tzinfo=UTC)) == "2027-11-24 23:39 UTC"


def test_a_beginning_in_the_future_is_a_wrong_clock() -> None:
    """A leaf or issuer that begins more than a minute ahead shows a wrong clock."""
    now, edge, ahead = (certificate(begin=begin, end=YEAR) for begin in (-YEAR, CLOCK_SKEW, CLOCK_SKEW + SECOND))
    assert [is_early(chain, NOW) for chain in ([now], [edge], [ahead], [now, ahead])] == [False, False, True, True]


def test_a_kubelet_that_rotates_is_late_in_the_last_tenth() -> None:
    """It asks by itself before; the lifetime counts from the leaf's beginning to the first end of its chain."""
    hundred = timedelta(days=100)
    for left, is_late in ((timedelta(days=10), False), (timedelta(days=10) - SECOND, True)):
        leaf = certificate(begin=left - hundred, end=left)
        assert is_rotation_late([leaf], NOW) is is_late
        longer = certificate(begin=left - hundred, end=YEAR)
        above = certificate(begin=-YEAR, end=left)
        assert is_rotation_late([longer, above], NOW) is is_late


def test_from_when_on_it_is_due() -> None:
    """A time or a share of the requested lifetime decides; a kubelet that rotates is not due before the last tenth."""
    chain = [certificate(begin=-timedelta(days=50), end=timedelta(days=50))]
    end = NOW + timedelta(days=50)
    for before, validity, rotates, left in (
        (MONTH, YEAR, False, 30),
        (MONTH, YEAR, True, 10),
        (Before(remaining=timedelta(days=5)), YEAR, True, 5),
        (Before(share=0.5), YEAR, False, 50),
        (Before(share=0.5), timedelta(days=40), False, 20),
    ):
        assert due_from(chain, before, validity, rotates=rotates) == end - timedelta(days=left)
