"""Waiting: one look in any case, a last one when the time is over, and none after it was enough."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

import pytest

from bridge.system.waiting import CachedResult, Rate, wait_until, within


class Clock:
    """The machine's clock, which goes on only in a pause or a look."""

    def __init__(self, look_seconds: float = 0.0) -> None:
        self.now = 100.0
        self.pauses: list[float] = []
        self.looks: list[float] = []
        self._look_seconds = look_seconds

    def sleep(self, seconds: float) -> None:
        """As `time.sleep`."""
        self.pauses.append(seconds)
        self.now += seconds

    def look(self) -> int:
        """Count looks."""
        self.looks.append(self.now - 100.0)
        self.now += self._look_seconds
        return len(self.looks)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    return clock


def waited(clock: Clock, enough: int, limit: float) -> tuple[int, list[int]]:
    between: list[int] = []
    seen = wait_until(
        clock.look,
        lambda seen: seen >= enough,
        timedelta(seconds=limit),
        pause_seconds=2.0,
        between=between.append,
    )
    return seen, between


@pytest.mark.parametrize(
    ("enough", "limit", "looks"),
    [
        (1, 5, [0]),
        (1, 0, [0]),
        (9, 0, [0]),
        (3, 5, [0, 2, 4]),
        (9, 5, [0, 2, 4, 5]),
        (9, 4, [0, 2, 4]),
    ],
)
def test_looks_until_it_is_enough_or_the_time_is_over(
    clock: Clock, enough: int, limit: float, looks: list[float]
) -> None:
    """The last look's result is returned, and `between` gets each earlier one."""
    seen, between = waited(clock, enough, limit)
    assert clock.looks == looks
    assert seen == len(looks)
    assert between == [one for one in range(1, seen + 1) if one < enough]


def test_what_is_raised_ends_the_wait(clock: Clock) -> None:
    """An error of the look, or of `between`, ends the wait."""

    def fail(*_: object) -> int:
        raise KeyError

    with pytest.raises(KeyError):
        wait_until(fail, bool, timedelta(seconds=9), pause_seconds=1)
    with pytest.raises(KeyError):
        wait_until(clock.look, lambda _: False, timedelta(seconds=9), pause_seconds=1, between=fail)
    assert clock.pauses == []


def test_a_look_that_the_time_overtakes_is_followed_by_a_last_one(clock: Clock) -> None:
    """The machine may have stalled in it, and all is well by now; there is no pause after the time is over."""
    clock.__init__(look_seconds=7.0)  # type: ignore[misc]
    assert waited(clock, 9, 5) == (2, [1, 2])
    assert clock.looks == [0, 7]
    assert sum(clock.pauses) == 0


def test_what_strangers_ask_for_takes_a_twentieth_of_the_time(clock: Clock) -> None:
    """
    A look that took 0.125 seconds counts for 2.5; one that took a minute, as of a machine that stalls, for five seconds;
    one that takes no time is taken each time; one that failed counts for none.
    """
    for took, good in ((0.125, 2.5), (60.0, 5.0)):
        clock.__init__(look_seconds=took)  # type: ignore[misc]
        spared = CachedResult(clock.look)
        for pause, wanted in ((0, 1), (good / 2, 1), (good / 2, 2), (0, 2), (good, 3)):
            clock.now += pause
            assert spared() == wanted
    clock.__init__()  # type: ignore[misc]
    spared = CachedResult(clock.look)
    assert [spared() for _ in range(3)] == [1, 2, 3]
    answers = iter([1])
    failing = CachedResult(lambda: next(answers))
    assert failing() == 1
    with pytest.raises(StopIteration):
        failing()


def test_a_connection_that_comes_too_late_is_closed() -> None:
    """Its caller has given it up, so that no other code would close it."""
    ours, theirs = socket.socketpair()
    is_late = threading.Event()

    def slow() -> socket.socket:
        is_late.wait(180)
        return ours

    with theirs, pytest.raises(TimeoutError):
        within(0.05, slow)
    is_late.set()
    assert wait_until(ours.fileno, lambda number: number == -1, timedelta(minutes=3), pause_seconds=0.05) == -1


def test_an_error_that_comes_too_late_is_dropped() -> None:
    """The caller gets the time limit's error; an error that comes in time reaches it unchanged."""

    def fails() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        within(180, fails)


# --- by themselves -------------------------------------------------------------------------------------------------------


def test_a_bucket_fills_with_time() -> None:
    """A requester may send so many at once, then one after the other, each at its own time; another requester has its own bucket."""
    rate = Rate(60)
    assert {rate.reserve("w1", 0.0) for _ in range(60)} == {0}
    assert [rate.reserve("w1", 0.0) for _ in range(3)] == [pytest.approx(seconds) for seconds in (1, 2, 3)]
    assert rate.reserve("w2", 0.0) == 0
    assert rate.reserve("w1", 3.5) == pytest.approx(0.5)
    assert rate.reserve("w1", 10_000) == 0


def test_a_line_before_a_bucket_has_an_end() -> None:
    """A flood does not wait in it for hours, with an honest request of the same name behind it."""
    rate = Rate(60)
    waits = [rate.reserve("token", 0.0) for _ in range(1000)]
    assert [wait for wait in waits if wait is not None][-1] == pytest.approx(60)
    assert waits[-1] is None
    assert rate.reserve("token", 1.0) == pytest.approx(60)


def test_names_of_others_choice_fill_no_memory() -> None:
    """The one that has not asked for longest is forgotten."""
    rate = Rate(1)
    for number in range(20_000):
        rate.reserve(f"user-{number}", 0.0)
    assert rate.reserve("user-19999", 0.0) != 0
    assert rate.reserve("user-0", 0.0) == 0
