"""
Whether the components of this node are well: what they say themselves.

Ports and addresses are those of the manifests. Not checked: who answers. The controller manager and the scheduler
serve certificates that nobody has signed, and a served certificate is a matter of proof, not of health.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from bridge.control_plane import kube_api
from bridge.node import endpoints
from bridge.node.inventory import Node
from bridge.node.kubelet import Kubelet
from bridge.specs import SPECS, Component
from bridge.system.https import Answer, HttpsError, request
from bridge.system.safe_read import UnreadableError, read

#: For one question; a healthy component answers within milliseconds.
TIMEOUT_SECONDS = 5.0
_LONGEST_REASON = 200


#: Where a component says how it is.
PATHS = {Component.APISERVER: "/readyz", Component.CONTROLLER_MANAGER: "/healthz", Component.SCHEDULER: "/healthz"}


def trouble(component: Component, node: Node, pki_dir: Path, kubeconfig_dir: Path) -> str | None:
    """
    Why a component of this node is not healthy; None: it is, or it can't be asked (a kubelet with that switched off).

    Args:
        component: The kubelet, or one that has a manifest.
        node: Read while the manifest was in its place.
        pki_dir: For etcd's clients.
        kubeconfig_dir: For admin.conf, or else super-admin.conf.
    """
    if component is Component.KUBELET:
        url = Kubelet.load().health_url
        return None if url is None else _trouble(url, None)
    flags = node.manifests[component].flags
    if component is Component.ETCD:
        return _etcd_trouble(endpoints.etcd_url(flags), _etcd_pair(pki_dir))
    host = flags.get("--bind-address", "0.0.0.0")  # noqa: S104 (looked for, not bound)
    port = flags.get("--secure-port", endpoints.PORTS[component])
    url = f"https://{endpoints.reachable(host)}:{port}{PATHS[component]}"
    found = _trouble(url, None)
    if component is Component.APISERVER and found is not None:  # it may answer nobody whom it does not know
        for client in kube_api.connect(node, kubeconfig_dir).clients:
            found = _trouble(url, Pair(client.certificate_pem, client.key_pem))
            if found is None:
                break
    return found


# --- etcd ------------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A client's certificate and key, PEM; in memory only."""

    certificate: bytes
    key: bytes


def _etcd_pair(pki_dir: Path) -> Pair | None:
    """The first client certificate that is there: one for health checks, else the API server's."""
    for name in ("etcd-healthcheck-client", "apiserver-etcd-client"):
        base = SPECS[name].base
        try:
            certificate, key = read(pki_dir / f"{base}.crt"), read(pki_dir / f"{base}.key")
        except UnreadableError:
            continue
        if certificate is not None and key is not None:
            return Pair(certificate, key)
    return None


def _etcd_trouble(url: str, pair: Pair | None) -> str | None:
    """
    etcd's own /health: no alarm, a leader, and a read that needs a quorum.

    https://etcd.io/docs/v3.6/op-guide/monitoring/
    """
    return _trouble(f"{url}/health", pair, _etcd_reason)


def _etcd_reason(answer: Answer) -> str | None:
    try:
        said: Any = json.loads(answer.body)
        is_healthy = answer.status == HTTPStatus.OK and said["health"] == "true"
        return None if is_healthy else str(said.get("reason") or "not healthy")
    except (ValueError, KeyError, TypeError, AttributeError):
        return _reason(answer) or "something else than its health"


# --- asking ----------------------------------------------------------------------------------------------------------


def _trouble(url: str, pair: Pair | None, reason: Callable[[Answer], str | None] | None = None) -> str | None:
    try:
        answer = request(
            url,
            trust_pem=None,
            certificate_pem=pair.certificate if pair else None,
            key_pem=pair.key if pair else None,
            timeout_seconds=TIMEOUT_SECONDS,
        )
    except HttpsError as e:
        return f"{url}: {e}"
    found = (reason or _reason)(answer)
    return None if found is None else f"{url}: {found}"


def _reason(answer: Answer) -> str | None:
    """The failed checks of the API machinery's health handlers begin with [-]."""
    if answer.status == HTTPStatus.OK:
        return None
    lines = answer.body.decode(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith("[-]")] or lines[:1]
    return f"HTTP status {answer.status}: {'; '.join(failed)}"[:_LONGEST_REASON]
