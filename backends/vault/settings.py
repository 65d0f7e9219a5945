"""What a settings file says of a Vault or an OpenBao, and which role signs which certificate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from backends.http import (
    is_loopback,
)
from bridge.contract import (
    BackendSettings,
    Secret,
    Selector,
)
from bridge.errors import (
    SettingsProblem,
)
from bridge.specs import CertificateSpec

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
        """Problems that types can't see."""
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
