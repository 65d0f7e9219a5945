"""The list for a CA's administrator names exactly the certificates that kubeadm will ask for on nodes that don't exist yet."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from bridge.bootstrap import Role, for_node, keys, orders, shared, specs_of
from bridge.bootstrap.orders import Order, OrderError, new_node, order_for
from bridge.node.kubeadm_config import parse_documents as parse
from bridge.pki.certificates import attributes, san_entries
from bridge.specs import AUTHORITIES
from tests.kit import programs
from tests.kit.new_node import CONFIG, NewNode

pytestmark = pytest.mark.kube


@pytest.mark.parametrize("role", ["init", "control-plane"])
def test_names_are_what_kubeadm_asks_for(role: Role, tmp_path: Path) -> None:
    """Subject and SANs of every CSR of the real `generate-csr`, without kubeadm."""
    config = parse(f"{CONFIG}networking: {{serviceSubnet: 10.112.0.0/12, dnsDomain: x.example}}\n".encode())
    order = Order(cluster=shared(config), authorities={}, node=new_node(role, "cp-7", ["192.0.2.17"]))
    found = {
        name: one
        for ones in keys.expected_certificates(order, datetime.now(UTC)).values()
        for name, one in ones.items()
    }
    text = for_node(config, "cp-7", "192.0.2.17", "unix:///run/none.sock").text().encode()
    made = keys.by_kubeadm(str(programs.require("kubeadm")), config.version, text, specs_of(role), tmp_path)

    assert made.keys() <= found.keys()
    for name, one in made.items():
        request = x509.load_pem_x509_csr(one.csr_pem)
        assert sorted(attributes(request.subject)) == sorted(attributes(found[name].subject)), name
        assert san_entries(request) == san_entries(found[name]), name


@pytest.mark.parametrize("name", ["w-1", f"w-{'1' * 60}", "123"])
def test_a_worker_needs_one_ca(name: str) -> None:
    """A worker needs its kubelet's certificates from one CA, and no others."""
    order = Order(cluster=shared(parse(CONFIG.encode())), authorities={}, node=new_node("worker", name, ["192.0.2.21"]))
    found = keys.expected_certificates(order, datetime.now(UTC))

    assert set(found) == {"ca"}
    assert attributes(found["ca"]["kubelet.conf"].subject)[-1][1] == f"system:node:{name}"


def test_an_order_without_a_node_says_nothing() -> None:
    """An order without a node is an error, since it names no node's certificates."""
    with pytest.raises(OrderError, match="the order names no node"):
        keys.expected_certificates(Order(cluster=shared(parse(CONFIG.encode())), authorities={}), datetime.now(UTC))


def test_roles_of_nodes_that_are_yet_to_be_made(tmp_path: Path) -> None:
    """Each node's own, and a worker's policy opens no role of a control plane."""
    node = NewNode.make(tmp_path / "node")
    cas = {name: (x509.load_pem_x509_certificate(node.cas.ca_pem(name)[0]),) for name in AUTHORITIES}
    cluster = parse(CONFIG.encode())
    places: list[str | Path] = []
    for role, name, address in (("init", "cp-1", "192.0.2.10"), ("worker", "w-1", "192.0.2.21")):
        places += ["--order", tmp_path / f"{name}.json"]
        (tmp_path / f"{name}.json").write_bytes(orders.dumps(order_for(cluster, cas, new_node(role, name, [address]))))
    run = node.run("setup", "vault", *places, "-o", tmp_path / "roles")

    assert run.returncode == 0, run.stderr
    files = {path.name: path.read_text() for path in (tmp_path / "roles").iterdir()}
    assert set(files) == {"cp-1-ca.sh", "cp-1-etcd-ca.sh", "cp-1-front-proxy-ca.sh", "w-1-ca.sh"}
    assert "system:node:w-1" in files["w-1-ca.sh"]
    assert "kube-apiserver" not in files["w-1-ca.sh"]
    assert "192.0.2.10" in files["cp-1-ca.sh"]
    assert "system:masters" in files["cp-1-ca.sh"]
