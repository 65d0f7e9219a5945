"""The settings of a cfssl server."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from backends.http import is_loopback, tls_context
from bridge.contract import BackendSettings, Secret, Selector
from bridge.errors import SettingsProblem
from bridge.specs import SPECS

API = "/api/v1/cfssl"


@dataclass(frozen=True, kw_only=True)
class CfsslSettings(BackendSettings):
    """Keys of a backend of type `cfssl`."""

    url: str  #: The server's, without `/api/v1/cfssl`; a path before that (a reverse proxy's) is kept.
    label: str = ""  #: Which CA of a multirootca; none for `cfssl serve`.
    ca_file: Path | None = None  #: In PEM, for the server's TLS certificate; without it the system's CAs.
    client_cert: Path | None = None  #: For mutual TLS.
    client_key: Path | None = None  #: Its key.
    #: A pattern: `{name}` is the certificate, `{usage}` its usage class (server, client, peer), `{node}` the node.
    profile: str = "{usage}"
    profiles: dict[str, str] = field(default_factory=dict)  #: Exceptions to `profile`, by certificate or usage class.
    #: The HMAC key in hexadecimal; its place is a pattern as well, for a server with one key a profile.
    auth_key: Secret | None = None
    endpoint: Literal["authsign", "sign"] = "authsign"  #: `"sign"` only for a server without keys.
    #: `http://` also to another machine: whoever is on the way may read all, record it, and send it again.
    plain_http: bool = False

    @property
    def tls(self) -> bool:
        """Over HTTPS."""
        return self.url.lower().startswith("https:")

    def tls_context(self) -> ssl.SSLContext:
        """A TLS context for one thread; see `backends.http.tls_context`."""
        return tls_context(self.ca_file, self.client_cert, self.client_key)

    def private_files(self) -> Iterator[Path]:
        """The HMAC keys, one a profile if their place is a pattern."""
        yield from super().private_files()
        if self.auth_key is not None and self.auth_key.kind == "file":
            place = Selector(self.auth_key.where, node=self.node)
            yield from dict.fromkeys(Path(place(spec)) for spec in SPECS.values())

    def problems(self) -> Iterator[SettingsProblem]:
        """Settings that contradict each other, or would send a request with its HMAC in the clear."""
        yield from _url_problems(self.url, plain_http=self.plain_http)
        yield from Selector(self.profile, self.profiles, self.node).problems("profile", "profiles")
        for key, profile in {"profile": self.profile, **{f"profiles.{k}": v for k, v in self.profiles.items()}}.items():
            if not profile:  # an empty name means cfssl's default profile
                yield SettingsProblem(key, "a profile's name", "an empty text")
        yield from self._auth_key_problems()
        yield from self._tls_problems()

    def _auth_key_problems(self) -> Iterator[SettingsProblem]:
        if self.endpoint == "authsign" and self.auth_key is None:
            wanted = 'the file with the HMAC key (or endpoint = "sign", for a server without keys)'
            yield SettingsProblem("auth_key_file", wanted, "nothing")
        if self.endpoint == "sign" and self.auth_key is not None:
            wanted = 'endpoint = "authsign" (with "sign" the HMAC key would not be used)'
            yield SettingsProblem("endpoint", wanted, '"sign" and a key')
        if self.auth_key is not None:
            yield from Selector(self.auth_key.where).problems(f"auth_key_{self.auth_key.kind}", "")

    def _tls_problems(self) -> Iterator[SettingsProblem]:
        if (self.client_cert is None) != (self.client_key is None):
            missing = "client_cert" if self.client_cert is None else "client_key"
            yield SettingsProblem(missing, "both of client_cert and client_key, or neither", "one of them")
        if not self.tls and (self.ca_file or self.client_cert or self.client_key):
            yield SettingsProblem("url", "https:// (as ca_file or client_cert is given)", "http://")


def _url_problems(url: str, *, plain_http: bool) -> Iterator[SettingsProblem]:
    try:
        parts = urlsplit(url)
        scheme, host, _ = parts.scheme, parts.hostname or "", parts.port
    except ValueError:
        yield SettingsProblem("url", "https://HOST[:PORT]", "a host or port that can't be read")
        return
    if parts.username is not None:
        yield SettingsProblem("url", "no user name or password in it: secrets are never written here", "one")
    elif scheme not in {"http", "https"} or not host or parts.query or parts.fragment or API in parts.path:
        yield SettingsProblem("url", f"https://HOST[:PORT], without {API} and what follows it", repr(url))
    elif scheme == "http" and not plain_http and not is_loopback(host):
        # The HMAC covers neither time nor nonce, so a recorded body is good until the key changes.
        wanted = (
            "https://, or plain_http = true (over plain HTTP a request can be recorded and sent again, for ever new "
            "certificates)"
        )
        yield SettingsProblem("url", wanted, f"http:// to {host}, which is not this machine")
