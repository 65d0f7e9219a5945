"""The settings of the backend `vault`: how it logs in, and which role signs a certificate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from backends.settings import pair_problems, url_problems
from bridge.contract import BackendSettings, Secret, Selector
from bridge.errors import SettingsProblem
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
#: Chooses the role that signs a certificate.
RoleOf = Callable[[CertificateSpec], str]
#: The default roles: for certificates that are alike on all nodes, and for those with a node's own names.
DEFAULT_ROLE, _OWN_ROLE = "kubeadm-{name}", "kubeadm-{node}-{name}"


@dataclass(frozen=True, kw_only=True)
class VaultAuth:
    """How to get a token: the settings' table `auth`."""

    #: How the node logs in; each of the following keys is for certain methods only.
    method: Literal["token", "approle", "cert", "kubernetes", "jwt", "userpass"] = "token"
    mount: str | None = None  #: Where the method is mounted; if not set, at its own name.
    token: Secret | None = None  #: For method `token`.
    role_id: Secret | None = None  #: For method `approle`.
    secret_id: Secret | None = None  #: For method `approle`.
    wrapped: bool = False  #: Whether `secret_id` is a response-wrapping token that holds the secret id.
    role: str | None = None  #: For methods `kubernetes` and `jwt`; optional for `cert`.
    #: For methods `kubernetes` and `jwt`: the token of the service account or of the node's identity provider.
    jwt: Secret | None = None
    username: str | None = None  #: For method `userpass`.
    password: Secret | None = None  #: For method `userpass`.

    def method_problems(self) -> Iterator[SettingsProblem]:
        """Find keys that the method lacks, and keys of other methods; named as in this table."""
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

    url: str  #: The server's URL: `https://`, or `http://` on the loopback interface.
    namespace: str | None = None  #: A namespace of Vault Enterprise or OpenBao.
    mount: str = "pki"  #: Where the CA's PKI engine is mounted; usually each authority has its own.
    issuer: str | None = None  #: The issuer's name or id; if not set, the mount's default one.
    ca_file: Path | None = None  #: CA certificates (PEM) for the server's TLS certificate; if not set, the system's.
    client_cert: Path | None = None  #: The client certificate for mutual TLS and for method `cert`.
    client_key: Path | None = None  #: The key of `client_cert`.
    plain_http: bool = False  #: Allow `http://` to another machine: anyone on the network path can read our token.
    #: For mode `sign`. A pattern: `{name}` is the certificate, `{usage}` its usage class (server, client, peer),
    #: `{node}` the node. If not set, `kubeadm-{name}`, or `kubeadm-{node}-{name}` for certificates with the node's
    #: own names. Set `"kubeadm-{name}"` at a desk, a door or the gateway, which sign for other nodes.
    role: str | None = None
    roles: dict[str, str] = field(default_factory=dict)  #: Other roles, by certificate or usage class.
    #: `"sign-verbatim"` uses no role: a token for it can get any leaf certificate from the CA.
    mode: Literal["sign", "sign-verbatim"] = "sign"
    auth: VaultAuth = field(default_factory=VaultAuth)

    def problems(self) -> Iterator[SettingsProblem]:
        """Find problems that types can't show."""
        risk = "a token goes over the network in clear"
        yield from url_problems(self.url, plain_http=self.plain_http, risk=risk)
        if not self.mount.strip("/"):
            yield SettingsProblem("mount", "the path of a PKI secrets engine", repr(self.mount))
        yield from pair_problems(self.client_cert, self.client_key)
        yield from Selector(self.role or DEFAULT_ROLE, self.roles).problems("role", "roles", self.pairs)
        yield from (replace(problem, key=f"auth.{problem.key}") for problem in self.auth.method_problems())
        if self.auth.method == "cert" and not (self.client_cert or self.client_key):
            yield SettingsProblem("client_cert", "a file, which auth.method cert needs", "nothing")


def role_selector(pattern: str | None, exceptions: Mapping[str, str], node: str) -> RoleOf:
    """Choose roles by the settings, or else `kubeadm-{name}`, with the node (if known) where names differ by node."""
    chosen = Selector(DEFAULT_ROLE if pattern is None else pattern, exceptions, node)
    own = Selector(_OWN_ROLE, exceptions, node) if pattern is None and node else chosen
    return lambda spec: (own if spec.by_node else chosen)(spec)
