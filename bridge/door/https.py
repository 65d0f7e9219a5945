"""
HTTPS for a WSGI application; the only module that uses cheroot.

This module adds what cheroot lacks. A worker thread does the handshake, because in cheroot's own thread one silent
client would block all others. A connection gets a thread only when data has arrived, and in its address's turn. An
exchange has a time limit, and the number of connections is limited for each address and in total. Without a free
descriptor for a new connection the server ends the one that is idle longest, and goes on. The server refuses a request
that states its length twice, and a head with control characters or continued lines. It accepts chunked bodies below one
path only, and then closes the connection, so that no proxy before it can read another request from the same bytes. It
loads its certificate again when the file changes.

A client may present a certificate from one of the anchors. The application finds it in the environ under `PEER`, and
decides with `bridge.pki.verify.client_problem` what the anchor allows; without a certificate the key is absent.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import resource
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cheroot import server as cheroot_server
from cheroot import wsgi
from cheroot.errors import FatalSSLAlert
from cheroot.makefile import MakeFile
from cheroot.ssl import Adapter
from cryptography import x509

from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.pki.bundle import LARGEST_REQUEST_BYTES
from bridge.pki.certificates import pem
from bridge.settings import address_of
from bridge.settings.tables import ServeSettings
from bridge.system.files import version
from bridge.system.tls import TlsSocket
from bridge.system.waiting import FairQueue, Rate

log = logging.getLogger("ca-bridge")

#: The environ's key for the client certificate (DER) that TLS has proven; no header can set it.
PEER = "ca_bridge.peer"

#: Returns the trust anchors for client certificates of all purposes.
Anchors = Callable[[], Sequence[x509.Certificate]]

#: Limit of a request line with its headers; ours take a few hundred bytes.
_LONGEST_HEAD_BYTES = 16 << 10
#: RFC 9110 §5.5 without what programs disagree about: a control character (a bare CR, NUL), and a line that goes on.
_HEAD_LINE = re.compile(rb"(?![ \t])[\t\x20-\x7e\x80-\xff]*\r\n")
#: A chunk's size without extensions, because programs disagree about where extensions end.
_CHUNK, _LONGEST_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,6})\r\n"), 16
#: A million chunks of one byte would take seconds to read; real clients send kilobytes in each.
_MOST_CHUNKS = 1000
_BACKLOG = 128
#: A connection without a request is closed after this time.
_IDLE_SECONDS = 15
_LOOK_SECONDS = 0.5
#: Descriptors that are no connections: databases, CAs, programs, logs.
_OTHER_FILES = 200
#: accept(2): no descriptor or no memory is left.
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_PAUSE_WITHOUT_ROOM_SECONDS = 0.1


class _Tls(Adapter):
    """Adapts our TLS context to cheroot without a handshake, and rebuilds it when a file or an anchor changes."""

    def __init__(self, certificate: Path, key: Path, anchors: Anchors) -> None:
        super().__init__(certificate, key)
        self._files = (certificate, key)
        self._anchors = anchors
        self._seen: list[tuple[int, ...]] = []
        with contextlib.suppress(OSError):  # server_context reports a missing file
            self._seen = self._versions()
        self._trusted = tuple(anchors())
        self.context = server_context(certificate, key, self._trusted)

    def bind(self, sock: socket.socket) -> socket.socket:
        """Let the listening socket reuse its port while an earlier process's connections close."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # cheroot leaves it out for port 0
        return sock

    def wrap(self, sock: socket.socket) -> tuple[ssl.SSLSocket, dict[str, str]]:
        """Wrap a socket in TLS, without the handshake (FatalSSLAlert: the client has gone)."""
        self._read_again()
        try:
            wrapped = self.context.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=True
            )
        except OSError as e:  # a reset before accept(), in cheroot's own thread
            raise FatalSSLAlert(*e.args) from None
        return wrapped, self.get_environ()

    def get_environ(self) -> dict[str, str]:
        return {"wsgi.url_scheme": "https", "HTTPS": "on"}

    def makefile(self, sock: Any, mode: str = "r", bufsize: int = -1) -> Any:
        return MakeFile(sock, mode, bufsize)

    def _read_again(self) -> None:
        with contextlib.suppress(OSError):
            versions, trusted = self._versions(), tuple(self._anchors())
            if versions != self._seen or trusted != self._trusted:
                is_read = versions != self._seen
                self._seen, self._trusted = versions, trusted
                try:
                    self.context = server_context(*self._files, trusted)
                except SettingsError as e:
                    log.error("%s; the certificate that was read before stays in use", e)  # noqa: TRY400
                else:
                    if is_read:
                        log.info("the server certificate %s was read again", self._files[0])

    def _versions(self) -> list[tuple[int, ...]]:
        return [version(file.stat()) for file in self._files]


def server_context(certificate: Path, key: Path, anchors: Sequence[x509.Certificate] = ()) -> ssl.SSLContext:
    """
    Return a context for TLS 1.2 or newer, without renegotiation (SettingsError: the files can't be used).

    With anchors, a client may present a certificate; the handshake fails if no anchor signed it, or if it is for
    servers only. An anchor need not be a root.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslsocket_class = TlsSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    try:
        # without the function OpenSSL would ask the terminal for a passphrase
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as e:
        reason = (isinstance(e, OSError) and e.strerror) or str(e)
        wanted = "PEM files with a certificate and its key, not encrypted"
        problem = SettingsProblem("serve.certificate", wanted, f"{certificate} and {key}: {reason}")
        raise SettingsError([problem]) from None
    if anchors:
        context.load_verify_locations(cadata=pem(*anchors).decode())
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


class _UniqueHeaders(dict[bytes, bytes]):
    """A request's headers; those that set its end, its host or its media type must not repeat."""

    def __setitem__(self, name: bytes, value: bytes) -> None:
        if name in self and name in {b"Content-Length", b"Host", b"Transfer-Encoding", b"Content-Type"}:
            raise ValueError("A header came twice.")
        super().__setitem__(name, value)


class _HeadLines:
    """The lines of a request's head; one that programs read differently is a ValueError."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readline(self) -> bytes:
        line: bytes = self._file.readline()
        if line.endswith(b"\n") and not _HEAD_LINE.fullmatch(line):
            raise ValueError(
                "A line of a request's head has no control characters, does not go on, and ends with CRLF."
            )
        return line


class _Request(cheroot_server.HTTPRequest):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.inheaders = _UniqueHeaders()
        self.header_reader = _Headers()
        self._body: bytes | None = None  #: A body that came in chunks.

    def read_request_line(self) -> bool:
        self.rfile = _HeadLines(self.rfile)
        try:
            return bool(super().read_request_line())  # type: ignore[no-untyped-call]  # cheroot's stubs
        except ValueError as e:
            self.simple_response("400 Bad Request", e.args[0])
            return False

    def read_request_headers(self) -> bool:
        if not super().read_request_headers():  # type: ignore[no-untyped-call]  # cheroot's stubs
            return False
        if self.response_protocol == "HTTP/1.1" and b"Host" not in self.inheaders:
            self.close_connection = True
            self.simple_response("400 Bad Request", "A request needs a Host.")
            return False
        if self._may_be_chunked():
            self.close_connection = True  # the server reads nothing after the body
            self._body = _unchunked(self.conn.rfile, self.server.max_request_body_size)
            if self._body is None:
                most = f"At most {self.server.max_request_body_size} bytes in {_MOST_CHUNKS} chunks"
                text = f"{most}; each has its size in hexadecimal digits, and nothing else."
                self.simple_response("400 Bad Request", text)
                return False
            del self.inheaders[b"Transfer-Encoding"]
            self.inheaders[b"Content-Length"], self.chunked_read = b"%d" % len(self._body), False
        length = self.inheaders.get(b"Content-Length", b"0")
        if b"Transfer-Encoding" in self.inheaders or not length.isdigit():
            self.close_connection = True
            self.simple_response("411 Length Required", "A request needs a Content-Length, in digits.")
            return False
        return True

    def _may_be_chunked(self) -> bool:
        below, headers = self.server.chunked_below, self.inheaders
        is_one = headers.get(b"Transfer-Encoding") == b"chunked" and b"Content-Length" not in headers
        return is_one and bool(below) and self.path.startswith(below)

    def respond(self) -> None:
        """Let the application read a chunked body like any other."""
        socket_file = self.conn.rfile
        if self._body is not None:
            self.conn.rfile = io.BytesIO(self._body)
        try:
            super().respond()
        finally:
            self.conn.rfile = socket_file


def _unchunked(file: Any, most: int) -> bytes | None:
    """Read a chunked body (RFC 9112 §7.1) without extensions and trailers; None: malformed, or above `most` bytes."""
    body = bytearray()
    for _ in range(_MOST_CHUNKS):
        if (match := _CHUNK.fullmatch(file.readline(_LONGEST_CHUNK_LINE))) is None:
            return None
        size = int(match[1], 16)
        data = file.read(size + 2) if len(body) + size <= most else b""
        if len(data) != size + 2 or not data.endswith(b"\r\n"):
            return None
        if not size:
            return bytes(body)
        body += data[:-2]
    return None


class _Headers(cheroot_server.DropUnderscoreHeaderReader):
    """Takes only names of RFC 9110 §5.1: programs disagree about a blank before the colon."""

    def _transform_key(self, key_name: bytes) -> bytes:
        if not key_name or key_name != key_name.strip() or b" " in key_name:
            raise ValueError("A header's name is a token.")
        return key_name.title()

    def _allow_header(self, key_name: bytes) -> bool:
        return b"_" not in key_name  # cheroot's own expects str


class _Connection(cheroot_server.HTTPConnection):
    RequestHandlerClass = _Request
    admitted = False
    has_handshake = False
    began = 0.0  #: Start of the current exchange, by the monotonic clock.
    idle_since: float | None = None  #: Since then it waits for a request, by the monotonic clock; None: it doesn't.

    def communicate(self) -> bool:
        """Serve one exchange in a worker thread; the first begins with the handshake."""
        self.began = time.monotonic()
        with self.server.mutex:
            self.server.working.add(self)
        try:
            if not self.has_handshake:
                self.socket.do_handshake()
                if (der := self.socket.getpeercert(binary_form=True)) is not None:
                    self.ssl_env = {**self.ssl_env, PEER: der}
                self.has_handshake = True
            return bool(super().communicate())  # type: ignore[no-untyped-call]  # cheroot's stubs
        except OSError:  # or SSLError, a subclass: a client's error is not logged
            return False
        finally:
            self.server.over(self)

    def close(self) -> None:
        """Close the connection, and free its place."""
        self.server.forget(self)
        with contextlib.suppress(OSError, ValueError):
            super().close()


class _Listener(socket.socket):
    """The listening socket, which has room made where accept(2) finds none: cheroot would try again at once, for ever."""

    def __init__(self, sock: socket.socket, make_room: Callable[[OSError], None]) -> None:
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())
        self._make_room = make_room

    def accept(self) -> tuple[socket.socket, Any]:
        try:
            return super().accept()
        except OSError as e:
            if e.errno not in _NO_ROOM:
                raise
            self._make_room(e)
            raise TimeoutError from None  # cheroot serves the other connections, and tries again


class Https(wsgi.Server):
    """The HTTPS server; its methods, except `port` and `counts`, are for cheroot and our connections."""

    ConnectionClass = _Connection

    def __init__(self, settings: ServeSettings, application: Any, anchors: Anchors, chunked_below: bytes) -> None:
        self.exchange_seconds = settings.exchange_for.total_seconds()
        super().__init__(
            address_of(settings.listen), application, numthreads=settings.threads, max=settings.threads, server_name="ca-bridge",
            request_queue_size=_BACKLOG, timeout=_IDLE_SECONDS, shutdown_timeout=int(self.exchange_seconds),
        )  # fmt: skip
        self.ssl_adapter = _Tls(settings.certificate, settings.key, anchors)
        self.max_request_header_size = _LONGEST_HEAD_BYTES
        self.max_request_body_size = LARGEST_REQUEST_BYTES
        self.keep_alive_conn_limit = settings.connections
        self.limits = settings
        self.chunked_below = chunked_below
        self.mutex = threading.Lock()
        self.working: set[_Connection] = set()
        self.open: set[_Connection] = set()
        self.peers: Counter[str] = Counter()
        self.shares = FairQueue[_Connection](settings.threads)
        self.turned_away = 0
        self._warnings = Rate(1)

    @property
    def port(self) -> int:
        """The port that the server listens on, also if the settings say 0."""
        return int(self.bind_addr[1])

    def counts(self) -> dict[str, int]:
        """Return the numbers of open and working connections, and of those turned away so far."""
        return {"open": len(self.open), "working": len(self.working), "turned_away": self.turned_away}

    def process_conn(self, conn: _Connection) -> None:
        """Let a new connection wait for data without a thread, and queue one with data for a thread."""
        conn.idle_since = None
        if conn.admitted:
            with self.mutex:
                self.shares.wait(str(conn.remote_addr), conn)
            self._begin_next()
        elif self._admit(conn):
            self.put_conn(conn)
        else:
            conn.close()

    def _begin_next(self) -> None:
        """Give a thread to each connection whose turn it is."""
        with self.mutex:
            ready = [conn for _, conn in iter(self.shares.next, None)]
        for conn in ready:
            super().process_conn(conn)

    def over(self, conn: _Connection) -> None:
        """Free the thread of a finished exchange."""
        with self.mutex:
            self.working.discard(conn)
            self.shares.give_back(str(conn.remote_addr))
        self._begin_next()

    def stop(self) -> None:
        """Give each waiting connection its exchange, then end the threads."""
        with self.mutex:
            self.shares.open()
        self._begin_next()
        super().stop()

    def _admit(self, conn: _Connection) -> bool:
        peer = str(conn.remote_addr)
        with self.mutex:
            if len(self.open) >= self.limits.connections or self.peers[peer] >= self.limits.connections_per_peer:
                self.turned_away += 1
                return False
            conn.admitted = True
            self.open.add(conn)
            self.peers[peer] += 1
            return True

    def put_conn(self, conn: _Connection) -> None:
        """Wait for a connection's next request, unless TLS has buffered it already, which wakes nothing up."""
        if self.ready and conn.has_handshake and conn.socket.pending():
            self.process_conn(conn)
        else:
            conn.idle_since = time.monotonic()
            super().put_conn(conn)

    def forget(self, conn: _Connection) -> None:
        """Remove a closed connection from the counts."""
        with self.mutex:
            if conn in self.open:
                self.open.discard(conn)
                peer = str(conn.remote_addr)
                self.peers[peer] -= 1
                if not self.peers[peer]:
                    del self.peers[peer]

    def bind(self, family: int, type: int, proto: int = 0) -> socket.socket:  # noqa: A002 (cheroot's name)
        """Listen with a socket that has room made for new connections."""
        sock = self.socket = _Listener(super().bind(family, type, proto), self._make_room)
        return sock

    def _make_room(self, error: OSError) -> None:
        """End the connection that is idle longest, after accept(2) failed; one line a minute says so."""
        if not self._warnings.take("", time.monotonic()):
            text = "no room for a new connection (%s): idle ones are ended; set LimitNOFILE higher, or serve.connections lower"
            log.warning(text, error.strerror)
        for _, conn in self._idle()[:1]:
            _end(conn)
        time.sleep(_PAUSE_WITHOUT_ROOM_SECONDS)

    def _idle(self) -> list[tuple[float, _Connection]]:
        """Return the connections that wait for a request, with the beginning of that, the oldest first."""
        with self.mutex:
            idle = [(since, conn) for conn in self.open if (since := conn.idle_since) is not None]
        return sorted(idle, key=lambda pair: pair[0])

    def end_slow(self) -> None:
        """
        End exchanges that take too long, and connections that wait for a request too long.

        cheroot ends the latter by the wall clock, which may be put back.
        """
        now = time.monotonic()
        with self.mutex:
            slow = [conn for conn in self.working if conn.began < now - self.exchange_seconds]
        for conn in [*slow, *(conn for since, conn in self._idle() if since < now - _IDLE_SECONDS)]:
            _end(conn)

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        """Log a client's mistake only with `-v`, and a bug as an error."""
        log.log(level if level >= logging.ERROR else logging.DEBUG, "https: %s", msg, exc_info=traceback or None)


def _end(conn: _Connection) -> None:
    """End a connection from another thread; its own wakes up, reads the end, and closes it."""
    conn.idle_since = None
    with contextlib.suppress(OSError):
        socket.socket.shutdown(conn.socket, socket.SHUT_RDWR)  # not TLS's own, whose state is the thread's


def _assert_files(connections: int) -> None:
    """Raise the limit of open files as far as we may (SettingsError: it is too low for so many connections)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if connections + _OTHER_FILES > hard:
        wanted = (
            f"at most {hard - _OTHER_FILES}: this process may open {hard} files (ulimit -Hn, LimitNOFILE of the unit)"
        )
        raise SettingsError([SettingsProblem("serve.connections", wanted, str(connections))])


@contextlib.contextmanager
def serving(settings: ServeSettings, application: Any, anchors: Anchors, chunked_below: bytes = b"") -> Iterator[Https]:
    """
    Serve while the block runs; at its end, open exchanges get their time, and no new one begins.

    Each connection calls `anchors`, from any thread. Below the path `chunked_below` a body may come in chunks, as Go's
    clients send a body of unknown length; empty: nowhere.
    """
    _assert_files(settings.connections)
    server = Https(settings, application, anchors, chunked_below)
    os.environ.pop("LISTEN_PID", None)  # cheroot would take any descriptor 3 for its socket
    try:
        server.prepare()
    except OSError as e:
        text = f"serve.listen: can't listen at {settings.listen}: {e.strerror or e}"
        raise BridgeError(text, hint="another port, or another address of this machine") from None
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_SECONDS):
            server.end_slow()

    threads = [threading.Thread(target=server.serve, name="https"), threading.Thread(target=look, name="limits")]
    for thread in threads:
        thread.start()
    try:
        yield server
    finally:
        server.stop()
        over.set()
        for thread in threads:
            thread.join()
