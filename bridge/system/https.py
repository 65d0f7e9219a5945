"""
A small HTTPS client for what runs on a node, and for its neighbours.

One connection and one request, with a time limit for all of it; no redirects, no proxies, no keys on disk.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.errors import BridgeError, Exit
from bridge.pki.certificates import load_pem_certificates
from bridge.words import one_line

#: Answers to a probe are far below.
MAX_ANSWER_BYTES = 1 << 20

#: Alerts (RFC 8446 §6) with which a server turns a client certificate away, as OpenSSL spells them.
_TURNED_AWAY = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")


class HttpsError(BridgeError):
    """No answer, whatever the cause."""

    exit_code: ClassVar[int] = Exit.UNAVAILABLE


class UnreachableError(HttpsError):
    """No connection, one that ended too early, or no answer in time; the text is the operating system's."""


class UntrustedError(HttpsError):
    """The server's certificate does not lead to the trust anchors, or is not for this name."""


class ClientRefusedError(HttpsError):
    """The server turned the client certificate away (TLS), or certificate and key can't be used here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAnswer:
    """A server's answer."""

    status: int
    body: bytes  #: At most `MAX_ANSWER_BYTES` of it.


def request(
    url: str,
    *,
    trust_pem: bytes | None,
    certificate_pem: bytes | None = None,
    key_pem: bytes | None = None,
    server_name: str | None = None,
    method: str = "GET",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_seconds: float,
) -> HttpAnswer:
    """
    Ask once; any status is an answer.

    Args:
        url: `https:` or `http:`.
        trust_pem: Trust anchors; None: whoever answers will do, and the caller looks at the certificate.
        certificate_pem: The client's leaf and intermediates, if it has one.
        key_pem: Its key, unencrypted.
        server_name: For SNI and in the server's certificate, where that is not the URL's host.
        method: HTTP's.
        body: JSON.
        headers: More of them.
        timeout_seconds: For all of it, but for what the resolver takes to look up a name.

    Raises:
        UnreachableError, UntrustedError, ClientRefusedError: No answer, or no such URL.
    """
    try:
        parts = urlsplit(url)
        host, port = _host(url), parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as e:
        raise UnreachableError(f"wanted a URL, found {one_line(url)!r}") from e
    tls = context(trust_pem, certificate_pem, key_pem) if parts.scheme == "https" else None
    given = {"Accept": "application/json", **({"Content-Type": "application/json"} if body else {}), **(headers or {})}
    target = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
    try:
        with _connected(host, port, tls, server_name, timeout_seconds) as opened:
            connection = http.client.HTTPConnection(host, port)
            connection.sock = opened
            connection.request(method, target, body, given)
            response = connection.getresponse()
            return HttpAnswer(status=response.status, body=_body(response))
    except UnreachableError:
        if tls is None or certificate_pem is None:
            raise
        refused = alert(host, port, tls, server_name, min(timeout_seconds, 1))
        if refused is not None and isinstance(ours := _as_ours(refused), ClientRefusedError):
            raise ours from None
        raise


def _body(response: http.client.HTTPResponse) -> bytes:
    """
    The body, or its first `MAX_ANSWER_BYTES`.

    Raises:
        IncompleteRead: It ended before the length that was told.
    """
    body = response.read(MAX_ANSWER_BYTES)
    if response.length and len(body) < MAX_ANSWER_BYTES:
        raise http.client.IncompleteRead(body, response.length)
    return body


def served(
    host: str,
    port: int,
    *,
    trust_pem: bytes | None = None,
    server_name: str | None = None,
    certificate_pem: bytes | None = None,
    key_pem: bytes | None = None,
    timeout_seconds: float,
) -> x509.Certificate:
    """
    The leaf that a server shows in a handshake; nothing is asked.

    Args:
        host: Name or address; an address sends no SNI.
        port: TCP.
        trust_pem: As in `request`; None: whoever has signed it.
        server_name: As in `request`.
        certificate_pem: A client certificate, for servers that want one (with TLS 1.2 they show nothing without).
        key_pem: Its key.
        timeout_seconds: For all of it.

    Raises:
        UnreachableError, UntrustedError, ClientRefusedError: No handshake.
    """
    tls = context(trust_pem, certificate_pem, key_pem)
    with _connected(host, port, tls, server_name, timeout_seconds) as opened:
        der = opened.getpeercert(binary_form=True) if isinstance(opened, ssl.SSLSocket) else None
    if der is None:
        raise UnreachableError("wanted a server certificate, found none")
    return x509.load_der_x509_certificate(der)


def context(trust_pem: bytes | None, certificate_pem: bytes | None, key_pem: bytes | None) -> ssl.SSLContext:
    """
    A TLS client; arguments as in `request`.

    An anchor need not be self-signed, as in Go. The key is in memory only.

    Raises:
        UntrustedError: No certificate among the trust anchors.
        ClientRefusedError: Certificate and key don't belong together, or can't be used.
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
    """OpenSSL reads from a path alone: one that leads to memory."""
    with os.fdopen(os.memfd_create("pair"), "wb") as file:
        file.write(certificate_pem.rstrip() + b"\n" + key_pem)
        file.flush()
        try:
            # A password that is wrong, or else OpenSSL asks the terminal for that of an encrypted key.
            tls.load_cert_chain(f"/proc/self/fd/{file.fileno()}", password="")
        except ssl.SSLError as e:
            found = (e.reason or "something else").replace("_", " ").lower()
            raise ClientRefusedError(f"wanted a certificate and its key, found: {found}") from None


@contextlib.contextmanager
def _connected(
    host: str, port: int, tls: ssl.SSLContext | None, server_name: str | None, timeout_seconds: float
) -> Iterator[socket.socket]:
    """A connection that is cut when the time is over, and what goes wrong with it as our errors."""
    late = threading.Event()
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(socket.create_connection((host, port), timeout_seconds))
            stack.enter_context(_ends(raw, late, timeout_seconds))
            if tls is None:
                yield raw
            else:
                raw.getpeername()  # of one that was reset by now, Python's wrapper would be left open (SSLSocket._create)
                # Not even an end without TLS's own word is one: somebody may have cut the answer short.
                yield stack.enter_context(
                    tls.wrap_socket(raw, server_hostname=server_name or host, suppress_ragged_eofs=False)
                )
        if late.is_set():  # what was read until then looks whole where its length was not told
            raise TimeoutError
    except ssl.SSLCertVerificationError as e:
        raise UntrustedError(f"the server's certificate is not trusted: {e.verify_message}") from None
    except (OSError, http.client.HTTPException, ValueError) as e:
        if late.is_set() or isinstance(e, TimeoutError):
            raise UnreachableError(f"no answer within {timeout_seconds:g} s") from None
        raise _as_ours(e) from None


@contextlib.contextmanager
def _ends(opened: socket.socket, late: threading.Event, seconds: float) -> Iterator[None]:
    """End a connection from another thread; by a second descriptor, since the first may be closed and taken again."""
    with opened.dup() as twin:

        def cut() -> None:
            late.set()
            with contextlib.suppress(OSError):  # it has ended already
                twin.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(seconds, cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()


def _as_ours(error: Exception) -> HttpsError:
    if isinstance(error, ssl.SSLError):
        reason = error.reason or "the connection ended within TLS"
        words = reason.replace("_", " ").lower()
        if "ALERT" in reason and any(part in reason for part in _TURNED_AWAY):
            return ClientRefusedError(f"the client certificate was refused: {words}")
        return UnreachableError(words)
    if isinstance(error, OSError):
        return UnreachableError((error.strerror or type(error).__name__).lower())
    return UnreachableError(f"wanted an answer in HTTP, found {type(error).__name__}")


def alert(host: str, port: int, tls: ssl.SSLContext, server_name: str | None, seconds: float) -> ssl.SSLError | None:
    """
    Listen for the alert that a broken connection may have swallowed: why the server turned us away, if it did.

    In TLS 1.3 a server judges the client after its own handshake has ended (RFC 8446 §4.4.2.4). If it closes while
    our request is unread, the kernel resets the connection and throws the alert away; so this time nothing is sent.

    Args:
        host: Name or address.
        port: TCP.
        tls: As the connection that broke.
        server_name: For SNI and in the server's certificate; None: the host.
        seconds: For all of it.
    """
    try:
        with (
            socket.create_connection((host, port), seconds) as raw,
            _ends(raw, threading.Event(), seconds),
            tls.wrap_socket(raw, server_hostname=server_name or host) as listening,
        ):
            listening.recv(1)
    except ssl.SSLError as e:
        return None if isinstance(e, ssl.SSLEOFError | ssl.SSLZeroReturnError) else e
    except (OSError, ValueError):
        return None
    return None


def _host(url: str) -> str:
    host = urlsplit(url).hostname
    if not host:
        raise ValueError(f"wanted a URL with a host, found {url!r}")
    return host
