"""The settings of a CMP server, and a first look at the files that they name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

from backends.cmp import setup as cmp_setup
from bridge.contract import BackendSettings, Secret, Selector
from bridge.errors import SettingsError, SettingsProblem


@dataclass(frozen=True, kw_only=True)
class CmpSettings(BackendSettings):
    """Keys of a backend of type `cmp`; `timeout` is for one request and its answer."""

    url: str  #: Scheme, host and port; a path before `path` is kept.
    #: A pattern: `{name}` is the certificate, `{usage}` its usage class (server, client, peer), `{node}` the node.
    #: Without it `.well-known/cmp/p/{usage}`, or `.well-known/cmp` with a `profile` or in mode `cr`.
    path: str | None = None
    paths: dict[str, str] = field(default_factory=dict)  #: Exceptions to `path`, by certificate or usage class.
    profile: str = ""  #: A pattern for the name in the message's header (openssl 3.3 and newer).
    profiles: dict[str, str] = field(default_factory=dict)  #: Exceptions to `profile`, by certificate or usage class.
    recipient: str = ""  #: The CA's subject, such as `/O=Corp/CN=kubernetes`.
    reference: str = ""  #: Who we are to the server, with a shared secret.
    secret: Secret | None = None  #: The shared secret.
    client_cert: Path | None = None  #: Signs requests, in place of a shared secret; with its chain.
    client_key: Path | None = None  #: Its key.
    trusted_file: Path | None = None  #: CAs of the certificate that the server signs its answers with.
    sender: str = ""  #: The only subject of that certificate that is accepted.
    tls_ca_file: Path | None = None  #: In PEM, for the server's TLS certificate.
    tls_client_cert: Path | None = None  #: For mutual TLS.
    tls_client_key: Path | None = None  #: Its key.
    #: `"cr"`: usages in a template, for a server that trusts this node as a registration authority.
    mode: cmp_setup.Mode = "p10cr"
    wait: timedelta = timedelta(seconds=5)  #: How long a server that says "not yet" is asked again in the same run.
    unprotected_errors: bool = False  #: Believe errors and rejections that anybody on the way may have written.
    openssl: str = "openssl"  #: The program; 3.0 or newer.

    @property
    def path_pattern(self) -> str:
        """The URL path with its default."""
        return cmp_setup.path_pattern(self.path, self.profile, self.mode)

    @property
    def tls(self) -> bool:
        """Over HTTPS."""
        return self.url.lower().startswith("https:")

    def problems(self) -> Iterator[SettingsProblem]:
        """Settings that contradict each other, or would let an answer be believed that nobody vouches for."""
        yield from _url_problems(self.url)
        yield from Selector(self.path_pattern, self.paths).problems("path", "paths")
        for key, path in {"path": self.path_pattern, **{f"paths.{name}": p for name, p in self.paths.items()}}.items():
            if not re.fullmatch(r"[A-Za-z0-9._~!$&'()*+,;=:@%/{}-]*", path):
                yield SettingsProblem(key, "a path without spaces, query and fragment", repr(path))
        yield from Selector(self.profile, self.profiles).problems("profile", "profiles")
        if self.profiles and not self.profile:
            yield SettingsProblem("profile", "a pattern, as profiles has exceptions to it", "nothing")
        for key, name in {"recipient": self.recipient, "sender": self.sender}.items():
            if name and not re.match(r"/[\w.]+=", name):
                yield SettingsProblem(key, "a subject in the form /O=Corp/CN=NAME", repr(name))
        yield from self._protection_problems()
        yield from self._tls_problems()
        if self.wait > timedelta(minutes=10):
            yield SettingsProblem("wait", "at most 10m", f"{self.wait.total_seconds():g}s")

    def _protection_problems(self) -> Iterator[SettingsProblem]:
        if self.secret and (self.client_cert or self.client_key):
            yield SettingsProblem("client_cert", "a shared secret or a client certificate", "both")
        elif not self.secret and not (self.client_cert or self.client_key):
            yield SettingsProblem("secret_file", "a shared secret, or client_cert and client_key", "nothing")
        elif not self.secret and not (self.client_cert and self.client_key):
            missing = "client_key" if self.client_cert else "client_cert"
            yield SettingsProblem(missing, "both of client_cert and client_key", "one of them")
        if self.secret and not self.reference:
            yield SettingsProblem("reference", "the name under which the server has the secret", "nothing")
        if self.client_cert and not self.trusted_file:
            wanted = "the CA of the certificate that the server signs with (without it no answer can be believed)"
            yield SettingsProblem("trusted_file", wanted, "nothing")
        if self.sender and not self.trusted_file:
            yield SettingsProblem("trusted_file", "the CA of the sender's certificate", "nothing")

    def _tls_problems(self) -> Iterator[SettingsProblem]:
        if (self.tls_client_cert is None) != (self.tls_client_key is None):
            missing = "tls_client_cert" if self.tls_client_cert is None else "tls_client_key"
            yield SettingsProblem(missing, "both of tls_client_cert and tls_client_key, or neither", "one of them")
        if self.tls and not self.tls_ca_file:
            wanted = "the CA of the server's TLS certificate (openssl would not check it, and not say so)"
            yield SettingsProblem("tls_ca_file", wanted, "nothing")
        if not self.tls and (self.tls_ca_file or self.tls_client_cert or self.tls_client_key):
            yield SettingsProblem("url", "https:// (as files for TLS are given)", "http://")


def _url_problems(url: str) -> Iterator[SettingsProblem]:
    try:
        parts = urlsplit(url)
        scheme, host, _ = parts.scheme, parts.hostname or "", parts.port
    except ValueError:
        yield SettingsProblem("url", "http://HOST[:PORT]", "a host or port that can't be read")
        return
    if parts.username is not None:
        yield SettingsProblem("url", "no user name or password in it: secrets are never written here", "one")
    elif scheme not in {"http", "https"} or not host or parts.query or parts.fragment or not url.isprintable():
        yield SettingsProblem("url", "http://HOST[:PORT], without a query", repr(url))


def check_files(settings: CmpSettings) -> None:
    """
    Look at the files with certificates and keys, which openssl would read in the middle of a renewal.

    Raises:
        SettingsError: A file that is to hold certificates or a key is not there or holds none; all of them are named.
    """
    names = ("client_cert", "trusted_file", "tls_ca_file", "tls_client_cert")
    certificates = {name: getattr(settings, name) for name in names}
    keys = {name: getattr(settings, name) for name in ("client_key", "tls_client_key")}
    problems = [
        problem for name, file in certificates.items() if file for problem in _file_problems(name, file, b"CERTIFICATE")
    ]
    problems += [
        problem for name, file in keys.items() if file for problem in _file_problems(name, file, b"PRIVATE KEY")
    ]
    if problems:
        raise SettingsError(problems)


def _file_problems(name: str, file: Path, label: bytes) -> Iterator[SettingsProblem]:
    wanted = f"a PEM file with a {label.decode().lower()}"
    try:
        data = file.read_bytes()
    except OSError as e:
        yield SettingsProblem(name, wanted, f"{file}: {e.strerror}")
        return
    if b"ENCRYPTED" in data:
        yield SettingsProblem(name, f"{wanted} that is not encrypted", f"{file}: an encrypted one")
    elif label + b"-----" not in data:
        yield SettingsProblem(name, wanted, f"{file}: none in it")
