"""
The pair that kube-controller-manager or kube-scheduler serves with: in its static pod's manifest, and in the
ClusterConfiguration from which `kubeadm upgrade` and `kubeadm join` write that manifest.

A component does not start if its manifest names a missing file, so that the flags are added after the files, and removed
before them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.node import manifests
from bridge.node.inventory import Item, Node, other_key
from bridge.node.manifests import TLS_CERTIFICATE, TLS_KEY, Mount, path_of
from bridge.node.yamltree import YamlError
from bridge.specs import SERVERS, CertificateSpec, Component
from bridge.system.paths import UnreadableError, read

#: The volume by which a component sees the directory of its pair.
VOLUME = "ca-bridge-serving"


def item_of(node: Node, component: Component) -> Item | None:
    """The component's serving certificate on this node; it may be missing."""
    spec = SERVERS.get(component)
    return None if spec is None else node.item(spec.name)


def naming(node: Node, component: Component, kubeconfig_dir: Path) -> bytes | None:
    """The manifest with flags for the pair on disk; None: there is no whole pair, or the manifest names one (ValueError)."""
    item = item_of(node, component)
    if item is None or item.named or item.state != "present" or item.foreign or item.key_trouble or other_key(item):
        return None
    return planned(item, component, kubeconfig_dir)


def planned(item: Item, component: Component, kubeconfig_dir: Path) -> bytes | None:
    """The manifest with the flags for a pair, whether it is there or not; None: there is none (ValueError)."""
    flags = {TLS_CERTIFICATE: str(item.certificate_path), TLS_KEY: str(item.key_path)}
    return _edited(component, kubeconfig_dir, flags, Mount(VOLUME, str(item.certificate_path.parent)))


def leaving_out(component: Component, certificate: Path, kubeconfig_dir: Path) -> bytes | None:
    """The manifest without the flags for this pair; None: it does not name it (ValueError: it can't be edited)."""
    manifest = manifests.load(component, kubeconfig_dir)
    named = None if manifest is None else manifest.flags.get(TLS_CERTIFICATE)
    if named is None or os.path.realpath(named) != os.path.realpath(certificate):
        return None
    return _edited(component, kubeconfig_dir, dict.fromkeys((TLS_CERTIFICATE, TLS_KEY)), None)


def _edited(
    component: Component, kubeconfig_dir: Path, flags: Mapping[str, str | None], mount: Mount | None
) -> bytes | None:
    path = path_of(component, kubeconfig_dir)
    try:
        data = read(path)
        unmount = "" if mount is not None else VOLUME
        return None if data is None else manifests.edited(data, component, flags, mount, unmount)
    except (UnreadableError, YamlError) as e:
        raise ValueError(f"{path}: wanted to change its flags, found: {e}") from None


# --- kubeadm's ClusterConfiguration ----------------------------------------------------------------------------------


def paths(spec: CertificateSpec, pki_dir: Path) -> dict[str, str]:
    """Our own place of a pair, by the names of a component's arguments."""
    return {_argument(TLS_CERTIFICATE): f"{pki_dir / spec.base}.crt", _argument(TLS_KEY): f"{pki_dir / spec.base}.key"}


def _argument(flag: str) -> str:
    return flag.removeprefix("--")


def is_named_by(cluster: Mapping[str, Any], component: Component) -> bool:
    """Whether kubeadm would write a manifest that names a pair."""
    return _argument(TLS_CERTIFICATE) in manifests.arguments(cluster, component)


def is_ours_in(cluster: Mapping[str, Any], component: Component, pki_dir: Path) -> bool:
    """Whether the pair that kubeadm would name is in our own place."""
    return paths(SERVERS[component], pki_dir).items() <= manifests.arguments(cluster, component).items()


def with_pair(cluster: Mapping[str, Any], component: Component, pki_dir: Path) -> Mapping[str, Any]:
    """The ClusterConfiguration with our own pair; an operator's other one stays."""
    if is_named_by(cluster, component):
        return cluster
    spec = SERVERS[component]
    # kubeadm mounts pki_dir into kube-controller-manager
    mount = Mount(VOLUME, str((pki_dir / spec.base).parent)) if component is Component.SCHEDULER else None
    return manifests.with_arguments(cluster, component, paths(spec, pki_dir), mount)


def without_pair(cluster: Mapping[str, Any], component: Component, pki_dir: Path) -> Mapping[str, Any]:
    """The ClusterConfiguration without our own pair; an operator's other one stays."""
    if not is_ours_in(cluster, component, pki_dir):
        return cluster
    flags = dict.fromkeys(paths(SERVERS[component], pki_dir))
    return manifests.with_arguments(cluster, component, flags, unmount=VOLUME)
