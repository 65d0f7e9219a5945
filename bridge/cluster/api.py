"""The client of the cluster's API, which uses the first server that answers; private keys stay in memory."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from urllib.parse import quote

from bridge.cluster import TIMEOUT_SECONDS as NODE_TIMEOUT_SECONDS
from bridge.cluster import Access, AccessError, Client, items, of_gateway, of_node, text_of
from bridge.cluster import document as whole_document
from bridge.errors import BridgeError, Exit
from bridge.node.endpoints import Server
from bridge.node.inventory import Node
from bridge.system.http import PIECE_BYTES, Exchange, ask, begin
from bridge.system.tls import ClientRefusedError, HttpsError, LateError, TooLongError, UnreachableError
from bridge.words import one_line

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse

MERGE_PATCH = "application/merge-patch+json"
#: An object's metadata alone; also for the reply to a write, since we have the object.
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
JSON = "application/json"
_encode = json.JSONEncoder(separators=(",", ":")).encode

#: The limit for each of the gateway's requests.
TIMEOUT_SECONDS = 10.0
#: The limit for a page of a list, and for an object that we get by its name.
_MAX_ANSWER_BYTES = 4 << 20
#: etcd takes objects of up to 1.5 MiB; JSON escapes each `<` with six bytes, and tenants may write a megabyte of them.
_MAX_OBJECT_BYTES = 12 << 20
#: The kubelet rotates a token long before it expires.
_READ_AGAIN_SECONDS = 60.0
_MOST_PAGES = 50_000

_NOT_NOW = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.REQUEST_TIMEOUT}


class NoAnswerError(BridgeError):
    """No API server answered the request itself; the text says why, server by server."""

    exit_code: ClassVar[int] = Exit.UNAVAILABLE
    hint = "is the API server up, and is it the one that the kubeconfig names?"
    is_unknown = False  #: A server did not authenticate us (HTTP 401).
    is_too_long = False  #: A server's answer was longer than we allow.
    is_from_server = False  #: A server rejected this request, but may accept another one.


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer to a request."""

    status: int
    body: bytes = field(repr=False)

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """The body's JSON; empty if it is no object. Parsed on demand, since a successful write needs no parsing."""
        try:
            return whole_document(self.body)
        except UnreachableError:
            return {}

    @property
    def message(self) -> str:
        """The end of an error's message, since its beginning may quote the request or the object."""
        text = str(self.document.get("message", ""))
        return one_line(text[-600:].rpartition(": ")[2] or text[-300:])

    def found(self, path: str) -> Mapping[str, Any]:
        """Return the document of the answer to a GET (NoAnswerError: the status is not 200)."""
        if self.status == HTTPStatus.OK:
            return self.document
        error = NoAnswerError(f"wanted {path.partition('?')[0]}, found HTTP {self.status} {self.message}".rstrip())
        error.is_from_server = True
        raise error


class Request(NamedTuple):
    """A request to the API; `request_of` builds it."""

    method: str
    path: str
    body: bytes | None
    headers: Mapping[str, str]
    longest: int


def request_of(
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    content_type: str = JSON,
    *,
    accept: str = JSON,
    longest: int = _MAX_ANSWER_BYTES,
) -> Request:
    """Build a request, with a JSON body or without a body."""
    data = None if body is None else _encode(body).encode()
    headers = {"Accept": accept, **({"Content-Type": content_type} if data is not None else {})}
    return Request(method, path, data, headers, longest)


class Api:
    """A client of the API; several threads may use it."""

    def __init__(
        self,
        clients: Sequence[Client],
        servers: Sequence[Server],
        troubles: Sequence[str] = (),
        *,
        again: Callable[[], Access] | None = None,
    ) -> None:
        """Take clients and servers, in order of trial; with `again`, which rereads them, HTTP 403 is an answer."""
        self.clients = tuple(clients)
        self.servers = tuple(dict.fromkeys(servers))  #: The known servers, the likeliest first.
        self._troubles = tuple(troubles)
        self._again = again
        self._read_at = time.monotonic()
        self._mutex = threading.Lock()

    @classmethod
    def of_node(cls, node: Node, kubeconfig_dir: Path) -> Api:
        """Return a client with a node's rights (see `of_node`), without any request."""
        return cls(*of_node(node, kubeconfig_dir))

    @classmethod
    def of_gateway(cls, config: Path | None) -> Api:
        """Return a client with the gateway's rights (see `of_gateway`), without any request."""
        return cls(*of_gateway(config), again=lambda: of_gateway(config))

    @property
    def server(self) -> str:
        """The first server, for messages."""
        return str(self.servers[0].place)

    def add(self, servers: Sequence[Server]) -> None:
        """Add servers, which we try after the others."""
        with self._mutex:
            self.servers = tuple(dict.fromkeys((*self.servers, *servers)))

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, content_type: str = JSON) -> Reply:
        """
        Ask one server after the other until one answers with any status but 401, 408, 429 and 5xx (NoAnswerError).

        If a connection ends too early, we send the request once more: writes must allow that (resourceVersion).
        """
        return self.answer(request_of(method, path, body, content_type))

    def answer(self, request: Request, may_repeat: Callable[[], bool] = lambda: True) -> Reply:
        """Do as `ask` does, for a request that is built already; it is sent once more only while `may_repeat` allows."""
        if self._again is not None and time.monotonic() - self._read_at >= _READ_AGAIN_SECONDS:
            self._read_anew(self.clients)
        clients = self.clients
        try:
            return self._over(clients, request, may_repeat)
        except NoAnswerError as e:
            if self._again is None or not e.is_unknown or not may_repeat():
                raise
        self._read_anew(clients)
        return self._over(self.clients, request, may_repeat)

    def get(self, path: str) -> Mapping[str, Any]:
        """Get the object or list at a path (NoAnswerError: also for any status but 200)."""
        return self.ask("GET", path).found(path)

    def every(self, path: str, page: int) -> Iterator[Mapping[str, Any]]:
        """Yield all objects of a list, by pages that should fit into 4 MiB, or else one by one (NoAnswerError)."""
        more, mark, count = "", "&" if "?" in path else "?", page
        for _ in range(_MOST_PAGES):
            longest = _MAX_OBJECT_BYTES if count == 1 else _MAX_ANSWER_BYTES
            try:
                reply = self.answer(request_of("GET", f"{path}{mark}limit={count}{more}", longest=longest))
            except NoAnswerError as e:
                if count == 1 or not e.is_too_long:
                    raise
                count = 1
                continue
            count = min(page, 2 * count)
            found = reply.found(path)
            yield from items(found, "items")
            following = text_of(found, "metadata", "continue")
            if not following:
                return
            more = f"&continue={quote(following, safe='')}"
        raise NoAnswerError(f"wanted all of {path}, found more than {_MOST_PAGES * page}")

    def _over(self, clients: Sequence[Client], request: Request, may_repeat: Callable[[], bool]) -> Reply:
        found, is_unknown, is_too_long, is_from_server = list(self._troubles), False, False, False
        for server in self.servers:
            for client in clients:
                if len(found) > len(self._troubles) and not may_repeat():
                    break
                try:
                    reply = self._exchange(server, client, request, may_repeat)
                except HttpsError as e:
                    found.append(f"{server.url}: {e}")
                    if isinstance(e, TooLongError):
                        is_too_long = is_from_server = True
                    if isinstance(e, ClientRefusedError):
                        continue
                    break
                is_not_this_client = self._again is None and reply.status == HTTPStatus.FORBIDDEN
                if reply.status == HTTPStatus.UNAUTHORIZED or is_not_this_client:
                    is_unknown |= reply.status == HTTPStatus.UNAUTHORIZED
                    is_from_server = True
                    found.append(f"{server.url}: it turns {client.name} away (HTTP {reply.status})")
                    continue
                if self.servers[0] != server:
                    with self._mutex:
                        self.servers = tuple(sorted(self.servers, key=lambda other: other != server))
                return reply
        error = NoAnswerError(f"no answer from the cluster's API: {'; '.join(found) or 'no server is known'}")
        error.is_unknown, error.is_too_long, error.is_from_server = is_unknown, is_too_long, is_from_server
        raise error

    # --- connections --------------------------------------------------------------------------------------------------

    def _exchange(self, server: Server, client: Client, request: Request, may_repeat: Callable[[], bool]) -> Reply:
        """Exchange request and answer; repeat it if the server has just closed a kept connection."""
        try:
            reply = self._once(server, client, request)
        except UnreachableError as e:
            if isinstance(e, LateError) or not e.was_kept or not may_repeat():
                raise
            reply = self._once(server, client, request)
        _assert_now(reply)
        if self._again is None:
            whole_document(reply.body)
        return reply

    def _once(self, server: Server, client: Client, request: Request) -> Reply:
        method, path, body, headers, longest = request
        given = {**client.headers, **headers}
        seconds = NODE_TIMEOUT_SECONDS if self._again is None else TIMEOUT_SECONDS
        answer = ask(client.pool(server), method, path, given, body, seconds=seconds, longest=longest)
        return Reply(status=answer.status, body=answer.body)

    def _read_anew(self, old: Sequence[Client]) -> None:
        """Read the credentials again; keep the old ones if they can't be read now."""
        with self._mutex:
            if self._again is None or self.clients is not old:
                return
            self._read_at = time.monotonic()
            with contextlib.suppress(AccessError):
                self.clients, self.servers, _ = self._again()

    def close(self) -> None:
        """Close the idle connections."""
        for client in self.clients:
            client.close()

    @contextlib.contextmanager
    def lines(self, path: str, silence_seconds: float, longest: int) -> Iterator[Lines]:
        """Open a stream of JSON lines from the first server; it fails after `silence_seconds` (NoAnswerError)."""
        server, clients = self.servers[0], self.clients
        headers, limits = {"Accept": JSON, **clients[0].headers}, Exchange(TIMEOUT_SECONDS, PIECE_BYTES)
        try:
            with limits:
                response = begin(clients[0].pool(server), "GET", path, headers)
                body = b"" if response.status == HTTPStatus.OK else response.read(PIECE_BYTES)
        except HttpsError as e:
            raise NoAnswerError(f"{server.place}: {e}") from None
        with contextlib.closing(response):
            if response.status != HTTPStatus.OK:
                if response.status == HTTPStatus.UNAUTHORIZED:
                    self._read_anew(clients)
                reply = Reply(status=response.status, body=body)
                raise NoAnswerError(f"{server.place}: can't watch: HTTP {reply.status} {reply.message}")
            limits.seconds = silence_seconds
            yield Lines(response, limits, longest, str(server.place))


def _assert_now(reply: Reply) -> Reply:
    """Return the reply if it answers the request itself (UnreachableError: the server can't answer now)."""
    if reply.status in _NOT_NOW or reply.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise UnreachableError(f"wanted an answer, found HTTP {reply.status} {reply.message}".rstrip())
    return reply


class Lines:
    """The lines of a stream, in which the API server answers a watch."""

    def __init__(self, response: BaseHTTPResponse, limits: Exchange, longest: int, server: str) -> None:
        """Read a response whose pieces have these limits, and lines of at most `longest` bytes."""
        self._response, self._limits = response, limits
        self._longest = longest
        self._server = server
        self.left_out = 0  #: The number of lines that were too long.

    def __iter__(self) -> Iterator[bytes]:
        """Yield each line without its end (NoAnswerError: the stream broke)."""
        kept, skipping = bytearray(), False
        try:
            while piece := self._piece():
                *whole, rest = piece.split(b"\n")
                for part in whole:
                    kept += part
                    if skipping or len(kept) > self._longest:
                        self.left_out += 1
                    else:
                        yield bytes(kept)
                    kept, skipping = bytearray(), False
                kept += rest
                if len(kept) > self._longest:
                    kept, skipping = bytearray(), True
        except HttpsError as e:
            raise NoAnswerError(f"{self._server}: the watch broke: {e}") from None

    def _piece(self) -> bytes:
        with self._limits:
            return self._response.read1(PIECE_BYTES)

    def end(self) -> None:
        """End the stream, from another thread; a thread that is reading wakes up and gets no more."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # it has ended
            self._response.shutdown()
