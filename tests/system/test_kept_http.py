"""HTTP over a connection that is kept: what is read as an answer, what is not, and that no request gets another one's."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.system import https
from bridge.system.kept_http import Answer, BrokenOffError, KeptConnection, NotHttpError, TooLongError, connect
from tests.kit import cfssl

Talk = Callable[[socket.socket, bytes], None]


@contextmanager
def server(*talks: Talk) -> Iterator[KeptConnection]:
    """One that takes a request on each connection, as many as there are talks; the list is of connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for talk in talks:
                opened, _ = listener.accept()
                with opened, suppress(OSError):
                    talk(opened, opened.recv(1 << 16))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        connection = KeptConnection(lambda: socket.create_connection(("127.0.0.1", port), 5), f"127.0.0.1:{port}")
        yield connection
        connection.close()
        thread.join(5)


def says(*pieces: bytes) -> Talk:
    """Send these, and end the connection."""

    def talk(opened: socket.socket, _: bytes) -> None:
        for piece in pieces:
            opened.sendall(piece)
            time.sleep(0.001)

    return talk


def ask(connection: KeptConnection, *, seconds: float = 5, longest: int = 1000, body: bytes | None = None) -> Answer:
    """One request."""
    return connection.ask("GET", "/x", "Accept: */*\r\n", body, seconds=seconds, longest=longest)


WHOLE = {
    "a length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: a\r\n\r\nhello",
    "chunks": b"HTTP/1.1 200 OK\r\nX: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nT: x\r\n\r\n",
    "till the end": b"HTTP/1.1 200 OK\r\nX: a\r\n\r\nhello",
    "after 100": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 \r\nX: a\r\nContent-Length: 5\r\n\r\nhello",
    "version 1.0": b"HTTP/1.0 200 OK\r\nX: a\r\n\r\nhello",
}


@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE)
def test_reads_a_whole_answer_however_it_is_cut(text: bytes) -> None:
    """With a length, in chunks or until the end; in one piece or a byte at a time."""
    for pieces in ([text], [text[n : n + 1] for n in range(len(text))]):
        with server(says(*pieces)) as connection:
            found = ask(connection)
            assert (found.status, found.headers["x"], found.body) == (200, "a", b"hello")


BROKEN = {
    "no HTTP": b"SSH-2.0-OpenSSH\r\n\r\n",
    "no status": b"HTTP/1.1 abc OK\r\n\r\n",
    "another version": b"HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n",
    "gzip": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a chunk of another size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello",
    "half of the chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "nothing": b"",
    "a head without end": b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * 70_000,
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_what_is_no_whole_answer_is_none(text: bytes) -> None:
    """It ends the connection, and the next request makes another one."""
    with server(says(text), says(WHOLE["a length"])) as connection:
        with pytest.raises(NotHttpError):
            ask(connection)
        assert ask(connection).body == b"hello"
        assert not connection.is_kept


def test_a_body_that_breaks_off_leaves_its_status() -> None:
    """For an error's status says enough."""
    with server(says(b"HTTP/1.1 403 No\r\nContent-Length: 9\r\n\r\n{")) as connection:
        with pytest.raises(BrokenOffError) as e:
            ask(connection)
        assert e.value.status == 403


@pytest.mark.parametrize("head", [b"Content-Length: 2000", b"Transfer-Encoding: chunked", b"X: y"])
def test_an_answer_has_its_limit(head: bytes) -> None:
    """However its length is told."""
    body = b"7D0\r\n" + b"x" * 2000 if b"chunked" in head else b"x" * 2000
    text = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + body
    with server(says(text)) as connection, pytest.raises(TooLongError):
        ask(connection)


def test_one_limit_of_time_is_for_all_of_it() -> None:
    """An answer that drips is given up in time, and a silent one."""

    def drips(opened: socket.socket, asked: bytes) -> None:
        del asked
        opened.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        for _ in range(40):
            opened.sendall(b" ")
            time.sleep(0.02)

    for talk in (drips, lambda *_: time.sleep(0.8)):
        with server(talk) as connection:
            begin = time.monotonic()
            with pytest.raises(TimeoutError):
                ask(connection, seconds=0.2)
            assert time.monotonic() - begin < 0.6


def test_a_connection_is_kept_and_nothing_is_left_on_it() -> None:
    """Two requests go over one; where more came than was asked for, or it has ended, the next goes over another one."""
    whole = WHOLE["a length"]

    def twice(opened: socket.socket, _: bytes) -> None:
        opened.sendall(whole)
        assert opened.recv(1000).startswith(b"GET /x HTTP/1.1\r\nHost: 127.0.0.1")
        opened.sendall(whole + b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nplanted")
        opened.recv(1000)

    def late(opened: socket.socket, _: bytes) -> None:
        opened.sendall(whole)
        time.sleep(0.05)
        opened.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nplanted")
        opened.recv(1000)

    with server(twice, late, says(whole)) as connection:
        assert (ask(connection).body, connection.is_kept) == (b"hello", False)
        assert (ask(connection).body, connection.is_kept) == (b"hello", True)
        assert (ask(connection).body, connection.is_kept) == (b"hello", False)
        time.sleep(0.15)
        assert (ask(connection).body, connection.is_kept) == (b"hello", False)


@pytest.mark.parametrize("says_so", [True, False])
def test_an_answer_over_tls_ends_when_tls_says_so(tmp_path: Path, says_so: bool) -> None:
    """An answer till the end is whole with TLS's own word for it; without, somebody may have cut it short."""
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
        trusting = https.context(files.ca.read_bytes(), None, None)
        connection = KeptConnection(lambda: connect("127.0.0.1", port, trusting, "127.0.0.1", 5), f"127.0.0.1:{port}")
        if says_so:
            assert ask(connection).body == b"hello"
        else:
            with pytest.raises(BrokenOffError):
                ask(connection)
        connection.close()
        thread.join(5)


@pytest.mark.parametrize("target", ["/a b", "/a\r\nX: y", "/ä", "/\x00"])
def test_a_target_is_one_word(target: str) -> None:
    """Nothing in it makes another header, or another request."""
    connection = KeptConnection(lambda: pytest.fail("nothing is to be sent"), "h")
    with pytest.raises(ValueError, match="quoted"):
        connection.ask("GET", target, "", None, seconds=1, longest=1)


@given(st.binary(max_size=300))
def test_whatever_comes_is_an_answer_or_an_error_of_ours(text: bytes) -> None:
    """No garbage of a server's leads to another error."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(b"HTTP/1.1 200 OK\r\n" + text)
        theirs.shutdown(socket.SHUT_WR)
        connection = KeptConnection(lambda: ours, "h")
        with suppress(NotHttpError, TooLongError):
            assert ask(connection).status == 200
        connection.close()
