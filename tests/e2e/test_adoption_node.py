"""The CAs that kubeadm made on a real node give way to a company's, and their keys leave it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

import pytest

from bridge.errors import Exit
from bridge.specs import AUTHORITIES, Component
from tests.kit import next_cas, nodes
from tests.kit.node import Node
from tests.kit.nodes import LiveBridge, NodePki, wait_for

pytestmark = [pytest.mark.node, pytest.mark.slow]

NAME, IP = f"adopt-{os.getpid() % 100_000}", "198.18.77.176"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """As `kubeadm init` leaves it: with its CA keys, by which its controller manager signs."""
    with Node.up(NAME, IP) as made:
        nodes.make_ready(made)
        yield made


@pytest.fixture(scope="module")
def bridge(node: Node, tmp_path_factory: pytest.TempPathFactory) -> LiveBridge:
    """Settings that name the company's CAs alone."""
    directory = tmp_path_factory.mktemp("adopt")
    made = next_cas.make(directory / "company")
    pki = NodePki(root=node.root, external=True, keys=directory)
    bridge = LiveBridge(pki=pki, directory=directory / "bridge", node=node)
    bridge.add("restart", {"method": "static-pods", "min_interval": "1s"})
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
    proof = bridge.run("prove", "--wait", "60s")
    assert proof.returncode == 0, proof.stdout
    check = bridge.node.exec("kubeadm", "certs", "check-expiration", check=False)
    assert check.returncode == 0, check.stderr
    wait_for(
        "the kubelet's lease",
        lambda: nodes.lease_renewed(bridge.node, "kube-node-lease", NAME) > before,
        seconds=120,
    )


def keys(bridge: LiveBridge) -> list[str]:
    """CA keys in kubeadm's places."""
    return sorted(str(one.relative_to(bridge.pki.pki_dir)) for one in bridge.pki.pki_dir.rglob("*ca.key"))


def test_a_controller_manager_that_signs_holds_it_up(bridge: LiveBridge) -> None:
    """By kubeadm's own manifest; with empty flags it goes on."""
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
        seconds=120,
    )
    wait_for("a healthy one", lambda: nodes.is_healthy(bridge.node, Component.CONTROLLER_MANAGER), seconds=120)
    assert_reached(bridge, "trusted", "trust")
    assert len(keys(bridge)) == len(AUTHORITIES)


def test_the_keys_leave_with_the_new_certificates(bridge: LiveBridge) -> None:
    """Refused without a place for them."""
    run = bridge.run("rotate-ca", "issue")
    assert run.returncode == Exit.USAGE, run.stdout + run.stderr
    disk = bridge.directory / "disk"
    disk.mkdir(mode=0o700)
    assert_reached(bridge, "issued", "issue", "--keys-to", str(disk))
    assert keys(bridge) == []
    assert sorted(one.name for one in disk.iterdir()) == sorted(f"{name}.key" for name in AUTHORITIES)
    assert_reached(bridge, "new", "drop")
