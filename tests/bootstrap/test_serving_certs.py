"""A new control plane whose kubeadm configuration has manifests name serving certificates: they are there before kubeadm."""

from __future__ import annotations

from pathlib import Path

from bridge.bootstrap import servers_of, specs_of
from bridge.node.kubeadm_config import KubeadmConfig
from bridge.node.pairs import cluster_with
from bridge.pki.certificates import load_pem_certificates, san_entries
from bridge.specs import SERVERS, Component
from tests.kit.new_node import CONFIG, NewNode

ADDED = """\
scheduler:
  extraArgs:
  - {{name: tls-cert-file, value: {pki}/scheduler/server.crt}}
  - {{name: tls-private-key-file, value: {pki}/scheduler/server.key}}
"""


def test_the_pair_is_made_where_the_configuration_has_it(tmp_path: Path) -> None:
    """Closed to others, and judged by `check`; the other component's, which it does not name, is not made."""
    node = NewNode.make(tmp_path)
    config = CONFIG + ADDED.format(pki=node.places.pki)
    run = node.init(config=config)
    assert run.returncode == 0, run.stderr
    certificate, key = (node.places.pki / f"scheduler/server.{suffix}" for suffix in ("crt", "key"))
    [leaf] = load_pem_certificates(certificate.read_bytes())
    assert leaf.subject.rfc4514_string() == "CN=kube-scheduler"
    assert ("DNS", "localhost") in san_entries(leaf)
    assert key.stat().st_mode & 0o777 == 0o600
    assert not (node.places.pki / "controller-manager").exists()
    before = node.files()
    assert node.init(config=config).returncode == 0
    assert node.files() == before
    key.write_bytes((node.places.pki / "apiserver.key").read_bytes())
    run = node.init(config=config)
    assert run.returncode != 0


def test_which_certificates_there_are() -> None:
    """None unless the configuration names our own place; a worker has none either way."""
    pki, cluster = Path("/etc/kubernetes/pki"), {"apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "ClusterConfiguration"}
    assert servers_of(KubeadmConfig.of([cluster]), pki) == ()
    both = cluster_with(cluster_with(cluster, Component.SCHEDULER, pki), Component.CONTROLLER_MANAGER, pki)
    servers = servers_of(KubeadmConfig.of([both]), pki)
    assert servers == tuple(SERVERS.values())
    assert servers_of(KubeadmConfig.of([both]), Path("/elsewhere")) == ()
    assert set(specs_of("control-plane", None, servers)) - set(specs_of("control-plane")) == set(servers)
    assert specs_of("worker", None, servers) == specs_of("worker")
