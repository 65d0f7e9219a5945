"""Reads a whole node: kubeadm's certificates and files, and the further pairs that the settings name."""

from __future__ import annotations

from bridge.node import inventory, pairs
from bridge.node.inventory import Node
from bridge.settings.tables import NodeSettings


def read_node(settings: NodeSettings) -> Node:
    """Read the node in the settings' directories; a problem with its files is no error."""
    node = inventory.read(settings.pki_dir, settings.kubeconfig_dir, settings.kubelet_dir)
    return pairs.added(node, settings) if settings.pairs else node
