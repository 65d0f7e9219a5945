"""Who uses what is installed: the static pods' files, and the commands that restart them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from bridge.control_plane import restart_plan, restarts
from bridge.diagnosis import drift
from bridge.diagnosis.findings import Finding, from_error
from bridge.node import endpoints
from bridge.node.inventory import Item, Node
from bridge.renewal import hooks
from bridge.settings.tables import Settings
from bridge.specs import Component
from bridge.state.obligations import AFTER_INSTALL, FAILURE, SUCCESS
from bridge.state.store import Store
from bridge.system.ca_files import read_ca_file
from bridge.system.paths import UnreadableError

#: The flag for the key, beside the one for the certificate.
_KEY_FLAGS = {
    "--tls-cert-file": "--tls-private-key-file",
    "--etcd-certfile": "--etcd-keyfile",
    "--kubelet-client-certificate": "--kubelet-client-key",
    "--proxy-client-cert-file": "--proxy-client-key-file",
    "--peer-cert-file": "--peer-key-file",
    "--cert-file": "--key-file",
}
#: Which CA's certificate a flag's file has to hold.
_CA_FLAGS: Mapping[Component, Mapping[str, str]] = {
    Component.APISERVER: {
        "--client-ca-file": "ca",
        "--etcd-cafile": "etcd-ca",
        "--requestheader-client-ca-file": "front-proxy-ca",
    },
    Component.ETCD: {"--trusted-ca-file": "etcd-ca", "--peer-trusted-ca-file": "etcd-ca"},
    Component.CONTROLLER_MANAGER: {"--client-ca-file": "ca", "--root-ca-file": "ca"},
}


def look(node: Node, settings: Settings) -> Iterator[Finding]:
    """Examine how the node uses its certificates: files, CAs, names, restarts and hooks."""
    if not node.manifests:
        text = f"no static pods in {settings.node.kubeconfig_dir / 'manifests'}: which files they use was not looked at"
        yield Finding(level="ok", check="manifests", about="manifests", text=text)
    for item in node.items:
        if item.state == "present" and item.managed:
            yield from _files(item, node, settings)
    yield from _authorities(node)
    yield from drift.look(node, settings)
    yield from _restarts(node, settings)
    yield from _hooks(settings)


# --- files -----------------------------------------------------------------------------------------------------------


def _files(item: Item, node: Node, settings: Settings) -> Iterator[Finding]:
    """The flags name the files that a renewal replaces."""
    component = item.spec.component
    manifest = node.manifests.get(component) if component is not None else None
    if component is None or manifest is None:
        return
    ours = settings.node.kubeconfig_dir / item.spec.base if item.spec.kubeconfig else item.certificate_path
    wanted = dict.fromkeys(item.spec.flags, ours)
    if item.key_path is not None:
        wanted |= {_KEY_FLAGS[flag]: item.key_path for flag in item.spec.flags if flag in _KEY_FLAGS}
    for flag, path in wanted.items():
        named = endpoints.file(manifest.flags, flag)
        if named is not None and os.path.realpath(named) != os.path.realpath(path):
            text = f"wanted {flag}={path} in {component.value}.yaml, found {named}: a renewal replaces the first"
            hint = "name the file that is renewed, or have the other one's own issuer renew it"
            yield Finding(
                level="error", check="manifest-names-another-file", about=item.spec.name, text=text, hint=hint
            )


def _authorities(node: Node) -> Iterator[Finding]:
    """Check that the CA files that components trust hold this node's CAs."""
    cas = {state.authority.name: state for state in node.authorities if state.state == "present"}
    for component, flags in _CA_FLAGS.items():
        manifest = node.manifests.get(component)
        for flag, name in flags.items() if manifest is not None else ():
            path = endpoints.file(manifest.flags, flag) if manifest is not None else None
            state = cas.get(name)
            if path is None or state is None:
                continue
            found = _certificates(path)
            if isinstance(found, str) or state.certificates[0] not in found:
                what = found if isinstance(found, str) else "other certificates"
                text = f"wanted the CA of {state.path} in the file of {flag} ({path}), found {what}"
                hint = "new certificates of this CA would not be accepted"
                yield Finding(level="error", check="manifest-ca", about=component.value, text=text, hint=hint)


def _certificates(path: Path) -> list[object] | str:
    try:
        return [*read_ca_file(path)]
    except UnreadableError as e:
        return str(e)


# --- restarts and hooks ----------------------------------------------------------------------------------------------


def _restarts(node: Node, settings: Settings) -> Iterator[Finding]:
    """Check that each component can be restarted that a renewal of all would restart, before a certificate is spent on it."""
    restart = settings.restart
    if restart.method == "none":
        return
    specs = [item.spec for item in node.items if item.managed and item.state == "present" and not item.foreign]
    for component in restart_plan.stale(
        specs, restart_plan.reloading(node, settings.node.kubernetes_version), restart.components
    ):
        key, words = f"restart.commands.{component.value}", restart.command(component)
        error = restarts.obstacle(component, node, settings)
        if error is not None:
            yield from_error("restart-command", key, error)
        elif words and shutil.which(words[0]) is None:
            text = f"wanted a program {words[0]!r}, found none that can be run"
            yield Finding(level="error", check="restart-command", about=key, text=text)


def _hooks(settings: Settings) -> Iterator[Finding]:
    for event in (hooks.BEFORE, AFTER_INSTALL, SUCCESS, FAILURE):
        for words in getattr(settings.hooks, event).words():
            found = shutil.which(words[0])
            text = found or f"wanted a program {words[0]!r}, found none that can be run"
            yield Finding(level="ok" if found else "warning", check="hook", about=f"hook {event}", text=text)
    if Store(settings.node.state_dir).hooks.exists():
        text = "some of an earlier run did not succeed; the next `ca-bridge renew` runs them again"
        yield Finding(level="warning", check="hooks-owed", about="hooks", text=text)
