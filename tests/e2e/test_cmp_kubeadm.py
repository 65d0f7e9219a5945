"""PKIs that the real kubeadm made, renewed whole through a CMP registration authority, at once and over several runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bridge.specs import AUTHORITIES
from tests.kit import cmp
from tests.kit.cas import Bridge, live_certificates
from tests.kit.pki import KubeadmPki, handmade_pki, kubeadm_pki
from tests.kit.renewed import Snapshot, assert_renewed

pytestmark = pytest.mark.kube("cmp-ra", "kubeadm")


@pytest.fixture(scope="module")
def ra(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cmp.RegistrationAuthority]:
    """One for all tests; each adds its own CAs."""
    with cmp.registration_authority(tmp_path_factory.mktemp("ra") / "ra") as server:
        yield server


@pytest.fixture
def pki(tmp_path: Path) -> KubeadmPki:
    """A control plane's PKI, its CA keys elsewhere."""
    return kubeadm_pki(tmp_path / "node")


def bridge_with(
    pki: KubeadmPki, directory: Path, ra: cmp.RegistrationAuthority, behaviour: str = "", **keys: Any
) -> Bridge:
    """Settings with one CMP server for all three CAs, which are called after the test's directory."""
    bridge = Bridge(pki=pki, directory=directory / "bridge")
    bridge.add("backend.corp", {"type": "cmp", "url": "http://127.0.0.1:1", "timeout": "2m", "wait": "1s", **keys})
    for authority in AUTHORITIES:
        place = f"{directory.name}-{authority}".replace("_", "-")
        ra.add_ca(place, *pki.ca_pem(authority), days=365)
        bridge.add(f"authority.{authority}", {"backend": "corp", "url": ra.url(place, behaviour)})
    return bridge


def places(ra: cmp.RegistrationAuthority, directory: Path) -> list[str]:
    """The names of a test's CAs."""
    return [path.name for path in ra.directory.glob(f"{directory.name.replace('_', '-')}-*")]


@pytest.mark.parametrize("way", ["secret", "signature", "template"])
def test_renews_everything(pki: KubeadmPki, tmp_path: Path, ra: cmp.RegistrationAuthority, way: str) -> None:
    """With a shared secret, with an agent's signature, and with templates for a server that trusts us as an RA."""
    keys = ra.mac() if way == "secret" else ra.signature()
    bridge = bridge_with(pki, tmp_path, ra, **keys, **({"mode": "cr"} if way == "template" else {}))
    before = Snapshot.of(pki)
    doctor = bridge.run("doctor")
    assert "corp (cmp)" in doctor.stdout + doctor.stderr
    assert not [line for name in places(ra, tmp_path) for line in ra.requests(name) if line["type"] != "21"]
    run = bridge.run("renew", "all")
    assert run.returncode == 0, run.stderr
    assert_renewed(pki, before, tmp_path / "scratch")
    wanted = {"2"} if way == "template" else {"4"}
    assert {line["type"] for name in places(ra, tmp_path) for line in ra.requests(name)} - {"21"} == wanted


@pytest.mark.parametrize("way", ["secret", "signature"])
def test_an_officer_approves_between_runs(
    pki: KubeadmPki, tmp_path: Path, ra: cmp.RegistrationAuthority, way: str
) -> None:
    """Ordered by the first run, asked for by the second, installed by the third: each certificate requested once."""
    keys = ra.mac() if way == "secret" else ra.signature()
    bridge = bridge_with(pki, tmp_path, ra, "wait", **keys)
    before = Snapshot.of(pki)
    for _ in range(2):
        run = bridge.run("renew", "all")
        assert run.returncode == 4, run.stderr
        assert Snapshot.of(pki) == before
        assert live_certificates(pki) == before.certificates
    listed = bridge.run("pending", "list", "-o", "json")
    assert "not approved yet" in listed.stdout
    names = places(ra, tmp_path)
    for name in names:
        ra.approve(name)
    run = bridge.run("renew", "all")
    assert run.returncode == 0, run.stderr
    assert_renewed(pki, before, tmp_path / "scratch")
    ordered = [line for name in names for line in ra.requests(name) if line["type"] == "4"]
    assert len(ordered) == len(before.certificates)
    assert json.loads(bridge.run("pending", "list", "-o", "json").stdout)["pending"] == []


def test_an_officer_refuses(tmp_path: Path, ra: cmp.RegistrationAuthority) -> None:
    """The error shows the reason, nothing on disk moves, and the next run orders anew."""
    pki = handmade_pki(tmp_path / "node")
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    ra.add_ca("refusing", *pki.ca_pem("front-proxy-ca"), days=365)
    bridge.add("backend.corp", {"type": "cmp", "url": ra.url("refusing", "wait"), "wait": "1s", **ra.mac()})
    bridge.add("authority.front-proxy-ca", {"backend": "corp"})
    before = live_certificates(pki)
    assert bridge.run("renew", "front-proxy-client").returncode == 4
    ra.refuse("refusing", "this node is retired")
    run = bridge.run("renew", "front-proxy-client")
    assert run.returncode == 5
    assert "this node is retired" in run.stderr
    assert live_certificates(pki) == before
    (ra.directory / "refusing/refused").unlink()
    assert bridge.run("renew", "front-proxy-client").returncode == 4
    assert [line["type"] for line in ra.requests("refusing")].count("4") == 2


def test_a_ca_that_dies_between_request_and_confirmation(tmp_path: Path) -> None:
    """The CA has issued without a confirmation: nothing is installed, and the next run gets another certificate."""
    pki = handmade_pki(tmp_path / "node")
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    before = live_certificates(pki)["front-proxy-client"]
    with cmp.registration_authority(tmp_path / "ra") as dying:
        dying.add_ca("ca", *pki.ca_pem("front-proxy-ca"), days=365)
        keys = {"type": "cmp", "url": dying.url("ca", "dies"), "timeout": "2m", "retry_for": "1s", **dying.mac()}
        bridge.add("backend.corp", keys)
        bridge.add("authority.front-proxy-ca", {"backend": "corp"})
        run = bridge.run("renew", "front-proxy-client")
        assert run.returncode == 6, run.stderr
        assert dying.process.wait(180) == 1
        assert [line["type"] for line in dying.requests("ca")] == ["21", "4", "24"]
        assert live_certificates(pki)["front-proxy-client"] == before
    with cmp.registration_authority(tmp_path / "ra", dying.port) as living:
        bridge.tables[1] = bridge.tables[1].replace("/ca/dies", "/ca/explicit")
        bridge.config.write_text("\n".join(bridge.tables))
        run = bridge.run("renew", "front-proxy-client")
        assert run.returncode == 0, run.stderr
        assert living.lines("confirmation") == [{"accepted": ""}]
    assert live_certificates(pki)["front-proxy-client"] != before


#: What answers, and the exit code.
HOSTILE: dict[str, tuple[str, cmp.Reply | None, int]] = {
    "another key": ("wrongkey", None, 5),
    "another subject": ("wrongsubject", None, 5),
    "another usage": ("wrongusage", None, 5),
    "another secret": ("badmac", None, 5),
    "no protection": ("raw", None, 5),
    "no certificate": ("nocert", None, 5),
    "late": ("", cmp.Reply(after_seconds=60), 6),
    "cut off": ("", cmp.Reply(body=b"0\x82\x13\x84abc", length=5000), 6),
    "endless": ("", cmp.Reply(body=b"0\x84\x7f\xff\xff\xff" + b"\0" * 9_994, endless=True), 5),
    "a sign-in page": ("", cmp.Reply(content_type="text/html", body=b"<html>"), 5),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_server_moves_nothing(tmp_path: Path, ra: cmp.RegistrationAuthority, case: str) -> None:
    """Exit code and message say what it was; the files are as before, and its right twin renews them afterwards."""
    behaviour, reply, code = HOSTILE[case]
    pki = handmade_pki(tmp_path / "node")
    place = case.replace(" ", "-")
    ra.add_ca(place, *pki.ca_pem("front-proxy-ca"), days=365)
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    files = {path: path.read_bytes() for path in pki.kubeconfig_dir.rglob("*") if path.is_file()}
    with cmp.front(ra.url(place).removesuffix(f"/{place}"), instead=reply) as front:
        url = "/".join(filter(None, [front.url, place, behaviour]))
        limit = "2s" if case == "late" else "2m"
        keys = {"type": "cmp", "url": url, "timeout": limit, "retry_for": "1s", **ra.mac()}
        bridge.add("backend.corp", keys)
        bridge.add("authority.front-proxy-ca", {"backend": "corp"})
        run = bridge.run("renew", "front-proxy-client")
        assert run.returncode == code, run.stderr
        assert "front-proxy-client" in run.stderr + run.stdout
        assert {path: path.read_bytes() for path in pki.kubeconfig_dir.rglob("*") if path.is_file()} == files
    bridge.tables[1] = bridge.tables[1].replace(url, ra.url(place)).replace('"2s"', '"2m"')
    bridge.config.write_text("\n".join(bridge.tables))
    run = bridge.run("renew", "front-proxy-client")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("behaviour", ["", "reject", "wait", "badmac", "nosuchca"])
def test_the_secret_is_nowhere(tmp_path: Path, ra: cmp.RegistrationAuthority, behaviour: str) -> None:
    """The secret is neither in the output at the highest verbosity, in both log formats, nor in the state directory."""
    pki = handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    place = f"quiet-{behaviour}"
    ra.add_ca(place, *pki.ca_pem("etcd-ca"), days=365)
    url = ra.url("nosuch" if behaviour == "nosuchca" else place, behaviour.removesuffix("nosuchca"))
    keys = {"type": "cmp", "url": url, "timeout": "2m", "retry_for": "1s", "wait": "1s"}
    bridge.add("backend.corp", {**keys, **ra.mac(), "secret_file": bridge.secret("cmp.secret", cmp.SECRET)})
    bridge.add("authority.etcd-ca", {"backend": "corp"})
    printed = ""
    for log_format in ("text", "json"):
        names = ("etcd-server", "etcd-peer", "etcd-healthcheck-client", "apiserver-etcd-client")
        for command in (("renew", *names), ("doctor",), ("settings", "show")):
            run = bridge.run(*command, "-v", "-v", "--log-format", log_format)
            printed += run.stdout + run.stderr
    kept = [path for path in (bridge.directory / "state").rglob("*") if path.is_file()]
    assert kept
    assert "etcd-peer" in printed
    assert cmp.SECRET not in printed
    assert not [path for path in kept if cmp.SECRET.encode() in path.read_bytes()]
