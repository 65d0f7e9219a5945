"""Certificates that end before the ones that they replace: refused before a CA is asked, or taken because the settings allow it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.kit.cas import Bridge, add_openssl, live_certificates
from tests.kit.pki import handmade_pki

NAMES = ("scheduler.conf", "controller-manager.conf")


def bridge_of(tmp_path: Path, *, ca_left: timedelta = timedelta(days=3650), **renewal: str) -> Bridge:
    """A node whose certificates are good for a year, an `openssl ca` directory, and settings."""
    pki = handmade_pki(tmp_path / "node", ca_not_after=datetime.now(UTC) + ca_left)
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    add_openssl(bridge, "ca")
    bridge.add("renewal", renewal)
    return bridge


def signed(bridge: Bridge) -> int:
    """Signatures that were spent."""
    return len(list((bridge.directory / "desk").rglob("newcerts/*.pem")))


def test_our_own_validity_is_refused_before_a_ca_is_asked(tmp_path: Path) -> None:
    """With the setting that is the cause, in `plan`, `renew` and `export`; what lasts as long is signed."""
    bridge = bridge_of(tmp_path, validity="90d")
    before = live_certificates(bridge.pki)
    planned = bridge.run("plan", *NAMES, "-o", "json")
    assert planned.returncode == 3
    assert set(json.loads(planned.stdout)["shorter"]) == set(NAMES)
    assert 'such an answer is refused; set shorter = "allow" in [renewal]' in planned.stderr
    for command in (("renew",), ("export", str(tmp_path / "bundle"))):
        run = bridge.run(*command, *NAMES)
        assert run.returncode == 2, run.stderr
        assert "found renewal.validity = 90d, which ends" in run.stderr
        assert 'hint: set shorter = "allow" in [renewal]' in run.stderr
    assert signed(bridge) == 0
    assert not (tmp_path / "bundle").exists()
    assert live_certificates(bridge.pki) == before
    bridge.config.write_text(bridge.config.read_text().replace("90d", "366d"))
    assert bridge.run("renew", *NAMES).returncode == 0
    assert signed(bridge) == len(NAMES)


def test_a_shorter_lifetime_is_introduced(tmp_path: Path) -> None:
    """`plan` and `renew` tell it, and the audit log keeps it; the next run with it says nothing."""
    bridge = bridge_of(tmp_path, validity="90d", shorter="allow")
    assert "before the live certificate does: such an answer is taken" in bridge.run("plan", *NAMES).stderr
    run = bridge.run("renew", *NAMES)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count('(renewal.shorter = "allow")') == len(NAMES)
    live = live_certificates(bridge.pki)
    assert all(live[name].not_valid_after_utc < datetime.now(UTC) + timedelta(days=91) for name in NAMES)
    lines = json.loads(bridge.run("audit", "show", "-o", "json").stdout)["events"]
    reported = [line["name"] for line in lines if line["event"] == "verified" and "instead of" in line["result"]]
    assert sorted(reported) == sorted(NAMES)
    assert "renewal.shorter" not in bridge.run("renew", *NAMES).stderr


@pytest.mark.parametrize(("ca_left", "is_reported"), [(timedelta(days=400), False), (timedelta(days=500), True)])
def test_what_the_ca_s_end_cuts_short_is_reported(ca_left: timedelta, is_reported: bool, tmp_path: Path) -> None:
    """A warning says that the CA's end cut two years short, and there is none where the CA lasts long enough."""
    validity = "730d" if is_reported else "380d"
    bridge = bridge_of(tmp_path, ca_left=ca_left, validity=validity)
    run = bridge.run("renew", *NAMES)
    assert run.returncode == 0, run.stderr
    assert ("cut short, since the CA itself ends" in run.stderr) is is_reported, run.stderr
