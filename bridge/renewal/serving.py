"""
For whom a kubelet's serving certificate is: names and addresses from the settings, or from the node's own configuration.

What the node says of itself to the API (`Node.status`) is never asked: whoever holds a kubelet's credentials writes it.
"""

from __future__ import annotations

from cryptography import x509

from bridge.node import manifests
from bridge.node.inventory import Item
from bridge.node.kubelet import KubeletFiles
from bridge.pki.csr import Naming, alternative_names, subject_of
from bridge.renewal.select import NotReadyError
from bridge.settings.tables import NodeSettings, Settings, is_host
from bridge.specs import KUBELET_SERVER, Component

_ADDRESSES = "--node-ip of the kubelet (kubeadm: nodeRegistration.kubeletExtraArgs)"


def replaced(item: Item, live: x509.Certificate | None) -> x509.Certificate | None:
    """The certificate in whose name the next one is asked for; None: the live one says nothing about it."""
    return None if item.foreign and item.spec.name == KUBELET_SERVER else live


def asked(item: Item, settings: Settings) -> Naming | None:
    """
    Names that are not the live certificate's; None: all are.

    Raises:
        NotReadyError: One is to be made, and nobody says which addresses this node has.
    """
    if item.spec.name != KUBELET_SERVER or not (item.foreign or settings.serving_sans):
        return None
    node = settings.node
    names = settings.serving_sans or own_names(node)
    subject = (
        subject_of(f"system:node:{node.node_name}", ["system:nodes"])
        if item.foreign or not item.certificates
        else item.certificates[0].subject
    )
    return Naming(subject=subject, sans=alternative_names(names))


def own_names(node: NodeSettings) -> tuple[str, ...]:
    """
    The node's names and addresses by the kubelet's configuration, or an API server's beside it.

    Raises:
        NotReadyError: No address; with a name alone the API server could not verify the kubelet, nor metrics-server.
    """
    kubelet = KubeletFiles.load(node.kubelet_dir)
    addresses = [address for address in kubelet.addresses if is_host(address)] or _advertised(node)
    if not addresses:
        names = f'["{node.node_name}", "192.0.2.10"]'
        raise NotReadyError(
            f"{KUBELET_SERVER}: wanted an address of this node, found none in its own configuration ({_ADDRESSES})",
            hint=f"name all that it is reached by: [certificate.{KUBELET_SERVER}] sans = {names}",
        )
    return tuple(dict.fromkeys([node.node_name, *([kubelet.hostname] if kubelet.hostname else []), *addresses]))


def _advertised(node: NodeSettings) -> list[str]:
    """The API server's address on a control plane, which is the node's by kubeadm; else none."""
    try:
        manifest = manifests.load(Component.APISERVER, node.kubeconfig_dir)
    except ValueError:
        return []
    address = manifest.flags.get("--advertise-address", "") if manifest is not None else ""
    return [address] if address and is_host(address) else []
