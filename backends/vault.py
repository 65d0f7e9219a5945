"""
HashiCorp Vault and OpenBao: the PKI secrets engine signs, through roles or, by choice, verbatim.

Measured against OpenBao 2.7; the API is https://openbao.org/api-docs/secret/pki/, in the main the same as
https://developer.hashicorp.com/vault/api-docs/secret/pki.
"""

from __future__ import annotations

import json
import logging
import re
import ssl
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from threading import Lock
from typing import ClassVar, Literal, cast
from urllib.parse import quote, urlsplit
from weakref import WeakSet, WeakValueDictionary

import requests
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hvac.adapters import RawAdapter
from hvac.api.auth_methods import JWT, AppRole, Kubernetes, Userpass

from backends import vault_role
from backends.https import (
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
    is_loopback,
    is_too_early,
    retry_after_seconds,
    tls_context,
    within,
)
from bridge.contract import (
    BackendSettings,
    Issued,
    Secret,
    SecretUnavailableError,
    Selector,
    SetupFile,
    SetupRequest,
    SignRequest,
    Wanted,
)
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    LocalFileError,
    SettingsError,
    SettingsProblem,
    Violation,
)
from bridge.specs import EKU, CertificateSpec
from bridge.system import kept_http
from bridge.system.kept_http import BrokenOffError, NotHttpError
from bridge.words import one_line

log = logging.getLogger("ca-bridge.vault")

# ---------------------------------------------------------------------------------------------- settings

#: The fields of `VaultAuth` that a method needs.
_METHOD_KEYS: Mapping[str, tuple[str, ...]] = {
    "token": ("token",),
    "approle": ("role_id", "secret_id"),
    "cert": (),
    "kubernetes": ("role", "jwt"),
    "jwt": ("role", "jwt"),
    "userpass": ("username", "password"),
}
_SECRET_KEYS = frozenset({"token", "role_id", "secret_id", "jwt", "password"})
_OPTIONAL_KEYS: Mapping[str, tuple[str, ...]] = {"approle": ("wrapped",), "cert": ("role",)}


#: Which role a certificate is signed with.
RoleOf = Callable[[CertificateSpec], str]
#: By default: for certificates that all nodes have alike, and for those with a node's own names.
DEFAULT_ROLE, _OWN_ROLE = "kubeadm-{name}", "kubeadm-{node}-{name}"


@dataclass(frozen=True, kw_only=True)
class VaultAuth:
    """How to get a token: the settings' table `auth`."""

    #: How the node logs in; the keys below belong to one method each.
    method: Literal["token", "approle", "cert", "kubernetes", "jwt", "userpass"] = "token"
    mount: str | None = None  #: Where the method is mounted; without it under its own name.
    token: Secret | None = None  #: For method `token`.
    role_id: Secret | None = None  #: For method `approle`.
    secret_id: Secret | None = None  #: For method `approle`.
    wrapped: bool = False  #: `secret_id` is a response-wrapping token that holds the secret id.
    role: str | None = None  #: For methods `kubernetes` and `jwt`, and by choice for `cert`.
    #: For methods `kubernetes` and `jwt`: the token of the service account, or of whoever vouches for the node.
    jwt: Secret | None = None
    username: str | None = None  #: For method `userpass`.
    password: Secret | None = None  #: For method `userpass`.

    def method_problems(self) -> Iterator[SettingsProblem]:
        """Keys that the method lacks, and keys of other methods; with their names in this table."""
        needed = _METHOD_KEYS[self.method]
        usable = {"method", *needed, *_OPTIONAL_KEYS.get(self.method, ())}
        usable |= set() if self.method == "token" else {"mount"}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in needed and value in (None, ""):
                key = f"{f.name}_file" if f.name in _SECRET_KEYS else f.name
                yield SettingsProblem(key, f"what auth.method {self.method} needs", "nothing")
            elif f.name not in usable and value != f.default:
                key = f"{f.name}_{value.kind}" if isinstance(value, Secret) else f.name
                yield SettingsProblem(key, f"only keys that auth.method {self.method} uses", "a key of other methods")


@dataclass(frozen=True, kw_only=True)
class VaultSettings(BackendSettings):
    """The keys of a backend of type `vault`."""

    url: str  #: The server's; `https://`, or `http://` on the loopback interface.
    namespace: str | None = None  #: Of Vault Enterprise or OpenBao.
    mount: str = "pki"  #: Where the CA's PKI engine is; usually another one for each authority.
    issuer: str | None = None  #: The issuer's name or id; without it the one that the role or the mount chooses.
    ca_file: Path | None = None  #: In PEM, for the server's own certificate; without it the system's CAs.
    client_cert: Path | None = None  #: For mutual TLS, and for method `cert`.
    client_key: Path | None = None  #: Its key.
    plain_http: bool = False  #: `http://` also to another machine: whoever is on the way has our token then.
    #: A pattern, for mode `sign`: `{name}` is the certificate, `{usage}` its usage class (server, client, peer),
    #: `{node}` the node. Without it `kubeadm-{name}`, and `kubeadm-{node}-{name}` where names differ by node.
    role: str | None = None
    roles: dict[str, str] = field(default_factory=dict)  #: Exceptions to `role`, by certificate or usage class.
    #: `"sign-verbatim"` takes no role: who may call it holds, in effect, the CA's key for leaf certificates.
    mode: Literal["sign", "sign-verbatim"] = "sign"
    auth: VaultAuth = field(default_factory=VaultAuth)

    @property
    def select_role(self) -> RoleOf:
        """Which role a certificate is signed with."""
        return role_selector(self.role, self.roles, self.node)

    def problems(self) -> Iterator[SettingsProblem]:
        """What types can't say."""
        yield from _url_problems(self.url, plain_http=self.plain_http)
        if not self.mount.strip("/"):
            yield SettingsProblem("mount", "the path of a PKI secrets engine", repr(self.mount))
        if (self.client_cert is None) != (self.client_key is None):
            missing, present = ("client_key", "client_cert") if self.client_cert else ("client_cert", "client_key")
            yield SettingsProblem(missing, f"a file, since {present} is set", "nothing")
        yield from Selector(self.role or DEFAULT_ROLE, self.roles).problems("role", "roles")
        yield from (replace(problem, key=f"auth.{problem.key}") for problem in self.auth.method_problems())
        if self.auth.method == "cert" and not (self.client_cert or self.client_key):
            yield SettingsProblem("client_cert", "a file, which auth.method cert needs", "nothing")


def role_selector(pattern: str | None, exceptions: Mapping[str, str], node: str) -> RoleOf:
    """
    Choose roles by the settings; without a pattern `kubeadm-{name}`, and `kubeadm-{node}-{name}` where names differ.

    Args:
        pattern: The settings' `role`; None: not set.
        exceptions: The settings' `roles`.
        node: `node.name`; empty: all roles are one node's.
    """
    chosen = Selector(DEFAULT_ROLE if pattern is None else pattern, exceptions, node)
    own = Selector(_OWN_ROLE, exceptions, node) if pattern is None and node else chosen
    return lambda spec: (own if spec.by_node else chosen)(spec)


def _url_problems(url: str, *, plain_http: bool) -> Iterator[SettingsProblem]:
    """The token travels in a header of every request, so in clear it may only go to this machine."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises for a port that is no number)
    except ValueError as e:
        yield SettingsProblem("url", "https://HOST[:PORT]", str(e))
        return
    if parts.username or parts.password:
        yield SettingsProblem("url", "a URL without user and password", "one with them")
    elif parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        yield SettingsProblem("url", "https://HOST[:PORT]", repr(url))
    elif parts.scheme == "http" and not plain_http and not is_loopback(parts.hostname):
        wanted = "https://, or plain_http = true, with which a token goes over the network in clear"
        yield SettingsProblem("url", wanted, repr(url))


# ------------------------------------------------------------------------------------------ the wire

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
class _Answer:
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
        return 200 <= self.status < 300  # noqa: PLR2004

    @property
    def data(self) -> Mapping[str, object]:
        """What the engine answered; empty where it did not."""
        return _table(self.body, "data")

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

    def or_raise(self) -> _Answer:
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


class _Server:
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
            BackendRefusedError: It can't be read, or is no token.
        """
        if secret is None:
            raise TypeError("a secret that `VaultSettings.problems` demands is not set")
        try:
            value = secret.read()
        except SecretUnavailableError as e:
            raise LocalFileError(f"vault: {e}", hint="put the secret there, readable for this process") from e
        if token and not re.fullmatch(r"[!-~]+", value):
            raise BackendRefusedError(f"vault: wanted a token in {secret}, found more than one word of ASCII text")
        return self.hide(value)

    def send(
        self, method: Literal["get", "post"], path: str, body: object = None, *, token: str | None = None
    ) -> _Answer:
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
        """What both clients may come to."""
        if isinstance(e, TimeoutError):
            return BackendUnavailableError(f"vault: {where}: wanted an answer within {self._seconds:g} s, found none")
        if isinstance(e, ssl.SSLError | requests.exceptions.SSLError):
            return _tls_error(e, where)
        return BackendRefusedError(f"vault: {where}: {e}")  # too much, or a file that went away

    def call(
        self, method: Literal["get", "post"], path: str, request: Callable[[RawAdapter], requests.Response]
    ) -> _Answer:
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

    def _answer(self, response: HasHeaders, status: int, content: bytes, where: str) -> _Answer:
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            # Of a body that is not the server's nothing is shown, except what Go's HTTP server says.
            plain = b"Client sent an HTTP request to an HTTPS server"
            body = {"errors": [plain.decode()]} if content.startswith(plain) else {}
        body = body if isinstance(body, dict) else {}
        self.clock_ahead = clock_ahead(response, datetime.now(UTC))
        reasons = tuple(_texts(body.get("errors")))
        return _Answer(
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


def _table(value: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = value.get(key)
    return cast(Mapping[str, object], found) if isinstance(found, dict) else {}


def _texts(value: object) -> list[str]:
    """A list's texts, or the one text; the server is free to answer something else."""
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]


# ---------------------------------------------------------------------------------------------- tokens


class _Tokens:
    """The token that requests are made with: given, or got by logging in once for all threads."""

    def __init__(self, server: _Server, auth: VaultAuth) -> None:
        self._server = server
        self._auth = auth
        self._mount = (auth.mount or auth.method).strip("/")  # hvac quotes it
        self._lock = Lock()
        self._current: str | None = None
        self._made: list[str] = []
        self._secret_id: str | None = None  # a wrapped one can be had only once
        self.identity: str | None = None  #: Who logged in; None: nobody did, the token was given.

    def get(self) -> str:
        """The token; logs in if there is none yet."""
        with self._lock:
            if self._current is None:
                self._current = self._new()
            return self._current

    def renew(self, rejected: str) -> str:
        """Another token than the rejected one where that is possible; a token file may have been written again."""
        with self._lock:
            if self._current in {None, rejected}:
                self._current = self._new()
            return self._current

    def revoke(self, *, leased: bool) -> None:
        """
        Revoke the tokens that we made.

        Args:
            leased: A certificate would be revoked together with the token that it was signed with.
        """
        with self._lock:
            made, self._made, self._current = self._made, [], None
        if made and leased:
            log.warning("token not revoked, since certificates would go with it (role with generate_lease)")
            return
        for token in made:
            try:
                self._server.send("post", "auth/token/revoke-self", token=token).or_raise()
            except BackendError as e:
                log.warning("token not revoked, it stays valid until it expires: %s", e)

    def _new(self) -> str:
        auth, read, mount = self._auth, self._server.read, self._mount
        match auth.method:
            case "token":
                return read(auth.token, token=True)
            case "approle":
                role_id, secret_id = read(auth.role_id), self._read_secret_id()
                return self._login(lambda a: AppRole(a).login(role_id, secret_id, mount_point=mount, use_token=False))
            case "cert":
                # hvac's call wants the files again, where our connection has shown them already
                body = {"name": auth.role} if auth.role else {}
                return self._login(lambda a: a.login(f"/v1/auth/{quote(mount)}/login", json=body, use_token=False))
            case "kubernetes":
                token = read(auth.jwt)
                return self._login(lambda a: Kubernetes(a).login(auth.role, token, mount_point=mount, use_token=False))
            case "jwt":
                token = read(auth.jwt)
                return self._login(lambda a: JWT(a).jwt_login(auth.role, token, path=mount, use_token=False))
            case "userpass":
                password, user = read(auth.password), quote(auth.username or "", safe="")
                return self._login(
                    lambda a: Userpass(a).login(user, password, mount_point=mount, use_token=False), f"/{user}"
                )

    def _login(self, request: Callable[[RawAdapter], requests.Response], user: str = "") -> str:
        answer = self._server.call("post", f"auth/{quote(self._mount)}/login{user}", request).or_raise()
        login = _table(answer.body, "auth")
        token = login.get("client_token")
        if not isinstance(token, str) or not token:
            raise BackendRefusedError(f"vault: {answer.where}: wanted a token, found none (a second factor asked for?)")
        self.identity = _identity_text(f"auth/{self._mount}", _table(login, "metadata"), login)
        if login.get("token_type") != "batch":  # which nobody can revoke
            self._made.append(token)
        return self._server.hide(token)

    def _read_secret_id(self) -> str:
        if not self._auth.wrapped:
            return self._server.read(self._auth.secret_id)
        if self._secret_id is None:
            self._secret_id = self._unwrap(self._server.read(self._auth.secret_id, token=True))
        return self._secret_id

    def _unwrap(self, token: str) -> str:
        """
        The secret id in a wrapping token, which opens once.

        Where it was wrapped is looked at before: anyone can wrap something, only the server's own paths wrap
        secret ids (https://openbao.org/docs/concepts/response-wrapping/, "Response wrapping token validation").
        """
        source = self._auth.secret_id
        looked = self._server.send("post", "sys/wrapping/lookup", {"token": token})
        if looked.status == HTTPStatus.BAD_REQUEST:
            raise BackendRefusedError(
                f"vault: the wrapping token in {source} was opened before or has expired", hint=_ALARM
            )
        created = str(looked.or_raise().data.get("creation_path"))
        if not re.fullmatch(rf"auth/{re.escape(self._mount)}/role/[^/]+/(custom-)?secret-id", created):
            message = f"wanted a secret id of auth/{self._mount} wrapped in {source}, found what {created} answered"
            raise BackendRefusedError(f"vault: {self._server.presentable(message)}; it was not opened", hint=_ALARM)
        # not by hvac's call, which puts the token into the body: OpenBao wants it in the header of who has no other
        answer = self._server.send("post", "sys/wrapping/unwrap", token=token)
        if answer.status == HTTPStatus.BAD_REQUEST:
            raise BackendRefusedError(
                f"vault: the wrapping token in {source} was opened just now, not by us", hint=_ALARM
            )
        secret_id = answer.or_raise().data.get("secret_id")
        if not isinstance(secret_id, str):
            raise BackendRefusedError(
                f"vault: wanted a secret id wrapped in {source}, found something else", hint=_ALARM
            )
        return self._server.hide(secret_id)


#: What the login methods tell of us in a token's metadata that is a name. A secret id's own metadata is free text.
_NAMES = (
    *("display_name", "role_name", "role", "username", "cert_name", "common_name"),
    *("service_account_namespace", "service_account_name"),
)


def _identity_text(method: str, told: Mapping[str, object], token: Mapping[str, object]) -> str:
    """Such as `auth/approle role_name=cp-1 entity_id=…`; the id is the one in the server's audit log."""
    facts = {**{key: told.get(key) for key in _NAMES}, "entity_id": token.get("entity_id")}
    return " ".join([method, *(f"{key}={value}" for key, value in facts.items() if value)])


_ALARM = (
    "if it was not an earlier run of ours, someone else may hold the secret id: "
    "ask the server's audit log who opened it, destroy it, and have a new one issued"
)


class _Access:
    """
    The server, and our login there, for all backends of this process that come to it in the same way.

    A wrapping token opens once, and a secret id may be good for one login: the cluster's three CAs share it.
    """

    _lock: ClassVar[Lock] = Lock()
    _open: ClassVar[WeakValueDictionary[tuple[object, ...], _Access]] = WeakValueDictionary()

    def __init__(self, settings: VaultSettings) -> None:
        self.server = _Server(settings)
        self.tokens = _Tokens(self.server, settings.auth)
        self.leased = False  #: A certificate would be revoked together with the token that it was signed with.
        self._users: WeakSet[VaultBackend] = WeakSet()

    @classmethod
    def of(cls, user: VaultBackend, settings: VaultSettings) -> _Access:
        """The one that others have opened and not closed, or a new one."""
        tls = (settings.ca_file, settings.client_cert, settings.client_key)
        key = (settings.url, settings.namespace, settings.auth, *tls, settings.timeout)
        with cls._lock:
            found = cls._open.get(key)
            if found is None:
                found = cls._open[key] = cls(settings)
            found._users.add(user)
            return found

    def leave(self, user: VaultBackend) -> None:
        """The last one revokes the tokens that logging in made, and closes the connections."""
        with self._lock:
            self._users.discard(user)
            if self._users:
                return
            for key in [key for key, one in self._open.items() if one is self]:
                del self._open[key]
        self.tokens.revoke(leased=self.leased)
        self.server.close()


# --------------------------------------------------------------------------------------------- backend


class VaultBackend:
    """Has certificates signed by a PKI secrets engine."""

    settings_type: ClassVar[type[BackendSettings]] = VaultSettings
    asks_validity = True

    def __init__(self, settings: VaultSettings) -> None:
        self._settings = settings
        self._access = _Access.of(self, settings)
        self._server, self._tokens = self._access.server, self._access.tokens
        self._roles: dict[str, str] = {}  #: By certificate, after a look at the server.

    @classmethod
    def setup(cls, wanted: SetupRequest) -> Sequence[SetupFile]:
        """See `backends.vault_setup`."""
        from backends import vault_setup  # noqa: PLC0415 (nobody else needs it)

        return vault_setup.setup(wanted)

    @classmethod
    def from_settings(cls, settings: BackendSettings) -> VaultBackend:
        """
        Make the backend; nothing is sent yet.

        Raises:
            SettingsError: A TLS file can't be used.
        """
        if not isinstance(settings, VaultSettings):
            raise TypeError(f"wanted VaultSettings, found {type(settings).__name__}")
        return cls(settings)

    def sign(self, request: SignRequest) -> Issued:
        """Have one CSR signed; see `bridge.contract.Backend.sign`."""
        answer = self._send("post", self._sign_path(self._role(request.spec)), self._sign_body(request)).or_raise()
        for warning in _texts(answer.body.get("warnings")):
            # Such as a lifetime that was cut to the mount's maximum, which is no error to the server.
            log.warning("%s: %s", request.spec.name, self._server.presentable(warning))
        if answer.body.get("lease_id"):
            self._access.leased = True
            log.warning(
                "%s: the role has generate_lease: the certificate is revoked when the token that signed it ends",
                request.spec.name,
            )
        return _issued(answer)

    def check(self, specs: Sequence[CertificateSpec]) -> dict[str, list[Violation]]:
        """
        Log in and compare what the token may see: its rights on the paths, and the roles.

        Reading a role needs a right that signing does not; without it nothing is said about the role.
        """
        paths = [self._sign_path(role) for spec in specs for role in self._candidates(spec)]
        rights = self._capabilities(paths)
        found = {spec.name: self._violations(spec, rights) for spec in specs}
        return {name: violations for name, violations in found.items() if violations}

    def check_whole(self, wanted: Sequence[Wanted]) -> dict[str, list[Violation]]:
        """Compare each role with the certificate, where the token may read it; `sign-verbatim` has none."""
        if self._settings.mode != "sign":
            return {}
        found = {}
        for one in wanted:
            role = self._role(one.spec)
            looked = self._read_role(role)
            violations = list(vault_role.unlike(looked, one)) if looked else []
            if violations:
                place = f"role {role} of {self._settings.mount.strip('/')}"
                found[one.spec.name] = [replace(v, subject=f"{place}: {v.subject}") for v in violations]
        return found

    def advice(self, spec: CertificateSpec) -> str:
        """The role, or the engine where there is none."""
        mount = self._settings.mount.strip("/")
        setup = f"`ca-bridge setup vault --authority {spec.authority.name}`"
        if self._settings.mode != "sign":
            return f"see what sign-verbatim of {mount} makes of it, and the policy that {setup} prints"
        return f"compare role {self._role(spec)} of {mount}, and the token's policy, with what {setup} prints"

    def clock_ahead(self) -> timedelta | None:
        """By the header `Date` of the latest answer."""
        return self._server.clock_ahead

    def issuers(self) -> list[x509.Certificate]:
        """
        The issuer that the settings name, or else the mount's default one, and its chain; no token is needed.

        An issuer that only the role names (`issuer_ref`) can't be known here: name it in the settings as well.
        """
        issuer = self._settings.issuer
        path = f"issuer/{quote(issuer, safe='')}/json" if issuer else "cert/ca_chain"
        answer = self._server.send("get", f"{_path(self._settings.mount)}/{path}").or_raise()
        pem = [*_texts(answer.data.get("certificate")), *_texts(answer.data.get("ca_chain"))]
        return list(dict.fromkeys(_certificates(pem, answer.where)))

    def revoke(self, certificate: x509.Certificate) -> None:
        """Revoke one that this mount's CA signed, stored or not; the token needs `update` on the mount's `revoke`."""
        pem = certificate.public_bytes(Encoding.PEM).decode("ascii")
        self._send("post", f"{_path(self._settings.mount)}/revoke", {"certificate": pem}).or_raise()

    def is_revoked(self, certificate: x509.Certificate) -> bool:
        """Look it up by its number; no token is needed. What the mount has not stored it can't tell of."""
        number = f"{certificate.serial_number:x}"
        pairs = textwrap.wrap(number.zfill(len(number) + len(number) % 2), 2)
        answer = self._server.send("get", f"{_path(self._settings.mount)}/cert/{'-'.join(pairs)}")
        if answer.status == HTTPStatus.NOT_FOUND and not answer.reasons:
            return False
        return bool(answer.or_raise().data.get("revocation_time"))

    def identity(self) -> str:
        """The login's role or user and its entity; for a token that was given, what it may see of itself."""
        token = self._tokens.get()
        if self._tokens.identity is None:
            answer = self._server.send("get", "auth/token/lookup-self", token=token)
            if answer.forbidden:  # the policy `default`, which allows it, may be left out
                return ""
            looked = answer.or_raise().data
            self._tokens.identity = _identity_text("token", {"display_name": looked.get("display_name")}, looked)
        return self._server.presentable(self._tokens.identity)

    def close(self) -> None:
        """Leave the login that others may still use; a server that can't be reached is only logged."""
        self._access.leave(self)

    def spends(self) -> str:
        """A wrapping token opens once."""
        return f"the wrapping token in {self._settings.auth.secret_id}" if self._settings.auth.wrapped else ""

    def _send(self, method: Literal["get", "post"], path: str, body: object = None) -> _Answer:
        """With the token; with another one, once, if the server does not accept it any more."""
        token = self._tokens.get()
        answer = self._server.send(method, path, body, token=token)
        if not answer.token_rejected:
            return answer
        try:
            other = self._tokens.renew(token)
        except BackendRefusedError as e:
            raise BackendRefusedError(f"{answer.error()}; a new login failed: {e}", hint=e.hint) from e
        return answer if other == token else self._server.send(method, path, body, token=other)

    def _candidates(self, spec: CertificateSpec) -> list[str]:
        """
        Roles that may be the certificate's, the right one first.

        Up to version 0.1 the default had no node in it; an installation of that time has roles of that name.
        """
        settings = self._settings
        found = [settings.select_role(spec)]
        if settings.role is None:
            found.append(Selector(DEFAULT_ROLE, settings.roles)(spec))
        return list(dict.fromkeys(found))

    def _role(self, spec: CertificateSpec) -> str:
        return self._roles.get(spec.name) or self._candidates(spec)[0]

    def _sign_path(self, role: str) -> str:
        settings = self._settings
        prefix = f"issuer/{quote(settings.issuer, safe='')}/" if settings.issuer else ""
        last = f"/{quote(role, safe='')}" if settings.mode == "sign" else ""
        return f"{_path(settings.mount)}/{prefix}{settings.mode}{last}"

    def _sign_body(self, request: SignRequest) -> dict[str, object]:
        """No parameter more than needed: a policy may list those that are allowed."""
        body: dict[str, object] = {
            "csr": request.csr_pem.decode("ascii"),
            "ttl": f"{int(request.validity.total_seconds())}s",
        }
        if self._settings.mode == "sign":
            # Or a CN that looks like a host name becomes one more DNS SAN; a role can't say so.
            return body | {"exclude_cn_from_sans": True}
        # Else no EKU, and keyAgreement. keyEncipherment for ECDSA keys too, as kubeadm has it.
        usages = [_EKU_NAMES[eku] for eku in EKU if eku in request.spec.ekus]
        return body | {"key_usage": list(_KEY_USAGE), "ext_key_usage": usages}

    def _capabilities(self, paths: Sequence[str]) -> Mapping[str, object]:
        answer = self._send("post", "sys/capabilities-self", {"paths": sorted(set(paths))})
        return {} if answer.forbidden else answer.or_raise().data

    def _violations(self, spec: CertificateSpec, rights: Mapping[str, object]) -> list[Violation]:
        """Those of the first role that is there and may be used; if none is, the right one's."""
        found: list[list[Violation]] = []
        for role in self._candidates(spec):
            missing = [*self._right_violations(role, rights)]
            looked = None if missing or self._settings.mode != "sign" else self._read_role(role)
            if looked == {}:
                missing = [Violation(subject="role", want=role, got="no role of this name")]
            if not missing:
                self._roles[spec.name] = role
                return list(role_violations(looked, spec)) if looked is not None else []
            found.append(missing)
        return found[0]

    def _right_violations(self, role: str, rights: Mapping[str, object]) -> Iterator[Violation]:
        path = self._sign_path(role)
        got = _texts(rights.get(path, "update"))
        if not {"update", "root"} & set(got):
            yield Violation(subject="policy", want=f"update on {path}", got=", ".join(got))

    def _read_role(self, name: str) -> Mapping[str, object] | None:
        """The role; empty: there is none; None: we may not look."""
        answer = self._send("get", f"{_path(self._settings.mount)}/roles/{quote(name, safe='')}")
        if answer.forbidden:
            return None
        if answer.status == HTTPStatus.NOT_FOUND and not answer.reasons:
            return {}
        return answer.or_raise().data


#: The engine's names (Go's, without their prefix).
_EKU_NAMES = {EKU.SERVER_AUTH: "ServerAuth", EKU.CLIENT_AUTH: "ClientAuth"}
_KEY_USAGE = ("DigitalSignature", "KeyEncipherment")
_EKU_FLAGS = {
    "server_flag": EKU.SERVER_AUTH.label,
    "client_flag": EKU.CLIENT_AUTH.label,
    "code_signing_flag": "codeSigning",
    "email_protection_flag": "emailProtection",
}


def role_violations(role: Mapping[str, object], spec: CertificateSpec) -> Iterator[Violation]:
    """
    What a role would make wrong, as far as usages and SANs go; names, O and lifetimes are not compared.

    Args:
        role: As the server tells it.
        spec: Of the certificate to be signed with it.
    """
    labels = {name.lower(): eku.label for eku, name in _EKU_NAMES.items()}
    labels |= {eku.value: eku.label for eku in EKU}
    named = [*_texts(role.get("ext_key_usage")), *_texts(role.get("ext_key_usage_oids"))]
    got = {label for flag, label in _EKU_FLAGS.items() if role.get(flag)}  # flags and names add up
    got |= {labels.get(name.lower(), name) for name in named}
    want = {eku.label for eku in spec.ekus}
    if got != want:
        yield Violation(subject="EKU", want=_listed(want), got=_listed(got))
    usages = {usage.lower() for usage in _texts(role.get("key_usage"))}
    needed = {usage.lower() for usage in _KEY_USAGE}
    if not needed <= usages or usages & {"certsign", "crlsign"}:
        yield Violation(subject="key_usage", want=_listed(_KEY_USAGE), got=_listed(_texts(role.get("key_usage"))))
    for key in ("use_csr_common_name", *(("use_csr_sans",) if EKU.SERVER_AUTH in spec.ekus else ())):
        if role.get(key) is False:
            yield Violation(subject=key, want="true", got="false")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _path(mount: str) -> str:
    return quote(mount.strip("/"))


def _issued(answer: _Answer) -> Issued:
    """The one leaf of an answer and the issuers' certificates beside it."""
    leaves = _certificates(_texts(answer.data.get("certificate")), answer.where)
    if len(leaves) != 1:
        raise BackendRefusedError(f"vault: {answer.where}: wanted one certificate, found {len(leaves)}")
    # Vault leaves the chain out where the issuer is a root.
    chain = _texts(answer.data.get("ca_chain")) or _texts(answer.data.get("issuing_ca"))
    return Issued(leaf=leaves[0], intermediates=tuple(_certificates(chain, answer.where)) if chain else ())


def _certificates(pem: Sequence[str], where: str) -> list[x509.Certificate]:
    try:
        found = x509.load_pem_x509_certificates("\n".join(pem).encode())
        _ = [(certificate.subject, certificate.issuer) for certificate in found]  # which are read only now
    except (ValueError, TypeError, x509.InvalidVersion):  # TypeError: a type that does not fit an attribute
        hint = "is there a Vault or OpenBao PKI engine behind this URL?"
        raise BackendRefusedError(
            f"vault: {where}: wanted a certificate in PEM, found something else", hint=hint
        ) from None
    return found
