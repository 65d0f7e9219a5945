"""Checks of where certificates are used: static pods, restarts, hooks, kubeconfigs, kubeadm-config, further pairs."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from urllib.parse import urlsplit

from bridge import control_plane
from bridge.cluster import kubeadm
from bridge.cluster.api import Api
from bridge.control_plane import restarts
from bridge.diagnosis import Finding, Level, from_error
from bridge.diagnosis.installed import chain, end, is_named, key_of, server
from bridge.errors import BridgeError
from bridge.node import ca_files, endpoints, kubeadm_config, kubeconfig, pairs
from bridge.node.inventory import AuthorityState, Item, Node
from bridge.node.kubeadm_config import KubeadmConfig
from bridge.node.manifests import pod_name
from bridge.pki import kubeadm_names
from bridge.pki.certificates import UNREADABLE, attributes, san_entries
from bridge.pki.csr import names_of
from bridge.renewal import hooks
from bridge.renewal.pairs import how, late
from bridge.settings import command_words
from bridge.settings.pair_tables import MOST_OF_A_KEY, PairFiles, PairSettings
from bridge.settings.tables import Settings
from bridge.specs import SERVERS, Component
from bridge.state import Store
from bridge.state.obligations import AFTER_INSTALL, FAILURE, SUCCESS
from bridge.system.paths import UnreadableError, read, read_ca_file
from bridge.system.run_command import unsafe_program
from bridge.words import one_line

#: The key's flag, by the certificate's.
_KEY_FLAGS = {
    "--tls-cert-file": "--tls-private-key-file",
    "--etcd-certfile": "--etcd-keyfile",
    "--kubelet-client-certificate": "--kubelet-client-key",
    "--proxy-client-cert-file": "--proxy-client-key-file",
    "--peer-cert-file": "--peer-key-file",
    "--cert-file": "--key-file",
}


def look(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    """Check how the node uses its certificates: files, CAs, names, restarts and hooks."""
    if not node.manifests:
        place = settings.node.kubeconfig_dir / "manifests"
        text = f"no static pods could be read in {place}: which files they use was not looked at"
        yield Finding.note("manifests", "manifests", text)
    for item in node.items:
        if item.state == "present" and item.managed:
            yield from _files(item, node, settings)
    yield from _authorities(node, settings)
    yield from look_at_names(node, settings, now)
    yield from _restarts(node, settings)
    yield from _not_in_use(node, settings, now)
    yield from _hooks(settings)


# --- files -----------------------------------------------------------------------------------------------------------


def _files(item: Item, node: Node, settings: Settings) -> Iterator[Finding]:
    """Check that the flags name the files that a renewal replaces."""
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
            yield Finding.error("manifest-names-another-file", item.spec.name, text, hint)


def _authorities(node: Node, settings: Settings) -> Iterator[Finding]:
    """Check that the CA files that components trust hold this node's CAs."""
    cas = {state.authority.name: state for state in node.authorities if state.state == "present"}
    for file in ca_files.of_components(node, settings.node):
        if (state := cas.get(file.authority)) is None:
            continue
        try:
            what = "other certificates" if state.certificates[0] not in read_ca_file(file.path) else ""
        except UnreadableError as e:
            what = str(e)
        if what:
            text = f"wanted the CA of {state.path} in the file of {file.setting} ({file.path}), found {what}"
            hint = "new certificates of this CA would not be accepted"
            yield Finding.error("manifest-ca", file.reader, text, hint)


# --- restarts and hooks ----------------------------------------------------------------------------------------------


def _not_in_use(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    """Yield findings about installed certificates whose components have not restarted yet."""
    for certificate in late(settings, node, now):
        if certificate.component is not None:
            text = f"{certificate.component.value} was not seen to use the installed certificate: {certificate.what}: {certificate.detail}"
            hint = control_plane.how_to_restart(certificate.component, settings.node)
            yield Finding.warning("not-in-use", certificate.certificate, text, hint)


def _restarts(node: Node, settings: Settings) -> Iterator[Finding]:
    """Check that each component that a renewal would restart can be restarted, before a certificate is spent on it."""
    restart = settings.restart
    if restart.method == "none":
        return
    specs = [item.spec for item in node.items if item.managed and item.state == "present" and not item.foreign]
    for component in control_plane.stale(specs, control_plane.reloading(node, settings.node), restart.components):
        key, words = f"restart.commands.{component.value}", restart.command(component)
        error = restarts.obstacle(component, node, settings)
        if error is not None:
            yield from_error("restart-command", key, error)
        elif words and shutil.which(words[0]) is None:
            yield Finding.error("restart-command", key, f"there is no program {words[0]!r} that can be run")


def _hooks(settings: Settings) -> Iterator[Finding]:
    for event in (hooks.BEFORE, AFTER_INSTALL, SUCCESS, FAILURE):
        for words in getattr(settings.hooks, event).words():
            about = f"hook {event}"
            wrong = list(_program("hook", about, words, "warning"))
            yield from wrong or [Finding.ok("hook", about, str(shutil.which(words[0])))]
    if Store(settings.node.state_dir).hooks.exists():
        text = "some of an earlier run did not succeed; the next `ca-bridge renew` runs them again"
        yield Finding.warning("hooks-owed", "hooks", text)


def _program(check: str, about: str, words: Sequence[str], level: Level = "error") -> Iterator[Finding]:
    """Check that others can't change a command's program, and that it is there (else a finding of this level)."""
    if (unsafe := unsafe_program(words)) is not None:
        yield Finding.error(check, about, str(unsafe), unsafe.hint)
    elif shutil.which(words[0]) is None:
        yield Finding(level, check, about, f"there is no program {words[0]!r} that can be run")


_SERVICE_RANGE = "--service-cluster-ip-range"


def look_at_names(node: Node, settings: Settings, _now: datetime) -> Iterator[Finding]:
    """Compare names and addresses with manifests and kubeadm-config; asks the cluster's API for the latter."""
    yield from _addresses(node)
    yield from _cluster(node, settings)


def of_files(node: Node, settings: Settings) -> Iterator[Finding]:
    """Compare manifests and kubeconfigs with certificates, from files alone."""
    yield from _addresses(node)
    for item in node.items:
        if item.spec.kubeconfig and item.state == "present":
            try:
                parsed = kubeconfig.parse(read(settings.node.kubeconfig_dir / item.spec.base) or b"")
            except (BridgeError, UnreadableError):  # the inventory reports it
                continue
            yield from server(item, parsed, node)


# --- manifests -------------------------------------------------------------------------------------------------------


def _addresses(node: Node) -> Iterator[Finding]:
    """Check that certificates have the addresses that their components' flags advertise or listen on."""
    api, etcd = node.flags(Component.APISERVER), node.flags(Component.ETCD)
    servers = _hosts(api, "--etcd-servers") if etcd and node.local_etcd else []
    clients, peers = [*_hosts(etcd, "--listen-client-urls"), *servers], _hosts(etcd, "--listen-peer-urls")
    wanted = {
        "apiserver": [endpoints.name(api), _service_address(api)],
        "etcd-server": [endpoints.host(etcd, "--advertise-client-urls"), *clients],
        "etcd-peer": [endpoints.host(etcd, "--initial-advertise-peer-urls"), *peers],
    }
    for name, hosts in wanted.items():
        yield from _missing_names(node, name, filter(None, hosts), "of its manifest", "sans-of-manifest")


def _hosts(flags: endpoints.Flags, flag: str) -> list[str]:
    """Return the hosts of a flag's TLS URLs, without wildcard addresses such as 0.0.0.0."""
    hosts = [urlsplit(url).hostname or "" for url in endpoints.urls(flags, flag)]
    return [host for host in hosts if host and not endpoints.is_any(host)]


def _service_address(flags: endpoints.Flags) -> str | None:
    """Return the address by which pods reach the API server: the first of the (first) service range."""
    with contextlib.suppress(ValueError, IndexError):
        return str(ipaddress.ip_network(flags.get(_SERVICE_RANGE, "").partition(",")[0])[1])
    return None


def _missing_names(node: Node, name: str, hosts: Iterable[str], whose: str, check: str) -> Iterator[Finding]:
    certificate = node.live(name)
    missing = [] if certificate is None else list(dict.fromkeys(h for h in hosts if not is_named(certificate, h)))
    if missing:
        text = f"its SANs lack addresses {whose}: {', '.join(map(one_line, missing))}"
        options = " ".join(f"--add-san {name}={one_line(host)}" for host in missing)
        yield Finding.warning(check, name, text, f"a renewal copies the SANs as they are: ca-bridge renew {options}")


# --- kubeadm-config --------------------------------------------------------------------------------------------------


def _cluster(node: Node, settings: Settings) -> Iterator[Finding]:
    """Compare the node with kubeadm-config, if this node's API server answers."""
    manifest = node.manifests.get(Component.APISERVER)
    if manifest is None:
        return
    try:
        config = _config(node, settings, manifest.flags)
    except (BridgeError, ValueError) as e:
        yield Finding.note("kubeadm-config", "kubeadm-config", f"not compared with the SANs: {e}")
        return
    endpoint = [config.endpoint_host] if config.endpoint else []
    service = f"kubernetes.default.svc.{config.dns_domain}"
    names = {
        "apiserver": [config.service_address, *config.api_sans, *endpoint, service],
        "etcd-server": list(config.etcd_server_sans),
        "etcd-peer": list(config.etcd_peer_sans),
    }
    for certificate, hosts in names.items():
        yield from _missing_names(node, certificate, hosts, "of kubeadm-config", "sans-of-kubeadm-config")
    yield from _manifest(config, manifest.flags)
    yield from _endpoint(config, settings)
    yield from _directory(config, settings)
    yield from _servers(config, node)
    yield from _beyond(config, node, settings, manifest.flags)


def _config(node: Node, settings: Settings, flags: endpoints.Flags) -> KubeadmConfig:
    places = endpoints.bound(Component.APISERVER, flags)
    servers = [endpoints.Server(f"https://{place}", endpoints.name(flags)) for place in places[:1]]
    known = Api.of_node(node, settings.node.kubeconfig_dir)
    found = kubeadm.read(Api(known.clients, servers), kubeadm.CLUSTER)
    if found.text is None:
        raise ValueError(f"the cluster has none (HTTP {found.status})")
    return kubeadm_config.parse(found.text.encode())


def _manifest(config: KubeadmConfig, flags: endpoints.Flags) -> Iterator[Finding]:
    """Compare the service range with kubeadm-config, from which the next `kubeadm upgrade` renders the manifest."""
    flag = flags.get(_SERVICE_RANGE, config.service_subnet)
    if flag != config.service_subnet:
        text = f"wanted {_SERVICE_RANGE}={config.service_subnet}, as kubeadm-config has it, found {one_line(flag)}"
        hint = "the next `kubeadm upgrade` writes the manifest from kubeadm-config: make them say the same before"
        yield Finding.warning("manifest-of-kubeadm-config", "kube-apiserver.yaml", text, hint)


def _endpoint(config: KubeadmConfig, settings: Settings) -> Iterator[Finding]:
    """Check that admin.conf names `controlPlaneEndpoint`, if there is one."""
    try:
        found = kubeconfig.parse(read(settings.node.kubeconfig_dir / "admin.conf") or b"").server
    except (BridgeError, UnreadableError):
        return
    if config.endpoint_url and found.rstrip("/") != config.endpoint_url:
        text = f"wanted kubeadm-config's controlPlaneEndpoint, {config.endpoint_url}, found {one_line(found)}"
        hint = "which of the two is right? kubeadm makes new kubeconfigs with the first"
        yield Finding.warning("endpoint-of-kubeadm-config", "admin.conf", text, hint)


def _directory(config: KubeadmConfig, settings: Settings) -> Iterator[Finding]:
    """Compare node.pki_dir with `certificatesDir`, where kubeadm looks for certificates."""
    found, ours = config.certificates_dir, settings.node.pki_dir
    if found and os.path.realpath(found) != os.path.realpath(ours):
        text = f"wanted kubeadm-config's certificatesDir, {one_line(found)}, found {ours}: kubeadm judges other files"
        hint = "which of the two do the manifests name? `kubeadm upgrade` writes them with the first"
        yield Finding.warning("certificates-dir", "node.pki_dir", text, hint)


def _servers(config: KubeadmConfig, node: Node) -> Iterator[Finding]:
    """Compare the serving certificates' flags with kubeadm-config, from which the next `kubeadm upgrade` writes them."""
    for component, spec in SERVERS.items():
        item, is_kept = pairs.served_item(node, component), pairs.is_named_by(config.cluster, component)
        manifest = f"{component.value}.yaml"
        hint = "ca-bridge serving-certs on, on each control-plane node; off takes it out of both"
        if component not in node.manifests or item is None or item.named == is_kept:
            continue
        level: Level = "warning"
        if item.named:
            consequence = "the next `kubeadm upgrade` takes it out"
            text = f"names {item.certificate_path}, and kubeadm-config does not: {consequence}"
        elif item.state == "missing":
            consequence = "after a `kubeadm upgrade` it would not start"
            level, text = "error", f"kubeadm-config names a pair, and {spec.name} is not here: {consequence}"
        else:
            text = "kubeadm-config names a pair, and this manifest does not"
        yield Finding(level, "serving-certificate-of-kubeadm-config", manifest, text, hint)


def _beyond(config: KubeadmConfig, node: Node, settings: Settings, flags: endpoints.Flags) -> Iterator[Finding]:
    """Yield notes about extra SANs and older subjects: a renewal keeps them, but kubeadm would not make them."""
    facts = config.naming_facts(settings.node.name, endpoints.name(flags) or "")
    for item in node.items:
        if item.state == "present" and item.managed and item.spec.listed:
            with contextlib.suppress(kubeadm_names.NoFactError, *UNREADABLE):
                yield from _naming(item, facts)


def _naming(item: Item, facts: kubeadm_names.NamingFacts) -> Iterator[Finding]:
    name, certificate = item.spec.name, item.certificates[0]
    wanted = kubeadm_names.naming(item.spec, facts)
    if more := sorted(san_entries(certificate) - names_of(wanted.sans)):
        names = ", ".join(one_line(f"{kind}:{value}") for kind, value in more[:10])
        text = f"has SANs that kubeadm-config does not: {names}; a renewal keeps them, kubeadm would not make them"
        yield Finding.note("kubeadm-config", name, text)
    if sorted(attributes(certificate.subject)) != sorted(attributes(wanted.subject)):
        text = f"subject of another version; kubeadm {facts.release} makes {wanted.text.partition(' with ')[0]}"
        hint = f"a renewal keeps it; ca-bridge renew {name} --adopt-defaults changes it, if its rights are there"
        yield Finding.note("kubeadm-config", name, text, hint)


def look_at_pairs(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    """Check all further pairs."""
    for item in node.items:
        if item.pair is not None:
            yield from _pair(item, item.pair, node.authorities, settings, now)
    for certificate in late(settings, node, now):
        if certificate.component is None:
            text = f"its program was not seen to use the installed pair: {certificate.what}: {certificate.state}: {certificate.detail}"
            hints = [how(item) for item in node.items if item.spec.name == certificate.certificate]
            yield Finding.warning("not-in-use", certificate.certificate, text, *hints)


def _pair(
    item: Item, pair: PairSettings, authorities: Sequence[AuthorityState], settings: Settings, now: datetime
) -> Iterator[Finding]:
    name, text = pair.name, item.trouble or f"there is no certificate in {item.certificate_path}"
    if item.obstacle is not None:
        yield from_error("not-replaceable", name, item.obstacle)
    if item.state == "missing":
        hint = f"the next run makes it; so does `ca-bridge renew {name}`"
        yield Finding.warning("certificate-missing", name, text, hint)
    elif item.state != "present":
        hint = f"does [certificate.{name}] name the right file? Move it away, and `ca-bridge renew {name}` makes it"
        yield Finding.error(f"certificate-{item.state}", name, text, hint)
    else:
        yield end(item, settings, now)
        if item.unlike is not None:
            hint = "the next run requests a certificate as the settings say"
            yield Finding.warning("pair-differs", name, item.unlike, hint)
        else:
            yield from chain(item, authorities)
        yield from key_of(item)
        if (lost := pairs.lost_copy(item)) is not None:
            yield Finding.warning("pair-differs", name, lost, "the next run makes a new pair for all places")
        for files in pair.places:
            yield from _key_file(name, files)
    if pair.static_pod is not None and not pod_name(pair.static_pod):
        yield Finding.error("pair-reload", name, f"there is no manifest of a static pod in {pair.static_pod}")
    if words := command_words(pair.reload):
        yield from _program("pair-reload", name, words)


def _key_file(name: str, files: PairFiles) -> Iterator[Finding]:
    """Check that the key is closed to others, and belongs to the owner that the settings name."""
    try:
        status = files.key_file.stat()
        wanted = pairs.account(files.owner) if files.owner else (status.st_uid, status.st_gid)
    except (OSError, LookupError):
        return  # `key_of` reports it
    mode = stat.S_IMODE(status.st_mode)
    if mode & ~MOST_OF_A_KEY:
        text = f"{files.key_file}: wanted it for its owner, and perhaps a group that reads it, found mode {mode:04o}"
        hint = f"chmod 640 {files.key_file}; renew {name} if another user may have read it"
        yield Finding.error("open-secret", name, text, hint)
    if (status.st_uid, status.st_gid) != wanted:
        text = f"{files.key_file}: wanted owner {files.owner}, found {status.st_uid}:{status.st_gid}"
        yield Finding.warning("pair-owner", name, text, f"chown {files.owner} {files.key_file}; a renewal does it, too")
