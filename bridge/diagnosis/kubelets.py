"""What every kubelet of the cluster serves with, and which API servers verify it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from bridge.cluster import kubeadm
from bridge.cluster.api import Api, NoAnswerError
from bridge.control_plane import kubelets, neighbours
from bridge.control_plane.kubelets import AUTHORITY, ApiServer, Served
from bridge.diagnosis.findings import Finding, from_error
from bridge.errors import BridgeError
from bridge.node import kubelet, manifest_flags
from bridge.node.inventory import Node
from bridge.node.processes import file_contents
from bridge.node.yamltree import YamlError
from bridge.pki.expiry import left_text
from bridge.settings.tables import Settings
from bridge.specs import CA, Component
from bridge.system.paths import UnreadableError
from bridge.words import one_line


def look(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    """Examine all kubelets, from a control-plane node; asks the cluster's API and each kubelet, and writes nothing."""
    manifest = node.manifests.get(Component.APISERVER)
    if manifest is None:
        text = "wanted a control-plane node, from which all kubelets can be seen, found another one"
        yield Finding.error("kubelets", "this node", text, "run it on a control-plane node")
        return
    api = neighbours.connect(node, settings)
    try:
        trust = file_contents(settings.node.pki_dir / CA.certificate_file)
        servers = kubelets.api_servers(api, settings.node.node_name, manifest.flags)
        verifying = [one.node for one in servers if one.authority]
        for one in kubelets.all_served(api, trust, manifest.flags):
            yield _of_one(one, verifying, now)
        yield from _of_servers(api, servers)
        yield _of_map(api)
    except (BridgeError, NoAnswerError) as e:
        yield from_error("kubelets", "cluster", e)
    except (UnreadableError, YamlError, ValueError) as e:
        yield Finding.error("kubelets", "cluster", str(e))


def _of_one(one: Served, verifying: list[str], now: datetime) -> Finding:
    if one.end is not None:
        text = f"its kubelet serves {one.place} with a certificate of the cluster's CA, {left_text(one.end, now)}"
        return Finding.ok("kubelet-serving", one.node, text)
    text = f"wanted a kubelet whose certificate the cluster's CA has signed, found: {one.trouble}"
    if verifying:
        text += f"; the API server of {', '.join(verifying)} verifies it, so that logs and exec do not work"
        return Finding.error("kubelet-serving", one.node, text, "`ca-bridge kubelets on` on that node")
    return Finding.warning("kubelet-serving", one.node, text, "`ca-bridge kubelets on` on that node")


def _of_servers(api: Api, servers: list[ApiServer]) -> Iterator[Finding]:
    """The API servers against each other, and against what the next upgrade makes of them."""
    kept = manifest_flags.arguments(kubeadm.read_cluster(api), Component.APISERVER)
    wanted = kept.get(AUTHORITY.removeprefix("--"), "")
    for one in servers:
        about = f"kube-apiserver of {one.node}"
        if one.authority != wanted:
            found = f"{AUTHORITY}={one_line(one.authority)}" if one.authority else f"no {AUTHORITY}"
            said = f"wanted it as {kubeadm.CLUSTER.name} has it ({one_line(wanted) or 'none'}), found {found}"
            hint = (
                "the next `kubeadm upgrade` changes it; `ca-bridge kubelets on` or `off` on that node makes them alike"
            )
            yield Finding.warning("kubelet-authority", about, said, hint)
        elif one.authority:
            yield Finding.ok("kubelet-authority", about, f"verifies kubelets by {one_line(one.authority)}")
        else:
            yield Finding.note("kubelet-authority", about, f"verifies no kubelet: it has no {AUTHORITY}")


def _of_map(api: Api) -> Finding:
    text = kubeadm.read(api, kubeadm.KUBELETS).text
    name = kubeadm.KUBELETS.name
    if text is None:
        return Finding.warning("kubelet-config", name, "wanted it in the cluster, found none: kubeadm upgrade aborts")
    if kubelet.asks(text):
        return Finding.ok("kubelet-config", name, "has serverTLSBootstrap: new nodes and upgrades have it so")
    return Finding.note(
        "kubelet-config", name, "has no serverTLSBootstrap: kubelets make serving certificates themselves"
    )
