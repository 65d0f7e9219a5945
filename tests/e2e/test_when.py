"""When the program acts, and which hooks it runs: windows, failed runs, hooks; through the installed program, with a real CA."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.pki.certificates import serial_hex
from bridge.specs import AUTHORITIES
from tests.kit.cas import Bridge, add_openssl, live_certificates
from tests.kit.pairs import assert_pairs
from tests.kit.pki import handmade_pki

DAY = timedelta(days=1)


def now() -> datetime:
    return datetime.now(UTC)


def node_ending_in(directory: Path, left: timedelta) -> Bridge:
    pki = handmade_pki(directory / "node", now=now() - timedelta(days=100), not_after=now() + left)
    bridge = Bridge(pki=pki, directory=directory / "bridge")
    for authority in AUTHORITIES:
        add_openssl(bridge, authority)
    return bridge


@pytest.fixture
def bridge(tmp_path: Path) -> Bridge:
    """All its certificates are due, and live for 20 days."""
    return node_ending_in(tmp_path, 20 * DAY)


def serials(bridge: Bridge) -> dict[str, str]:
    return {name: serial_hex(certificate) for name, certificate in live_certificates(bridge.pki).items()}


def hook(tmp_path: Path, name: str, script: str) -> str:
    """A program of the operator's."""
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def events(bridge: Bridge, event: str) -> int:
    lines = (bridge.directory / "state/audit.jsonl").read_text().splitlines()
    return sum(json.loads(line)["event"] == event for line in lines)


def closed_window() -> str:
    """A window of one hour, far from now in any time zone's week."""
    day = (now() + 3 * DAY).strftime("%a")
    return f"{day} 02:00-03:00"


# --- windows ---------------------------------------------------------------------------------------------------------


def test_what_is_due_waits_for_its_window(bridge: Bridge) -> None:
    """Outside the window the run ends with 4 and asks no CA; a named certificate is renewed at once, any other within the window."""
    bridge.add("renewal", {"window": [closed_window()], "window_zone": "Europe/Berlin"})
    before = serials(bridge)
    run = bridge.run("renew", "-v")
    assert run.returncode == 4, run.stderr
    assert "asking" not in run.stderr
    assert "Europe/Berlin" in run.stderr + run.stdout
    assert serials(bridge) == before
    assert bridge.run("renew", "apiserver").returncode == 0
    changed = {name for name, serial in serials(bridge).items() if serial != before[name]}
    assert changed == {"apiserver"}
    bridge.tables[-1] = ""
    bridge.add("renewal", {"window": ["00:00-24:00"], "window_zone": "Europe/Berlin"})
    assert bridge.run("renew").returncode == 0
    assert not set(serials(bridge).values()) & set(before.values())


def test_a_window_gives_way_to_an_end_that_is_near(tmp_path: Path) -> None:
    """Five days are less than two weekly windows."""
    bridge = node_ending_in(tmp_path, 5 * DAY)
    bridge.add("renewal", {"window": [closed_window()]})
    before = serials(bridge)
    run = bridge.run("renew")
    assert run.returncode == 0, run.stderr
    assert not set(serials(bridge).values()) & set(before.values())


def test_off_a_terminal_there_is_a_delay(bridge: Bridge) -> None:
    """The delay is random and below `renewal.jitter`; named certificates have none."""
    bridge.add("renewal", {"jitter": "90d"})
    started = time.monotonic()
    assert bridge.run("renew", "apiserver").returncode == 0
    assert time.monotonic() - started < 600
    command = [str(Path(sys.executable).with_name("ca-bridge")), "renew", "--config", str(bridge.config)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        # in one of many thousand runs the delay is shorter
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        assert bridge.run("renew", "etcd-peer").returncode == 0  # it holds no lock while it waits
        process.kill()


# --- failed runs -----------------------------------------------------------------------------------------------------


@pytest.mark.first_use("25")
def test_a_ca_that_fails_three_times_is_left_alone_and_a_person_called(bridge: Bridge) -> None:
    """The others go on; by name it is asked at once; success ends it."""
    key = bridge.directory / "desk/etcd-ca/ca.key"
    aside = key.rename(key.with_suffix(".away"))
    for number in range(1, 4):
        run = bridge.run("renew")
        assert run.returncode == 2, run.stderr
        assert ("will be tried less often" in run.stderr) == (number == 3)
    assert events(bridge, "needs-a-person") == 1
    state = bridge.directory / "state/attempts.json"
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    aside.rename(key)
    run = bridge.run("renew")
    assert run.returncode == 2, run.stderr
    assert "the next try is at" in run.stderr
    before = serials(bridge)
    assert bridge.run("renew", "etcd-peer", "etcd-server").returncode == 0
    assert not state.exists()
    assert bridge.run("renew").returncode == 0
    assert {name for name, serial in serials(bridge).items() if serial != before[name]} == {
        "apiserver-etcd-client",
        "etcd-healthcheck-client",
        "etcd-peer",
        "etcd-server",
    }


# --- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_see_a_renewal_from_before_to_after(bridge: Bridge, tmp_path: Path) -> None:
    """The old certificate is in place before, the new one when files are installed; serials are those of the files."""
    log = tmp_path / "log"
    subject = 'openssl x509 -noout -serial -in "$CA_BRIDGE_PKI_DIR/front-proxy-client.crt"'
    tell = hook(
        tmp_path,
        "tell",
        f'echo "$CA_BRIDGE_EVENT $({subject} | cut -d= -f2) $CA_BRIDGE_RUN_ID [$CA_BRIDGE_EXIT_CODE]'
        f' [$CA_BRIDGE_OLD_SERIALS] [$CA_BRIDGE_NEW_SERIALS]" >>{log}; echo heard',
    )
    bridge.add("hooks", {"before": tell, "after_install": tell, "success": [tell], "failure": tell})
    old = serials(bridge)["front-proxy-client"]
    run = bridge.run("renew", "front-proxy-client")
    assert run.returncode == 0, run.stderr
    new = serials(bridge)["front-proxy-client"]
    lines = [line.split(maxsplit=3) for line in log.read_text().splitlines()]
    assert [(event, serial.lower()) for event, serial, *_ in lines] == [
        ("before", old.lower()),
        ("after_install", new.lower()),
        ("success", new.lower()),
    ]
    assert len({run_id for _, _, run_id, _ in lines}) == 1
    pair = f"[front-proxy-client={old}] [front-proxy-client={new}]"
    assert [rest for *_, rest in lines] == ["[] [] []", f"[] {pair}", f"[0] {pair}"]
    assert re.findall(r"hook (\w+): heard", run.stderr) == ["before", "after_install", "success"]
    assert not (bridge.directory / "state/hooks.json").exists()


@pytest.mark.parametrize(("code", "exit_code"), [(1, 1), (75, 6)])
def test_a_before_hook_stops_the_renewal(code: int, exit_code: int, bridge: Bridge, tmp_path: Path) -> None:
    """The CA gets no request."""
    bridge.add("hooks", {"before": hook(tmp_path, "no", f"exit {code}")})
    before = serials(bridge)
    run = bridge.run("renew")
    assert run.returncode == exit_code, run.stderr
    assert serials(bridge) == before
    assert events(bridge, "asked") == 0
    assert not (bridge.directory / "state/attempts.json").exists()


def test_a_hook_that_failed_runs_again_though_nothing_is_due(bridge: Bridge, tmp_path: Path) -> None:
    """The exit code is 7 until the hook succeeds, and 0 afterwards."""
    log, fixed = tmp_path / "log", tmp_path / "fixed"
    tell = hook(tmp_path, "tell", f'echo "$CA_BRIDGE_EVENT $CA_BRIDGE_TRY" >>{log}; test -e {fixed}')
    bridge.add("hooks", {"success": tell, "failure": tell})
    assert bridge.run("renew").returncode == 7
    assert bridge.run("renew").returncode == 7
    fixed.touch()
    run = bridge.run("renew")
    assert run.returncode == 0, run.stderr
    assert bridge.run("renew").returncode == 0
    assert log.read_text() == "success 1\nsuccess 2\nsuccess 3\n"


def test_a_failure_runs_the_hook_and_keeps_its_code(bridge: Bridge, tmp_path: Path) -> None:
    """The exit code stays the failure's, though the failure hook fails, too."""
    log = tmp_path / "log"
    (bridge.directory / "desk/ca/ca.key").unlink()
    script = f'echo "$CA_BRIDGE_EXIT_CODE" >>{log}; echo "$CA_BRIDGE_ERRORS" | grep -c "^apiserver: " >>{log}; exit 1'
    bridge.add("hooks", {"failure": hook(tmp_path, "tell", script)})
    run = bridge.run("renew")
    assert run.returncode == 2, run.stderr
    assert log.read_text() == "2\n1\n"


def test_killed_with_its_hook_it_runs_the_hook_again(bridge: Bridge, tmp_path: Path) -> None:
    """kill -9 of the whole process tree while the hook after the installation runs."""
    log = tmp_path / "log"
    script = f'echo "$CA_BRIDGE_RUN_ID $$" >>{log}; test "$CA_BRIDGE_TRY" -gt 1 || sleep 600'
    bridge.add("hooks", {"after_install": hook(tmp_path, "tell", script)})
    command = [str(Path(sys.executable).with_name("ca-bridge")), "renew", "--config", str(bridge.config)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 180
        while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    os.killpg(int(log.read_text().split()[1]), signal.SIGKILL)
    run = bridge.run("renew")
    assert run.returncode == 0, run.stderr
    first, second = (line.split()[0] for line in log.read_text().splitlines())
    assert first == second
    assert_pairs(bridge.pki)
    assert not (bridge.directory / "state/hooks.json").exists()


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_sees_windows_hooks_and_failed_runs(bridge: Bridge) -> None:
    """`doctor` shows them before the night in which they matter; none of them is an error by itself."""
    bridge.add("renewal", {"window": ["Sat 02:00-06:00"], "window_zone": "Europe/Berlin"})
    bridge.add("hooks", {"success": ["false", "/nowhere/tell"]})
    before = " ".join(bridge.run("doctor").stdout.split())
    assert re.search(r"ok +renewal.window +Sat 02:00-06:00 \(Europe/Berlin\)", before)
    assert re.search(r"ok +hook success +\S+/false", before)
    assert re.search(r"warning +hook success +there is no program '/nowhere/tell'", before)
    assert "earlier run" not in before
    key = bridge.directory / "desk/etcd-ca/ca.key"
    aside = key.rename(key.with_suffix(".away"))
    assert bridge.run("renew", "etcd-peer").returncode == 2
    aside.rename(key)
    assert bridge.run("renew", "apiserver").returncode == 7
    bridge.tables[-2] = '[renewal]\nbefore = "7d"\nwindow = "Sat 02:00-06:00"\n'
    bridge.add("audit", {"syslog": False})
    after = bridge.run("doctor")
    assert after.returncode == 3, after.stdout
    reported = " ".join(after.stdout.split())
    assert re.search(r"warning +hooks +some of an earlier run", reported)
    assert re.search(r"warning +backend of etcd-ca +1 run has failed", reported)
    assert re.search(r"warning +renewal.window +wanted renewal.before longer", reported)
