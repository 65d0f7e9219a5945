"""Missing certificates, other SANs and users' kubeconfigs on a real node: the real API server has the last word."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.pki.certificates import san_entries
from bridge.specs import AUTHORITIES
from tests.kit import nodes
from tests.kit.cas import add_openssl, live_certificates
from tests.kit.node import Node
from tests.kit.nodes import LiveBridge, NodePki, wait_for

pytestmark = [pytest.mark.node, pytest.mark.slow]

NAME, IP = f"chg-{os.getpid() % 100_000}", "198.18.77.165"
KUBELET_CLIENT = "apiserver-kubelet-client"


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveBridge]:
    """A node in external-CA mode, with `openssl ca` directories."""
    directory = tmp_path_factory.mktemp("changes")
    keys = directory / "ca-keys"
    with Node.up(NAME, IP, ca_dir=keys) as node:
        nodes.make_ready(node)
        pki = NodePki(root=node.root, external=True, keys=keys)
        bridge = LiveBridge(pki=pki, directory=directory / "bridge", node=node)
        for authority in AUTHORITIES:
            add_openssl(bridge, authority)
        yield bridge


def test_a_user_is_who_the_kubeconfig_says(bridge: LiveBridge, tmp_path: Path) -> None:
    """Name and groups as the API server sees them; no rights until a binding names the group, and then its rights."""
    made = bridge.run("kubeconfig", "request", "eve", "--group=dev", f"--output={tmp_path}")
    assert made.returncode == 0, made.stderr
    conf = tmp_path / "eve.conf"
    run = bridge.run("kubeconfig", "user", "eve", "--group=dev", f"--csr={tmp_path / 'eve.csr'}", f"--output={conf}")
    assert run.returncode == 0, run.stderr

    def eve(*args: str) -> tuple[int, str]:
        done = bridge.node.exec("kubectl", "--kubeconfig", conf, *args, check=False)
        return done.returncode, done.stdout

    who = json.loads(eve("auth", "whoami", "-o", "json")[1])["status"]["userInfo"]
    assert (who["username"], set(who["groups"])) == ("eve", {"dev", "system:authenticated"})
    assert eve("get", "pods", "-n", "kube-system")[0] == 1
    bridge.node.kubectl("create", "clusterrolebinding", "dev-view", "--clusterrole=view", "--group=dev")
    wait_for("the rights of dev", lambda: eve("get", "pods", "-n", "kube-system")[0] == 0)


def test_a_missing_certificate_is_made_from_the_cluster_and_works(bridge: LiveBridge) -> None:
    """kubeadm-config by the real API server, and its binding; `kubectl logs` goes by the new certificate."""
    before = live_certificates(bridge.pki)
    for suffix in ("crt", "key"):
        (bridge.pki.pki_dir / f"{KUBELET_CLIENT}.{suffix}").unlink()
    assert bridge.run("renew").returncode == 1
    run = bridge.run("renew", KUBELET_CLIENT)
    assert run.returncode == 0, run.stderr
    assert "ConfigMap kube-system/kubeadm-config" in run.stderr
    assert "which is there" in run.stderr
    after = live_certificates(bridge.pki)
    assert after[KUBELET_CLIENT].subject == before[KUBELET_CLIENT].subject
    assert after[KUBELET_CLIENT].serial_number != before[KUBELET_CLIENT].serial_number
    proof = bridge.run("prove", "--wait", "60s")
    assert proof.returncode == 0, proof.stdout
    logs = ("logs", "-n", "kube-system", f"kube-apiserver-{NAME}", "--tail", "1")
    wait_for("logs through the API server", lambda: bridge.node.kubectl(*logs, check=False).returncode == 0)


def test_a_new_name_is_served(bridge: LiveBridge) -> None:
    """The API server answers to it without a restart, and did not before."""

    def answers() -> bool:
        ask = ("--tls-server-name", "new.example.com", "get", "--raw", "/readyz")
        return bridge.node.kubectl(*ask, check=False).stdout == "ok"

    assert not answers()
    run = bridge.run("renew", "--add-san", "apiserver=new.example.com")
    assert run.returncode == 0, run.stderr
    assert ("DNS", "new.example.com") in san_entries(live_certificates(bridge.pki)["apiserver"])
    wait_for("an API server that answers to its new name", answers, seconds=90)
    told = json.loads(bridge.run("doctor", "-o", "json").stdout)["findings"]
    beyond = [one["text"] for one in told if one["check"] == "kubeadm-config"]
    assert any("DNS:new.example.com" in text and "kubeadm would not make them" in text for text in beyond)


def test_what_an_upgrade_would_do_is_told_by_the_real_cluster(bridge: LiveBridge) -> None:
    """Nothing is wrong on a node as kubeadm left it; without the bindings that approve, they are named."""
    run = bridge.run("doctor", "--before-upgrade", "-o", "json")
    found = json.loads(run.stdout)["findings"]
    assert [one for one in found if one["level"] == "error"] == []
    assert not any("were not looked at" in one["text"] for one in found)
    name = "kubeadm:node-autoapprove-bootstrap"
    bridge.node.kubectl("delete", "clusterrolebinding", name)
    told = json.loads(bridge.run("doctor", "--before-upgrade", "-o", "json").stdout)["findings"]
    assert any(one["check"] == "upgrade-auto-approve" and name in one["text"] for one in told)
