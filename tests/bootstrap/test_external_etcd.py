"""A new control plane whose etcd is elsewhere: its client pair is brought, or made, at the paths of kubeadm's configuration."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from bridge.bootstrap import ETCD_CLIENT, Places, specs_of
from bridge.bootstrap.whole import NodeLook
from bridge.node.kubeadm_config import ExternalEtcd
from bridge.settings.load import parse as settings_of
from tests.kit.new_node import CONFIG, NewNode

OF_ETCD = {"etcd-server", "etcd-peer", "etcd-healthcheck-client"}


@pytest.fixture
def node(tmp_path: Path) -> NewNode:
    """An empty one."""
    return NewNode.make(tmp_path)


def client(node: NewNode) -> Path:
    """Where the client pair goes."""
    return node.root / "etc/kubernetes/etcd-client"


def config(node: NewNode, *, key: str = "client-key.pem") -> str:
    """kubeadm's, with an external etcd."""
    files = f"caFile: {client(node)}/ca.pem, certFile: {client(node)}/client.pem, keyFile: {client(node)}/{key}"
    return f"{CONFIG}etcd: {{external: {{endpoints: ['https://192.0.2.1:2379'], {files}}}}}\n"


def bring(node: NewNode, *names: str) -> None:
    """Copy from an etcd host, as an operator does."""
    client(node).mkdir()
    sources = {
        "ca.pem": "etcd/ca.crt",
        "client.pem": "apiserver-etcd-client.crt",
        "client-key.pem": "apiserver-etcd-client.key",
    }
    for name in names:
        shutil.copy2(node.cas.pki_dir / sources[name], client(node) / name)


def files(node: NewNode) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in client(node).iterdir()}


def test_the_pair_is_made_where_the_configuration_has_it(node: NewNode) -> None:
    """Its key is closed to others, nothing of etcd's own is made, the whole is judged, and a second run changes nothing."""
    run = node.init(config=config(node))
    assert run.returncode == 0, run.stderr
    assert set(files(node)) == {"ca.pem", "client.pem", "client-key.pem"}
    modes = {path.name: path.stat().st_mode & 0o777 for path in client(node).iterdir()}
    assert modes == {"ca.pem": 0o644, "client.pem": 0o644, "client-key.pem": 0o600}
    leaf = x509.load_pem_x509_certificate(files(node)["client.pem"])
    assert leaf.subject.rfc4514_string() == "CN=kube-apiserver-etcd-client"
    assert not (node.places.pki / "etcd").exists()
    assert not (node.places.pki / "apiserver-etcd-client.crt").exists()
    assert not OF_ETCD & set(run.stdout.split())

    before = node.files()
    assert node.init(config=config(node)).returncode == 0
    assert node.files() == before
    checked = node.run("check")
    assert checked.returncode == 0, checked.stderr
    (client(node) / "client-key.pem").write_bytes((node.places.pki / "apiserver.key").read_bytes())
    checked = node.run("check")
    assert checked.returncode == 5
    assert "client-key.pem: wanted the key of its certificate, found another one" in checked.stderr


def test_a_pair_that_was_brought_stays(node: NewNode) -> None:
    """As kubeadm's page has it copied from an etcd host: it is judged, and not asked for."""
    bring(node, "ca.pem", "client.pem", "client-key.pem")
    before = files(node)
    run = node.init(config=config(node))
    assert run.returncode == 0, run.stderr
    assert files(node) == before
    assert "apiserver-etcd-client" not in run.stdout


def test_a_pair_that_is_not_right_is_refused(node: NewNode) -> None:
    """One of another CA, or half of one: nothing is put in place, and it is left as it is."""
    bring(node, "ca.pem", "client.pem")
    before = node.files()
    half = node.init(config=config(node))
    assert (half.returncode, "client.pem" in half.stderr) == (2, True), half.stderr
    assert node.files() == before

    shutil.copy2(node.cas.pki_dir / "front-proxy-client.crt", client(node) / "client.pem")
    shutil.copy2(node.cas.pki_dir / "front-proxy-client.key", client(node) / "client-key.pem")
    before = node.files()
    foreign = node.init(config=config(node))
    assert foreign.returncode == 5, foreign.stderr
    assert "client-key.pem: " in foreign.stderr
    assert node.files() == before


def test_a_file_of_another_certificate_is_refused(node: NewNode) -> None:
    """A key that the API server serves with would be replaced at the wrong time."""
    text = config(node).replace(f"{client(node)}/client-key.pem", f"{node.places.pki}/apiserver.key")
    run = node.init(config=text)
    assert run.returncode == 2
    assert "etcd.external.keyFile: wanted a file of its own by its absolute path, found that of apiserver" in run.stderr
    assert node.files() == {}


def test_without_tls_there_is_no_pair(node: NewNode) -> None:
    """An etcd without TLS needs neither a client pair nor a CA of its own."""
    run = node.init(config=CONFIG + "etcd: {external: {endpoints: ['http://192.0.2.1:2379']}}\n")
    assert run.returncode == 0, run.stderr
    assert not [path for path in node.files() if "etcd" in path]


def test_copies_bring_the_pair_back(node: NewNode, tmp_path: Path) -> None:
    """The pair comes back with its modes; after `kubeadm reset` no CA is asked."""
    keep = tmp_path / "kept"
    assert node.init("--keep", keep, config=config(node)).returncode == 0
    before = files(node)
    node.wipe()
    shutil.rmtree(client(node))
    (node.places.kubeconfigs / "kubeadm.yaml").unlink()
    run = node.init("--keep", keep, config=config(node))
    assert run.returncode == 0, run.stderr
    assert files(node) == before
    assert (client(node) / "client.pem").stat().st_mode & 0o777 == 0o644
    assert (client(node) / "client-key.pem").stat().st_mode & 0o777 == 0o600


def test_which_certificates_there_are() -> None:
    """The client's alone is left of etcd's, if it speaks TLS; a worker has none either way."""
    tls = ExternalEtcd(ca_file="/a", certificate_file="/b", key_file="/c")
    local = {spec.name for spec in specs_of("init")}
    assert {spec.name for spec in specs_of("init", tls)} == local - OF_ETCD
    assert {spec.name for spec in specs_of("init", ExternalEtcd())} == local - OF_ETCD - {ETCD_CLIENT.name}
    assert specs_of("worker", tls) == specs_of("worker")
    places = Places(pki=Path("/p"), kubeconfigs=Path("/k"), external_etcd=tls)
    assert places.pair(ETCD_CLIENT) == (Path("/c"), Path("/b"))
    files = NodeLook(
        places=places, role="init", read=lambda _: None, now=datetime.now(UTC), settings=settings_of("")
    ).files()
    assert Path("/p/etcd") not in {path.parent for path in files}
