"""
A control plane that runs, in external-CA mode, renewed through a mix of the three CAs.

Nothing of it is taken on trust: the certificate of each connection is looked at from its other end.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from bridge.pki.certificates import fingerprint
from bridge.specs import AUTHORITIES, Component
from tests.kit import looking, nodes
from tests.kit.cas import add_cfssl, add_openssl, add_vault, live_certificates
from tests.kit.looking import API_PORT, ETCD_PEER_PORT, ETCD_PORT, Audit, Extension, Traffic, served, traffic
from tests.kit.node import AT_ONCE, Node
from tests.kit.nodes import NodeBridge, NodePki, wait_for
from tests.kit.openbao import OpenBao
from tests.kit.pki import PKI_SPECS

pytestmark = [pytest.mark.node, pytest.mark.kube("cfssl"), pytest.mark.slow]

NAME, IP = f"renew-{os.getpid()}", "198.18.77.110"

CAS = {"ca": "vault", "etcd-ca": "openssl", "front-proxy-ca": "cfssl"}
#: The user that the API server sees for each reader of a kubeconfig.
USERS = {
    Component.CONTROLLER_MANAGER: ("controller-manager.conf", "system:kube-controller-manager"),
    Component.SCHEDULER: ("scheduler.conf", "system:kube-scheduler"),
    Component.KUBELET: ("kubelet.conf", f"system:node:{NAME}"),
}
#: The user that the kubelet sees for the API server.
KUBELET_CLIENT = "kube-apiserver-kubelet-client"


@dataclass(frozen=True, kw_only=True)
class Site:
    """A node before its renewal, and all that belongs to it."""

    node: Node
    audit: Audit
    extension: Extension
    bridge: NodeBridge
    certificates: dict[str, x509.Certificate]
    containers: dict[Component, str]


@dataclass(frozen=True, kw_only=True)
class Renewal:
    """What `renew all` did."""

    run: subprocess.CompletedProcess[str]
    done: datetime
    traffic: Traffic  #: While it ran, and until the API server showed a new certificate.
    certificates: dict[str, x509.Certificate]
    served: dict[Component, set[str]]  #: Fingerprints of what a component showed afterwards, before any restart.


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """The restarts that the program's message asked for."""

    at: dict[Component, datetime]  #: When the old process was gone and the new one not yet there.
    shown_before: dict[Component, set[str]]  #: Fingerprints of what it showed from the renewal to its restart, if any.
    traffic: Traffic


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, bao: OpenBao) -> Iterator[Site]:
    """The node, its CAs, and who looks on."""
    directory = tmp_path_factory.mktemp("site")
    audit, keys = Audit(directory=directory / "audit"), directory / "ca-keys"
    with ExitStack() as stack:
        node = stack.enter_context(Node.up(NAME, IP, ca_dir=keys, cluster=audit.cluster(), kubelet=AT_ONCE))
        nodes.make_ready(node)
        pki = NodePki(root=node.root, external=True, keys=keys)
        bridge = NodeBridge(pki=pki, directory=directory / "bridge", node=node)
        add_vault(bridge, bao, "ca", NAME)  # these three as in CAS
        add_openssl(bridge, "etcd-ca")
        stack.enter_context(add_cfssl(bridge, "front-proxy-ca"))
        yield Site(
            node=node,
            audit=audit,
            extension=stack.enter_context(looking.extension(node, directory / "extension")),
            bridge=bridge,
            certificates=live_certificates(pki),
            containers=nodes.containers(node),
        )


@pytest.fixture(scope="module")
def renewal(site: Site) -> Renewal:
    """One `ca-bridge renew all`, while a client works."""
    assert site.extension.ask() == fingerprint(site.certificates["front-proxy-client"])
    with traffic(site.node) as seen:
        wait_for("a busy client", lambda: seen.turns > 3)
        run = site.bridge.run("renew", "all")
        done = datetime.now(UTC)
        assert run.returncode == 0, run.stderr
        new = live_certificates(site.bridge.pki)
        wait_for("the API server's new certificate", lambda: new["apiserver"] in seen.served)
    proxy = fingerprint(new["front-proxy-client"])
    wait_for("its new client certificate", lambda: site.extension.ask() == proxy)  # which it reads by itself as well
    etcd = {served(site.node, port, "etcd-healthcheck-client") for port in (ETCD_PORT, ETCD_PEER_PORT)}
    return Renewal(
        run=run,
        done=done,
        traffic=seen,
        certificates=new,
        served={
            Component.APISERVER: {fingerprint(seen.served[-1]), site.extension.ask()},
            Component.ETCD: {fingerprint(certificate) for certificate in etcd},
        },
    )


@pytest.fixture(scope="module")
def restarts(site: Site, renewal: Renewal) -> Restarts:
    """The renewal's message, followed by the letter."""
    at: dict[Component, datetime] = {}
    seen_as = {c: functools.partial(site.audit.certificates_of, user, renewal.done) for c, (_, user) in USERS.items()}
    with traffic(site.node) as seen:
        for component, sentence in advice(renewal.run.stdout).items():
            if component in USERS:
                wait_for(f"requests by {component.value}", seen_as[component])
                at[component] = restart(site.node, component, sentence)
    shown = {component: certificates(at.get(component)) for component, certificates in seen_as.items()}
    return Restarts(at=at, shown_before=shown, traffic=seen)


def restart(node: Node, component: Component, sentence: str) -> datetime:
    """Do what a sentence of the message says; when the old process was gone and the new one not yet there."""
    if component is Component.KUBELET:
        for path in re.findall(r"remove (/\S+)", sentence):
            node.exec("rm", path)
        return nodes.restart_kubelet(node)
    manifest, list_pods = re.findall(r"move (\S+) out .*\((crictl .*)\), move it back", sentence)[0]
    return nodes.restart_static_pod(node, manifest, list_pods.split())


def advice(output: str) -> dict[Component, str]:
    """What to restart, in order, and how, from the output of a renewal."""
    lines = re.findall(r"^  ([a-z-]+): (.*)$", output, re.MULTILINE)
    return {Component(name): sentence for name, sentence in lines}


def test_every_certificate_is_new(site: Site, renewal: Renewal) -> None:
    """All twelve, each by the CA of its authority, with no CA key on the node."""
    assert set(renewal.certificates) == set(site.certificates) == set(PKI_SPECS)
    signers = dict(re.findall(r"^(\S+) +until .* by \S+ \((\w+)\)$", renewal.run.stdout, re.MULTILINE))
    assert signers == {name: CAS[spec.authority.name] for name, spec in PKI_SPECS.items()}
    new, old = renewal.certificates.values(), site.certificates.values()
    assert not {one.serial_number for one in new} & {one.serial_number for one in old}
    assert not [name for name, files in AUTHORITIES.items() if (site.node.pki_dir / files.key_file).exists()]


def test_no_client_notices(renewal: Renewal, restarts: Restarts, site: Site) -> None:
    """No request fails while files are replaced and components restarted; new connections see one change."""
    assert renewal.traffic.errors == restarts.traffic.errors == []
    assert renewal.traffic.served == [site.certificates["apiserver"], renewal.certificates["apiserver"]]
    assert restarts.traffic.turns > 3
    assert restarts.traffic.served == [renewal.certificates["apiserver"]]


def test_api_server_and_etcd_serve_the_new_certificates_without_a_restart(
    site: Site, renewal: Renewal, restarts: Restarts
) -> None:
    """On all ports, to clients with new certificates; the containers are the same ones at the end."""
    node, new = site.node, renewal.certificates
    assert restarts.at
    assert served(node, API_PORT, "admin.conf") == new["apiserver"]
    assert served(node, ETCD_PORT, "etcd-healthcheck-client") == new["etcd-server"]
    assert served(node, ETCD_PORT, "apiserver-etcd-client") == new["etcd-server"]
    assert served(node, ETCD_PEER_PORT, "etcd-healthcheck-client") == new["etcd-peer"]
    for component in (Component.APISERVER, Component.ETCD):
        assert nodes.containers(node)[component] == site.containers[component]


def test_names_what_still_runs_on_old_certificates(site: Site, renewal: Renewal, restarts: Restarts) -> None:
    """The components that are named are those that were seen with an old certificate afterwards, and no other."""
    old = set(map(fingerprint, site.certificates.values()))
    seen = renewal.served | restarts.shown_before
    stale = {component for component, shown in seen.items() if shown & old}
    assert set(advice(renewal.run.stdout)) == stale
    assert stale == {Component.CONTROLLER_MANAGER, Component.SCHEDULER, Component.KUBELET}
    assert set(seen) == set(Component)


@pytest.mark.parametrize("component", [Component.CONTROLLER_MANAGER, Component.SCHEDULER])
def test_comes_up_on_the_new_kubeconfig(site: Site, renewal: Renewal, restarts: Restarts, component: Component) -> None:
    """A new container, healthy, at work (it holds its lease), and known by its new certificate alone."""
    name, user = USERS[component]
    since = restarts.at[component]
    wait_for("a renewed lease", lambda: nodes.lease_renewed(site.node, "kube-system", component.value) > since)
    assert site.audit.certificates_of(user, since) == {fingerprint(renewal.certificates[name])}
    wait_for("its good health", lambda: nodes.is_healthy(site.node, component))
    assert nodes.containers(site.node)[component] != site.containers[component]


def test_kubelet_stays_ready(site: Site, restarts: Restarts) -> None:
    """After its restart it renews its lease, and its node is Ready."""
    since = restarts.at[Component.KUBELET]
    wait_for("a renewed lease", lambda: nodes.lease_renewed(site.node, "kube-node-lease", NAME) > since)
    wait_for("a node that is Ready", lambda: nodes.is_ready(site.node))


def test_kubelet_is_known_by_its_new_certificate(site: Site, renewal: Renewal, restarts: Restarts) -> None:
    """After its restart it shows the certificate of the new kubelet.conf, and no other."""
    name, user = USERS[Component.KUBELET]
    since = restarts.at[Component.KUBELET]
    wait_for("requests by the kubelet", lambda: site.audit.certificates_of(user, since))
    assert site.audit.certificates_of(user, since) == {fingerprint(renewal.certificates[name])}


def test_api_server_comes_to_the_kubelet_with_its_new_certificate(
    site: Site, renewal: Renewal, restarts: Restarts
) -> None:
    """`kubectl logs` of a static pod works through the API server that was not restarted."""
    since = restarts.at[Component.KUBELET]
    logs = ("logs", "-n", "kube-system", f"kube-scheduler-{NAME}")
    wait_for("logs", lambda: "lease" in site.node.kubectl(*logs, check=False).stdout)
    shown = site.audit.certificates_of(KUBELET_CLIENT, since)
    assert shown == {fingerprint(renewal.certificates["apiserver-kubelet-client"])}


def test_api_server_comes_to_an_extension_with_its_new_certificate(site: Site, renewal: Renewal) -> None:
    """An aggregated API sees the new front-proxy client certificate from the API server that was not restarted."""
    assert site.extension.ask() == fingerprint(renewal.certificates["front-proxy-client"])


@pytest.mark.parametrize("name", ["admin.conf", "super-admin.conf"])
def test_people_work_with_the_new_kubeconfigs(site: Site, renewal: Renewal, name: str) -> None:
    """`kubectl` reads and writes, and the API server knows it by its new certificate."""
    kubectl = ("kubectl", "--kubeconfig", f"/etc/kubernetes/{name}")
    assert site.node.exec(*kubectl, "get", "nodes", "-o", "name").stdout == f"node/{NAME}\n"
    site.node.exec(*kubectl, "create", "configmap", "by-hand", "--from-literal=key=value")
    site.node.exec(*kubectl, "delete", "configmap", "by-hand")
    who = json.loads(site.node.exec(*kubectl, "auth", "whoami", "-o", "json").stdout)["status"]["userInfo"]
    credential = who["extra"]["authentication.kubernetes.io/credential-id"]
    assert credential == [f"X509SHA256={fingerprint(renewal.certificates[name])}"]


def test_etcdctl_works_with_the_new_health_check_client(site: Site, renewal: Renewal) -> None:
    """etcd is healthy, and says so to the new certificate."""
    assert renewal.certificates["etcd-healthcheck-client"] != site.certificates["etcd-healthcheck-client"]
    pki = Path("/etc/kubernetes/pki/etcd")
    pair = ("--cert", pki / "healthcheck-client.crt", "--key", pki / "healthcheck-client.key")
    found = site.node.exec(
        "etcdctl", "--command-timeout=120s", "--cacert", pki / "ca.crt", *pair, "endpoint", "health", "-w", "json"
    )
    assert [endpoint["health"] for endpoint in json.loads(found.stdout)] == [True]


def test_check_expiration_says_what_kubeadm_says(site: Site, renewal: Renewal) -> None:
    """The two tables of the node, after its renewal, byte for byte; kubeadm asks the API server, we do not."""
    kubeadm = site.node.exec("kubeadm", "certs", "check-expiration").stdout
    tables = kubeadm[kubeadm.index("CERTIFICATE ") :]
    assert f"{renewal.certificates['apiserver'].not_valid_after_utc:%b %d, %Y %H:%M} UTC" in tables
    ours = site.bridge.run("check-expiration")
    assert ours.returncode == 0
    assert ours.stdout.startswith(tables)
