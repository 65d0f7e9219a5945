"""
HTTP/1.1 over one connection that is kept: for thousands of small requests to one server.

An answer is read by `http.client`; what it does not have is here: one limit of time for all of a request, a limit of
length, and that no request gets what was left of another one's answer. One request is under way at a time. No
redirects, no proxies, nothing of the environment; no request is repeated here.
"""

from __future__ import annotations

import contextlib
import io
import select
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


_PIECE_BYTES = 1 << 16


class NotHttpError(ValueError):
    """The answer is not HTTP/1.1, or ended too early."""


class BrokenOffError(NotHttpError):
    """The answer's head was there, and its body ended too early."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class TooLongError(ValueError):
    """The answer is longer than whoever asks wants it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A server's answer."""

    status: int
    headers: Mapping[str, str] = field(repr=False)  #: By name in small letters; the last of several.
    body: bytes = field(repr=False)


def connect(host: str, port: int, tls: ssl.SSLContext | None, server_name: str, seconds: float) -> socket.socket:
    """
    A new connection that small requests are not held back on, in TLS if there is a context for it.

    Args:
        host: Name or address.
        port: TCP.
        tls: The client's; None: without TLS.
        server_name: For SNI and in the server's certificate.
        seconds: For each step; a name may have many addresses, and what the resolver takes has no limit.

    Raises:
        OSError: There is none (`ssl.SSLError`, `TimeoutError` among them).
    """
    raw = socket.create_connection((host, port), seconds)
    try:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is None:
            return raw
        raw.getpeername()  # of one that was reset by now, Python's wrapper would be left open (SSLSocket._create)
        # Not even an end without TLS's own word is one: somebody may have cut the answer short.
        return tls.wrap_socket(raw, server_hostname=server_name, suppress_ragged_eofs=False)
    except BaseException:
        raw.close()
        raise


class KeptConnection:
    """A connection to one server, made when it is needed; for one thread at a time."""

    def __init__(self, connect: Callable[[], socket.socket], host: str) -> None:
        """
        Args:
            connect: Makes the connection, with TLS if there is to be any.
            host: For the header `Host`, with the port.
        """
        self._connect = connect
        self._host = host
        self._socket: socket.socket | None = None
        self.is_kept = False  #: The latest request went over a connection that was in use before.

    def ask(
        self, method: str, target: str, headers: str, body: bytes | None, *, seconds: float, longest: int
    ) -> Answer:
        """
        One request; any status is an answer.

        Args:
            method: HTTP's.
            target: Path and query, quoted.
            headers: Whole lines, each with its CRLF.
            body: Of the request.
            seconds: For all of it; how long connecting takes at most is for `connect` to see to.
            longest: Bytes of the answer's body.

        Raises:
            OSError: The connection failed or ended (`ssl.SSLError`, `TimeoutError` among them).
            NotHttpError: It is no answer, or ended before it was whole.
            TooLongError: The answer is longer.
        """
        if not target.isascii() or not target.isprintable() or " " in target:
            raise ValueError("wanted a target that is quoted")
        length = f"Content-Length: {len(body)}\r\n" if body is not None else ""
        head = f"{method} {target} HTTP/1.1\r\nHost: {self._host}\r\nAccept-Encoding: identity\r\n{headers}{length}\r\n"
        deadline = time.monotonic() + seconds
        try:
            opened = self._opened()
            opened.settimeout(_left(deadline))
            opened.sendall(head.encode("latin-1") + (body or b""))
            return self._answer(_Stream(opened, deadline), method, longest)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connection; the next request makes another one."""
        opened, self._socket = self._socket, None
        if opened is not None:
            with contextlib.suppress(OSError):
                opened.close()

    __del__ = close  # of a thread that has ended

    def _opened(self) -> socket.socket:
        if self._socket is not None and _has_ended(self._socket):
            self.close()
        self.is_kept = self._socket is not None
        if self._socket is None:
            self._socket = self._connect()
        return self._socket

    def _answer(self, stream: _Stream, method: str, longest: int) -> Answer:
        response = HTTPResponse(cast(socket.socket, stream), method=method)
        try:
            response.begin()
        except HTTPException as e:
            raise NotHttpError(str(e) or type(e).__name__) from e
        if response.headers.get("transfer-encoding", "chunked").lower() != "chunked":
            raise NotHttpError("a transfer encoding besides chunked")
        try:
            body = _body(response, longest)
        except TimeoutError:
            raise
        except (OSError, HTTPException) as e:
            raise BrokenOffError(str(e) or type(e).__name__, response.status) from e
        if response.will_close or stream.has_more():  # what nobody has asked for is nobody's answer
            self.close()
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Answer(status=response.status, headers=headers, body=body)


def _body(response: HTTPResponse, longest: int) -> bytes:
    """
    Raises:
        OSError: The connection failed, or ended before there was a whole answer.
        HTTPException: It ended within a chunk, or chunks are none.
        TooLongError: It is longer.
    """
    body = b"" if (response.length or 0) > longest else response.read(longest + 1)
    if len(body) > longest or (response.length or 0) > longest:
        raise TooLongError(f"wanted an answer of at most {longest} bytes, found a longer one")
    if response.length:
        raise HTTPException("the connection ended before there was a whole answer")
    return body


class _Stream(io.BufferedReader):
    """The stream that `http.client` reads of a socket: with a limit of time, and not closed by whoever has read an answer."""

    def __init__(self, opened: socket.socket, deadline: float) -> None:
        self._timed = _TimedReader(opened, deadline)
        super().__init__(self._timed, _PIECE_BYTES)

    def makefile(self, mode: str) -> io.BufferedReader:
        """The stream itself, in the place of a socket's file."""
        del mode
        return self

    def close(self) -> None:
        """The connection is kept."""

    def has_more(self) -> bool:
        """Whether more was received than was read."""
        self._timed.is_over = True
        return bool(self.peek(1))


class _TimedReader(io.RawIOBase):
    def __init__(self, opened: socket.socket, deadline: float) -> None:
        self._opened = opened
        self._deadline = deadline
        self.is_over = False  #: Nothing more is received.

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        if self.is_over:
            return None
        self._opened.settimeout(_left(self._deadline))
        return self._opened.recv_into(buffer)


def _left(deadline: float) -> float:
    """Seconds until then."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _has_ended(opened: socket.socket) -> bool:
    """Whether the other side has ended it, or sent what nobody has asked for."""
    if isinstance(opened, ssl.SSLSocket) and opened.pending():
        return True
    poll = select.poll()
    poll.register(opened, select.POLLIN)
    return bool(poll.poll(0))
