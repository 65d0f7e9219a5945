"""One Vault or OpenBao over HTTPS: requests, its answers, and what its errors mean to us."""

from __future__ import annotations

import json
import logging
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Literal, cast

import requests
from hvac.adapters import RawAdapter

from backends.http import (
    CLOCK_HINT,
    HasHeaders,
    KeptConnections,
    TlsAdapter,
    TooMuchError,
    body_of,
    causes,
    clock_ahead,
    hint_of,
    innermost,
    is_too_early,
    retry_after_seconds,
    tls_context,
    within,
)
from backends.vault.settings import VaultSettings
from bridge.contract import (
    Secret,
    SecretUnavailableError,
)
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    LocalFileError,
    SettingsError,
)
from bridge.system import kept_http
from bridge.system.kept_http import BrokenOffError, NotHttpError
from bridge.words import one_line

log = logging.getLogger("ca-bridge.vault")
#: What the server says in an answer 500 although its configuration is at fault, so that "later" won't help.
_FINAL_500 = (
    "could not fetch the CA certificate",
    "unable to find PKI issuer",
    "no default issuer",
    "failed to verify client's certificate",
    "unable to verify signature on presented cert",
)
#: Fragments of the server's texts, and what to do about them.
_HINTS = (
    ("beyond the expiration of the CA", "the CA ends before the certificate would: set a shorter renewal.validity"),
    ("unknown role", "`ca-bridge setup vault` prints the roles that the CA's administrator has to make"),
    ("by this role", "compare the role with what `ca-bridge setup vault` prints"),
    ("in this role", "compare the role with what `ca-bridge setup vault` prints"),
    ("role requires", "compare the role with what `ca-bridge setup vault` prints"),
    ("could not fetch the CA certificate", "is `issuer` spelled right, and does the mount have a CA with its key?"),
    ("unable to find PKI issuer", "is `issuer` spelled right?"),
    ("no default issuer", "the mount has no CA yet"),
    ("no handler for route", "is `mount` spelled right?"),
    ("namespace not found", "is `namespace` spelled right?"),
    ("is sealed", "the server has to be unsealed by its operators"),
    ("HTTP request to an HTTPS server", "url has to start with https://"),
    ("missing client token", "is `mount` spelled right?"),
    ("invalid role or secret ID", "the secret id is wrong, used up or expired: have a new one issued"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An HTTP answer; its body may hold a secret."""

    where: str  #: Method and URL, for messages.
    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: Mapping[str, object] = field(repr=False)  #: The JSON object; empty where there is none.
    reasons: tuple[str, ...] = field(repr=False)  #: The server's own words.
    shown: str  #: The same, fit to be shown.
    retry_after_seconds: float | None

    @property
    def ok(self) -> bool:
        """Whether the server did what was asked."""
        return 200 <= self.status < 300  # noqa: PLR2004

    @property
    def data(self) -> Mapping[str, object]:
        """The table `data` of the answer; empty where there is none."""
        return table(self.body, "data")

    @property
    def token_rejected(self) -> bool:
        """
        The token itself is not accepted: bad, expired, revoked or used up.

        A policy that forbids the path is status 403 as well, but reads "1 error occurred: * permission denied".
        """
        return self.status == HTTPStatus.FORBIDDEN and not any("1 error occurred" in r for r in self.reasons)

    @property
    def forbidden(self) -> bool:
        """The token is good, and its policy does not allow this."""
        return self.status == HTTPStatus.FORBIDDEN and not self.token_rejected

    def or_raise(self) -> Answer:
        """The answer itself, unless it is an error."""
        if not self.ok:
            raise self.error()
        return self

    def error(self) -> BackendError:
        """Refused, or unavailable: the one place where the server's statuses become our errors."""
        text = "; ".join(self.reasons)
        message = f"vault: {self.where}: HTTP {self.status}{': ' if self.shown else ''}{self.shown}"
        hint = next((hint for fragment, hint in _HINTS if fragment in text), None)
        if 300 <= self.status < 400:  # noqa: PLR2004
            message += f", a redirect to {_origin(self.headers.get('location', ''))}"
            hint = "redirects are not followed, the token would go along: set url to the active server or its balancer"
        if self.status in {401, 403}:
            hint = self._forbidden_hint
        # 307: a standby whose leader is gone; 412: a replica that is not up to date yet
        later = self.status in {307, 408, 412, 425, 429} or self.status > 500  # noqa: PLR2004
        if later or (self.status == 500 and not any(f in text for f in _FINAL_500)):  # noqa: PLR2004
            return BackendUnavailableError(message, hint=hint, retry_after_seconds=self.retry_after_seconds)
        return BackendRefusedError(message, hint=hint)

    @property
    def _forbidden_hint(self) -> str:
        """The server says the same, whatever it is."""
        if self.where.endswith("/login") or "/login/" in self.where:
            return "are auth.mount and auth.role spelled right, and the credentials good?"
        if self.where.startswith("GET "):
            return "is `mount` spelled right?"  # a CA's certificates are for everybody
        return "is the token still good, and does its policy allow this path with exactly these parameters?"


class Server:
    """HTTP; from any thread."""

    def __init__(self, settings: VaultSettings) -> None:
        """
        Raises:
            SettingsError: A file of the settings can't be used.
        """
        self._settings = settings
        self._url = settings.url.rstrip("/")
        self._seconds = settings.timeout.total_seconds()
        self._secrets: set[str] = set()
        # A login is hvac's; what is asked thousands of times goes without it, and without `requests` below it.
        self._new_adapter().close()  # or a file that can't be used is found out too late
        self._kept = KeptConnections(
            self._url,
            settings.timeout,
            lambda: tls_context(settings.ca_file, settings.client_cert, settings.client_key),
        )
        self._headers = {"Accept": "application/json", "Content-Type": "application/json", "X-Vault-Request": "true"}
        if settings.namespace:
            self._headers["X-Vault-Namespace"] = settings.namespace
        self.clock_ahead: timedelta | None = None  #: The server's, at its latest answer.

    def _new_adapter(self) -> RawAdapter:
        settings, session = self._settings, requests.Session()
        # No proxy, no ~/.netrc, no CA bundle from the environment of whoever starts us. hvac's Client would
        # read VAULT_* as well; its adapter does not.
        session.trust_env = False
        session.stream = True  # or a body of any size is read before we see it
        session.mount("https://", TlsAdapter(tls_context(settings.ca_file, settings.client_cert, settings.client_key)))
        # Without a token: each request brings its own, and no thread changes another one's.
        return RawAdapter(
            base_uri=self._url,
            token="",
            timeout=self._seconds,
            allow_redirects=False,
            session=session,
            namespace=settings.namespace,
            ignore_exceptions=True,
        )

    def hide(self, value: str) -> str:
        """Remember a secret, so that no text of the server that repeats it is shown."""
        self._secrets.add(value)
        return value

    def read(self, secret: Secret | None, *, token: bool = False) -> str:
        """
        A secret of the operator's.

        Args:
            secret: Where it is.
            token: It has to be fit for a header.

        Raises:
            LocalFileError: It can't be read, or is no token.
        """
        if secret is None:
            raise TypeError("a secret that `VaultSettings.problems` demands is not set")
        try:
            value = secret.read()
        except SecretUnavailableError as e:
            raise LocalFileError(f"vault: {e}", hint="put the secret there, readable for this process") from e
        if token and not re.fullmatch(r"[!-~]+", value):
            raise LocalFileError(
                f"vault: wanted a token in {secret}, found more than one word of ASCII text",
                hint="put the token there, and nothing else",
            )
        return self.hide(value)

    def send(
        self, method: Literal["get", "post"], path: str, body: object = None, *, token: str | None = None
    ) -> Answer:
        """
        Send one request, without repeating it.

        Raises:
            BackendRefusedError: The TLS handshake failed, or the answer is not the server's.
            BackendUnavailableError: No answer.
        """
        headers = {**self._headers, "X-Vault-Token": token} if token else self._headers
        data = None if body is None else json.dumps(body).encode()
        where = f"{method.upper()} {self._url}/v1/{path}"
        try:
            answer = self._kept.send(method.upper(), f"/v1/{path}", headers, data)
        except BrokenOffError as e:
            if 200 <= e.status < 300:  # noqa: PLR2004
                raise BackendUnavailableError(f"vault: {where}: the answer broke off: {_cause(e)}") from e
            answer = kept_http.Answer(
                status=e.status, headers={}, body=b""
            )  # the reason is lost, the status says enough
        except (TimeoutError, TooMuchError, SettingsError, ssl.SSLError) as e:
            raise self._error(e, where) from e
        except (OSError, NotHttpError) as e:
            raise BackendUnavailableError(f"vault: {where}: {_cause(e)}", hint=hint_of(e)) from e
        except ValueError as e:  # whose text may hold a header's value
            raise BackendRefusedError(f"vault: {where}: the request could not be made: {type(e).__name__}") from None
        return self._answer(answer, answer.status, answer.body, where)

    def _error(self, e: Exception, where: str) -> BackendError:
        """The error that a failed call means, of `requests` or of our own client."""
        if isinstance(e, TimeoutError):
            return BackendUnavailableError(f"vault: {where}: wanted an answer within {self._seconds:g} s, found none")
        if isinstance(e, ssl.SSLError | requests.exceptions.SSLError):
            return _tls_error(e, where)
        return BackendRefusedError(f"vault: {where}: {e}")  # too much, or a file that went away

    def call(
        self, method: Literal["get", "post"], path: str, request: Callable[[RawAdapter], requests.Response]
    ) -> Answer:
        """
        Let hvac send one request, without repeating it.

        Args:
            method: Of the request, for messages.
            path: Of the request, for messages.
            request: Sends it by the adapter that it is given.

        Raises:
            BackendRefusedError: The TLS handshake failed, or the answer is not the server's.
            BackendUnavailableError: No answer.
        """
        where = f"{method.upper()} {self._url}/v1/{path}"
        try:
            response, content = within(self._seconds, lambda: self._exchange(request))
        except (TimeoutError, TooMuchError, SettingsError, requests.exceptions.SSLError) as e:
            raise self._error(e, where) from e
        except (requests.exceptions.Timeout, requests.exceptions.ConnectionError) as e:
            raise BackendUnavailableError(f"vault: {where}: {_cause(e)}", hint=hint_of(e)) from e
        except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError) as e:
            raise BackendUnavailableError(f"vault: {where}: the answer broke off: {_cause(e)}") from e
        except (OSError, ValueError) as e:
            # Includes requests' InvalidHeader, whose text holds the header's value.
            raise BackendRefusedError(f"vault: {where}: the request could not be made: {type(e).__name__}") from None
        return self._answer(response, response.status_code, content, where)

    def close(self) -> None:
        """Close the connections."""
        self._kept.close()

    def _exchange(self, request: Callable[[RawAdapter], requests.Response]) -> tuple[requests.Response, bytes]:
        adapter = self._new_adapter()
        try:
            response = request(adapter)
            try:
                return response, body_of(response)
            except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError):
                if response.ok:
                    raise
                return response, b""  # the reason is lost, the status says enough
        finally:
            adapter.close()

    def _answer(self, response: HasHeaders, status: int, content: bytes, where: str) -> Answer:
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            # Of a body that is not the server's nothing is shown, except what Go's HTTP server says.
            plain = b"Client sent an HTTP request to an HTTPS server"
            body = {"errors": [plain.decode()]} if content.startswith(plain) else {}
        body = body if isinstance(body, dict) else {}
        self.clock_ahead = clock_ahead(response, datetime.now(UTC))
        reasons = tuple(texts(body.get("errors")))
        return Answer(
            where=where,
            status=status,
            headers=response.headers,
            body=body,
            reasons=reasons,
            shown=self.presentable("; ".join(reasons)),
            retry_after_seconds=retry_after_seconds(response, datetime.now(UTC)),
        )

    def presentable(self, text: str) -> str:
        """A text of the server's as one line, not too long, without our secrets."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "(secret)")
        return one_line(text)


def _tls_error(e: Exception, where: str) -> BackendError:
    """A server that stops in the middle of a handshake may be back; what it or we do not accept stays so."""
    message = f"vault: {where}: {_cause(e)}"
    if any(isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError) for cause in causes(e)):
        return BackendUnavailableError(message)
    hint = "does ca_file hold the CA of the server's certificate, and is the host in url one of its names?"
    return BackendRefusedError(message, hint=CLOCK_HINT if is_too_early(message) else hint)


def _cause(e: BaseException) -> str:
    """The innermost reason, in the system's words; the outer ones name Python's classes."""
    last = innermost(e)
    return (isinstance(last, OSError) and last.strerror) or str(last) or type(last).__name__


def _origin(location: str) -> str:
    """Scheme, host and port; the rest may hold a secret."""
    found = re.match(r"(https?://)(?:[^/?#@]*@)?([\w.:\[\]-]+)", location, re.ASCII)
    return "".join(found.groups()) if found else "another path"


def table(value: Mapping[str, object], key: str) -> Mapping[str, object]:
    """The object below `key`; empty if there is none."""
    found = value.get(key)
    return cast(Mapping[str, object], found) if isinstance(found, dict) else {}


def texts(value: object) -> list[str]:
    """A list's texts, or the one text; the server is free to answer something else."""
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
