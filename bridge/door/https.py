"""
HTTPS for a WSGI application, by cheroot; the only module that knows it.

What cheroot leaves open is here. The handshake happens in a worker thread, since cheroot's own would let one silent
client keep all others out. A connection gets a thread only when something has come on it, and in its address's turn.
One exchange has a time from its first byte to its last, one address has a number of connections, and all have one. A
request whose length is given twice is refused, and in chunks it may come to one place alone, after which its connection
ends, so that no proxy before us reads another request out of the same bytes. The server's certificate is read again
when its file changes.

A client may show a certificate of one of the anchors. The application finds it in the environ under `PEER`, and decides
by `bridge.pki.verify.client_problem` for what its anchor counts; without a certificate there is no such key.
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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cheroot import server as cheroot_server
from cheroot import wsgi
from cheroot.makefile import MakeFile
from cheroot.ssl import Adapter
from cryptography import x509

from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.pki.bundle import LARGEST_REQUEST_BYTES
from bridge.pki.certificates import pem
from bridge.settings.tables import ServeSettings, address_of
from bridge.system.files import version
from bridge.system.waiting import Shares

log = logging.getLogger("ca-bridge")

#: In a request's environ: the client's certificate (DER), as TLS has proven it; a header can't have this name.
PEER = "ca_bridge.peer"

#: The trust anchors of clients' certificates, of all purposes.
Anchors = Callable[[], Sequence[x509.Certificate]]

#: A request line with its headers; ours have a few hundred bytes.
_LONGEST_HEAD_BYTES = 16 << 10
#: A chunk's size, and no extension, since programs disagree about where those end.
_CHUNK, _LONGEST_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,6})\r\n"), 16
#: A million of one byte each take seconds before the application sees a request; programs send some kilobytes in each.
_MOST_CHUNKS = 1000
_BACKLOG = 128
#: A connection without a request is closed after this time.
_IDLE_SECONDS = 15
_LOOK_SECONDS = 0.5


class _Tls(Adapter):
    """Our context in cheroot's terms; it makes no handshake, and is made again when a file or an anchor changes."""

    def __init__(self, certificate: Path, key: Path, anchors: Anchors) -> None:
        super().__init__(certificate, key)
        self._files = (certificate, key)
        self._anchors = anchors
        self._seen: list[tuple[int, ...]] = []
        with contextlib.suppress(OSError):  # the context says which file is not there
            self._seen = self._versions()
        self._trusted = tuple(anchors())
        self.context = server_context(certificate, key, self._trusted)

    def bind(self, sock: socket.socket) -> socket.socket:
        """The listening socket: its port can be taken again while connections of an earlier process end."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # cheroot's own leaves out a port that was 0
        return sock

    def wrap(self, sock: socket.socket) -> tuple[ssl.SSLSocket, dict[str, str]]:
        """A socket whose handshake is still to come."""
        self._read_again()
        wrapped = self.context.wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=True
        )
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
                    log.error("%s; the certificate that was read before goes on", e)  # noqa: TRY400
                else:
                    if is_read:
                        log.info("the server certificate %s was read again", self._files[0])

    def _versions(self) -> list[tuple[int, ...]]:
        return [version(one.stat()) for one in self._files]


def server_context(certificate: Path, key: Path, anchors: Sequence[x509.Certificate] = ()) -> ssl.SSLContext:
    """
    TLS 1.2 or newer with this certificate, and no renegotiation (SettingsError: the files can't be used).

    With anchors a client may show a certificate, and one that none of them signed, or for servers alone, ends the
    handshake. An anchor need not be a root.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
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


class _Once(dict[bytes, bytes]):
    """A request's headers; those that say where it ends and which host it is for come once."""

    def __setitem__(self, name: bytes, value: bytes) -> None:
        if name in self and name in {b"Content-Length", b"Host", b"Transfer-Encoding", b"Content-Type"}:
            raise ValueError("A header came twice.")
        super().__setitem__(name, value)


class _Request(cheroot_server.HTTPRequest):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.inheaders = _Once()
        self.header_reader = _Headers()
        self._body: bytes | None = None  #: That came in chunks.

    def read_request_headers(self) -> bool:
        if not super().read_request_headers():  # type: ignore[no-untyped-call]  # cheroot's stubs
            return False
        if self._may_be_chunked():
            self.close_connection = True  # whatever follows is not read
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
            self.simple_response("411 Length Required", "A request tells its length, in digits.")
            return False
        return True

    def _may_be_chunked(self) -> bool:
        below, headers = self.server.chunked_below, self.inheaders
        is_one = headers.get(b"Transfer-Encoding") == b"chunked" and b"Content-Length" not in headers
        return is_one and bool(below) and self.path.startswith(below)

    def respond(self) -> None:
        """Let the application read a body that came in chunks as any other one."""
        socket_file = self.conn.rfile
        if self._body is not None:
            self.conn.rfile = io.BytesIO(self._body)
        try:
            super().respond()
        finally:
            self.conn.rfile = socket_file


def _unchunked(file: Any, most: int) -> bytes | None:
    """A body in chunks (RFC 9112 §7.1), without extensions and trailers, of so many bytes at most; None: another one."""
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
    """Names as RFC 9110 §5.1 has them: a blank before the colon, or a continued line, is read differently elsewhere."""

    def _transform_key(self, key_name: bytes) -> bytes:
        if not key_name or key_name != key_name.strip() or b" " in key_name:
            raise ValueError("A header's name is a token.")
        return key_name.title()

    def _allow_header(self, key_name: bytes) -> bool:
        return b"_" not in key_name  # cheroot's own compares text


class _Connection(cheroot_server.HTTPConnection):
    RequestHandlerClass = _Request
    admitted = False
    shaken = False
    began = 0.0  #: When the exchange of now began, by the monotonic clock.

    def communicate(self) -> bool:
        """One exchange, in a worker thread; the first one begins with the handshake."""
        self.began = time.monotonic()
        with self.server.mutex:
            self.server.working.add(self)
        try:
            if not self.shaken:
                self.socket.do_handshake()
                if (der := self.socket.getpeercert(binary_form=True)) is not None:
                    self.ssl_env = {**self.ssl_env, PEER: der}
                self.shaken = True
            return bool(super().communicate())  # type: ignore[no-untyped-call]  # cheroot's stubs
        except OSError:  # an SSLError is one, too: what the client does is no event of ours
            return False
        finally:
            self.server.over(self)

    def close(self) -> None:
        """Give its place back."""
        self.server.forget(self)
        with contextlib.suppress(OSError, ValueError):
            super().close()


class Https(wsgi.Server):
    """A server at work; all but `port` and `counts` is for cheroot and our connections."""

    ConnectionClass = _Connection

    def __init__(self, ours: ServeSettings, application: Any, anchors: Anchors, chunked_below: bytes) -> None:
        self.exchange_seconds = ours.exchange_for.total_seconds()
        super().__init__(
            address_of(ours.listen), application, numthreads=ours.threads, max=ours.threads, server_name="ca-bridge",
            request_queue_size=_BACKLOG, timeout=_IDLE_SECONDS, shutdown_timeout=int(self.exchange_seconds),
        )  # fmt: skip
        self.ssl_adapter = _Tls(ours.certificate, ours.key, anchors)
        self.max_request_header_size = _LONGEST_HEAD_BYTES
        self.max_request_body_size = LARGEST_REQUEST_BYTES
        self.keep_alive_conn_limit = ours.connections
        self.limits = ours
        self.chunked_below = chunked_below
        self.mutex = threading.Lock()
        self.working: set[_Connection] = set()
        self.open: set[_Connection] = set()
        self.peers: Counter[str] = Counter()
        self.shares = Shares[_Connection](ours.threads)
        self.turned_away = 0

    @property
    def port(self) -> int:
        """The port, which may have been asked for as 0."""
        return int(self.bind_addr[1])

    def counts(self) -> dict[str, int]:
        """Open connections, those at work, and those that were turned away so far."""
        return {"open": len(self.open), "working": len(self.working), "turned_away": self.turned_away}

    def process_conn(self, conn: _Connection) -> None:
        """A new connection waits for its first byte without a thread; one with something to read gets one."""
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
        """An exchange has ended, and its thread is free."""
        with self.mutex:
            self.working.discard(conn)
            self.shares.give_back(str(conn.remote_addr))
        self._begin_next()

    def stop(self) -> None:
        """Let all that wait for a thread have their exchange; the threads end after them."""
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
        """Wait for a connection's next request; what TLS has read already wakes nothing up."""
        if self.ready and conn.shaken and conn.socket.pending():
            self.process_conn(conn)
        else:
            super().put_conn(conn)

    def forget(self, conn: _Connection) -> None:
        """A connection has ended."""
        with self.mutex:
            if conn in self.open:
                self.open.discard(conn)
                peer = str(conn.remote_addr)
                self.peers[peer] -= 1
                if not self.peers[peer]:
                    del self.peers[peer]

    def end_slow(self) -> None:
        """End exchanges that take too long; their threads wake up with an error."""
        limit = time.monotonic() - self.exchange_seconds
        with self.mutex:
            slow = [conn for conn in self.working if conn.began < limit]
        for conn in slow:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(conn.socket, socket.SHUT_RDWR)  # not TLS's own, whose state is the thread's

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        """Log a client's mistake only with `-v`, and a bug as an error."""
        log.log(level if level >= logging.ERROR else logging.DEBUG, "https: %s", msg, exc_info=traceback or None)


@contextlib.contextmanager
def serving(ours: ServeSettings, application: Any, anchors: Anchors, chunked_below: bytes = b"") -> Iterator[Https]:
    """
    Serve for as long as the block runs; at its end exchanges get their time, and no new one begins.

    `anchors` is asked for each connection, from any thread. Below the path `chunked_below` a body may come in chunks, as
    Go's clients send what they have not counted; empty: nowhere.
    """
    server = Https(ours, application, anchors, chunked_below)
    os.environ.pop("LISTEN_PID", None)  # cheroot would take any descriptor 3 for its socket
    try:
        server.prepare()
    except OSError as e:
        text = f"serve.listen: wanted to listen at {ours.listen}, found: {e.strerror or e}"
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
