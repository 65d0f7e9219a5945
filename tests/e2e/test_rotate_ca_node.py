"""
The CAs that kubeadm made on a real node give way to a company's, whose keys leak: these give way in an emergency.

Then all three CAs are replaced again while clients and a worker go on, and the way back from each phase is walked; then once
more, with cross certificates.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from bridge.cli.options import utc_now
from bridge.errors import Exit
from bridge.node import kubeconfig
from bridge.pki.certificates import fingerprint, load_pem_certificates, pem
from bridge.pki.csr import key_block, key_pem
from bridge.rotation import objects
from bridge.rotation.objects import KEYS, NodeStatement
from bridge.specs import AUTHORITIES, CA, FRONT_PROXY_CA, Component
from tests.kit import next_cas, nodes, shown
from tests.kit.cas import add_openssl
from tests.kit.issuing import Signer, signed_again
from tests.kit.next_cas import NextCa
from tests.kit.node import AT_ONCE, Node
from tests.kit.nodes import LiveBridge, NodePki, asked_by, wait_for
from tests.kit.pki import NODE as CP_1

pytestmark = [pytest.mark.node, pytest.mark.slow]

NAME, IP, WORKER_IP = f"rot-{os.getpid() % 100_000:05}", "198.18.77.171", "198.18.77.172"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """As `kubeadm init` leaves it: with its CA keys, by which its controller manager signs."""
    with Node.up(NAME, IP, kubelet=AT_ONCE) as made:
        nodes.make_ready(made)
        yield made


def phases(bridge: LiveBridge) -> dict[str, str]:
    run = bridge.run("rotate-ca", "status", "-o", "json")
    assert run.returncode == 0, run.stderr
    return {one["name"]: one["phase"] for one in json.loads(run.stdout)["cas"]}


# --- away from kubeadm's CAs, and in an emergency --------------------------------------------------------------------


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NextCa]:
    """The CAs whose keys leak."""
    return next_cas.make(tmp_path_factory.mktemp("company"), number=8)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NextCa]:
    """Those that take their place."""
    return next_cas.make(tmp_path_factory.mktemp("newer"), number=9)


@pytest.fixture(scope="module")
def adopter(node: Node, company: dict[str, NextCa], tmp_path_factory: pytest.TempPathFactory) -> LiveBridge:
    """Settings that name the company's CAs alone."""
    bridge = bridge_on(node, tmp_path_factory.mktemp("adopt"))
    bridge.add("backend.corp", {"type": "openssl"})
    for name in AUTHORITIES:
        bridge.add(f"authority.{name}", {"backend": "corp", "dir": company[name].table["dir"]})
        bridge.add(f"authority.{name}.next", {"anchor": company[name].table["anchor"]})
    return bridge


def bridge_on(node: Node, directory: Path) -> LiveBridge:
    """The program on a node, which restarts what has to be."""
    pki = NodePki(root=node.root, external=True, keys=directory / "ca-keys")
    bridge = LiveBridge(pki=pki, directory=directory / "bridge", node=node)
    bridge.add("restart", {"method": "static-pods", "prove_for": "5m"})
    bridge.add("restart.commands", {"kubelet": bridge.kubelet_command()})
    return bridge


def assert_reached(adopter: LiveBridge, phase: str, *words: str) -> None:
    """A verb leads to a phase, in which everything is proven and the kubelet goes on."""
    before = nodes.lease_renewed(adopter.node, "kube-node-lease", NAME)
    run = adopter.run("rotate-ca", *words)
    assert run.returncode == 0, run.stdout + run.stderr
    assert phases(adopter) == dict.fromkeys(AUTHORITIES, phase)
    proof = adopter.run("prove", "--wait", "3m")
    assert proof.returncode == 0, proof.stdout
    check = adopter.node.exec("kubeadm", "certs", "check-expiration", check=False)
    assert check.returncode == 0, check.stderr
    wait_for(
        "the kubelet's lease",
        lambda: nodes.lease_renewed(adopter.node, "kube-node-lease", NAME) > before,
    )


def ca_keys(adopter: LiveBridge) -> list[str]:
    """CA keys in kubeadm's places."""
    return sorted(str(one.relative_to(adopter.pki.pki_dir)) for one in adopter.pki.pki_dir.rglob("*ca.key"))


def test_a_controller_manager_that_signs_holds_it_up(adopter: LiveBridge) -> None:
    """kubeadm's own manifest lets it sign; with empty flags the phase goes on."""
    run = adopter.run("rotate-ca", "trust")
    assert run.returncode == Exit.USAGE, run.stdout + run.stderr
    assert "--cluster-signing-cert-file" in run.stderr
    manifest = adopter.node.kubeconfig_dir / "manifests/kube-controller-manager.yaml"
    before = nodes.containers(adopter.node)[Component.CONTROLLER_MANAGER]
    text = re.sub(r"(--cluster-signing-(?:cert|key)-file=).*", r"\1", manifest.read_text())
    aside = manifest.parents[1] / manifest.name
    aside.write_text(text)
    aside.chmod(0o600)
    aside.rename(manifest)
    wait_for(
        "another controller manager",
        lambda: nodes.containers(adopter.node).get(Component.CONTROLLER_MANAGER, before) != before,
    )
    wait_for("a healthy one", lambda: nodes.is_healthy(adopter.node, Component.CONTROLLER_MANAGER))
    assert_reached(adopter, "trusted", "trust")
    assert len(ca_keys(adopter)) == len(AUTHORITIES)


def test_the_keys_leave_with_the_new_certificates(adopter: LiveBridge) -> None:
    """The command is refused without a place for the keys."""
    run = adopter.run("rotate-ca", "issue")
    assert run.returncode == Exit.USAGE, run.stdout + run.stderr
    disk = adopter.directory / "disk"
    disk.mkdir(mode=0o700)
    assert_reached(adopter, "issued", "issue", "--keys-to", str(disk))
    assert ca_keys(adopter) == []
    assert sorted(one.name for one in disk.iterdir()) == sorted(f"{name}.key" for name in AUTHORITIES)
    assert_reached(adopter, "new", "drop")


def answer_to_a_thief(adopter: LiveBridge, ca: NextCa) -> str:
    """The API server's answer to a superuser whose certificate a thief made with the CA's key."""
    conf = adopter.directory / "thief.conf"
    ours = (adopter.node.kubeconfig_dir / "admin.conf").read_bytes()
    parsed, key = kubeconfig.parse(ours), kubeconfig.key_data(ours)
    assert key is not None
    leaf = x509.load_pem_x509_certificate(parsed.certificate_data or b"")
    conf.write_bytes(kubeconfig.with_credentials(ours, signed_again(leaf, ca.signer), key))
    return nodes.asked_by(adopter.node, conf)


def test_an_emergency_ends_what_a_thief_of_the_key_can_do(
    adopter: LiveBridge, company: dict[str, NextCa], newer: dict[str, NextCa]
) -> None:
    """From the phase old to new by one command, once its cost was said; the thief's certificates are unknown from then on."""
    adopter.tables = [one for one in adopter.tables if ".next]" not in one]
    for name in AUTHORITIES:
        adopter.add(f"authority.{name}.next", newer[name].table)
    assert phases(adopter) == dict.fromkeys(AUTHORITIES, "old")
    assert answer_to_a_thief(adopter, company[CA.name]) == "ok"
    run = adopter.run("rotate-ca", "drop", "--emergency")
    assert run.returncode == Exit.USAGE, run.stdout + run.stderr
    assert "refuses every certificate of the old CA at once" in run.stdout
    assert phases(adopter) == dict.fromkeys(AUTHORITIES, "old")
    assert_reached(adopter, "new", "drop", "--emergency", "--accept-outage")
    assert "Unauthorized" in answer_to_a_thief(adopter, company[CA.name])
    file = (adopter.pki.pki_dir / CA.certificate_file).read_bytes()
    assert file == pem(newer[CA.name].signer.certificate)


@pytest.mark.attack("E4")
def test_a_certificate_for_the_same_key_is_judged_and_proven(adopter: LiveBridge, newer: dict[str, NextCa]) -> None:
    """The front proxy's CA takes effect at once, without a restart: one of servers alone is refused, a good one proven."""
    old = newer[FRONT_PROXY_CA.name].signer
    key_id = old.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    servers = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    anchor = adopter.directory / "again.crt"
    adopter.tables = [one for one in adopter.tables if ".next]" not in one]
    signs = newer[FRONT_PROXY_CA.name].table["dir"]
    adopter.add(f"authority.{FRONT_PROXY_CA.name}.next", {"anchor": str(anchor), "dir": signs})
    (subject,) = old.certificate.subject
    file = adopter.pki.pki_dir / FRONT_PROXY_CA.certificate_file
    before = file.read_bytes()

    def made_again(extra: x509.ExtensionType) -> None:
        end = utc_now() + timedelta(days=6000)
        again = Signer.make(str(subject.value), key=old.key, extra=extra, begin=utc_now() - timedelta(days=1), end=end)
        anchor.write_bytes(pem(again.certificate))

    made_again(servers)
    run = adopter.run("rotate-ca", "trust")
    assert run.returncode == Exit.REFUSED, run.stdout + run.stderr
    assert "clientAuth" in run.stderr
    assert file.read_bytes() == before
    made_again(key_id)
    run = adopter.run("rotate-ca", "trust")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "proven: " in run.stdout
    assert file.read_bytes() == anchor.read_bytes()
    assert adopter.run("rotate-ca", "back").returncode == 0
    assert file.read_bytes() == before


# --- the whole walk, with a worker -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Site:
    """The control plane, with CAs whose keys are elsewhere, and a worker."""

    control_plane: LiveBridge
    worker: LiveBridge
    made: Mapping[str, NextCa]  #: The successors.


@pytest.fixture(scope="module")
def site(node: Node, newer: dict[str, NextCa], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The CAs of the emergency have successors."""
    assert (node.pki_dir / CA.certificate_file).read_bytes() == pem(newer[CA.name].signer.certificate)
    directory = tmp_path_factory.mktemp("rotate")
    made = next_cas.make(directory / "next")
    keys = next_cas.as_pki(newer, directory).ca_dir
    (node.root.parent / "ca_dir").write_text(f"{keys}\n")  # for those who join
    with Node.worker(f"{NAME}-w", WORKER_IP, node) as other:
        yield Site(
            control_plane=with_successors(bridge_on(node, directory / "cp"), keys, made),
            worker=with_successors(bridge_on(other, directory / "w"), keys, made),
            made=made,
        )


def with_successors(bridge: LiveBridge, keys: Path, made: Mapping[str, NextCa]) -> LiveBridge:
    """Its CAs now, and the next ones; a worker has `ca` alone."""
    bridge.pki = NodePki(root=bridge.node.root, external=True, keys=keys)
    for authority in AUTHORITIES:
        add_openssl(bridge, authority)
        bridge.add(f"authority.{authority}.next", made[authority].table)
    return bridge


@pytest.fixture(scope="module")
def bridge(site: Site) -> LiveBridge:
    """The control plane's."""
    return site.control_plane


def on_the_worker(site: Site, verb: str, phase: str) -> None:
    """Its kubelet goes on: it renews its lease, which the API server takes from a kubelet that it knows."""
    node, name = site.control_plane.node, site.worker.node.name
    before = nodes.lease_renewed(node, "kube-node-lease", name)
    run = site.worker.run("rotate-ca", verb)
    assert run.returncode == 0, run.stdout + run.stderr
    assert phases(site.worker) == {"ca": phase}
    wait_for("a lease that is renewed", lambda: nodes.lease_renewed(node, "kube-node-lease", name) > before)


def step(bridge: LiveBridge, verb: str, phase: str) -> str:
    """One verb: the phase is reached, everything is proven, and kubeadm takes the node; what was printed."""
    run = bridge.run("rotate-ca", verb, columns=shown.COLUMNS)
    assert run.returncode == 0, run.stdout + run.stderr
    assert phases(bridge) == dict.fromkeys(AUTHORITIES, phase)
    proof = bridge.run("prove", "--wait", "3m")
    assert proof.returncode == 0, proof.stdout
    check = bridge.node.exec("kubeadm", "certs", "check-expiration", check=False)
    assert check.returncode == 0, check.stderr
    return run.stdout


def cas_of(bridge: LiveBridge, namespace: str, name: str, key: str) -> int:
    """How many CA certificates a ConfigMap has; 0: it is not there yet."""
    found = bridge.node.kubectl("get", "configmap", "-n", namespace, name, "-o", "json", check=False)
    text = json.loads(found.stdout)["data"].get(key, "") if found.returncode == 0 else ""
    if key == "kubeconfig":
        text = (kubeconfig.ca_data(text.encode()) or b"").decode()
    return int(text.count("BEGIN CERTIFICATE"))


@pytest.fixture(scope="module")
def old_conf(bridge: LiveBridge) -> Path:
    """An administrator's copy from before, which knows the old CA alone."""
    kept = bridge.directory / "old-admin.conf"
    kept.write_bytes((bridge.node.kubeconfig_dir / "admin.conf").read_bytes())
    return kept


def test_trust_restarts_what_reads_a_ca_once(bridge: LiveBridge, old_conf: Path) -> None:
    """All of them, each once; the cluster's objects have both CAs, and no client is refused."""
    printed = step(bridge, "trust", "trusted")
    assert all(f"{one.value} in " in printed for one in Component)
    assert asked_by(bridge.node, old_conf) == "ok"
    wait_for("both CAs for those who join", lambda: cas_of(bridge, "kube-public", "cluster-info", "kubeconfig") == 2)
    wait_for("both CAs in each namespace", lambda: cas_of(bridge, "default", "kube-root-ca.crt", "ca.crt") == 2)


def object_of(site: Site, name: str) -> dict[str, Any]:
    """A Node object."""
    found: dict[str, Any] = json.loads(site.control_plane.node.kubectl("get", "node", name, "-o", "json").stdout)
    return found


def written_by_an_administrator(site: Site, text: str) -> None:
    """The word of the worker, as anyone writes it who may write Node objects."""
    site.control_plane.node.kubectl("annotate", "--overwrite", "node", f"{NAME}-w", f"{KEYS[CA.name]}={text}")


def lie_of_the_worker(site: Site) -> str:
    """That it trusts both CAs, by its kubelet's own key."""
    pair = site.worker.node.exec("cat", "/var/lib/kubelet/pki/kubelet-client-current.pem").stdout.encode()
    bundle = load_pem_certificates((site.control_plane.node.pki_dir / CA.certificate_file).read_bytes())
    old, new = map(fingerprint, bundle)
    said = NodeStatement(utc_now().replace(microsecond=0), "trusted", old, (old, new))
    key = load_pem_private_key(key_block(pair), None)
    return objects.signed_statement(
        said, CA.name, object_of(site, f"{NAME}-w"), tuple(load_pem_certificates(pair)), key
    )


def test_a_worker_that_does_not_trust_the_new_ca_holds_up_issue(site: Site) -> None:
    """
    It is named, since its node has not said so; a word that an administrator wrote does not count, and if its own key
    lies, its kubelet is asked. Then it takes the step, too.
    """
    run = site.control_plane.run("rotate-ca", "issue")
    assert run.returncode == Exit.UNAVAILABLE, run.stdout + run.stderr
    assert f"found others that have not said so: {NAME}-w" in run.stderr
    own = object_of(site, NAME)["metadata"]["annotations"][KEYS[CA.name]]
    written_by_an_administrator(site, own)
    run = site.control_plane.run("rotate-ca", "issue")
    assert run.returncode == Exit.UNAVAILABLE, run.stdout + run.stderr
    assert "signed with another certificate than its kubelet's" in " ".join(run.stderr.split())
    written_by_an_administrator(site, lie_of_the_worker(site))
    run = site.control_plane.run("rotate-ca", "issue")
    assert run.returncode == Exit.UNAVAILABLE, run.stdout + run.stderr
    assert f"kubelet of {NAME}-w" in run.stderr
    assert phases(site.control_plane) == dict.fromkeys(AUTHORITIES, "trusted")
    on_the_worker(site, "trust", "trusted")


def test_issue_and_back_restart_no_etcd_and_no_api_server(bridge: LiveBridge, old_conf: Path) -> None:
    """Both read certificates again by themselves; a user of the old CA is still known, with a kubeconfig that has both CAs."""
    for verb, phase in (("issue", "issued"), ("back", "trusted"), ("issue", "issued")):
        printed = step(bridge, verb, phase)
        assert "kube-scheduler in " in printed, verb
        assert "etcd in " not in printed, verb
        assert "kube-apiserver in " not in printed, verb
        shown.assert_shown(f"rotate-ca-{verb}", printed, {NAME: CP_1})
    assert "certificate signed by unknown authority" in asked_by(bridge.node, old_conf)
    both = kubeconfig.with_ca(old_conf.read_bytes(), kubeconfig.ca_data(admin(bridge).read_bytes()) or b"")
    old_conf.with_name("both.conf").write_bytes(both)
    assert asked_by(bridge.node, old_conf.with_name("both.conf")) == "ok"


def admin(bridge: LiveBridge) -> Path:
    """The node's own."""
    return bridge.node.kubeconfig_dir / "admin.conf"


def test_a_night_between_two_phases_asks_the_ca_that_signs(bridge: LiveBridge) -> None:
    """The settings of `next` are in force without an edit."""
    run = bridge.run("renew", "apiserver", "etcd-server", "--no-restart")
    assert run.returncode == 0, run.stderr
    assert "issuer CN=ca-2" in run.stdout
    assert phases(bridge) == dict.fromkeys(AUTHORITIES, "issued")


def test_requests_are_counted_by_the_ends_of_their_certificates(bridge: LiveBridge) -> None:
    """The controller manager renews its lease every two seconds, with a certificate of the new CA that this node knows."""

    def are_counted() -> bool:
        run = bridge.run("rotate-ca", "status", "--ca", "ca", "--requests", "10s", "-o", "json")
        assert run.returncode == 0, run.stderr
        seen = json.loads(run.stdout)["requests"]
        counts = [one["count"] for one in seen["byEnd"] if one["isLikeNew"] and one["server"] == NAME]
        return (seen["troubles"], list(seen["failedHandshakes"])) == ([], [NAME]) and sum(counts) > 1

    wait_for("requests with certificates of the new CA", are_counted)


def test_a_worker_whose_certificate_is_the_old_cas_holds_up_drop(site: Site) -> None:
    """A node's report says which CA its kubelet's client certificate is from, as no API shows it; an invented node name is no way round."""
    run = site.control_plane.run("rotate-ca", "drop")
    assert run.returncode == Exit.UNAVAILABLE, run.stdout + run.stderr
    assert f"{NAME}-w" in run.stderr
    typo = site.control_plane.run("rotate-ca", "drop", "--without", f"{NAME}-x")
    assert typo.returncode == Exit.USAGE, typo.stdout + typo.stderr
    assert phases(site.control_plane) == dict.fromkeys(AUTHORITIES, "issued")
    on_the_worker(site, "issue", "issued")


def test_drop_leaves_the_new_cas_alone(site: Site, bridge: LiveBridge, old_conf: Path) -> None:
    """The old CA's users are unknown from then on, everywhere."""
    step(bridge, "drop", "new")
    on_the_worker(site, "drop", "new")
    assert "Unauthorized" in asked_by(bridge.node, old_conf.with_name("both.conf"))
    assert asked_by(bridge.node, admin(bridge)) == "ok"
    wait_for("the new CA for those who join", lambda: cas_of(bridge, "kube-public", "cluster-info", "kubeconfig") == 1)
    wait_for("the new CA alone in each namespace", lambda: cas_of(bridge, "default", "kube-root-ca.crt", "ca.crt") == 1)
    place = ("kube-system", "extension-apiserver-authentication")
    keys = ("client-ca-file", "requestheader-client-ca-file")
    wait_for("the new CAs alone for aggregated servers", lambda: all(cas_of(bridge, *place, key) == 1 for key in keys))
    logs = ("logs", "-n", "kube-system", f"kube-apiserver-{NAME}", "--tail", "1")
    wait_for("logs through the API server", lambda: bridge.node.kubectl(*logs, check=False).returncode == 0)


@pytest.fixture(scope="module")
def once_more(site: Site, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tables of `next` went into those of the CAs, as the page says, which have successors with cross certificates again."""
    directory = tmp_path_factory.mktemp("third")
    made = next_cas.make(directory, number=3)
    for one in (site.control_plane, site.worker):
        one.tables = [table for table in one.tables if not table.startswith("[authority.")]
    for name, before in site.made.items():
        signer, new = before.signer, pem(made[name].signer.certificate)
        path = next_cas.cross((pem(signer.certificate), key_pem(signer.key)), new, directory / "cross" / name)
        for one in (site.control_plane, site.worker):
            one.add(f"authority.{name}", {"backend": f"{name}-desk", "dir": before.table["dir"]})
            one.add(f"authority.{name}.next", {**made[name].table, "cross": str(path)})


@pytest.mark.usefixtures("once_more")
def test_a_cross_certificate_spares_trust_on_running_nodes(site: Site, bridge: LiveBridge) -> None:
    """
    Components, a worker and users that trust the old CA alone go on after `issue`, and users trust the API server after
    `drop`; the client certificates of the old CA are unknown then, as without a cross certificate.
    """
    kept, ours = bridge.directory / "second-admin.conf", ("--ca", "ca", "--ca", "front-proxy-ca")
    kept.write_bytes(admin(bridge).read_bytes())
    for verb, phase in (("trust", "old"), ("issue", "issued")):
        run = bridge.run("rotate-ca", verb, *ours)
        assert run.returncode == 0, run.stdout + run.stderr
        assert phases(bridge) == {"ca": phase, "etcd-ca": "old", "front-proxy-ca": phase}
        assert ("kube-scheduler in " in run.stdout) is (verb == "issue")
        assert "etcd in " not in run.stdout
        assert "kube-apiserver in " not in run.stdout
    assert asked_by(bridge.node, kept) == "ok"
    on_the_worker(site, "issue", "issued")
    dropped = bridge.run("rotate-ca", "drop", "--ca", "ca")
    assert dropped.returncode == 0, dropped.stdout + dropped.stderr
    assert phases(bridge) == {"ca": "new", "etcd-ca": "old", "front-proxy-ca": "issued"}
    assert "Unauthorized" in asked_by(bridge.node, kept)
    assert asked_by(bridge.node, admin(bridge)) == "ok"
