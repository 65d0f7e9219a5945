"""HTTP: what is read as an answer, what is a refusal and what silence; within its time and size, with keys in memory."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st
from urllib3.connectionpool import HTTPConnectionPool

from backends.settings import tls_context
from bridge import cluster
from bridge.cluster import ANONYMOUS, Client
from bridge.errors import SettingsError
from bridge.node import sample_pki
from bridge.node.endpoints import Address, Server
from bridge.pki.certificates import load_pem_certificates
from bridge.system import http
from bridge.system.http import Answer, Exchange, begin, pool
from bridge.system.tls import (
    BrokenOffError,
    ClientRefusedError,
    LateError,
    Peer,
    TooLongError,
    UnreachableError,
    UntrustedError,
    context,
)
from tests.kit import cfssl
from tests.kit.forged import validity, with_field
from tests.kit.loopback import LoopbackServer

Talk = Callable[[socket.socket, bytes], None]

# --- one connection, however it is used -------------------------------------------------------------------------------


class Made:
    """A server on loopback, and our connections to it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.pool = pool(Peer(host="127.0.0.1", port=port))
        self.accepted = 0  #: How many connections were made.


@contextmanager
def server(*talks: Talk) -> Iterator[Made]:
    """One that takes a request on each connection, as many as there are talks."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = Made(listener.getsockname()[1])

        def serve() -> None:
            for talk in talks:
                opened, _ = listener.accept()
                made.accepted += 1
                with opened, suppress(OSError):
                    talk(opened, opened.recv(1 << 16))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield made
        made.pool.close()
        thread.join(180)


def says(*pieces: bytes) -> Talk:
    """Send these, and end the connection."""

    def talk(opened: socket.socket, _: bytes) -> None:
        for piece in pieces:
            opened.sendall(piece)
            time.sleep(0.001)

    return talk


def ask(made: Made | HTTPConnectionPool, *, seconds: float = 180, longest: int = 1000) -> Answer:
    """One request."""
    connections = made.pool if isinstance(made, Made) else made
    return http.ask(connections, "GET", "/x", {"Accept": "*/*"}, seconds=seconds, longest=longest)


WHOLE = {
    "a length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: a\r\n\r\nhello",
    "chunks": b"HTTP/1.1 200 OK\r\nX: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nT: x\r\n\r\n",
    "till the end": b"HTTP/1.1 200 OK\r\nX: a\r\n\r\nhello",
    "after 100": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 \r\nX: a\r\nContent-Length: 5\r\n\r\nhello",
    "after 100 twice": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 100 \r\nX: b\r\nContent-Length: 9\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nX: a\r\nContent-Length: 5\r\n\r\nhello",
    "version 1.0": b"HTTP/1.0 200 OK\r\nX: a\r\n\r\nhello",
    "one length twice": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\ncontent-length:5 \r\nX:\ta\r\n\r\nhello",
}


@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE)
def test_reads_a_whole_answer_however_it_is_cut(text: bytes) -> None:
    """With a length, in chunks or until the end; in one piece or a byte at a time."""
    for pieces in ([text], [text[n : n + 1] for n in range(len(text))]):
        with server(says(*pieces)) as made:
            found = ask(made)
            assert (found.status, found.headers["x"], found.body) == (200, "a", b"hello")


BROKEN = {
    "no HTTP": b"SSH-2.0-OpenSSH\r\n\r\n",
    "an upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "another interim answer": b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "interim answers without end": b"HTTP/1.1 100 Continue\r\n\r\n" * 3000,
    "no status": b"HTTP/1.1 abc OK\r\n\r\n",
    "another version": b"HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n",
    "gzip": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a chunk of another size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello",
    "half of the chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "nothing": b"",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 4\r\n\r\nhello",
    "a length below zero": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
    "a line of the head that goes on": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 5\r\n\r\nhello",
    "a line of the head without a colon": b"HTTP/1.1 200 OK\r\nX\r\nContent-Length: 5\r\n\r\nhello",
    "a space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\nhello",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n",
    "a head without end": b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * 70_000,
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_what_is_no_whole_answer_is_none(text: bytes) -> None:
    """It ends the connection, and the next request makes another one."""
    with server(says(text), says(WHOLE["a length"])) as made:
        with pytest.raises((UnreachableError, TooLongError)):
            ask(made)
        assert ask(made).body == b"hello"
        assert made.accepted == 2


def test_an_odd_line_of_a_head_is_named() -> None:
    """An administrator reads which line it is, and not only that there is one."""
    text = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nlog in first\r\nX: a\r\n\r\nhello"
    with server(says(text)) as made, pytest.raises(UnreachableError, match=r"log in first.* in the head"):
        ask(made)


def test_a_body_that_breaks_off_leaves_its_status() -> None:
    """The status of an error says enough."""
    with server(says(b"HTTP/1.1 403 No\r\nContent-Length: 9\r\n\r\n{")) as made:
        with pytest.raises(BrokenOffError) as e:
            ask(made)
        assert e.value.status == 403


@pytest.mark.parametrize("head", [b"Content-Length: 2000", b"Transfer-Encoding: chunked", b"X: y"])
def test_an_answer_has_its_limit(head: bytes) -> None:
    """The limit counts for each way to announce a length."""
    body = b"7D0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n" if b"chunked" in head else b"x" * 2000
    text = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + body
    with server(says(text)) as made, pytest.raises(TooLongError):
        ask(made)


def test_one_limit_of_time_is_for_all_of_it() -> None:
    """An answer that drips is given up in time, and a silent one."""

    def drips(opened: socket.socket, asked: bytes) -> None:
        del asked
        opened.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(999):
            opened.sendall(b" ")
            time.sleep(0.6)  # ten minutes, or until the client hangs up

    for talk in (drips, lambda opened, _: opened.recv(1)):
        with server(talk) as made:
            begin = time.monotonic()
            with pytest.raises(LateError):
                ask(made, seconds=0.2)
            assert time.monotonic() - begin < 300


def test_a_connection_is_kept_and_nothing_is_left_on_it() -> None:
    """Two requests go over one; where more came than was asked for, or it has ended, the next goes over another one."""
    whole, read, sent = WHOLE["a length"], threading.Event(), threading.Event()

    def twice(opened: socket.socket, _: bytes) -> None:
        opened.sendall(whole)
        assert opened.recv(1000).startswith(b"GET /x HTTP/1.1\r\nHost: 127.0.0.1")
        opened.sendall(whole + b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nplanted")
        opened.recv(1000)

    def late(opened: socket.socket, _: bytes) -> None:
        opened.sendall(whole)
        assert read.wait(180)
        opened.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nplanted")
        sent.set()
        opened.recv(1000)

    with server(twice, late, says(whole)) as made:
        assert (ask(made).body, made.accepted) == (b"hello", 1)
        assert (ask(made).body, made.accepted) == (b"hello", 1)
        assert (ask(made).body, made.accepted) == (b"hello", 2)
        read.set()
        assert sent.wait(180)
        assert (ask(made).body, made.accepted) == (b"hello", 3)


@pytest.mark.parametrize("says_so", [True, False])
@pytest.mark.parametrize("is_backend", [False, True])
def test_an_answer_over_tls_ends_when_tls_says_so(tmp_path: Path, says_so: bool, is_backend: bool) -> None:
    """An answer without a length is whole if a close_notify ends it; without, an attacker may have cut it short."""
    files = cfssl.make_tls(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(files.server_cert, files.server_key)

    def serve(listener: socket.socket) -> None:
        with suppress(OSError), tls.wrap_socket(listener.accept()[0], server_side=True) as opened:
            opened.recv(1 << 16)
            opened.sendall(WHOLE["till the end"])
            if says_so:
                opened.unwrap()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=[listener], daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        trusting = tls_context(files.ca, None, None) if is_backend else context(files.ca.read_bytes(), None, None)
        connections = pool(Peer(host="127.0.0.1", port=port, tls=lambda: trusting))
        if says_so:
            assert ask(connections).body == b"hello"
        else:
            with pytest.raises(BrokenOffError):
                ask(connections)
        thread.join(180)


@pytest.mark.parametrize("odd", range(3))
def test_no_fifo_is_taken_for_a_certificate_or_key(tmp_path: Path, odd: int) -> None:
    """OpenSSL would wait for a writer for ever; the setting and the FIFO are named instead."""
    files = cfssl.make_tls(tmp_path)
    good = [files.ca, files.server_cert, files.server_key]
    tls_context(*good)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SettingsError, match=r"fifo.*: a FIFO, not a regular file"):
        tls_context(*(tmp_path / "fifo" if place == odd else path for place, path in enumerate(good)))


def test_a_reset_connection_is_explained_by_the_alert_that_it_swallowed(tmp_path: Path) -> None:
    """Listening once more, without a request, hears that the server wants a client certificate; its word is the cause."""
    files = cfssl.make_tls(tmp_path)
    lenient, strict = (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for _ in range(2))
    for one in (lenient, strict):
        one.load_cert_chain(files.server_cert, files.server_key)
    strict.load_verify_locations(files.ca)
    strict.verify_mode = ssl.CERT_REQUIRED

    def serve(listener: socket.socket) -> None:
        with suppress(OSError), lenient.wrap_socket(listener.accept()[0], server_side=True) as opened:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        with suppress(OSError), strict.wrap_socket(listener.accept()[0], server_side=True):
            pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=[listener], daemon=True)
        thread.start()
        trusting = context(files.ca.read_bytes(), None, None)
        port = listener.getsockname()[1]
        peer = Peer(host="127.0.0.1", port=port, tls=lambda: trusting, alert_seconds=180)
        with pytest.raises(ClientRefusedError) as e:
            ask(pool(peer))
        thread.join(180)
    assert isinstance(e.value.__cause__, ssl.SSLError)
    assert "CERTIFICATE_REQUIRED" in str(e.value.__cause__)


def test_requests_that_are_cut_off_together_listen_for_one_alert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pki: Path
) -> None:
    """Each would wait as long; a later one listens anew. A client of the cluster comes to a server as the same peer."""
    files, connect, made = cfssl.make_tls(tmp_path), Peer.connected, list[Peer]()
    begun = threading.Barrier(1)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(files.server_cert, files.server_key)
    trusting = context(files.ca.read_bytes(), None, None)

    def serve(listener: socket.socket) -> None:
        while True:
            with suppress(OSError), tls.wrap_socket(listener.accept()[0], server_side=True) as opened:
                if opened.recv(1 << 16) == b"end":
                    return
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset

    def counted(peer: Peer, seconds: float) -> socket.socket:
        made.append(peer)
        if seconds > 1:  # a request, and none listens for an alert before all have begun
            begun.wait(180)
        return connect(peer, seconds)

    monkeypatch.setattr(Peer, "connected", counted)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=[listener], daemon=True)
        thread.start()
        peer = Peer(host="127.0.0.1", port=listener.getsockname()[1], tls=lambda: trusting, alert_seconds=0.2)
        for requests, connections in ((3, 4), (1, 6)):
            begun = threading.Barrier(requests)
            with ThreadPoolExecutor(requests) as threads:
                for asked in [threads.submit(ask, pool(peer)) for _ in range(requests)]:
                    with pytest.raises(UnreachableError):
                        asked.result()
            assert len(made) == connections
        with connect(peer, 180) as opened:
            opened.sendall(b"end")
            thread.join(180)
    server = Server("https://127.0.0.1:1")
    one = client(pki)
    assert one.peer(server) is one.peer(server)


def test_a_connection_that_is_reset_before_the_handshake_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own class leaves it open until it is forgotten, and warns then, in whatever test runs by that time."""
    connect = socket.create_connection
    with socket.create_server(("127.0.0.1", 0)) as listener, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")

        def connect_and_be_reset(*where: Any) -> socket.socket:
            opened = connect(*where)
            with listener.accept()[0] as there:
                there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            assert select.select([opened], [], [], 180)[0]
            return opened

        monkeypatch.setattr(socket, "create_connection", connect_and_be_reset)
        tls = context(None, None, None)
        tls.sslsocket_class = ssl.SSLSocket  # tests/conftest.py has ours in each context
        with pytest.raises(UnreachableError, match="reset"):
            ask(pool(Peer(host="127.0.0.1", port=listener.getsockname()[1], tls=lambda: tls)))
        gc.collect()
    assert warned == []


@pytest.mark.parametrize("target", ["/a b", "/a\r\nX: y", "/ä", "/\x00"])
def test_a_target_is_one_word(target: str) -> None:
    """Nothing in it makes another header, or another request."""
    with pytest.raises(ValueError, match="quoted"):
        http.ask(pool(Peer(host="127.0.0.1", port=1)), "GET", target, {}, seconds=1)


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\nb", "\x00"])
def test_a_header_is_one_line(value: str) -> None:
    """Nothing in it makes another one."""
    with pytest.raises(ValueError, match="one line"):
        http.ask(pool(Peer(host="127.0.0.1", port=1)), "GET", "/", {"X": value}, seconds=1)


@given(st.binary(max_size=300))
def test_whatever_comes_is_an_answer_or_an_error_of_ours(text: bytes) -> None:
    """No garbage of a server's leads to another error."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(b"HTTP/1.1 200 OK\r\n" + text)
        theirs.shutdown(socket.SHUT_WR)
        with mock.patch.object(Peer, "connected", return_value=ours), suppress(UnreachableError, TooLongError):
            assert ask(pool(Peer(host="h", port=1))).status == 200
        ours.close()


# --- TLS, and clients of components -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no limit of time is given: a stalled machine takes longer than a component may."""
    monkeypatch.setattr(cluster, "TIMEOUT_SECONDS", 180)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control plane's files, whose API server is on loopback."""
    directory = tmp_path_factory.mktemp("kubernetes")
    now = datetime.now(UTC)
    cluster = sample_pki.Cluster(address="127.0.0.1", endpoint="api.example.com:6443")
    sample_pki.make(directory, now=now, not_after=now + timedelta(days=1), key="ecdsa-p256", cluster=cluster)
    return directory / "pki"


class Handler(BaseHTTPRequestHandler):
    """Tells what it was asked."""

    def do_GET(self) -> None:
        """Large, endless or broken at the paths of these names, else the request's own words."""
        if self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        said = f"{self.command} {self.path} {self.headers['Host']} {self.headers['X-One']} ".encode() + body
        if self.path == "/large":
            said = b"x" * (http.MAX_ANSWER_BYTES + 1)
        self.send_response(418)
        self.send_header("Content-Length", str(len(said) + (self.path == "/half")))
        self.end_headers()
        with contextlib.suppress(OSError):  # a client that has read enough
            self.wfile.write(said)

    do_POST = do_GET  # noqa: N815 (http.server's spelling)

    def log_message(self, *args: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def secured(pki: Path, *, client_ca: str = "", newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> Iterator[int]:
    """An API server's look-alike; with `client_ca` it insists on a client certificate from there, as etcd does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = newest
    context.load_cert_chain(pki / "apiserver.crt", pki / "apiserver.key")
    if client_ca:
        context.load_verify_locations(pki / client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    with LoopbackServer(("127.0.0.1", 0), Handler) as listening:
        # the handshake in the connection's own thread, at its first use
        listening.socket = context.wrap_socket(listening.socket, server_side=True, do_handshake_on_connect=False)
        listening.handle_error = lambda *_: None  # type: ignore[method-assign]  # refusals are its job
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield listening.server_port
        finally:
            listening.shutdown()
            thread.join()


@contextlib.contextmanager
def tcp(answer: Callable[[socket.socket], object]) -> Iterator[int]:
    """A server that is none."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def work() -> None:
            with contextlib.suppress(OSError), listening.accept()[0] as opened:
                answer(opened)

        thread = threading.Thread(target=work)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


def pair(pki: Path, base: str) -> dict[str, Any]:
    """A client certificate and its key, as arguments."""
    certificate, key = ((pki / f"{base}{suffix}").read_bytes() for suffix in (".crt", ".key"))
    return {"certificate_pem": certificate, "key_pem": key}


def leaf(pki: Path, base: str) -> x509.Certificate:
    return load_pem_certificates((pki / f"{base}.crt").read_bytes())[0]


def client(pki: Path, **more: Any) -> Client:
    """One that trusts the cluster's CA."""
    return replace(ANONYMOUS, **{"trust_pem": (pki / "ca.crt").read_bytes(), **more})


def asked(
    port: int, pki: Path, path: str = "/", *, seconds: float = 180, name: str | None = None, **more: Any
) -> Answer:
    """Ask the server on loopback."""
    return client(pki, **more).ask(Server(f"https://127.0.0.1:{port}", name), path, seconds=seconds)


def test_gives_the_whole_answer(pki: Path) -> None:
    """Status and body arrive, and so does the request."""
    with secured(pki) as port:
        server = Server(f"https://127.0.0.1:{port}")
        answer = client(pki).ask(server, "/a?b=c", {"X-One": "1"}, method="POST", body=b"{}")
    assert answer.status == 418
    assert answer.body == f"POST /a?b=c 127.0.0.1:{port} 1 {{}}".encode()


def test_reads_no_more_than_it_must(pki: Path) -> None:
    """A body without end does not fill the memory."""
    with secured(pki) as port, pytest.raises(TooLongError):
        asked(port, pki, "/large")


def test_shows_its_client_certificate(pki: Path) -> None:
    """A server that asks for a client certificate gets it, in a request and in a bare handshake."""
    with secured(pki, client_ca="ca.crt") as port:
        assert asked(port, pki, **pair(pki, "apiserver-kubelet-client")).status == 418


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_knows_a_refusal_from_silence(pki: Path, newest: ssl.TLSVersion) -> None:
    """A client certificate of another CA is refused and not merely unanswered."""
    with secured(pki, client_ca="ca.crt", newest=newest) as port, pytest.raises(ClientRefusedError):
        asked(port, pki, **pair(pki, "front-proxy-client"))


def test_shows_what_is_served_to_any_client(pki: Path) -> None:
    """A handshake needs no client certificate, no trust and no matching name, and ends without a request."""
    with secured(pki, client_ca="ca.crt") as port:
        shown = ANONYMOUS.served(Address("127.0.0.1", port))
    assert shown.serial_number == leaf(pki, "apiserver").serial_number


@pytest.mark.parametrize(
    ("number", "value"), [(0, b"\xa0\x03\x02\x01\x04"), (4, validity(b"20201301000000Z", b"20991231235959Z"))]
)
def test_a_certificate_that_only_openssl_can_read_is_an_answer(
    pki: Path, tmp_path: Path, number: int, value: bytes
) -> None:
    """One of version 5, and one from a 13th month: an error about this server, and no bug that ends the run at all others."""
    (tmp_path / "apiserver.crt").write_text(with_field(leaf(pki, "apiserver"), number, value))
    (tmp_path / "apiserver.key").write_bytes((pki / "apiserver.key").read_bytes())
    with secured(tmp_path) as port, pytest.raises(UntrustedError, match="that can be read, found: "):
        ANONYMOUS.served(Address("127.0.0.1", port))


@pytest.mark.parametrize(
    ("anchor", "name"),
    [("front-proxy-ca.crt", None), ("ca.crt", "other.example.com")],
    ids=["issuer", "name"],
)
def test_trusts_only_the_given_anchor(pki: Path, anchor: str, name: str | None) -> None:
    """A server of another CA, and one with another name, are not believed."""
    trusting = (pki / anchor).read_bytes()
    with secured(pki) as port:
        with pytest.raises(UntrustedError):
            asked(port, pki, name=name, trust_pem=trusting)
        with pytest.raises(UntrustedError):
            client(pki, trust_pem=trusting).served(Address("127.0.0.1", port), name)


def test_takes_another_name_than_the_address(pki: Path) -> None:
    """A server may be asked at an address that its certificate does not name."""
    with secured(pki) as port:
        assert asked(port, pki, name="api.example.com").status == 418


def test_a_closed_port(pki: Path) -> None:
    """A closed port is unreachable, at once."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(UnreachableError, match="connection refused"):
        asked(port, pki)


def test_not_tls(pki: Path) -> None:
    """A port that speaks something else is unreachable, too."""
    with tcp(lambda opened: opened.sendall(b"220 welcome\r\n")) as port, pytest.raises(UnreachableError):
        asked(port, pki)


def test_a_silent_server_costs_no_more_than_the_time_limit(pki: Path) -> None:
    """One that accepts and says nothing."""
    begin = time.monotonic()
    with tcp(lambda opened: opened.recv(1 << 20, socket.MSG_WAITALL)) as port:
        with pytest.raises(UnreachableError, match=r"no answer within 0\.5 s"):
            asked(port, pki, seconds=0.5)
        assert time.monotonic() - begin < 300


def test_a_slow_server_costs_no_more_than_the_time_limit(pki: Path) -> None:
    """One that sends a byte now and then, each within any limit for a single read."""
    begin = time.monotonic()
    with secured(pki) as port, pytest.raises(UnreachableError, match=r"no answer within 0\.5 s"):
        asked(port, pki, "/endless", seconds=0.5)
    assert time.monotonic() - begin < 300


def test_half_an_answer_is_none(pki: Path) -> None:
    """A server that dies within its answer has not answered."""
    with secured(pki) as port, pytest.raises(UnreachableError):
        asked(port, pki, "/half")


def test_a_foreign_key_is_no_pair(pki: Path) -> None:
    """Certificate and key that don't belong together are refused before any connection."""
    mixed = pair(pki, "apiserver-kubelet-client") | {"key_pem": (pki / "front-proxy-client.key").read_bytes()}
    with pytest.raises(ClientRefusedError, match="key values mismatch"):
        asked(1, pki, **mixed)


def test_an_encrypted_key_prompts_for_no_passphrase(pki: Path) -> None:
    """No passphrase is asked for at the terminal."""
    files = pair(pki, "apiserver-kubelet-client")
    key = serialization.load_pem_private_key(files["key_pem"], None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.BestAvailableEncryption(b"a passphrase"),
    )
    with pytest.raises(ClientRefusedError):
        asked(1, pki, **files | {"key_pem": encrypted})


def test_the_key_is_never_on_disk(pki: Path) -> None:
    """No file is opened to be written while a pair is loaded; one that is opened would be noticed."""
    program = """
import os, sys
from pathlib import Path
from backends.settings import tls_context
from bridge.system.tls import context
opened = []
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
sys.addaudithook(lambda e, a: opened.append(a[0]) if e == "open" and isinstance(a[0], str) and a[2] & writing else None)
pki = Path(sys.argv[1])
pair = [(pki / f"apiserver-kubelet-client{suffix}").read_bytes() for suffix in (".crt", ".key")]
context(None, *pair)
print(opened)
open(sys.argv[2], "wb").close()
print(opened)
"""
    noticed = str(pki / "noticed")
    command = [sys.executable, "-c", program, str(pki), noticed]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[]", f"['{noticed}']"]


def test_an_answer_whose_source_was_closed_before_it_is_closed_without_a_word() -> None:
    """As the garbage collector may do it after a cut-off answer: Python 3.13 printed a traceback on the operator's terminal."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe"

        def serve() -> None:
            theirs.recv(65536)
            theirs.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        with mock.patch.object(Peer, "connected", return_value=ours), Exchange(180):
            response = begin(pool(Peer(host="h", port=1)), "GET", "/", {})
        read = response._original_response  # type: ignore[attr-defined]
        read.fp.close()
        read.close()
        assert read.closed


@pytest.mark.attack("E7")
@pytest.mark.parametrize("dead", [0, 2])
def test_dead_addresses_of_a_name_leave_the_others_time(monkeypatch: pytest.MonkeyPatch, dead: int) -> None:
    """A switched-off server behind a round-robin name drops packets, as a listener does whose queue is full."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
    with ExitStack() as stack:
        port = stack.enter_context(server(says(answer))).port
        for number in range(dead):
            silent = stack.enter_context(socket.socket())
            silent.bind((f"127.0.0.{number + 2}", port))
            silent.listen(0)
            for _ in range(2):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(silent.getsockname())
        places = [f"127.0.0.{number + 2}" for number in range(dead)] + ["127.0.0.1"]
        listed = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port)) for place in places]
        look_up = socket.getaddrinfo
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, *a, **k: listed if host == "h" else look_up(host, *a, **k)
        )
        assert ask(pool(Peer(host="h", port=port)), seconds=3).body == b"hi"
        if dead:
            listed.pop()
            with pytest.raises(UnreachableError):
                ask(pool(Peer(host="h", port=port)), seconds=1)
