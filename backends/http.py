"""HTTP for all backends: limits of time and size, one TLS context, no environment variables, one mapping of errors."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from cryptography import x509
from cryptography.x509.oid import NameOID

from bridge.contract import Backend, CredentialEnd, Secret, SecretUnavailableError
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    LocalFileError,
    NoVerdictError,
    SettingsError,
    SettingsProblem,
)
from bridge.pki.budget import of_server
from bridge.system.http import (
    Answer,
    BrokenOffError,
    ClientRefusedError,
    HandshakeError,
    HttpsError,
    Peer,
    TooLongError,
    UntrustedError,
    ask,
    context,
    is_cut_off,
    pool,
)
from bridge.system.paths import open_regular
from bridge.words import one_line

#: Time limit for the second look at a broken connection.
_ALERT_SECONDS = 5.0
#: The hint for a server whose certificate is not valid yet.
_CLOCK_HINT = "is this node's clock behind? then put it right; else the server's certificate begins in the future"
#: Headers that the connection writes itself.
_OWN_HEADERS = frozenset({"host", "content-length", "accept-encoding", "connection"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """A backend's own words for the errors that all backends share."""

    name: str  #: The name of the backend's type, which begins each message.
    not_ours: str  #: The hint if the server is probably another product.
    tls: Callable[[str], str]  #: The hint for a failed handshake, by OpenSSL's text.
    silent: str = ""  #: The hint if there is no answer and the cause says nothing.
    cut_off: str = ""  #: The hint if the server closed the connection without an answer.
    status_suffices: bool = False  #: An error's status counts even if its body broke off.


class Http:
    """
    Sends requests to one CA's server over kept connections; several threads may share it.

    Every request goes to this server, whatever its URL is. It repeats nothing, and follows no redirect.
    """

    def __init__(self, wording: Wording, url: str, timeout: timedelta, tls: Callable[[], ssl.SSLContext]) -> None:
        """
        `timeout` is for one request with its whole answer. If the URL is `https:`, `tls` is called now and for each
        connection, and reads its files again (SettingsError: a file can't be used).
        """
        self._wording = wording
        self._seconds = timeout.total_seconds()
        self._peer = Peer.of(url, tls, alert_seconds=min(self._seconds, _ALERT_SECONDS))
        if self._peer.tls:
            tls()  # trouble is found now, not in the middle of a renewal
        self._pool = pool(self._peer)
        self._clock = ("", datetime.now(UTC))  # the header `Date` of the latest answer, and when that came
        self._session = requests.Session()
        self._session.trust_env = False  # no .netrc

    def ask(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None) -> Answer:
        """Send one request without the overhead of `requests`; any status is an answer (BackendError: none came)."""
        return self._answer(f"{method} {url}", lambda: self._exchange(method, _target(url), headers, body))

    @property
    def clock_ahead(self) -> timedelta | None:
        """How far the server's clock was ahead of ours at its latest answer (RFC 9110 §6.6.1); None: it did not say."""
        date, now = self._clock
        try:
            return parsedate_to_datetime(date) - now
        except (ValueError, TypeError, OverflowError):
            return None

    def request(self, method: str, url: str, where: str = "", **options: Any) -> Answer:
        """Send what `requests.Request` makes of the options; errors as for `ask`, messages name `where`."""

        def answer() -> Answer:
            request = self._session.prepare_request(requests.Request(method, url, **options))
            headers = {name: str(value) for name, value in request.headers.items() if name.lower() not in _OWN_HEADERS}
            body = request.body.encode() if isinstance(request.body, str) else request.body
            if body is None and "Content-Length" in request.headers:
                body = b""
            return self._exchange(method, request.path_url, headers, body)

        return self._answer(where or url, answer)

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._pool = pool(self._peer)  # the old one closes when no thread uses it

    def _exchange(self, method: str, target: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
        return ask(self._pool, method, target, headers, body, seconds=self._seconds)

    # --- errors -------------------------------------------------------------------------------------------------------

    def _answer(self, where: str, exchange: Callable[[], Answer]) -> Answer:
        with self._errors(where):
            try:
                answer = exchange()
            except BrokenOffError as e:
                if not self._wording.status_suffices or 200 <= e.status < 300:  # noqa: PLR2004
                    raise
                answer = Answer(status=e.status, body=b"")  # the reason is lost, the status says enough
        self._clock = (answer.headers.get("date", ""), datetime.now(UTC))
        return answer

    @contextlib.contextmanager
    def _errors(self, where: str) -> Iterator[None]:
        """The one place where a failure to get an answer becomes a backend's error."""
        name = self._wording.name
        try:
            yield
        except HttpsError as e:
            raise self._error(where, e) from e
        except SettingsError as e:  # the files were good when we began
            raise LocalFileError(f"{name}: {e}", hint=e.hint) from e
        except ValueError as e:  # its text may quote a header's value, as in `requests`
            text = f"{name}: {where}: the request could not be made: {type(e).__name__}"
            raise BackendRefusedError(text, hint=self._wording.not_ours) from None

    def _error(self, where: str, error: HttpsError) -> BackendError:
        wording, cause = self._wording, error.__cause__
        if isinstance(error, TooLongError):
            return NoVerdictError(f"{wording.name}: {where}: {error}", hint=wording.not_ours)
        if isinstance(error, UntrustedError | ClientRefusedError | HandshakeError):
            text = one_line(cause or error)
            hint = _CLOCK_HINT if "not yet valid" in text else wording.tls(text)
            return NoVerdictError(f"{wording.name}: {where}: TLS: {text}", hint=hint)
        return BackendUnavailableError(f"{wording.name}: {where}: {error}", hint=self._hint(cause))

    def _hint(self, cause: BaseException | None) -> str:
        if isinstance(cause, ConnectionRefusedError):
            return "nothing listens there: is the server up, and is the port in `url` right?"
        if isinstance(cause, socket.gaierror):
            return (
                "the name could not be looked up: is the host in `url` right, and does this machine's resolver know it?"
            )
        if is_cut_off(cause) and self._wording.cut_off:
            return self._wording.cut_off
        return self._wording.silent


class OverHttp(Backend):
    """A backend that asks one server; making it sends nothing, and closing it closes its connections."""

    _http: Http

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._http.close()


def _target(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"


# --- answers ----------------------------------------------------------------------------------------------------------


def retry_after_seconds(answer: Answer) -> float | None:
    """The seconds in a Retry-After header (RFC 9110 §10.2.3: seconds, or a date); None: no header, or neither."""
    value = answer.headers.get("retry-after")
    if value is None:
        return None
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):  # TypeError: a date without a time zone
        return None


def without(text: str, hidden: Iterable[str | None]) -> str:
    """Blot out our secrets in a server's text, in case the server repeats them."""
    for value in hidden:
        text = text.replace(value, "…") if value else text
    return text


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


# --- settings ---------------------------------------------------------------------------------------------------------


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


def is_loopback(host: str) -> bool:
    """Whether the host is this machine, to which a secret may go in the clear."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def subject_of(client_cert: Path, backend: str) -> x509.Name:
    """The subject of a client certificate (BackendRefusedError of this backend: the file has no readable one)."""
    try:
        with open_regular(client_cert) as file:
            return x509.load_pem_x509_certificate(file.read()).subject
    except (OSError, ValueError) as e:
        text = f"{backend}: {client_cert}: wanted the client certificate, found {type(e).__name__}"
        raise BackendRefusedError(text) from e


def common_name(client_cert: Path, backend: str) -> str:
    """The name in a client certificate, such as `CN=node-1`; errors as for `subject_of`."""
    names = subject_of(client_cert, backend).get_attributes_for_oid(NameOID.COMMON_NAME)
    return " ".join(f"CN={name.value!s}" for name in names)


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


def json_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object in an answer; None: the answer is something else."""
    try:
        found = of_server(body)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def object_of(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object below a key of an answer; empty if there is none."""
    found = document.get(key)
    return found if isinstance(found, dict) else {}


def listed(names: Iterable[str]) -> str:
    """Names in alphabetical order, for messages."""
    return one_line(", ".join(sorted(names))) or "none"
