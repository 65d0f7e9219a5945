"""
With whose rights the cluster's API is asked, and which of its servers.

On a node with those of `admin.conf` or else `super-admin.conf`; the gateway with those of its own kubeconfig, or of a
pod's service account. Nothing in a renewal itself needs an API server.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from bridge.cluster.client import Client
from bridge.errors import BridgeError, Exit
from bridge.node import endpoints, kubeconfig
from bridge.node.endpoints import Server
from bridge.node.inventory import Node
from bridge.node.kubeconfig import KubeconfigError
from bridge.specs import Component
from bridge.system import paths
from bridge.system.http import HttpsError
from bridge.system.paths import UnreadableError
from bridge.words import one_line

#: Where a pod finds its service account.
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: Whose rights are tried on a node, in this order; the second's do not depend on RBAC.
_KUBECONFIGS = ("admin.conf", "super-admin.conf")


class AccessError(BridgeError):
    """The credentials can't be read."""

    exit_code: ClassVar[int] = Exit.USAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Clients and servers, in the order in which they are tried."""

    clients: tuple[Client, ...]
    servers: tuple[Server, ...]
    troubles: tuple[str, ...] = ()  #: Why there are no more clients than these.


def of_node(node: Node, kubeconfig_dir: Path) -> Access:
    """
    Read a node's: this node's API server comes first, then the one that admin.conf names.

    The node has its manifests, as they are when none of them is out of its directory.
    """
    clients, troubles = [], []
    servers = [Server(url)] if (url := local_url(node)) else []
    for name in _KUBECONFIGS:
        try:
            data = paths.read(kubeconfig_dir / name)
            if data is None:
                continue
            client, server = _of_kubeconfig(kubeconfig_dir / name, data)
        except (UnreadableError, KubeconfigError, ValueError) as e:
            troubles.append(f"{name}: {e}")
            continue
        clients.append(client)
        servers.append(server)
    if not clients and not troubles:
        troubles.append(f"{kubeconfig_dir}: wanted {' or '.join(_KUBECONFIGS)}, found neither")
    return Access(clients=tuple(clients), servers=tuple(servers), troubles=tuple(troubles))


def of_gateway(config: Path | None) -> Access:
    """Read a kubeconfig, or else the pod's service account; an AccessError where they can't be used."""
    try:
        client, server = _of_pod() if config is None else _of_kubeconfig(config, _bytes(config, "a kubeconfig"))
        _ = client.tls
    except (UnreadableError, KubeconfigError, ValueError, HttpsError) as e:
        where = config or SERVICE_ACCOUNT
        raise AccessError(f"{where}: {e}", hint="gateway.kubeconfig names a kubeconfig") from None
    return Access(clients=(client,), servers=(server,))


def _of_pod() -> tuple[Client, Server]:
    host = os.environ.get("KUBERNETES_SERVICE_HOST")
    if not host:
        raise ValueError("wanted a kubeconfig (gateway.kubeconfig), or a pod with a service account, found neither")
    client = Client(
        name="service account",
        trust_pem=_bytes(SERVICE_ACCOUNT / "ca.crt", "a CA certificate"),
        certificate_pem=None,
        key_pem=None,
        token=_token(SERVICE_ACCOUNT / "token"),
    )
    return client, Server(url_of(host, int(os.environ.get("KUBERNETES_SERVICE_PORT", "443"))))


def _of_kubeconfig(path: Path, data: bytes) -> tuple[Client, Server]:
    """Read whom a kubeconfig makes us, and where it leads."""
    parsed = kubeconfig.parse(data)
    parts = urlsplit(parsed.server)
    if parts.scheme != "https" or not parts.hostname:
        raise ValueError(f"wanted an https: server, found {one_line(parsed.server)!r}")

    def part(embedded: bytes | None, file: str | None, what: str) -> bytes:
        if not embedded and not file:
            raise ValueError(f"wanted {what}, found none")
        return embedded or _bytes(path.parent / (file or ""), what)

    trust = part(parsed.ca_data, parsed.ca_file, "a CA certificate")
    has_token = bool(parsed.token_file)
    client = Client(
        name=path.name,
        trust_pem=trust,
        token=_token(path.parent / parsed.token_file) if parsed.token_file else None,
        certificate_pem=None
        if has_token
        else part(parsed.certificate_data, parsed.certificate_file, "a client certificate"),
        key_pem=None if has_token else part(kubeconfig.key_data(data), parsed.key_file, "a client key"),
    )
    return client, Server(parsed.server.rstrip("/"), parsed.tls_server_name)


def _token(path: Path) -> str:
    return _bytes(path, "a token").decode("ascii").strip()


def _bytes(path: Path, what: str) -> bytes:
    found = paths.read(path)
    if not found:
        raise ValueError(f"wanted {what} in {path}, found none")
    return found


# --- this node's server ----------------------------------------------------------------------------------------------


def local_url(node: Node) -> str | None:
    """Where this node's API server is; None when its manifest is not there or does not tell."""
    manifest = node.manifests.get(Component.APISERVER)
    address = "" if manifest is None else manifest.flags.get("--advertise-address", "")
    url = url_of(address, port(node))
    return url if address and endpoints.is_url(url) else None


def port(node: Node) -> str:
    """The port of this node's API server, which kubeadm makes the same on all nodes."""
    manifest = node.manifests.get(Component.APISERVER)
    usual = str(endpoints.PORTS[Component.APISERVER])
    return usual if manifest is None else manifest.flags.get("--secure-port", usual)


def url_of(address: str, port_number: str | int) -> str:
    """`https:` with an address, which may be IPv6's."""
    return f"https://{f'[{address}]' if ':' in address else address}:{port_number}"
