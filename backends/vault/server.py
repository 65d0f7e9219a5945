"""One Vault or OpenBao over HTTPS: its answers, errors and tokens; authorities that share a server share one login."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from http import HTTPStatus
from threading import Lock
from typing import Any, ClassVar
from urllib.parse import quote
from weakref import WeakSet, WeakValueDictionary

from hvac import Client
from hvac.adapters import RawAdapter
from requests import Response

from backends.http import Http, Wording, json_object, object_of, retry_after_seconds
from backends.settings import read_secret, secret_end, tls_context, token_end
from backends.vault.settings import VaultSettings
from bridge.contract import CredentialEnd, Secret
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError, LocalFileError
from bridge.system.waiting import remember
from bridge.words import one_line

log = logging.getLogger("ca-bridge.vault")
#: Texts in the server's 500 answers that blame its configuration, so that trying later won't help.
_FINAL_500 = (
    "could not fetch the CA certificate",
    "unable to find PKI issuer",
    "no default issuer",
    "failed to verify client's certificate",
    "unable to verify signature on presented cert",
)
_ROLE = "compare the role with what `ca-bridge setup vault` prints; for a user's role, see `ca-bridge help users`"
#: Fragments of the server's texts, and what to do about them.
_HINTS = (
    ("beyond the expiration of the CA", "the CA ends before the certificate would: set a shorter renewal.validity"),
    ("unknown role", "`ca-bridge setup vault` prints the roles that the CA's administrator has to make"),
    ("by this role", _ROLE),
    ("in this role", _ROLE),
    ("role requires", _ROLE),
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


#: How many secrets to hide: a gateway runs for months, and may get thousands of short-lived tokens a day.
_MOST_SECRETS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An HTTP answer; its body may hold a secret."""

    where: str  #: Method and URL, for messages.
    status: int
    location: str = field(repr=False)  #: Target of a redirect.
    body: Mapping[str, object] = field(repr=False)  #: The JSON object; empty where there is none.
    reasons: tuple[str, ...] = field(repr=False)  #: The server's own words.
    display: str  #: The same, safe to show.
    retry_after_seconds: float | None

    @property
    def data(self) -> Mapping[str, object]:
        """The table `data` of the answer; empty where there is none."""
        return object_of(self.body, "data")

    @property
    def token_rejected(self) -> bool:
        """Whether the token itself is bad, expired, revoked or used up; a forbidden path has its own text."""
        return self.status == HTTPStatus.FORBIDDEN and not any("1 error occurred" in r for r in self.reasons)

    @property
    def forbidden(self) -> bool:
        """Whether the token is good, but its policy does not allow this request."""
        return self.status == HTTPStatus.FORBIDDEN and not self.token_rejected

    def or_raise(self) -> Answer:
        """Return the answer, or raise its error."""
        if not 200 <= self.status < 300:  # noqa: PLR2004
            raise self.error()
        return self

    def error(self) -> BackendError:
        """Refused or unavailable: the one place where the server's statuses become our errors."""
        text = "; ".join(self.reasons)
        message = f"vault: {self.where}: HTTP {self.status}{': ' if self.display else ''}{self.display}"
        hint = next((hint for fragment, hint in _HINTS if fragment in text), None)
        if 300 <= self.status < 400:  # noqa: PLR2004
            message += f", a redirect to {_origin(self.location)}"
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
        """A hint by the path, since the server's text is always the same."""
        if self.where.endswith("/login") or "/login/" in self.where:
            return "are auth.mount and auth.role spelled right, and the credentials good?"
        if self.where.startswith("GET "):
            return "is `mount` spelled right?"  # a CA's certificates are public
        return "is the token still good, and does its policy allow this path with exactly these parameters?"


_WORDING = Wording(
    name="vault",
    not_ours="is there a Vault or OpenBao behind this URL?",
    tls=lambda _: "does ca_file hold the CA of the server's certificate, and is the host in url one of its names?",
    status_suffices=True,
)


class _Adapter(RawAdapter):  # type: ignore[misc]
    """hvac's way to the server: our session, and an `Answer` for each status, where hvac's own adapters raise errors."""

    def __init__(self, *, server: Server, **options: Any) -> None:
        super().__init__(**options)
        self._server = server

    def request(self, method: str, url: str, *options: Any, **more: Any) -> Answer:
        """Send one request (BackendError: no answer)."""
        where = f"{method.upper()} {self.urljoin(self.base_uri, url)}"
        with self._server.http.errors(where):
            response = super().request(method, url, *options, **{**more, "raise_exception": False})
        return self._server.answer(response, where)

    def get_login_token(self, response: Answer) -> str:
        """The token in a login's answer (BackendError: none)."""
        token = object_of(response.or_raise().body, "auth").get("client_token")
        if not isinstance(token, str) or not token:
            missing = "the answer has no token (does the server ask for a second factor?)"
            raise BackendRefusedError(f"vault: {response.where}: {missing}")
        return self._server.hide(token)


class Server:
    """One server, for any thread, without a token or with several; hvac sends the requests."""

    def __init__(self, settings: VaultSettings) -> None:
        self._settings = settings
        self._secrets: OrderedDict[str, None] = OrderedDict()  # the latest ones
        tls = partial(tls_context, settings.ca_file, settings.client_cert, settings.client_key)
        if settings.ca_file or settings.client_cert:
            tls()  # a named file that can't be used is found now, even if the URL is `http:`
        self.http = Http(_WORDING, settings.url, settings.timeout, tls)
        self.anonymous = self.client("")

    def client(self, token: str) -> Client:
        """A client with a token, or with none until its first login."""
        settings = self._settings
        return Client(
            url=settings.url.rstrip("/"),
            token=token,
            namespace=settings.namespace,
            session=self.http.session,
            adapter=_Adapter,
            server=self,
            allow_redirects=False,
            # Our session ignores both. Without them hvac takes others from the environment, and can't log in by `cert`.
            verify=True,
            cert=tuple(str(file) for file in (settings.client_cert, settings.client_key) if file),
        )

    def hide(self, value: str) -> str:
        """Remember a secret, to hide it if the server's text repeats it."""
        remember(self._secrets, value, None, _MOST_SECRETS)
        return value

    def read(self, secret: Secret | None, *, token: bool = False) -> str:
        """Read an operator's secret; a `token` has to fit into a header (LocalFileError: it can't be read)."""
        if secret is None:
            raise TypeError("a secret that `VaultSettings.problems` demands is not set")
        value = read_secret(secret, "vault", "put the secret there, readable for this process")
        if token and not re.fullmatch(r"[!-~]+", value):
            text = f"vault: wanted a token in {secret}, found more than one word of ASCII text"
            raise LocalFileError(text, hint="put the token there, and nothing else")
        return self.hide(value)

    def answer(self, response: Response, where: str) -> Answer:
        """What is in a response."""
        body = json_object(response.content)
        if body is None:
            # Another product's body is not shown, except this text of Go's HTTP server.
            plain = b"Client sent an HTTP request to an HTTPS server"
            body = {"errors": [plain.decode()]} if response.content.startswith(plain) else {}
        reasons = tuple(texts(body.get("errors")))
        return Answer(
            where=where,
            status=response.status_code,
            location=response.headers.get("location", ""),
            body=body,
            reasons=reasons,
            display=self.presentable("; ".join(reasons)),
            retry_after_seconds=retry_after_seconds(response),
        )

    def presentable(self, text: str) -> str:
        """The server's text on one line, cut, without our secrets."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "(secret)")
        return one_line(text)


def _origin(location: str) -> str:
    """Scheme, host and port; the rest may hold a secret."""
    match = re.match(r"(https?://)(?:[^/?#@]*@)?([\w.:\[\]-]+)", location, re.ASCII)
    return "".join(match.groups()) if match else "another path"


def texts(value: object) -> list[str]:
    """The strings in a list, or the one string; other types are left out, since the server may answer anything."""
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]


class Tokens:
    """
    The token for our requests: given, or from a login that all threads and all backends with the same settings share,
    since a wrapping token opens only once.
    """

    _sharing: ClassVar[Lock] = Lock()
    _open: ClassVar[WeakValueDictionary[tuple[object, ...], Tokens]] = WeakValueDictionary()

    def __init__(self, settings: VaultSettings) -> None:
        auth = settings.auth
        self.server = Server(settings)
        self._auth = auth
        self._mount = (auth.mount or auth.method).strip("/")  # hvac quotes it
        self._lock = Lock()
        #: The login under way, for all threads that want one: they wait once for a server that hangs, and not in turn.
        self._under_way: Future[Client] | None = None
        self._current: Client | None = None
        self._made: list[Client] = []
        self._secret_id: str | None = None  # a wrapped one opens only once
        self.identity: str | None = None  #: From the login; None: no login, the token was given.
        self._role_name: object = None  #: The AppRole's name, from the login.
        self.leased = False  #: Revoking a token would revoke the certificates that it signed.
        self._users: WeakSet[object] = WeakSet()

    @classmethod
    def of(cls, user: object, settings: VaultSettings) -> Tokens:
        """The tokens that other backends with these settings have open, or new ones."""
        tls = (settings.ca_file, settings.client_cert, settings.client_key)
        key = (settings.url, settings.namespace, settings.auth, *tls, settings.timeout)
        with cls._sharing:
            server = cls._open.get(key)
            if server is None:
                server = cls._open[key] = cls(settings)
            server._users.add(user)
            return server

    def leave(self, user: object) -> None:
        """Drop a user; the last one revokes the tokens of our logins and closes the connections."""
        with self._sharing:
            self._users.discard(user)
            if self._users:
                return
            for key in [key for key, server in self._open.items() if server is self]:
                del self._open[key]
        self._revoke()
        self.server.http.close()

    def get(self, rejected: Client | None = None) -> Client:
        """Return a client with the token, with another one than the rejected client's if possible; log in if needed."""
        with self._lock:
            if rejected in self._made:  # it has ended already
                self._made.remove(rejected)
            if self._current is not None and self._current is not rejected:
                return self._current
            leads, login = self._under_way is None, self._under_way or Future()
            self._under_way = login
        if leads:
            self._log_in(login)
        return login.result()

    def _log_in(self, login: Future[Client]) -> None:
        client, error = None, None
        try:
            client = self._new()
        except BaseException as e:  # noqa: BLE001 (each thread that waits gets it)
            error = e
        with self._lock:
            self._current, self._under_way = client or self._current, None
        if error is not None:
            login.set_exception(error)
        else:
            login.set_result(client)

    def _revoke(self) -> None:
        with self._lock:
            made, self._made, self._current = self._made, [], None
        if made and self.leased:
            log.warning("token not revoked, since certificates would go with it (role with generate_lease)")
            return
        for client in made:
            try:
                client.auth.token.revoke_self().or_raise()
            except BackendError as e:
                log.warning("token not revoked, it stays valid until it expires: %s", e)

    def _new(self) -> Client:
        if self._auth.method == "token":
            return self.server.client(self.server.read(self._auth.token, token=True))
        client = self.server.client("")
        login = object_of(self._login(client).body, "auth")
        self.identity = identity_text(f"auth/{self._mount}", object_of(login, "metadata"), login)
        self._role_name = object_of(login, "metadata").get("role_name")
        if login.get("token_type") != "batch":  # a batch token can't be revoked
            self._made.append(client)
        return client

    def _login(self, client: Client) -> Answer:
        """Log in, and leave the token with the client."""
        auth, read, mount, methods = self._auth, self.server.read, self._mount, client.auth
        answer: Answer
        match auth.method:
            case "approle":
                answer = methods.approle.login(read(auth.role_id), self._read_secret_id(), mount_point=mount)
            case "kubernetes":
                answer = methods.kubernetes.login(auth.role, read(auth.jwt), mount_point=mount)
            case "jwt":
                answer = methods.jwt.jwt_login(auth.role, read(auth.jwt), path=mount)
            case "userpass":
                user = quote(auth.username or "", safe="")  # the only method that hvac quotes nothing for
                answer = methods.userpass.login(user, read(auth.password), mount_point=quote(mount))
            case _:  # `cert`
                answer = methods.cert.login(name=auth.role or "", mount_point=quote(mount))
        return answer

    def ends(self) -> list[CredentialEnd]:
        """When the given token, secret id or JWT expires; empty if it does not, or if a policy forbids to look."""
        auth, client = self._auth, self.get()
        if auth.token is not None:
            looked = client.auth.token.lookup_self()
            if looked.forbidden or looked.or_raise().data.get("period"):  # something else renews a periodic token
                return []
            return _ends("auth.token", auth.token, looked.data, "issue_time", "expire_time")
        if auth.secret_id is not None and not auth.wrapped and isinstance(self._role_name, str):
            secret_id = self.server.read(auth.secret_id)
            looked = client.auth.approle.read_secret_id(self._role_name, secret_id, mount_point=self._mount)
            return _ends("auth.secret_id", auth.secret_id, looked.data, "creation_time", "expiration_time")
        return [] if auth.jwt is None else token_end("auth.jwt", auth.jwt, self.server.read(auth.jwt))

    def _read_secret_id(self) -> str:
        if not self._auth.wrapped:
            return self.server.read(self._auth.secret_id)
        if self._secret_id is None:
            self._secret_id = self._unwrap(self.server.read(self._auth.secret_id, token=True))
        return self.server.hide(self._secret_id)

    def _unwrap(self, token: str) -> str:
        """
        Unwrap the secret id in a wrapping token, which opens once, after checking its origin: anyone can wrap, but only
        the server's own paths wrap secret ids (https://openbao.org/docs/concepts/response-wrapping/).
        """

        def alarm(text: str) -> BackendRefusedError:
            return BackendRefusedError(f"vault: {text}", hint=_ALARM)

        source = self._auth.secret_id
        # hvac has no method of its own for this path
        looked: Answer = self.server.anonymous.write_data("sys/wrapping/lookup", data={"token": token})
        if looked.status == HTTPStatus.BAD_REQUEST:
            raise alarm(f"the wrapping token in {source} was opened before or has expired")
        created = str(looked.or_raise().data.get("creation_path"))
        if not re.fullmatch(rf"auth/{re.escape(self._mount)}/role/[^/]+/(custom-)?secret-id", created):
            message = f"wanted a secret id of auth/{self._mount} wrapped in {source}, found what {created} answered"
            raise alarm(f"{self.server.presentable(message)}; it was not opened")
        # as the client's own token: OpenBao wants it in the header if that has no other
        answer: Answer = self.server.client(token).sys.unwrap()
        if answer.status == HTTPStatus.BAD_REQUEST:
            raise alarm(f"the wrapping token in {source} was opened just now, not by us")
        secret_id = answer.or_raise().data.get("secret_id")
        if not isinstance(secret_id, str):
            raise alarm(f"wanted a secret id wrapped in {source}, found something else")
        return secret_id


def _ends(key: str, secret: Secret, data: Mapping[str, object], begin: str, end: str) -> list[CredentialEnd]:
    ends = _time(data.get(end))
    return [] if ends is None else [secret_end(key, secret, _time(data.get(begin)), ends)]


def _time(value: object) -> datetime | None:
    """Parse a time of the server; None: none, or Go's zero time, which means that it never expires."""
    try:
        time = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return time if time.tzinfo is not None and time.year > 1 else None


#: Names that login methods put into a token's metadata. A secret id's own metadata is free text.
_NAMES = (
    *("display_name", "role_name", "role", "username", "cert_name", "common_name"),
    *("service_account_namespace", "service_account_name"),
)


def identity_text(method: str, metadata: Mapping[str, object], token: Mapping[str, object]) -> str:
    """A token's identity, such as `auth/approle role_name=cp-1 entity_id=…`; the id is the one in the server's audit log."""
    facts = {**{key: metadata.get(key) for key in _NAMES}, "entity_id": token.get("entity_id")}
    return " ".join([method, *(f"{key}={value}" for key, value in facts.items() if value)])


_ALARM = (
    "if it was not an earlier run of ours, someone else may hold the secret id: "
    "ask the server's audit log who opened it, destroy it, and have a new one issued"
)
