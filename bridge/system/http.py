"""
HTTP/1.1 for the cluster's API, components, neighbours and CAs: urllib3's pools, heads and framing, within our limits.

The limits are for a whole exchange (connecting, TLS, request, answer), below the parser: its time, and its answer's bytes.
A connection is kept only if an answer ends exactly where it says. There are no redirects, proxies, environment
variables, decompression or retries.
"""

from __future__ import annotations

import io
import logging
import re
import socket
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from typing import Any, Self, cast

from urllib3 import BaseHTTPResponse
from urllib3 import HTTPResponse as Response
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import HTTPError
from urllib3.util import SKIP_HEADER
from urllib3.util.wait import wait_for_read

from bridge.system import tls
from bridge.words import one_line

#: Far above answers to a probe, and above a signed certificate with thousands of SANs.
MAX_ANSWER_BYTES = 1 << 20
#: The limit for an answer's head, chunk lengths and trailers, together.
_SPARE_BYTES = 1 << 16
PIECE_BYTES = 1 << 16
#: The most idle connections to a server; the gateway has fewer threads.
_MOST_KEPT = 64

# urllib3 logs what it finds odd in an answer; for us it is an error, or no matter
logging.getLogger("urllib3").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A server's answer."""

    status: int
    #: Names in any case; repeated fields are one, with commas (RFC 9110 §5.3).
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(repr=False)


class Exchange:
    """
    The limits for a request that this thread sends within it, with its whole answer; or for a piece of an endless answer.

    A failure leaves it as an HttpsError, also below `requests`; others, such as a ValueError for a header of two lines, pass.
    """

    def __init__(self, seconds: float, longest: int = MAX_ANSWER_BYTES) -> None:
        self.seconds, self.longest = seconds, longest
        self.peer: tls.Peer | None = None  #: The request's server, once it began.
        self.was_kept = False  #: The request's connection had a whole answer before.
        self.status = 0  #: The status in the answer's head, once that was read.

    def __enter__(self) -> Self:
        self._began, self._received = time.monotonic(), 0
        self._token = _EXCHANGE.set(self)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        _EXCHANGE.reset(self._token)
        if isinstance(error, OSError | HTTPError | HTTPException | tls.HttpsError):
            cause = self._cause(error)
            if not isinstance(cause, tls.HttpsError):
                raise self._failure(cause) from cause

    def seconds_left(self) -> float:
        """How long the next system call may take (TimeoutError)."""
        left = self._began + self.seconds - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def count(self, received: int) -> None:
        """Count received bytes, of the head and of framing, too (TooLongError)."""
        self._received += received
        self.assert_allowed(self._received - _SPARE_BYTES)

    def assert_allowed(self, size: int) -> None:
        """Judge a body's size in bytes (TooLongError)."""
        if size > self.longest:
            raise tls.TooLongError(f"wanted an answer of at most {self.longest} bytes, found a longer one")

    def _cause(self, error: Exception) -> Exception:
        """The error that urllib3 and `requests` wrap into theirs, or the alert behind it."""
        for inner in (error.__cause__, *error.args):
            if isinstance(inner, Exception):
                return self._cause(inner)
        is_unexplained = tls.is_cut_off(error) and not self.status and not self.was_kept
        return (is_unexplained and self.peer and self.peer.alert(self._began)) or error

    def _failure(self, cause: Exception) -> tls.HttpsError:
        """Turn errors of Python and urllib3 into ours, in this one place."""
        failure = tls.failure_of(cause, self.seconds)
        if isinstance(cause, HTTPError | HTTPException) and not isinstance(cause, OSError):
            failure = tls.UnreachableError(f"wanted an answer in HTTP, found {one_line(cause, 80)}")
        if self.status and not isinstance(failure, tls.LateError):
            failure = tls.BrokenOffError("the answer broke off" + (f": {failure}" if str(cause) else ""))
            failure.status = self.status
        failure.was_kept = self.was_kept
        return failure


_EXCHANGE: ContextVar[Exchange] = ContextVar("_EXCHANGE")


# --- requests ---------------------------------------------------------------------------------------------------------


def pool(peer: tls.Peer) -> HTTPConnectionPool:
    """
    The connections to one server, for any number of threads; they are opened on demand and kept after a whole answer.

    Its `urlopen` is for calls within `Exchange`, and needs `preload_content=False`.
    """
    try:
        return _Pool(peer.host, peer.port, maxsize=_MOST_KEPT, peer=peer)
    except HTTPError as e:  # no valid host name
        raise tls.UnreachableError(one_line(e)) from e


def ask(
    connections: HTTPConnectionPool,
    method: str,
    target: str,
    headers: Mapping[str, str],
    body: bytes | None = None,
    *,
    seconds: float,
    longest: int = MAX_ANSWER_BYTES,
) -> Answer:
    """Send one request, and read its whole answer of any status (HttpsError: none; ValueError: the request is none)."""
    with Exchange(seconds, longest) as limits:
        response = begin(connections, method, target, headers, body)
        content = b"".join(response.stream(PIECE_BYTES))
        limits.assert_allowed(len(content))
    return Answer(status=response.status, headers=response.headers, body=content)


def begin(
    connections: HTTPConnectionPool, method: str, target: str, headers: Mapping[str, str], body: bytes | None = None
) -> BaseHTTPResponse:
    """Send a request, and read the head of its answer; decompressing the body could exceed the limit."""
    if not target.isascii() or not target.isprintable() or " " in target:  # urllib3 would quote it
        raise ValueError("wanted a target that is quoted")
    options = {"retries": False, "redirect": False, "preload_content": False, "decode_content": False}
    return connections.urlopen(method, target, body, headers, **options)


# --- below urllib3 ----------------------------------------------------------------------------------------------------


class _Connection(HTTPConnection):
    """A connection with or without TLS, which keeps the limits of the exchange that uses it."""

    def __init__(self, *, peer: tls.Peer, **options: Any) -> None:
        super().__init__(**options)
        self._peer = peer
        self.default_port = 80 if peer.tls is None else 443  # type: ignore[misc]

    def connect(self) -> None:
        """Open the socket, with TLS if the server has it."""
        self.sock = self._peer.connected(self._exchange.seconds_left())
        is_plain = self._peer.tls is None  # TLS has the records of a session to read
        if is_plain and wait_for_read(self.sock, 0) and self.sock.recv(1, socket.MSG_PEEK):
            self.close()
            raise HTTPException("an answer before the request")

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **options: Any) -> None:
        """Send a request whose headers have one line each; urllib3's own name is not among them."""
        if not all(isinstance(value, str) and f"{name}{value}".isprintable() for name, value in headers.items()):
            raise ValueError("wanted headers of one line each")
        self._exchange = _EXCHANGE.get()
        self._exchange.peer, self._exchange.was_kept = self._peer, self.sock is not None
        super().request(method, url, body, {"User-Agent": SKIP_HEADER, **headers}, **options)

    def send(self, data: Any) -> None:
        """Send all bytes within the time limit."""
        if self.sock is None:
            self.connect()
        unsent = memoryview(data)
        while unsent:
            self.sock.settimeout(self._exchange.seconds_left())
            unsent = unsent[self.sock.send(unsent) :]

    def response_class(self, opened: socket.socket, *_: Any, method: str | None = None) -> HTTPResponse:  # type: ignore[override]
        """Have http.client read from the socket by `_Received`."""
        self._received = _Received(self, opened, self._exchange)
        return HTTPResponse(cast(socket.socket, self._received), method=method)

    def getresponse(self) -> Response:  # type: ignore[override]
        """Read an answer's head, and judge what it says about the body, of which two readers must find the same end."""
        response = super().getresponse()
        response.headers.discard("content-encoding")  # `requests` would decompress without a limit
        coding, lengths = response.headers.get("transfer-encoding"), response.headers.getlist("content-length")
        is_clear = (coding or "chunked").lower() == "chunked" and all(map(_LENGTH.fullmatch, lengths))
        if (
            response.status < HTTPStatus.OK or not is_clear
        ):  # http.client would read the answer after 103 as another request's
            response.close()
            raise HTTPException(f"status {response.status}, transfer encoding {coding}, length {lengths}")
        self._exchange.status = response.status
        self._received.begin_body(may_end=coding is None and response.length_remaining is None)
        return response


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


#: The lines of an answer (RFC 9112), which `http.client` reads more leniently than others: an integer may have a sign
#: and underscores there, a line may end at a CR alone, and fields may end at a line that is none.
_STATUS = re.compile(rb"HTTP/1\.[0-9] +[1-9][0-9]{2}(?: [^\r\n]*)?\r?\n")
_FIELD = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*)?\r?\n")
_CHUNK = re.compile(rb"[0-9A-Fa-f]{1,15}[ \t]*(?:;[^\r\n\0]*)?\r\n")
_LENGTH = re.compile("[ \t]*[0-9]{1,18}[ \t]*")
_ENDS = (b"\r\n", b"\n")


class _Received(io.BufferedReader):
    """The bytes of one answer, from which `http.client` reads; it checks lines, and parses nothing."""

    def __init__(self, connection: _Connection, opened: socket.socket, limits: Exchange) -> None:
        self._connection, self._opened, self._source = connection, opened, _Source(opened, limits)
        super().__init__(self._source, PIECE_BYTES)
        self._first, self._before = _STATUS, _ENDS[0]

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the stream itself, instead of a socket's file."""
        del mode
        return self

    def begin_body(self, *, may_end: bool) -> None:
        """From now on read chunks, or until the end of the connection, if it `may_end` the answer."""
        self._first, self._before, self._source.may_end = _CHUNK, _ENDS[0], may_end

    def readline(self, size: int | None = -1, /) -> bytes:
        """Read the first line of a head, or of a chunk (after a line end, as which `http.client` takes any two bytes), or a field."""
        line = super().readline(size)
        if not (self._first if self._before in _ENDS else _FIELD).fullmatch(line):
            raise HTTPException(f"{line[:40]!r} in the {'head' if self._first is _STATUS else 'body'}")
        self._before = line
        return line

    def read(self, size: int | None = -1, /) -> bytes:
        """Read a part of the body, or the end of a chunk."""
        self._before = super().read(size)
        return self._before

    def flush(self) -> None:
        """Do nothing, also if it is closed: `http.client` flushes a source that the garbage collector closed first."""

    def close(self) -> None:
        """End the answer; close its connection if anything followed."""
        self._source.is_over = True
        has_more = not self.closed and (self.peek(1) or getattr(self._opened, "pending", int)())  # within TLS
        if has_more and self._connection.sock is self._opened:
            self._connection.close()
        super().close()


class _Source(io.RawIOBase):
    """A socket's bytes, within the limits."""

    may_end = False  #: The end of the connection is the end of the answer.
    is_over = False  #: Nothing more is received.

    def __init__(self, opened: socket.socket, limits: Exchange) -> None:
        self._opened, self._limits, self._file = (
            opened,
            limits,
            opened.makefile("rb", buffering=0),
        )  # which keeps it open

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.is_over:
            return None
        self._opened.settimeout(self._limits.seconds_left())
        received = self._file.readinto(buffer) or 0
        if not received and not self.may_end:
            raise ConnectionResetError("" if self._limits.status else "no answer")
        self._limits.count(received)
        return received

    def close(self) -> None:
        self._file.close()
        super().close()
