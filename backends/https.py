"""
HTTP as every backend wants it: limits of time and size, one TLS context, nothing of the environment's.

No rules of any CA are here; only what would be the same in each file beside this one.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter

from bridge.errors import SettingsError, SettingsProblem

#: A signed certificate with its chain is a few kB, one with thousands of SANs far below this.
MAX_ANSWER_BYTES = 1 << 20

T = TypeVar("T")


class TooMuchError(Exception):
    """An answer without end."""


def is_loopback(host: str) -> bool:
    """Whether it is this machine, to which a secret may go in the clear."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def within(seconds: float, work: Callable[[], T]) -> T:
    """
    What `work` returns or raises, in a thread of its own.

    The timeouts of `requests` are for each step, so an answer that drips, a name with many addresses or a slow
    resolver could take any time.

    Raises:
        TimeoutError: It took longer; it is left to itself.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as e:  # noqa: BLE001 (it is raised on the other side)
            future.set_exception(e)

    Thread(target=run, daemon=True).start()
    return future.result(timeout=seconds)


def body_of(response: requests.Response) -> bytes:
    """
    The body of an answer that was asked for with `stream=True`.

    Raises:
        TooMuchError: It is longer than `MAX_ANSWER_BYTES`.
    """
    found = bytearray()
    for chunk in response.iter_content(1 << 14):
        found += chunk
        if len(found) > MAX_ANSWER_BYTES:
            response.close()
            raise TooMuchError(f"wanted an answer of at most {MAX_ANSWER_BYTES} bytes, found a longer one")
    return bytes(found)


def retry_after_seconds(response: requests.Response, now: datetime) -> float | None:
    """What the server wishes (RFC 9110 §10.2.3: seconds, or a date); None for what is neither."""
    value = response.headers.get("Retry-After", "")
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - now).total_seconds())
    except (ValueError, TypeError, OverflowError):  # TypeError: a date without a time zone
        return None


def causes(e: BaseException | None) -> Iterator[BaseException]:
    """Outermost first: requests wraps what urllib3 wraps, each in its own way, and some are nowhere but in args."""
    while e is not None:
        yield e
        inner = (getattr(e, "reason", None), e.__cause__, e.__context__, *e.args)
        e = next((i for i in inner if isinstance(i, BaseException)), None)


def innermost(e: BaseException) -> BaseException:
    """The cause that says it shortest; those above it quote the whole request line."""
    *_, last = causes(e)
    return last


def tls_context(ca_file: Path | None, client_cert: Path | None, client_key: Path | None) -> ssl.SSLContext:
    """
    TLS 1.2 at least, the server's name and chain checked, our certificate shown if there is one.

    Args:
        ca_file: Trusted for the server's certificate; None: the system's CAs, and not those that requests carries along.
        client_cert: With its chain.
        client_key: Not encrypted.

    Raises:
        SettingsError: A file can't be used; all of them are named.
    """
    # not create_default_context, which would obey SSLKEYLOGFILE
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    problems = []
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
        else:
            context.load_default_certs()
    except OSError as e:
        problems.append(SettingsProblem("ca_file", "a file with PEM certificates", f"{ca_file}: {e.strerror}"))
    if client_cert and client_key:
        try:
            # without the function OpenSSL would ask the terminal for a passphrase, and a cron job would hang
            context.load_cert_chain(client_cert, client_key, password=lambda: "")
        except (OSError, ValueError) as e:
            reason = (isinstance(e, OSError) and e.strerror) or str(e)
            wanted = "PEM files with a certificate and its key, not encrypted"
            problems.append(SettingsProblem("client_cert", wanted, f"{client_cert} and {client_key}: {reason}"))
    if problems:
        raise SettingsError(problems)
    return context


class TlsAdapter(HTTPAdapter):
    """
    Connections with one TLS context, which alone says whom we trust and who we are.

    `requests` would add the CAs of certifi to it, where we mean the system's.
    """

    def __init__(self, tls: ssl.SSLContext, **options: Any) -> None:
        self._tls = tls
        super().__init__(**options)

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: bool | str, cert: str | tuple[str, str] | None = None
    ) -> Any:
        """With our context."""
        host, pool = super().build_connection_pool_key_attributes(request, verify, cert)
        pool["ssl_context"] = self._tls
        return host, pool

    def cert_verify(self, conn: Any, url: object, verify: object, cert: object) -> None:
        """Nothing to add to the context."""
