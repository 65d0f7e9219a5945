"""
A server, and a connection to it, with or without TLS: whom we trust, who we are, and why there is no connection.

Keys stay in memory; environment variables have no effect.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.serialization import Encoding

from bridge.errors import BridgeError, Exit
from bridge.pki.certificates import load_pem_certificates
from bridge.system.waiting import within
from bridge.words import one_line

#: Alerts (RFC 8446 §6) by which a server rejects a client certificate, as OpenSSL spells them.
_TURNED_AWAY = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")
#: Ends of a connection that may have any cause.
_CUT_OFF = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError, BrokenPipeError)


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


@dataclass(kw_only=True)
class Peer:
    """A server, and how to connect to it."""

    host: str  #: Host name or address.
    port: int
    tls: Callable[[], ssl.SSLContext] | None = None  #: Makes the client's context; None: without TLS.
    server_name: str | None = None  #: For SNI and the server's certificate, if it differs from the host.
    alert_seconds: float = 0.0  #: How long to listen for why a connection broke, see `alert`; 0: do not.
    _heard: ssl.SSLError | None = field(default=None, init=False, repr=False)
    _heard_at: float = field(default=0.0, init=False, repr=False)
    _listens: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

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

    def connected(self, seconds: float) -> socket.socket:
        """Open a connection (HttpsError)."""
        try:
            return within(seconds, lambda: self._connected(seconds))
        except (OSError, ValueError) as e:  # ValueError: no valid host name
            raise failure_of(e, seconds) from e

    def _connected(self, seconds: float) -> socket.socket:
        tls = None if self.tls is None else self.tls()
        raw = _opened(self.host, self.port, seconds)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # Nagle's delay would hold up small requests
            raw.settimeout(seconds)
            if tls is None:
                return raw
            tls.sslsocket_class = TlsSocket
            # an end without close_notify is an error, too: the answer may be cut short; Python 3.11.2 sets the option
            tls.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
            return tls.wrap_socket(raw, server_hostname=self.server_name or self.host, suppress_ragged_eofs=False)
        except BaseException:
            raw.close()
            raise

    def alert(self, since: float) -> ssl.SSLError | None:
        """
        The TLS alert that a broken connection may have swallowed, read from a new connection on which nothing is sent.

        It listens once for all requests that were in progress then, each of which would wait as long.
        """
        # in TLS 1.3 a server judges the client late (RFC 8446 §4.4.2.4); the kernel drops the alert if a request is unread
        if self.tls is None or not self.alert_seconds:
            return None
        with self._listens:
            if self._heard_at < since:
                self._heard_at, self._heard = time.monotonic(), None
                try:
                    with self.connected(self.alert_seconds) as listening:
                        listening.settimeout(self.alert_seconds)
                        listening.recv(1)
                except (OSError, BridgeError) as e:
                    cause = e.__cause__ or e
                    if isinstance(cause, ssl.SSLError) and not is_cut_off(cause):
                        self._heard = cause.with_traceback(None)
            return self._heard


def _opened(host: str, port: int, seconds: float) -> socket.socket:
    """Connect to the first address of a name that answers; they share the time, so that a dead one leaves the others some."""
    end = time.monotonic() + seconds
    addresses = [str(address[0]) for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    while True:
        share = max(0.001, (end - time.monotonic()) / len(addresses))
        try:
            return socket.create_connection((addresses.pop(0), port), share)
        except OSError:
            if not addresses:
                raise


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
            raise UntrustedError(f"wanted a trust anchor, found {e}") from None
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
            reason = (e.reason or "something else").replace("_", " ").lower()
            raise ClientRefusedError(f"wanted a certificate and its key, found: {reason}") from None


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

    def shutdown(self, how: int) -> None:
        """Shut down the connection; `SSLSocket` would go on reading without TLS."""
        socket.socket.shutdown(self, how)


def is_cut_off(error: BaseException | None) -> bool:
    """Whether the other side ended the connection; Python 3.11.2 has no exception of its own for an end within TLS."""
    return isinstance(error, _CUT_OFF) or getattr(error, "reason", "") == "UNEXPECTED_EOF_WHILE_READING"


def failure_of(error: Exception, seconds: float) -> HttpsError:
    """Turn an error of Python's into ours."""
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
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UnreachableError(one_line(text).lower())
