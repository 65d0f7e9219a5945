"""Tokens: logging in, renewing, and giving back; one login for all authorities that share a server."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from threading import Lock
from typing import ClassVar
from urllib.parse import quote
from weakref import WeakSet, WeakValueDictionary

import requests
from hvac.adapters import RawAdapter
from hvac.api.auth_methods import JWT, AppRole, Kubernetes, Userpass

from backends.vault.server import Server, log, table
from backends.vault.settings import VaultAuth, VaultSettings
from bridge.errors import (
    BackendError,
    BackendRefusedError,
)


class Tokens:
    """The token that requests are made with: given, or got by logging in once for all threads."""

    def __init__(self, server: Server, auth: VaultAuth) -> None:
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
        login = table(answer.body, "auth")
        token = login.get("client_token")
        if not isinstance(token, str) or not token:
            raise BackendRefusedError(f"vault: {answer.where}: wanted a token, found none (a second factor asked for?)")
        self.identity = identity_text(f"auth/{self._mount}", table(login, "metadata"), login)
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


def identity_text(method: str, told: Mapping[str, object], token: Mapping[str, object]) -> str:
    """A token's identity, such as `auth/approle role_name=cp-1 entity_id=…`; the id is the one in the server's audit log."""
    facts = {**{key: told.get(key) for key in _NAMES}, "entity_id": token.get("entity_id")}
    return " ".join([method, *(f"{key}={value}" for key, value in facts.items() if value)])


_ALARM = (
    "if it was not an earlier run of ours, someone else may hold the secret id: "
    "ask the server's audit log who opened it, destroy it, and have a new one issued"
)


class Access:
    """
    The server, and our login there, for all backends of this process that come to it in the same way.

    A wrapping token opens once, and a secret id may be good for one login: the cluster's three CAs share it.
    """

    _lock: ClassVar[Lock] = Lock()
    _open: ClassVar[WeakValueDictionary[tuple[object, ...], Access]] = WeakValueDictionary()

    def __init__(self, settings: VaultSettings) -> None:
        self.server = Server(settings)
        self.tokens = Tokens(self.server, settings.auth)
        self.leased = False  #: A certificate would be revoked together with the token that it was signed with.
        self._users: WeakSet[object] = WeakSet()

    @classmethod
    def of(cls, user: object, settings: VaultSettings) -> Access:
        """The one that others have opened and not closed, or a new one."""
        tls = (settings.ca_file, settings.client_cert, settings.client_key)
        key = (settings.url, settings.namespace, settings.auth, *tls, settings.timeout)
        with cls._lock:
            found = cls._open.get(key)
            if found is None:
                found = cls._open[key] = cls(settings)
            found._users.add(user)
            return found

    def leave(self, user: object) -> None:
        """The last one revokes the tokens that logging in made, and closes the connections."""
        with self._lock:
            self._users.discard(user)
            if self._users:
                return
            for key in [key for key, one in self._open.items() if one is self]:
                del self._open[key]
        self.tokens.revoke(leased=self.leased)
        self.server.close()
