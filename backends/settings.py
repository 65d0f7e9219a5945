"""The URLs, secrets and TLS files that the settings of several backends name."""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509

from bridge.contract import CredentialEnd, Secret, SecretUnavailableError
from bridge.errors import BackendRefusedError, LocalFileError, SettingsError, SettingsProblem
from bridge.pki.certificates import common_names
from bridge.system.paths import open_regular
from bridge.system.tls import HttpsError, context


def pair_problems(client_cert: Path | None, client_key: Path | None, prefix: str = "") -> Iterator[SettingsProblem]:
    """Find a client certificate without its key, or a key without its certificate; `prefix` begins both names."""
    certificate, key = f"{prefix}client_cert", f"{prefix}client_key"
    if (client_cert is None) != (client_key is None):
        missing = certificate if client_cert is None else key
        yield SettingsProblem(missing, f"both of {certificate} and {key}, or neither", "one of them")


def url_problems(
    url: str, wanted: str = "https://HOST[:PORT]", *, suffix: str = "", plain_http: bool | None = None, risk: str = ""
) -> Iterator[SettingsProblem]:
    """Find problems of a server's URL; `plain_http`: whether `http:` may lead to another machine; None: only https."""
    try:
        parts = urlsplit(url)
        scheme, host, _ = parts.scheme, parts.hostname or "", parts.port
    except ValueError:
        yield SettingsProblem("url", wanted, "a host or port that can't be read")
        return
    schemes = {"https"} if plain_http is None else {"https", "http"}
    if parts.username is not None:
        yield SettingsProblem("url", "no user name or password in it: secrets are never written here", "one")
    elif scheme not in schemes or not host or parts.query or parts.fragment or (suffix and suffix in parts.path):
        yield SettingsProblem("url", wanted, repr(url))
    elif scheme == "http" and not plain_http and not is_loopback(host):
        risky = f"https://, or plain_http = true ({risk})"
        yield SettingsProblem("url", risky, f"http:// to {host}, which is not this machine")


def is_https(url: str) -> bool:
    """Whether a URL leads to a server that speaks TLS."""
    return url.lower().startswith("https:")


def is_loopback(host: str) -> bool:
    """Whether the host is this machine, to which a secret may go in the clear."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_secret(place: Secret, what: str, hint: str) -> str:
    """Read an operator's secret (LocalFileError, whose text begins with `what`: it can't be read)."""
    try:
        return place.read()
    except SecretUnavailableError as e:
        raise LocalFileError(f"{what}: {e}", hint=hint) from e


def token_end(key: str, secret: Secret, token: str) -> list[CredentialEnd]:
    """When a JWT in a backend's secret `key` expires, by its claims (RFC 7519 §4.1); empty for another token."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        issued, end = claims.get("iat"), datetime.fromtimestamp(claims["exp"], UTC)
        begin = None if issued is None else datetime.fromtimestamp(issued, UTC)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, OSError, RecursionError):
        return []
    return [secret_end(key, secret, begin, end)]


def secret_end(key: str, secret: Secret, begins: datetime | None, ends: datetime) -> CredentialEnd:
    """When a secret expires, with the file that holds it."""
    file = Path(secret.where) if secret.kind == "file" else None
    return CredentialEnd(key=f"{key}_{secret.kind}", ends=ends, begins=begins, file=file)


def subject_of(client_cert: Path, backend: str) -> x509.Name:
    """The subject of a client certificate (BackendRefusedError of this backend: the file has no readable one)."""
    try:
        with open_regular(client_cert) as file:
            return x509.load_pem_x509_certificate(file.read()).subject
    except (OSError, ValueError) as e:
        text = f"{backend}: {client_cert}: wanted the client certificate, found {type(e).__name__}"
        raise BackendRefusedError(text) from e


def common_name(client_cert: Path | None, backend: str) -> str:
    """The name in a client certificate, such as `CN=node-1`, or an empty text; errors as for `subject_of`."""
    names = common_names(subject_of(client_cert, backend)) if client_cert else ()
    return " ".join(f"CN={name}" for name in names)


def tls_context(ca_file: Path | None, client_cert: Path | None, client_key: Path | None) -> ssl.SSLContext:
    """
    A context for TLS 1.2 or newer that checks the server's name and chain against a CA file or else the system's CAs,
    and shows our certificate if there is one (SettingsError, with all files that can't be used).
    """
    # not create_default_context, which would obey SSLKEYLOGFILE
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    problems = []
    try:
        if ca_file:
            with open_regular(ca_file) as file:
                context.load_verify_locations(f"/proc/self/fd/{file.fileno()}")
        else:
            load_system_cas(context)
    except OSError as e:
        problems.append(SettingsProblem("ca_file", "a file with PEM certificates", f"{ca_file}: {e.strerror}"))
    if client_cert and client_key:
        try:
            with open_regular(client_cert) as one, open_regular(client_key) as other:
                certificate, key = (f"/proc/self/fd/{file.fileno()}" for file in (one, other))
                # without the function OpenSSL would ask the terminal for a passphrase, and a cron job would hang
                context.load_cert_chain(certificate, key, password=lambda: "")
        except (OSError, ValueError) as e:
            reason = (isinstance(e, OSError) and e.strerror) or str(e)
            wanted = "PEM files with a certificate and its key, not encrypted"
            problems.append(SettingsProblem("client_cert", wanted, f"{client_cert} and {client_key}: {reason}"))
    if problems:
        raise SettingsError(problems)
    return context


def context_of(trust_pem: bytes, certificate_pem: bytes | None, key_pem: bytes | None) -> ssl.SSLContext:
    """A context as `tls_context` makes it, from PEM in memory, with no other CAs (ValueError: PEM can't be used)."""
    try:
        made = context(trust_pem, certificate_pem, key_pem)
    except HttpsError as e:
        raise ValueError(str(e)) from None
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.hostname_checks_common_name = False
    return made


def load_system_cas(context: ssl.SSLContext) -> None:
    """Trust the system's CAs in OpenSSL's built-in locations, whatever SSL_CERT_FILE says."""
    built_in = ssl.get_default_verify_paths()
    file, directory = Path(built_in.openssl_cafile), Path(built_in.openssl_capath)
    if file.is_file():
        context.load_verify_locations(cafile=file)
    if directory.is_dir():
        context.load_verify_locations(capath=directory)
