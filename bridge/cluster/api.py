"""
The one client of the cluster's API, by whichever of its servers answers.

For a few requests each has a connection of its own. Asked thousands of times, as the gateway does, each thread keeps
its connection, and credentials are read again when their time is over, or when the server does not know them any more.
Nothing of the environment counts; keys stay in memory.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from bridge.cluster import access
from bridge.cluster.access import Access, AccessError
from bridge.cluster.client import Client
from bridge.cluster.client import document as whole_document
from bridge.cluster.errors import NoAnswerError, why
from bridge.cluster.stream import Lines
from bridge.node.endpoints import Server
from bridge.node.inventory import Node
from bridge.system import https, kept_http
from bridge.system.kept_http import KeptConnection
from bridge.words import one_line

MERGE_PATCH = "application/merge-patch+json"
_JSON = "application/json"
_encode = json.JSONEncoder(separators=(",", ":")).encode

#: For each request over a connection that is kept.
TIMEOUT_SECONDS = 10.0
#: The largest object that etcd takes, as JSON.
_MAX_ANSWER_BYTES = 4 << 20
#: A token is rotated by the kubelet long before it ends.
_READ_AGAIN_SECONDS = 60.0

_NOT_NOW = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.REQUEST_TIMEOUT}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer."""

    status: int
    body: bytes = field(repr=False)

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """The body's JSON; empty if it is no object. Parsed when needed: of a write that went well nobody needs it."""
        return _document(self.body)

    @property
    def message(self) -> str:
        """The end of an error's text: the beginning may repeat the request, or the object."""
        text = str(self.document.get("message", ""))
        return one_line(text[-600:].rpartition(": ")[2] or text[-300:])


class _Request(NamedTuple):
    method: str
    path: str
    body: bytes | None
    accept: str
    content_type: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Accept": self.accept, **({"Content-Type": self.content_type} if self.body is not None else {})}

    @property
    def lines(self) -> str:
        """The same as whole lines."""
        more = "" if self.body is None else f"Content-Type: {self.content_type}\r\n"
        return f"Accept: {self.accept}\r\n{more}"


class Api:
    """A client of the API; it may be used by several threads."""

    def __init__(
        self,
        clients: Sequence[Client],
        servers: Sequence[Server],
        troubles: Sequence[str] = (),
        *,
        again: Callable[[], Access] | None = None,
    ) -> None:
        """
        Args:
            clients: In the order in which they are tried.
            servers: Likewise; the last one that answered comes first from then on.
            troubles: Why there are no more clients than these.
            again: Reads all of it again; then connections are kept, and HTTP 403 is an answer like any other.
        """
        self.clients = tuple(clients)
        self._servers = tuple(dict.fromkeys(servers))
        self._troubles = tuple(troubles)
        self._again = again
        self._read_at = time.monotonic()
        self._mutex = threading.Lock()
        self._own = threading.local()
        self._opened: set[KeptConnection] = set()

    @classmethod
    def of_node(cls, node: Node, kubeconfig_dir: Path) -> Api:
        """A client with a node's rights (see `access.of_node`); nothing is asked yet."""
        found = access.of_node(node, kubeconfig_dir)
        return cls(found.clients, found.servers, found.troubles)

    @classmethod
    def of_gateway(cls, config: Path | None) -> Api:
        """
        A client with the gateway's rights, whose connections are kept; nothing is asked yet.

        Raises:
            AccessError: As `access.of_gateway`.
        """
        found = access.of_gateway(config)
        return cls(found.clients, found.servers, again=lambda: access.of_gateway(config))

    @property
    def servers(self) -> Sequence[Server]:
        """The servers that are known, the likeliest first."""
        return self._servers

    @property
    def server(self) -> str:
        """The first one, for messages."""
        return str(self._servers[0].place)

    def add(self, servers: Sequence[Server]) -> None:
        """More servers, to be tried after the others."""
        with self._mutex:
            self._servers = tuple(dict.fromkeys((*self._servers, *servers)))

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        content_type: str = _JSON,
        *,
        accept: str = _JSON,
    ) -> Reply:
        """
        Ask one server after the other, until one has an answer: any status but 401, 408, 429 and 5xx.

        After a connection that ended too early the request may have been carried out, and is made once more: a caller's
        writes must bear that (they name a resourceVersion).

        Raises:
            NoAnswerError: Down, not trusted, not for us, or in trouble, each of them.
        """
        data = None if body is None else _encode(body).encode()
        request = _Request(method, path, data, accept, content_type)
        if self._again is not None and time.monotonic() - self._read_at >= _READ_AGAIN_SECONDS:
            self._read_anew(self.clients)
        clients = self.clients
        try:
            return self._over(clients, request)
        except NoAnswerError as e:
            if self._again is None or not e.is_unknown:
                raise
        self._read_anew(clients)
        return self._over(self.clients, request)

    def _over(self, clients: Sequence[Client], request: _Request) -> Reply:
        found, is_unknown = list(self._troubles), False
        for server in self._servers:
            for client in clients:
                try:
                    reply = self._exchange(server, client, request)
                except https.HttpsError as e:
                    found.append(f"{server.url}: {e}")
                    if isinstance(e, https.ClientRefusedError):
                        continue
                    break
                if reply.status == HTTPStatus.UNAUTHORIZED or self._is_not_this_client(reply.status):
                    is_unknown |= reply.status == HTTPStatus.UNAUTHORIZED
                    found.append(f"{server.url}: it turns {client.name} away (HTTP {reply.status})")
                    continue
                self._prefer(server)
                return reply
        said = "; ".join(found) or "no server is known"
        raise NoAnswerError(f"no answer from the cluster's API: {said}", is_unknown=is_unknown)

    def _is_not_this_client(self, status: int) -> bool:
        return self._again is None and status == HTTPStatus.FORBIDDEN

    def _prefer(self, server: Server) -> None:
        if self._servers[0] != server:
            with self._mutex:
                self._servers = tuple(sorted(self._servers, key=lambda one: one != server))

    def _exchange(self, server: Server, client: Client, request: _Request) -> Reply:
        """
        Raises:
            HttpsError: No answer, or one that is about the server itself.
        """
        if self._again is not None:
            reply = self._over_kept(server, client, request)
        else:
            answer = client.ask(server, request.path, method=request.method, body=request.body, headers=request.headers)
            reply = Reply(status=answer.status, body=answer.body)
        if reply.status in _NOT_NOW or reply.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            text = f"wanted an answer, found HTTP {reply.status} {reply.message}".rstrip()
            raise https.UnreachableError(text)
        if self._again is None:
            whole_document(reply.body)
        return reply

    # --- connections that are kept ------------------------------------------------------------------------------------

    def _over_kept(self, server: Server, client: Client, request: _Request) -> Reply:
        connection = self._connection(server, client)
        lines = client.lines + request.lines
        for _ in range(2):
            try:
                answer = connection.ask(
                    request.method,
                    request.path,
                    lines,
                    request.body,
                    seconds=TIMEOUT_SECONDS,
                    longest=_MAX_ANSWER_BYTES,
                )
                return Reply(status=answer.status, body=answer.body)
            except (OSError, ValueError) as e:
                if not connection.is_kept or isinstance(e, TimeoutError):
                    raise https.UnreachableError(why(e)) from None
        raise AssertionError("the second connection was not kept")

    def _connection(self, server: Server, client: Client) -> KeptConnection:
        """The thread's own connection to this server."""
        kept: tuple[Server, Client, KeptConnection] | None = getattr(self._own, "kept", None)
        if kept is not None and kept[0] is server and kept[1] is client:
            return kept[2]
        connection = KeptConnection(lambda: _connect(server, client), str(server.place))
        self._own.kept = (server, client, connection)
        with self._mutex:
            if kept is not None:
                kept[2].close()
                self._opened.discard(kept[2])
            self._opened.add(connection)
        return connection

    def _read_anew(self, old: Sequence[Client]) -> None:
        """The credentials as they are now; the old ones where they can't be read at this moment."""
        with self._mutex:
            if self._again is None or self.clients is not old:
                return
            self._read_at = time.monotonic()
            with contextlib.suppress(AccessError):
                found = self._again()
                self.clients, self._servers = found.clients, found.servers

    def close(self) -> None:
        """End the connections of all threads, which ask no more."""
        with self._mutex:
            for connection in self._opened:
                connection.close()

    @contextlib.contextmanager
    def lines(self, path: str, silence_seconds: float, longest: int) -> Iterator[Lines]:
        """
        A stream of lines, each a JSON text, from the first server by the first client.

        Args:
            path: With its query.
            silence_seconds: After which the connection counts as dead.
            longest: Longer lines are left out, and counted.

        Raises:
            NoAnswerError: No stream; while it is read, that it broke.
        """
        server, clients = self._servers[0], self.clients
        connection = http.client.HTTPConnection(*server.place)
        try:
            connection.sock = _connect(server, clients[0])
            connection.request("GET", path, headers={"Accept": _JSON, **clients[0].headers})
            response = connection.getresponse()
            if response.status != HTTPStatus.OK:
                if response.status == HTTPStatus.UNAUTHORIZED:
                    self._read_anew(clients)
                reply = Reply(status=response.status, body=response.read(_MAX_ANSWER_BYTES))
                raise NoAnswerError(f"{server.place}: wanted to watch, found HTTP {reply.status} {reply.message}")
            connection.sock.settimeout(silence_seconds)
            yield Lines(response, connection, longest, str(server.place))
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise NoAnswerError(f"{server.place}: {why(e)}") from None
        finally:
            connection.close()


def _connect(server: Server, client: Client) -> socket.socket:
    host, port = server.place
    return kept_http.connect(host, port, client.tls, server.name or host, TIMEOUT_SECONDS)


def _document(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
