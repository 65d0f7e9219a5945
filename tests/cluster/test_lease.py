"""The thread that renews a lease."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest

from bridge.cluster.api import NoAnswerError
from bridge.cluster.lease import Keeper


@pytest.mark.attack("G12")
def test_no_error_ends_the_thread_of_the_lease() -> None:
    """An error that no code has foreseen is logged, and the lease is renewed again."""
    errors = iter([OverflowError(), NoAnswerError("away"), None])
    renewed = threading.Event()

    def renew() -> None:
        if (error := next(errors)) is not None:
            raise error
        renewed.set()
        time.sleep(1)

    keeper = Keeper(SimpleNamespace(), timedelta(seconds=0.05), renew)
    keeper.start()
    assert renewed.wait(180)
    keeper.stop()
