"""Each client of HTTP, in front of a server that sends what it likes: an error of ours, in time, and in little memory."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

Talk = Callable[[socket.socket], None]

#: The clients, each of which calls `ask` with the URL of the server; its own limit of time is LIMIT, in seconds.
CLIENTS = {
    "component": """
from bridge import cluster
cluster.TIMEOUT_SECONDS = LIMIT
def ask(url):
    return cluster.ANONYMOUS.ask(cluster.Server(url), "/healthz").status
""",
    "node": """
from bridge import cluster
from bridge.cluster import api
api.NODE_TIMEOUT_SECONDS = LIMIT
def ask(url):
    return api.Api([cluster.ANONYMOUS], [cluster.Server(url)]).ask("GET", "/api").status
""",
    "door": """
from bridge import cluster
from bridge.cluster import api
api.TIMEOUT_SECONDS = LIMIT
def ask(url):
    made = api.Api([cluster.ANONYMOUS], [cluster.Server(url)], again=lambda: None)
    return made.ask("GET", "/api").status
""",
    "watch": """
from bridge import cluster
from bridge.cluster import api
api.TIMEOUT_SECONDS = LIMIT
def ask(url):
    made = api.Api([cluster.ANONYMOUS], [cluster.Server(url)], again=lambda: None)
    with made.lines("/api?watch=1", LIMIT, 1000) as lines:
        for line in lines:
            pass
    return 200
""",
    "vault": """
from backends.vault.settings import VaultSettings
from backends.vault.server import Server
from datetime import timedelta
def ask(url):
    return Server(VaultSettings(url=url, timeout=timedelta(seconds=LIMIT))).send("get", "sys/health").or_raise().status
""",
    "vault's login": """
from backends.vault.settings import VaultSettings
from backends.vault.server import Server
from datetime import timedelta
from hvac.api.auth_methods import Userpass
def ask(url):
    server = Server(VaultSettings(url=url, timeout=timedelta(seconds=LIMIT)))
    return Userpass(server).login("u", "p", use_token=False).or_raise().status
""",
    "others": """
from backends.http import Http, Wording
from datetime import timedelta
def ask(url):
    made = Http(Wording(name="est", not_ours="", tls=str), url, timedelta(seconds=LIMIT), lambda: None)
    return made.request("POST", url, json={}).status
""",
}
#: Says how it ended, how many seconds it took, and by how many MB the process has grown beyond what it needs anyway.
PROGRAM = r"""
import re, sys, time
from bridge.errors import BridgeError
def peak():  # getrusage counts the memory of the process that started this one, too
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) / 1024
before, begin = peak(), time.monotonic()
try:
    found = ask(sys.argv[1])
except BridgeError as e:
    found = type(e).__name__
print(found, time.monotonic() - begin, peak() - before)
"""

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
PIECE = b"x" * (1 << 20)


def minus_one(opened: socket.socket) -> None:
    """A chunk whose length is no limit, and 150 MB."""
    opened.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n")
    for _ in range(150):
        opened.sendall(PIECE)


def dripping_head(opened: socket.socket) -> None:
    """A header that never ends, a byte at a time."""
    opened.sendall(OK + b"X: ")
    for _ in range(12_000):
        opened.sendall(b"x")
        time.sleep(0.05)


def flood_of_100(opened: socket.socket) -> None:
    """`100 Continue`, again and again."""
    for _ in range(2000):
        opened.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


def drip_of_100(opened: socket.socket) -> None:
    """The same, slowly."""
    for _ in range(12_000):
        opened.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.05)


def trailers(opened: socket.socket) -> None:
    """An answer that is whole, but for what comes after its last chunk."""
    opened.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
    for _ in range(30_000):
        opened.sendall(b"X: " + b"x" * 60_000 + b"\r\n")
        time.sleep(0.02)


def honest(opened: socket.socket) -> None:
    """`100 Continue` once, then an answer of almost the size that all take."""
    body = b'{"a": "' + b"x" * 1_000_000 + b'"}\n'
    opened.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Transfer-Encoding: chunked\r\n\r\n")
    for begin in range(0, len(body), 4096):
        piece = body[begin : begin + 4096]
        opened.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
    opened.sendall(b"0\r\nX: y\r\n\r\n")


@contextmanager
def server(talk: Talk) -> Iterator[str]:
    """Takes a request on each connection; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def one(opened: socket.socket) -> None:
            with opened, suppress(OSError):
                opened.recv(1 << 16)
                talk(opened)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=one, args=[listener.accept()[0]], daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def asked(client: str, talk: Talk, limit: int = 1) -> tuple[str, float, float]:
    """How it ended, seconds, and MB."""
    with server(talk) as url:
        command = [sys.executable, "-P", "-c", f"LIMIT = {limit}\n{CLIENTS[client]}{PROGRAM}", url]
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=700)
    found, seconds, growth = run.stdout.split()
    return found, float(seconds), float(growth)


HEADS, BODIES = [dripping_head, flood_of_100, drip_of_100], [minus_one, trailers]


@pytest.mark.attack("G5", "G17")
@pytest.mark.parametrize(
    ("client", "talk"),
    # a watch has a limit for each of its lines, and none for all; see below
    [(client, talk) for client in CLIENTS for talk in [*HEADS, *([] if client == "watch" else BODIES)]],
)
def test_a_hostile_answer_costs_little(client: str, talk: Talk) -> None:
    """The received bytes are counted below the parser, and one limit of time holds for a head; the limits are 1 and 4 MB."""
    found, seconds, growth = asked(client, talk)
    assert found.endswith("Error")
    assert seconds < 300  # of a second, on a busy machine; each talks for ten minutes
    assert growth < 40


@pytest.mark.attack("G5")
def test_a_watch_holds_no_more_than_a_line() -> None:
    """The limit counts for any length that a chunk announces."""
    _, _, growth = asked("watch", minus_one)
    assert growth < 40


@pytest.mark.parametrize("client", CLIENTS)
def test_an_honest_answer_is_read(client: str) -> None:
    """A large answer in many chunks, with `100 Continue` before and a trailer behind, is read."""
    assert asked(client, honest, 180)[0] == "200"
