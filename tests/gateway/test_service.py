"""How many threads one CA may hold."""

from __future__ import annotations

import pytest

from bridge.gateway.service import most_at_one_ca


@pytest.mark.parametrize(("threads", "cas", "most"), [(32, 1, 32), (32, 2, 31), (32, 4, 10), (2, 2, 1), (1, 2, 1)])
def test_the_threads_of_all_cas_but_one_leave_one_to_the_last(threads: int, cas: int, most: int) -> None:
    """However many of them hang; with a single CA, all threads are its own."""
    assert most_at_one_ca(threads, cas) == most
    assert threads < cas or most * (cas - 1) < threads
