"""
Switch the serving certificates of kube-controller-manager and kube-scheduler on and off; each step can be repeated.

On: a renewal by name makes the pair, the restart after it puts the flags into the manifest, and kubeadm-config, from which
kubeadm writes all manifests, gets them once every control-plane node has its pair. Off is the reverse.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from bridge.cluster import items, kubeadm, text_of
from bridge.cluster.api import Api, NoAnswerError
from bridge.control_plane.neighbours import CONTROL_PLANE_NODES
from bridge.control_plane.restarts import Restarted, RestartReport, Restarts
from bridge.errors import BridgeError, Exit, converted
from bridge.node import pairs
from bridge.node.inventory import Item, Node
from bridge.node.manifests import TLS_CERTIFICATE
from bridge.node.reading import read_node
from bridge.settings.tables import Settings
from bridge.specs import SERVERS, Component
from bridge.state import Store, audit, session
from bridge.state.install import CERTIFICATE_MASK, KEY_MASK, Replacement, fingerprint, install

_Cluster = Mapping[str, Any]  #: kubeadm's ClusterConfiguration.
_Edit = Callable[[_Cluster, Component, Path], _Cluster]

_PODS = "/api/v1/namespaces/kube-system/pods?labelSelector=component%3D"


class NoServingError(BridgeError):
    """The node has neither component, or a component's certificate is not ours to change."""

    exit_code = Exit.USAGE


def components(node: Node, settings: Settings) -> list[Component]:
    """List the components whose manifests we may change (NoServingError: none, or one has an operator's pair)."""
    if settings.restart.method == "none":
        text = 'wanted a way to restart components, found restart.method = "none"'
        raise NoServingError(text, hint='"static-pods" restarts them, and puts the flags into their manifests')
    found = [component for component in SERVERS if component in node.manifests]
    if not found:
        names = " or ".join(component.value for component in SERVERS)
        raise NoServingError(f"there is no manifest of {names}", hint="run it on a control-plane node")
    for component in found:
        item = pairs.served_item(node, component)
        own = settings.node.pki_dir / f"{SERVERS[component].base}.crt"
        if item is None or item.foreign or (item.named and item.certificate_path != own):
            path = node.manifests[component].flags.get(TLS_CERTIFICATE)
            raise NoServingError(
                f"{component.value}: wanted a manifest without {TLS_CERTIFICATE}, or with our pair, found {path}",
                hint="an operator put it there, and it stays: take the flags out first, here and in kubeadm-config",
            )
        hint = "put the flags in, or take them out, by hand"
        with converted(ValueError, NoServingError, f"{component.value}: ", hint=hint):
            pairs.manifest_with(item, component, settings.node.kubeconfig_dir)
    return found


# --- kubeadm-config ---------------------------------------------------------------------------------------------------


def keep(settings: Settings, wanted: Sequence[Component], wait: timedelta) -> str:
    """Put pairs into kubeadm-config once all control planes have them; return a note (NoAnswerError, NoConfigError)."""
    api = Api.of_node(read_node(settings.node), settings.node.kubeconfig_dir)
    lacking = sorted({name for component in wanted for name in _lacking(api, component)} - {settings.node.node_name})
    if lacking:
        return (
            f"kubeadm-config gets them once `ca-bridge serving-certs on` has run on {', '.join(lacking)}; until then "
            "`kubeadm upgrade` takes the flags out again"
        )
    already = "" if _changed(settings, api, wanted, wait, pairs.cluster_with) else " already"
    return f"kubeadm-config names them{already}: `kubeadm upgrade` keeps the flags"


def _changed(settings: Settings, api: Api, wanted: Sequence[Component], wait: timedelta, edit: _Edit) -> bool:
    """Change the ClusterConfiguration, and record it in the audit log; return whether anything changed."""

    def edited(cluster: _Cluster) -> _Cluster:
        for component in wanted:
            cluster = edit(cluster, component, settings.node.pki_dir)
        return cluster

    with session.alone(settings, wait) as (_, record):
        if done := kubeadm.change_cluster(api, edited):
            record.add(audit.CONFIGURED, kubeadm.CLUSTER.name, result="the flags of serving certificates")
        return done


def _lacking(api: Api, component: Component) -> set[str]:
    """Return the control-plane nodes where the component's mirror pod has no flag for a pair (NoAnswerError)."""
    nodes = {text_of(item, "metadata", "name") for item in items(api.get(CONTROL_PLANE_NODES), "items")}
    if not nodes:
        raise NoAnswerError(f"there are no {CONTROL_PLANE_NODES} to be seen")
    having = {
        text_of(pod, "spec", "nodeName")
        for pod in items(api.get(f"{_PODS}{component.value}"), "items")
        if f"{TLS_CERTIFICATE}=" in str(pod.get("spec"))
    }
    return nodes - having


def forget(settings: Settings, wanted: Sequence[Component], wait: timedelta) -> bool:
    """Take the pairs out of kubeadm-config; return whether it named any (errors as `keep`)."""
    api = Api.of_node(read_node(settings.node), settings.node.kubeconfig_dir)
    return _changed(settings, api, wanted, wait, pairs.cluster_without)


def is_half_done(settings: Settings, component: Component) -> bool:
    """Whether the pair is on disk but not in the manifest, because a run ended before the restart."""
    return pairs.manifest_with_pair(read_node(settings.node), component, settings.node.kubeconfig_dir) is not None


def put_in(settings: Settings, component: Component, wait: timedelta) -> RestartReport:
    """Restart a component with its pair in the manifest; if it does not come back, restart it without the pair."""
    with session.alone(settings, wait) as (store, record):
        restarts = Restarts(node=read_node(settings.node), settings=settings, store=store, record=record)
        done, back = restarts.with_text(component, None)
        return RestartReport(components=(component,), done=(*done, *back))


def assert_named(settings: Settings, wanted: Sequence[Component]) -> None:
    """Make sure that each manifest names its pair (NoServingError), before kubeadm writes it into others."""
    node = read_node(settings.node)
    for component in wanted:
        item = pairs.served_item(node, component)
        if item is None or not item.named or item.state != "present":
            text = f"{component.value}: no manifest names its pair"
            raise NoServingError(text, hint="`ca-bridge prove` shows what it serves; then run it again")


def take_out(settings: Settings, wait: timedelta) -> RestartReport:
    """Have components serve self-signed certificates again, up to the first failed restart, and back up their pairs."""
    with session.alone(settings, wait) as (store, record):
        done: list[Restarted] = []
        for component in components(read_node(settings.node), settings):
            node = read_node(settings.node)
            item = pairs.served_item(node, component)
            if item is None or (item.state == "missing" and not item.named):
                continue
            hint = "take the flags out by hand, then run again"
            with converted(ValueError, NoServingError, f"{component.value}: ", hint=hint):
                text = pairs.manifest_without(component, item.certificate_path, settings.node.kubeconfig_dir)
            if text is not None:
                restarts = Restarts(
                    node=node, settings=settings, store=store, record=record, going_back=True, content=text
                )
                done += restarts.all([component])
                if any(restart.component is component and restart.error is not None for restart in done):
                    break
            _remove(item, store, record)
        return RestartReport(components=tuple(SERVERS), done=tuple(done))


def _remove(item: Item, store: Store, record: audit.Record) -> None:
    """Remove a pair that no manifest names, in one step that a rollback undoes."""
    old = item.certificates[0] if item.certificates else None
    name = item.spec.name
    files = [(item.key_path, KEY_MASK), (item.certificate_path, CERTIFICATE_MASK)]
    replacements = [
        Replacement(certificate=name, path=path, data=None, mode_mask=mask, was=fingerprint(path))
        for path, mask in files
        if path is not None and path.parent.is_dir()
    ]
    backup_id = install(store, replacements, f"{record.run_id}-{name}", audit.about([(name, old, None)]))
    result = f"removed; backup {backup_id}"
    record.add(audit.ROLLED_BACK, name, authority=item.spec.authority.name, old=old, result=result)
    with contextlib.suppress(OSError):  # the directory holds other files
        item.certificate_path.parent.rmdir()
