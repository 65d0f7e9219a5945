"""
A real cluster whose kubelets get every certificate from OpenBao through gateways, in fast motion.

Certificates live 4 minutes (and 30 s of a backdated beginning), so a kubelet asks for the next one 159 to 213 s later.
`python -m tests.measure.soak` is the same for an hour.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.contract import SignRequest
from bridge.gateway.rules import CLIENT_KUBELET
from bridge.pki.certificates import pem
from bridge.specs import SPECS
from tests.kit import gateway_cluster, gateways, metrics_server, programs, shown
from tests.kit import node as kit_node
from tests.kit import nodes as kit_nodes
from tests.kit.api_client import ApiClient
from tests.kit.doors import door
from tests.kit.gateway_cluster import CURRENT, GatewayCluster, Motion
from tests.kit.issuing import Signer
from tests.kit.node import Node
from tests.kit.nodes import LiveBridge, NodePki, wait_for

pytestmark = [pytest.mark.node, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 230.0
#: A kubelet asks anew after 70 to 90 % of a certificate's time, and is patient for up to 32 s when no server answers: with four
#: minutes and an API server that is back in half a minute, none ends before, on a machine that does other things, too.
VALIDITY = "4m"
KILLS = {10.0: "gateway", 35.0: "CA", 50.0: "API server", 125.0: "gateway"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayCluster]:
    """One control plane, two workers that joined by bootstrap token, two gateways."""
    with gateway_cluster.running(tmp_path_factory.mktemp("gateway"), validity=VALIDITY) as found:
        yield found


def test_every_certificate_comes_through_the_gateway(cluster: GatewayCluster) -> None:
    """Each kubelet's certificate is in an object that a gateway has signed, and in its audit log; OpenBao signed it."""
    used = {(node.name, kind): cluster.certificate(node, kind) for node in cluster.nodes for kind in CURRENT}
    objects = gateways_objects(cluster)  # after those: each may be another one in the next moment
    recorded = {
        line["object"] for one in cluster.gateways.values() for line in one.audit() if line["event"] == "issued"
    }
    for which, certificate in used.items():
        assert certificate is not None
        der = certificate.public_bytes(Encoding.DER)
        found = [name for name, chain in objects.items() if chain[0].public_bytes(Encoding.DER) == der]
        assert len(found) == 1, which
        assert found[0] in recorded
        certificate.verify_directly_issued_by(cluster.api.ca.certificate)
    assert set(cluster.control_plane.kubectl("get", "nodes", "-o", "name").stdout.split()) == {
        f"node/{node.name}" for node in cluster.nodes
    }


def gateways_objects(cluster: GatewayCluster) -> dict[str, list[x509.Certificate]]:
    """Chains by name of the object."""
    return {one["metadata"]["name"]: chain for one in cluster.admin.csrs() if (chain := gateways.chain(one))}


def test_logs_and_exec_with_a_verified_kubelet(cluster: GatewayCluster) -> None:
    """The API server verifies the kubelet's certificate; one of another CA in its place is refused (the twin)."""
    first, worker = cluster.control_plane, cluster.nodes[1]
    manifest = first.kubeconfig_dir / "manifests"
    assert (
        "--kubelet-certificate-authority=/etc/kubernetes/pki/ca.crt" in (manifest / "kube-apiserver.yaml").read_text()
    )
    image = yaml.safe_load((manifest / "etcd.yaml").read_text())["spec"]["containers"][0]["image"]
    pod = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "talks"},
        "spec": {
            "nodeName": worker.name, "hostNetwork": True, "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "talks", "image": image, "command": ["etcd", "--data-dir=/tmp/x"]}],
        },
    }  # fmt: skip
    (first.kubeconfig_dir / "apply.yaml").write_text(yaml.safe_dump(pod))
    wait_for(
        "the default account", lambda: not first.kubectl("get", "serviceaccount", "default", check=False).returncode
    )
    first.kubectl("apply", "-f", "/etc/kubernetes/apply.yaml")

    def logs() -> str | None:
        run = first.kubectl("logs", "talks", check=False)
        return run.stdout if run.returncode == 0 and "etcd" in run.stdout else None

    assert "etcd" in wait_for("the pod's log", logs)
    assert "etcdctl version" in first.kubectl("exec", "talks", "--", "etcdctl", "version").stdout


# --- turning serverTLSBootstrap off and on ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bridges(cluster: GatewayCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LiveBridge]:
    """ca-bridge on each node, by the node's role."""
    made = {}
    for role, node in zip(("cp", "w1", "w2"), cluster.nodes, strict=True):
        pki = NodePki(root=node.root, external=True, keys=cluster.api.pki_dir)
        made[role] = bridge = LiveBridge(pki=pki, directory=tmp_path_factory.mktemp(role) / "bridge", node=node)
        bridge.add("restart", {"method": "static-pods", "min_interval": "1s", "prove_for": "5m"})
        bridge.add("restart.commands", {"kubelet": bridge.kubelet_command()})
    return made


def config_of(node: Node) -> dict[str, Any]:
    """A kubelet's configuration."""
    found: dict[str, Any] = yaml.safe_load((node.root / "var/lib/kubelet/config.yaml").read_text())
    return found


def levels(bridge: LiveBridge, check: str) -> list[str]:
    """The levels of a check's findings in `doctor --kubelets`, one for each subject."""
    run = bridge.run("doctor", "--kubelets", "-o", "json")
    found = [one for one in json.loads(run.stdout)["findings"] if one["check"] == check]
    return sorted(one["level"] for one in found for _ in one["about"])


def killed_at(bridge: LiveBridge, moment: str, *args: str) -> None:
    """A run that is killed with -9 as soon as it has said this."""
    program: list[str | Path] = [Path(sys.executable).with_name("ca-bridge"), *args, "-v", "--config", bridge.config]
    pid = (kit_node.directory() / bridge.node.name / "pid").read_text().strip()
    with subprocess.Popen(
        ["nsenter", "-t", pid, "-m", "-n", "--", *program], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "CRI_CONFIG_FILE": "/etc/kubernetes/crictl.yaml",
             "PATH": f"{programs.directory()}:{kit_node.directory() / bridge.node.name / 'bin'}:{os.environ['PATH']}"},
    ) as process:  # fmt: skip
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if moment in line:
                process.kill()
                return
    raise AssertionError("".join(said))


def test_off_on_each_node(cluster: GatewayCluster, bridges: dict[str, LiveBridge], tmp_path: Path) -> None:
    """The API server stops verifying first; a worker waits for that; then kubelets make their certificates themselves."""
    first = cluster.control_plane
    early = bridges["w1"].run("kubelets", "off")
    assert early.returncode == 4, early.stderr
    assert "on a control-plane node comes first" in early.stderr
    for role, bridge in bridges.items():
        run = bridge.run("kubelets", "off")
        assert run.returncode == 0, f"{role}: {run.stdout}{run.stderr}"
        assert "Nothing to do" in bridge.run("kubelets", "off").stdout
    assert "kubelet-certificate-authority" not in (first.kubeconfig_dir / "manifests/kube-apiserver.yaml").read_text()
    for name in ("kubeadm-config", "kubelet-config"):
        text = first.kubectl("get", "configmap", "-n", "kube-system", name, "-o", "yaml").stdout
        assert "kubelet-certificate-authority" not in text
        assert "serverTLSBootstrap" not in text
    assert all("serverTLSBootstrap" not in config_of(node) for node in cluster.nodes)
    wait_for("a word on each", lambda: levels(bridges["cp"], "kubelet-serving") == ["warning"] * 3)
    for node in cluster.nodes:  # as if they had never asked: what they have would do for minutes
        for path in (node.root / "var/lib/kubelet/pki").glob("kubelet-server-*"):
            path.unlink()
    with metrics_server.running(cluster, tmp_path / "metrics") as metrics:
        metrics.wait_for("its complaint", lambda: len(re.findall("scrape.*x509: ", metrics.said())) >= 3)
        assert metrics.top() == {}


def test_a_kubelet_without_a_signer_gets_its_old_configuration_again(
    cluster: GatewayCluster, bridges: dict[str, LiveBridge]
) -> None:
    """The kubelet gets its old configuration again, and one whose own validation refuses the configuration is not restarted at all."""
    first, bridge = cluster.control_plane, bridges["cp"]
    path = first.root / "var/lib/kubelet/config.yaml"
    before, pid = path.read_bytes(), kit_nodes.kubelet_pid(first)
    path.write_bytes(before + b"imageGCHighThresholdPercent: 200\n")
    run = bridge.run("kubelets", "on")
    assert run.returncode == 1, run.stderr
    assert "imageGCHighThresholdPercent" in run.stderr
    assert kit_nodes.kubelet_pid(first) == pid
    path.write_bytes(before)
    names = list(cluster.gateways)
    for name in names:
        cluster.gateways[name].kill()

    def has_asked() -> bool:
        run = bridge.run("kubelets", "on", "--wait", "5s")
        assert run.returncode == 8, run.stderr
        assert path.read_bytes() == before
        return "open: no answer yet" in run.stderr

    wait_for("a kubelet that has asked by then", has_asked)
    wait_for("a note, for programs", lambda: levels(bridge, "kubelet-config") == ["ok"])
    for name in names:
        cluster.start_gateway(name)
    assert "serverTLSBootstrap" not in first.kubectl(
        "get", "configmap", "-n", "kube-system", "kubelet-config", "-o", "yaml"
    ).stdout  # fmt: skip


def test_on_node_by_node(cluster: GatewayCluster, bridges: dict[str, LiveBridge], tmp_path: Path) -> None:
    """Killed at each step, and run again: all kubelets serve rightly, then the API server verifies them, as upgrades will."""
    first, manifest = cluster.control_plane, cluster.control_plane.kubeconfig_dir / "manifests/kube-apiserver.yaml"
    early = bridges["w1"].run("kubelets", "on")
    assert early.returncode == 4, early.stderr
    killed_at(bridges["cp"], "kubelet: replaced ", "kubelets", "on")
    run = bridges["cp"].run("kubelets", "on", "--force", columns=shown.COLUMNS)
    assert run.returncode == 4, f"{run.stdout}{run.stderr}"
    names = dict(zip([node.name for node in cluster.nodes], ("cp-1", "w-1", "w-2"), strict=True))
    names |= {node.ip: f"192.0.2.1{number}" for number, node in enumerate(cluster.nodes, start=1)}
    shown.assert_shown(
        "kubelets-on", run.stdout, names
    )  # the last lines: the killed run may have restarted the kubelet
    assert all(node.name in run.stdout for node in cluster.nodes[1:]), run.stdout
    assert "kubelet-certificate-authority" not in manifest.read_text()
    killed_at(bridges["w1"], "kubelet: runs ", "kubelets", "on")
    for role in ("w1", "w2"):
        run = bridges[role].run("kubelets", "on", "--force", columns=shown.COLUMNS)
        assert run.returncode == 0, f"{role}: {run.stdout}{run.stderr}"
    shown.assert_shown("kubelets-on-worker", run.stdout, names)
    wait_for("all to be right", lambda: levels(bridges["cp"], "kubelet-serving") == ["ok"] * 3)
    killed_at(bridges["cp"], "its manifest is back", "kubelets", "on")  # and the API server is not
    wait_for("the next run", lambda: bridges["cp"].run("kubelets", "on", "--force").returncode == 0)
    assert "--kubelet-certificate-authority=/etc/kubernetes/pki/ca.crt" in manifest.read_text()
    assert "Nothing to do" in bridges["cp"].run("kubelets", "on").stdout
    run = bridges["cp"].run("doctor", "--kubelets")
    assert run.returncode == 0, run.stdout
    version = first.exec("kubeadm", "version", "-o", "short").stdout.strip()
    upgrade = first.exec("kubeadm", "upgrade", "diff", version, "--kubeconfig", "/etc/kubernetes/admin.conf")
    assert "--kubelet-certificate-authority" not in upgrade.stdout  # the manifest is as an upgrade would write it
    with metrics_server.running(cluster, tmp_path / "metrics") as metrics:
        found = metrics.wait_for("figures of all nodes", lambda: top if len(top := metrics.top()) == 3 else None)
        assert set(found) == {node.name for node in cluster.nodes}
        # of a node, that is: while it starts, it may not have read yet by which CA it knows the API server
        assert not [line for line in metrics.said().splitlines() if "x509: " in line and "scrape" in line]
    worker = cluster.nodes[1]
    worker.exec("kubeadm", "upgrade", "node", "phase", "kubelet-config", "--patches", worker.root.parent / "patches")
    assert config_of(worker)["serverTLSBootstrap"] is True


# --- in motion -------------------------------------------------------------------------------------------------------


@pytest.mark.nightly  # and, for an hour, `python -m tests.measure.soak`
def test_fast_motion(cluster: GatewayCluster) -> None:
    """Each certificate is replaced in time while gateway, CA and API server are killed; nothing wrong is signed."""
    figures = Motion(cluster, seed=11).run(SECONDS, KILLS, rotations=6)
    assert figures.wrong == []
    assert set(figures.hostile) <= {"denied", "open"}
    assert sum(figures.hostile.values()) >= 5
    assert min(figures.least_left.values()) > 0, figures.least_left
    assert {key.partition(" ")[2] for key in figures.rotations} == set(CURRENT), figures.rotations
    assert len(figures.rotations) == 6, figures.rotations
    assert len(figures.takeovers) == list(KILLS.values()).count("gateway")
    assert sum(figures.kills.values()) == len(KILLS)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `scripts/image` builds; `$CA_BRIDGE_IMAGE` is one that was built before."""
    built = os.environ.get("CA_BRIDGE_IMAGE")
    if built:
        return Path(built)
    out = tmp_path_factory.mktemp("image") / "ca-bridge.tar"
    run = subprocess.run([ROOT / "scripts/image", out], capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr
    return out


@contextlib.contextmanager
def the_pods_words(node: Node) -> Iterator[None]:
    """A failure tells of the gateway's pod: its state, its log, and the leases."""
    try:
        yield
    except AssertionError as e:
        logs = ("logs", "--namespace=ca-bridge", "--all-pods", "--prefix", "--tail=60", "deployment/ca-bridge-gateway")
        asked = [logs, ("describe", "pods", "--namespace=ca-bridge"), ("get", "leases,csr", "-A")]
        shown = [node.kubectl(*command, check=False) for command in asked]
        raise AssertionError("\n".join([str(e), *(f"{one.stdout[-6000:]}{one.stderr}" for one in shown)])) from e


def test_the_image_takes_over_in_a_pod(cluster: GatewayCluster, image: Path) -> None:
    """The Deployment of `setup kubernetes` with the image of `scripts/image`: no root, and it signs when the others are gone."""
    first = cluster.control_plane
    kit_nodes.import_image(first, image)
    text = (cluster.manifests / "30-config.yaml").read_text()
    [command] = [line for line in text.splitlines() if "create secret generic" in line]
    arguments = shlex.split(command.lstrip("# "))[1:]
    files = first.kubeconfig_dir / "secret"
    files.mkdir()
    for number, argument in enumerate(arguments):
        if argument.startswith("--from-file="):
            name, path = argument.removeprefix("--from-file=").split("=")
            shutil.copy(path, files / name)
            arguments[number] = f"--from-file={name}=/etc/kubernetes/secret/{name}"
    first.kubectl(*arguments)
    with door(first, int(urlsplit(cluster.bao.url).port or 0)):
        cluster.apply(text)
        cluster.apply((cluster.manifests / "40-deployment.yaml").read_text())
        pods = ("get", "pods", "--namespace=ca-bridge", "-o", "jsonpath={.items[*].status.containerStatuses[*].ready}")
        with the_pods_words(first):
            wait_for("a pod that is ready", lambda: "true" in first.kubectl(*pods).stdout)
        for gateway in cluster.gateways.values():
            gateway.kill()
        before = gateways_objects(cluster)
        worker = cluster.nodes[2].name
        pair = cluster.api.credentials(f"system:node:{worker}", "system:nodes")
        who = ApiClient(url=cluster.api.url, trust=cluster.api.pki_dir / "ca.crt", pair=pair)
        usages = gateways.USAGES[CLIENT_KUBELET]
        csr = gateways.csr_pem(gateways.node_subject(worker))
        made = who.create_csr(csr, CLIENT_KUBELET, usages, name="by-a-pod")
        assert made.status in {201, 409}, made.text  # 409: asked again, as the first answer was lost
        with the_pods_words(
            first
        ):  # the worker's kubelet may ask, too, and its newer request takes the older one's place
            signed = wait_for(
                "a certificate", lambda: [c for n, c in gateways_objects(cluster).items() if n not in before]
            )
        signed[0][0].verify_directly_issued_by(cluster.api.ca.certificate)
        kit_nodes.assert_confined(first, "gateway")


def test_the_judge_can_find_something(cluster: GatewayCluster) -> None:
    """A certificate that an administrator writes past the gateway, which the policy of the API server refuses, is found."""
    name = "hostile-judged"
    admin = cluster.admin
    text = gateways.csr_pem(gateways.node_subject("cp9"))
    made = admin.create_csr(text, "example.com/other", ["client auth"], name=name)
    assert made.status == 201, made
    admin.decide(name)
    signer = Signer(certificate=cluster.api.ca.certificate, key=cluster.api.ca.key)
    leaf = signer.issue(SignRequest(spec=SPECS["admin.conf"], csr_pem=text, validity=timedelta(days=1))).leaf
    assert admin.issue(name, pem(leaf)).status == 200
    motion = Motion(cluster, seed=1)
    motion._judge()
    assert [one for one in motion.figures.wrong if one.startswith(name)]
