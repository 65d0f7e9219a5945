"""The objects in the cluster that change with the files of the control plane; `holders` looks at all that hold a CA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import ClassVar, NamedTuple

from bridge.cluster import kubeadm
from bridge.cluster.api import MERGE_PATCH, Api
from bridge.control_plane import neighbours
from bridge.errors import BridgeError, Exit
from bridge.node import kubeconfig
from bridge.node.inventory import Node
from bridge.node.kubeconfig import KubeconfigError
from bridge.pki.certificates import fingerprint, load_pem_certificates, pem
from bridge.pki.expiry import rfc3339
from bridge.rotation.phases import Bundle, Change, Phase
from bridge.specs import CA, FRONT_PROXY_CA, KUBELET_CONF, SPECS
from bridge.state.session import Run

#: Each API server joins its own client CAs to what is there, and takes none out; deleted, it is made anew from the files
#: within a second (measured on 1.37).
AUTHENTICATION = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication"
NODES = "/api/v1/nodes"


class Keys(NamedTuple):
    """Annotations of a Node: what the node's own run has seen of one CA there."""

    signed_by: str  #: The SHA-256 of the CA that signed its certificates.
    seen: str  #: When that was seen, and in which phase, such as `2026-11-28T12:00:00Z issued`.
    trusts: str  #: The SHA-256 of each CA that its components have read, with commas between.


#: By authority: no server shows a kubelet's client certificate, the front proxy's, or what a controller manager trusts.
KEYS = {
    CA.name: Keys("ca-bridge.io/signed-by", "ca-bridge.io/signed-by-seen", "ca-bridge.io/trusts"),
    FRONT_PROXY_CA.name: Keys(
        "ca-bridge.io/front-proxy-signed-by",
        "ca-bridge.io/front-proxy-signed-by-seen",
        "ca-bridge.io/front-proxy-trusts",
    ),
}


class ObjectError(BridgeError):
    """An object in the cluster still holds other CAs; the node's files are in the phase."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE
    hint = "the same command tries again, here or on another control-plane node"


def update(run: Run, node: Node, changes: Mapping[str, tuple[Change, Phase]], *, says: bool) -> list[BridgeError]:
    """
    Bring the objects that are ours to change to these phases, by authority; errors, after which a repeated call goes on.

    The Node object `says` so as well, unless a component has not read the CAs yet.
    """
    if node.is_etcd_host or not (node.is_worker or node.manifests):
        return []
    found: list[BridgeError] = []
    try:
        api = _connected(run, node)
        said = dict(_said(changes, rfc3339(run.now())))
        if says and said:
            _publish(api, run.settings.node.node_name, said)
        if node.is_worker:
            return found
        if CA.name in changes:
            change, phase = changes[CA.name]
            _cluster_info(api, change.bundle(phase))
        if any(phase is Phase.NEW and name in (CA.name, FRONT_PROXY_CA.name) for name, (_, phase) in changes.items()):
            reply = api.ask("DELETE", AUTHENTICATION)
            if reply.status not in (HTTPStatus.OK, HTTPStatus.NOT_FOUND):
                text = f"wanted to have extension-apiserver-authentication made anew, found HTTP {reply.status}"
                found.append(ObjectError(f"{text} {reply.message}".rstrip()))
    except BridgeError as e:
        found.append(ObjectError(str(e)))
    return found


def _connected(run: Run, node: Node) -> Api:
    if node.is_worker:
        return Api.of_gateway(run.settings.node.kubeconfig_dir / SPECS[KUBELET_CONF].base)
    return neighbours.connect(node, run.settings)


def _said(changes: Mapping[str, tuple[Change, Phase]], now: str) -> Iterator[tuple[str, str]]:
    for name, (change, phase) in changes.items():
        if (keys := KEYS.get(name)) is not None:
            yield keys.signed_by, fingerprint(change.signer(phase))
            yield keys.seen, f"{now} {phase.value}"
            yield keys.trusts, ",".join(map(fingerprint, change.bundle(phase)))


def _publish(api: Api, name: str, said: Mapping[str, str]) -> None:
    """Have the Node object say what was seen on this node."""
    path, body = f"{NODES}/{name}", {"metadata": {"annotations": said}}
    reply = api.ask("PATCH", path, body, MERGE_PATCH)
    if reply.status != HTTPStatus.OK:
        text = f"wanted the annotations {', '.join(said)} on the Node {name}, found HTTP {reply.status} {reply.message}"
        raise ObjectError(text.rstrip())


def _cluster_info(api: Api, bundle: Bundle) -> None:
    """A joining node trusts what cluster-info has; a cluster without it joins nodes by files."""
    place = kubeadm.CLUSTER_INFO
    if kubeadm.read(api, place).text is None:
        return

    def edit(text: str) -> str:
        try:
            had = load_pem_certificates(kubeconfig.ca_data(text.encode()) or b"")
            return text if set(had) == set(bundle) else kubeconfig.with_ca(text.encode(), pem(*bundle)).decode()
        except (KubeconfigError, ValueError) as e:
            raise ObjectError(f"{place}: wanted its CA data to change, found {e}") from None

    kubeadm.change(api, place, edit)
