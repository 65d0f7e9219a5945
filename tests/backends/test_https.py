"""What clients of HTTPS servers share."""

from __future__ import annotations

import socket
import time
from datetime import timedelta

import pytest

from backends import http
from bridge.system.waiting import wait_until


def test_a_connection_that_comes_too_late_is_closed() -> None:
    """Nobody else would: whoever asked for it has given it up."""
    ours, theirs = socket.socketpair()

    def slow() -> socket.socket:
        time.sleep(0.3)
        return ours

    with theirs, pytest.raises(TimeoutError):
        http.within(0.05, slow)
    assert wait_until(ours.fileno, lambda number: number == -1, timedelta(seconds=20), pause_seconds=0.05) == -1


def test_an_error_that_comes_too_late_is_nobodys() -> None:
    """The time limit is what is told; one that comes in time is told itself."""

    def fails() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        http.within(20, fails)
