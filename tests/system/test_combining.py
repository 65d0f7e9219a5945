"""Several callers, one call; several jobs of one thread, one call."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from bridge.system.waiting import Combined, Steps, Together, in_step


def test_each_gets_its_own_result() -> None:
    """From many threads, in far fewer calls, none of them with more than the most."""
    calls: list[int] = []

    def together(items: Sequence[int]) -> list[int]:
        calls.append(len(items))
        time.sleep(0.002)
        return [item * 2 for item in items]

    combined = Combined(together, 8)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(combined, range(400))) == [2 * number for number in range(400)]
    assert sum(calls) == 400
    assert max(calls) <= 8
    assert len(calls) < 200


def test_a_single_caller_waits_for_no_other() -> None:
    """Without others it is a plain call, again and again."""
    combined: Combined[int, str] = Combined(lambda items: [str(item) for item in items], 8)
    assert [combined(number) for number in range(3)] == ["0", "1", "2"]


def test_an_error_reaches_all_callers_of_its_call_alone() -> None:
    """All callers of the failed call get the error; the callers of the next one get their results."""
    begun, go_on = threading.Event(), threading.Event()

    def together(items: Sequence[int]) -> list[int]:
        if 0 in items:
            begun.set()
            go_on.wait(180)
            raise ValueError("the disk is full")
        return list(items)

    combined = Combined(together, 8)
    with ThreadPoolExecutor(4) as pool:
        failing = pool.submit(combined, 0)
        begun.wait(180)
        others = [pool.submit(combined, number) for number in (1, 2, 3)]
        go_on.set()
        with pytest.raises(ValueError, match="disk is full"):
            failing.result(180)
        assert [one.result(180) for one in others] == [1, 2, 3]


def test_too_few_results_are_an_error() -> None:
    """No caller gets another's result in the place of a missing one."""
    none: Combined[int, int] = Combined(lambda _: [], 8)
    with pytest.raises(ValueError, match="shorter"):
        none(1)


def test_a_caller_with_several_items_gets_their_results() -> None:
    """From many threads with one to five items each, all in their order, beside others' in the same call."""
    combined: Combined[int, int] = Combined(lambda items: [2 * item for item in items], 8)
    wanted = [list(range(number, number + 1 + number % 5)) for number in range(200)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(combined.all, wanted))
    assert found == [[2 * item for item in items] for items in wanted]


# --- jobs in step -----------------------------------------------------------------------------------------------------


def test_what_jobs_ask_for_is_one_call_each_time() -> None:
    """Jobs with one, two and three questions need three calls; each ends when it is through, with its own answers."""
    calls: list[list[object]] = []

    def doubled(items: Sequence[int]) -> list[int]:
        calls.append(list(items))
        return [2 * item for item in items]

    found: dict[int, list[int]] = {number: [] for number in (1, 2, 3)}

    def job(count: int) -> Steps[None]:
        for number in range(count):
            found[count].append((yield Together(doubled, 10 * count + number)))

    assert list(in_step({count: job(count) for count in (1, 2, 3)})) == [(1, None), (2, None), (3, None)]
    assert calls == [[10, 20, 30], [21, 31], [32]]
    assert found == {1: [20], 2: [40, 42], 3: [60, 62, 64]}


def test_one_jobs_trouble_is_not_the_others() -> None:
    """An error as an answer is raised in its job alone, which may bear it; one of the call is raised in each of its jobs."""

    def one_bad(items: Sequence[str]) -> list[str | Exception]:
        return [OSError(item) if "bad" in item else item for item in items]

    def all_bad(items: Sequence[str]) -> list[str]:
        raise ValueError(f"{len(items)} items")

    def job(first: str, second: Callable[[Sequence[str]], Sequence[str | Exception]]) -> Steps[None]:
        try:
            yield Together(one_bad, first)
        except OSError:
            if first == "bad":
                raise
        yield Together(second, first)

    jobs = {"bad": job("bad", one_bad), "bad, borne": job("bad, borne", all_bad), "good": job("good", all_bad)}
    jobs["other"] = job("other", one_bad)
    ended = dict(in_step(jobs))
    assert {name: type(error) for name, error in ended.items()} == {
        "bad": OSError,
        "bad, borne": ValueError,
        "good": ValueError,
        "other": type(None),
    }
    assert str(ended["good"]) == "2 items"


def test_what_is_asked_for_first_waits_for_no_other_call() -> None:
    """A write does not wait for another job's CA; and an answer is kept for no longer than its job needs it."""
    calls: list[str] = []

    class Large:
        """An answer."""

    alive = weakref.WeakSet[Large]()

    def slow(items: Sequence[int]) -> list[Large]:
        calls.append("slow")
        found = [Large() for _ in items]
        alive.update(found)
        return found

    def write(items: Sequence[int]) -> Sequence[int]:
        calls.append("write")
        return items

    most: list[int] = []

    def job(number: int) -> Steps[None]:
        if number == 3:
            yield Together(slow, number)
            yield Together(write, number, first=True)
        large = yield Together(slow, number)
        most.append(len(alive))
        del large
        yield Together(slow, number)

    assert [error for _, error in in_step({number: job(number) for number in range(4)})] == [None] * 4
    assert calls[:3] == ["slow", "write", "slow"]
    assert most[:3] == [4, 3, 2]


def test_too_few_answers_are_an_error_of_their_jobs() -> None:
    """No job gets another's answer in the place of a missing one, and jobs with another question go on."""

    def job(call: Callable[[Sequence[int]], Sequence[int]]) -> Steps[None]:
        assert (yield Together(call, 1)) == 1

    ended = dict(in_step({"a": job(lambda _: []), "b": job(list)}))
    assert (type(ended["a"]), ended["b"]) == (ValueError, None)
