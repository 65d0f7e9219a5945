"""
Checks the control plane's components, here and on other nodes, and restarts them; `bridge.renewal` decides when.

This file says which components still run on old certificates after an installation, and how to restart them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bridge.node import endpoints, processes
from bridge.node.inventory import Node
from bridge.node.manifests import COMPONENTS, TLS_CERTIFICATE, Manifest, path_of
from bridge.settings.tables import Components, NodeSettings
from bridge.specs import SERVERS, CertificateSpec, Component

#: From these versions on we saw a component reload its certificates by itself, past the end of the old ones (kubeadm
#: nodes of 1.34.4 with etcd 3.6 and 1.37.2 with etcd 3.7); older versions are taken to need a restart, as kubeadm's
#: documentation says for every version.
FIRST_RELOADING = {
    Component.ETCD: (3, 6),
    Component.APISERVER: (1, 34),
    # their serving certificates, but not their kubeconfigs; seen only with 1.37.2
    Component.CONTROLLER_MANAGER: (1, 37),
    Component.SCHEDULER: (1, 37),
}

#: Where a kubelet with `rotateCertificates` keeps the pair that it found in kubelet.conf at its first start
#: (client-go's certificate store; measured on 1.37 with an external CA).
KUBELET_COPY = Path("/var/lib/kubelet/pki/kubelet-client-current.pem")

#: The order of restarts: etcd first, then the API server, then its clients.
ORDER = (*COMPONENTS, Component.KUBELET)


def reloading(node: Node, settings: NodeSettings, proc: Path = processes.PROC) -> frozenset[Component]:
    """Return the components whose version reloads certificates; a process older than its manifest does not count."""
    versions = {
        component: manifest.version
        for component, manifest in node.manifests.items()
        if component in FIRST_RELOADING
        and (component not in SERVERS or TLS_CERTIFICATE in manifest.flags)
        and not _is_older_than_manifest(component, manifest, settings, proc)
    }
    if (version := settings.kubernetes_version) is not None:
        versions[Component.APISERVER] = (version.major, version.minor)
    return frozenset(
        component
        for component, version in versions.items()
        if version is not None and version >= FIRST_RELOADING[component]
    )


def _is_older_than_manifest(component: Component, manifest: Manifest, settings: NodeSettings, proc: Path) -> bool:
    named = [path for flag in _OWN_FILE if (path := endpoints.file(manifest.flags, flag)) is not None]
    started = processes.oldest_start(component, named, proc)
    try:
        written = path_of(component, settings.kubeconfig_dir).stat().st_mtime
    except OSError:
        return False
    return started is not None and started.timestamp() < written


class Reader(NamedTuple):
    """A component that reads a CA file only at its start."""

    component: Component
    path: Path
    certificate: str  #: Its checks show whether the component has read the file.


#: From this version on clients of Kubernetes reload the file with their servers' CA (kubernetes/kubernetes#132922).
READS_AGAIN = (1, 36)
#: CA files that a component reads only at its start: the flag, a certificate whose checks show it, and the version that
#: reloads the file (etcd-io/etcd#11555 is open).
_READ_ONCE = (
    (Component.ETCD, "--trusted-ca-file", "etcd-server", None),
    (Component.ETCD, "--peer-trusted-ca-file", "etcd-peer", None),
    (Component.APISERVER, "--etcd-cafile", "apiserver-etcd-client", None),
    (Component.APISERVER, "--kubelet-certificate-authority", "apiserver-kubelet-client", READS_AGAIN),
)


def readers(node: Node) -> Iterator[Reader]:
    """Yield this node's components that read CA files only at their start, by version; an unknown version counts."""
    version = node.kubernetes_version
    for component, flag, name, reloads_from in _READ_ONCE:
        path = endpoints.file(node.flags(component), flag)
        is_read_again = reloads_from is not None and version is not None and version >= reloads_from
        if path is not None and not is_read_again:
            yield Reader(component, path, name)


#: Flags of files that distinguish this node's own etcd and API server from others.
_OWN_FILE = ("--cert-file", "--tls-cert-file")


def stale(
    renewed: Iterable[CertificateSpec], reloads: Collection[Component], components: Components
) -> list[Component]:
    """Return the components to restart, in order: users that do not reload ("needed"), all users, or listed users."""
    # a kubelet uses a new serving certificate after 0.3 s (measured); proof shows where it does not
    trusted = {*reloads, Component.KUBELET} if components.which == "needed" else set()
    users = {spec.component for spec in renewed if not (spec.reloaded and spec.component in trusted)}
    return [component for component in ORDER if component in users and component in (components.listed or ORDER)]


def how_to_restart(component: Component, settings: NodeSettings) -> str:
    """Tell the operator how to restart a component; moving a manifest back too early costs 10 to 25 s."""
    if component is Component.KUBELET:
        return "kubelet: systemctl restart kubelet (running containers stay)"
    manifest = path_of(component, settings.kubeconfig_dir)
    advice = (
        f"{component.value}: move {manifest} out of its directory, wait until the pod is gone and 3 s more "
        f"(crictl pods --state ready --name {component.value}), move it back"
    )
    if component is Component.ETCD:
        # the kubelet waits for the API server to delete the mirror pod, and the API server for etcd (measured on 1.37)
        advice += "; where the kubelet asks this node's API server, move it back after 2 s: later the kubelet may hang"
    return advice
