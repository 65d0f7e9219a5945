"""Who asks: a client certificate or a token, for the Kubernetes API, etcd and the kubelet alike; keys stay in memory."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bridge.node.endpoints import Server
from bridge.node.processes import file_contents
from bridge.system import https

#: For each request; a component that is well answers within milliseconds.
TIMEOUT_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Client:
    """A client certificate with its key, or a token; and whom to trust."""

    name: str  #: Of the file it comes from.
    certificate_pem: bytes | None  #: None: nobody in particular.
    key_pem: bytes | None = field(repr=False)
    trust_pem: bytes | None  #: None: anybody, as an API server does with kubelets.
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ValueError("wanted a token, found more than one word of ASCII text")

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """
        The TLS context for connections that are kept.

        Raises:
            HttpsError: Certificate, key or trust anchors can't be used.
        """
        return https.context(self.trust_pem, self.certificate_pem, self.key_pem)

    @cached_property
    def headers(self) -> Mapping[str, str]:
        """The headers that say who we are, if a certificate does not."""
        return {"Authorization": f"Bearer {self.token}"} if self.token is not None else {}

    @cached_property
    def lines(self) -> str:
        """The same as whole lines."""
        return "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())

    @classmethod
    def of(cls, certificate: Path, key: Path, trust: Path | None) -> Client:
        """
        Read one from files.

        Raises:
            UnreadableError, ValueError: A file can't be read, or is not there.
        """
        return cls(
            name=certificate.name,
            certificate_pem=file_contents(certificate),
            key_pem=file_contents(key),
            trust_pem=None if trust is None else file_contents(trust),
        )

    def ask(
        self, server: Server, path: str, headers: Mapping[str, str] | None = None, **request: Any
    ) -> https.HttpAnswer:
        """
        Ask one server over a connection of its own; any status is an answer.

        Args:
            server: Without a path.
            path: With its query.
            headers: More of them.
            request: As `https.request` has it.

        Raises:
            HttpsError: None.
        """
        return https.request(
            f"{server.url}{path}",
            server_name=server.name,
            trust_pem=self.trust_pem,
            certificate_pem=self.certificate_pem,
            key_pem=self.key_pem,
            timeout_seconds=TIMEOUT_SECONDS,
            headers={**self.headers, **(headers or {})},
            **request,
        )


#: Without a certificate, and asking whoever answers.
NOBODY = Client(name="nobody", certificate_pem=None, key_pem=None, trust_pem=None)


def document(body: bytes) -> dict[str, Any]:
    """
    An object in JSON.

    Raises:
        UnreachableError: Something else.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise https.UnreachableError("wanted an object in JSON, found something else")
    return found


def items(of: Mapping[str, Any], *keys: str) -> Iterator[Mapping[str, Any]]:
    """The objects in a list that is some levels below; whatever is not in that shape is left out."""
    found: Any = of
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return (one for one in found if isinstance(one, dict)) if isinstance(found, list) else iter(())
