"""
What `kubeadm upgrade` will do on this node, and where it would abort, as far as certificates and their files decide it.

kubeadm renews certificates component by component, each just before it replaces the component's manifest. Below an
external CA it renews nothing, but checks every certificate of that CA, and aborts at the first bad one (measured: 1.37
from 1.37, and from 1.36; the order is the same in 1.34 to 1.37).
The last part checks every kubelet's serving certificate, and which API servers verify it: an upgrade changes both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from http import HTTPStatus
from urllib.parse import urlsplit

from cryptography.x509.verification import VerificationError as NoPathError

from bridge.cluster import kubeadm
from bridge.cluster.api import Api, NoAnswerError
from bridge.control_plane import kubelet_serving, neighbours
from bridge.control_plane.kubelet_serving import AUTHORITY, Served
from bridge.diagnosis import Finding, Level, from_error
from bridge.diagnosis.installed import is_named
from bridge.errors import BridgeError
from bridge.node import endpoints, kubeconfig, kubelet, manifest_flags
from bridge.node.inventory import AuthorityState, Item, Node
from bridge.node.kubelet import KUBELET_CONFIG
from bridge.node.processes import file_contents
from bridge.node.yamltree import YamlError, YamlNode, document
from bridge.pki import verify
from bridge.pki.expiry import left_text, minute
from bridge.settings.tables import Settings
from bridge.specs import CA, ETCD_CA, FRONT_PROXY_CA, KUBELET_CONF, SUPER_ADMIN, Component
from bridge.system.paths import UnreadableError, read
from bridge.words import one_line

#: Longer than a maintenance should take.
_SOON = timedelta(days=1)
_BINDINGS = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/kubeadm:"
#: Keys that kubeadm keeps for each node beside config.yaml, and writes again (NodeLocalCRISocket).
_OF_THE_NODE = {"containerRuntimeEndpoint"}
_AUTO_APPROVE = ("node-autoapprove-bootstrap", "node-autoapprove-certificate-rotation")
_KUBELET_CLIENT = "apiserver-kubelet-client"
_UPGRADE_CHANGES = (
    "the next `kubeadm upgrade` changes it; `ca-bridge kubelets on` or `off` on that node makes them alike"
)
#: Certificates that kubeadm checks below an external CA (`validateExternal…` in cmd/kubeadm/app/phases/certs).
_VALIDATED = {
    CA.name: ("apiserver", _KUBELET_CLIENT),
    FRONT_PROXY_CA.name: ("front-proxy-client",),
    ETCD_CA.name: ("apiserver-etcd-client", "etcd-server", "etcd-peer", "etcd-healthcheck-client"),
}
#: Components in kubeadm's order, with the CAs that it checks before it replaces the component's manifest.
_STEPS: tuple[tuple[Component, tuple[str, ...]], ...] = (
    (Component.ETCD, (ETCD_CA.name,)),
    (Component.APISERVER, (CA.name, FRONT_PROXY_CA.name, ETCD_CA.name)),
    (Component.CONTROLLER_MANAGER, (CA.name,)),
    (Component.SCHEDULER, (CA.name,)),
)


def look(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    """Check what an upgrade needs; asks the cluster's API, if it answers, and writes nothing."""
    if node.is_worker:
        text = "kubeadm upgrade node asks the cluster by kubelet.conf, and writes the kubelet's configuration anew"
        yield _note("kubelet", text, "edits of its config.yaml are lost; those of the ConfigMap kubelet-config stay")
        yield from _access(KUBELET_CONF, node, now)
        return
    if node.is_etcd_host:
        text = "kubeadm upgrade changes nothing on a host of etcd alone, and kubeadm certs renews nothing of it by the cluster's"
        yield _note("etcd", text, "the image is in etcd.yaml; ca-bridge renew goes on as before")
        return
    # kubeadm checks nothing of an external etcd
    external = [state for state in node.authorities if state.key == "external" and state.listed]
    for state in external:
        yield from _authority(state, node, now)
    yield from _access("admin.conf", node, now)
    yield _note(
        "certificates",
        "kubeadm renews none of an external CA's, and aborts if one of them is not right"
        if external
        else "the CA keys are here: kubeadm renews every certificate as it upgrades",
        "kubeadm upgrade apply|node --certificate-renewal=false leaves all of that out" if external else "",
    )
    yield from _kubelet(node, settings)
    if node.flags(Component.ETCD).get("--initial-cluster-state") == "existing":
        text = "this member has joined: its manifest differs from what kubeadm renders, so that the upgrade restarts it"
        yield _note("etcd", text, "seen: 72 s; upgrade one node after the other")
    item = node.item(SUPER_ADMIN)
    if item is not None and item.state == "missing":
        text = "is not here, and is not made by an upgrade"
        yield _note(SUPER_ADMIN, text, f"ca-bridge renew {SUPER_ADMIN} makes it")
    yield from _cluster(Api.of_node(node, settings.node.kubeconfig_dir))


def _note(about: str, text: str, hint: str) -> Finding:
    return Finding.note("upgrade", about, text, hint)


# --- certificates ----------------------------------------------------------------------------------------------------


def _authority(state: AuthorityState, node: Node, now: datetime) -> Iterator[Finding]:
    name = state.authority.name
    for certificate in _VALIDATED[name]:
        item = node.item(certificate)
        if item is None:
            continue
        if wrong := _wrong(item, state, now):
            hint = f"ca-bridge renew {certificate}, before kubeadm upgrade; or upgrade with --certificate-renewal=false"
            yield Finding.error("upgrade-aborts", certificate, f"{wrong}: kubeadm upgrade {_where(name, node)}", hint)
        elif (end := item.certificates[0].not_valid_after_utc) - now < _SOON:
            found = f"that it ends {minute(end)}; from then on kubeadm aborts"
            text = f"wanted it to outlive the maintenance, found {found}"
            yield Finding.warning("upgrade-ends-soon", certificate, text, f"ca-bridge renew {certificate}")


def _where(authority: str, node: Node) -> str:
    """Say where the upgrade aborts, and which manifests it has replaced by then."""
    steps = {component.value: cas for component, cas in _STEPS if node.local_etcd or component is not Component.ETCD}
    component = next(name for name, cas in steps.items() if authority in cas)
    done = ", ".join(itertools.takewhile(lambda name: name != component, steps))
    when = f"when the manifest of {done} is exchanged already" if done else "before anything is exchanged"
    return f"aborts at {component}, {when}"


def _wrong(item: Item, state: AuthorityState, now: datetime) -> str:
    """Return the fault that kubeadm would find: no key, bad dates, or no path to the CA file's first certificate."""
    if item.state != "present":
        return f"wanted it in {item.certificate_path}, found it {item.state}"
    if item.key_path is not None and not item.key_path.exists():
        return f"its key is missing in {item.key_path}"
    leaf, *rest = item.certificates
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if not begin <= now <= end:
        return f"it is valid only from {minute(begin)} to {minute(end)}"
    try:
        verify.verified_path(leaf, rest, state.certificates[0], now)
    except NoPathError as e:
        return f"it does not lead to {state.path}'s first certificate ({one_line(e)})"
    return ""


def _access(name: str, node: Node, now: datetime) -> Iterator[Finding]:
    """Check the kubeconfig that kubeadm itself uses: admin.conf, or a worker's kubelet.conf."""
    item = node.item(name)
    if item is None or item.state != "present":
        found = item.state if item is not None else "missing"
        text = f"wanted it, found it {found}: kubeadm upgrade has no access without it, and aborts"
        hint = f"ca-bridge renew {name} makes it"
    elif now > (end := item.certificates[0].not_valid_after_utc):
        text = f"it has ended {minute(end)}: kubeadm upgrade has no access"
        hint = f"ca-bridge renew {name}"
    else:
        return
    yield Finding.error("upgrade-no-access", name, text, hint)


# --- files that it writes --------------------------------------------------------------------------------------------


def _kubelet(node: Node, settings: Settings) -> Iterator[Finding]:
    """Check the server in kubelet.conf: from 1.35 on, kubeadm points it at the node's own API server."""
    local = endpoints.name(node.flags(Component.APISERVER))
    try:
        server = kubeconfig.parse(read(settings.node.kubeconfig_dir / "kubelet.conf") or b"").server
        host = urlsplit(server).hostname
    except (BridgeError, UnreadableError, ValueError):
        return
    if local is None or host == local:
        return
    serving = node.live("apiserver")
    text = f"leads to {one_line(server)}; if that is the control-plane endpoint, it is led to {local}, and the kubelet restarted"
    if serving is not None and not is_named(serving, local):
        hint = f"ca-bridge renew --add-san apiserver={local}, before kubeadm upgrade"
        text = f"{text}, and the API server's certificate lacks that address"
        yield Finding.error("upgrade-kubelet-server", "kubelet.conf", text, hint)
    else:
        yield _note("kubelet.conf", text, "its certificate stays")


# --- what is in the cluster ------------------------------------------------------------------------------------------


def _cluster(api: Api) -> Iterator[Finding]:
    try:
        yield from _bindings(api)
        yield from _config(api)
        yield from _kubelet_config(api)
    except (NoAnswerError, YamlError, UnreadableError) as e:
        text = f"kubeadm-config, kubelet-config and bindings were not looked at: {e}"
        yield Finding.warning("upgrade-not-looked-at", "cluster", text, "kubeadm upgrade needs the API server, too")


def _bindings(api: Api) -> Iterator[Finding]:
    if absent := [name for name in _AUTO_APPROVE if not _is_bound(api, name)]:
        names = ", ".join(f"kubeadm:{name}" for name in absent)
        text = f"wanted no automatic approval, as now; kubeadm upgrade apply puts it back: {names}"
        hint = f"after it: kubectl delete clusterrolebinding {names.replace(',', '')}"
        yield Finding.warning("upgrade-auto-approve", "ClusterRoleBindings", text, hint)
    if not _is_bound(api, _KUBELET_CLIENT):
        text = f"kubeadm:{_KUBELET_CLIENT} is not there; upgrade apply makes it from 1.36 on"
        yield _note("ClusterRoleBindings", text, f"only after it: ca-bridge renew {_KUBELET_CLIENT} --adopt-defaults")


def _is_bound(api: Api, name: str) -> bool:
    return api.ask("GET", f"{_BINDINGS}{name}").status != HTTPStatus.NOT_FOUND


def _config(api: Api) -> Iterator[Finding]:
    """Yield findings about parts of kubeadm-config that kubeadm 1.37 no longer reads."""
    root = _document(api, kubeadm.CLUSTER)
    if root is None:
        text = "the cluster has no kubeadm-config: kubeadm upgrade aborts"
        hint = "kubeadm init phase upload-config kubeadm --config FILE"
        yield Finding.error("upgrade-no-config", "kubeadm-config", text, hint)
        return
    gates, version = root.get("featureGates"), root.get("apiVersion")
    old = version.text().rpartition("/")[2] if version is not None else ""
    if gates is not None and gates.get("PublicKeysECDSA") is not None:
        text = "wanted encryptionAlgorithm, found the feature gate PublicKeysECDSA, which 1.37 does not know"
        hint = "kubectl edit -n kube-system cm kubeadm-config: encryptionAlgorithm: ECDSA-P256 instead of it"
        yield Finding.warning("upgrade-old-config", "kubeadm-config", text, hint)
    if old in {"v1beta2", "v1beta3"}:
        text = f"wanted kubeadm.k8s.io/v1beta4, found {old}, which 1.37 does not read"
        hint = "kubeadm config migrate of the version that runs makes the newer one"
        yield Finding.warning("upgrade-old-config", "kubeadm-config", text, hint)


def _kubelet_config(api: Api) -> Iterator[Finding]:
    """Warn about kubelet settings that only this node's file has: an upgrade loses them."""
    root, own = _document(api, kubeadm.KUBELETS), kubelet.configuration(KUBELET_CONFIG)
    if root is None or own is None:
        return
    ours, theirs = own.plain(), root.plain()
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return
    differing = sorted(key for key in {*ours, *theirs} - _OF_THE_NODE if ours.get(key) != theirs.get(key))
    if differing:
        names = ", ".join(map(one_line, differing[:10]))
        text = f"kubeadm upgrade writes it from the ConfigMap kubelet-config, which differs in {names}"
        hint = "put the settings that are to stay into the ConfigMap (or into --patches)"
        yield Finding.warning("upgrade-kubelet-config", str(KUBELET_CONFIG), text, hint)


def _document(api: Api, place: kubeadm.ConfigMapKey) -> YamlNode | None:
    text = kubeadm.read(api, place).text
    return None if text is None else document(text)


def look_at_kubelets(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    """Check all kubelets from a control-plane node; asks the cluster's API and each kubelet, and writes nothing."""
    manifest = node.manifests.get(Component.APISERVER)
    if manifest is None:
        text = "wanted a control-plane node, from which all kubelets can be seen, found another one"
        yield Finding.error("kubelets", "this node", text, "run it on a control-plane node")
        return
    api = neighbours.connect(node, settings)
    try:
        trust = file_contents(settings.node.pki_dir / CA.certificate_file)
        authorities = kubelet_serving.authorities(api, settings.node.node_name, manifest.flags)
        verifying = [name for name, authority in authorities.items() if authority]
        for kubelet in kubelet_serving.all_served(api, trust, manifest.flags):
            yield _of_kubelet(kubelet, verifying, now)
        yield from _of_api_servers(api, authorities)
        yield _of_map(api)
    except BridgeError as e:
        yield from_error("kubelets", "cluster", e)
    except (UnreadableError, YamlError, ValueError) as e:
        yield Finding.error("kubelets", "cluster", str(e))


def _of_kubelet(kubelet: Served, verifying: list[str], now: datetime) -> Finding:
    if kubelet.end is not None:
        text = f"its kubelet serves {kubelet.place} with a certificate of the cluster's CA"
        return Finding.ok("kubelet-serving", kubelet.node, f"{text}, {left_text(kubelet.end, now)}")
    text = f"wanted a kubelet whose certificate the cluster's CA has signed, found: {kubelet.trouble}"
    if verifying:
        text += f"; the API server of {', '.join(verifying)} verifies it, so that logs and exec do not work"
    level: Level = "error" if verifying else "warning"
    return Finding(level, "kubelet-serving", kubelet.node, text, "`ca-bridge kubelets on` on that node")


def _of_api_servers(api: Api, authorities: Mapping[str, str]) -> Iterator[Finding]:
    """Compare each API server's flag with kubeadm-config, from which the next upgrade writes it."""
    kept = manifest_flags.arguments(kubeadm.read_cluster(api), Component.APISERVER)
    wanted = kept.get(AUTHORITY.removeprefix("--"), "")
    for name, authority in authorities.items():
        about = f"kube-apiserver of {name}"
        if authority != wanted:
            found = f"{AUTHORITY}={one_line(authority)}" if authority else f"no {AUTHORITY}"
            said = f"wanted it as {kubeadm.CLUSTER.name} has it ({one_line(wanted) or 'none'}), found {found}"
            yield Finding.warning("kubelet-authority", about, said, _UPGRADE_CHANGES)
        elif authority:
            yield Finding.ok("kubelet-authority", about, f"verifies kubelets by {one_line(authority)}")
        else:
            yield Finding.note("kubelet-authority", about, f"verifies no kubelet: it has no {AUTHORITY}")


def _of_map(api: Api) -> Finding:
    text, name = kubeadm.read(api, kubeadm.KUBELETS).text, kubeadm.KUBELETS.name
    if text is None:
        return Finding.warning("kubelet-config", name, "the cluster does not have it: kubeadm upgrade aborts")
    if kubelet.asks(text):
        return Finding.ok("kubelet-config", name, "has serverTLSBootstrap: new nodes and upgrades have it so")
    found = "has no serverTLSBootstrap: kubelets make serving certificates themselves"
    return Finding.note("kubelet-config", name, found)
