"""
The cluster's API, by whichever of its servers answers.

With the rights of `admin.conf` or else `super-admin.conf`; keys stay in memory. For the few requests that concern
other nodes: nothing in a renewal itself needs an API server.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from bridge.control_plane.client import Client, document
from bridge.errors import BridgeError, Exit
from bridge.node import endpoints, kubeconfig
from bridge.node.endpoints import Server
from bridge.node.inventory import Node
from bridge.node.kubeconfig import Kubeconfig, KubeconfigError
from bridge.specs import Component
from bridge.system import https, safe_read
from bridge.system.safe_read import UnreadableError

#: Whose rights are tried, in this order; the second's do not depend on RBAC.
_KUBECONFIGS = ("admin.conf", "super-admin.conf")

_NOT_THIS_CLIENT = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
_NOT_NOW = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.REQUEST_TIMEOUT}


class NoAnswerError(BridgeError):
    """No API server had an answer that can be used; the text says why, server by server."""

    exit_code: ClassVar[int] = Exit.UNAVAILABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer that is about the request, and not about the server's health or our rights."""

    status: int
    document: Mapping[str, Any]


class Api:
    """May be used by several threads."""

    def __init__(self, clients: Sequence[Client], servers: Sequence[Server], troubles: Sequence[str] = ()) -> None:
        """
        Args:
            clients: In the order in which they are tried.
            servers: Likewise; the last one that answered comes first from then on.
            troubles: Why there are no more clients than these.
        """
        self.clients = tuple(clients)
        self._servers = list(dict.fromkeys(servers))
        self._troubles = tuple(troubles)
        self._mutex = threading.Lock()

    @property
    def servers(self) -> list[Server]:
        """Those that are known."""
        with self._mutex:
            return list(self._servers)

    def add(self, servers: Sequence[Server]) -> None:
        """More servers, to be tried after the others."""
        with self._mutex:
            self._servers += [server for server in dict.fromkeys(servers) if server not in self._servers]

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Reply:
        """
        Ask one server after the other, until one has an answer.

        After a connection that ended too early the request may have been carried out, and is made once more with the
        next server: a caller's writes must bear that.

        Args:
            method: HTTP's.
            path: With its query.
            body: Goes as JSON.

        Raises:
            NoAnswerError: Down, not trusted, not for us, or in trouble, each of them.
        """
        found = list(self._troubles)
        for server in self.servers:
            for client in self.clients:
                try:
                    reply = _ask(server, client, method, path, body)
                except https.HttpsError as e:
                    found.append(f"{server.url}: {e}")
                    if isinstance(e, https.ClientRefusedError):
                        continue
                    break
                if reply is not None:
                    self._prefer(server)
                    return reply
                found.append(f"{server.url}: it turns {client.name} away")
        raise NoAnswerError(f"no answer from the cluster's API: {'; '.join(found) or 'no server is known'}")

    def _prefer(self, server: Server) -> None:
        with self._mutex:
            self._servers.sort(key=lambda one: one != server)


def _ask(server: Server, client: Client, method: str, path: str, body: Mapping[str, Any] | None) -> Reply | None:
    """
    None: it wants another client.

    Raises:
        HttpsError: No answer, or one that is about the server itself.
    """
    answer = client.ask(server, path, method=method, body=None if body is None else json.dumps(body).encode())
    if answer.status in _NOT_THIS_CLIENT:
        return None
    if answer.status in _NOT_NOW or answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise https.UnreachableError(f"wanted an answer, found HTTP {answer.status}")
    return Reply(status=answer.status, document=document(answer.body))


def connect(node: Node, kubeconfig_dir: Path) -> Api:
    """
    A client of this node's API server, then of the one that admin.conf names; nothing is asked yet.

    Args:
        node: With its manifests, as they are when none of them is out of its directory.
        kubeconfig_dir: Where admin.conf is.
    """
    clients, troubles = [], []
    servers = [Server(url)] if (url := local_url(node)) else []
    for name in _KUBECONFIGS:
        try:
            found = _client(kubeconfig_dir / name)
        except (UnreadableError, KubeconfigError, ValueError) as e:
            troubles.append(f"{name}: {e}")
            continue
        if found is not None:
            client, server = found
            clients.append(client)
            servers.append(server)
    if not clients and not troubles:
        troubles.append(f"{kubeconfig_dir}: wanted {' or '.join(_KUBECONFIGS)}, found neither")
    return Api(clients, servers, troubles)


def local_url(node: Node) -> str | None:
    """Where this node's API server is; None when its manifest is not there or does not tell."""
    manifest = node.manifests.get(Component.APISERVER)
    address = "" if manifest is None else manifest.flags.get("--advertise-address", "")
    return url_of(address, port(node)) if address else None


def port(node: Node) -> str:
    """The port of this node's API server, which kubeadm makes the same on all nodes."""
    manifest = node.manifests.get(Component.APISERVER)
    usual = str(endpoints.PORTS[Component.APISERVER])
    return usual if manifest is None else manifest.flags.get("--secure-port", usual)


def url_of(address: str, port_number: str | int) -> str:
    """`https:` with an address, which may be IPv6's."""
    return f"https://{f'[{address}]' if ':' in address else address}:{port_number}"


def _client(path: Path) -> tuple[Client, Server] | None:
    """
    Whom a kubeconfig makes us, and where it leads; None when there is none.

    Raises:
        UnreadableError, KubeconfigError, ValueError: It can't be used; the text says why.
    """
    data = safe_read.read(path)
    if data is None:
        return None
    parsed = kubeconfig.parse(data)
    client = Client(
        name=path.name,
        trust_pem=_bytes(path, parsed.ca_data, parsed.ca_file, "a CA certificate"),
        certificate_pem=_bytes(path, parsed.certificate_data, parsed.certificate_file, "a client certificate"),
        key_pem=_bytes(path, kubeconfig.key_data(data), parsed.key_file, "a client key"),
    )
    return client, _server(parsed)


def _server(parsed: Kubeconfig) -> Server:
    if urlsplit(parsed.server).scheme != "https" or not urlsplit(parsed.server).hostname:
        raise ValueError(f"wanted an https: server, found {parsed.server!r}")
    return Server(parsed.server.rstrip("/"), parsed.tls_server_name)


def _bytes(path: Path, data: bytes | None, file: str | None, what: str) -> bytes:
    found = data or (safe_read.read(path.parent / file) if file else None)
    if not found:
        raise ValueError(f"wanted {what}, found none")
    return found
