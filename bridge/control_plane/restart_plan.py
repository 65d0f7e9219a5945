"""Which components still run on old certificates after an installation, and how to restart them (pure)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bridge.node.manifests import COMPONENTS
from bridge.settings.tables import Components
from bridge.specs import CertificateSpec, Component

#: From here on it was measured what reloads by itself (kubeadm nodes with running components); an older component is
#: taken to need a restart, as kubeadm's documentation says for every version.
FIRST_MEASURED = (1, 37)

#: Where a kubelet with `rotateCertificates` keeps the pair that it found in kubelet.conf at its first start
#: (client-go's certificate store; measured on 1.37 with an external CA).
KUBELET_COPY = Path("/var/lib/kubelet/pki/kubelet-client-current.pem")

#: etcd first, and the API server before what needs it.
ORDER = (*COMPONENTS, Component.KUBELET)


def stale(
    renewed: Iterable[CertificateSpec], version: tuple[int, int] | None, components: Components
) -> list[Component]:
    """
    The components to restart, in order.

    Args:
        renewed: What was installed.
        version: Kubernetes' on this node; None: unknown.
        components: "needed": those that go on using an old certificate; "all": every user of a new one; of them only
            those that are listed, if any are.
    """
    reloads = components.which == "needed" and version is not None and version >= FIRST_MEASURED
    users = {spec.component for spec in renewed if spec.component is not None and not (reloads and spec.reloaded)}
    return [component for component in ORDER if component in users and component in (components.listed or ORDER)]


def how(component: Component, manifests: Path) -> str:
    """
    One sentence for the operator.

    Moving the manifest is the way that the kubelet does not count as a crash; too early back costs it 10 to 25 s.
    """
    if component is Component.KUBELET:
        return (
            f"kubelet: remove {KUBELET_COPY} (if it is there; the kubelet's copy of its old certificate, which it takes "
            "before kubelet.conf), then systemctl restart kubelet"
        )
    manifest = manifests / f"{component.value}.yaml"
    advice = (
        f"{component.value}: move {manifest} out of its directory, wait until the pod is gone and 3 s more "
        f"(crictl pods --state ready --name {component.value}), move it back"
    )
    if component is Component.ETCD:
        # the kubelet waits for the API server to delete the pod's mirror, and that waits for etcd (measured on 1.37)
        advice += "; where the kubelet asks this node's API server, move it back after 2 s: later the kubelet may hang"
    return advice
