"""
The API server, asked thousands of times: a connection of its own for each thread, kept; and streams of lines.

Credentials are read again when their files change, or when the server does not know them any more. Nothing of the
environment counts; keys stay in memory.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from bridge.errors import BridgeError, Exit
from bridge.node import kubeconfig
from bridge.node.kubeconfig import KubeconfigError
from bridge.system import https, safe_read
from bridge.system.kept_http import KeptConnection
from bridge.system.safe_read import UnreadableError
from bridge.words import one_line

#: Where a pod finds its service account.
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MERGE_PATCH = "application/merge-patch+json"
_JSON = "application/json"
_encode = json.JSONEncoder(separators=(",", ":")).encode

TIMEOUT_SECONDS = 10.0
#: The largest object that etcd takes, as JSON.
_MAX_ANSWER_BYTES = 4 << 20
#: A token is rotated by the kubelet long before it ends.
_READ_AGAIN_SECONDS = 60.0
_PIECE_BYTES = 1 << 16


class ApiDownError(BridgeError):
    """No answer of the API server that is about the request; the text says why."""

    exit_code: ClassVar[int] = Exit.UNAVAILABLE
    hint = "is the API server up, and is it the one that the gateway's kubeconfig names?"


class AccessError(BridgeError):
    """The credentials can't be read."""

    exit_code: ClassVar[int] = Exit.USAGE


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer."""

    status: int
    body: bytes = field(repr=False)

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """Its JSON; empty if it is no object. Of a write that went well nobody needs it."""
        return _document(self.body)

    @property
    def message(self) -> str:
        """The end of an error's text: the beginning may repeat the request, or the object."""
        text = str(self.document.get("message", ""))
        return one_line(text[-600:].rpartition(": ")[2] or text[-300:])


@dataclass(frozen=True, kw_only=True)
class Access:
    """Where the server is, and who we are to it."""

    host: str
    port: int
    server_name: str | None
    token: str | None = field(repr=False)
    tls: ssl.SSLContext = field(repr=False)

    def __post_init__(self) -> None:
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ValueError("wanted a token, found more than one word of ASCII text")

    @property
    def headers(self) -> dict[str, str]:
        """Who we are, if a certificate does not say it."""
        return {"Authorization": f"Bearer {self.token}"} if self.token is not None else {}

    @cached_property
    def lines(self) -> str:
        """The same, whole lines."""
        return "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())

    @property
    def place(self) -> str:
        """For the header `Host`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def connect(self, seconds: float = TIMEOUT_SECONDS) -> ssl.SSLSocket:
        """
        A new connection.

        Raises:
            OSError: There is none.
        """
        raw = socket.create_connection((self.host, self.port), seconds)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return self.tls.wrap_socket(raw, server_hostname=self.server_name or self.host)
        except BaseException:
            raw.close()
            raise


def read_access(config: Path | None) -> Access:
    """
    From a kubeconfig, or else from the pod's service account.

    Raises:
        AccessError: They are not there, or can't be used.
    """
    try:
        return _of_pod() if config is None else _of_kubeconfig(config)
    except (UnreadableError, KubeconfigError, ValueError, https.HttpsError) as e:
        where = config or SERVICE_ACCOUNT
        raise AccessError(f"{where}: {e}", hint="gateway.kubeconfig names a kubeconfig") from None


def _of_pod() -> Access:
    host = os.environ.get("KUBERNETES_SERVICE_HOST")
    if not host:
        raise ValueError("wanted a kubeconfig (gateway.kubeconfig), or a pod with a service account, found neither")
    token = _bytes(SERVICE_ACCOUNT / "token", "a token").decode("ascii").strip()
    return Access(
        host=host,
        port=int(os.environ.get("KUBERNETES_SERVICE_PORT", "443")),
        server_name=None,
        token=token,
        tls=https.context(_bytes(SERVICE_ACCOUNT / "ca.crt", "a CA certificate"), None, None),
    )


def _of_kubeconfig(path: Path) -> Access:
    data = _bytes(path, "a kubeconfig")
    parsed = kubeconfig.parse(data)
    url = urlsplit(parsed.server)
    if url.scheme != "https" or not url.hostname:
        raise ValueError(f"wanted an https: server, found {one_line(parsed.server)!r}")

    def part(embedded: bytes | None, file: str | None, what: str) -> bytes:
        return embedded or _bytes(path.parent / (file or ""), what)

    trust = part(parsed.ca_data, parsed.ca_file, "a CA certificate")
    if parsed.token_file:
        token = _bytes(path.parent / parsed.token_file, "a token").decode("ascii").strip()
        tls = https.context(trust, None, None)
    else:
        certificate = part(parsed.certificate_data, parsed.certificate_file, "a client certificate")
        key = part(kubeconfig.key_data(data), parsed.key_file, "a client key")
        token, tls = None, https.context(trust, certificate, key)
    return Access(host=url.hostname, port=url.port or 443, server_name=parsed.tls_server_name, token=token, tls=tls)


def _bytes(path: Path, what: str) -> bytes:
    found = safe_read.read(path)
    if not found:
        raise ValueError(f"wanted {what} in {path}, found none")
    return found


class Api:
    """From any thread."""

    def __init__(self, config: Path | None) -> None:
        """
        Raises:
            AccessError: As `read_access`.
        """
        self._config = config
        self._mutex = threading.Lock()
        self._access = read_access(config)
        self._read_at = time.monotonic()
        self._own = threading.local()
        self._opened: set[KeptConnection] = set()

    @property
    def server(self) -> str:
        """For messages."""
        return f"{self._access.host}:{self._access.port}"

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
        One request; any status but 401, 408, 429 and 5xx is an answer.

        It is made once more when a kept connection had ended: whoever writes names a resourceVersion.

        Raises:
            ApiDownError: No answer.
        """
        data = None if body is None else _encode(body).encode()
        lines = f"Accept: {accept}\r\n"
        if data is not None:
            lines += f"Content-Type: {content_type}\r\n"
        access = self._current()
        reply = self._asked(access, method, path, data, lines)
        if reply.status == HTTPStatus.UNAUTHORIZED:
            reply = self._asked(self._renewed(access), method, path, data, lines)
        is_trouble = reply.status >= HTTPStatus.INTERNAL_SERVER_ERROR or reply.status in {
            HTTPStatus.UNAUTHORIZED, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.REQUEST_TIMEOUT,
        }  # fmt: skip
        if is_trouble:
            raise ApiDownError(f"{self.server}: wanted an answer, found HTTP {reply.status} {reply.message}".rstrip())
        return reply

    def _asked(self, access: Access, method: str, path: str, data: bytes | None, lines: str) -> Reply:
        connection = self._connection(access)
        for _ in range(2):
            try:
                answer = connection.ask(
                    method, path, access.lines + lines, data, seconds=TIMEOUT_SECONDS, longest=_MAX_ANSWER_BYTES
                )
                return Reply(status=answer.status, body=answer.body)
            except (OSError, ValueError) as e:
                if not connection.is_kept or isinstance(e, TimeoutError):
                    raise ApiDownError(f"{self.server}: {_why(e)}") from None
        raise AssertionError("the second connection was not kept")

    def _connection(self, access: Access) -> KeptConnection:
        """The thread's own."""
        kept: tuple[Access, KeptConnection] | None = getattr(self._own, "kept", None)
        if kept is not None and kept[0] is access:
            return kept[1]
        connection = KeptConnection(access.connect, access.place)
        self._own.kept = (access, connection)
        with self._mutex:
            if kept is not None:
                kept[1].close()
                self._opened.discard(kept[1])
            self._opened.add(connection)
        return connection

    def _current(self) -> Access:
        access = self._access
        return access if time.monotonic() - self._read_at < _READ_AGAIN_SECONDS else self._renewed(access)

    def _renewed(self, old: Access) -> Access:
        """The credentials as they are now; the old ones where they can't be read at this moment."""
        with self._mutex:
            if self._access is not old:
                return self._access
            self._read_at = time.monotonic()
            with contextlib.suppress(AccessError):
                self._access = read_access(self._config)
            return self._access

    def close(self) -> None:
        """End the connections of all threads, which ask no more."""
        with self._mutex:
            for connection in self._opened:
                connection.close()

    @contextlib.contextmanager
    def lines(self, path: str, silence_seconds: float, longest: int) -> Iterator[Lines]:
        """
        A stream of lines, each a JSON text.

        Args:
            path: With its query.
            silence_seconds: After which the connection counts as dead.
            longest: Longer lines are left out, and counted.

        Raises:
            ApiDownError: No stream; while it is read, that it broke.
        """
        access = self._current()
        connection = http.client.HTTPConnection(access.host, access.port)
        try:
            connection.sock = access.connect()
            connection.request("GET", path, headers={"Accept": _JSON, **access.headers})
            response = connection.getresponse()
            if response.status != HTTPStatus.OK:
                if response.status == HTTPStatus.UNAUTHORIZED:
                    self._renewed(access)
                reply = Reply(status=response.status, body=response.read(_MAX_ANSWER_BYTES))
                raise ApiDownError(f"{self.server}: wanted to watch, found HTTP {reply.status} {reply.message}")
            connection.sock.settimeout(silence_seconds)
            yield Lines(response, connection, longest, self.server)
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise ApiDownError(f"{self.server}: {_why(e)}") from None
        finally:
            connection.close()


class Lines:
    """The lines of one stream."""

    def __init__(
        self, response: http.client.HTTPResponse, connection: http.client.HTTPConnection, longest: int, server: str
    ) -> None:
        self._response = response
        self._connection = connection
        self._longest = longest
        self._server = server
        self.left_out = 0  #: Lines that were too long.

    def __iter__(self) -> Iterator[bytes]:
        """
        Each line without its end.

        Raises:
            ApiDownError: It broke.
        """
        kept, skipping = bytearray(), False
        while piece := self._piece():
            *whole, rest = piece.split(b"\n")
            for part in whole:
                kept += part
                if skipping or len(kept) > self._longest:
                    self.left_out += 1
                else:
                    yield bytes(kept)
                kept, skipping = bytearray(), False
            kept += rest
            if len(kept) > self._longest:
                kept, skipping = bytearray(), True

    def _piece(self) -> bytes:
        try:
            return self._response.read1(_PIECE_BYTES)
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as e:  # the last: closed from outside
            raise ApiDownError(f"{self._server}: the watch broke: {_why(e)}") from None

    def end(self) -> None:
        """From another thread: nothing more comes."""
        opened = self._connection.sock
        with contextlib.suppress(OSError):
            if opened is not None:
                opened.shutdown(socket.SHUT_RDWR)  # which wakes whoever reads


def _document(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not trusted: {error.verify_message}"
    if isinstance(error, OSError):
        return (error.strerror or type(error).__name__).lower()
    return type(error).__name__
