"""The loopback network: its ports, one of one's own, and HTTP servers for what the real servers do not give on demand."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

#: Below those that the kernel gives to connections and to listeners without a port of their own (ip_local_port_range).
_FIRST_PORT, _LAST_PORT, _BLOCK = 12288, 32767, 128
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET


def free_port(*, and_next: bool = False) -> int:
    """
    A port on which nothing listens, and that no other process of these tests gets meanwhile; if asked for, with the next.

    A port that the kernel names may be another's by the time at which the server binds it.
    """
    while True:
        port = next(_ports())
        if _is_free(port) and (not and_next or (next(_ports()) == port + 1 and _is_free(port + 1))):
            return port


@functools.cache
def _ports() -> Iterator[int]:
    """The ports of a block that is this process's until it ends: an abstract socket of the network says so."""
    for first in range(_FIRST_PORT, _LAST_PORT + 1, _BLOCK):
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f"\0tests of ca-bridge: port {first}")
        except OSError:
            mark.close()
        else:
            mark.detach()  # it stays open
            return itertools.cycle(range(first, first + _BLOCK))
    raise AssertionError("wanted a block of ports, found that other processes have all of them")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """
    As root, this thread and what it starts have a network of their own, with loopback alone.

    Processes here are of another node than those outside: neither side sees the other's in the process table.
    """
    if os.geteuid():
        yield
        return
    assert threading.current_thread() is threading.main_thread(), "the network of the main thread is the process's"
    _ports()  # a block that is taken in there may be another process's outside
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/self/ns/net").open() as before:
        assert libc.unshare(_NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield
        finally:
            assert libc.setns(before.fileno(), _NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())


class LoopbackServer(ThreadingHTTPServer):
    """Bears clients that go before the answer is whole, as a test of a time limit has them; ends as a process does."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*args, **more)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection."""
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget it."""
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """End the connections that clients keep, too."""
        super().server_close()
        for one in list(self._open):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(one, socket.SHUT_RDWR)  # below TLS

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Anything else is printed, as usual."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
