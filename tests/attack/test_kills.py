"""Renewals of a real process, killed at random times."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.specs import AUTHORITIES
from tests.counts import Tried
from tests.kit import opensslca, warm
from tests.kit.cas import Bridge
from tests.kit.pairs import assert_pairs
from tests.kit.pki import handmade_pki

#: How many; set CA_BRIDGE_KILLS to try more.
KILLS = int(os.environ.get("CA_BRIDGE_KILLS", "200"))
#: On as many nodes, so that several workers share them.
NODES = 4


@pytest.fixture
def bridge(tmp_path: Path) -> Bridge:
    """A node with an `openssl ca` directory for each authority."""
    pki = handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    for authority in AUTHORITIES:
        directory = opensslca.make_ca_directory(tmp_path / "cas" / authority, *pki.ca_pem(authority))
        bridge.add(f"backend.{authority}-desk", {"type": "openssl", "dir": str(directory)})
        bridge.add(f"authority.{authority}", {"backend": f"{authority}-desk"})
    return bridge


def start(bridge: Bridge) -> warm.Begun:
    """With all modules loaded: a kill before that would show nothing."""
    return warm.shared().begin(bridge.command("renew", "all"), timeout=120)


def killed(bridge: Bridge, wait_for: str, delay: float) -> bool:
    """So long after it began, or after that file was there; False: it had ended before."""
    process = start(bridge)
    if wait_for:
        while not (bridge.directory / "state" / wait_for).exists() and not process.has_ended:
            time.sleep(0.0002)
    time.sleep(delay)
    process.kill()
    return process.wait() == -signal.SIGKILL


def rests(bridge: Bridge) -> list[Path]:
    """What a run in the middle leaves, and `recover` must not."""
    state = bridge.directory / "state"
    found = [path for path in bridge.pki.kubeconfig_dir.rglob("*") if path.name.startswith(".")]
    found += [state / name for name in ("journal.json", "staging.json") if (state / name).exists()]
    found += [path for path in state.iterdir() if path.name.startswith(".")]
    return found + [path for path in (state / "backups").iterdir() if not (path / "manifest.json").exists()]


@pytest.mark.slow
@pytest.mark.parametrize("node", range(NODES))
def test_renewals_killed_at_random_times(node: int, bridge: Bridge, tried: Tried) -> None:
    """After `recover` no pair is apart, no file missing or empty, nothing left over, and the CAs go on signing."""
    seed = int.from_bytes(os.urandom(4))
    print(f"node {node}, seed {seed}")
    kills = -(-KILLS // NODES)
    dice = random.Random(seed)  # noqa: S311 (times to kill at)
    started = time.monotonic()
    assert start(bridge).wait() == 0
    #: A third of them at any time, a third while files are staged, a third after the commit; each within so many seconds.
    within = {"": time.monotonic() - started, "staging.json": 0.05, "journal.json": 0.005}
    files = {path for path in bridge.pki.kubeconfig_dir.rglob("*") if path.is_file()}
    found: Counter[str] = Counter()
    for number in range(kills):
        while not killed(bridge, moment := dice.choice(list(within)), dice.uniform(0, within[moment])):  # it had ended
            found["ended"] += 1
            within[moment] *= 0.8  # the first one was slower (a busy machine), or this machine is fast
            assert found["ended"] < kills
        found["interrupted"] += (bridge.directory / "state/journal.json").exists()
        found["staged"] += (bridge.directory / "state/staging.json").exists()
        recovered = bridge.run("recover")
        assert recovered.returncode == 0, (number, recovered.stderr)
        assert {path for path in bridge.pki.kubeconfig_dir.rglob("*") if path.is_file()} == files, number
        assert all(path.stat().st_size for path in files), number
        assert_pairs(bridge.pki)
        assert rests(bridge) == [], number
    print(dict(found))
    last = bridge.run("renew", "all")
    assert last.returncode == 0, last.stderr
    verified = bridge.run("audit", "verify")
    assert verified.returncode == 0, verified.stderr
    assert_pairs(bridge.pki)
    tried("renewals of a process killed at random times", kills)
    tried("of them killed after the commit point", found["interrupted"])
    tried("of them killed with new files staged", found["staged"])
