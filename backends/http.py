"""HTTP for all backends, by requests: limits of time and size, no environment variables, one mapping of errors."""

from __future__ import annotations

import contextlib
import io
import re
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import Any

from requests import PreparedRequest, Response, Session
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict

from bridge.contract import Backend
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    LocalFileError,
    NoVerdictError,
    SettingsError,
)
from bridge.pki.budget import of_server
from bridge.system import http, tls
from bridge.words import one_line

#: Time limit for the second look at a broken connection.
_ALERT_SECONDS = 5.0
#: Statuses that may pass: a limit of requests or of time, a CA that fails behind the server, proxies (RFC 9110 §15.5
#: and §15.6, RFC 6585 §4).
LATER_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
#: The hint for a server whose certificate is not valid yet.
_CLOCK_HINT = "is this node's clock behind? then put it right; else the server's certificate begins in the future"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """A backend's own words for the errors that all backends share."""

    name: str  #: The name of the backend's type, which begins each message.
    not_ours: str  #: The hint if the server is probably another product.
    tls: Callable[[str], str]  #: The hint for a failed handshake, by OpenSSL's text.
    silent: str = ""  #: The hint if there is no answer and the cause says nothing.
    cut_off: str = ""  #: The hint if the server closed the connection without an answer.
    status_suffices: bool = False  #: An error's status counts even if its body broke off.


class _OneServer(HTTPAdapter):
    """
    Sends each request to one server, whatever its URL is, and reads the whole answer within the limits (HttpsError).

    It opens connections on demand, keeps them, and repeats nothing.
    """

    def __init__(self, peer: tls.Peer, seconds: float, *, status_suffices: bool) -> None:
        self._peer, self._seconds, self._status_suffices = peer, seconds, status_suffices
        self.clock = ("", datetime.now(UTC))  #: The header `Date` of the latest answer, and when that came.
        super().__init__()
        self._pool = http.pool(peer)

    def get_connection_with_tls_context(self, *_: Any, **__: Any) -> Any:
        """The server's pool, which has its own TLS context."""
        return self._pool

    def cert_verify(self, *_: Any, **__: Any) -> None:
        """Leave the pool's TLS as it is."""

    def send(self, request: PreparedRequest, *_: Any, **__: Any) -> Response:
        """Send a request once, with none of the caller's other options."""
        try:
            with http.Exchange(self._seconds) as limits:
                response = super().send(request, stream=True)
                self.clock = (response.headers.get("date", ""), datetime.now(UTC))
                limits.assert_allowed(len(response.content))
        except tls.BrokenOffError as e:
            if not self._status_suffices or e.status < 300:  # noqa: PLR2004
                raise
            response.raw = io.BytesIO()  # the reason is lost, the status says enough
        return response

    def close(self) -> None:
        """Begin with new connections; the old ones are closed when no thread uses them any more."""
        self._pool = http.pool(self._peer)
        super().close()


class _Session(Session):
    """A session that takes nothing from the environment, keeps no cookies, and follows no redirect."""

    def __init__(self, adapter: HTTPAdapter) -> None:
        super().__init__()
        self.trust_env = False
        self.headers = CaseInsensitiveDict({"Accept-Encoding": "identity"})
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        for scheme in ("https://", "http://"):
            self.mount(scheme, adapter)

    def get_redirect_target(self, resp: Response) -> None:
        """No answer leads to another place."""


class Http:
    """
    Sends requests to one CA's server over kept connections; several threads may share it.

    Every request goes to this server, whatever its URL is. It repeats nothing, and follows no redirect.
    """

    def __init__(self, wording: Wording, url: str, timeout: timedelta, context: Callable[[], ssl.SSLContext]) -> None:
        """
        `timeout` is for one request with its whole answer. If the URL is `https:`, `context` is called now and for each
        connection, and reads its files again (SettingsError: a file can't be used).
        """
        self._wording = wording
        seconds = timeout.total_seconds()
        peer = tls.Peer.of(url, context, alert_seconds=min(seconds, _ALERT_SECONDS))
        if peer.tls:
            context()  # trouble is found now, not in the middle of a renewal
        self._adapter = _OneServer(peer, seconds, status_suffices=wording.status_suffices)
        self.session = _Session(self._adapter)

    def request(self, method: str, url: str, where: str = "", **options: Any) -> Response:
        """Send one request (`requests.Request` has the options); any status is an answer; messages name `where`."""
        with self.errors(where or url):
            return self.session.request(method, url, **options)

    @property
    def clock_ahead(self) -> timedelta | None:
        """How far the server's clock was ahead of ours at its latest answer (RFC 9110 §6.6.1); None: it did not say."""
        date, now = self._adapter.clock
        return None if (moment := _moment(date)) is None else moment - now

    def close(self) -> None:
        """Close the connections that are not in use."""
        self.session.close()

    @contextlib.contextmanager
    def errors(self, where: str) -> Iterator[None]:
        """The one place where a failure to get an answer becomes a backend's error."""
        try:
            yield
        except tls.HttpsError as e:
            raise self._error(where, e) from e
        except SettingsError as e:  # the files were good when we began
            raise LocalFileError(f"{self._wording.name}: {e}", hint=e.hint) from e
        except ValueError as e:  # its text may quote a header's value
            text = f"{self._wording.name}: {where}: the request could not be made: {type(e).__name__}"
            raise BackendRefusedError(text, hint=self._wording.not_ours) from None

    def _error(self, where: str, error: tls.HttpsError) -> BackendError:
        wording, cause = self._wording, error.__cause__
        if isinstance(error, tls.TooLongError):
            return NoVerdictError(f"{wording.name}: {where}: {error}", hint=wording.not_ours)
        if isinstance(error, tls.UntrustedError | tls.ClientRefusedError | tls.HandshakeError):
            text = one_line(cause or error)
            hint = _CLOCK_HINT if "not yet valid" in text else wording.tls(text)
            return NoVerdictError(f"{wording.name}: {where}: TLS: {text}", hint=hint)
        return BackendUnavailableError(f"{wording.name}: {where}: {error}", hint=self._hint(cause))

    def _hint(self, cause: BaseException | None) -> str:
        if isinstance(cause, ConnectionRefusedError):
            return "nothing listens there: is the server up, and is the port in `url` right?"
        if isinstance(cause, socket.gaierror):
            return "the name can't be looked up: is the host in `url` right, and does this machine's resolver know it?"
        if tls.is_cut_off(cause) and self._wording.cut_off:
            return self._wording.cut_off
        return self._wording.silent


class OverHttp(Backend):
    """A backend that asks one server; making it sends nothing, and closing it closes its connections."""

    _http: Http

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._http.close()


def retry_after_seconds(answer: Response) -> float | None:
    """The seconds in a Retry-After header (RFC 9110 §10.2.3: seconds, or a date); None: no header, or neither."""
    value = answer.headers.get("retry-after", "")
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    return None if (moment := _moment(value)) is None else max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _moment(date: str) -> datetime | None:
    """Parse a date (RFC 9110 §5.6.7); None: it is none, or has no time zone."""
    try:
        moment = parsedate_to_datetime(date)
    except (ValueError, TypeError, OverflowError):
        return None
    return moment if moment.tzinfo is not None else None


def without(text: str, hidden: Iterable[str | None]) -> str:
    """Blot out our secrets in a server's text, in case the server repeats them."""
    for value in hidden:
        text = text.replace(value, "…") if value else text
    return text


def json_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object in an answer; None: the answer is something else."""
    try:
        document = of_server(body)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def object_of(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object below a key of an answer; empty if there is none."""
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def listed(names: Iterable[str]) -> str:
    """Names in alphabetical order, for messages."""
    return one_line(", ".join(sorted(names))) or "none"
