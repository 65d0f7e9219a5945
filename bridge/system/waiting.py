"""Looking again and again until something has happened, or the time for it is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    look: Callable[[], T],
    is_enough: Callable[[T], bool],
    limit: timedelta,
    *,
    pause_seconds: float,
    between: Callable[[T], object] = lambda _: None,
) -> T:
    """
    Look until what is seen is enough or the time is over; one look is made in any case, and one when it is over.

    Args:
        look: Its time counts, too, but is not cut short.
        is_enough: Ends the wait.
        limit: By the machine's monotonic clock, which nobody sets.
        pause_seconds: Between two looks.
        between: Is given each look that was not enough, before the pause; what it raises ends the wait.

    Returns:
        The last look, enough or not.
    """
    end = time.monotonic() + limit.total_seconds()
    while not is_enough(seen := look()):
        between(seen)
        left = end - time.monotonic()
        if left <= 0:
            break
        time.sleep(min(left, pause_seconds))
    return seen
