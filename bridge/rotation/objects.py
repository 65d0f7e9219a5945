"""
The objects in the cluster that change with the files of the control plane; `holders` looks at all that hold a CA.

A `NodeStatement` is what a node's own run has seen of one CA there; its Node object carries the statement to the other nodes.
Every user who may write Node objects can write a statement.
A statement counts only if the key of the client certificate that the cluster's CA issued to this node's kubelet signed it:
on the node, only root reads that key. The signature covers the Node object's UID, which no two clusters share.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, ClassVar, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.cluster import kubeadm, text_of
from bridge.cluster.api import MERGE_PATCH, Api
from bridge.control_plane import neighbours
from bridge.errors import BridgeError, Exit, converted
from bridge.node import kubeconfig
from bridge.node.inventory import Node
from bridge.node.kubeconfig import KubeconfigError
from bridge.pki import signatures
from bridge.pki.bundle_format import TIME
from bridge.pki.certificates import (
    O_OID,
    UNREADABLE,
    attributes,
    common_names,
    extended_key_usages,
    fingerprint,
    leads_to,
    load_pem_certificates,
    pem,
)
from bridge.pki.expiry import rfc3339
from bridge.renewal.prepare import NO_KEY, live_key
from bridge.rotation import Bundle, Change, Phase
from bridge.specs import CA, EKU, FRONT_PROXY_CA, KUBELET_CONF, SPECS
from bridge.state.session import Run
from bridge.words import one_line

#: Annotations of a Node, by authority, for what no server shows: client certificates of kubelets and front proxies, and
#: the CAs that a controller manager trusts.
KEYS = {CA.name: "ca-bridge.io/ca-seen", FRONT_PROXY_CA.name: "ca-bridge.io/front-proxy-ca-seen"}
#: How long a statement counts, since a phase needs the present state.
LATELY = timedelta(hours=1)
_CONTEXT = b"ca-bridge node's word about a CA 1"
#: The longest statement; nine certificates take a quarter of it.
_LONGEST = 1 << 16

#: Each API server adds its own client CAs and removes none; after a deletion, they create it again from the files
#: within a second (measured on 1.37).
AUTHENTICATION = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication"
NODES = "/api/v1/nodes"


class ObjectError(BridgeError):
    """An object in the cluster still holds other CAs, while the node's files are in the phase."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE
    hint = "the same command tries again, here or on another control-plane node"


def update(run: Run, node: Node, changes: Mapping[str, tuple[Change, Phase]], *, says: bool) -> list[BridgeError]:
    """Bring our objects to these phases, with our statements if `says`; return errors, after which a repeat goes on."""
    if node.is_etcd_host or not (node.is_worker or node.manifests):
        return []
    errors: list[BridgeError] = []
    try:
        if node.is_worker:
            api = Api.of_gateway(run.settings.node.kubeconfig_dir / SPECS[KUBELET_CONF].base)
        else:
            api = neighbours.connect(node, run.settings)
        if says and (statements := _statements(run, changes)):
            errors += _publish(api, run, statements)
        if node.is_worker:
            return errors
        if CA.name in changes:
            change, phase = changes[CA.name]
            _cluster_info(api, change.bundle(phase))
        if any(phase is Phase.NEW and name in (CA.name, FRONT_PROXY_CA.name) for name, (_, phase) in changes.items()):
            reply = api.ask("DELETE", AUTHENTICATION)
            if reply.status not in (HTTPStatus.OK, HTTPStatus.NOT_FOUND):
                text = f"wanted extension-apiserver-authentication recreated, found HTTP {reply.status}"
                errors.append(ObjectError(f"{text} {reply.message}".rstrip()))
    except BridgeError as e:
        errors.append(ObjectError(str(e)))
    return errors


def _statements(run: Run, changes: Mapping[str, tuple[Change, Phase]]) -> dict[str, NodeStatement]:
    """Return this node's statements, by authority."""
    return {
        name: NodeStatement(
            at=run.now().replace(microsecond=0),
            phase=phase.value,
            signer=fingerprint(change.signer(phase)),
            trusted=tuple(map(fingerprint, change.bundle(phase))),
        )
        for name, (change, phase) in changes.items()
        if name in KEYS
    }


def _publish(api: Api, run: Run, statements: Mapping[str, NodeStatement]) -> list[BridgeError]:
    """Write signed statements into the Node object; return errors, with which other nodes learn nothing."""
    name = run.settings.node.node_name
    path = f"{NODES}/{name}"
    reply = api.ask("GET", path)
    if reply.status == HTTPStatus.OK:
        uid = text_of(reply.document, "metadata", "uid")
        try:
            signed = _signed(run, statements, {"name": name, "uid": uid})
        except ObjectError as e:
            return [e]
        reply = api.ask("PATCH", path, {"metadata": {"annotations": signed}}, MERGE_PATCH)
    if reply.status == HTTPStatus.OK:
        return []
    text = f"wanted {', '.join(map(KEYS.__getitem__, statements))} on {path}, found HTTP {reply.status} {reply.message}"
    return [ObjectError(text.rstrip())]


def _signed(run: Run, statements: Mapping[str, NodeStatement], own: Mapping[str, str]) -> dict[str, str]:
    """Return the annotations for this Node object, checked as other nodes do (ObjectError: they would not count)."""
    node = run.read_node()  # with the certificates of this phase
    item = node.item(KUBELET_CONF)
    trouble = "none in its kubelet.conf, or behind it"
    if item is not None and item.certificates:
        try:
            key, unsigned = live_key(item), {"metadata": own}
            said = {
                KEYS[name]: signed_statement(statement, name, unsigned, item.certificates, key)
                for name, statement in statements.items()
            }
        except NO_KEY as e:
            trouble = f"no key of it that can sign ({one_line(e)})"
        else:
            then = {"metadata": {**own, "annotations": said}}
            read = [statement_of(then, name, node.bundles[CA.name], run.now()) for name in statements]
            trouble = next((statement.trouble for statement in read if statement.trouble), "")
            if not trouble:
                return said
    raise ObjectError(
        f"wanted this node's kubelet's client certificate, whose key signs the statement for other nodes, found: {trouble}",
        hint="other nodes go on with --without and this node's name; the same command tries again",
    )


def _cluster_info(api: Api, bundle: Bundle) -> None:
    """Write the CAs into cluster-info, which joining nodes trust; a cluster without it joins nodes by files."""
    place = kubeadm.CLUSTER_INFO
    if kubeadm.read(api, place).text is None:
        return

    def edit(text: str) -> str:
        with converted((KubeconfigError, ValueError), ObjectError, f"{place}: wanted its CA data to change, found "):
            held = load_pem_certificates(kubeconfig.ca_data(text.encode()) or b"")
            return text if set(held) == set(bundle) else kubeconfig.with_ca(text.encode(), pem(*bundle)).decode()

    kubeadm.change(api, place, edit)


class NodeStatement(NamedTuple):
    """A node's statement: what its own run has seen of one CA."""

    at: datetime  #: When the run saw it, in whole seconds.
    phase: str  #: The phase of the node's files.
    signer: str  #: The SHA-256 of the CA that signed its certificates.
    trusted: tuple[str, ...]  #: The SHA-256 of each CA that its components have read.
    trouble: str = ""  #: Why the statement in the Node object does not count; the other fields are empty then.


#: The statement of a node that has said nothing.
NOTHING = NodeStatement(datetime.min.replace(tzinfo=UTC), "", "", ())


def signed_statement(
    statement: NodeStatement, authority: str, node: Mapping[str, Any], chain: Bundle, key: PrivateKeyTypes
) -> str:
    """Return the annotation for this Node object, signed by its kubelet's key (ValueError: the key can't sign)."""
    signature = signatures.sign(key, _message(statement, authority, node))
    certificates = ",".join(b64encode(certificate.public_bytes(Encoding.DER)).decode() for certificate in chain)
    return " ".join([*_texts(statement), b64encode(signature).decode(), certificates])


def statement_of(node: Mapping[str, Any], authority: str, anchors: Bundle, now: datetime) -> NodeStatement:
    """Return the statement in a Node object; `NOTHING` with the reason if it does not count by these CAs of the cluster."""
    text = text_of(node, "metadata", "annotations", KEYS[authority])
    if not text:
        return NOTHING
    try:
        statement, signature, chain = _parsed(text)
        trouble = _not_this_node(node, chain, anchors, now)
        if not trouble and not signatures.is_by(chain[0].public_key(), signature, _message(statement, authority, node)):
            trouble = "its kubelet's key has not signed what its Node object says"
    except UNREADABLE:
        trouble = "what its Node object says can't be read"
    return NOTHING._replace(trouble=trouble) if trouble else statement


def _parsed(text: str) -> tuple[NodeStatement, bytes, Bundle]:
    """Parse a statement, its signature, and the chain of the signing key (UNREADABLE)."""
    if len(text) > _LONGEST:
        raise ValueError
    at, phase, signer, trusted, signature, certificates = text.split(" ")
    chain = tuple(x509.load_der_x509_certificate(b64decode(der, validate=True)) for der in certificates.split(","))
    seen_at = datetime.strptime(at, TIME).replace(tzinfo=UTC)
    statement = NodeStatement(seen_at, phase, signer, tuple(trusted.split(",")))
    return statement, b64decode(signature, validate=True), chain


def _not_this_node(node: Mapping[str, Any], chain: Bundle, anchors: Bundle, now: datetime) -> str:
    """Return why a chain is not that of the node's kubelet; empty: it is (UNREADABLE)."""
    leaf, user = chain[0], f"system:node:{text_of(node, 'metadata', 'name')}"
    is_its_kubelet = common_names(leaf.subject) == [user] and (O_OID, "system:nodes") in attributes(leaf.subject)
    if not is_its_kubelet or EKU.CLIENT_AUTH.value not in (extended_key_usages(leaf) or ()):
        return "what its Node object says is signed with another certificate than its kubelet's"
    if not leads_to(chain, anchors) or leaf.not_valid_after_utc < now:
        return "what its Node object says is signed with a certificate of another CA, or one that has ended"
    return ""


def _message(statement: NodeStatement, authority: str, node: Mapping[str, Any]) -> bytes:
    uid = text_of(node, "metadata", "uid")
    if not uid:
        raise ValueError("the Node object has no UID")
    texts = (authority, text_of(node, "metadata", "name"), uid, *_texts(statement))
    return signatures.framed([_CONTEXT, *(text.encode() for text in texts)])


def _texts(statement: NodeStatement) -> tuple[str, ...]:
    return rfc3339(statement.at), statement.phase, statement.signer, ",".join(statement.trusted)
