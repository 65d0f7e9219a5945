"""Settings of a cluster that signs: where its API server is, who asks, and which signer gets which certificate."""

from __future__ import annotations

import base64
import binascii
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from backends.http import context_of, tls_context
from bridge.contract import BackendSettings, Secret, SecretUnavailableError, Selector
from bridge.errors import LocalFileError, SettingsError, SettingsProblem
from bridge.specs import SPECS

#: As the API server has it (pkg/apis/certificates/validation): a domain of at least two labels, and one path segment
#: or more with dots between them.
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SIGNER = re.compile(rf"(?=.{{1,253}}/){_LABEL}(\.{_LABEL})+/{_LABEL}(\.{_LABEL})*")
_MAX_BYTES = 1 << 20
_HINT = "`kubectl --kubeconfig FILE config view --raw --flatten` prints a kubeconfig in its plain form"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Where a kubeconfig leads, and as whom."""

    url: str
    trust: bytes  #: PEM.
    certificate: bytes | None = None  #: PEM.
    key: bytes | None = field(default=None, repr=False)
    token: Secret | None = None  #: In a file.
    token_text: str = field(default="", repr=False)  #: Embedded.


@dataclass(frozen=True, kw_only=True)
class KubernetesSettings(BackendSettings):
    """Keys of a backend of type `kubernetes`."""

    signer: str  #: `spec.signerName`; a pattern, see `Selector`.
    signers: dict[str, str] = field(default_factory=dict)  #: Other signers, by certificate name or usage class.
    kubeconfig: Path | None = None  #: Instead of all that follows.
    url: str = ""  #: The API server's.
    ca_file: Path | None = None  #: Trusted for the API server's certificate; None: the system's CAs.
    token: Secret | None = None  #: A service account's; read again for each request.
    client_cert: Path | None = None  #: With its chain.
    client_key: Path | None = None  #: Of client_cert, not encrypted.
    wait: timedelta = timedelta(seconds=5)  #: How long one run waits for an answer before it is left to the next.
    delete: bool = True  #: Answered objects are removed, as far as the account may.

    def private_files(self) -> Iterator[Path]:
        """A kubeconfig has a key or a token in it."""
        yield from super().private_files()
        if self.kubeconfig is not None:
            yield self.kubeconfig

    def problems(self) -> Iterator[SettingsProblem]:
        """Settings that contradict each other, or that no API server would take."""
        selector = Selector(self.signer, self.signers, self.node)
        wrong = list(selector.problems("signer", "signers"))
        yield from wrong
        if not wrong:
            yield from _signer_problems(selector)
        others = {
            "url": self.url, "ca_file": self.ca_file, "token": self.token,
            "client_cert": self.client_cert, "client_key": self.client_key,
        }  # fmt: skip
        given = [key for key, value in others.items() if value]
        if self.kubeconfig is not None and given:
            yield SettingsProblem(
                "kubeconfig", f"either kubeconfig, or {', '.join(others)}", f"both ({', '.join(given)})"
            )
        if self.kubeconfig is None:
            yield from self._direct_problems()

    def _direct_problems(self) -> Iterator[SettingsProblem]:
        if not _is_https(self.url):
            yield SettingsProblem("url", "https://HOST[:PORT] of an API server, or kubeconfig", repr(self.url))
        if (self.client_cert is None) != (self.client_key is None):
            missing = "client_cert" if self.client_cert is None else "client_key"
            yield SettingsProblem(missing, "both of client_cert and client_key, or neither", "one of them")
        if self.token is None and self.client_cert is None:
            yield SettingsProblem("token_file", "a token, a client certificate or kubeconfig: who asks", "none")
        if self.token is not None and self.client_cert is not None:
            # The API server takes the certificate's identity, and never looks at the token.
            yield SettingsProblem("token_file", "a token or a client certificate", "both")

    def server_url(self) -> str:
        """
        The server's URL, without a slash at its end.

        Raises:
            SettingsError: The kubeconfig can't be used.
        """
        return (self.access().url if self.kubeconfig is not None else self.url).rstrip("/")

    def tls_context(self) -> ssl.SSLContext:
        """
        A TLS context for one thread; files are read again each time, as short-lived credentials are replaced.

        Raises:
            SettingsError: A file can't be used.
        """
        if self.kubeconfig is None:
            return tls_context(self.ca_file, self.client_cert, self.client_key)
        access = self.access()
        try:
            return context_of(access.trust, access.certificate, access.key)
        except ValueError as e:
            raise self._unusable(str(e)) from None

    def bearer(self) -> str | None:
        """
        The token as it is now; None: a client certificate says who asks.

        Raises:
            LocalFileError: It can't be read.
        """
        try:
            access = self.access() if self.kubeconfig is not None else None
            place = self.token if access is None else access.token
            return place.read() if place is not None else (access and access.token_text) or None
        except SecretUnavailableError as e:
            raise LocalFileError(f"kubernetes: token: {e}", hint="put it there, or fix token_file") from e
        except SettingsError as e:
            raise LocalFileError(f"kubernetes: {e}", hint=e.hint) from e

    def access(self) -> Access:
        """
        The server and the credentials that the kubeconfig names now.

        Raises:
            SettingsError: It can't be used; says why, and quotes nothing of it.
        """
        assert self.kubeconfig is not None  # noqa: S101 (only where it is set)
        try:
            return parse_kubeconfig(_bounded(self.kubeconfig), self.kubeconfig.parent)
        except OSError as e:
            raise self._unusable(e.strerror or type(e).__name__) from e
        except ValueError as e:
            problem = str(e)
        raise self._unusable(problem)  # outside of `except`: a traceback could lead to the text

    def _unusable(self, found: str) -> SettingsError:
        wanted = "a kubeconfig with a server, its CA, and a client certificate or a token"
        return SettingsError([SettingsProblem("kubeconfig", wanted, f"{self.kubeconfig}: {found}")], hint=_HINT)


def parse_kubeconfig(data: bytes, directory: Path) -> Access:
    """
    The server and the credentials of a kubeconfig's current context.

    Args:
        data: The file's content.
        directory: To which paths in it are relative.

    Raises:
        ValueError: It can't be used; quotes nothing of it.
        OSError: A file that it names can't be read.
    """
    try:
        document = yaml.load(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 (both are safe loaders)
    except (yaml.YAMLError, ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ValueError("no mapping in YAML")  # noqa: TRY004 (of the file)
    context = _named(document, "contexts", document.get("current-context"), "context")
    cluster = _named(document, "clusters", context.get("cluster"), "cluster")
    user = _named(document, "users", context.get("user"), "user")
    for table, unsupported in ((user, "exec"), (user, "auth-provider"), (user, "username"), (cluster, "proxy-url"),
                       (cluster, "tls-server-name"), (cluster, "insecure-skip-tls-verify")):  # fmt: skip
        if table.get(unsupported):
            raise ValueError(f"{unsupported}, which is not supported")
    url = str(cluster.get("server") or "")
    if not _is_https(url):
        raise ValueError("no https:// server")
    trust = _data(cluster, "certificate-authority", directory)
    certificate, key = _data(user, "client-certificate", directory), _data(user, "client-key", directory)
    if trust is None:
        raise ValueError("no certificate-authority")
    if (certificate is None) != (key is None):
        raise ValueError("one of client-certificate and client-key, not both")
    file, text = user.get("tokenFile"), str(user.get("token") or "").strip()
    if certificate is None and not file and not text:
        raise ValueError("neither a client certificate nor a token")
    token = Secret("file", str(directory / str(file))) if file else None
    return Access(url=url, trust=trust, certificate=certificate, key=key, token=token, token_text="" if file else text)


def _named(document: Mapping[str, Any], listing: str, name: object, key: str) -> Mapping[str, Any]:
    entries = document.get(listing)
    found = (
        [one for one in entries if isinstance(one, dict) and one.get("name") == name]
        if isinstance(entries, list)
        else []
    )
    inner = found[0].get(key) if len(found) == 1 else None
    if not isinstance(inner, dict):
        raise ValueError(f"no one entry of {listing} that the current context leads to")  # noqa: TRY004 (of the file)
    return inner


def _data(table: Mapping[str, Any], key: str, directory: Path) -> bytes | None:
    if embedded := table.get(f"{key}-data"):
        try:
            return base64.b64decode(str(embedded), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"something else than base64 in {key}-data") from None
    return _bounded(directory / str(table[key])) if table.get(key) else None


def _bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES} bytes in {path.name}")
    return data


def _is_https(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme == "https" and bool(parts.hostname) and not (parts.username or parts.query or parts.fragment)


def _signer_problems(selector: Selector) -> Iterator[SettingsProblem]:
    """Signer names that the API would not take, whatever setting makes them."""
    wrong = {name for spec in SPECS.values() if not _SIGNER.fullmatch(name := selector(spec))}
    if wrong:
        wanted = "DOMAIN/NAME, such as ca-bridge.example.com/{name} or clusterissuers.cert-manager.io/corp"
        yield SettingsProblem("signer", wanted, ", ".join(map(repr, sorted(wrong)[:3])))
