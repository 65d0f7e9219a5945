"""
The objects in the cluster that hold a CA: those that we change with the files of the control plane, those that the
components keep by themselves, and those of others, which are listed for their owners.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, ClassVar

from cryptography import x509

from bridge.cluster import kubeadm
from bridge.cluster.access import items
from bridge.cluster.api import MERGE_PATCH, Api, NoAnswerError
from bridge.control_plane import neighbours
from bridge.errors import BridgeError, Exit
from bridge.node import kubeconfig
from bridge.node.inventory import Node
from bridge.node.kubeconfig import KubeconfigError
from bridge.pki.certificates import fingerprint, load_pem_certificates, pem
from bridge.rotation.phases import Bundle, Change, Phase
from bridge.settings.tables import Settings
from bridge.specs import CA, FRONT_PROXY_CA, KUBELET_CONF, SPECS
from bridge.state.session import Run

#: Each API server joins its own client CAs to what is there, and takes none out; deleted, it is made anew from the files
#: within a second (measured on 1.37).
_AUTHENTICATION = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication"
_ROOT_CA = "/api/v1/configmaps?fieldSelector=metadata.name%3Dkube-root-ca.crt"
NODES = "/api/v1/nodes"
#: An annotation of a Node: the SHA-256 of the CA that signed its certificates, as the node's own run has seen it.
SIGNED_BY = "ca-bridge.io/signed-by"
#: Where others keep a CA for the API server to trust: the list, and the way from an object to its CAs.
_FOREIGN = (
    ("ValidatingWebhookConfiguration", "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"),
    ("MutatingWebhookConfiguration", "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"),
    ("APIService", "/apis/apiregistration.k8s.io/v1/apiservices"),
    ("CustomResourceDefinition", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"),
)


class ObjectError(BridgeError):
    """An object in the cluster still holds other CAs; the node's files are in the phase."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE
    hint = "the same command tries again, here or on another control-plane node"


def update(run: Run, node: Node, changes: Mapping[str, tuple[Change, Phase]]) -> list[BridgeError]:
    """Bring the objects that are ours to change to these phases, by authority; errors, after which a repeated call goes on."""
    if node.is_etcd_host or not (node.is_worker or node.manifests):
        return []
    found: list[BridgeError] = []
    try:
        api = _connected(run, node)
        if CA.name in changes:
            change, phase = changes[CA.name]
            _publish(api, run.settings.node.node_name, change.signer(phase))
        if node.is_worker:
            return found
        if CA.name in changes:
            _cluster_info(api, change.bundle(phase))
        if any(phase is Phase.NEW and name in (CA.name, FRONT_PROXY_CA.name) for name, (_, phase) in changes.items()):
            reply = api.ask("DELETE", _AUTHENTICATION)
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


def _publish(api: Api, name: str, signer: x509.Certificate) -> None:
    """Have the Node object say which CA signed this node's certificates, since no server shows a kubelet's client one."""
    path, body = f"{NODES}/{name}", {"metadata": {"annotations": {SIGNED_BY: fingerprint(signer)}}}
    reply = api.ask("PATCH", path, body, MERGE_PATCH)
    if reply.status != HTTPStatus.OK:
        text = f"wanted the annotation {SIGNED_BY} on the Node {name}, found HTTP {reply.status} {reply.message}"
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


# --- looking ----------------------------------------------------------------------------------------------------------


def lagging(settings: Settings, node: Node, change: Change, phase: Phase) -> list[str]:
    """
    Sentences about objects that do not hold the CAs of a phase yet, and about others' objects with the old CA.

    The controller manager writes kube-root-ca.crt when it becomes the leader (measured on 1.37).
    """
    try:
        api = neighbours.connect(node, settings)
        found = list(_root_cas(api, change.bundle(phase)))
        if phase is not Phase.OLD:
            found += _foreign(api, change)
    except NoAnswerError as e:
        return [f"the cluster's objects could not be looked at: {e}"]
    return found


def _root_cas(api: Api, bundle: Bundle) -> Iterator[str]:
    reply = api.ask("GET", _ROOT_CA)
    if reply.status != HTTPStatus.OK:
        yield f"kube-root-ca.crt: wanted a look into all namespaces, found HTTP {reply.status} {reply.message}"
        return
    behind = [
        str(one.get("metadata", {}).get("namespace"))
        for one in items(reply.document, "items")
        if set(_certificates(one.get("data", {}).get("ca.crt"))) != set(bundle)
    ]
    if behind:
        names = ", ".join(behind[:3]) + (f" and {more} more" if (more := len(behind) - 3) > 0 else "")
        yield (
            f"kube-root-ca.crt of {names}: wanted the CAs of this phase, found others: the controller manager that leads "
            "has not read ca.crt yet"
        )


def _foreign(api: Api, change: Change) -> Iterator[str]:
    """Objects of others that have the old CA and not the new one: only their owners know which to put there."""
    for kind, path in _FOREIGN:
        reply = api.ask("GET", path)
        for one in items(reply.document, "items"):
            name = one.get("metadata", {}).get("name")
            for where, data in _bundles(one):
                held = _certificates(_decoded(data))
                if change.old in held and change.new not in held:
                    yield f"{kind} {name}: {where} has the old CA alone: its owner adds the new one"


def _bundles(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Each `caBundle` of an object, with its path."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key == "caBundle":
                yield f"{where}.caBundle".lstrip("."), one
            elif key != "metadata":
                yield from _bundles(one, f"{where}.{key}")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from _bundles(one, f"{where}[{number}]")


def _decoded(data: Any) -> str | None:
    try:
        return (
            base64.b64decode(data, validate=True).decode("ascii", errors="replace") if isinstance(data, str) else None
        )
    except ValueError:
        return None


def _certificates(text: Any) -> Sequence[x509.Certificate]:
    try:
        return load_pem_certificates(text.encode()) if isinstance(text, str) else ()
    except ValueError:
        return ()
