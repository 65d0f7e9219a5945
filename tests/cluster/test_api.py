"""Several requests at once, to API servers that answer as a test says."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from bridge.cluster import ANONYMOUS, api
from bridge.cluster.api import Api, NoAnswerError, Reply, request_of
from bridge.node.endpoints import Server
from tests.kit.loopback import LoopbackServer

#: The status of a path at a server; 0: the connection ends, None: no answer comes.
Statuses = Callable[[str], int | None]


@contextlib.contextmanager
def server(statuses: Statuses) -> Iterator[tuple[Server, list[str]]]:
    """An API server, and the paths that it was asked for."""
    asked: list[str] = []
    end = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            status = statuses(self.path)
            if status is None:
                end.wait(600)
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
        end.set()
        one.shutdown()


def client(*servers: Server) -> contextlib.closing[Api]:
    """As the gateway's."""
    return contextlib.closing(Api([ANONYMOUS], servers, again=lambda: None))  # type: ignore[arg-type,return-value]


def shown(found: list[Reply | NoAnswerError]) -> list[str]:
    return [one.body.decode() if isinstance(one, Reply) else "none" for one in found]


PATHS = [f"/{number}" for number in range(6)]
REQUESTS = [request_of("GET", path) for path in PATHS]


def test_each_request_has_its_own_answer() -> None:
    """In their order, twice over the same connections; a single one is asked as any other."""
    with server(lambda _: 200) as (one, asked), client(one) as made:
        assert [shown(made.answers(REQUESTS)) for _ in range(2)] == [PATHS, PATHS]
        assert shown(made.answers(REQUESTS[:1])) == ["/0"]
        assert len(asked) == 13
        assert len(made._idle) == len(PATHS)
    assert not made._idle


@pytest.mark.parametrize("status", [0, 401, 429, 500, 503])
def test_one_that_a_server_does_not_answer_is_asked_for_by_itself(status: int) -> None:
    """Another server may have the answer; the others' answers stay as they are, and are asked for once."""
    with (
        server(lambda path: status if path == "/3" else 200) as (one, asked),
        server(lambda _: 200) as (two, others),
        client(one, two) as made,
    ):
        assert shown(made.answers(REQUESTS)) == PATHS
    assert [asked.count(path) for path in PATHS if path != "/3"] == [1] * 5
    assert others == ["/3"]


def test_a_status_about_the_request_is_its_answer() -> None:
    """A pod that is not there, and a write that is refused, are for the caller to judge."""
    with server(lambda path: 404 if path == "/3" else 422 if path == "/4" else 200) as (one, _), client(one) as made:
        found = made.answers(REQUESTS)
    assert [reply.status for reply in found if isinstance(reply, Reply)] == [200, 200, 200, 404, 422, 200]


def test_a_server_that_hangs_is_waited_for_twice_and_not_by_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has its answer keeps it; those that have none are late together, and one of them is tried anew."""
    monkeypatch.setattr(api, "TIMEOUT_SECONDS", 2.0)
    begin = time.monotonic()
    with server(lambda path: 200 if path in {"/0", "/5"} else None) as (one, asked), client(one) as made:
        found = shown(made.answers(REQUESTS))
    assert found == ["/0", "none", "none", "none", "none", "/5"]
    assert time.monotonic() - begin < 8
    assert len(asked) == 7


def test_what_may_not_be_repeated_is_asked_for_once() -> None:
    """The answers that came stay; of the others none is made again."""
    with server(lambda path: 0 if path in {"/2", "/3"} else 200) as (one, asked), client(one) as made:
        found = shown(made.answers(REQUESTS, lambda: False))
        assert found == ["/0", "/1", "none", "none", "/4", "/5"]
        assert sorted(asked) == PATHS
        assert shown(made.answers(REQUESTS)) == found
    assert asked.count("/2") > 2


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


def test_no_server_is_one_error_for_all() -> None:
    """Nothing listens there: each request has the error, and the connection is tried once and once more."""
    with client(Server("http://127.0.0.1:1")) as made:
        found = made.answers(REQUESTS)
    assert all(isinstance(one, NoAnswerError) for one in found)
    assert len({str(one) for one in found}) == 1
