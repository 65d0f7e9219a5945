"""CAs that answer later, and what is kept between runs, through the installed program and a third party's plug-in."""

from __future__ import annotations

import json
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.pki.certificates import pem, serial_hex
from bridge.specs import AUTHORITIES
from bridge.state import Store
from bridge.state.open_requests import OpenRequests
from bridge.system.state_file import StateError
from tests.kit import approval, opensslca
from tests.kit.cas import Bridge, live_certificates
from tests.kit.issuing import Signer
from tests.kit.pairs import assert_pairs
from tests.kit.pki import handmade_pki

NAMES = ("front-proxy-client",)


def now() -> datetime:
    return datetime.now(UTC)


def node_ending_in(directory: Path, left: timedelta) -> Bridge:
    pki = handmade_pki(directory / "node", now=now() - timedelta(days=100), not_after=now() + left)
    return Bridge(pki=pki, directory=directory / "bridge")


def with_approval(bridge: Bridge, directory: Path, authorities: Iterator[str] | tuple[str, ...]) -> approval.Approver:
    """One person signs for all of these authorities; the node's CA files become that CA's certificate."""
    desk = directory / "desk"
    desk.mkdir()
    signer = Signer.make(begin=now() - timedelta(days=1), end=now() + timedelta(days=900))
    bridge.add("backend.people", {"type": "approval", "dir": str(desk)})
    for authority in authorities:
        bridge.add(f"authority.{authority}", {"backend": "people"})
        bridge.pki.trust(authority, pem(signer.certificate))
    return approval.Approver(directory=desk, signer=signer)


@pytest.fixture
def bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bridge:
    """All its certificates are due, and live for 20 days."""
    approval.install_plugin(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return node_ending_in(tmp_path, timedelta(days=20))


@pytest.fixture
def person(bridge: Bridge, tmp_path: Path) -> approval.Approver:
    return with_approval(bridge, tmp_path, tuple(AUTHORITIES))


def kept(bridge: Bridge) -> list[str]:
    return [one.name for one in OpenRequests(Store(bridge.directory / "state"))]


def events(bridge: Bridge, event: str) -> list[str]:
    lines = (bridge.directory / "state/audit.jsonl").read_text().splitlines()
    return [line["name"] for line in map(json.loads, lines) if line["event"] == event]


def test_all_states_across_processes(bridge: Bridge, person: approval.Approver) -> None:
    """A waiting run is exit 4 and sends no request twice; answered requests are installed; the last answer ends it with 0."""
    before = live_certificates(bridge.pki)
    first = bridge.run("renew")
    assert first.returncode == 4, first.stderr
    assert "the security team has it" in first.stdout
    state = bridge.directory / "state/requests.json"
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert live_certificates(bridge.pki) == before
    names = sorted(before)
    assert sorted(kept(bridge)) == names == sorted(person.requests())
    asked = person.asked()
    assert bridge.run("renew").returncode == 4
    assert person.asked() == asked

    serials = {name: serial_hex(person.approve(name)) for name in names[:5]}
    second = bridge.run("renew", "-o", "json")
    assert second.returncode == 4
    result = json.loads(second.stdout)
    assert {one["name"]: one["serialNumber"] for one in result["renewed"]} == serials
    assert sorted(one["name"] for one in result["waiting"]) == names[5:]
    assert_pairs(bridge.pki)

    for name in names[5:]:
        person.approve(name)
    last = bridge.run("renew")
    assert last.returncode == 0, last.stderr
    assert person.asked() == asked
    assert not state.exists()
    assert_pairs(bridge.pki)
    assert sorted(events(bridge, "asked")) == names
    assert sorted(set(events(bridge, "pending"))) == names
    assert sorted(events(bridge, "installed")) == names
    assert bridge.run("audit", "verify").returncode == 0


def test_a_refusal_is_reported_and_the_next_run_asks_anew(bridge: Bridge, person: approval.Approver) -> None:
    """The exit code is 5 with the person's words, once; the next request has another key."""
    assert bridge.run("renew", "apiserver").returncode == 4
    [old] = person.asked()
    person.refuse("apiserver", "no such node in our list")
    refused = bridge.run("renew", "apiserver")
    assert refused.returncode == 5
    assert "no such node in our list" in refused.stderr
    assert kept(bridge) == []
    assert bridge.run("renew", "apiserver").returncode == 4
    assert len(person.asked()) == 2
    assert person.asked()[1] != old
    person.approve("apiserver")
    assert bridge.run("renew", "apiserver").returncode == 0
    assert_pairs(bridge.pki)


def test_a_missing_file_of_ours_ends_no_request(bridge: Bridge, person: approval.Approver) -> None:
    """Without the token no CA was asked: what it signs meanwhile is still installed, and nothing is asked twice."""
    assert bridge.run("renew", "apiserver").returncode == 4
    token = person.directory / "no-token"
    token.touch()
    run = bridge.run("renew", "apiserver")
    assert (run.returncode, kept(bridge)) == (2, ["apiserver"]), run.stderr
    token.unlink()
    person.approve("apiserver")
    assert bridge.run("renew", "apiserver").returncode == 0
    assert len(person.asked()) == 1


def test_a_wrong_answer_is_refused_and_the_next_run_asks_anew(bridge: Bridge, person: approval.Approver) -> None:
    """An answer that comes late is proven like any other."""
    assert bridge.run("renew", "apiserver", "scheduler.conf").returncode == 4
    person.approve("apiserver", spec="scheduler.conf")
    person.approve("scheduler.conf")
    before = live_certificates(bridge.pki)
    done = bridge.run("renew", "apiserver", "scheduler.conf")
    assert done.returncode == 5
    assert "EKU" in done.stderr
    after = live_certificates(bridge.pki)
    assert {name for name in after if after[name] != before[name]} == {"scheduler.conf"}
    assert kept(bridge) == []


def test_a_request_that_waits_is_collected_although_nothing_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request by name, with 300 days left, is finished by a bare `renew`."""
    approval.install_plugin(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    bridge = node_ending_in(tmp_path, timedelta(days=300))
    person = with_approval(bridge, tmp_path, tuple(AUTHORITIES))
    assert bridge.run("renew").returncode == 0
    assert bridge.run("renew", "apiserver").returncode == 4
    assert bridge.run("renew").returncode == 4
    certificate = person.approve("apiserver")
    assert bridge.run("renew").returncode == 0
    assert live_certificates(bridge.pki)["apiserver"] == certificate
    assert bridge.run("renew").returncode == 0


def test_a_process_that_dies_after_asking_asks_with_the_same_csr(
    bridge: Bridge, person: approval.Approver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key was on disk before; its CA sees one request."""
    monkeypatch.setenv("CA_DIES", "1")
    assert bridge.run("renew", "apiserver").returncode == -signal.SIGKILL
    monkeypatch.delenv("CA_DIES")
    assert events(bridge, "asked") == ["apiserver"]
    assert bridge.run("renew", "apiserver").returncode == 4
    assert len(set(person.asked())) == 1
    certificate = person.approve("apiserver")
    assert bridge.run("renew").returncode == 4  # the others are due, too
    assert live_certificates(bridge.pki)["apiserver"] == certificate
    assert_pairs(bridge.pki)


def test_a_certificate_that_was_replaced_meanwhile_ends_its_request(bridge: Bridge, person: approval.Approver) -> None:
    """The message comes once, since the answer would not fit any more."""
    assert bridge.run("renew", "apiserver").returncode == 4
    person.approve("apiserver")
    path = bridge.pki.pki_dir / "apiserver.crt"
    theirs = handmade_pki(bridge.directory / "other", not_after=now() + timedelta(days=300))
    shutil.copyfile(theirs.pki_dir / "apiserver.crt", path)
    shutil.copyfile(theirs.pki_dir / "apiserver.key", bridge.pki.pki_dir / "apiserver.key")
    before = path.read_bytes()
    run = bridge.run("renew", "scheduler.conf")
    assert "apiserver: forgot the request" in run.stderr
    assert path.read_bytes() == before
    assert kept(bridge) == ["scheduler.conf"]
    assert events(bridge, "cancelled") == ["apiserver"]


def test_all_or_nothing_keeps_what_is_answered(bridge: Bridge, person: approval.Approver) -> None:
    """Exit 4 until the last is there; then all in one step, and no certificate was asked for twice."""
    names = ("apiserver", "etcd-peer")
    run = ("renew", *names, "--all-or-nothing")
    assert bridge.run(*run).returncode == 4
    person.approve("apiserver")
    before = live_certificates(bridge.pki)
    held = bridge.run(*run)
    assert held.returncode == 4
    assert "kept until the others are answered" in held.stdout
    assert live_certificates(bridge.pki) == before
    person.approve("etcd-peer")
    assert bridge.run(*run).returncode == 0
    assert len(person.asked()) == 2
    after = live_certificates(bridge.pki)
    assert {name for name in after if after[name] != before[name]} == set(names)


@pytest.mark.parametrize(
    ("left", "stderr"),
    [(timedelta(days=20), ""), (timedelta(days=5), "warning: "), (timedelta(days=1), "error: "),
     (timedelta(days=-1), "HAS EXPIRED")],
    ids=["20 days", "5 days", "1 day", "expired"],
)  # fmt: skip
def test_the_nearer_the_end_the_louder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: timedelta, stderr: str
) -> None:
    """Standard error is empty while there is time."""
    approval.install_plugin(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    bridge = node_ending_in(tmp_path, left)
    with_approval(bridge, tmp_path, ("front-proxy-ca",))
    assert bridge.run("renew", *NAMES).returncode == 4
    run = bridge.run("renew", *NAMES)
    assert stderr in run.stderr if stderr else run.stderr == ""


def with_openssl(bridge: Bridge, directory: Path) -> dict[str, Path]:
    cas = {}
    for authority in AUTHORITIES:
        cas[authority] = opensslca.make_ca_directory(directory / "cas" / authority, *bridge.pki.ca_pem(authority))
        bridge.add(f"backend.{authority}-desk", {"type": "openssl", "dir": str(cas[authority])})
        bridge.add(f"authority.{authority}", {"backend": f"{authority}-desk"})
    return cas


KILLED_AT = {
    "before the installation": "bridge.renewal.verify_and_install.install = die",
    "after staging": "bridge.state.install._back_up = die",
    "before the commit": "bridge.state.install._journal = die",
}


@pytest.mark.parametrize("point", KILLED_AT)
def test_what_is_verified_and_kept_is_never_asked_for_again(bridge: Bridge, tmp_path: Path, point: str) -> None:
    """Killed between proof and commit; the next run needs no CA, and installs the certificates that were signed."""
    cas = with_openssl(bridge, tmp_path)
    die = "import os, bridge.state.install, bridge.renewal.verify_and_install\ndef die(*_): os.kill(os.getpid(), 9)\n"
    program = f"{die}{KILLED_AT[point]}\nfrom bridge.cli.app import app\napp()"
    command = [sys.executable, "-c", program, "renew", "all", "--config", str(bridge.config)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    signed = {path.stem for ca in cas.values() for path in (ca / "newcerts").iterdir()}
    assert len(signed) == 12
    shutil.move(tmp_path / "cas", tmp_path / "gone")
    done = bridge.run("renew", "all")
    assert done.returncode == 0, done.stderr
    installed = {f"{certificate.serial_number:X}" for certificate in live_certificates(bridge.pki).values()}
    assert {serial.lstrip("0") for serial in signed} == installed
    assert_pairs(bridge.pki)
    assert not (bridge.directory / "state/requests.json").exists()


def test_a_run_without_what_is_kept_would_ask_again(bridge: Bridge, tmp_path: Path) -> None:
    """The twin: with the file taken away, the CA that is gone is missed."""
    with_openssl(bridge, tmp_path)
    die = "import os, bridge.renewal.verify_and_install\ndef die(*_): os.kill(os.getpid(), 9)\nbridge.renewal.verify_and_install.install = die\n"
    command = [sys.executable, "-c", f"{die}from bridge.cli.app import app\napp()", "renew", "all"]
    subprocess.run([*command, "--config", str(bridge.config)], check=False, capture_output=True)
    shutil.move(tmp_path / "cas", tmp_path / "gone")
    (bridge.directory / "state/requests.json").unlink()
    assert bridge.run("renew", "all").returncode != 0


def test_a_kept_answer_that_ended_meanwhile_is_asked_for_again(bridge: Bridge, tmp_path: Path) -> None:
    """It is proven again like any other answer: one that is due by now is none."""
    with_openssl(bridge, tmp_path)
    bridge.add("renewal", {"validity": "40d", "before": "10d"})
    die = "import os, bridge.renewal.verify_and_install\ndef die(*_): os.kill(os.getpid(), 9)\nbridge.renewal.verify_and_install.install = die\n"
    command = [sys.executable, "-c", f"{die}from bridge.cli.app import app\napp()", "renew", "apiserver"]
    subprocess.run([*command, "--config", str(bridge.config)], check=False, capture_output=True)
    [one] = OpenRequests(Store(bridge.directory / "state"))
    assert one.answer is not None
    bridge.tables[-1] = bridge.tables[-1].replace("10d", "60d")
    bridge.tables[-1] = bridge.tables[-1].replace("40d", "365d")
    bridge.config.write_text("\n".join(bridge.tables))
    assert bridge.run("renew", "apiserver").returncode == 0
    assert live_certificates(bridge.pki)["apiserver"].serial_number != one.answer.leaf.serial_number


def test_keys_leave_with_their_certificates(bridge: Bridge, person: approval.Approver) -> None:
    """The key of a request is the one that is installed, and is nowhere else afterwards."""
    assert bridge.run("renew", "apiserver").returncode == 4
    [one] = OpenRequests(Store(bridge.directory / "state"))
    person.approve("apiserver")
    assert bridge.run("renew", "apiserver").returncode == 0
    assert (bridge.pki.pki_dir / "apiserver.key").read_bytes() == one.key_pem
    state = bridge.directory / "state"
    assert not [p for p in state.rglob("*") if p.is_file() and one.key_pem[40:80] in p.read_bytes()]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"requestsV1": [{}]}', '{"requestsV1": {"a": 1}}', "\xff"])
def test_a_file_of_requests_that_is_none(tmp_path: Path, text: str) -> None:
    """An error that names it, and no key is made anew over those that may be waited for."""
    store = Store(tmp_path)
    store.requests.write_text(text, encoding="latin-1")
    with pytest.raises(StateError, match=r"requests\.json"):
        OpenRequests(store)


def test_a_full_disk_keeps_a_ca_from_being_asked(bridge: Bridge, person: approval.Approver) -> None:
    """A key that can't be kept is never asked a certificate for, where the answer comes later."""
    state = bridge.directory / "state"
    state.mkdir(mode=0o700)
    (state / "requests.json").mkdir()
    run = bridge.run("renew", "apiserver")
    assert run.returncode == 1
    assert "requests.json" in run.stderr
    assert person.asked() == []
