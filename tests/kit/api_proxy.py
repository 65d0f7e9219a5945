"""
Between a gateway and the real API server: what goes wrong there at a moment that a test chooses.

It speaks TLS with the API server's own certificate, and asks on as the gateway, so that rights and answers are real.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

import requests

from tests.kit.cluster_api import ClusterApi
from tests.kit.loopback import LoopbackServer

#: What is done with a request: nothing, or an answer in its place (status and body), or True: the connection ends.
Act = Callable[[str, str], "tuple[int, bytes] | bool | None"]


@dataclass(kw_only=True)
class Proxy:
    """A running one."""

    port: int = 0
    before: Act = lambda *_: None  #: Before it goes on to the server.
    after: Act = lambda *_: None  #: After the server has answered, and before the gateway hears of it.
    watch: Callable[[], bytes | None] = lambda: None  #: A text in the place of a watch.
    writes: list[tuple[str, str]] = field(default_factory=list)  #: Method and path of each.

    def kubeconfig(self, cluster: ClusterApi, user: str) -> Path:
        """With which a program asks here."""
        path = cluster.kubeconfig(user)
        there = path.with_name(f"proxied-{self.port}.conf")
        there.write_text(path.read_text().replace(f":{cluster.port}", f":{self.port}"))
        there.chmod(0o600)
        return there


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: ClassVar[Proxy]
    cluster: ClassVar[ClusterApi]
    credentials: ClassVar[tuple[str, str]]

    def _go_on(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(length)
        if self.command != "GET":
            self.proxy.writes.append((self.command, self.path))
        if "watch=1" in self.path:
            self._watch()
        elif not self._acted(self.proxy.before(self.command, self.path)):
            with requests.Session() as session:
                session.trust_env = False
                answer = session.request(
                    self.command,
                    f"{self.cluster.url}{self.path}",
                    data=data,
                    headers={"Content-Type": self.headers.get("Content-Type", "application/json")},
                    verify=str(self.cluster.pki_dir / "ca.crt"),
                    cert=self.credentials,
                    timeout=180,
                )
            if not self._acted(self.proxy.after(self.command, self.path)):
                self._send(answer.status_code, answer.content)

    def do_GET(self) -> None:
        """Look."""
        self._go_on()

    def do_POST(self) -> None:
        """Make."""
        self._go_on()

    def do_PUT(self) -> None:
        """Replace."""
        self._go_on()

    def do_PATCH(self) -> None:
        """Change."""
        self._go_on()

    def _acted(self, act: tuple[int, bytes] | bool | None) -> bool:
        if isinstance(act, tuple):
            self._send(*act)
        elif act:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.close()
        return bool(act)

    def _watch(self) -> None:
        text = self.proxy.watch()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(OSError, requests.exceptions.RequestException), requests.Session() as session:
            if text is not None:
                self._chunk(text)
                return
            session.trust_env = False
            with session.get(
                f"{self.cluster.url}{self.path}",
                verify=str(self.cluster.pki_dir / "ca.crt"),
                cert=self.credentials,
                stream=True,
                timeout=90,
            ) as answer:
                for part in answer.iter_content(chunk_size=None):
                    self._chunk(part)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _send(self, status: int, body: bytes) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def between(cluster: ClusterApi, user: str) -> Iterator[Proxy]:
    """A proxy for the client that is `user`."""
    proxy = Proxy()
    certificate, key = cluster.credentials(user)
    values = {"proxy": proxy, "cluster": cluster, "credentials": (str(certificate), str(key))}
    handler = type("Handler", (_Handler,), values)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cluster.pki_dir / "apiserver.crt", cluster.pki_dir / "apiserver.key")
    with LoopbackServer(("127.0.0.1", 0), handler) as server:
        proxy.port = server.server_port
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()
