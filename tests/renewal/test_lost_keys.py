"""A certificate without its key, and a CA file that can't be read: a quiet night would be a lie."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.node import kubeconfig
from bridge.node.sample_pki import ca_certificate
from bridge.pki.certificates import has_key_of, load_pem_certificates, pem
from bridge.pki.csr import generate_key
from tests.kit.cas import Bridge, add_openssl
from tests.kit.pki import Pki, handmade_pki


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def bridge(tmp_path: Path) -> Bridge:
    """A node of which nothing is due, and the CA of its API server's certificates."""
    made = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    add_openssl(made, "ca")
    assert made.run("renew").returncode == 0
    assert "nothing is due" in made.run("plan").stdout
    return made


def lose(pki: Pki, how: str) -> str:
    """Lose a key, and tell whose."""
    key, admin = pki.pki_dir / "apiserver.key", pki.kubeconfig_dir / "admin.conf"
    match how:
        case "missing":
            key.unlink()
        case "empty":
            key.write_bytes(b"")
        case "other":
            shutil.copy(pki.pki_dir / "front-proxy-client.key", key)
        case _:
            other = kubeconfig.key_data((pki.kubeconfig_dir / "scheduler.conf").read_bytes()) or b""
            own = kubeconfig.parse(admin.read_bytes()).certificate_data or b""
            admin.write_bytes(kubeconfig.with_credentials(admin.read_bytes(), own, other))
            return "admin.conf"
    return "apiserver"


@pytest.mark.attack("N30")
@pytest.mark.parametrize("how", ["missing", "empty", "other", "embedded"])
def test_a_certificate_without_its_key_is_renewed(bridge: Bridge, how: str) -> None:
    """Its component would not start again; the next run makes a pair, and says why; the one after it has nothing to do."""
    name = lose(bridge.pki, how)
    plan, renewed = bridge.run("plan"), bridge.run("renew")

    assert name in plan.stdout
    assert "nothing is due" not in plan.stdout
    assert renewed.returncode == 0, renewed.stderr
    assert f"{name} is renewed for its key: wanted the key of " in renewed.stderr
    if name == "apiserver":
        leaf = load_pem_certificates((bridge.pki.pki_dir / "apiserver.crt").read_bytes())[0]
        key = load_pem_private_key((bridge.pki.pki_dir / "apiserver.key").read_bytes(), None)
        assert key.public_key() == leaf.public_key()
    assert "nothing is due" in bridge.run("plan").stdout


@pytest.mark.attack("N30")
@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_a_ca_that_can_not_be_read_is_an_error(bridge: Bridge, damage: str) -> None:
    """Due or not: no component starts without it, and no certificate can be proven."""
    path = bridge.pki.pki_dir / "ca.crt"
    path.unlink() if damage == "missing" else path.write_text("garbage")
    for command in ("plan", "renew"):
        run = bridge.run(command)
        assert run.returncode == 1, run.stdout + run.stderr
        assert str(path) in run.stdout + run.stderr


@pytest.mark.attack("N4")
def test_below_a_ca_that_ends_first_a_certificate_is_due(tmp_path: Path) -> None:
    """The old CA, second in its file, ends in two days: the first one signs the next certificates, and all is quiet."""
    pki = handmade_pki(tmp_path / "node", ca_not_after=now() + timedelta(days=2))
    key = generate_key("ecdsa-p256")
    new = ca_certificate("kubernetes", key, now() - timedelta(days=1), now() + timedelta(days=3000))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    quiet = bridge.run("plan")
    pki.trust("etcd-ca", pem(new))
    due = bridge.run("plan")

    assert "nothing is due" in quiet.stdout  # a renewal below the CA that ends would change nothing
    assert "etcd-peer" in due.stdout
    assert "front-proxy-client" not in due.stdout


@pytest.mark.parametrize("algorithm", ["rsa-2048", "ecdsa-p256"])
def test_a_key_is_known_by_its_public_half(tmp_path: Path, algorithm: str) -> None:
    """It knows the forms that kubeadm and OpenSSL write, and says nothing about other texts."""
    pki = handmade_pki(tmp_path, key=algorithm)  # type: ignore[arg-type]  # of the two
    leaf = load_pem_certificates((pki.pki_dir / "apiserver.crt").read_bytes())[0]
    own, other = ((pki.pki_dir / f"{name}.key").read_bytes() for name in ("apiserver", "front-proxy-client"))

    assert (has_key_of(own, leaf), has_key_of(other, leaf)) == (True, False)
    assert has_key_of(b"", leaf) is False
    begin, end = b"-----BEGIN PRIVATE KEY-----\n", b"-----END PRIVATE KEY-----\n"
    assert has_key_of(begin + b"MAA=\n" + end, leaf) is None
    assert has_key_of(begin + b"no base64!\n" + end, leaf) is None
