"""Requests to API servers that answer as a test says."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from bridge.cluster import ANONYMOUS
from bridge.cluster.api import Api, NoAnswerError, request_of
from bridge.node.endpoints import Server
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
