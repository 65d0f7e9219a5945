"""The CAs that kubeadm made on a real node give way to a company's, whose keys leak: these give way in an emergency."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

import pytest
from cryptography import x509

from bridge.errors import Exit
from bridge.node import kubeconfig
from bridge.pki.certificates import pem
from bridge.specs import AUTHORITIES, CA, Component
from tests.kit import next_cas, nodes
from tests.kit.issuing import signed_again
from tests.kit.next_cas import NextCa
from tests.kit.node import AT_ONCE, Node
from tests.kit.nodes import LiveBridge, NodePki, wait_for

pytestmark = [pytest.mark.node, pytest.mark.slow]

NAME, IP = f"adopt-{os.getpid() % 100_000}", "198.18.77.176"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """As `kubeadm init` leaves it: with its CA keys, by which its controller manager signs."""
    with Node.up(NAME, IP, kubelet=AT_ONCE) as made:
        nodes.make_ready(made)
        yield made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NextCa]:
    """The company's CAs."""
    return next_cas.make(tmp_path_factory.mktemp("company"))


@pytest.fixture(scope="module")
def bridge(node: Node, made: dict[str, NextCa], tmp_path_factory: pytest.TempPathFactory) -> LiveBridge:
    """Settings that name the company's CAs alone."""
    directory = tmp_path_factory.mktemp("adopt")
    pki = NodePki(root=node.root, external=True, keys=directory)
    bridge = LiveBridge(pki=pki, directory=directory / "bridge", node=node)
    bridge.add("restart", {"method": "static-pods", "min_interval": "1s", "prove_for": "5m"})
    bridge.add("restart.commands", {"kubelet": bridge.kubelet_command()})
    bridge.add("backend.corp", {"type": "openssl"})
    for name in AUTHORITIES:
        bridge.add(f"authority.{name}", {"backend": "corp", "dir": made[name].table["dir"]})
        bridge.add(f"authority.{name}.next", {"anchor": made[name].table["anchor"]})
    return bridge


def phases(bridge: LiveBridge) -> dict[str, str]:
    run = bridge.run("rotate-ca", "status", "-o", "json")
    assert run.returncode == 0, run.stderr
    return {one["name"]: one["phase"] for one in json.loads(run.stdout)["cas"]}


def assert_reached(bridge: LiveBridge, phase: str, *words: str) -> None:
    """A verb leads to a phase, in which everything is proven and the kubelet goes on."""
    before = nodes.lease_renewed(bridge.node, "kube-node-lease", NAME)
    run = bridge.run("rotate-ca", *words)
    assert run.returncode == 0, run.stdout + run.stderr
    assert phases(bridge) == dict.fromkeys(AUTHORITIES, phase)
    proof = bridge.run("prove", "--wait", "3m")
    assert proof.returncode == 0, proof.stdout
    check = bridge.node.exec("kubeadm", "certs", "check-expiration", check=False)
    assert check.returncode == 0, check.stderr
    wait_for(
        "the kubelet's lease",
        lambda: nodes.lease_renewed(bridge.node, "kube-node-lease", NAME) > before,
    )


def keys(bridge: LiveBridge) -> list[str]:
    """CA keys in kubeadm's places."""
    return sorted(str(one.relative_to(bridge.pki.pki_dir)) for one in bridge.pki.pki_dir.rglob("*ca.key"))


def test_a_controller_manager_that_signs_holds_it_up(bridge: LiveBridge) -> None:
    """kubeadm's own manifest lets it sign; with empty flags the phase goes on."""
    run = bridge.run("rotate-ca", "trust")
    assert run.returncode == Exit.USAGE, run.stdout + run.stderr
    assert "--cluster-signing-cert-file" in run.stderr
    manifest = bridge.node.kubeconfig_dir / "manifests/kube-controller-manager.yaml"
    before = nodes.containers(bridge.node)[Component.CONTROLLER_MANAGER]
    text = re.sub(r"(--cluster-signing-(?:cert|key)-file=).*", r"\1", manifest.read_text())
    aside = manifest.parents[1] / manifest.name
    aside.write_text(text)
    aside.chmod(0o600)
    aside.rename(manifest)
    wait_for(
        "another controller manager",
        lambda: nodes.containers(bridge.node).get(Component.CONTROLLER_MANAGER, before) != before,
    )
    wait_for("a healthy one", lambda: nodes.is_healthy(bridge.node, Component.CONTROLLER_MANAGER))
    assert_reached(bridge, "trusted", "trust")
    assert len(keys(bridge)) == len(AUTHORITIES)


def test_the_keys_leave_with_the_new_certificates(bridge: LiveBridge) -> None:
    """The command is refused without a place for the keys."""
    run = bridge.run("rotate-ca", "issue")
    assert run.returncode == Exit.USAGE, run.stdout + run.stderr
    disk = bridge.directory / "disk"
    disk.mkdir(mode=0o700)
    assert_reached(bridge, "issued", "issue", "--keys-to", str(disk))
    assert keys(bridge) == []
    assert sorted(one.name for one in disk.iterdir()) == sorted(f"{name}.key" for name in AUTHORITIES)
    assert_reached(bridge, "new", "drop")


def answer_to_a_thief(bridge: LiveBridge, ca: NextCa) -> str:
    """The API server's answer to a superuser whose certificate a thief made with the CA's key."""
    conf = bridge.directory / "thief.conf"
    ours = (bridge.node.kubeconfig_dir / "admin.conf").read_bytes()
    parsed, key = kubeconfig.parse(ours), kubeconfig.key_data(ours)
    assert key is not None
    leaf = x509.load_pem_x509_certificate(parsed.certificate_data or b"")
    conf.write_bytes(kubeconfig.with_credentials(ours, signed_again(leaf, ca.signer), key))
    return nodes.asked_by(bridge.node, conf)


def test_an_emergency_ends_what_a_thief_of_the_key_can_do(bridge: LiveBridge, made: dict[str, NextCa]) -> None:
    """From the phase old to new by one command, once its cost was said; the thief's certificates are unknown from then on."""
    newer = next_cas.make(bridge.directory / "newer", number=3)
    bridge.tables = [one for one in bridge.tables if ".next]" not in one]
    for name in AUTHORITIES:
        bridge.add(f"authority.{name}.next", newer[name].table)
    assert phases(bridge) == dict.fromkeys(AUTHORITIES, "old")
    assert answer_to_a_thief(bridge, made[CA.name]) == "ok"
    run = bridge.run("rotate-ca", "drop", "--emergency")
    assert run.returncode == Exit.USAGE, run.stdout + run.stderr
    assert "refuses every certificate of the old CA at once" in run.stdout
    assert phases(bridge) == dict.fromkeys(AUTHORITIES, "old")
    assert_reached(bridge, "new", "drop", "--emergency", "--accept-outage")
    assert "Unauthorized" in answer_to_a_thief(bridge, made[CA.name])
    file = (bridge.pki.pki_dir / CA.certificate_file).read_bytes()
    assert file == pem(newer[CA.name].signer.certificate)
