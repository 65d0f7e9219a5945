"""
HTTP/1.1 for the cluster's API, components, neighbours and CAs: urllib3's pools, heads and framing, on a connection of ours.

The connection limits a whole exchange (connecting, TLS, request, answer) in time, and its answer in bytes, below the
parser. It is kept only if an answer ends exactly where it says. There are no redirects, proxies, environment variables,
keys on disk, decompression or retries; `urlopen` of a `pool` is for calls within `exchange`:

    with exchange(5):
        response = pool(peer).urlopen("GET", "/", retries=False, redirect=False, preload_content=False)
        body = response.read()
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any, ClassVar, cast
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import HTTPError
from urllib3.util import SKIP_HEADER

from bridge.errors import BridgeError, Exit
from bridge.pki.budget import Budget
from bridge.pki.certificates import UNREADABLE, load_pem_certificates
from bridge.system.waiting import within
from bridge.words import one_line

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from urllib3.response import BaseHTTPResponse
    from urllib3.response import HTTPResponse as Response

#: Far above answers to a probe, and above a signed certificate with thousands of SANs.
MAX_ANSWER_BYTES = 1 << 20
#: The limit for an answer's head, chunk lengths and trailers, together.
_SPARE_BYTES = 1 << 16
_PIECE_BYTES = 1 << 16
#: The most idle connections to a server; the gateway has fewer threads.
_MOST_KEPT = 64

#: Alerts (RFC 8446 §6) by which a server rejects a client certificate, as OpenSSL spells them.
_TURNED_AWAY = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")
#: Ends of a connection that may have any cause.
_CUT_OFF = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError, BrokenPipeError)

# urllib3 logs what it finds odd in an answer; for us it is an error, or no matter
logging.getLogger("urllib3").setLevel(logging.CRITICAL)


class HttpsError(BridgeError):
    """The request failed, for whatever reason."""

    exit_code: ClassVar[int] = Exit.UNAVAILABLE
    was_kept = False  #: The connection had a whole answer before, so that the server may just have closed it.


class UnreachableError(HttpsError):
    """No connection, one that ended early, or an answer that is no HTTP; the text is the operating system's or OpenSSL's."""


class LateError(UnreachableError):
    """The answer did not come in time."""


class BrokenOffError(UnreachableError):
    """The answer's head arrived, but its body ended too early."""

    status = 0  #: The status in the head.


class HandshakeError(UnreachableError):
    """TLS failed, for a reason other than a certificate."""


class UntrustedError(HttpsError):
    """The server's certificate does not lead to the trust anchors, or is not for this name."""


class ClientRefusedError(HttpsError):
    """The server rejected the client certificate (TLS), or certificate and key can't be used here."""


class TooLongError(HttpsError):
    """The server's answer exceeds the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A server's answer."""

    status: int
    #: By lower-case name; of repeated fields the last.
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server, and how to connect to it."""

    host: str  #: Host name or address.
    port: int
    tls: Callable[[], ssl.SSLContext] | None = None  #: Makes the client's context; None: without TLS.
    server_name: str | None = None  #: For SNI and the server's certificate, if it differs from the host.
    alert_seconds: float = 0.0  #: How long to listen for why a connection broke, see `_alert`; 0: do not.
    #: When `_alert` last listened, and the alert that it got.
    heard: list[tuple[float, ssl.SSLError | None]] = field(default_factory=list, compare=False, repr=False)
    listens: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @classmethod
    def of(cls, url: str, tls: Callable[[], ssl.SSLContext] | None, **more: Any) -> Peer:
        """The server of a URL: `https:` with this TLS, or `http:`; UnreachableError: the URL is invalid."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or parts.scheme not in {"https", "http"}:
            raise UnreachableError(f"wanted a URL, found {one_line(url)!r}")
        usual, secured = (443, tls) if parts.scheme == "https" else (80, None)
        return cls(host=host, port=port or usual, tls=secured, **more)


def served(peer: Peer, seconds: float) -> x509.Certificate:
    """The leaf that a server presents in a handshake (HttpsError: none); no request is sent."""
    try:
        with _connected(peer, seconds) as opened:
            der = opened.getpeercert(binary_form=True) if isinstance(opened, ssl.SSLSocket) else None
    except (OSError, ValueError) as e:
        raise _as_ours(e, seconds) from e
    if der is None:
        raise UnreachableError("wanted a server certificate, found none")
    try:
        return x509.load_der_x509_certificate(der)
    except UNREADABLE as e:  # OpenSSL accepts more than RFC 5280 allows
        raise UntrustedError(f"wanted a server certificate that can be read, found: {one_line(e, 80)}") from None


def reach(url: str, seconds: float) -> None:
    """Connect to a URL's host and port without sending anything (UnreachableError)."""
    try:
        _connected(Peer.of(url, None), seconds).close()
    except OSError as e:
        raise _as_ours(e, seconds) from e


def context(trust_pem: bytes | None, certificate_pem: bytes | None, key_pem: bytes | None) -> ssl.SSLContext:
    """
    A TLS client's context; the key stays in memory. Without anchors any server passes, and the caller checks it.
    UntrustedError: an anchor can't be read; ClientRefusedError: our certificate or key can't be used.
    """
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.set_alpn_protocols(["http/1.1"])
    if trust_pem is None:
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE
    else:
        tls.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        try:
            anchors = [certificate.public_bytes(Encoding.DER) for certificate in load_pem_certificates(trust_pem)]
        except ValueError as e:
            raise UntrustedError(f"wanted a trust anchor, found {e}") from e
        tls.load_verify_locations(cadata=b"".join(anchors))
    if certificate_pem is not None:
        _load_pair(tls, certificate_pem, key_pem or b"")
    return tls


def _load_pair(tls: ssl.SSLContext, certificate_pem: bytes, key_pem: bytes) -> None:
    """Load the pair through a path to memory, since OpenSSL reads only from paths."""
    with os.fdopen(os.memfd_create("pair"), "wb") as file:
        file.write(certificate_pem.rstrip() + b"\n" + key_pem)
        file.flush()
        try:
            # a wrong password, since OpenSSL would ask the terminal for an encrypted key's
            tls.load_cert_chain(f"/proc/self/fd/{file.fileno()}", password="")
        except ssl.SSLError as e:
            found = (e.reason or "something else").replace("_", " ").lower()
            raise ClientRefusedError(f"wanted a certificate and its key, found: {found}") from None


# --- requests ---------------------------------------------------------------------------------------------------------


def pool(peer: Peer) -> HTTPConnectionPool:
    """
    The connections to one server, for any number of threads; they are opened on demand and kept after a whole answer.

    Its `urlopen` needs `preload_content=False`, and leaves the connection to the answer until that is read or closed.
    """
    try:
        return _Pool(peer.host, peer.port, maxsize=_MOST_KEPT, peer=peer)
    except HTTPError as e:  # no valid host name
        raise UnreachableError(one_line(e)) from e


@contextlib.contextmanager
def exchange(seconds: float, longest: int = MAX_ANSWER_BYTES) -> Iterator[None]:
    """
    Limit each request that this thread begins meanwhile, with its whole answer; a failure is an HttpsError, also below
    `requests` (other errors, such as ValueError for a header of two lines, pass).
    """
    token = _LIMITS.set(_Limits(seconds, longest))
    try:
        yield
    except (OSError, HTTPError, HTTPException) as e:
        cause = _innermost(e)
        raise _as_ours(cause, seconds) from cause
    finally:
        _LIMITS.reset(token)


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
    with exchange(seconds, longest):
        response = _begun(connections, method, target, headers, body, seconds)
        content = response.read()
    if len(content) > longest:
        raise _too_long(longest)
    fields = {name.lower(): value for name, value in response.headers.items()}
    return Answer(status=response.status, headers=fields, body=content)


def _begun(
    connections: HTTPConnectionPool,
    method: str,
    target: str,
    headers: Mapping[str, str],
    body: bytes | None,
    seconds: float,
) -> BaseHTTPResponse:
    if not target.isascii() or not target.isprintable() or " " in target:  # urllib3 would quote it
        raise ValueError("wanted a target that is quoted")
    return connections.urlopen(
        method, target, body, headers, retries=False, redirect=False, timeout=seconds, preload_content=False
    )


class Stream:
    """The answer to a GET whose body is read in pieces as it arrives; the caller closes it."""

    def __init__(
        self, connections: HTTPConnectionPool, target: str, headers: Mapping[str, str], *, seconds: float
    ) -> None:
        """Send the request, and read the head of its answer (HttpsError)."""
        with exchange(seconds, _PIECE_BYTES):
            self._response = _begun(connections, "GET", target, headers, None, seconds)
        connection = cast(_Connection, self._response.connection)
        self.status = self._response.status
        self._limits, self._socket = connection.limits, connection.opened

    def rest(self) -> bytes:
        """The whole body of a short answer, such as an error."""
        return self._response.read()

    def go_on(self, silence_seconds: float) -> None:
        """From now on allow an answer of any length, and limit only silence."""
        self._limits.seconds = self._limits.silence = silence_seconds

    def piece(self) -> bytes:
        """The next piece; empty: the end (UnreachableError: the connection broke, or was silent for too long)."""
        try:
            return self._response.read1(_PIECE_BYTES)
        except (HTTPError, HTTPException, OSError, ValueError) as e:  # ValueError: another thread closed it
            raise UnreachableError("the answer broke off") from e

    def end(self) -> None:
        """End the connection from another thread; a thread that is reading wakes up and gets no more."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # SSLSocket's would go on without TLS

    def close(self) -> None:
        """End the connection."""
        self._response.close()


# --- limits -----------------------------------------------------------------------------------------------------------


class _Limits:
    """How long an exchange may take, and how many bytes its answer may have, including head and framing."""

    def __init__(self, seconds: float, longest: int) -> None:
        self.seconds, self.longest, self.began = seconds, longest, time.monotonic()
        self._budget = Budget(longest + _SPARE_BYTES, seconds=seconds, clock=time.monotonic)
        self.silence: float | None = None  #: In seconds; if set, it is the only limit.

    def seconds_left(self) -> float:
        left = self._budget.seconds_left() if self.silence is None else self.silence
        if left <= 0:
            raise TimeoutError
        return left

    def hold(self, opened: socket.socket) -> None:
        """Set a socket's time limit to the remaining time, rounded to a hundredth of the whole."""
        # each change is a system call during which Python lets all other threads run, and a request has ten of them
        left, now = self.seconds_left(), opened.gettimeout()
        if not now or abs(now - left) > self.seconds / 100:
            opened.settimeout(left)

    def count(self, received: int) -> None:
        """Count received bytes below the parser."""
        if self.silence is None and not self._budget.allows(received):
            raise _too_long(self.longest)

    def assert_allowed(self, announced: int) -> None:
        """Raise TooLongError for an announced length, for which Python would reserve memory."""
        if self.silence is None and announced > self.longest:
            raise _too_long(self.longest)


_LIMITS: ContextVar[_Limits] = ContextVar("_LIMITS")


def _too_long(longest: int) -> TooLongError:
    return TooLongError(f"wanted an answer of at most {longest} bytes, found a longer one")


# --- the connection ---------------------------------------------------------------------------------------------------


class _Connection(HTTPConnection):
    """A connection with or without TLS; what it raises are our errors."""

    limits: _Limits
    opened: socket.socket  #: The last socket, also after `close`.
    status = 0  #: Of the current answer, once its head was read.

    def __init__(self, *, peer: Peer, **options: Any) -> None:
        super().__init__(**options)
        self._peer = peer
        self._received: _Received | None = None  # the answer to the current request
        self.default_port = 80 if peer.tls is None else 443  # type: ignore[misc]
        self.is_kept = False  #: It had a whole answer before.

    def connect(self) -> None:
        """Open the socket, with TLS if the server has it."""
        self.is_kept = False
        try:
            self.sock = self.opened = _connected(self._peer, self.limits.seconds_left())
        except OSError as e:
            raise (failure := self.failure(e)) from failure.__cause__

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **options: Any) -> None:
        """Send a request; a body is never decoded, and there is no User-Agent unless the caller gives one."""
        if options.pop("preload_content", True):
            raise ValueError("wanted preload_content=False")  # or the body would be read before the head is judged
        self.limits, self.status = _LIMITS.get(), 0
        given = {name: value for name, value in (headers or {}).items() if name.lower() != "accept-encoding"}
        if "user-agent" not in map(str.lower, given):
            given["User-Agent"] = SKIP_HEADER
        super().request(method, url, body, given, preload_content=False, **options)

    def putheader(self, header: Any, *values: Any) -> None:
        """Add a header of one line."""
        for value in (header, *values):
            if not (value.decode("latin-1") if isinstance(value, bytes) else str(value)).isprintable():
                raise ValueError("wanted headers of one line each")
        super().putheader(header, *values)

    def send(self, data: Any) -> None:
        """Send all bytes within the time limit."""
        if self.sock is None:
            self.connect()
        unsent = memoryview(data)
        try:
            while unsent:
                self.limits.hold(self.sock)
                unsent = unsent[self.sock.send(unsent) :]
        except OSError as e:
            raise (failure := self.failure(e)) from failure.__cause__

    def response_class(self, opened: socket.socket, *_: Any, method: str | None = None) -> HTTPResponse:  # type: ignore[override]
        """Have http.client read from the socket by `_Received`."""
        self._received = _Received(self, opened)
        return HTTPResponse(cast(socket.socket, self._received), method=method)

    def getresponse(self) -> Response:  # type: ignore[override]
        """Read an answer's head, and judge what it says about the body."""
        try:
            response = super().getresponse()
            received, answer = self._received, response._original_response  # noqa: SLF001
            assert received is not None and answer is not None  # noqa: S101, PT018 (of this request)
            received.judge(answer)
        except BaseException:
            if self._received is not None:
                self._received.close()
            raise
        response.headers.discard("content-encoding")  # `requests` would decompress without a limit
        return response

    def failure(self, error: Exception) -> HttpsError:
        """Our error for a failure of this connection, with its cause."""
        failure = _as_ours(error, self.limits.seconds)
        if self.status and not isinstance(failure, LateError):
            failure = BrokenOffError("the answer broke off" + (f": {failure}" if str(error) else ""))
            failure.status = self.status
        elif is_cut_off(error) and not self.is_kept:
            failure = _alert(self._peer, self.limits.began) or failure
        failure.was_kept = self.is_kept
        failure.__cause__ = failure.__cause__ or error
        return failure


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


#: The lines of an answer (RFC 9112), which `http.client` reads more leniently than others: an integer may have a sign
#: and underscores there, a line may end at a CR alone, and fields may end at a line that is none.
_STATUS = re.compile(rb"HTTP/1\.[0-9] +[1-9][0-9]{2}(?: [^\r\n]*)?\r?\n")
_FIELD = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*)?\r?\n")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n\0]*)?\r\n")
_TRAILER = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*)?\r\n")
_NO_LINE = re.compile(rb"(?!)")
_BLANK = (b"\r\n", b"\n")
_LENGTH = re.compile("[ \t]*([0-9]{1,18})[ \t]*")
_OK = 200


class _Received(io.BufferedReader):
    """The bytes of one answer, from which `http.client` reads; it checks lines and lengths, and parses nothing."""

    def __init__(self, connection: _Connection, opened: socket.socket) -> None:
        self._connection, self._opened, self._limits = connection, opened, connection.limits
        self._expects = _STATUS  # the next line
        self._left: int | None = None  # how many bytes of the body, or of a chunk, were not read yet
        self._source = _Source(connection, opened)
        super().__init__(self._source, _PIECE_BYTES)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the stream itself, instead of a socket's file."""
        del mode
        return self

    def judge(self, answer: HTTPResponse) -> None:
        """Judge a head, and begin with the body."""
        lengths, codings = (answer.msg.get_all(name, []) for name in ("content-length", "transfer-encoding"))
        values = {match[1] if (match := _LENGTH.fullmatch(value)) else None for value in lengths}
        if answer.status < _OK:  # http.client would read the answer after it as another request's
            raise self._connection.failure(HTTPException(f"interim status {answer.status}"))
        if codings and (len(codings) > 1 or not answer.chunked):
            raise UnreachableError("wanted no transfer encoding besides chunked, found one")
        if len(values) > 1 or None in values:  # or two readers find two ends of the body
            raise self._connection.failure(HTTPException("a length that is none"))
        self._limits.assert_allowed(answer.length or 0)
        self._connection.status, self._left = answer.status, answer.length
        self._expects = _CHUNK if answer.chunked else _NO_LINE
        self._source.may_end = self._left is None and not answer.chunked

    def readline(self, size: int | None = -1, /) -> bytes:
        """Read a line of the head, a chunk's length, or a trailer."""
        line = super().readline(size)
        if (match := self._expects.fullmatch(line)) is None:
            raise self._connection.failure(
                HTTPException(f"{line[:40]!r}{'' if self._connection.status else ' in the head'}")
            )
        if self._expects is _CHUNK:
            self._left = int(match[1], 16)
            self._limits.assert_allowed(self._left)
            self._expects = _CHUNK if self._left else _TRAILER
        elif self._expects is _STATUS:
            self._expects = _FIELD
        elif line in _BLANK:
            self._expects = _NO_LINE if self._expects is _TRAILER else _STATUS
        return line

    def read(self, size: int | None = -1, /) -> bytes:
        """Read a part of the body, or the end of a chunk."""
        return self._counted(super().read(size))

    def read1(self, size: int = -1, /) -> bytes:
        """Read a part of the body that has arrived."""
        return self._counted(super().read1(size))

    def _counted(self, data: bytes) -> bytes:
        if self._expects is _CHUNK and self._left == 0:
            if data != _BLANK[0]:
                raise self._connection.failure(HTTPException(f"{data!r} after a chunk"))
            self._left = None
        elif self._left is not None:
            self._left -= len(data)
        return data

    def flush(self) -> None:
        """Do nothing, also if it is closed: `http.client` flushes a source that the garbage collector closed first."""

    def close(self) -> None:
        """End the answer; close its connection, unless this is exactly where the answer ends."""
        if self.closed:
            return
        self._source.is_over = True
        is_whole = self._expects is _NO_LINE and self._left == 0
        has_more = bool(self.peek(1)) or (isinstance(self._opened, ssl.SSLSocket) and self._opened.pending() > 0)
        super().close()
        if self._connection.sock is self._opened:
            self._connection.is_kept = is_whole and not has_more
            if not self._connection.is_kept:
                self._connection.close()


class _Source(io.RawIOBase):
    """A socket's bytes, within the limits."""

    may_end = False  #: The end of the connection is the end of the answer.
    is_over = False  #: Nothing more is received.

    def __init__(self, connection: _Connection, opened: socket.socket) -> None:
        self._connection, self._opened, self._limits = connection, opened, connection.limits
        self._file = opened.makefile("rb", buffering=0)  # keeps the socket open

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        if self.is_over:
            return None
        try:
            self._limits.hold(self._opened)
            received = self._file.readinto(buffer) or 0
            if not received and not self.may_end:
                raise ConnectionResetError("" if self._connection.status else "no answer")
        except OSError as e:
            raise (failure := self._connection.failure(e)) from failure.__cause__
        self._limits.count(received)
        return received

    def close(self) -> None:
        self._file.close()
        super().close()


class TlsSocket(ssl.SSLSocket):
    """Closes also if the peer reset it before the handshake, when `SSLSocket._create` reads from it and leaves it open."""

    __del__ = ssl.SSLSocket.close  # an error's frames may release it before the connection that holds it

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Receive bytes; a reset ends the connection."""
        try:
            return super().recv(buflen, flags)
        except ConnectionError:
            self.close()
            raise


def _connected(peer: Peer, seconds: float) -> socket.socket:
    """Open a connection without Nagle's delay for small requests; any OSError: it failed."""

    def connect() -> socket.socket:
        tls = None if peer.tls is None else peer.tls()
        raw = socket.create_connection((peer.host, peer.port), seconds)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is None:
                return raw
            tls.sslsocket_class = TlsSocket
            name = peer.server_name or peer.host
            # an end without close_notify is an error, too: the answer may be cut short; Python 3.11.2 sets the option
            tls.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
            return tls.wrap_socket(raw, server_hostname=name, suppress_ragged_eofs=False)
        except BaseException:
            raw.close()
            raise

    try:
        return within(seconds, connect)
    except UnicodeError as e:  # no valid host name
        raise OSError(one_line(e)) from e


def _alert(peer: Peer, since: float) -> HttpsError | None:
    """
    The TLS alert that a broken connection may have swallowed, read from a new connection on which nothing is sent.

    It listens once for all requests that were in progress then, each of which would wait as long.
    """
    # in TLS 1.3 a server judges the client late (RFC 8446 §4.4.2.4); the kernel drops the alert if a request is unread
    if peer.tls is None or not peer.alert_seconds:
        return None
    with peer.listens:
        if not peer.heard or peer.heard[0][0] < since:
            began, alert = time.monotonic(), None
            try:
                with _connected(peer, peer.alert_seconds) as listening:
                    listening.settimeout(peer.alert_seconds)
                    listening.recv(1)
            except ssl.SSLError as e:
                alert = None if isinstance(e, _CUT_OFF) else e.with_traceback(None)
            except (OSError, ValueError, BridgeError):
                pass
            peer.heard[:] = [(began, alert)]
        cause = peer.heard[0][1]
    if cause is None:
        return None
    failure = _as_ours(cause, peer.alert_seconds)
    failure.__cause__ = cause
    return failure


def _innermost(error: BaseException) -> Exception:
    """The cause that urllib3 and `requests` wrap into their errors."""
    for cause in (error.__cause__, *error.args):
        if isinstance(cause, Exception):
            return _innermost(cause)
    return cast(Exception, error)


def is_cut_off(error: BaseException | None) -> bool:
    """Whether the other side ended the connection; Python 3.11.2 has no exception of its own for an end within TLS."""
    return isinstance(error, _CUT_OFF) or getattr(error, "reason", "") == "UNEXPECTED_EOF_WHILE_READING"


def _as_ours(error: Exception, seconds: float) -> HttpsError:
    """Turn Python's errors into ours, in this one place."""
    if isinstance(error, TimeoutError):
        return LateError(f"no answer within {seconds:g} s")
    if isinstance(error, ssl.SSLCertVerificationError):
        return UntrustedError(f"the server's certificate is not trusted: {error.verify_message}")
    if isinstance(error, ssl.SSLError):
        reason = error.reason or "the connection ended within TLS"
        text = reason.replace("_", " ").lower()
        if "ALERT" in reason and any(part in reason for part in _TURNED_AWAY):
            return ClientRefusedError(f"the client certificate was refused: {text}")
        return (UnreachableError if is_cut_off(error) else HandshakeError)(text)
    if isinstance(error, OSError):
        return UnreachableError((error.strerror or str(error) or type(error).__name__).lower())
    return UnreachableError(f"wanted an answer in HTTP, found {one_line(str(error) or type(error).__name__, 80)}")
