"""A kubelet.conf that refers to the kubelet's own file, as kubeadm's kubelet-finalize leaves it, below a CA elsewhere."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.node import inventory
from bridge.pki import csr
from bridge.pki.certificates import load_pem_certificates, pem
from tests.kit.cas import Bridge, add_openssl
from tests.kit.pki import finalize, handmade_pki


@pytest.fixture
def make(tmp_path: Path) -> Bridge:
    """A node with a week of a year left, whose CA is an `openssl ca` directory elsewhere."""
    made = datetime.now(UTC) - timedelta(days=358)
    pki = handmade_pki(tmp_path / "node", external=True, now=made)
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    add_openssl(bridge, "ca")
    return bridge


def test_it_is_renewed_where_the_kubelet_reads_it(make: Bridge) -> None:
    """
    Leaf and key in a new dated file, for its owner alone, to which the symlink leads; kubelet.conf stays as it is.

    The kubelet is to be restarted; a rollback leads the symlink back, and takes the new file away.
    """
    current = finalize(make.pki)
    dated, kubeconfig = current.resolve(), (make.pki.kubeconfig_dir / "kubelet.conf").read_bytes()
    led = current.readlink()
    old = load_pem_certificates(current.read_bytes())[0]
    run = make.run("renew", "kubelet.conf", "-o", "json")
    assert run.returncode == 0, run.stderr
    fresh = current.resolve()
    assert (make.pki.kubeconfig_dir / "kubelet.conf").read_bytes() == kubeconfig
    assert fresh.parent == dated.parent
    assert fresh.name > dated.name
    assert current.readlink() == fresh
    assert (fresh.stat().st_mode & 0o777, fresh.is_symlink()) == (0o600, False)
    assert load_pem_certificates(dated.read_bytes())[0] == old
    text = current.read_bytes()
    new = load_pem_certificates(text)[0]
    assert pem(new) in text
    assert load_pem_private_key(csr.key_block(text), None).public_key() == new.public_key()
    assert (new.subject, new.serial_number != old.serial_number) == (old.subject, True)
    assert json.loads(run.stdout)["restart"] == ["kubelet"]
    assert make.run("rollback").returncode == 0
    assert (current.readlink(), fresh.exists()) == (led, False)
    assert load_pem_certificates(current.read_bytes())[0] == old
    assert make.run("rollback").returncode == 0
    assert current.readlink() == fresh
    assert load_pem_certificates(current.read_bytes())[0] == new


def test_it_is_due_when_no_kubelet_has_rotated_it(make: Bridge) -> None:
    """Past its rotation window it is ours like any other; with the CA's key on the node it is the kubelet's."""
    current = finalize(make.pki)
    due = make.run("plan")
    assert "kubelet.conf" in due.stdout
    key = make.pki.pki_dir / "ca.key"
    key.write_bytes(make.pki.ca_pem("ca")[1])
    key.chmod(0o600)
    others = make.run("plan")
    assert str(current) not in others.stdout.replace("renews by itself", "")
    (item,) = (one for one in inventory.read(make.pki.pki_dir, make.pki.kubeconfig_dir).items if one.rotates)
    assert not item.managed
    key.unlink()


def test_before_that_it_is_left_to_the_kubelet(tmp_path: Path) -> None:
    """A signer in the cluster may answer until 90 % of the lifetime are over, whatever `renewal.before` says."""
    pki = handmade_pki(tmp_path / "node", external=True, now=datetime.now(UTC) - timedelta(days=305))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    for authority in ("ca", "etcd-ca", "front-proxy-ca"):
        add_openssl(bridge, authority)
    bridge.add("renewal", {"before": "90d"})
    finalize(pki)
    named = json.loads(bridge.run("renew", "-o", "json").stdout)["renewed"]
    assert "kubelet.conf" not in [one["name"] for one in named]
    assert "apiserver" in [one["name"] for one in named]
    assert bridge.run("renew", "kubelet.conf").returncode == 0


def test_the_request_proves_who_asks(make: Bridge, tmp_path: Path) -> None:
    """The old key is behind the certificates in the same file."""
    finalize(make.pki)
    run = make.run("export", str(tmp_path / "bundle.json"), "kubelet.conf")
    assert run.returncode == 0, run.stderr
    (request,) = json.loads((tmp_path / "bundle.json").read_text())["requests"]
    assert request["proof"]
