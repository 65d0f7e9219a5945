"""Further pairs: files of a load balancer, a registry or another program, which the settings name."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from typer.testing import CliRunner

from backends.vault import setup as vault_setup
from bridge.cli.app import app
from bridge.contract import SignRequest
from bridge.errors import Exit
from bridge.node import pairs as node_pairs
from bridge.pki import csr
from bridge.pki.certificates import load_pem_certificates, pem, san_entries
from bridge.settings.load import load
from tests.kit import airgap, cluster_api, haproxy, openbao, opensslca
from tests.kit.cas import Bridge, add_openssl
from tests.kit.desks import POLICY, make_desk
from tests.kit.issuing import Signer
from tests.kit.pki import Pki, handmade_pki
from tests.kit.small_disk import needs_root, tmpfs

NAME = "registry"

needs_haproxy = pytest.mark.skipif(haproxy.program() is None, reason="no haproxy: apt-get install haproxy")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")


@pytest.fixture
def bridge(tmp_path: Path) -> Bridge:
    """A node on which nothing is due, and a CA for it."""
    made = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    add_openssl(made, "ca")
    return made


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The directory of a program that is none of kubeadm's."""
    directory = tmp_path / "registry"
    directory.mkdir()
    return directory


def add(bridge: Bridge, place: Path, more: Mapping[str, object] | None = None, name: str = NAME) -> None:
    """A pair in the settings."""
    values = {
        "certificate_file": str(place / "tls.crt"),
        "key_file": str(place / "tls.key"),
        "authority": "ca",
        "common_name": "registry.example.com",
        "sans": ["registry.example.com", "127.0.0.1"],
    }
    bridge.tables = [table for table in bridge.tables if not table.startswith(f"[certificate.{name}]")]
    bridge.add(f"certificate.{name}", {**values, **(more or {})})


def leaf(path: Path) -> x509.Certificate:
    """The certificate of a file."""
    return load_pem_certificates(path.read_bytes())[0]


def assert_pair(certificate: Path, key: Path) -> None:
    """The key is the certificate's."""
    public = load_pem_private_key(csr.key_block(key.read_bytes()), None).public_key()
    assert public == leaf(certificate).public_key()


def mode(path: Path) -> int:
    """Its permissions."""
    return stat.S_IMODE(path.stat().st_mode)


def test_a_pair_that_is_not_there_is_issued_as_the_settings_say(bridge: Bridge, place: Path) -> None:
    """A night's run makes it: names, usages, kind of key, and modes; the next night has nothing to do."""
    add(bridge, place, {"usages": ["server", "client"], "key": "ecdsa-p384", "key_mode": "0640"})
    assert bridge.run("check-expiration", "--within", "30d").returncode == bridge.run("plan").returncode == Exit.DUE
    run = bridge.run("renew")
    assert run.returncode == 0, run.stderr
    made = leaf(place / "tls.crt")
    assert san_entries(made) == {("DNS", "registry.example.com"), ("IP", "127.0.0.1")}
    assert made.subject.rfc4514_string() == "CN=registry.example.com"
    usages = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert csr.algorithm_name(made.public_key()) == "ecdsa-p384"
    assert_pair(place / "tls.crt", place / "tls.key")
    assert (mode(place / "tls.crt"), mode(place / "tls.key")) == (0o644, 0o640)
    again = bridge.run("renew")
    assert (again.returncode, leaf(place / "tls.crt")) == (0, made), again.stderr
    shown = bridge.run("check-expiration")
    assert shown.returncode == 0
    assert f"{NAME} " in shown.stdout


def test_a_long_cn_is_asked_for_as_it_is(bridge: Bridge, place: Path) -> None:
    """What a CA makes of more than the 64 characters of RFC 5280 is that certificate's outcome, and stops no other one."""
    add(bridge, place, {"common_name": f"{{node}}-{'a' * 70}"})
    run = bridge.run("renew")
    assert run.returncode == 0, run.stderr
    assert leaf(place / "tls.crt").subject.rfc4514_string().endswith("a" * 70)


def test_many_pairs_are_read_as_often_as_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run reads grows with the number of pairs, and not with its square."""
    read = node_pairs._item
    counts: list[float] = []
    for count in (1, 4):
        counted = Mock(side_effect=read)
        monkeypatch.setattr(node_pairs, "_item", counted)
        bridge = Bridge(pki=handmade_pki(tmp_path / f"node-{count}"), directory=tmp_path / f"bridge-{count}")
        add_openssl(bridge, "ca")
        for number in range(count):
            place = tmp_path / f"{count}-{number}"
            place.mkdir()
            add(bridge, place, {"key": "ecdsa-p256", "reload": "true"}, f"pair-{number}")
        run = CliRunner().invoke(app, ["renew", "--config", str(bridge.config)])
        assert run.exit_code == 0, run.stderr
        counts.append(counted.call_count / count)
    assert counts[0] == counts[1]


@needs_haproxy
def test_a_load_balancer_reads_the_new_pair_and_is_seen_to_show_it(bridge: Bridge, place: Path, tmp_path: Path) -> None:
    """haproxy is reloaded, and a handshake shows the new certificate; `prove` shows it, too."""
    add(bridge, place)
    assert bridge.run("renew").returncode == 0
    with haproxy.serving(tmp_path / "haproxy", place / "tls.crt") as server:
        add(bridge, place, {"reload": server.reload, "prove": f"127.0.0.1:{server.port}"})
        old = server.shown()
        run = bridge.run("renew", NAME)
        assert run.returncode == 0, run.stderr
        assert "read again: registry" in run.stdout
        assert server.shown() == leaf(place / "tls.crt") != old
        proof = bridge.run("prove", "-o", "json")
        found = [one for one in json.loads(proof.stdout)["findings"] if one["certificate"] == NAME]
        assert [one["state"] for one in found] == ["current"]
        assert bridge.run("rollback").returncode == 0
        assert server.shown() != leaf(place / "tls.crt") == old
        proof = bridge.run("prove", "-o", "json")
        found = [one for one in json.loads(proof.stdout)["findings"] if one["certificate"] == NAME]
        assert [one["state"] for one in found] == ["stale"]


@needs_haproxy
def test_a_pair_that_does_not_work_goes_back(bridge: Bridge, place: Path, tmp_path: Path) -> None:
    """
    A command that fails, and a server that goes on with the old pair: the old files come back, and the exit code says it.

    With restart.on_failure = "keep" the new ones stay; a pair that had not worked before stays, too.
    """
    add(bridge, place)
    assert bridge.run("renew").returncode == 0
    with haproxy.serving(tmp_path / "haproxy", place / "tls.crt") as server:
        prove, old = f"127.0.0.1:{server.port}", leaf(place / "tls.crt")
        bridge.add("restart", {"prove_for": "1s"})
        add(bridge, place, {"reload": "/bin/false", "prove": prove})
        run = bridge.run("renew", NAME, "-o", "json")
        assert run.returncode == Exit.ROLLED_BACK, run.stderr
        assert "rolled back" in run.stderr
        assert "/bin/false" in run.stderr
        assert json.loads(run.stdout)["renewed"] == []
        assert leaf(place / "tls.crt") == old
        assert_pair(place / "tls.crt", place / "tls.key")
        add(bridge, place, {"reload": "/bin/true", "prove": prove})
        run = bridge.run("renew", NAME)
        assert (run.returncode, leaf(place / "tls.crt")) == (Exit.ROLLED_BACK, old), run.stderr
        assert "the old pair is in use again" in run.stderr
        assert not (bridge.directory / "state/pairs.json").exists()
    run = bridge.run("renew", NAME)  # the server is gone, so that the next pair can't be worse
    assert run.returncode == Exit.NOT_LIVE, run.stderr
    assert leaf(place / "tls.crt") != old
    assert "did not work before" in run.stderr
    assert bridge.run("renew").returncode == Exit.NOT_LIVE
    with haproxy.serving(tmp_path / "haproxy", place / "tls.crt") as server:
        bridge.tables = [table for table in bridge.tables if "prove_for" not in table]
        bridge.add("restart", {"prove_for": "3m"})
        add(bridge, place, {"reload": server.reload, "prove": f"127.0.0.1:{server.port}"})
        run = bridge.run("renew")
        assert run.returncode == 0, run.stderr
        assert not (bridge.directory / "state/pairs.json").exists()


@needs_haproxy
def test_a_killed_run_leaves_a_pair_to_the_next_one(bridge: Bridge, place: Path, tmp_path: Path) -> None:
    """kill -9 while the program reads its pair: the next night has it read once more, though nothing is due."""
    add(bridge, place)
    assert bridge.run("renew").returncode == 0
    with haproxy.serving(tmp_path / "haproxy", place / "tls.crt") as server:
        prove, old = f"127.0.0.1:{server.port}", server.shown()
        add(bridge, place, {"reload": "/bin/sleep 600", "prove": prove})
        begun = subprocess.Popen(
            bridge.command("renew", NAME), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        end = time.monotonic() + 180
        while leaf(place / "tls.crt") == old:
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(0.5)
        os.killpg(begun.pid, signal.SIGKILL)
        begun.wait(180)
        assert server.shown() == old
        add(bridge, place, {"reload": server.reload, "prove": prove})
        run = bridge.run("renew")
        assert run.returncode == 0, run.stderr
        assert server.shown() == leaf(place / "tls.crt") != old
        assert "nothing is due" in bridge.run("renew").stdout


@needs_haproxy
def test_without_restart_a_pair_is_unproven_until_its_server_shows_it(
    bridge: Bridge, place: Path, tmp_path: Path
) -> None:
    """With --no-restart no command runs, and each later run, and doctor, say what is still to be done."""
    add(bridge, place)
    assert bridge.run("renew").returncode == 0
    with haproxy.serving(tmp_path / "haproxy", place / "tls.crt") as server:
        add(bridge, place, {"reload": server.reload, "prove": f"127.0.0.1:{server.port}"})
        old = server.shown()
        assert bridge.run("renew", NAME, "--no-restart").returncode == 0
        assert server.shown() == old != leaf(place / "tls.crt")
        run = bridge.run("renew")
        assert run.returncode == Exit.NOT_LIVE
        assert server.reload in run.stderr
        assert "not-in-use" in bridge.run("doctor", "-o", "json").stdout
        subprocess.run(server.reload.split(), check=True)
        end = time.monotonic() + 180
        while server.shown() == old:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert bridge.run("renew").returncode == 0
        assert not (bridge.directory / "state/pairs.json").exists()


# --- files -----------------------------------------------------------------------------------------------------------


@as_root
def test_one_pair_in_several_places(bridge: Bridge, place: Path, tmp_path: Path) -> None:
    """
    A copy has the same pair, one file for both in a load balancer's way, owners and modes of its own, and the CA's file.

    A copy that is lost, or has another key, has the next run make a new pair for all places; a rollback puts all back.
    """
    other = tmp_path / "haproxy"
    other.mkdir()
    add(bridge, place, {"ca_file": str(place / "ca.crt"), "owner": "daemon:adm", "key_mode": "0640"})
    both = other / "all.pem"
    copy = {"certificate_file": str(both), "key_file": str(both), "owner": "nobody", "key_mode": "0400"}
    bridge.add(f"certificate.{NAME}.copies.lb", copy)
    assert bridge.run("renew").returncode == 0
    assert_pair(place / "tls.crt", place / "tls.key")
    assert_pair(both, both)
    assert leaf(both) == leaf(place / "tls.crt")
    assert (place / "ca.crt").read_bytes().split() == (bridge.pki.pki_dir / "ca.crt").read_bytes().split()
    owners = [(path.owner(), path.group(), mode(path)) for path in (place / "tls.key", place / "tls.crt", both)]
    assert owners[:2] == [("daemon", "adm", 0o640), ("daemon", "adm", 0o644)]
    assert (owners[2][0], owners[2][2]) == ("nobody", 0o400)
    assert bridge.run("renew").returncode == 0
    os.chown(place / "tls.key", 0, 0)
    assert "pair-owner" in bridge.run("doctor", "-o", "json").stdout
    first = leaf(both)
    (place / "ca.crt").write_bytes((bridge.pki.pki_dir / "etcd/ca.crt").read_bytes())
    assert bridge.run("renew").returncode == 0
    assert (place / "ca.crt").read_bytes().split() == (bridge.pki.pki_dir / "ca.crt").read_bytes().split()
    assert leaf(both) != first
    first = leaf(both)
    both.unlink()
    assert "pair-differs" in bridge.run("doctor", "-o", "json").stdout
    assert bridge.run("renew").returncode == 0
    assert leaf(both) == leaf(place / "tls.crt") != first
    second = leaf(both)
    both.write_bytes(
        both.read_bytes().partition(b"-----BEGIN RSA")[0] + (bridge.pki.pki_dir / "apiserver.key").read_bytes()
    )
    assert bridge.run("renew").returncode == 0
    assert leaf(both) == leaf(place / "tls.crt") != second
    assert_pair(both, both)
    assert bridge.run("rollback").returncode == 0
    assert leaf(place / "tls.crt") == second


def test_a_live_key_is_never_opened_wider(bridge: Bridge, place: Path) -> None:
    """A key that a group reads stays so without a key_mode; one that all could read does not."""
    add(bridge, place)
    assert bridge.run("renew").returncode == 0
    assert mode(place / "tls.key") == 0o600
    for found, wanted in ((0o640, 0o640), (0o644, 0o640), (0o777, 0o640)):
        (place / "tls.key").chmod(found)
        assert ("open-secret" in bridge.run("doctor", "-o", "json").stdout) == (found != wanted)
        assert bridge.run("renew", NAME).returncode == 0
        assert mode(place / "tls.key") == wanted


def test_the_settings_say_what_the_next_pair_is(bridge: Bridge, place: Path) -> None:
    """
    Other names or usages in the settings are asked for at once; --add-san is refused for a pair.

    A certificate that an operator put in the pair's place is no model for the next one, and is not named as replaced.
    """
    add(bridge, place)
    assert bridge.run("renew").returncode == 0
    add(bridge, place, {"sans": ["registry.example.com", "r2.example.com"]})
    run = bridge.run("plan")
    assert (run.returncode, "r2.example.com" in run.stderr + run.stdout) == (Exit.DUE, True)
    assert bridge.run("renew").returncode == 0
    assert san_entries(leaf(place / "tls.crt")) == {("DNS", "registry.example.com"), ("DNS", "r2.example.com")}
    refused = bridge.run("renew", NAME, "--add-san", f"{NAME}=x.example.com")
    assert (refused.returncode, "has its sans in the settings" in refused.stderr) == (Exit.USAGE, True)
    (place / "tls.crt").write_bytes((bridge.pki.pki_dir / "apiserver.crt").read_bytes())
    run = bridge.run("renew", "-o", "json")
    assert run.returncode == 0, run.stderr
    [renewed] = json.loads(run.stdout)["renewed"]
    assert (renewed["name"], renewed["previousSerialNumber"]) == (NAME, None)
    assert san_entries(leaf(place / "tls.crt")) == {("DNS", "registry.example.com"), ("DNS", "r2.example.com")}


def test_files_that_are_something_else_are_not_replaced(bridge: Bridge, place: Path) -> None:
    """A wrong path in the settings costs no file: an error names it, and all else is renewed."""
    (place / "tls.crt").write_text("our notes\n")
    add(bridge, place)
    run = bridge.run("renew")
    assert (run.returncode, (place / "tls.crt").read_text()) == (1, "our notes\n"), run.stderr
    (place / "tls.crt").unlink()
    (place / "tls.key").write_text("our notes\n")
    run = bridge.run("renew")
    assert (run.returncode, (place / "tls.key").read_text()) == (1, "our notes\n"), run.stderr
    assert "wanted the old private key in PEM" in run.stderr
    (place / "tls.key").unlink()
    (place / "ca.crt").write_text("our notes\n")
    add(bridge, place, {"ca_file": str(place / "ca.crt")})
    run = bridge.run("renew")
    assert (run.returncode, (place / "ca.crt").read_text()) == (1, "our notes\n"), run.stderr
    (place / "tls.crt").write_bytes((bridge.pki.pki_dir / "ca.crt").read_bytes())
    run = bridge.run("renew")
    assert "found a CA's" in run.stderr
    assert (place / "tls.crt").read_bytes() == (bridge.pki.pki_dir / "ca.crt").read_bytes()
    assert bridge.run("renew", "apiserver").returncode == 0


@as_root
@needs_root
@pytest.mark.parametrize(("option", "found"), [("size=900k", "wanted 1024 KiB"), ("ro", "found it read-only")])
def test_a_disk_of_a_pair_alone_stops_no_other_certificate(tmp_path: Path, option: str, found: str) -> None:
    """The pair fails, and the control plane is renewed."""
    due = datetime.now(UTC) + timedelta(days=9)
    bridge = Bridge(pki=handmade_pki(tmp_path / "node", not_after=due), directory=tmp_path / "bridge")
    add_openssl(bridge, "ca")
    with tmpfs(tmp_path / "disk") as disk:
        subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)
        add(bridge, disk)
        run = bridge.run("renew", "apiserver", NAME, "--no-restart")
    assert run.returncode == Exit.FAILED
    assert found in run.stderr
    assert leaf(bridge.pki.pki_dir / "apiserver.crt").not_valid_after_utc > due + timedelta(days=9)


@as_root
@pytest.mark.attack("E11")
@pytest.mark.parametrize("mode", [0o1777, 0o1770])
def test_no_key_is_put_where_another_user_may_make_its_file_first(bridge: Bridge, place: Path, mode: int) -> None:
    """In a directory with the sticky bit the file and its new key would stay the other user's; one above it harms nothing."""
    add(bridge, place)
    place.chmod(mode)
    os.chown(place, 0, 1)
    (place / "tls.key").touch(mode=0o600)
    os.chown(place / "tls.key", 1, 1)
    run = bridge.run("renew")
    assert run.returncode == Exit.USAGE, run.stderr
    assert f"found mode {mode:04o}" in run.stderr
    assert (place / "tls.key").read_bytes() == b""
    (place / "tls.key").unlink()
    place.chmod(0o755)
    place.parent.chmod(0o1777)
    assert bridge.run("renew").returncode == 0


@as_root
def test_a_place_that_others_can_change_is_refused(bridge: Bridge, place: Path) -> None:
    """A directory of another user, a link in it, and a link to kubeadm's files: nothing is asked for, nothing replaced."""
    add(bridge, place)
    os.chown(place, 1, 1)
    run = bridge.run("renew")
    assert run.returncode == Exit.USAGE, run.stderr
    assert "in a directory that only root can change" in run.stderr
    assert not (place / "tls.key").exists()
    assert "not-replaceable" in bridge.run("doctor", "-o", "json").stdout
    os.chown(place, 0, 0)
    place.chmod(0o777)
    assert bridge.run("renew").returncode == Exit.USAGE
    place.chmod(0o755)
    before = (bridge.pki.pki_dir / "apiserver.key").read_bytes()
    (place / "tls.key").symlink_to(bridge.pki.pki_dir / "apiserver.key")
    run = bridge.run("renew")
    assert run.returncode == Exit.USAGE
    assert "wanted a file that is not kubeadm's" in run.stderr
    assert (bridge.pki.pki_dir / "apiserver.key").read_bytes() == before
    (place / "tls.key").unlink()
    (place / "tls.key").symlink_to(bridge.directory / "elsewhere.key")
    os.chown(place / "tls.key", 1, 1, follow_symlinks=False)
    assert bridge.run("renew").returncode == Exit.USAGE
    (place / "tls.key").unlink()
    assert bridge.run("renew").returncode == 0


def test_a_command_that_others_can_change_is_not_run(bridge: Bridge, place: Path, tmp_path: Path) -> None:
    """The one rule for programs that root runs; the old pair comes back."""
    add(bridge, place)
    assert bridge.run("renew").returncode == 0
    old, program = leaf(place / "tls.crt"), tmp_path / "reload"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o777)
    add(bridge, place, {"reload": str(program)})
    assert "pair-reload" in bridge.run("doctor", "-o", "json").stdout
    run = bridge.run("renew", NAME)
    assert (run.returncode, leaf(place / "tls.crt")) == (Exit.ROLLED_BACK, old), run.stderr
    assert not (tmp_path / "ran").exists()
    program.chmod(0o755)
    assert bridge.run("renew", NAME).returncode == 0
    assert (tmp_path / "ran").exists()


# --- carried, and by a policy ----------------------------------------------------------------------------------------

RULES = f"""
[certificate.{NAME}]
authority = "ca"
usages = ["server"]
subjects = ["CN=registry.example.com"]
sans = ["registry.example.com", "127.0.0.1"]
"""


def test_a_desk_signs_a_pair_that_its_policy_names(tmp_path: Path, place: Path) -> None:
    """A pair needs a table of its own in the policy, and gets only what that allows; the second time its key proves continuity."""
    pki = handmade_pki(tmp_path / "node")
    node, desk = airgap.Node.make(tmp_path, pki), make_desk(tmp_path / "desk", pki)
    add(node.bridge, place)
    node.export(NAME)
    refused = desk.run("sign", node.carried / "bundle.json", "-o", desk.outbox / "answer.json")
    assert refused.returncode != 0
    assert f"a table [certificate.{NAME}] in the policy" in refused.stdout + refused.stderr
    for policy, passes in (
        (RULES.replace("127.0.0.1", "10.0.0.1"), False),
        (RULES.replace('["server"]', '["client"]'), False),
        (RULES, True),
    ):
        desk.policy.write_text(POLICY + policy)
        answer = desk.outbox / "answer.json"
        signed = desk.run("sign", node.carried / "bundle.json", "--without-proof", NAME, "-o", answer)
        assert (signed.returncode == 0) == passes, signed.stderr
    assert node.run("import", answer).returncode == 0
    assert_pair(place / "tls.crt", place / "tls.key")
    first = leaf(place / "tls.crt")
    node.export(NAME, to="again.json")
    signed = desk.run("sign", node.carried / "again.json", "-o", desk.outbox / "again.json")
    assert signed.returncode == 0, signed.stderr
    assert node.run("import", desk.outbox / "again.json").returncode == 0
    assert leaf(place / "tls.crt") != first


def test_a_pair_is_made_by_hand(bridge: Bridge, place: Path, tmp_path: Path) -> None:
    """Key and CSR in a directory, a certificate by a CA that ca-bridge does not know, and `install`."""
    add(bridge, place)
    directory = tmp_path / "csrs"
    run = bridge.run("renew", NAME, "--csr-only", "--csr-dir", str(directory))
    assert run.returncode == 0, run.stderr
    signer = Signer.load(*bridge.pki.ca_pem("ca"))
    pair = load(bridge.config).node.pairs[0]
    request = SignRequest(
        spec=pair.spec, csr_pem=(directory / f"{NAME}.csr").read_bytes(), validity=timedelta(days=300), replaces=None
    )
    now = datetime.now(UTC)
    issued = signer.issue(request, begin=now - timedelta(minutes=5), end=now + timedelta(days=300))
    (directory / "signed.pem").write_bytes(pem(issued.leaf))
    run = bridge.run("install", str(directory))
    assert run.returncode == 0, run.stderr
    assert leaf(place / "tls.crt") == issued.leaf
    assert_pair(place / "tls.crt", place / "tls.key")


def test_a_nodes_own_policy_judges_a_pair(bridge: Bridge, place: Path, tmp_path: Path) -> None:
    """Without a table in it no CA is asked; with one it is issued."""
    policy = tmp_path / "node-policy.toml"
    policy.write_text('[allow]\nclusters = ["kubernetes"]\nnodes = ["*"]\n')
    bridge.add("policy", {"file": str(policy)})
    add(bridge, place)
    run = bridge.run("renew")
    assert (run.returncode, (place / "tls.crt").exists()) == (Exit.REFUSED, False), run.stderr
    policy.write_text(policy.read_text() + RULES)
    run = bridge.run("renew")
    assert (run.returncode, (place / "tls.crt").exists()) == (0, True), run.stderr


# --- the rest of the program -----------------------------------------------------------------------------------------


def test_a_rehearsal_monitors_and_backups_have_pairs_in_them(bridge: Bridge, place: Path, tmp_path: Path) -> None:
    """Nothing is installed by a rehearsal; a metric, Nagios' line and a list of backups name the pair."""
    metrics = tmp_path / "ca-bridge.prom"
    bridge.add("metrics", {"file": str(metrics)})
    add(bridge, place)
    run = bridge.run("renew", "--rehearse", NAME)
    assert (run.returncode, (place / "tls.crt").exists()) == (0, False), run.stderr
    assert bridge.run("renew").returncode == 0
    assert f'name="{NAME}",authority="ca",path="{place}/tls.crt"' in metrics.read_text()
    assert bridge.run("renew", NAME).returncode == 0
    assert NAME in bridge.run("backups").stdout
    assert NAME in bridge.run("check-expiration", "-o", "nagios").stdout
    assert NAME in bridge.run("audit", "show", "--name", NAME).stdout


def test_a_superseded_pair_is_revoked(place: Path, tmp_path: Path) -> None:
    """A pair is revoked once its successor is in use; another certificate in its place is not."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    index = add_openssl(bridge, "ca") / "index.txt"
    bridge.add("renewal", {"revoke": "superseded", "revoke_after": "1s"})
    add(bridge, place)
    assert bridge.run("renew").returncode == 0
    first = leaf(place / "tls.crt")
    assert bridge.run("renew", NAME).returncode == 0
    (place / "tls.crt").write_bytes((bridge.pki.pki_dir / "apiserver.crt").read_bytes())
    assert bridge.run("renew").returncode == 0
    time.sleep(1.5)
    run = bridge.run("renew")
    assert run.returncode == 0, run.stderr
    revoked = [int(row.split("\t")[3], 16) for row in index.read_text().splitlines() if row.startswith("R")]
    assert revoked == [first.serial_number]


def test_failures_of_a_pair_that_left_the_settings_are_forgotten(bridge: Bridge, place: Path) -> None:
    """They are no CA's, and nothing of the CA may be due for months; while the pair is wanted, they count."""
    assert bridge.run("renew").returncode == 0
    without, attempts = bridge.config.read_text(), bridge.directory / "state/attempts.json"
    add(bridge, place)
    (place / "tls.key").write_text("no key")
    for count in (1, 2):
        assert bridge.run("renew").returncode == Exit.FAILED
        assert json.loads(attempts.read_text())["authorities"]["ca"]["count"] == count
    bridge.config.write_text(without)
    assert bridge.run("renew").returncode == 0
    assert not attempts.exists()


def test_a_pair_that_left_the_settings_is_left_alone(bridge: Bridge, place: Path) -> None:
    """Its files stay; its name is unknown, and its open request can be cancelled."""
    add(bridge, place)
    assert bridge.run("renew").returncode == 0
    bridge.tables = [table for table in bridge.tables if NAME not in table]
    bridge.add("renewal", {"before": "30d"})
    run = bridge.run("renew", NAME)
    assert (run.returncode, NAME in run.stderr) == (Exit.USAGE, True)
    assert bridge.run("renew").returncode == 0
    assert bridge.run("rollback").returncode != 0
    assert (place / "tls.crt").exists()


# --- parts of Kubernetes that read a pair ----------------------------------------------------------------------------


@needs_haproxy
def test_a_static_pod_is_restarted_to_read_its_pair(
    bridge: Bridge, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest is out until crictl shows that it has ended; a kubelet's stand-in then starts haproxy anew."""
    add(bridge, place)
    assert bridge.run("renew").returncode == 0
    manifest = bridge.pki.kubeconfig_dir / "manifests/haproxy.yaml"
    manifest.parent.mkdir(exist_ok=True)
    manifest.write_text("apiVersion: v1\nkind: Pod\nmetadata: {name: haproxy}\n")
    programs = tmp_path / "programs"
    programs.mkdir()
    with haproxy.serving(tmp_path / "haproxy", place / "tls.crt") as server:
        pod = {"id": "ID", "metadata": {"name": "haproxy-cp-1"}, "annotations": {"kubernetes.io/config.source": "file"}}
        (programs / "one").write_text(json.dumps({"items": [pod]}))
        (programs / "crictl").write_text(
            f"#!/bin/sh\ncd {programs}\n"
            f"if [ ! -e {manifest} ]; then touch gone; echo '{{\"items\": []}}'; exit; fi\n"
            f"if [ -e gone ] && [ ! -e back ]; then touch back; {server.reload}; fi\n"
            "if [ -e back ]; then sed s/ID/bbbbbbbbbbbbbbbb/ one; else sed s/ID/aaaaaaaaaaaaaaaa/ one; fi\n"
        )
        (programs / "crictl").chmod(0o755)
        add(bridge, place, {"static_pod": str(manifest), "prove": f"127.0.0.1:{server.port}"})
        failed = bridge.run("renew", NAME)
        assert (failed.returncode, "no crictl" in failed.stderr) == (Exit.ROLLED_BACK, True), failed.stderr
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        run = bridge.run("renew", NAME)
        assert run.returncode == 0, run.stderr
        assert (programs / "back").exists()
        assert server.shown() == leaf(place / "tls.crt")
        assert manifest.exists()


def shown(port: int, name: str) -> x509.Certificate:
    """What a server shows a client that asks for this name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port), 180) as plain,
        context.wrap_socket(plain, server_hostname=name) as tls,
    ):
        return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")


@pytest.mark.kube("kube-apiserver", "etcd")
def test_a_real_api_server_takes_up_its_pair_for_a_name(tmp_path: Path, place: Path) -> None:
    """`--tls-sni-cert-key`: without a restart it shows the new certificate to those who ask for its name, and only them."""
    sni = "api.other.example.com"
    with cluster_api.running(tmp_path / "api") as cluster:
        node = Pki(root=tmp_path / "api", external=True)
        bridge = Bridge(pki=node, directory=tmp_path / "bridge")
        bridge.tables, kubernetes = [], cluster.pki_dir.parent
        places = {"pki_dir": cluster.pki_dir, "kubeconfig_dir": kubernetes, "state_dir": bridge.directory / "state"}
        bridge.add("node", {**{key: str(path) for key, path in places.items()}, "kubernetes_version": "1.37"})
        ca = cluster.cas["ca"]
        desk = opensslca.make_ca_directory(bridge.directory / "desk", pem(ca.certificate), csr.key_pem(ca.key))
        bridge.add("backend.desk", {"type": "openssl", "dir": str(desk)})
        bridge.add("authority.ca", {"backend": "desk"})
        bridge.add("restart", {"method": "command"})
        bridge.add("restart.commands", {"kube-apiserver": "/bin/false"})
        names = {"common_name": sni, "sans": [sni], "component": "kube-apiserver"}
        add(bridge, place, {**names, "prove": f"127.0.0.1:{cluster.port}"})
        assert bridge.run("renew", NAME, "--no-restart").returncode == 0
        cluster.kill_server()
        cluster.arguments = [*cluster.arguments, f"--tls-sni-cert-key={place}/tls.crt,{place}/tls.key"]
        cluster.start_server()
        old = shown(cluster.port, sni)
        assert old == leaf(place / "tls.crt")
        run = bridge.run("renew", NAME)
        assert run.returncode == 0, run.stderr
        assert shown(cluster.port, sni) == leaf(place / "tls.crt") != old
        assert shown(cluster.port, "localhost") == leaf(cluster.pki_dir / "apiserver.crt")


def test_a_client_certificate_of_our_own_renews_itself(bridge: Bridge, tmp_path: Path) -> None:
    """OpenBao knows this node by a pair of the CA that it keeps: each renewal of it logs in with the pair before it."""
    places = {name: tmp_path / name for name in ("bao", "login")}
    for name, directory in places.items():
        directory.mkdir()
        usage = {"common_name": "node-1", "sans": [], "usages": ["client"]} if name == "login" else {}
        add(bridge, directory, {"key": "ecdsa-p256", **usage}, name)
    assert bridge.run("renew").returncode == 0
    trust, login = bridge.pki.pki_dir / "ca.crt", places["login"]
    with openbao.tls_server(places["bao"] / "tls.crt", places["bao"] / "tls.key", trust) as server:
        server.add_ca("pki", *bridge.pki.ca_pem("ca"))
        server.add_policy("node", vault_setup.policy("pki", [], mode="sign-verbatim"))
        server.enable_auth("cert")
        server.write("auth/cert/certs/node", certificate=trust.read_text(), token_policies=["node"])
        bridge.tables = [table for table in bridge.tables if not table.startswith(("[backend", "[authority"))]
        files = {"ca_file": str(trust), "client_cert": str(login / "tls.crt"), "client_key": str(login / "tls.key")}
        bridge.add("backend.corp", {"type": "vault", "url": server.url, "mode": "sign-verbatim", **files})
        bridge.add("backend.corp.auth", {"method": "cert"})
        bridge.add("authority.ca", {"backend": "corp", "mount": "pki"})
        seen = {leaf(login / "tls.crt")}
        for number in (2, 3):  # how many there were
            run = bridge.run("renew", "login")
            assert run.returncode == 0, run.stderr
            assert_pair(login / "tls.crt", login / "tls.key")
            seen.add(leaf(login / "tls.crt"))
            assert len(seen) == number
    assert "(renewed as login)" in bridge.run("check-expiration").stdout
    own = json.loads(bridge.run("check-expiration", "-o", "json").stdout)["ownCredentials"]
    assert [one["renewedAs"] for one in own] == ["login"]
