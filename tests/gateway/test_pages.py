"""The status pages: their numbers, and strangers who ask for them."""

from __future__ import annotations

import contextlib
import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import requests

from bridge.errors import BridgeError
from bridge.gateway import pages as status_pages
from bridge.gateway.pages import Metrics, serving
from bridge.settings import address_of
from bridge.system import waiting
from bridge.system.waiting import wait_until
from tests.kit.measured import traced

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


def test_numbers_are_in_prometheus_form() -> None:
    """Histogram buckets are cumulative, labels are quoted, and the newest end of a name counts."""
    metrics = Metrics(("s",))
    metrics.signed("s", 'a"b\nc', NOW, 0.2, NOW)
    metrics.signed("s", 'a"b\nc', NOW - timedelta(days=1), 20, NOW)
    text = metrics.text()
    assert 'requests_total{signer="s",outcome="signed"} 2' in text
    assert 'sign_seconds_bucket{signer="s",le="0.25"} 1' in text
    assert 'sign_seconds_bucket{signer="s",le="+Inf"} 2' in text
    assert f'name="a\\"b\\nc"}} {NOW.timestamp():.0f}' in text


def test_many_connections_use_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that holds more connections open than allowed keeps no probe out."""
    monkeypatch.setattr(status_pages._Handler, "timeout", 600)  # a silent one would be closed after a while, too
    pages = {"/healthz": lambda: (200, "ok\n")}
    with serving(("127.0.0.1", 0), pages) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=60).text == "ok\n"
        assert silent[0].recv(1) == b""  # closed
        silent[-1].settimeout(0.1)
        with pytest.raises(TimeoutError):
            silent[-1].recv(1)
        assert requests.get(f"http://127.0.0.1:{port}/else", timeout=60).status_code == 404
        for connection in silent:
            connection.close()
        with pytest.raises(BridgeError, match="can't listen"), serving(("127.0.0.1", port), pages):
            pass


def test_headers_of_megabytes_use_up_nothing() -> None:
    """Each of 16 connections could send a hundred lines of 64 KiB; of a request that is no longer than usual, each line is read."""
    many = b"GET /healthz HTTP/1.1\r\n" + b"X: %b\r\n" % (b"x" * 60_000) * 90 + b"\r\n"
    with serving(("127.0.0.1", 0), {"/healthz": lambda: (200, "ok\n")}) as port:
        with traced() as memory:
            address = ("127.0.0.1", port)
            with socket.create_connection(address, timeout=60) as connection, contextlib.suppress(ConnectionError):
                connection.sendall(many)
                connection.recv(1000)
            assert memory()[1] < 1 << 20
        assert requests.get(f"http://127.0.0.1:{port}/healthz", headers={"X": "x" * 4000}, timeout=60).text == "ok\n"


@pytest.mark.parametrize("listen", ["[::1]:0", "127.0.0.1:0", "localhost:0"])
def test_the_pages_are_at_each_address_that_the_settings_take(listen: str) -> None:
    """Also at one of IPv6, as far as this machine has it."""
    address, own = address_of(listen), Path("/proc/net/if_inet6")
    assert address is not None
    if ":" in address[0] and not (own.exists() and f"{1:032x} " in own.read_text()):
        with pytest.raises(BridgeError, match="Cannot assign requested address"), serving(address, {}):
            pass
        return
    with serving(address, {"/healthz": lambda: (200, "ok\n")}) as port:
        assert requests.get(f"http://{listen.removesuffix('0')}{port}/healthz", timeout=60).text == "ok\n"


def test_pages_that_strangers_ask_for_take_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that takes a while to write is written once for all who ask meanwhile, and again later."""
    asked: list[float] = []

    def slow() -> tuple[int, str]:
        asked.append(time.monotonic())
        time.sleep(0.1)
        return 200, f"{len(asked)}\n"

    def text(port: int) -> str:
        return requests.get(f"http://127.0.0.1:{port}/metrics", timeout=180).text

    with monkeypatch.context() as patch, serving(("127.0.0.1", 0), {"/metrics": slow}) as port:
        patch.setattr(waiting, "_CACHED_TIMES", 36_000)
        patch.setattr(waiting, "_LONGEST_CACHED_SECONDS", 3600.0)
        assert [text(port) for _ in range(5)] == ["1\n"] * 5
    with serving(("127.0.0.1", 0), {"/metrics": slow}) as port:
        assert text(port) == "2\n"
        limit = timedelta(minutes=3)
        assert wait_until(lambda: text(port), lambda found: found != "2\n", limit, pause_seconds=0.1) == "3\n"
    assert asked[2] - asked[1] >= 2
