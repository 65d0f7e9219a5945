"""Missing certificates, other SANs and users' kubeconfigs on a real node: the real API server has the last word."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.node import manifests
from bridge.pki.certificates import load_pem_certificates, san_entries
from bridge.specs import AUTHORITIES, SPECS, Component
from tests.kit import nodes, shown
from tests.kit.cas import add_openssl, live_certificates
from tests.kit.node import AT_ONCE, Node
from tests.kit.nodes import LiveBridge, NodePki, wait_for

pytestmark = [pytest.mark.node, pytest.mark.slow]

NAME, IP = f"chg-{os.getpid() % 100_000:05}", "198.18.77.165"
KUBELET_CLIENT = "apiserver-kubelet-client"


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveBridge]:
    """A node in external-CA mode, with `openssl ca` directories."""
    directory = tmp_path_factory.mktemp("changes")
    keys = directory / "ca-keys"
    with Node.up(NAME, IP, ca_dir=keys, kubelet=AT_ONCE) as node:
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
    proof = bridge.run("prove", "--wait", "3m")
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
    wait_for("an API server that answers to its new name", answers)

    def is_reported() -> bool:
        reported = json.loads(bridge.run("doctor", "-o", "json").stdout)["findings"]
        beyond = [one["text"] for one in reported if one["check"] == "kubeadm-config"]
        return any("DNS:new.example.com" in text and "kubeadm would not make them" in text for text in beyond)

    wait_for("a word about the new name", is_reported)


def before_upgrade(bridge: LiveBridge) -> list[dict[str, Any]]:
    """What `doctor` finds in a look that missed nothing, as one may where the machine stalls."""

    def whole() -> dict[str, Any] | None:
        report: dict[str, Any] = json.loads(bridge.run("doctor", "--before-upgrade", "-o", "json").stdout)
        return None if any("were not looked at" in one["text"] for one in report["findings"]) else report

    found: list[dict[str, Any]] = wait_for("a look at all", whole)["findings"]
    return found


def test_what_an_upgrade_would_do_is_reported_by_the_real_cluster(bridge: LiveBridge) -> None:
    """Nothing is wrong on a node as kubeadm left it; without the bindings that approve, they are named."""
    assert [one for one in before_upgrade(bridge) if one["level"] == "error"] == []
    name = "kubeadm:node-autoapprove-bootstrap"
    bridge.node.kubectl("delete", "clusterrolebinding", name)
    reported = before_upgrade(bridge)
    assert any(one["check"] == "upgrade-auto-approve" and name in one["text"] for one in reported)


SERVERS = {
    "controller-manager-server": (Component.CONTROLLER_MANAGER, 10257),
    "scheduler-server": (Component.SCHEDULER, 10259),
}


def until_served(bridge: LiveBridge, wanted: dict[str, str]) -> None:
    """Until `prove` says this: on a machine that stalls a component begins anew, or misses a look."""
    wait_for(f"{wanted} to be served", lambda: served(bridge) == wanted)


def served(bridge: LiveBridge) -> dict[str, str]:
    """By certificate, what `prove` says of the two components' ports."""
    findings = json.loads(bridge.run("prove", "-o", "json").stdout)["findings"]
    components = {component.value for component, _ in SERVERS.values()}
    return {one["certificate"]: one["state"] for one in findings
            if one["component"] in components and one["what"].startswith("serves")}  # fmt: skip


def test_controller_manager_and_scheduler_serve_the_clusters_certificates_and_their_own_again(
    bridge: LiveBridge,
) -> None:
    """On, renewed without a restart, kept by kubeadm-config, and off; kubeadm renders the very manifests that are there."""
    node = bridge.node
    bridge.add("restart", {"method": "static-pods"})
    directory = node.kubeconfig_dir / "manifests"
    before = {component: (directory / f"{component.value}.yaml").read_bytes() for component, _ in SERVERS.values()}
    until_served(bridge, {"(its own)": "not-ours"})
    run = bridge.run("serving-certs", "on", columns=shown.COLUMNS)
    assert run.returncode == 0, run.stdout + run.stderr
    names = {str(bridge.directory / "state"): "/var/lib/ca-bridge", "ca-desk": "desk"}
    shown.assert_shown("serving-certs-on", run.stdout, names)
    assert "kubeadm-config names them: `kubeadm upgrade` keeps the flags" in run.stdout
    until_served(bridge, dict.fromkeys(SERVERS, "current"))
    trusting = ("curl", "--silent", "--fail", "--cacert", "/etc/kubernetes/pki/ca.crt")
    for name, (_, port) in SERVERS.items():
        look = (*trusting, f"https://localhost:{port}/healthz")
        wait_for(f"the health of {name}", lambda: node.exec(*look, check=False).stdout == "ok")  # noqa: B023
    _assert_kubeadm_renders_the_same(bridge)
    running, old = nodes.containers(node), {name: _serial(bridge, name) for name in SERVERS}
    run = bridge.run("renew", *SERVERS)
    assert run.returncode == 0, run.stdout + run.stderr
    assert nodes.containers(node) == running
    assert not old.items() & {name: _serial(bridge, name) for name in SERVERS}.items()
    until_served(bridge, dict.fromkeys(SERVERS, "current"))
    findings = json.loads(bridge.run("doctor", "-o", "json").stdout)["findings"]
    assert not [one for one in findings if "serving-certificate" in one["check"]]

    run = bridge.run("serving-certs", "off", columns=shown.COLUMNS)
    assert run.returncode == 0, run.stdout + run.stderr
    shown.assert_shown("serving-certs-off", run.stdout, {})
    until_served(bridge, {"(its own)": "not-ours"})
    assert {component: (directory / f"{component.value}.yaml").read_bytes() for component in before} == before
    assert not (bridge.pki.pki_dir / "scheduler").exists()
    _assert_kubeadm_renders_the_same(bridge)


def _serial(bridge: LiveBridge, name: str) -> int:
    path = bridge.pki.pki_dir / f"{SPECS[name].base}.crt"
    return load_pem_certificates(path.read_bytes())[0].serial_number


def _assert_kubeadm_renders_the_same(bridge: LiveBridge) -> None:
    """kubeadm's own rendering of kubeadm-config, as at an upgrade, beside the manifests of this node."""
    text = bridge.node.kubectl(
        "get", "cm", "-n", "kube-system", "kubeadm-config", "-o", "jsonpath={.data.ClusterConfiguration}"
    ).stdout
    own = {
        "apiVersion": "kubeadm.k8s.io/v1beta4",
        "kind": "InitConfiguration",
        "localAPIEndpoint": {"advertiseAddress": IP},
        "nodeRegistration": {"name": NAME, "criSocket": "unix:///none"},
    }
    scratch = bridge.directory / "rendered"
    (scratch / "proc").mkdir(parents=True, exist_ok=True)
    (scratch / "kubeadm.yaml").write_text(f"{text}\n---\n{json.dumps(own)}\n")
    for component, _ in SERVERS.values():
        phase = component.value.removeprefix("kube-")
        kubeadm = ("kubeadm", "init", "phase", "control-plane", phase, "--config", "/kubeadm.yaml")
        bridge.node.exec(*kubeadm, "--rootfs", scratch)
        ours, theirs = (
            manifests.load(component, place) for place in (bridge.node.kubeconfig_dir, scratch / "etc/kubernetes")
        )
        assert ours is not None
        assert theirs is not None
        # with the CA's key elsewhere, which kubeadm does not see there, the controller manager signs nothing
        signing = {flag for flag in (*ours.flags, *theirs.flags) if flag.startswith("--cluster-signing")}
        mine, kubeadms = (
            {flag: value for flag, value in one.flags.items() if flag not in signing} for one in (ours, theirs)
        )
        assert mine == kubeadms
