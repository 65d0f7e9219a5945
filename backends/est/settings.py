"""Settings of an EST server: where it is, which label signs which certificate, and who asks."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

from backends.http import tls_context
from bridge.contract import BackendSettings, Secret, Selector
from bridge.errors import SettingsProblem

#: Below the server's root (RFC 7030 §3.2.2).
ROOT = ".well-known/est"
#: No label may be called like one of them (RFC 7030 §3.2.2).
OPERATIONS = frozenset({"cacerts", "simpleenroll", "simplereenroll", "fullcmc", "serverkeygen", "csrattrs"})


@dataclass(frozen=True, kw_only=True)
class EstSettings(BackendSettings):
    """Keys of a backend of type `est`."""

    url: str  #: The server's, without `/.well-known/est`; a path before that (a reverse proxy's) is kept.
    #: A pattern, of several segments if need be: `{name}` is the certificate, `{usage}` its usage class (server,
    #: client, peer), `{node}` the node. Without it the server's default.
    label: str = ""
    labels: dict[str, str] = field(default_factory=dict)  #: Exceptions to `label`, by certificate or usage class.
    ca_file: Path | None = None  #: In PEM, for the server's TLS certificate; without it the system's CAs.
    client_cert: Path | None = None  #: An agent's, with its chain; not a certificate of the control plane.
    client_key: Path | None = None  #: Its key.
    username: str = ""  #: In place of a client certificate, or as well.
    password: Secret | None = None  #: Of `username`.

    def tls_context(self) -> ssl.SSLContext:
        """A TLS context for one thread; see `backends.http.tls_context`."""
        context = tls_context(self.ca_file, self.client_cert, self.client_key)
        # A server may want the certificate for some URLs only, and TLS 1.3 knows no renegotiation (RFC 8446 §4.6.2).
        context.post_handshake_auth = self.client_cert is not None
        return context

    def problems(self) -> Iterator[SettingsProblem]:
        """Settings that contradict each other, or would make no URL."""
        yield from _url_problems(self.url)
        yield from Selector(self.label, self.labels).problems("label", "labels")
        for key, label in {
            "label": self.label,
            **{f"labels.{name}": text for name, text in self.labels.items()},
        }.items():
            yield from _label_problems(key, label)
        yield from self._credential_problems()

    def _credential_problems(self) -> Iterator[SettingsProblem]:
        if (self.client_cert is None) != (self.client_key is None):
            missing = "client_cert" if self.client_cert is None else "client_key"
            yield SettingsProblem(missing, "both of client_cert and client_key, or neither", "one of them")
        if bool(self.username) != (self.password is not None):
            missing = "password_file" if self.username else "username"
            yield SettingsProblem(missing, "both of username and password_file, or neither", "one of them")
        if ":" in self.username:  # RFC 7617 §2
            yield SettingsProblem("username", "a name without a colon", "one in it")


def _url_problems(url: str) -> Iterator[SettingsProblem]:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        yield SettingsProblem("url", "https://HOST[:PORT]", "a host or port that can't be read")
        return
    if parts.username is not None:
        yield SettingsProblem("url", "no user name or password in it: username and password_file are for them", "one")
    elif parts.scheme != "https" or not host or parts.query or parts.fragment or ROOT in parts.path:
        wanted = f"https://HOST[:PORT] (EST knows no other), without /{ROOT} and what follows it"
        yield SettingsProblem("url", wanted, repr(url))


def _label_problems(key: str, label: str) -> Iterator[SettingsProblem]:
    segments = label.split("/") if label else []
    if not all(one.isprintable() and one not in {"", ".", ".."} and "%" not in one for one in segments):
        wanted = "a label, or several with one / between them, in plain text (they are percent-encoded here)"
        yield SettingsProblem(key, wanted, repr(label))
    elif named := OPERATIONS.intersection(segments):
        yield SettingsProblem(key, "a label that is not called like an operation of EST", ", ".join(sorted(named)))


def operation_url(url: str, label: str, operation: str) -> str:
    """The URL of an operation; each segment of a label is percent-encoded by itself."""
    segments = [quote(segment, safe="") for segment in label.split("/") if segment]
    return "/".join([url.rstrip("/"), ROOT, *segments, operation])
