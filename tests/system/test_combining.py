"""Several callers, one call."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from bridge.system.waiting import Combined


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
