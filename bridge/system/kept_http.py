"""
HTTP/1.1 over one connection that is kept: for thousands of small requests to one server.

`http.client` and what is built upon it take several times the processor time of the request itself. One request is
under way at a time; it has one limit of time for all of it. No redirects, no proxies, nothing of the environment; no
request is repeated here.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_PIECE_BYTES = 1 << 16
_MOST_HEAD_BYTES = 1 << 16
_CONTINUE, _NO_CONTENT, _NOT_MODIFIED, _FINAL = 100, 204, 304, 200
_HIGHEST_STATUS = 599
_LONGEST_SIZE_DIGITS = 16


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
    """What a server answered."""

    status: int
    headers: Mapping[str, str] = field(repr=False)  #: By name in small letters; the last of several.
    body: bytes = field(repr=False)


class KeptConnection:
    """To one server; from one thread at a time."""

    def __init__(self, connect: Callable[[], socket.socket], host: str) -> None:
        """
        Args:
            connect: Makes the connection, with TLS if there is to be any.
            host: For the header `Host`, with the port.
        """
        self._connect = connect
        self._host = host
        self._socket: socket.socket | None = None
        self._buffer = b""
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
            return self._answer(opened, method, deadline, longest)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connection; the next request makes another one."""
        opened, self._socket, self._buffer = self._socket, None, b""
        if opened is not None:
            with contextlib.suppress(OSError):
                opened.close()

    def _opened(self) -> socket.socket:
        if self._socket is not None and _has_ended(self._socket):
            self.close()
        self.is_kept = self._socket is not None
        if self._socket is None:
            self._socket = self._connect()
        return self._socket

    # --- the answer -------------------------------------------------------------------------------------------------

    def _answer(self, opened: socket.socket, method: str, deadline: float, longest: int) -> Answer:
        while True:
            head = self._until(b"\r\n\r\n", opened, deadline, _MOST_HEAD_BYTES)
            version, status, headers = _head(head)
            if status >= _FINAL:
                break
        try:
            body, has_length = self._body(method, status, headers, opened, deadline, longest)
        except TimeoutError:
            raise
        except (OSError, NotHttpError) as e:
            raise BrokenOffError(str(e) or type(e).__name__, status) from e
        is_kept = version == b"HTTP/1.1" and has_length and headers.get("connection", "").lower() != "close"
        if self._buffer or not is_kept:  # what nobody has asked for is nobody's answer
            self.close()
        return Answer(status=status, headers=headers, body=body)

    def _body(
        self, method: str, status: int, headers: Mapping[str, str], opened: socket.socket, deadline: float, longest: int
    ) -> tuple[bytes, bool]:
        """The body, and whether its end is not that of the connection (RFC 9112 §6.3)."""
        if method == "HEAD" or status in {_NO_CONTENT, _NOT_MODIFIED}:
            return b"", True
        if "transfer-encoding" in headers:
            if headers["transfer-encoding"].lower() != "chunked":
                raise NotHttpError("a transfer encoding besides chunked")
            return self._chunks(opened, deadline, longest), True
        if "content-length" in headers:
            return self._exactly(_size(headers["content-length"], 10), opened, deadline, longest), True
        return self._rest(opened, deadline, longest), False

    def _until(self, end: bytes, opened: socket.socket, deadline: float, longest: int) -> bytes:
        """What comes before `end`, which is taken away, too."""
        while (at := self._buffer.find(end)) < 0:
            if len(self._buffer) > longest:
                raise NotHttpError("a line or a head without end")
            self._buffer += self._more(opened, deadline)
        found, self._buffer = self._buffer[:at], self._buffer[at + len(end) :]
        return found

    def _exactly(self, size: int, opened: socket.socket, deadline: float, longest: int) -> bytes:
        if size > longest:
            raise TooLongError(f"wanted an answer of at most {longest} bytes, found a longer one")
        pieces, missing = [self._buffer], size - len(self._buffer)
        while missing > 0:
            pieces.append(self._more(opened, deadline))
            missing -= len(pieces[-1])
        whole = b"".join(pieces) if len(pieces) > 1 else self._buffer
        self._buffer = whole[size:]
        return whole[:size]

    def _chunks(self, opened: socket.socket, deadline: float, longest: int) -> bytes:
        found, total = [], 0
        while True:
            size = _size(
                self._until(b"\r\n", opened, deadline, _MOST_HEAD_BYTES).partition(b";")[0].decode("latin-1"), 16
            )
            if not size:
                break
            total += size
            if total > longest:
                raise TooLongError(f"wanted an answer of at most {longest} bytes, found a longer one")
            piece = self._exactly(size + 2, opened, deadline, size + 2)
            if not piece.endswith(b"\r\n"):
                raise NotHttpError("a chunk of another size than was told")
            found.append(piece[:-2])
        while self._until(b"\r\n", opened, deadline, _MOST_HEAD_BYTES):  # trailers
            pass
        return b"".join(found)

    def _rest(self, opened: socket.socket, deadline: float, longest: int) -> bytes:
        """All until the server ends the connection, which over TLS it has to say."""
        found, self._buffer = bytearray(self._buffer), b""
        while piece := _received(opened, deadline):
            found += piece
            if len(found) > longest:
                break
        if len(found) > longest:
            raise TooLongError(f"wanted an answer of at most {longest} bytes, found a longer one")
        return bytes(found)

    def _more(self, opened: socket.socket, deadline: float) -> bytes:
        found = _received(opened, deadline)
        if not found:
            raise NotHttpError("the connection ended before there was a whole answer")
        return found


def _received(opened: socket.socket, deadline: float) -> bytes:
    opened.settimeout(_left(deadline))
    return opened.recv(_PIECE_BYTES)


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


def _head(head: bytes) -> tuple[bytes, int, dict[str, str]]:
    first, *lines = head.split(b"\r\n")
    version, _, rest = first.partition(b" ")
    code = rest[:3]
    if version not in {b"HTTP/1.1", b"HTTP/1.0"} or not code.isdigit() or rest[3:4] not in {b"", b" "}:
        raise NotHttpError("no status line")
    status = int(code)
    if not _CONTINUE <= status <= _HIGHEST_STATUS:
        raise NotHttpError("no status of HTTP")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon or not name or name != name.strip():
            raise NotHttpError("a header without a name")
        key, value = name.lower(), value.strip(" \t")
        if key == "content-length" and headers.get(key, value) != value:
            raise NotHttpError("two lengths")
        headers[key] = value
    return version, status, headers


def _size(text: str, base: int) -> int:
    text = text.strip(" \t")
    if not text.isalnum() or len(text) > _LONGEST_SIZE_DIGITS:
        raise NotHttpError("a length that is none")
    try:
        return int(text, base)
    except ValueError:
        raise NotHttpError("a length that is none") from None
