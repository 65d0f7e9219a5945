"""The files from which this node's components read CAs: by a manifest's flag, a kubelet's configuration, a kubeconfig."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from bridge.node import endpoints, kubeconfig
from bridge.node.inventory import Node
from bridge.node.kubeconfig import KubeconfigError
from bridge.node.kubelet import KubeletFiles
from bridge.settings.tables import NodeSettings
from bridge.specs import CA, ETCD_CA, FRONT_PROXY_CA, Component
from bridge.system.paths import UnreadableError, read

#: By component and flag, the CA whose certificate the flag's file must hold.
_FLAGS: Mapping[Component, Mapping[str, str]] = {
    Component.APISERVER: {
        "--client-ca-file": CA.name,
        "--etcd-cafile": ETCD_CA.name,
        "--requestheader-client-ca-file": FRONT_PROXY_CA.name,
    },
    Component.ETCD: {"--trusted-ca-file": ETCD_CA.name, "--peer-trusted-ca-file": ETCD_CA.name},
    Component.CONTROLLER_MANAGER: {"--client-ca-file": CA.name, "--root-ca-file": CA.name},
}


class CaFile(NamedTuple):
    """A file from which a component reads a CA."""

    reader: str  #: The component, or the kubeconfig.
    setting: str  #: The flag or key that names the file.
    authority: str
    path: Path

    def __str__(self) -> str:
        return f"{self.path}, which {self.setting} of {self.reader} names"


def of_components(node: Node, settings: NodeSettings) -> Iterator[CaFile]:
    """Yield the CA files of this node's static pods and of its kubelet."""
    for component, flags in _FLAGS.items():
        for flag, authority in flags.items():
            if (path := endpoints.file(node.flags(component), flag)) is not None:
                yield CaFile(component.value, flag, authority, path)
    if (path := KubeletFiles.load(settings.kubelet_dir).client_ca) is not None:
        yield CaFile(Component.KUBELET.value, "authentication.x509.clientCAFile", CA.name, path)


def of_kubeconfigs(node: Node, settings: NodeSettings) -> Iterator[CaFile]:
    """Yield the CA files that kubeconfigs name instead of CA data; other checks report a kubeconfig that can't be read."""
    for item in (item for item in node.items if item.spec.kubeconfig):
        place = settings.kubeconfig_dir / item.spec.base
        with contextlib.suppress(KubeconfigError, UnreadableError):
            parsed = kubeconfig.parse(read(place) or b"")
            if parsed.ca_file and not parsed.ca_data:
                yield CaFile(item.spec.base, "certificate-authority", CA.name, place.parent / parsed.ca_file)
