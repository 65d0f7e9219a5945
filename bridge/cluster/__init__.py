"""
The cluster's Kubernetes API, for a node and for the gateway.

This module has the client of the Kubernetes API, of etcd or of a kubelet: its credentials and its servers. `api` has
the requests, `kubeadm` the ConfigMaps from which kubeadm writes files, `lease` the objects by which runs take turns.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast
from urllib.parse import urlsplit

from cryptography import x509
from urllib3.connectionpool import HTTPConnectionPool

from bridge.errors import BridgeError, Exit
from bridge.node import endpoints, kubeconfig
from bridge.node.endpoints import Address, Server
from bridge.node.inventory import Node
from bridge.node.kubeconfig import KubeconfigError
from bridge.node.processes import file_contents
from bridge.pki.budget import of_server
from bridge.pki.certificates import UNREADABLE
from bridge.specs import Component
from bridge.system import http, paths, tls
from bridge.system.http import Answer
from bridge.system.paths import UnreadableError
from bridge.system.tls import HttpsError, Peer
from bridge.words import one_line

#: The limit for each request; a healthy component answers within milliseconds.
TIMEOUT_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Client:
    """A client certificate with its key, or a token, and the CAs to trust."""

    name: str  #: The name of the file that it comes from.
    certificate_pem: bytes | None  #: None: an anonymous client.
    key_pem: bytes | None = field(repr=False)
    trust_pem: bytes | None  #: None: trust any server, as an API server trusts kubelets.
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ValueError("wanted a token, found more than one word of ASCII text")

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """The TLS context of this client's connections (HttpsError: a file's content can't be used)."""
        return tls.context(self.trust_pem, self.certificate_pem, self.key_pem)

    @cached_property
    def headers(self) -> Mapping[str, str]:
        """The headers that authenticate us if no certificate does."""
        return {"Authorization": f"Bearer {self.token}"} if self.token is not None else {}

    @classmethod
    def of(cls, certificate: Path, key: Path, trust: Path | None) -> Client:
        """Read a client from files (UnreadableError, ValueError: one can't be read, or does not exist)."""
        return cls(
            name=certificate.name,
            certificate_pem=file_contents(certificate),
            key_pem=file_contents(key),
            trust_pem=None if trust is None else file_contents(trust),
        )

    @cached_property
    def _peers(self) -> dict[Server, Peer]:
        return {}

    def peer(self, server: Server) -> Peer:
        """Return the peer by which this client reaches a server, always the same one (UnreachableError: bad URL)."""
        if server not in self._peers:
            seconds = 1.0 if self.certificate_pem is not None else 0.0
            peer = Peer.of(server.url, lambda: self.tls, server_name=server.name, alert_seconds=seconds)
            self._peers[server] = peer
        return self._peers[server]

    @cached_property
    def _pools(self) -> dict[Server, HTTPConnectionPool]:
        return {}

    def pool(self, server: Server) -> HTTPConnectionPool:
        """Return this client's kept connections to a server (UnreachableError: bad URL)."""
        return self._pools.get(server) or self._pools.setdefault(server, http.pool(self.peer(server)))

    def close(self) -> None:
        """Close the kept connections that are not in use; the others close when their answers end."""
        self._pools.clear()

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
        """Ask one server over a new connection, with a JSON body; any status is an answer (HttpsError: none came)."""
        json_headers = {"Accept": "application/json", **({"Content-Type": "application/json"} if body else {})}
        target = f"{urlsplit(server.url).path}{path}" or "/"
        with contextlib.closing(http.pool(self.peer(server))) as pool:
            given = {**json_headers, **self.headers, **(headers or {})}
            return http.ask(pool, method, target, given, body, seconds=seconds or TIMEOUT_SECONDS)

    def served(self, place: Address, name: str | None = None) -> x509.Certificate:
        """Return the leaf of a server's TLS handshake (HttpsError: none); it must name `name`, or the place's host."""
        peer = Peer(host=place.host, port=place.port, tls=lambda: self.tls, server_name=name)
        with peer.connected(TIMEOUT_SECONDS) as opened:
            der = cast(ssl.SSLSocket, opened).getpeercert(binary_form=True) or b""
        try:
            return x509.load_der_x509_certificate(der)
        except UNREADABLE as e:  # OpenSSL accepts more than RFC 5280 allows
            raise tls.UntrustedError(
                f"wanted a server certificate that can be read, found: {one_line(e, 80)}"
            ) from None


#: A client without a certificate, which accepts any server's.
ANONYMOUS = Client(name="anonymous", certificate_pem=None, key_pem=None, trust_pem=None)


def document(body: bytes) -> dict[str, Any]:
    """Parse a JSON object (UnreachableError: something else)."""
    try:
        found = of_server(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise tls.UnreachableError("wanted an object in JSON, found something else")
    return found


def below(of: Any, *keys: str) -> Any:
    """Return the value below these keys; None if there is none, or if a value above it is no object."""
    for key in keys:
        of = of.get(key) if isinstance(of, dict) else None
    return of


def mapping(of: Any, *keys: str) -> Mapping[str, Any]:
    """Return the object below these keys; empty if there is none."""
    found = below(of, *keys)
    return found if isinstance(found, dict) else {}


def text_of(of: Any, *keys: str) -> str:
    """Return the text below these keys; empty if there is none."""
    found = below(of, *keys)
    return found if isinstance(found, str) else ""


def items(of: Any, *keys: str) -> Iterator[Mapping[str, Any]]:
    """Iterate over the objects in the list below these keys, and skip other values."""
    found = below(of, *keys)
    return (item for item in found if isinstance(item, dict)) if isinstance(found, list) else iter(())


# --- credentials and servers -----------------------------------------------------------------------------------------


#: The files of a pod's service account.
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: The kubeconfigs that we try on a node, in this order; the second's rights do not depend on RBAC.
_KUBECONFIGS = ("admin.conf", "super-admin.conf")


class AccessError(BridgeError):
    """The credentials can't be read."""

    exit_code: ClassVar[int] = Exit.USAGE


class Access(NamedTuple):
    """Clients and servers, in the order in which we try them."""

    clients: tuple[Client, ...]
    servers: tuple[Server, ...]
    troubles: tuple[str, ...] = ()  #: Why some kubeconfigs gave no client.


def of_node(node: Node, kubeconfig_dir: Path) -> Access:
    """Read a node's clients and servers: its own API server, then admin.conf's; on a worker, kubelet.conf's."""
    clients, troubles = [], []
    servers = [Server(url)] if (url := local_url(node)) else []
    names = ("kubelet.conf",) if node.is_worker else _KUBECONFIGS
    for name in names:
        try:
            data = paths.read(kubeconfig_dir / name)
            if data is None:
                continue
            client, server = of_kubeconfig(kubeconfig_dir / name, data)
        except (UnreadableError, KubeconfigError, ValueError) as e:
            troubles.append(f"{name}: {e}")
            continue
        clients.append(client)
        servers.append(server)
    if not clients and not troubles:
        found_none = "none" if node.is_worker else "neither"
        troubles.append(f"{kubeconfig_dir}: wanted {' or '.join(names)}, found {found_none}")
    return Access(tuple(clients), tuple(servers), tuple(troubles))


def of_gateway(config: Path | None) -> Access:
    """Read a kubeconfig, or else the pod's service account (AccessError: they can't be used)."""
    try:
        client, server = _of_pod() if config is None else of_kubeconfig(config, _bytes(config, "a kubeconfig"))
        _ = client.tls
    except (UnreadableError, KubeconfigError, ValueError, HttpsError) as e:
        where = config or SERVICE_ACCOUNT
        raise AccessError(f"{where}: {e}", hint="gateway.kubeconfig names a kubeconfig") from None
    return Access((client,), (server,))


def _of_pod() -> tuple[Client, Server]:
    host = os.environ.get("KUBERNETES_SERVICE_HOST")
    if not host:
        raise ValueError("there is no kubeconfig (gateway.kubeconfig), and this is no pod with a service account")
    trust, token = _bytes(SERVICE_ACCOUNT / "ca.crt", "CA certificate"), _token(SERVICE_ACCOUNT / "token")
    client = Client(name="service account", certificate_pem=None, key_pem=None, trust_pem=trust, token=token)
    return client, Server(url_of(host, int(os.environ.get("KUBERNETES_SERVICE_PORT", "443"))))


def of_kubeconfig(path: Path, data: bytes, usual_trust: Path | None = None) -> tuple[Client, Server]:
    """The client and the server of a kubeconfig, which may name no CA where there is a usual one (ValueError)."""
    parsed = kubeconfig.parse(data)
    parts = urlsplit(parsed.server)
    if parts.scheme != "https" or not parts.hostname:
        raise ValueError(f"wanted an https: server, found {one_line(parsed.server)!r}")

    def part(embedded: bytes | None, file: str | None, what: str) -> bytes:
        if not embedded and not file:
            raise ValueError(f"it has no {what}")
        return embedded or _bytes(path.parent / (file or ""), what)

    trust_file = parsed.ca_file or (str(usual_trust) if usual_trust is not None else None)
    trust, token, certificate, key = part(parsed.ca_data, trust_file, "CA certificate"), None, None, None
    if parsed.token_file:
        token = _token(path.parent / parsed.token_file)
    else:
        certificate = part(parsed.certificate_data, parsed.certificate_file, "client certificate")
        key = part(kubeconfig.key_data(data), parsed.key_file, "client key")
    client = Client(name=path.name, certificate_pem=certificate, key_pem=key, trust_pem=trust, token=token)
    return client, Server(parsed.server.rstrip("/"), parsed.tls_server_name)


def _token(path: Path) -> str:
    return _bytes(path, "token").decode("ascii").strip()


def _bytes(path: Path, what: str) -> bytes:
    found = paths.read(path)
    if not found:
        raise ValueError(f"there is no {what} in {path}")
    return found


def local_url(node: Node) -> str | None:
    """Return the URL of this node's API server; None without a manifest, or without an address in it."""
    address = node.flags(Component.APISERVER).get("--advertise-address", "")
    url = url_of(address, apiserver_port(node))
    return url if address and endpoints.is_url(url) else None


def apiserver_port(node: Node) -> str:
    """Return the port of this node's API server; kubeadm uses the same one on all nodes."""
    return node.flags(Component.APISERVER).get("--secure-port", str(endpoints.PORTS[Component.APISERVER]))


def url_of(address: str, port_number: str | int) -> str:
    """Return the `https:` URL of an address, IPv6 included."""
    return f"https://{f'[{address}]' if ':' in address else address}:{port_number}"
