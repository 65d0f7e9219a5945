"""A CA that is being replaced: certificates of the new one are of no use to clients that know only the old one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from bridge.node import kubeconfig
from bridge.node.inventory import Item, Node
from bridge.node.kubeconfig import KubeconfigError
from bridge.pki.certificates import UNREADABLE, load_pem_certificates
from bridge.renewal.select import NotReadyError
from bridge.specs import SPECS
from bridge.system.paths import UnreadableError, read


class HalfRotatedError(NotReadyError):
    """The CA in ca.crt is another one than in the kubeconfigs of this node."""


def half_rotated(node: Node, kubeconfig_dir: Path) -> HalfRotatedError | None:
    """
    Find the kubeconfigs that would refuse a new serving certificate of the API server, and take the one that it has.

    Args:
        node: As it is; what can't be read is said elsewhere.
        kubeconfig_dir: Where its kubeconfigs are.
    """
    serving = _certificates(node, "apiserver")
    anchors = next((one.certificates for one in node.authorities if one.authority.name == "ca"), ())
    if not serving or not anchors or (len(anchors) == 1 and _issued(serving, anchors[0])):
        return None
    new = anchors[0]  # kubeadm takes the first for the root, and so does whatever is proven here
    places = [
        kubeconfig_dir / item.spec.base for item in node.items if item.spec.kubeconfig and item.state == "present"
    ]
    behind = [
        path
        for path in places
        if (trusted := _trusted(path))
        and not any(_is_same(one, new) for one in trusted)
        and _leads_to(serving, trusted)
    ]
    if not behind:
        return None
    ca = next(one.path for one in node.authorities if one.authority.name == "ca")
    return HalfRotatedError(
        f"wanted the first CA of {ca} in each kubeconfig, since it signs the new certificates; "
        f"found only the old one in {', '.join(map(str, behind))}",
        hint="have both CAs in certificate-authority-data of every kubeconfig, of all nodes and people, before the new "
        "one is the first in ca.crt (Kubernetes' “Manual Rotation of CA Certificates”); nothing was asked or replaced",
    )


def _certificates(node: Node, name: str) -> tuple[x509.Certificate, ...]:
    found: Item | None = next((item for item in node.items if item.spec == SPECS[name]), None)
    return found.certificates if found is not None else ()


def _trusted(path: Path) -> list[x509.Certificate]:
    """The CAs that a kubeconfig trusts; empty: it names none, or they can't be read."""
    try:
        data = kubeconfig.parse(read(path) or b"").ca_data
        return load_pem_certificates(data) if data else []
    except (KubeconfigError, UnreadableError, ValueError):
        return []


def _is_same(one: x509.Certificate, other: x509.Certificate) -> bool:
    """A CA's certificate may be renewed for the same key, which changes nothing for what it signs."""
    try:
        return one.subject == other.subject and one.public_key() == other.public_key()
    except UNREADABLE:
        return False


def _leads_to(serving: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate]) -> bool:
    return any(_issued(serving, one) for one in trusted)


def _issued(serving: Sequence[x509.Certificate], ca: x509.Certificate) -> bool:
    """Whether the last of the chain is the CA's."""
    try:
        serving[-1].verify_directly_issued_by(ca)
    except (*UNREADABLE, InvalidSignature):
        return False
    return True
