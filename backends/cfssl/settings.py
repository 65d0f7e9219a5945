"""The settings of the backend `cfssl`, and cfssl's names for usages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from backends.settings import pair_problems, url_problems
from bridge.contract import BackendSettings, Secret, Selector
from bridge.errors import SettingsProblem
from bridge.specs import EKU, SPECS

API = "/api/v1/cfssl"
#: cfssl takes any key, even an empty one; RFC 2104 §3 discourages less than the hash's 32 bytes.
MIN_KEY_BYTES = 16
#: As cfssl spells them.
EKU_NAMES = {EKU.SERVER_AUTH: "server auth", EKU.CLIENT_AUTH: "client auth"}


@dataclass(frozen=True, kw_only=True)
class CfsslSettings(BackendSettings):
    """Keys of a backend of type `cfssl`."""

    url: str  #: The server's URL without `/api/v1/cfssl`; a path of a reverse proxy stays in it.
    label: str = ""  #: The label of the CA in a multirootca; empty for `cfssl serve`.
    ca_file: Path | None = None  #: CA certificates (PEM) for the server's TLS certificate; if not set, the system's.
    client_cert: Path | None = None  #: The client certificate for mutual TLS.
    client_key: Path | None = None  #: The key of `client_cert`.
    #: A pattern: `{name}` is the certificate, `{usage}` its usage class (server, client, peer), `{node}` the node.
    profile: str = "{usage}"
    profiles: dict[str, str] = field(default_factory=dict)  #: Other profiles, by certificate or usage class.
    #: The HMAC key in hexadecimal. Its path or name may be a pattern, if the server has one key for each profile.
    auth_key: Secret | None = None
    endpoint: Literal["authsign", "sign"] = "authsign"  #: `"sign"` is for a server without keys only.
    #: Allow `http://` to another machine: anyone on the network path can read, record and replay every request.
    plain_http: bool = False

    @property
    def tls(self) -> bool:
        """Whether the URL is https."""
        return self.url.lower().startswith("https:")

    def private_files(self) -> Iterator[Path]:
        """The files with HMAC keys; one for each profile if their path is a pattern."""
        yield from super().private_files()
        if self.auth_key is not None and self.auth_key.kind == "file":
            place = Selector(self.auth_key.where, node=self.node)
            yield from dict.fromkeys(Path(place(spec)) for spec in SPECS.values())

    def problems(self) -> Iterator[SettingsProblem]:
        """Find contradictions, and settings that would send a request with its HMAC in the clear."""
        # The HMAC covers neither time nor nonce, so a recorded body is good until the key changes.
        risk = "over plain HTTP a request can be recorded and sent again, for ever new certificates"
        wanted = f"https://HOST[:PORT], without {API} and what follows it"
        yield from url_problems(self.url, wanted, suffix=API, plain_http=self.plain_http, risk=risk)
        yield from Selector(self.profile, self.profiles, self.node).problems("profile", "profiles", self.pairs)
        for key, profile in {"profile": self.profile, **{f"profiles.{k}": v for k, v in self.profiles.items()}}.items():
            if not profile:  # an empty name means cfssl's default profile
                yield SettingsProblem(key, "a profile's name", "an empty text")
        yield from self._auth_key_problems()
        yield from pair_problems(self.client_cert, self.client_key)
        if not self.tls and (self.ca_file or self.client_cert or self.client_key):
            yield SettingsProblem("url", "https:// (as ca_file or client_cert is given)", "http://")

    def _auth_key_problems(self) -> Iterator[SettingsProblem]:
        if self.endpoint == "authsign" and self.auth_key is None:
            wanted = 'the file with the HMAC key (or endpoint = "sign", for a server without keys)'
            yield SettingsProblem("auth_key_file", wanted, "nothing")
        if self.endpoint == "sign" and self.auth_key is not None:
            wanted = 'endpoint = "authsign" (with "sign" the HMAC key would not be used)'
            yield SettingsProblem("endpoint", wanted, '"sign" and a key')
        if self.auth_key is not None:
            yield from Selector(self.auth_key.where).problems(f"auth_key_{self.auth_key.kind}", "")
