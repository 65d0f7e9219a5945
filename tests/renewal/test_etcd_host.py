"""A host of etcd alone, laid out below a directory of its own, with a CA elsewhere; and where etcd's client pair lies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.errors import Exit
from bridge.node import inventory
from bridge.node.inventory import Node
from bridge.pki.certificates import load_pem_certificates
from tests.kit.cas import Bridge, add_openssl
from tests.kit.pki import Pki, handmade_pki, kubeadm_pki

OURS = ["apiserver-etcd-client", "etcd-healthcheck-client", "etcd-peer", "etcd-server"]
KEPT = {"etcd", "apiserver-etcd-client.crt", "apiserver-etcd-client.key"}
MANIFEST = """\
apiVersion: v1
kind: Pod
metadata: {{name: etcd, namespace: kube-system}}
spec:
  containers:
  - name: etcd
    image: registry.k8s.io/etcd:3.7.0-0
    command: [etcd, --name=cp-1, --advertise-client-urls=https://192.0.2.10:2379,
      --listen-client-urls=https://192.0.2.10:2379, --cert-file={pki}/etcd/server.crt, --key-file={pki}/etcd/server.key,
      --peer-cert-file={pki}/etcd/peer.crt, --peer-key-file={pki}/etcd/peer.key,
      --trusted-ca-file={pki}/etcd/ca.crt, --peer-trusted-ca-file={pki}/etcd/ca.crt]
"""


def strip(pki: Pki) -> Path:
    """Leave what belongs to an etcd host, with its manifest; where that is."""
    for path in pki.pki_dir.iterdir():
        if path.name not in KEPT:
            path.unlink()
    for path in pki.kubeconfig_dir.glob("*.conf"):
        path.unlink()
    manifest = pki.kubeconfig_dir / "manifests/etcd.yaml"
    manifest.parent.mkdir(exist_ok=True)
    manifest.write_text(MANIFEST.format(pki=pki.pki_dir))
    return manifest


Make = Callable[..., Bridge]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A host whose certificates were made so long ago, for a year."""

    def made(*, days_ago: int = 0) -> Bridge:
        pki = handmade_pki(tmp_path / "node", now=datetime.now(UTC) - timedelta(days=days_ago))
        bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
        add_openssl(bridge, "etcd-ca")
        strip(pki)
        return bridge

    return made


def look(bridge: Bridge) -> Node:
    return inventory.read(bridge.pki.pki_dir, bridge.pki.kubeconfig_dir)


def test_a_host_of_etcd_is_known_by_its_files(make: Make) -> None:
    """With or without its manifest (a restart moves that away); one file of a control plane or a worker makes it another."""
    bridge = make()
    node = look(bridge)
    assert (node.role, node.is_etcd_host, node.is_worker, node.local_etcd) == ("etcd host", True, False, True)
    assert [item.spec.name for item in node.items] == OURS
    assert [state.authority.name for state in node.authorities] == ["etcd-ca"]
    assert node.troubles == ()
    assert (node.spec("apiserver-etcd-client").component, node.spec("etcd-server").component is None) == (None, False)
    (bridge.pki.kubeconfig_dir / "manifests/etcd.yaml").unlink()
    assert look(bridge).role == "etcd host"
    conf = bridge.pki.kubeconfig_dir
    for trace in ("pki/ca.crt", "pki/sa.key", "pki/apiserver.key", "pki/front-proxy-ca.crt", "admin.conf",
                  "kubelet.conf", "manifests/kube-apiserver.yaml"):  # fmt: skip
        (conf / trace).write_text("")
        assert look(bridge).role == "control plane", trace
        (conf / trace).unlink()
    shutil.rmtree(bridge.pki.pki_dir / "etcd")
    assert look(bridge).role == "control plane"  # a client pair alone is nothing that serves


@pytest.mark.slow
def test_kubeadms_own_files_are_one(tmp_path: Path) -> None:
    """The files of kubeadm's own phases, run as its page on a highly available etcd has it, are such a host."""
    pki = kubeadm_pki(tmp_path / "node", algorithm="ECDSA-P256")
    shutil.rmtree(pki.pki_dir)
    for path in pki.kubeconfig_dir.glob("*.conf"):
        path.unlink()
    for phase in ("etcd-ca", "etcd-server", "etcd-peer", "etcd-healthcheck-client", "apiserver-etcd-client"):
        pki.run_kubeadm("init", "phase", "certs", phase)
    pki.run_kubeadm("init", "phase", "etcd", "local")

    node = inventory.read(pki.pki_dir, pki.kubeconfig_dir)
    assert (node.role, node.troubles) == ("etcd host", ())
    assert [(item.spec.name, item.state) for item in node.items] == [(name, "present") for name in OURS]


def test_every_command_is_content_with_an_etcd_host(make: Make, tmp_path: Path) -> None:
    """No command misses a part of a control plane, and nothing is due."""
    bridge = make()
    for command in (["doctor"], ["plan"], ["renew"], ["check-expiration"], ["check-expiration", "-o", "nagios"],
                    ["check-expiration", "-o", "prometheus"], ["doctor", "--before-upgrade"]):  # fmt: skip
        run = bridge.run(*command)
        assert run.returncode == 0, f"{command}: {run.stdout}{run.stderr}"
        for other in ("front-proxy-client", "admin.conf", "kubelet-client"):
            assert other not in run.stdout + run.stderr
    assert bridge.run("export", str(tmp_path / "b.json"), "etcd-server").returncode == 0
    asked = bridge.run("renew", "apiserver", "kubelet-server")
    assert asked.returncode == 1
    assert "apiserver: there is no certificate to renew: this node is an etcd host" in asked.stderr


def test_all_that_it_has_is_renewed_and_comes_back(make: Make) -> None:
    """The client pair is among them, though no process here reads it; a rollback brings all four back."""
    bridge = make(days_ago=364)
    assert bridge.run("plan").returncode == Exit.DUE
    before = {item.spec.name: item.certificates for item in look(bridge).items}
    run = bridge.run("renew")
    assert run.returncode == 0, run.stderr
    assert all(item.certificates != before[item.spec.name] for item in look(bridge).items)
    back = bridge.run("rollback", "--force")
    assert back.returncode == 0, back.stderr
    assert {item.spec.name: item.certificates for item in look(bridge).items} == before


def test_the_client_pair_may_be_elsewhere(make: Make) -> None:
    """The client pair need not stay once it is on the control planes; etcd's own pairs must."""
    bridge = make()
    for suffix in ("crt", "key"):
        (bridge.pki.pki_dir / f"apiserver-etcd-client.{suffix}").unlink()
    assert bridge.run("renew").returncode == 0
    assert bridge.run("doctor").returncode == 0
    (bridge.pki.pki_dir / "etcd/peer.crt").unlink()
    run = bridge.run("renew")
    assert run.returncode == 1
    assert "etcd-peer" in run.stderr
    assert bridge.run("doctor").returncode == 1


@pytest.mark.parametrize(
    ("flag", "named"), [("cert-file", "etcd/gone.crt"), ("peer-cert-file", "etcd/server.crt")], ids=["gone", "twice"]
)
def test_a_manifest_that_names_another_file(make: Make, flag: str, named: str) -> None:
    """One that is not there, or a pair that belongs to two: `doctor` names flag and file, and nothing is changed."""
    bridge = make()
    path = bridge.pki.kubeconfig_dir / "manifests/etcd.yaml"
    words = path.read_text().replace("\n      ", " ").split(" ")
    path.write_text(
        " ".join(f"--{flag}={bridge.pki.pki_dir}/{named}," if w.startswith(f"--{flag}=") else w for w in words)
    )
    before = {item.spec.name: item.certificates for item in look(bridge).items}
    run = bridge.run("doctor")
    assert run.returncode == 1
    text = " ".join(run.stdout.split())
    assert f"wanted --{flag}=" in text
    assert named in text
    assert {item.spec.name: item.certificates for item in look(bridge).items} == before


def test_a_broken_manifest_is_reported(make: Make) -> None:
    """It is a host of etcd still, and the trouble is named."""
    bridge = make()
    (bridge.pki.kubeconfig_dir / "manifests/etcd.yaml").write_text("{")
    node = look(bridge)
    assert node.role == "etcd host"
    assert any(text.startswith("etcd: ") for text in node.troubles)


# --- a control plane beside an external etcd -------------------------------------------------------------------------


@pytest.fixture
def beside(tmp_path: Path) -> Bridge:
    """A control plane whose API server has its client pair at paths of its own."""
    pki = handmade_pki(tmp_path / "node")
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    for name in ("ca", "etcd-ca", "front-proxy-ca"):
        add_openssl(bridge, name)
    place = tmp_path / "client"
    place.mkdir()
    for source, target in (("apiserver-etcd-client.crt", "c.crt"), ("apiserver-etcd-client.key", "c.key"),
                           ("etcd/ca.crt", "ca.crt")):  # fmt: skip
        shutil.copy2(pki.pki_dir / source, place / target)
    for suffix in ("crt", "key"):
        (pki.pki_dir / f"apiserver-etcd-client.{suffix}").unlink()
    shutil.rmtree(pki.pki_dir / "etcd")
    write_api_server(bridge, place / "c.crt", place / "c.key")
    return bridge


def write_api_server(bridge: Bridge, certificate: Path, key: Path) -> None:
    """The manifest, which names these two."""
    place = bridge.pki.root.parent / "client"
    path = bridge.pki.kubeconfig_dir / "manifests/kube-apiserver.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "spec:\n  containers:\n  - name: kube-apiserver\n    image: registry.k8s.io/kube-apiserver:v1.37.2\n"
        f"    command: [kube-apiserver, --etcd-servers=https://192.0.2.1:2379, --etcd-cafile={place}/ca.crt,\n"
        f"      --etcd-certfile={certificate}, --etcd-keyfile={key}]\n"
    )


def test_files_that_are_not_there(beside: Bridge) -> None:
    """A client pair that the manifest names in vain is one error, with the path; all others are renewed."""
    gone = beside.pki.root / "gone.crt"
    write_api_server(beside, gone, gone.with_suffix(".key"))
    run = beside.run("renew", "all")
    assert run.returncode == 1
    assert f"apiserver-etcd-client: there is no certificate to renew in {gone}" in run.stderr
    assert "front-proxy-client" in run.stdout


def test_a_pair_of_two_roles_is_left_as_it_is(beside: Bridge) -> None:
    """A pair that the API server uses as etcd's client and as its kubelets' would get one of two names: neither moves."""
    pki = beside.pki.pki_dir
    pair = pki / "apiserver-kubelet-client.crt", pki / "apiserver-kubelet-client.key"
    write_api_server(beside, *pair)
    before = [path.read_bytes() for path in pair]
    run = beside.run("renew", "all")
    assert run.returncode == 1
    assert "the same as apiserver-kubelet-client's" in run.stderr
    assert [path.read_bytes() for path in pair] == before
    assert load_pem_certificates((pki / "front-proxy-client.crt").read_bytes())
