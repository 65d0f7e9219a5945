"""
HTTP/1.1 for the cluster's API, components, neighbours and CAs, on connections that are kept or used once.

`http.client` reads an answer's body; this module reads its head, and adds a time limit for the whole request, a limit on
the bytes that a server sends (counted below the parser), and the guarantee that no request gets the rest of an earlier
answer. A connection carries one request at a time. There are no redirects, proxies, environment variables, keys on disk
or retries.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse, RemoteDisconnected
from typing import TYPE_CHECKING, Any, ClassVar, cast
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.errors import BridgeError, Exit
from bridge.pki.budget import Budget
from bridge.pki.certificates import UNREADABLE, load_pem_certificates
from bridge.system.waiting import within
from bridge.words import one_line

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: Far above answers to a probe, and above a signed certificate with thousands of SANs.
MAX_ANSWER_BYTES = 1 << 20
#: The limit for an answer's head, chunk lengths and trailers, together.
_SPARE_BYTES = 1 << 16
_PIECE_BYTES = 1 << 16

#: Alerts (RFC 8446 §6) by which a server rejects a client certificate, as OpenSSL spells them.
_TURNED_AWAY = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")
#: Ends of a connection that may have any cause.
_CUT_OFF = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError, BrokenPipeError)


class HttpsError(BridgeError):
    """The request failed, for whatever reason."""

    exit_code: ClassVar[int] = Exit.UNAVAILABLE


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
    host_header: str = ""  #: If it differs from host and port.
    alert_seconds: float = 0.0  #: How long to listen for why a connection broke, see `_alert`; 0: do not.
    #: When `_alert` last listened, and the alert that it got.
    heard: list[tuple[float, ssl.SSLError | None]] = field(default_factory=list, compare=False, repr=False)

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
        header = parts.netloc.rpartition("@")[2]
        return cls(host=host, port=port or usual, tls=secured, host_header=header, **more)


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


class KeptConnection:
    """A connection to one server, opened on demand; for one thread at a time."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._host = peer.host_header or (f"[{peer.host}]" if ":" in peer.host else peer.host) + f":{peer.port}"
        self._socket: socket.socket | None = None
        self.is_kept = False  #: The last request used a connection that was open before.

    def sent(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        *,
        seconds: float,
        longest: int = MAX_ANSWER_BYTES,
    ) -> Callable[[], Answer]:
        """Send one request; the returned function reads its whole answer, before the next request (HttpsError, ValueError)."""
        limits = _Limits(seconds, longest)
        with self.in_time(limits):
            opened = self._send(method, target, headers, body, limits)

        def answer() -> Answer:
            with self.in_time(limits):
                received = _Received(opened, limits)
                limits.bear(received)
                response = _begun(received, method)
                content = _body(response, longest)
                if response.will_close or received.has_more():  # unrequested data is no answer
                    self.close()
                return Answer(status=response.status, headers=response.fields, body=content)

        return answer

    def stream(self, target: str, headers: Mapping[str, str], *, seconds: float) -> Stream:
        """Send one GET, read the head of its answer, and return the open answer; the caller closes the connection."""
        limits = _Limits(seconds, _PIECE_BYTES)
        with self.in_time(limits):
            response = _begun(_Received(self._send("GET", target, headers, None, limits), limits), "GET")
        return Stream(response, self, limits)

    def end(self) -> None:
        """End the connection from another thread; a thread that is reading wakes up and gets no more."""
        opened = self._socket
        with contextlib.suppress(OSError):
            if opened is not None:
                opened.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection; the next request opens a new one."""
        opened, self._socket = self._socket, None
        if opened is not None:
            with contextlib.suppress(OSError):
                opened.close()

    __del__ = close  # if its thread has ended

    @contextlib.contextmanager
    def in_time(self, limits: _Limits) -> Iterator[None]:
        """Turn exceptions into our errors, and end the connection after one."""
        try:
            yield
        except (OSError, HTTPException) as e:
            self.close()
            ours = _as_ours(e, limits.seconds)
            if is_cut_off(e) and not self.is_kept:
                ours = _alert(self._peer, limits.began) or ours
            raise ours from ours.__cause__ or e
        except BaseException:
            self.close()
            raise

    def _send(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | None, limits: _Limits
    ) -> socket.socket:
        data = _head(method, target, {"Host": self._host, **headers}, body) + (body or b"")
        opened = self._opened(limits)
        unsent = memoryview(data)
        while unsent:
            limits.hold(opened)
            unsent = unsent[opened.send(unsent) :]
        return opened

    def _opened(self, limits: _Limits) -> socket.socket:
        if self._socket is not None and _has_come(self._socket):  # unrequested data
            self.close()
        self.is_kept = self._socket is not None
        if self._socket is None:
            self._socket = _connected(self._peer, limits.seconds_left())
        return self._socket


def _begun(received: _Received, method: str) -> _Response:
    response = _Response(cast(socket.socket, received), method=method)
    response.begin()
    return response


def _head(method: str, target: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
    if not target.isascii() or not target.isprintable() or " " in target:
        raise ValueError("wanted a target that is quoted")
    length = {} if body is None else {"Content-Length": str(len(body))}
    given = {**headers, "Accept-Encoding": "identity", **length}
    if not "".join([*given, *map(str, given.values())]).isprintable():
        raise ValueError("wanted headers of one line each")
    lines = "".join([f"{name}: {value}\r\n" for name, value in given.items()])
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")


_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) +([1-9][0-9]{2})(?: [^\r\n]*)?\r?\n")
_FIELD = re.compile(r"^([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\r\n\0]*)\r?\n", re.MULTILINE)
_LENGTH = re.compile("[0-9]{1,18}")
_MOST_FIELDS = 100
#: The line after the fields, or the end of the data.
_NO_LINE = frozenset({b"\r\n", b"\n", b""})
_NO_BODY = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})


class _Response(HTTPResponse):
    """
    An answer whose head is read here (RFC 9112): the library reads it with its mail parser, which takes as much processor
    time as TLS and the rest together, and excludes the lines after an odd line from the head.
    """

    fields: dict[str, str]  #: By lower-case name; of repeated fields the last.

    def flush(self) -> None:
        """Do nothing; since Python 3.13 the library's method prints a traceback if its stream was closed first."""

    def begin(self) -> None:
        """Read the head, and determine how the body ends."""
        self.status = HTTPStatus.CONTINUE
        while self.status < HTTPStatus.OK:  # interim (RFC 9110 §15.2), as many as the limit of bytes allows
            line = self.fp.readline(_SPARE_BYTES)
            if not line:
                raise RemoteDisconnected("no answer")
            if (found := _STATUS_LINE.fullmatch(line)) is None:
                raise HTTPException(repr(line[:40]))
            is_old, self.status = found[1] == b"0", int(found[2])
            if self.status == HTTPStatus.SWITCHING_PROTOCOLS:  # no HTTP follows
                raise HTTPException("another protocol")
            self.fields = self._read_fields()
        coding, connection = self.fields.get("transfer-encoding"), self.fields.get("connection", "").lower()
        if coding is not None and coding.lower() != "chunked":
            raise UnreachableError("wanted no transfer encoding besides chunked, found one")
        self.chunked, self.chunk_left = coding is not None, None
        length = None if self.chunked else self.fields.get("content-length")
        self.length = 0 if self.status in _NO_BODY else None if length is None else int(length)
        has_no_end = self.length is None and not self.chunked
        self.will_close = has_no_end or ("keep-alive" not in connection if is_old else "close" in connection)

    def _read_fields(self) -> dict[str, str]:
        lines: list[bytes] = []
        while (line := self.fp.readline(_SPARE_BYTES)) not in _NO_LINE:
            lines.append(line)
            if len(lines) > _MOST_FIELDS:
                raise HTTPException(f"more than {_MOST_FIELDS} headers")
        found = _FIELD.findall(b"".join(lines).decode("latin-1"))
        if not line or len(found) != len(lines):
            odd = next((one for one in lines if not _FIELD.fullmatch(one.decode("latin-1"))), line)
            raise HTTPException(f"{odd[:40]!r} in the head")
        fields = [(name.lower(), value.strip(" \t")) for name, value in found]
        lengths = {value for name, value in fields if name == "content-length"}
        if len(lengths) > 1 or not all(map(_LENGTH.fullmatch, lengths)):  # or two readers find two ends of the body
            raise HTTPException("a length that is none")
        return dict(fields)


def _body(response: HTTPResponse, longest: int) -> bytes:
    try:
        body = b"" if (response.length or 0) > longest else response.read(longest + 1)
    except TimeoutError:
        raise
    except (OSError, HTTPException) as e:
        raise _broken_off(response, e) from e
    if len(body) > longest or (response.length or 0) > longest:
        raise TooLongError(f"wanted an answer of at most {longest} bytes, found a longer one")
    if response.length:
        raise _broken_off(response, None)
    return body


def _broken_off(response: HTTPResponse, error: Exception | None) -> BrokenOffError:
    found = BrokenOffError("the answer broke off" + (f": {_as_ours(error, 0)}" if error else ""))
    found.status = response.status
    return found


class Stream:
    """An answer whose body is read in pieces as it arrives."""

    def __init__(self, response: HTTPResponse, connection: KeptConnection, limits: _Limits) -> None:
        self._response = response
        self._connection = connection
        self._limits = limits
        self.status = response.status
        self.end = connection.end

    def rest(self) -> bytes:
        """The whole body of a short answer, such as an error."""
        with self._connection.in_time(self._limits):
            return _body(self._response, _PIECE_BYTES)

    def go_on(self, silence_seconds: float) -> None:
        """From now on allow an answer of any length, and limit only silence."""
        self._limits.silence = silence_seconds

    def piece(self) -> bytes:
        """The next piece; empty: the end (UnreachableError: the connection broke, or was silent for too long)."""
        try:
            return self._response.read1(_PIECE_BYTES)
        except TimeoutError as e:
            raise LateError("nothing came for too long") from e
        except (OSError, HTTPException, ValueError, AttributeError) as e:  # AttributeError: another thread ended it
            raise _as_ours(e, self._limits.seconds) from e


class _Limits:
    """How long an answer may take, and how many bytes it may have, including head and framing."""

    def __init__(self, seconds: float, longest: int) -> None:
        self.seconds, self.began = seconds, time.monotonic()
        self._budget = Budget(longest + _SPARE_BYTES, seconds=seconds, clock=time.monotonic)
        self._longest = longest
        self._spare = 0.0  # seconds beyond the budget
        self.silence: float | None = None  #: In seconds; if set, it is the only limit.

    def bear(self, received: _Received) -> None:
        """Leave a tenth of the time for an answer that arrived while its caller read others."""
        lacking = self.seconds / 10 - self._budget.seconds_left()
        if lacking > 0 and received.has_begun():
            self._spare = lacking

    def seconds_left(self) -> float:
        if self.silence is not None:
            return self.silence
        left = self._budget.seconds_left() + self._spare
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
        """Count received bytes below the parser: a length that a server sends (a chunk of -1) is no limit."""
        if self.silence is None and not self._budget.allows(received):
            raise TooLongError(f"wanted an answer of at most {self._longest} bytes, found a longer one")


class _Received(io.BufferedReader):
    """The stream that `http.client` reads from a socket; it has limits, and stays open after an answer."""

    def __init__(self, opened: socket.socket, limits: _Limits) -> None:
        self._opened = opened
        self._reader = _Reader(opened, limits)
        super().__init__(self._reader, _PIECE_BYTES)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the stream itself, instead of a socket's file."""
        del mode
        return self

    def close(self) -> None:
        """Do nothing: the connection is kept."""

    def has_begun(self) -> bool:
        """Whether the answer has begun or the connection has ended; TLS session tickets are neither, and are read before."""
        self._reader.waits = False
        self._opened.settimeout(0)
        begun = bool(self.peek(1)) or _has_come(self._opened)
        self._reader.waits = True
        return begun

    def has_more(self) -> bool:
        self._reader.is_over = True
        return bool(self.peek(1))


class _Reader(io.RawIOBase):
    def __init__(self, opened: socket.socket, limits: _Limits) -> None:
        self._opened = opened
        self._limits = limits
        self.waits = True  #: Whether to wait for data that has not arrived yet.
        self.is_over = False  #: Nothing more is received.

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        if self.is_over:
            return None
        if self.waits:
            self._limits.hold(self._opened)
        try:
            received = self._opened.recv_into(buffer)
        except (BlockingIOError, ssl.SSLWantReadError):
            return None
        self._limits.count(received)
        return received


def _has_come(opened: socket.socket) -> bool:
    """Whether the socket has data to read: the beginning of an answer, or the connection's end."""
    if isinstance(opened, ssl.SSLSocket) and opened.pending():
        return True
    poll = select.poll()
    poll.register(opened, select.POLLIN)
    return bool(poll.poll(0))


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
    if (cause := peer.heard[0][1]) is None:
        return None
    ours = _as_ours(cause, peer.alert_seconds)
    ours.__cause__ = cause
    return ours


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
