"""`/metrics`, `/healthz` and `/readyz`, for whoever may reach the address that the settings name; it takes no input."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR, socket
from typing import Any

from bridge.errors import BridgeError

#: Connections at a time, so that nobody can use up the threads; with one more the oldest is closed, so that whoever holds
#: them all open can't keep the kubelet's probes out, and have the gateway killed.
_MOST_CONNECTIONS = 16
_SECONDS = 5

Page = Callable[[], tuple[int, str]]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with socketserver's 5, a few at once wait for TCP to try again
    pages: dict[str, Page]

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._open: dict[socket | tuple[bytes, socket], None] = {}
        self._mutex = threading.Lock()
        super().__init__(address, handler)

    def process_request(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        with self._mutex:
            if len(self._open) >= _MOST_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                if isinstance(oldest, socket):
                    with contextlib.suppress(OSError):
                        oldest.shutdown(SHUT_RDWR)  # which wakes its thread; that closes it
            self._open[request] = None
        super().process_request(request, client_address)

    def process_request_thread(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._mutex:
                self._open.pop(request, None)

    def handle_error(self, *_: object) -> None:
        """A client that went away is nobody's trouble."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "ca-bridge", ""
    timeout = _SECONDS

    def do_GET(self) -> None:
        """One of the pages."""
        page = self.server.pages.get(self.path.partition("?")[0])
        status, text = page() if page is not None else (HTTPStatus.NOT_FOUND, "there is /metrics, /healthz, /readyz\n")
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing: probes come every few seconds."""


@contextlib.contextmanager
def serving(address: tuple[str, int], pages: dict[str, Page]) -> Iterator[int]:
    """
    Serve the pages for as long as the block runs.

    Returns:
        The port, which may have been given as 0.

    Raises:
        BridgeError: The address is not ours to use.
    """
    try:
        server = _Server(address, _Handler)
    except OSError as e:
        text = f"gateway.listen: wanted to listen at {address[0]}:{address[1]}, found: {e.strerror}"
        raise BridgeError(text, hint="another port, or serve_status = false") from None
    server.pages = pages
    thread = threading.Thread(target=server.serve_forever, args=(0.2,), name="status", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
