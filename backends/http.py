"""
HTTP as every backend wants it: limits of time and size, one TLS context, nothing of the environment's.

No rules of any CA are here; only what would be the same in each file beside this one.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import requests
from cryptography import x509
from cryptography.x509.oid import NameOID
from requests.adapters import HTTPAdapter
from requests.exceptions import ChunkedEncodingError
from urllib3.connection import HTTPSConnection
from urllib3.connectionpool import HTTPSConnectionPool

from bridge.errors import SettingsError, SettingsProblem
from bridge.system import kept_http
from bridge.system.https import HttpsError, alert, context
from bridge.system.kept_http import KeptConnection, TooLongError
from bridge.words import one_line

#: A signed certificate with its chain is a few kB, one with thousands of SANs far below this.
MAX_ANSWER_BYTES = 1 << 20

T = TypeVar("T")


#: A connection's end that may have any cause.
CUT_OFF = (ssl.SSLEOFError, ConnectionResetError, BrokenPipeError)


#: For the second look at a connection that broke.
_ALERT_SECONDS = 5.0


class TooMuchError(Exception):
    """An answer without end."""


class TlsRefusedError(Exception):
    """One side of a TLS connection did not accept the other; the text is OpenSSL's."""


class NoAnswerError(Exception):
    """No whole answer, for a reason that may pass; the text is the innermost cause's."""

    def __init__(self, text: str, *, cut_off: bool = False, hint: str = "") -> None:
        super().__init__(text)
        self.cut_off = cut_off  #: The other side ended the connection, and did not say why.
        self.hint = hint  #: What to look at, where the cause tells; may be empty.


def is_loopback(host: str) -> bool:
    """Whether it is this machine, to which a secret may go in the clear."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def within(seconds: float, work: Callable[[], T]) -> T:
    """
    Call `work` in a thread of its own with a limit of time; returns or raises what it does.

    The timeouts of `requests` are for each step, so an answer that drips, a name with many addresses or a slow
    resolver could take any time.

    Raises:
        TimeoutError: It took longer; it is left to itself, and what it returns after all is closed.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as e:  # noqa: BLE001 (it is raised on the other side)
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        future.add_done_callback(_close)
        raise


def _close(late: Future[Any]) -> None:
    if late.exception() is None and hasattr(late.result(), "close"):
        late.result().close()


def body_of(response: requests.Response) -> bytes:
    """
    The body of an answer that was asked for with `stream=True`.

    Raises:
        TooMuchError: It is longer than `MAX_ANSWER_BYTES`.
    """
    found = bytearray()
    for chunk in response.iter_content(1 << 14):
        found += chunk
        if len(found) > MAX_ANSWER_BYTES:
            response.close()
            raise TooMuchError(f"wanted an answer of at most {MAX_ANSWER_BYTES} bytes, found a longer one")
    return bytes(found)


class HasHeaders(Protocol):
    """An answer, of whichever client."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, by name in small letters, at least."""
        ...


def retry_after_seconds(response: HasHeaders, now: datetime) -> float | None:
    """The seconds in a Retry-After header (RFC 9110 §10.2.3: seconds, or a date); None: no header, or neither."""
    value = response.headers.get("retry-after")
    if value is None:
        return None
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - now).total_seconds())
    except (ValueError, TypeError, OverflowError):  # TypeError: a date without a time zone
        return None


def clock_ahead(response: HasHeaders, now: datetime) -> timedelta | None:
    """How far the server's clock is ahead of ours (RFC 9110 §6.6.1, whole seconds); None: it does not say."""
    try:
        return parsedate_to_datetime(response.headers.get("date", "")) - now
    except (ValueError, TypeError, OverflowError):
        return None


#: Of a server whose certificate is not valid yet.
CLOCK_HINT = "is this node's clock behind? then put it right; else the server's certificate begins in the future"


def is_too_early(reason: str) -> bool:
    """Whether OpenSSL refused a certificate that is not valid *yet* (X509_V_ERR_CERT_NOT_YET_VALID)."""
    return "not yet valid" in reason


def without(text: str, hidden: Iterable[str | None]) -> str:
    """A server's text with our secrets blotted out, should the server repeat them."""
    for value in hidden:
        text = text.replace(value, "…") if value else text
    return text


def common_name(client_cert: Path) -> str:
    """
    Whom a client certificate names, such as `CN=node-1`.

    Raises:
        ValueError: The file holds no certificate that can be read.
    """
    try:
        subject = x509.load_pem_x509_certificate(client_cert.read_bytes()).subject
    except (OSError, ValueError) as e:
        raise ValueError(f"{client_cert}: wanted the client certificate, found {type(e).__name__}") from e
    return " ".join(f"CN={name.value!s}" for name in subject.get_attributes_for_oid(NameOID.COMMON_NAME))


def causes(e: BaseException | None) -> Iterator[BaseException]:
    """Outermost first: requests wraps what urllib3 wraps, each in its own way, and some are nowhere but in args."""
    while e is not None:
        yield e
        inner = (getattr(e, "reason", None), e.__cause__, e.__context__, *e.args)
        e = next((i for i in inner if isinstance(i, BaseException)), None)


def innermost(e: BaseException) -> BaseException:
    """The cause that says it shortest; those above it quote the whole request line."""
    *_, last = causes(e)
    return last


def hint_of(error: BaseException) -> str:
    """A hint for a connection that failed; empty where the cause may be anything."""
    for cause in causes(error):
        if isinstance(cause, ConnectionRefusedError):
            return "nobody listens there: is the server up, and is the port in `url` right?"
        if isinstance(cause, socket.gaierror):
            return (
                "the name could not be looked up: is the host in `url` right, and does this machine's resolver know it?"
            )
    return ""


def tls_context(ca_file: Path | None, client_cert: Path | None, client_key: Path | None) -> ssl.SSLContext:
    """
    TLS 1.2 at least, the server's name and chain checked, our certificate shown if there is one.

    Args:
        ca_file: Trusted for the server's certificate; None: the system's CAs, and not those that requests carries along.
        client_cert: With its chain.
        client_key: Not encrypted.

    Raises:
        SettingsError: A file can't be used; all of them are named.
    """
    # not create_default_context, which would obey SSLKEYLOGFILE
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    problems = []
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
        else:
            load_system_cas(context)
    except OSError as e:
        problems.append(SettingsProblem("ca_file", "a file with PEM certificates", f"{ca_file}: {e.strerror}"))
    if client_cert and client_key:
        try:
            # without the function OpenSSL would ask the terminal for a passphrase, and a cron job would hang
            context.load_cert_chain(client_cert, client_key, password=lambda: "")
        except (OSError, ValueError) as e:
            reason = (isinstance(e, OSError) and e.strerror) or str(e)
            wanted = "PEM files with a certificate and its key, not encrypted"
            problems.append(SettingsProblem("client_cert", wanted, f"{client_cert} and {client_key}: {reason}"))
    if problems:
        raise SettingsError(problems)
    return context


def context_of(trust_pem: bytes, certificate_pem: bytes | None, key_pem: bytes | None) -> ssl.SSLContext:
    """
    The same from what is in memory; the key gets onto no disk.

    Args:
        trust_pem: Trusted for the server's certificate, and nothing else is.
        certificate_pem: With its chain.
        key_pem: Not encrypted.

    Raises:
        ValueError: Something of it can't be used.
    """
    try:
        made = context(trust_pem, certificate_pem, key_pem)
    except HttpsError as e:
        raise ValueError(str(e)) from None
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.hostname_checks_common_name = False
    return made


def load_system_cas(context: ssl.SSLContext) -> None:
    """
    Trust the system's CAs: those of the places that OpenSSL was built with.

    Not `load_default_certs`, where SSL_CERT_FILE and SSL_CERT_DIR come first: the environment has no say in whom a
    token is sent to.
    """
    built_in = ssl.get_default_verify_paths()
    file, directory = Path(built_in.openssl_cafile), Path(built_in.openssl_capath)
    if file.is_file():
        context.load_verify_locations(cafile=file)
    if directory.is_dir():
        context.load_verify_locations(capath=directory)


class TlsAdapter(HTTPAdapter):
    """
    Connections with one TLS context, which alone says whom we trust and who we are.

    `requests` would add the CAs of certifi to it, where we mean the system's.
    """

    def __init__(self, tls: ssl.SSLContext, **options: Any) -> None:
        self._tls = tls
        super().__init__(**options)

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: bool | str, cert: str | tuple[str, str] | None = None
    ) -> Any:
        """Make the pool use our TLS context."""
        host, pool = super().build_connection_pool_key_attributes(request, verify, cert)
        pool["ssl_context"] = self._tls
        return host, pool

    def cert_verify(self, conn: Any, url: object, verify: object, cert: object) -> None:
        """Leave the verification of certificates to the context."""


_limit = threading.local()  #: Of the request that this thread makes: `end`, of the monotonic clock.


def _seconds_left() -> float:
    """
    Raises:
        TimeoutError: None.
    """
    left: float = _limit.end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _TimedSocket(ssl.SSLSocket):
    """TLS whose reading and writing ends with the request's time, however slowly bytes drip."""

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(_seconds_left())
        return super().recv_into(buffer, nbytes, flags)

    def send(self, data: Any, flags: int = 0) -> int:
        self.settimeout(_seconds_left())
        return super().send(data, flags)


class _TimedConnection(HTTPSConnection):
    """A connection with a limit of time on connecting: a name may have many addresses, and a resolver be slow."""

    def connect(self) -> None:
        within(_seconds_left(), super().connect)


class _TimedPool(HTTPSConnectionPool):
    ConnectionCls = _TimedConnection


class _TimedAdapter(TlsAdapter):
    """
    Limits the time of a request without a thread for each, which would cost as much as the request.

    Its sockets serve the thread that has called `Sessions.send`.
    """

    def __init__(self, tls: ssl.SSLContext) -> None:
        tls.sslsocket_class = _TimedSocket
        super().__init__(tls)
        self.poolmanager.pool_classes_by_scheme = {"https": _TimedPool}


class Sessions:
    """
    Requests with a limit of time and size, without the environment's proxies and CAs; for several threads.

    Sessions and TLS contexts are not for several threads at once, so each request has one for itself.
    """

    def __init__(self, timeout: timedelta, tls: Callable[[], ssl.SSLContext] | None) -> None:
        """
        Args:
            timeout: For one request with its whole answer.
            tls: Makes a context; None: plain HTTP.
        """
        self._seconds = timeout.total_seconds()
        self._tls = tls
        self._idle: deque[requests.Session] = deque()
        self.clock_ahead: timedelta | None = None  #: The server's, at its latest answer.

    def send(self, method: str, url: str, **options: Any) -> tuple[requests.Response, bytes]:
        """
        Send one request; a redirect is an answer like any other.

        Args:
            method: `GET` or `POST`.
            url: Whole.
            options: Of `requests.Session.request`, such as `json`, `data`, `headers` and `auth`.

        Returns:
            The answer and its body.

        Raises:
            TlsRefusedError: One side did not accept the other.
            NoAnswerError: No whole answer in time.
            TooMuchError: An answer without end.
            SettingsError: A TLS file can't be used any more.
            requests.RequestException: What can't be sent, or is no HTTP.
        """
        try:
            return self._timed(lambda: self._exchange(method, url, options))
        except (TimeoutError, requests.ConnectionError, requests.Timeout, ChunkedEncodingError) as e:
            cause = innermost(e)
            if isinstance(cause, TimeoutError):
                raise NoAnswerError(f"no answer within {self._seconds:g} s") from e
            if isinstance(cause, CUT_OFF) and self._tls:
                cause = self._alert(url, self._tls) or cause
            if isinstance(cause, ssl.SSLError) and not isinstance(cause, CUT_OFF):
                raise TlsRefusedError(one_line(str(cause))) from e
            raise NoAnswerError(one_line(str(cause)), cut_off=isinstance(cause, CUT_OFF), hint=hint_of(e)) from e

    def _alert(self, url: str, tls: Callable[[], ssl.SSLContext]) -> ssl.SSLError | None:
        parts = urlsplit(url)
        try:
            context = tls()
        except SettingsError:  # a file can't be used any more; the next request says so
            return None
        return alert(parts.hostname or "", parts.port or 443, context, None, min(self._seconds, _ALERT_SECONDS))

    def close(self) -> None:
        """Close the connections that are not in use."""
        while self._idle:
            self._idle.pop().close()

    def _timed(self, exchange: Callable[[], T]) -> T:
        if self._tls is None:  # whose sockets are not ours; only on this machine
            return within(self._seconds, exchange)
        _limit.end = time.monotonic() + self._seconds
        return exchange()

    def _exchange(self, method: str, url: str, options: dict[str, Any]) -> tuple[requests.Response, bytes]:
        try:
            session = self._idle.pop()
        except IndexError:
            session = self._new_session()
        try:
            with session.request(
                method,
                url,
                # not left to the session, where REQUESTS_CA_BUNDLE would come first
                verify=True,
                allow_redirects=False,  # would go on as a GET, and take a password along
                timeout=self._seconds,
                stream=True,
                **options,
            ) as response:
                self.clock_ahead = clock_ahead(response, datetime.now(UTC))
                body = body_of(response)
        except BaseException:
            session.close()
            raise
        self._idle.append(session)
        return response, body

    def _new_session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False  # no proxies, no .netrc, no REQUESTS_CA_BUNDLE
        session.headers["Accept-Encoding"] = "identity"
        if self._tls:
            session.mount("https://", _TimedAdapter(self._tls()))
        return session


class KeptConnections:
    """
    Small requests to one server, thousands of them, over connections that are kept; for several threads.

    Without `requests`, which takes several times the processor time of such a request. No request is repeated.
    """

    def __init__(self, url: str, timeout: timedelta, tls: Callable[[], ssl.SSLContext]) -> None:
        """
        Args:
            url: `https:` or `http:`, host and port, and what each path begins with.
            timeout: For one request with its whole answer.
            tls: Makes a context, which is not for several threads at once.
        """
        parts = urlsplit(url)
        self._host, self._is_tls = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._is_tls else 80)
        self._place = parts.netloc.rpartition("@")[2]
        self._path = parts.path.rstrip("/")
        self._seconds = timeout.total_seconds()
        self._tls = tls
        self._idle: deque[KeptConnection] = deque()

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> kept_http.Answer:
        """
        Send one request; any status is an answer, a redirect like any other.

        Args:
            method: HTTP's.
            path: Quoted, from its slash.
            headers: Besides those of HTTP itself.
            body: Of the request.

        Raises:
            OSError: There is no connection, or it failed: `ssl.SSLError`, and `TimeoutError` for the time limit.
            TooMuchError: An answer without end.
            kept_http.NotHttpError: It is no answer, or broke off.
            SettingsError: A TLS file can't be used any more.
            ValueError: A header can't be sent.
        """
        if not all(f"{name}{value}".isprintable() for name, value in headers.items()):
            raise ValueError("wanted headers of one line each")
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        connection = self._taken()
        try:
            answer = connection.ask(
                method, f"{self._path}{path}", lines, body, seconds=self._seconds, longest=MAX_ANSWER_BYTES
            )
        except TooLongError as e:
            raise TooMuchError(str(e)) from e
        self._idle.append(connection)
        return answer

    def close(self) -> None:
        """Close the connections that are not in use."""
        while self._idle:
            self._idle.pop().close()

    def _taken(self) -> KeptConnection:
        try:
            return self._idle.pop()
        except IndexError:
            return KeptConnection(self._connect, self._place)

    def _connect(self) -> socket.socket:
        # a name that may have many addresses, and a resolver that may be slow; neither can be told a limit
        return within(self._seconds, self._connected)

    def _connected(self) -> socket.socket:
        tls = self._tls() if self._is_tls else None
        return kept_http.connect(self._host, self._port, tls, self._host, self._seconds)
