"""The objects in the cluster that change with the files of the control plane; `holders` looks at all that hold a CA."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import ClassVar

from bridge.cluster import kubeadm
from bridge.cluster.access import text_of
from bridge.cluster.api import MERGE_PATCH, Api
from bridge.control_plane import neighbours
from bridge.errors import BridgeError, Exit
from bridge.node import kubeconfig
from bridge.node.inventory import Node
from bridge.node.kubeconfig import KubeconfigError
from bridge.pki.certificates import fingerprint, load_pem_certificates, pem
from bridge.renewal.prepare import NO_KEY, live_key
from bridge.rotation import Bundle, Change, Phase, word
from bridge.rotation.word import KEYS, Word
from bridge.specs import CA, FRONT_PROXY_CA, KUBELET_CONF, SPECS
from bridge.state.session import Run
from bridge.words import one_line

#: Each API server joins its own client CAs to what is there, and takes none out; deleted, it is made anew from the files
#: within a second (measured on 1.37).
AUTHENTICATION = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication"
NODES = "/api/v1/nodes"


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
        if node.is_worker:
            api = Api.of_gateway(run.settings.node.kubeconfig_dir / SPECS[KUBELET_CONF].base)
        else:
            api = neighbours.connect(node, run.settings)
        if says and (words := _words(run, changes)):
            found += _publish(api, run, words)
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


def _words(run: Run, changes: Mapping[str, tuple[Change, Phase]]) -> dict[str, Word]:
    """What was seen on this node, by authority."""
    return {
        name: Word(
            at=run.now().replace(microsecond=0),
            phase=phase.value,
            signer=fingerprint(change.signer(phase)),
            trusted=tuple(map(fingerprint, change.bundle(phase))),
        )
        for name, (change, phase) in changes.items()
        if name in KEYS
    }


def _publish(api: Api, run: Run, words: Mapping[str, Word]) -> list[BridgeError]:
    """Have the Node object say what was seen on this node, by its kubelet's key; errors: other nodes learn nothing."""
    name = run.settings.node.node_name
    path = f"{NODES}/{name}"
    reply = api.ask("GET", path)
    if reply.status == HTTPStatus.OK:
        uid = text_of(reply.document, "metadata", "uid")
        try:
            said = _signed(run, words, {"name": name, "uid": uid})
        except ObjectError as e:
            return [e]
        reply = api.ask("PATCH", path, {"metadata": {"annotations": said}}, MERGE_PATCH)
    if reply.status == HTTPStatus.OK:
        return []
    text = f"wanted {', '.join(map(KEYS.__getitem__, words))} on {path}, found HTTP {reply.status} {reply.message}"
    return [ObjectError(text.rstrip())]


def _signed(run: Run, words: Mapping[str, Word], ours: Mapping[str, str]) -> dict[str, str]:
    """The annotations of the object with these metadata, judged as others will (ObjectError: they would not count)."""
    node = run.read_node()  # with the certificates of this phase
    item = next((one for one in node.items if one.spec.name == KUBELET_CONF and one.certificates), None)
    trouble = "none in its kubelet.conf, or behind it"
    if item is not None:
        try:
            key, unsigned = live_key(item), {"metadata": ours}
            said = {KEYS[name]: word.signed(one, name, unsigned, item.certificates, key) for name, one in words.items()}
        except NO_KEY as e:
            trouble = f"no key of it that can sign ({one_line(e)})"
        else:
            then = {"metadata": {**ours, "annotations": said}}
            read = [word.of(then, name, node.bundles[CA.name], run.now()) for name in words]
            trouble = next((one.trouble for one in read if one.trouble), "")
            if not trouble:
                return said
    raise ObjectError(
        f"wanted this node's kubelet's client certificate, whose key signs the word for other nodes, found: {trouble}",
        hint="other nodes go on with --without and this node's name; the same command tries again",
    )


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
