"""Who uses what is installed: the static pods' files and addresses, and the commands that restart them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from bridge.control_plane import kube_api, restart_plan, restarts
from bridge.diagnosis.findings import Finding, from_error
from bridge.diagnosis.installed import is_named
from bridge.errors import BridgeError
from bridge.node import endpoints
from bridge.node.endpoints import Server
from bridge.node.inventory import Item, Node
from bridge.node.yamltree import YamlError, document
from bridge.node.yamltree import YamlNode as Tree
from bridge.pki.certificates import load_pem_certificates
from bridge.renewal import hooks
from bridge.settings.tables import Settings
from bridge.specs import Component
from bridge.state.store import Store
from bridge.system.safe_read import UnreadableError, read

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
_CONFIG_MAP = "/api/v1/namespaces/kube-system/configmaps/kubeadm-config"


def look(node: Node, settings: Settings) -> Iterator[Finding]:
    """All of it."""
    if not node.manifests:
        text = f"no static pods in {settings.node.kubeconfig_dir / 'manifests'}: which files they use was not looked at"
        yield Finding(level="ok", check="manifests", about="manifests", text=text)
    for item in node.items:
        if item.state == "present" and item.managed:
            yield from _files(item, node, settings)
    yield from _authorities(node)
    yield from _addresses(node)
    yield from _cluster_names(node, settings)
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
    """What a component trusts holds this node's CA."""
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
        data = read(path)
        return [*load_pem_certificates(data)] if data is not None else "no file"
    except (UnreadableError, ValueError) as e:
        return str(e)


# --- addresses -------------------------------------------------------------------------------------------------------


def _addresses(node: Node) -> Iterator[Finding]:
    """Where a component says that it can be reached, its certificate has the address."""
    api, etcd = (node.manifests.get(one) for one in (Component.APISERVER, Component.ETCD))
    wanted: dict[str, list[str | None]] = {}
    if api is not None:
        wanted["apiserver"] = [endpoints.name(api.flags)]
    if etcd is not None:
        wanted["etcd-server"] = [endpoints.host(etcd.flags, "--advertise-client-urls")]
        wanted["etcd-peer"] = [endpoints.host(etcd.flags, "--initial-advertise-peer-urls")]
    for name, hosts in wanted.items():
        text = "of its manifest"
        yield from _missing_names(node, name, [host for host in hosts if host], text, "sans-of-manifest")


def _missing_names(node: Node, name: str, hosts: list[str], whose: str, check: str) -> Iterator[Finding]:
    certificate = next(
        (item.certificates[0] for item in node.items if item.spec.name == name and item.certificates), None
    )
    missing = [host for host in hosts if certificate is not None and not is_named(certificate, host)]
    if missing:
        text = f"wanted the addresses {whose} among its SANs, found no {', '.join(dict.fromkeys(missing))}"
        hint = (
            "a renewal copies the SANs as they are: make it once with `kubeadm init phase certs`, or have a CSR with "
            "all names signed"
        )
        yield Finding(level="warning", check=check, about=name, text=text, hint=hint)


def _cluster_names(node: Node, settings: Settings) -> Iterator[Finding]:
    """kubeadm-config, where this node's API server answers, names what kubeadm would put into the certificates."""
    manifest = node.manifests.get(Component.APISERVER)
    if manifest is None:
        return
    try:
        name = endpoints.name(manifest.flags)
        places = endpoints.bound(Component.APISERVER, manifest.flags)
        servers = [Server(f"https://{place}", name) for place in places[:1]]
        known = kube_api.connect(node, settings.node.kubeconfig_dir)
        reply = kube_api.Api(known.clients, servers).ask("GET", _CONFIG_MAP)
        data = reply.document.get("data")
        text = data.get("ClusterConfiguration") if isinstance(data, dict) else None
        names = _names_in(document(text)) if isinstance(text, str) else {}
    except (BridgeError, YamlError, ValueError) as e:
        text = f"not compared with the SANs: {e}"
        yield Finding(level="ok", check="kubeadm-config", about="kubeadm-config", text=text)
        return
    for certificate, hosts in names.items():
        yield from _missing_names(node, certificate, hosts, "of kubeadm-config", "sans-of-kubeadm-config")


def _names_in(root: Tree) -> dict[str, list[str]]:
    endpoint = _text(root, "controlPlaneEndpoint")
    return {
        "apiserver": [
            *_texts(root, "apiServer", "certSANs"),
            *([endpoint.rpartition(":")[0] or endpoint] if endpoint else []),
        ],
        "etcd-server": _texts(root, "etcd", "local", "serverCertSANs"),
        "etcd-peer": _texts(root, "etcd", "local", "peerCertSANs"),
    }


def _text(root: Tree, key: str) -> str:
    found = root.get(key)
    return "" if found is None else found.text()


def _texts(root: Tree, *keys: str) -> list[str]:
    found: Tree | None = root
    for key in keys:
        found = None if found is None else found.get(key)
    return [] if found is None else [one.text() for one in found.items()]


# --- restarts and hooks ----------------------------------------------------------------------------------------------


def _restarts(node: Node, settings: Settings) -> Iterator[Finding]:
    """Each component that a renewal of all would restart can be: found before a certificate is spent on it."""
    restart = settings.restart
    if restart.method == "none":
        return
    specs = [item.spec for item in node.items if item.managed and item.state == "present"]
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
    for event in (hooks.BEFORE, hooks.AFTER_INSTALL, hooks.SUCCESS, hooks.FAILURE):
        for words in getattr(settings.hooks, event).words():
            found = shutil.which(words[0])
            text = found or f"wanted a program {words[0]!r}, found none that can be run"
            yield Finding(level="ok" if found else "warning", check="hook", about=f"hook {event}", text=text)
    if Store(settings.node.state_dir).hooks.exists():
        text = "some of an earlier run did not succeed; the next `ca-bridge renew` runs them again"
        yield Finding(level="warning", check="hooks-owed", about="hooks", text=text)
