"""Who asks: a client certificate or a token, for the Kubernetes API, etcd and the kubelet alike; keys stay in memory."""

from __future__ import annotations

import contextlib
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509

from bridge.node.endpoints import Address, Server
from bridge.node.processes import file_contents
from bridge.pki.budget import of_server
from bridge.system import http
from bridge.system.http import Answer, KeptConnection, Peer

#: For each request; a component that is well answers within milliseconds.
TIMEOUT_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Client:
    """A client certificate with its key, or a token; and whom to trust."""

    name: str  #: Of the file it comes from.
    certificate_pem: bytes | None  #: None: an anonymous client.
    key_pem: bytes | None = field(repr=False)
    trust_pem: bytes | None  #: None: any server, as an API server trusts kubelets.
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ValueError("wanted a token, found more than one word of ASCII text")

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """The TLS context of this client's connections; an HttpsError where a file's content can't be used."""
        return http.context(self.trust_pem, self.certificate_pem, self.key_pem)

    @cached_property
    def headers(self) -> Mapping[str, str]:
        """The headers that say who we are, if a certificate does not."""
        return {"Authorization": f"Bearer {self.token}"} if self.token is not None else {}

    @classmethod
    def of(cls, certificate: Path, key: Path, trust: Path | None) -> Client:
        """Read one from files; an UnreadableError or ValueError where one can't be read, or is not there."""
        return cls(
            name=certificate.name,
            certificate_pem=file_contents(certificate),
            key_pem=file_contents(key),
            trust_pem=None if trust is None else file_contents(trust),
        )

    def peer(self, server: Server) -> Peer:
        """A server as this client comes to it; an UnreachableError where it has no such URL."""
        alert_seconds = 1.0 if self.certificate_pem is not None else 0.0
        return Peer.of(server.url, lambda: self.tls, server_name=server.name, alert_seconds=alert_seconds)

    def ask(
        self,
        server: Server,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        method: str = "GET",
        body: bytes | None = None,
        seconds: float | None = None,
    ) -> Answer:
        """
        Ask one server over a connection of its own; any status is an answer.

        Args:
            server: Its path comes first.
            path: With its query.
            headers: Besides those that say who we are, and those for JSON.
            method: HTTP's.
            body: JSON.
            seconds: For all of it; None: `TIMEOUT_SECONDS`.

        Raises:
            HttpsError: No answer.
        """
        json_headers = {"Accept": "application/json", **({"Content-Type": "application/json"} if body else {})}
        target = f"{urlsplit(server.url).path}{path}" or "/"
        with contextlib.closing(KeptConnection(self.peer(server))) as connection:
            given = {**json_headers, **self.headers, **(headers or {})}
            return connection.ask(method, target, given, body, seconds=seconds or TIMEOUT_SECONDS)

    def served(self, place: Address, name: str | None = None) -> x509.Certificate:
        """
        The leaf that a server shows this client in a handshake (an HttpsError: none); no request is sent.

        It names `name`, or else the host of the place.
        """
        peer = Peer(host=place.host, port=place.port, tls=lambda: self.tls, server_name=name)
        return http.served(peer, TIMEOUT_SECONDS)


#: Without a certificate, and without a look at the server's.
NOBODY = Client(name="nobody", certificate_pem=None, key_pem=None, trust_pem=None)


def document(body: bytes) -> dict[str, Any]:
    """An object in JSON; an UnreachableError for anything else."""
    try:
        found = of_server(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise http.UnreachableError("wanted an object in JSON, found something else")
    return found


def items(of: Mapping[str, Any], *keys: str) -> Iterator[Mapping[str, Any]]:
    """The objects in a list that is some levels below; whatever is not in that shape is left out."""
    found: Any = of
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return (one for one in found if isinstance(one, dict)) if isinstance(found, list) else iter(())
