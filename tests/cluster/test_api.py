"""Requests to API servers that answer as a test says."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.cluster import ANONYMOUS
from bridge.cluster.api import Api, Lines, NoAnswerError, Reply, request_of
from bridge.node.endpoints import Server
from bridge.system.http import Exchange
from tests.kit.loopback import LoopbackServer

#: The status of a path at a server; 0: the connection ends.
Statuses = Callable[[str], int]


@contextlib.contextmanager
def server(statuses: Statuses) -> Iterator[tuple[Server, list[str]]]:
    """An API server, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            status = statuses(self.path)
            if not status:
                self.close_connection = True
                return
            body = self.path.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with LoopbackServer(("127.0.0.1", 0), Handler) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield Server(f"http://127.0.0.1:{one.server_port}"), asked
        one.shutdown()


def client(*servers: Server) -> contextlib.closing[Api]:
    """As the gateway's."""
    return contextlib.closing(Api([ANONYMOUS], servers, again=lambda: None))  # type: ignore[arg-type,return-value]


REQUESTS = [request_of("GET", path) for path in ("/0", "/1")]


@pytest.mark.parametrize("status", [0, 401, 503])
@pytest.mark.parametrize("may_repeat", [True, False])
def test_a_write_is_sent_once_more_only_while_it_may_be(status: int, may_repeat: bool) -> None:
    """Not over the same connection, not with credentials that were read anew, and not to another server."""
    with (
        server(lambda path: status if path == "/1" else 200) as (one, asked),
        server(lambda _: 200) as (two, others),
        client(one, two) as made,
    ):
        assert made.answer(REQUESTS[0], lambda: False).status == 200  # which keeps its connection
        with contextlib.nullcontext() if may_repeat else pytest.raises(NoAnswerError):
            assert made.answer(REQUESTS[1], lambda: may_repeat).body == b"/1"
    assert asked.count("/1") == (2 if may_repeat and status == 0 else 1)
    assert others == ["/1"] * may_repeat


# --- by themselves -------------------------------------------------------------------------------------------------------


def test_a_long_message_is_cut_to_its_end() -> None:
    """The API server repeats the request in the beginning of an error."""
    secret = "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURQ" * 300
    text = f'CSR "x" is invalid: spec.request: "{secret}": wrong'
    reply = Reply(status=422, body=json.dumps({"message": text}).encode())
    assert reply.message == "wrong"
    assert len(Reply(status=422, body=json.dumps({"message": secret}).encode()).message) <= 300


class _Pieces:
    """The pieces of a stream, as they come."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)

    def read1(self, _: int) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


def lines_of(longest: int, *pieces: bytes) -> tuple[list[bytes], int]:
    """The lines, and how many were left out."""
    made = Lines(_Pieces(*pieces), Exchange(180), longest, "x")  # type: ignore[arg-type]
    return list(made), made.left_out


def test_lines_come_whole_however_they_are_cut() -> None:
    """Lines that are too long are left out, and counted once; those after them are read."""
    assert lines_of(10, b"a\nbc", b"d\n", b"\ne") == ([b"a", b"bcd", b""], 0)
    assert lines_of(4, b"abcdefgh\nok\n") == ([b"ok"], 1)
    assert lines_of(4, b"abcd", b"efgh", b"ij\nok\nabcde\n", b"no") == ([b"ok"], 2)


@given(st.lists(st.binary(max_size=12), max_size=12))
def test_cutting_changes_nothing(pieces: list[bytes]) -> None:
    """The same lines as of the whole text."""
    whole = b"".join(pieces)
    assert lines_of(1000, *filter(None, pieces))[0] == whole.split(b"\n")[:-1]
