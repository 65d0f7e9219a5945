"""A component's checks: the certificates it shows, the servers that accept its own, and whether it is older than a file."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote

from cryptography import x509

from bridge.cluster import ANONYMOUS, Client, of_kubeconfig
from bridge.control_plane import KUBELET_COPY, readers, reloading
from bridge.control_plane.probes import (
    Check,
    Etcd,
    RefusedError,
    Serving,
    Verdict,
    accepted,
    ask_all,
    first,
    text_of,
)
from bridge.node import endpoints, kubelet, manifests, processes
from bridge.node.endpoints import Address, Flags, Server
from bridge.node.inventory import Item, Node
from bridge.node.kubelet import KUBELET_CONFIG
from bridge.node.manifests import TLS_CERTIFICATE, TLS_KEY
from bridge.node.processes import Written, file_contents
from bridge.node.yamltree import document, split_bom
from bridge.pki.certificates import common_names, san_entries, serial_hex
from bridge.settings.tables import Settings
from bridge.specs import CA, ETCD_CA, KUBELET_CONF, KUBELET_SERVER, SERVERS, SPECS, Authority, Component
from bridge.state import Store
from bridge.state.install import written_file
from bridge.system import paths
from bridge.system.state_file import StateError
from bridge.system.tls import HttpsError, UnreachableError

_CLIENT_URLS = ("--listen-client-urls", endpoints.ETCD_HTTP_ONLY)

#: The user that we pose as with the front-proxy client certificate; no user of a cluster has this name.
_SOMEBODY = "ca-bridge-prove"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The state that all checks of one look share."""

    node: Node
    settings: Settings
    now: datetime
    #: Paths that are the same on every node; tests change them.
    proc: Path = processes.PROC
    kubelet_config: Path = KUBELET_CONFIG
    kubelet_copy: Path = KUBELET_COPY

    def item(self, name: str) -> Item | None:
        """Return a certificate that exists and can be read."""
        return next((i for i in self.node.items if i.spec.name == name and i.state == "present"), None)

    def anchor(self, authority: Authority) -> Path | None:
        """Return the CA file of an authority."""
        return next((state.path for state in self.node.authorities if state.authority == authority), None)

    @property
    def written(self) -> dict[str, Written]:
        """The times of our writes, by path."""
        with contextlib.suppress(StateError):  # unreadable now: the files' ctime counts instead
            return written_file(Store(self.settings.node.state_dir)).read() or {}
        return {}

    @property
    def reloads(self) -> frozenset[Component]:
        """Components that are known to reload their certificates."""
        return reloading(self.node, self.settings.node, self.proc)


def of(look: Look) -> Iterator[Check]:
    """Yield all checks: each component's serving and client certificates, people's kubeconfigs, then further pairs."""
    yield from _absent(look)
    yield from _unusable(look)
    for component, make in (
        (Component.ETCD, _etcd),
        (Component.APISERVER, _apiserver),
        (Component.CONTROLLER_MANAGER, functools.partial(_controller, component=Component.CONTROLLER_MANAGER)),
        (Component.SCHEDULER, functools.partial(_controller, component=Component.SCHEDULER)),
        (Component.KUBELET, _kubelet),
        (None, _named_otherwise),
        (None, _without_flags),
        (None, _have_read_cas),
        (None, _people),
    ):
        try:
            yield from make(look)
        except (ValueError, paths.UnreadableError) as e:  # a flag that can't be used
            source = "configuration" if component is Component.KUBELET else "manifest"
            judge = functools.partial(Verdict, "unknown", f"its {source}: {e}")
            yield Check(component, "", "is configured", judge)
    yield from of_pairs(look.node, look.now)


def of_pairs(node: Node, now: datetime) -> Iterator[Check]:
    """Yield a check of each further pair that is on disk and whose server can be asked."""
    for item in node.items:
        if item.state == "present" and (check := of_pair(item, now)) is not None:
            yield check


def of_pair(item: Item, now: datetime) -> Check | None:
    """Check whether the server that the settings name shows the pair on disk; None: they name no server."""
    pair = item.pair
    if pair is None or pair.place is None:
        return None
    serving = Serving(
        component=item.spec.component,
        certificate=pair.name,
        file=item.certificate_path,
        key_file=item.key_path or item.certificate_path,
        trust_file=item.anchor_path,
        name=pair.shown_name,
        asks_for=pair.shown_name,
        mutual="client" in pair.usages,
    )
    return serving.at(Address(*pair.place), now)


def _absent(look: Look) -> Iterator[Check]:
    """Report components whose certificates are on this node, and whose manifest is not."""
    for component in manifests.COMPONENTS:
        here = [item.spec for item in look.node.items if item.state == "present"]
        names = [spec.name for spec in here if spec.component is component]
        if names and component not in look.node.manifests:
            path = manifests.path_of(component, look.settings.node.kubeconfig_dir)
            trouble = next((t for t in look.node.troubles if t.startswith(f"{component.value}: ")), "")
            detail = trouble.partition(": ")[2] or f"there is no manifest {path}"
            yield Check(component, names[0], "runs", functools.partial(Verdict, "no-answer", detail))


def _unusable(look: Look) -> Iterator[Check]:
    """Report unusable kubeconfigs, and unusable certificates without a component: no other check would."""
    for item in look.node.items:
        if item.trouble and (item.spec.kubeconfig or item.spec.component is None):
            judge = functools.partial(Verdict, "unknown", item.trouble)
            yield Check(item.spec.component, item.spec.name, "can be read", judge)


def _named_otherwise(look: Look) -> Iterator[Check]:
    """Report certificates in whose place a manifest names another file: the component's checks see only that file."""
    for item in look.node.items:
        component = item.spec.component
        if component is None or component not in look.node.manifests or item.state != "present" or item.foreign:
            continue
        ours = look.settings.node.kubeconfig_dir / item.spec.base if item.spec.kubeconfig else item.certificate_path
        for flag in item.spec.flags:
            named = endpoints.file(look.node.flags(component), flag)
            if named is not None and os.path.realpath(named) != os.path.realpath(ours):
                judge = functools.partial(
                    Verdict, "unknown", f"its manifest has {flag}={named}, and does not use {ours}"
                )
                yield Check(component, item.spec.name, "is named in its manifest", judge)


def by_files(look: Look) -> Iterator[Check]:
    """Yield the checks without a connection: whether components are younger than files that they read at the start."""
    for component in (Component.CONTROLLER_MANAGER, Component.SCHEDULER):
        if component in look.node.manifests:
            yield from _has_read(look, component)
    if processes.running(Component.KUBELET.value, look.proc):  # the kubelet is never in a container
        yield from _kubelet_has_read(look)
    yield from _have_read_cas(look)
    for component in _READ_PAIRS:
        yield from _has_read_pairs(look, component)


_READ_PAIRS = (Component.ETCD, Component.APISERVER)


def _has_read_pairs(look: Look, component: Component) -> Iterator[Check]:
    """Check whether a component is younger than its certificates' files, or reloads them."""
    for item in look.node.items if component in look.node.manifests else ():
        if item.spec.component is component and item.state == "present":
            judge = functools.partial(_read_at_connections, look, component, item.certificate_path)
            yield Check(component, item.spec.name, f"has read {item.certificate_path}", judge)


def _without_flags(look: Look) -> Iterator[Check]:
    """Check by age components whose manifests name no certificate, since a shell or a configuration file does."""
    for component in _READ_PAIRS:
        known = {flag for item in look.node.items if item.spec.component is component for flag in item.spec.flags}
        if not known & look.node.flags(component).keys():
            yield from _has_read_pairs(look, component)


def _have_read_cas(look: Look) -> Iterator[Check]:
    """Check whether components are younger than the CA files that we replaced; changes by others need not count."""
    written = look.written
    conf = look.settings.node.kubeconfig_dir / SPECS[KUBELET_CONF].base
    for component, path, name in (*readers(look.node), (Component.KUBELET, conf, KUBELET_CONF)):
        if os.path.realpath(path) in written:
            judge = functools.partial(_read_once, look, component, path)
            yield Check(component, name, f"has read the CAs of {path}", judge)


def _read_once(look: Look, component: Component, path: Path, by: Sequence[Path] = ()) -> Verdict:
    """Judge a file that a component reads only at its start; `by` are files that refer to it."""
    age = processes.compare_age(component, path, look.proc, look.written, by=by)
    if age.older is None:
        return Verdict("unknown", age.detail)
    return Verdict("stale" if age.older else "current", age.detail)


def _read_at_connections(look: Look, component: Component, path: Path) -> Verdict:
    """Judge a valid file that a component reads for each connection, if its version is known to do so."""
    verdict = _read_once(look, component, path)
    if verdict.state != "current" and component in look.reloads:
        return Verdict("next-connection", verdict.detail)
    if verdict.state != "stale":
        return verdict
    return Verdict("stale", f"{verdict.detail}; this version is not known to read it again")


def _etcd(look: Look) -> Iterator[Check]:
    flags = look.node.flags(Component.ETCD)
    anchor = look.anchor(ETCD_CA)
    for name, listen, advertised, prefix in (
        ("etcd-server", _CLIENT_URLS, "--advertise-client-urls", ""),
        ("etcd-peer", ("--listen-peer-urls",), "--initial-advertise-peer-urls", "peer-"),
    ):
        if f"--{prefix}cert-file" not in flags:
            continue
        serving = Serving(
            component=Component.ETCD,
            certificate=name,
            file=endpoints.wanted_file(flags, f"--{prefix}cert-file"),
            key_file=endpoints.wanted_file(flags, f"--{prefix}key-file"),
            trust_file=endpoints.file(flags, f"--{prefix}trusted-ca-file") or anchor,
            name=endpoints.host(flags, advertised),
            mutual=True,
        )
        places = endpoints.listening(flags, listen, advertised)
        yield from (serving.at(place, look.now) for place in places)
        if places and prefix:
            yield Check(Component.ETCD, name, "is accepted by its peers", functools.partial(_etcd_peer, look, serving))
        elif places:  # etcd is also its own client with its serving certificate (etcd-io/etcd#9785)
            judge = functools.partial(_etcd_client, serving.as_client, _own_etcd(flags))
            yield Check(Component.ETCD, name, "is accepted by etcd", judge)


def _own_etcd(flags: Flags) -> list[Server]:
    listen = endpoints.ETCD_HTTP_ONLY if endpoints.ETCD_HTTP_ONLY in flags else _CLIENT_URLS[0]
    places = endpoints.listening(flags, (listen,), "--advertise-client-urls")
    name = endpoints.host(flags, "--advertise-client-urls")
    return [Server(f"https://{place}", name) for place in places]


def _linearizable_read(client: Client, servers: Sequence[Server]) -> str:
    """Make a read that needs a quorum, as `etcdctl endpoint health` does."""
    body = json.dumps({"key": base64.b64encode(b"health").decode()}).encode()
    return accepted(ask_all(client, servers, "/v3/kv/range", method="POST", body=body))


def _etcd_client(client: Callable[[], Client], servers: Sequence[Server]) -> Verdict:
    return Verdict("current", _linearizable_read(client(), servers))


def _etcd_peer(look: Look, serving: Serving) -> Verdict:
    """Check that etcd's peers, itself included, accept the certificate; hanging up after showing its own is refusal."""
    client, silent, answered = serving.as_client(), [], []
    for server in _members(look):
        try:
            ask_all(client, [server], "/members")
            answered.append(server.url)
        except UnreachableError as e:
            if _shows_a_certificate(server):
                raise RefusedError(f"{server.url} ends the connection once it has seen it: {e}") from None
            silent.append(str(e))
    if not answered:
        raise UnreachableError("; ".join(silent))
    return Verdict("current", "; ".join([f"accepted by {', '.join(answered)}", *silent]))


def _members(look: Look) -> list[Server]:
    """Return the members of the etcd cluster, by their peer addresses."""
    flags = look.node.flags(Component.ETCD)
    trust = endpoints.file(flags, "--trusted-ca-file") or look.anchor(ETCD_CA)
    client = Client.of(endpoints.wanted_file(flags, "--cert-file"), endpoints.wanted_file(flags, "--key-file"), trust)
    silent = []
    for server in _own_etcd(flags):
        try:
            members = Etcd([client]).members(server)
        except UnreachableError as e:
            silent.append(f"{server.url}: {e}")
            continue
        urls = [url for member in members for url in member.peer_urls]
        return [Server(url.rstrip("/")) for url in urls if url.startswith("https://")]
    raise UnreachableError("; ".join(silent) or "no server is known")


def _shows_a_certificate(server: Server) -> bool:
    try:
        ANONYMOUS.served(server.place)
    except HttpsError:
        return False
    return True


def _apiserver(look: Look) -> Iterator[Check]:
    flags = look.node.flags(Component.APISERVER)
    if "--tls-cert-file" in flags:
        serving = Serving(
            component=Component.APISERVER,
            certificate="apiserver",
            file=endpoints.wanted_file(flags, "--tls-cert-file"),
            key_file=endpoints.wanted_file(flags, "--tls-private-key-file"),
            trust_file=look.anchor(CA) if endpoints.name(flags) else None,
            name=endpoints.name(flags),
        )
        for place in endpoints.bound(Component.APISERVER, flags):
            yield serving.at(place, look.now)
    for name, key_flag, trust_flag, what, ask in (
        ("apiserver-etcd-client", "--etcd-keyfile", "--etcd-cafile", "is accepted by etcd", _ask_etcd),
        ("apiserver-kubelet-client", "--kubelet-client-key", "--kubelet-certificate-authority",
         "is accepted by the kubelet", _ask_kubelet),
        ("front-proxy-client", "--proxy-client-key-file", "", "is accepted as a front proxy", _ask_as_front_proxy),
    ):  # fmt: skip
        certificate = endpoints.file(flags, SPECS[name].flags[0])
        if certificate is not None:
            pair = (certificate, endpoints.wanted_file(flags, key_flag), endpoints.file(flags, trust_flag))
            judge = functools.partial(_apiserver_as_client, look, *pair, ask)
            yield Check(Component.APISERVER, name, what, judge)


def _apiserver_as_client(
    look: Look, certificate: Path, key: Path, trust: Path | None, ask: Callable[[Look, Client], str]
) -> Verdict:
    by = ask(look, Client.of(certificate, key, trust))
    verdict = _read_at_connections(look, Component.APISERVER, certificate)
    return Verdict(verdict.state, f"{by}; {verdict.detail}")


def _api(look: Look, name: str | None = None) -> list[Server]:
    """Return this node's API server; none without its manifest."""
    flags = look.node.flags(Component.APISERVER)
    places = endpoints.bound(Component.APISERVER, flags) if flags else []
    return [Server(f"https://{place}", name or endpoints.name(flags)) for place in places[-1:]]


def _ask_etcd(look: Look, client: Client) -> str:
    """Ask the API server's etcd servers or, where those do not speak HTTP, this node's etcd."""
    etcd = look.node.flags(Component.ETCD)
    if endpoints.ETCD_HTTP_ONLY in etcd:
        return _linearizable_read(client, _own_etcd(etcd))
    urls = endpoints.urls(look.node.flags(Component.APISERVER), "--etcd-servers")
    return _linearizable_read(client, [Server(url) for url in urls])


def _ask_kubelet(look: Look, client: Client) -> str:
    """Ask the kubelet for a line of a log, as `kubectl logs` does; "no such pod" also counts as an answer."""
    server = Server(f"https://{_kubelet_place(look)}")
    path = f"/containerLogs/kube-system/kube-apiserver-{look.settings.node.node_name}/kube-apiserver?tailLines=1"
    return accepted(ask_all(client, [server], path))


def _kubelet_place(look: Look) -> Address:
    """Return the kubelet's address and port from its configuration, or its defaults."""
    root = kubelet.configuration(look.kubelet_config)
    found = {} if root is None else kubelet.values(root, ("address", "port"))
    address, port = found.get("address", ""), int(found.get("port") or endpoints.PORTS[Component.KUBELET])
    own = look.node.flags(Component.APISERVER).get("--advertise-address", "127.0.0.1")
    return Address(own if endpoints.is_any(address) else address, port)


def _ask_as_front_proxy(look: Look, client: Client) -> str:
    """Pose as another user by the front proxy's headers; the API server names that user in its answer (from 1.28 on)."""
    flags = look.node.flags(Component.APISERVER)
    trust = look.anchor(CA)
    known = dataclasses.replace(client, trust_pem=None if trust is None else file_contents(trust))
    user = flags.get("--requestheader-username-headers", "X-Remote-User").split(",")[0]
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    path, body = "/apis/authentication.k8s.io/v1/selfsubjectreviews", json.dumps(review).encode()
    answers = ask_all(known, _api(look), path, method="POST", body=body, headers={user: _SOMEBODY})
    ((url, answer),) = answers.items()
    if answer.status == HTTPStatus.UNAUTHORIZED or _SOMEBODY.encode() not in answer.body:
        raise RefusedError(f"{url} does not take it for a front proxy: HTTP {answer.status}: {text_of(answer)}")
    return f"accepted by {url}"


def _controller(look: Look, component: Component) -> Iterator[Check]:
    flags = look.node.flags(component)
    item = look.item(SERVERS[component].name)
    file = endpoints.file(flags, TLS_CERTIFICATE)
    for place in endpoints.bound(component, flags) if flags else ():
        if file is not None:
            key = endpoints.wanted_file(flags, TLS_KEY)
            yield _component_serving(component, item, file, key, place).at(place, look.now)
            continue
        name = "(its own)" if item is None else item.spec.name
        yield Check(component, name, f"serves {place}", functools.partial(_self_made, place, item))
    if flags:
        yield from _kubeconfig(look, _conf_of(component))
    if component in look.node.manifests:
        yield from _has_read(look, component)


def _component_serving(component: Component, item: Item | None, file: Path, key: Path, place: Address) -> Serving:
    """Describe the pair that a manifest names; if the cluster's CA signed it, one of its own names is verified."""
    known = sorted(san_entries(item.certificates[0])) if item is not None and not item.foreign else []
    names = [value for _, value in known]
    return Serving(
        component=component,
        certificate=str(file) if item is None else item.spec.name,
        file=file,
        key_file=key,
        trust_file=item.anchor_path if item is not None and names else None,
        name=None if not names or place.host in names else names[0],
    )


def _conf_of(component: Component) -> str:
    return f"{component.value.removeprefix('kube-')}.conf"


def _has_read(look: Look, component: Component) -> Iterator[Check]:
    """Check the kubeconfigs that a component reads at its start, and the certificate file that they refer to."""
    name, flags = _conf_of(component), look.node.flags(component)
    item = look.item(name)
    confs = [path for flag in SPECS[name].flags if (path := endpoints.file(flags, flag)) is not None]
    by = list(confs)
    if not confs and item is not None:  # its configuration may name it; a process without either can't be judged
        confs = [look.settings.node.kubeconfig_dir / item.spec.base]
        config = endpoints.file(flags, "--config")
        by = [config] if config is not None and _client_kubeconfig(config) == str(confs[0]) else []
    referred = [] if item is None or item.embedded else [item.certificate_path]
    for path in dict.fromkeys([*confs, *referred]):
        judge = functools.partial(_read_once, look, component, path, by)
        yield Check(component, name, f"has read {path}", judge)


def _client_kubeconfig(config: Path) -> str:
    """Return the kubeconfig that a component's configuration file names; empty: it can't be read, or names none."""
    try:
        connection = document(split_bom(file_contents(config))[1]).get("clientConnection")
        named = connection.get("kubeconfig") if connection is not None else None
        return named.text() if named is not None else ""
    except (paths.UnreadableError, ValueError):
        return ""


def _self_made(place: Address, item: Item | None) -> Verdict:
    served = ANONYMOUS.served(place)
    detail = f"made by the program at its start, serial {serial_hex(served)}: no {TLS_CERTIFICATE}"
    if item is None or item.foreign:
        return Verdict("not-ours", detail)
    return Verdict("stale", f"{detail}; a restart puts {item.certificate_path} into its manifest")


def _kubelet(look: Look) -> Iterator[Check]:
    yield from _kubelet_serving(look)
    yield from _kubeconfig(look, KUBELET_CONF)
    yield from _kubelet_has_read(look)


def _kubelet_has_read(look: Look) -> Iterator[Check]:
    item = look.item(KUBELET_CONF)
    if item is not None:
        what = f"has read {item.certificate_path}"
        yield Check(Component.KUBELET, item.spec.name, what, lambda: _kubelet_pair(look, item))


def _kubelet_serving(look: Look) -> Iterator[Check]:
    """Check the kubelet's serving certificate, for logs, metrics and shells; a self-signed one has no check."""
    item = look.item(KUBELET_SERVER)
    if item is None or item.foreign or item.key_path is None:
        return
    name, file, key = item.spec.name, item.certificate_path, item.key_path
    serving = Serving(component=Component.KUBELET, certificate=name, file=file, key_file=key)
    yield serving.at(_kubelet_place(look), look.now)


def _kubelet_pair(look: Look, item: Item) -> Verdict:
    """Judge the pair that a kubelet uses: with `rotateCertificates` its own copy of kubelet.conf's pair, or a younger one."""
    if not item.managed or (item.rotates and _was_written_by_a_kubelet(item.certificate_path)):
        return Verdict("not-ours", f"{item.certificate_path} is rotated by the kubelet itself")
    ours, copy = item.certificates[0], look.kubelet_copy
    if item.embedded and (data := paths.read(copy)) is not None and (used := first(copy, data)) != ours:
        if is_rotated(copy, used, item.certificate_path, ours):
            return Verdict("not-ours", f"uses {copy}, which is younger, and rotated by the kubelet itself")
        detail = f"uses its copy {copy}, serial {serial_hex(used)}; {item.certificate_path} has {serial_hex(ours)}"
        return Verdict("stale", f"{detail}: the copy must go before the restart")
    conf = look.settings.node.kubeconfig_dir / item.spec.base
    verdict = _read_once(look, Component.KUBELET, item.certificate_path, [conf])
    if verdict.state != "stale" or item.embedded or item.rotates:
        return verdict
    # without `rotateCertificates` a kubelet reads the file every five minutes, once its kubeconfig refers to one
    if processes.compare_age(Component.KUBELET, conf, look.proc, look.written).older:
        return verdict
    return Verdict("next-connection", verdict.detail)


_DATED = re.compile(r"kubelet-client-(\d{4}(?:-\d\d){5})\.pem")


def _was_written_by_a_kubelet(path: Path) -> bool:
    """Whether the kubelet wrote the file: its name is the local time then; a file that we replace keeps its name."""
    real = path.resolve()
    if file_contents(real).startswith(kubelet.OURS):
        return False
    if (name := _DATED.fullmatch(real.name)) is None:
        return False
    written = datetime.fromtimestamp(real.stat().st_mtime)  # noqa: DTZ006 (local, as in the name)
    named = datetime.strptime(name[1], "%Y-%m-%d-%H-%M-%S")  # noqa: DTZ007
    return abs((written - named).total_seconds()) <= _WRITING_SECONDS


#: The longest time from naming a file to the end of writing it, on a busy disk.
_WRITING_SECONDS = 60.0


def is_rotated(copy: Path, used: x509.Certificate, kubelet_conf: Path, anchor: x509.Certificate) -> bool:
    """Whether a kubelet's copy is younger than kubelet.conf and its certificate, and so from a signer in the cluster."""
    is_later = copy.stat().st_mtime > kubelet_conf.stat().st_ctime
    return is_later and used.not_valid_before_utc > anchor.not_valid_before_utc


def _kubeconfig(look: Look, name: str) -> Iterator[Check]:
    """Check a kubeconfig's client certificate with requests that its owner depends on."""
    item = look.item(name)
    if item is not None and (look.node.flags(Component.APISERVER) or look.node.is_worker):
        yield Check(item.spec.component, name, "is accepted by the API server", lambda: _ask_api(look, item))


def _ask_api(look: Look, item: Item) -> Verdict:
    """Ask this node's API server, whose certificate must be valid for the server's name in the kubeconfig."""
    path = look.settings.node.kubeconfig_dir / item.spec.base
    client, server = of_kubeconfig(path, file_contents(path), item.anchor_path)
    end = first(path, client.certificate_pem or b"").not_valid_after_utc
    servers = [server] if look.node.is_worker else _api(look, server.name or server.place.host)
    by = [accepted(ask_all(client, servers, need)) for need in _needs(look, item)]
    return Verdict("current", f"{by[0]}, until {processes.moment_text(end)}")


def _needs(look: Look, item: Item) -> list[str]:
    """Return URL paths that a kubeconfig's owner reads, under two roles: its lease and the objects that it works on."""
    component = item.spec.component
    if component is None:
        return ["/api/v1/namespaces/kube-system"]
    if component is Component.KUBELET:
        node = "".join(common_names(item.certificates[0].subject)[-1:]).removeprefix("system:node:")
        return [_lease("kube-node-lease", node), f"/api/v1/nodes/{quote(node)}"]
    flags = look.node.flags(component)
    namespace = flags.get("--leader-elect-resource-namespace", "kube-system")
    return [_lease(namespace, flags.get("--leader-elect-resource-name", component.value)), "/api/v1/nodes?limit=1"]


def _lease(namespace: str, name: str) -> str:
    return f"/apis/coordination.k8s.io/v1/namespaces/{quote(namespace)}/leases/{quote(name)}"


def _people(look: Look) -> Iterator[Check]:
    """Check the certificates that no component uses."""
    servers = _own_etcd(look.node.flags(Component.ETCD))
    for name in ("etcd-healthcheck-client", "apiserver-etcd-client"):
        item = look.item(name)
        if item is not None and item.spec.component is None and item.key_path is not None and servers:
            client = functools.partial(Client.of, item.certificate_path, item.key_path, item.anchor_path)
            yield Check(None, name, "is accepted by etcd", functools.partial(_etcd_client, client, servers))
    for name in ("admin.conf", "super-admin.conf"):
        yield from _kubeconfig(look, name)
