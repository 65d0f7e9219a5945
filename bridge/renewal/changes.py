"""
Decides a missing or changed certificate's names from kubeadm's configuration and this node's manifests; never guesses.

kubeadm's newer subjects have fewer groups: their rights come from ClusterRoleBindings that `kubeadm init` and
`kubeadm upgrade apply` create, and `kubeadm certs renew` does not. A new subject therefore needs its binding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from bridge.cluster import items, kubeadm, mapping, url_of
from bridge.cluster.api import Api, NoAnswerError
from bridge.errors import BridgeError, Exit, SettingsError, SettingsProblem, converted
from bridge.node import endpoints, kubeadm_config, kubeconfig
from bridge.node.inventory import Item, Node
from bridge.node.kubeadm_config import KubeadmConfig, KubeadmConfigError
from bridge.node.kubeconfig import FreshKubeconfig
from bridge.pki import csr, kubeadm_names
from bridge.pki.certificates import O_OID, attributes, pem, san_entry
from bridge.pki.csr import Naming
from bridge.pki.kubeadm_names import ADMINS, NamingFacts, NoFactError, Release
from bridge.renewal import ALL, Desired, DesiredByName, anchors_of, assert_known
from bridge.renewal.selection import Changes, RunOptions
from bridge.settings.tables import Settings
from bridge.specs import KUBELET_CONF, MASTERS, SERVERS, SPECS, CertificateSpec, Component
from bridge.system.paths import UnreadableError, read

#: Kubeconfigs of components on this node, which talk to its own API server.
_LOCAL = {"controller-manager.conf", "scheduler.conf", KUBELET_CONF}
_SERVING = ("apiserver", "etcd-server", "etcd-peer", *(spec.name for spec in SERVERS.values()))


class CannotMakeError(BridgeError):
    """A missing certificate can't be made, since its names are not known."""

    hint = (
        "name kubeadm's configuration of this node with --kubeadm-config FILE, or put a good copy of the certificate "
        "back (an expired one will do)"
    )


class CannotChangeError(BridgeError):
    """The change would cut off a client, or contradicts itself; no CA was asked."""

    exit_code = Exit.USAGE


class NoSourceError(BridgeError):
    """kubeadm's configuration can't be read from the cluster."""

    hint = (
        "name kubeadm's configuration with --kubeadm-config FILE; or put a good copy of the certificate back (an expired "
        "one will do), or have the API server answer (kubectl get -n kube-system cm kubeadm-config)"
    )


def decide(node: Node, settings: Settings, options: RunOptions) -> DesiredByName:
    """Decide the names of the next certificates where they differ from the live ones (SettingsError: a wrong name)."""
    names, changes = options.names, options.changes
    if not (names or changes.add or changes.drop or changes.adopt_defaults):
        return {}
    assert_known([*names, *changes.add, *changes.drop], node)
    _assert_named(names, changes)
    decision = _Decision(node, settings, changes)
    desired: dict[str, Desired | BridgeError] = {}
    for item in node.items:
        name, is_named = item.spec.name, item.spec.name in names or ALL in names
        if item.pair is not None:  # its names come from the settings
            continue
        try:
            if item.state == "missing" and name in names:
                desired[name] = decision.desired_for(item)
            elif item.certificates and is_named and (changed := decision.changed(item)) is not None:
                desired[name] = changed
        except BridgeError as e:
            desired[name] = e
    return desired


def _assert_named(names: Sequence[str], changes: Changes) -> None:
    wanted = [*changes.add, *changes.drop]
    if ALL not in names and (others := sorted({name for name in wanted if name not in names})):
        among = f"{', '.join(others)} among the names, since its SANs are to change"
        raise SettingsError([SettingsProblem("", among, "other names")])
    if changes.adopt_defaults and not names:
        raise SettingsError([SettingsProblem("--adopt-defaults", "names of certificates, or all", "none")])
    for name in wanted:
        if name not in _SERVING:
            why = "is a client certificate" if name in SPECS else "has its sans in the settings"
            wanted_names = f"SANs for one of {', '.join(_SERVING)}"
            raise SettingsError([SettingsProblem("", wanted_names, f"{name}, which {why}")])


class _Decision:
    """The facts for names: this node's, the operator's, and the cluster's, which are read at most once."""

    def __init__(self, node: Node, settings: Settings, changes: Changes) -> None:
        self.node, self.settings, self.changes = node, settings, changes
        file = changes.kubeadm_config
        self.source = str(file) if file is not None else f"the cluster's ConfigMap kube-system/{kubeadm.CLUSTER.name}"

    # --- a missing certificate ---------------------------------------------------------------------------------------

    def desired_for(self, item: Item) -> Desired:
        """Decide the names of a missing certificate (CannotMakeError: no source has them, or it is another node's)."""
        spec, path = item.spec, item.certificate_path
        if spec.by_flag:
            return self._server(item)
        if not spec.listed and spec.name != KUBELET_CONF:
            raise CannotMakeError(
                f"there is no {path}; the kubelet's is made with the node, not by a renewal",
                hint="`ca-bridge bootstrap` makes a node's files; or put a good copy back",
            )
        if not path.parent.is_dir():
            raise CannotMakeError(f"can't make {path}: there is no directory {path.parent}")
        with converted(NoFactError, CannotMakeError, f"can't make {path} anew, since its names are unknown: "):
            facts, names = self._facts()
            naming = self._with_sans(item, kubeadm_names.naming(spec, facts))
            if facts.release is not None and (facts.release.major, facts.release.minor) < spec.since:
                since = Release(*spec.since)
                raise NoFactError(f"{spec.name} is known from Kubernetes {since} on, found {facts.release}")
            fresh = self._kubeconfig(item, facts) if spec.kubeconfig else None
        notes = [
            f"{spec.name} is not on this node; it is made anew from {self.source}: {naming.text}",
            f"{spec.name}: names as of Kubernetes {facts.release or '(any)'}, {names}",
            *([f"{spec.name}: it leads to {fresh.server}"] if fresh is not None else []),
            *self._rights(naming, spec, strictly=False),
        ]
        return Desired(naming=naming, notes=tuple(notes), key=self.config.key, kubeconfig=fresh)

    def _server(self, item: Item) -> Desired:
        """Decide a component's serving names from this node's files alone; the key is of the API server's kind."""
        if self.settings.restart.method == "none" and not item.named:
            raise CannotMakeError(
                'wanted a way to restart its component, which puts the pair into the manifest, found restart.method = "none"',
                hint='restart.method = "static-pods" does both; `ca-bridge help certificates` has the flags',
            )
        facts = NamingFacts(node=self.settings.node.node_name, address=self._address)
        unknown = f"can't make {item.certificate_path}, since its names are unknown: "
        with converted(NoFactError, CannotMakeError, unknown):
            naming = self._with_sans(item, kubeadm_names.naming(item.spec, facts))
        live = self.node.live("apiserver")
        note = f"{item.spec.name} is made for this node: {naming.text}"
        return Desired(naming=naming, notes=(note,), key=csr.known_algorithm(live.public_key()) if live else None)

    @property
    def _address(self) -> str:
        """The API server's address in this node's manifest; empty: none."""
        return endpoints.name(self.node.flags(Component.APISERVER)) or ""

    def _facts(self) -> tuple[NamingFacts, str]:
        """Return the facts for names, and a sentence about the source of the node's own part."""
        config, here, address = self.config, self.settings.node.name, self._address
        for what, theirs, ours in (("node", config.name, here), ("advertise address", config.address, address)):
            if theirs and ours and theirs != ours:
                raise CannotMakeError(
                    f"{self.source} is for {what} {theirs}, and this is {ours}",
                    hint="name the configuration of this node, or leave the node's part (InitConfiguration) out of it",
                )
        source = "its certificates or the settings" if here else self.source
        sources = [f"node {here or config.name} of {source}"]
        if address or config.address:
            source = "kube-apiserver.yaml" if address else self.source
            sources.append(f"address {address or config.address} of {source}")
        facts = config.naming_facts(here or config.name, address or config.address)
        if facts.release is None:
            facts = dataclasses.replace(facts, release=self._release_here())
        return facts, ", ".join(sources)

    def _release_here(self) -> Release | None:
        manifest = self.node.manifests.get(Component.APISERVER)
        return None if manifest is None else kubeadm_names.parse_release(manifest.tag)

    def _kubeconfig(self, item: Item, facts: NamingFacts) -> FreshKubeconfig:
        config = self.config
        port = config.bind_port or self.node.flags(Component.APISERVER).get("--secure-port") or "6443"
        local = url_of(facts.address, port) if facts.address else ""
        server = local if item.spec.name in _LOCAL else config.endpoint_url or local
        if not server:
            raise NoFactError("the API server's address is unknown")
        user = item.spec.common_names[0].replace("{node}", facts.node)
        ca_pem = pem(*self.settings.embedded(item.spec.authority.name, anchors_of(item)))
        return FreshKubeconfig(server=server, cluster=config.cluster_name, user=user, ca_pem=ca_pem)

    # --- a change of a live certificate ------------------------------------------------------------------------------

    def changed(self, item: Item) -> Desired | None:
        """Decide the names that replace a live certificate's; None: they stay."""
        name, notes = item.spec.name, []
        was = naming = csr.naming_of(item.certificates[0])
        if name in self.changes.add or name in self.changes.drop:
            naming = self._with_sans(item, naming)
            more = [f"with {':'.join(san_entry(san))}" for san in naming.sans if san not in was.sans]
            less = [f"without {':'.join(san_entry(san))}" for san in was.sans if san not in naming.sans]
            difference = ", ".join([*more, *less]) or "since nothing changes"
            notes.append(f"{name}: SANs as in the live certificate, {difference}")
        if self.changes.adopt_defaults:
            release = self._release_here() if self.changes.kubeadm_config is None else self.config.release
            if release is None and (version := self.settings.node.kubernetes_version) is not None:
                release = Release(version.major, version.minor)
            subject = kubeadm_names.subject(item.spec, NamingFacts(release=release, node=self.settings.node.name))
            if sorted(attributes(subject)) == sorted(attributes(naming.subject)):
                notes.append(f"{name}: the subject is kubeadm's of today")
            else:
                naming = dataclasses.replace(naming, subject=subject)
                texts = [Naming(subject=subject).text for subject in (subject, was.subject)]
                notes.append(f"{name}: subject {texts[0]} instead of {texts[1]}")
                notes += self._rights(naming, item.spec, strictly=True)
        return Desired(naming=naming, notes=tuple(notes)) if notes else None

    def _with_sans(self, item: Item, naming: Naming) -> Naming:
        add, drop = (changes.get(item.spec.name, ()) for changes in (self.changes.add, self.changes.drop))
        if absent := [san for san in drop if san not in naming.sans]:
            raise CannotChangeError(
                f"--drop-san: wanted SANs of {item.certificate_path}, found that it has no "
                f"{kubeadm_names.text_of(absent)}",
                hint=f"it has {kubeadm_names.text_of(naming.sans)}",
            )
        needed = self._needed().get(item.spec.name, {}) if drop else {}
        if used := [f"{value} ({needed[value]})" for san in drop if (value := str(san.value)) in needed]:
            raise CannotChangeError(
                f"--drop-san: wanted names that nothing on this node uses, found {', '.join(used)}",
                hint="change those files first; without the name their users would not trust the certificate",
            )
        if both := [san for san in add if san in drop]:
            raise CannotChangeError(f"wanted each SAN added or dropped, found {kubeadm_names.text_of(both)} in both")
        sans = tuple(san for san in naming.sans if san not in drop)
        return dataclasses.replace(naming, sans=tuple(dict.fromkeys((*sans, *add))))

    def _needed(self) -> dict[str, dict[str, str]]:
        """By certificate, the hosts by which this node's files reach servers (or a load balancer), with the file."""
        node, names = self.node, {name: dict[str, str]() for name in _SERVING}
        if self._address:
            names["apiserver"][self._address] = "kube-apiserver.yaml: --advertise-address"
        for url in endpoints.urls(node.flags(Component.APISERVER), "--etcd-servers") if node.local_etcd else ():
            names["etcd-server"][endpoints.Server(url).place.host] = "kube-apiserver.yaml: --etcd-servers"
        flags = {"etcd-server": "--advertise-client-urls", "etcd-peer": "--initial-advertise-peer-urls"}
        for certificate, flag in flags.items():
            if (host := endpoints.host(node.flags(Component.ETCD), flag)) is not None:
                names[certificate][host] = f"etcd.yaml: {flag}"
        for spec in SPECS.values():
            if spec.kubeconfig and (host := _server_of(self.settings.node.kubeconfig_dir / spec.base)):
                names["apiserver"].setdefault(host, f"the server of {spec.base}")
        return names

    @functools.cached_property
    def api(self) -> Api:
        return Api.of_node(self.node, self.settings.node.kubeconfig_dir)

    @functools.cached_property
    def config(self) -> KubeadmConfig:
        """kubeadm's configuration (NoSourceError, KubeadmConfigError: none can be used)."""
        if (file := self.changes.kubeadm_config) is not None:
            return kubeadm_config.parse(kubeadm_config.read_file(file), self.source)
        with converted(NoAnswerError, NoSourceError, f"wanted {self.source}, found "):
            config_map = kubeadm.read(self.api, kubeadm.CLUSTER)
        if config_map.text is None:
            raise NoSourceError(f"there is no {self.source} (HTTP {config_map.status})")
        with converted(KubeadmConfigError, NoSourceError, ""):
            return kubeadm_config.parse(config_map.text.encode(), self.source)

    def _rights(self, naming: Naming, spec: CertificateSpec, *, strictly: bool) -> list[str]:
        """Return a sentence about the binding behind the rights (BridgeError: missing or, if `strictly`, not seen)."""
        needed = _needed_by(naming, spec)
        if needed is None:
            return []
        rights = f"{spec.name}: its rights come from ClusterRoleBinding {needed.name} alone"
        try:
            missing = _missing(self.api, needed)
        except NoAnswerError as e:
            if not strictly:
                return [f"{rights}, which could not be checked: {e}"]
            raise BridgeError(
                f"{rights}; can't see it: {e}",
                hint="run it while the API server answers; until then leave the subject as it is",
                exit_code=Exit.REFUSED,
            ) from None
        if missing:
            raise BridgeError(
                f"{rights}; wanted it ({needed.role} for {needed.kind} {needed.who}), found {missing}",
                hint=f"`kubeadm upgrade apply` makes it; or: kubectl create clusterrolebinding {needed.name} "
                f"--clusterrole={needed.role} --{needed.kind.lower()}={needed.who}",
                exit_code=Exit.REFUSED,
            )
        return [f"{rights}, which is there"]


def _server_of(path: Path) -> str:
    try:
        parsed = kubeconfig.parse(read(path) or b"")
        return parsed.tls_server_name or endpoints.Server(parsed.server).place.host
    except (kubeconfig.KubeconfigError, UnreadableError, ValueError):
        return ""  # the inventory reports what is wrong with it


class _Binding(NamedTuple):
    """A ClusterRoleBinding on which a subject's rights depend."""

    name: str
    role: str
    kind: str  #: The subject's kind: `User` or `Group`.
    who: str


def _needed_by(naming: Naming, spec: CertificateSpec) -> _Binding | None:
    """Return the binding that a certificate's rights come from; None: it needs none."""
    groups = {value for oid, value in attributes(naming.subject) if oid == O_OID}
    if MASTERS in groups:
        return None
    if ADMINS in groups:
        return _Binding(ADMINS, "cluster-admin", "Group", ADMINS)
    if spec.name == "apiserver-kubelet-client":
        role, user = "system:kubelet-api-admin", "kube-apiserver-kubelet-client"
        return _Binding("kubeadm:apiserver-kubelet-client", role, "User", user)
    return None


def _missing(api: Api, needed: _Binding) -> str:
    """Describe what was found instead of the binding; empty: the binding is there."""
    reply = api.ask("GET", f"/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/{needed.name}")
    if reply.status != HTTPStatus.OK:
        return "none" if reply.status == HTTPStatus.NOT_FOUND else f"HTTP {reply.status}"
    ref = mapping(reply.document, "roleRef")
    subjects = [(item.get("kind"), item.get("name")) for item in items(reply.document, "subjects")]
    is_role = (ref.get("kind"), ref.get("name")) == ("ClusterRole", needed.role)
    return "" if is_role and (needed.kind, needed.who) in subjects else "one of that name for another role or subject"
