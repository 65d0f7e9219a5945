"""A live certificate that another user put there, through every command that would make the next one from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.node import kubeconfig
from bridge.pki.certificates import pem
from bridge.pki.csr import key_pem
from tests.counts import Tried
from tests.kit.cas import Bridge, add_openssl, live_certificates
from tests.kit.issuing import Signer
from tests.kit.pki import handmade_pki


@pytest.fixture
def bridge(tmp_path: Path) -> Bridge:
    """A node on which everything is due, with an `openssl ca` directory that signs all it is asked for."""
    pki = handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=9))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    for authority in ("ca", "etcd-ca"):
        add_openssl(bridge, authority)
    return bridge


def root_in_etcd(bridge: Bridge) -> str:
    """A self-made certificate with CN=root in the place of etcd's."""
    now = datetime.now(UTC)
    forged = Signer.make("root", begin=now - timedelta(days=300), end=now + timedelta(days=9), ca=False)
    (bridge.pki.pki_dir / "etcd/server.crt").write_bytes(pem(forged.certificate))
    (bridge.pki.pki_dir / "etcd/server.key").write_bytes(key_pem(forged.key))
    return "etcd-server"


def masters_in_the_scheduler(bridge: Bridge) -> str:
    """The pair of super-admin.conf, which the CA did sign, in scheduler.conf."""
    directory = bridge.pki.kubeconfig_dir
    strong = (directory / "super-admin.conf").read_bytes()
    certificate, key = kubeconfig.parse(strong).certificate_data, kubeconfig.key_data(strong)
    assert certificate
    assert key
    weak = directory / "scheduler.conf"
    weak.write_bytes(kubeconfig.with_credentials(weak.read_bytes(), certificate, key))
    return "scheduler.conf"


PLANTED: dict[Callable[[Bridge], str], set[str]] = {
    root_in_etcd: {"issuer", "CN"},
    masters_in_the_scheduler: {"CN", "O"},
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_certificate_is_not_signed_again(
    plant: Callable[[Bridge], str], bridge: Bridge, tmp_path: Path, tried: Tried
) -> None:
    """`renew`, `--csr-only`, `export`, `plan` and `doctor` name what is wrong and spend no signature; a flag takes it."""
    name = plant(bridge)
    before = live_certificates(bridge.pki)
    commands = (["renew", name], ["renew", name, "--csr-only", "--csr-dir", str(tmp_path / "csrs")], ["plan", name],
                ["export", str(tmp_path / "bundle"), name])  # fmt: skip
    for command in commands:
        run = bridge.run(*command)
        assert run.returncode == 1, run.stderr
        assert all(f"{subject}: wanted " in run.stderr for subject in PLANTED[plant]), run.stderr
        assert f"`--any-identity {name}` renews it as it is" in run.stderr
    assert f"error: {name}" in run.stderr
    assert "is not" in bridge.run("doctor").stdout
    assert not (tmp_path / "bundle").exists()
    assert not list((tmp_path / "csrs").glob("*"))
    assert live_certificates(bridge.pki) == before
    assert not list((bridge.directory / "desk").rglob("newcerts/*.pem"))
    planned = bridge.run("plan", name, "--any-identity", name, "-o", "json")
    assert (planned.returncode, [each["name"] for each in json.loads(planned.stdout)["renew"]]) == (3, [name])
    assert f"{name} is renewed as it is, as --any-identity says: " in planned.stderr
    exported = bridge.run("export", str(tmp_path / "bundle"), name, "--any-identity", name)
    assert exported.returncode == 0, exported.stderr
    run = bridge.run("renew", name, "--any-identity", name)
    assert run.returncode == 0, run.stderr
    tried("live certificates of somebody else, through each command", 1)


def test_the_others_are_renewed(bridge: Bridge, tried: Tried) -> None:
    """The planted certificate fails alone, also by cron, and with the flag for another name, too."""
    name = root_in_etcd(bridge)
    before = live_certificates(bridge.pki)
    run = bridge.run("renew", "etcd-server", "etcd-peer", "--any-identity", "etcd-peer")
    assert run.returncode == 1, run.stderr
    after = live_certificates(bridge.pki)
    assert {each for each in after if after[each] != before[each]} == {"etcd-peer"}
    assert after[name] == before[name]
    tried("live certificates of somebody else, through each command", 1)
