"""
Whether the components of this node are well: what they say themselves.

Ports and addresses are those of the manifests. Not checked: who answers. The controller manager and the scheduler
serve certificates that nobody has signed, and a served certificate is a matter of proof, not of health.
"""

from __future__ import annotations

from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

from bridge.cluster.api import Api
from bridge.cluster.client import NOBODY, Client
from bridge.control_plane.etcd import Etcd
from bridge.node import endpoints
from bridge.node.endpoints import Server
from bridge.node.inventory import Node
from bridge.node.kubelet import Kubelet
from bridge.specs import Component
from bridge.system.http import Answer, HttpsError

_LONGEST_REASON = 200


#: Where a component says how it is.
PATHS = {Component.APISERVER: "/readyz", Component.CONTROLLER_MANAGER: "/healthz", Component.SCHEDULER: "/healthz"}


def trouble(component: Component, node: Node, kubeconfig_dir: Path) -> str | None:
    """
    Why a component of this node is not healthy; None: it is, or it can't be asked (a kubelet with that switched off).

    Args:
        component: The kubelet, or one that has a manifest.
        node: Read while the manifest was in its place.
        kubeconfig_dir: For admin.conf, or else super-admin.conf.
    """
    if component is Component.KUBELET:
        url = Kubelet.load().health_url
        return None if url is None else _trouble(url, NOBODY)
    flags = node.manifests[component].flags
    if component is Component.ETCD:
        return _etcd_trouble(Server(endpoints.etcd_url(flags)), node)
    host = flags.get("--bind-address", "0.0.0.0")  # noqa: S104 (looked for, not bound)
    port = flags.get("--secure-port", endpoints.PORTS[component])
    url = f"https://{endpoints.reachable(host)}:{port}{PATHS[component]}"
    found = _trouble(url, NOBODY)
    if component is Component.APISERVER and found is not None:  # it may answer nobody whom it does not know
        for client in Api.of_node(node, kubeconfig_dir).clients:
            found = _trouble(url, replace(client, trust_pem=None))
            if found is None:
                break
    return found


# --- asking ----------------------------------------------------------------------------------------------------------


def _etcd_trouble(server: Server, node: Node) -> str | None:
    try:
        found = Etcd.of(node, trusting=True).trouble(server, alarms=True)
    except HttpsError as e:
        found = str(e)
    return None if found is None else f"{server.url}: {found}"


def _trouble(url: str, client: Client) -> str | None:
    try:
        found = _reason(client.ask(Server(url), ""))
    except HttpsError as e:
        found = str(e)
    return None if found is None else f"{url}: {found}"


def _reason(answer: Answer) -> str | None:
    """The failed checks of the API machinery's health handlers begin with [-]."""
    if answer.status == HTTPStatus.OK:
        return None
    lines = answer.body.decode(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith("[-]")] or lines[:1]
    return f"HTTP status {answer.status}: {'; '.join(failed)}"[:_LONGEST_REASON]
