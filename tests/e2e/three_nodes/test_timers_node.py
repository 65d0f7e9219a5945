"""
Three control-plane nodes with three etcd members, each with its own timer: a bare `ca-bridge renew` that restarts.

Meanwhile every member of etcd is asked every 0.2 s whether it can read through the quorum, and a client writes and reads
by whichever API server takes it. A restart lasts from the moment that a manifest is away until the record says
`restarted`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bridge.errors import Exit
from bridge.pki.certificates import pem
from bridge.pki.csr import key_pem
from bridge.specs import AUTHORITIES, Component
from tests.counts import Tried
from tests.kit import node as kit
from tests.kit import opensslca
from tests.kit.cas import add_vault, live_certificates
from tests.kit.doors import door
from tests.kit.issuing import Signer
from tests.kit.node import Node
from tests.kit.nodes import LiveBridge, NodePki, containers, wait_for
from tests.kit.openbao import OpenBao
from tests.kit.watching import STATIC, Seen, watched

pytestmark = [pytest.mark.node, pytest.mark.slow]

NEEDED = ["kube-controller-manager", "kube-scheduler"]
ELECTION_SECONDS = 15.0  #: At most, as the program has it.


@pytest.fixture(scope="module")
def bridges(
    nodes: list[Node], ca_keys: Path, tmp_path_factory: pytest.TempPathFactory, bao: OpenBao
) -> Iterator[list[LiveBridge]]:
    """The nodes' certificates are all due; each has its mounts and roles in one OpenBao."""
    directory, port = tmp_path_factory.mktemp("timers"), urlsplit(bao.url).port
    assert port is not None
    with contextlib.ExitStack() as stack:
        for node in nodes:
            stack.enter_context(door(node, port))
        yield [_bridge(node, bao, ca_keys, directory / node.name) for node in nodes]


def _bridge(node: Node, bao: OpenBao, keys: Path, directory: Path) -> LiveBridge:
    bridge = LiveBridge(
        pki=NodePki(root=node.root, external=True, keys=keys), directory=directory / "bridge", node=node
    )
    bridge.add("renewal", {"before": "2d", "validity": "30d"})
    for authority in AUTHORITIES:
        add_vault(bridge, bao, authority, node.name)
    bridge.add("restart", {"method": "static-pods", "components": "needed", "min_interval": "1s", "prove_for": "5m"})
    bridge.add("restart.commands", {"kubelet": bridge.kubelet_command()})
    bridge.add("cluster", {"lease": True})
    return bridge


# --- the timers ------------------------------------------------------------------------------------------------------


def fire(bridge: LiveBridge) -> list[int]:
    """The timer, and again when it was not the moment; the exit codes."""
    codes: list[int] = []
    while len(codes) < 3 and (not codes or codes[-1] in {Exit.WAITING, Exit.UNAVAILABLE}):
        run = bridge.run("renew", timeout=1500)
        print(f"{bridge.node.name}: exit {run.returncode}\n{run.stdout}{run.stderr}")
        codes.append(run.returncode)
    return codes


def turns(bridges: Sequence[LiveBridge], seen: Seen, known: Sequence[int]) -> list[tuple[datetime, datetime, str]]:
    """From a node's first manifest that left to its last component that was back."""
    found = []
    for bridge, events_before in zip(bridges, known, strict=True):
        back = [datetime.fromisoformat(e["time"]) for e in bridge.events()[events_before:] if e["event"] == "restarted"]
        begins = [moment for moment, name, _ in seen.away if name == bridge.node.name]
        found.append((min(begins), max(back), bridge.node.name))
    return sorted(found)


def assert_renewed(
    bridges: Sequence[LiveBridge], seen: Seen, known: Sequence[int], components: Sequence[str], tried: Tried
) -> None:
    """All that was seen is as it should be; says how much that was."""
    in_turn = turns(bridges, seen, known)
    spans = [f"{(end - begin).total_seconds():.0f} s" for begin, end, _ in in_turn]
    longest = max((end - begin for begin, end, _ in seen.down), default=0.0)
    print(
        f"{seen.looks} looks at etcd, {len(seen.down)} times without an answer, at most {longest:.1f} s; turns {spans}"
    )
    print(f"client: {seen.turns} turns, {seen.elsewhere} times on to another server, failed: {seen.failed}")
    for bridge in bridges:
        assert sorted(name for _, node, name in seen.away if node == bridge.node.name) == sorted(components)
    for (_, end, one), (begin, _, other) in itertools.pairwise(in_turn):
        assert end <= begin, f"{one} was not back when {other} began"
    assert seen.most_down() <= 1, seen.down  # two of three are a quorum
    assert seen.longest_without_quorum() < ELECTION_SECONDS, (seen.down, seen.leaderless)
    assert seen.failed == []
    assert min(seen.looks.values()) > 3
    for bridge in bridges:
        proof = bridge.run("prove", "--wait", "3m")
        assert proof.returncode == 0, proof.stdout
    tried("turns of a client of three API servers during restarts, none failed", seen.turns)
    tried("looks at members of etcd during restarts, never two of three down", sum(seen.looks.values()))
    tried("restarts on three nodes, never two nodes at once", len(seen.away))


def all_are_well(bridges: Sequence[LiveBridge]) -> bool:
    """Every API server, with its etcd."""
    return all(
        bridge.node.kubectl("--server", f"https://{bridge.node.ip}:6443", "get", "--raw", "/readyz", check=False).stdout
        == "ok"
        for bridge in bridges
    )


def test_one_timer_after_the_other(bridges: list[LiveBridge], tried: Tried) -> None:
    """Controller manager, scheduler and kubelet of each node are restarted; each API server and etcd is the same one after."""
    nodes, before = [bridge.node for bridge in bridges], [live_certificates(bridge.pki) for bridge in bridges]
    running = [containers(node) for node in nodes]
    with watched(nodes) as seen:
        codes = [fire(bridge) for bridge in bridges]
    assert codes == [[Exit.DONE]] * 3
    for bridge, old in zip(bridges, before, strict=True):
        new = live_certificates(bridge.pki)
        assert not [name for name in old if new[name] == old[name]]
    assert_renewed(bridges, seen, [0, 0, 0], NEEDED, tried)
    for node, ids in zip(nodes, running, strict=True):
        assert ids.items() & containers(node).items() == {
            (one, ids[one]) for one in (Component.APISERVER, Component.ETCD)
        }


def test_three_timers_at_once(bridges: list[LiveBridge], tried: Tried) -> None:
    """
    All four components of each node, one node after the other, by the lease.

    kubelet.conf refers to a file by now, from which the kubelet may rotate by itself: it is not due before that is late.
    """
    for bridge in bridges:
        bridge.change(before="60d", validity="300d", components="all")
    nodes, before = [bridge.node for bridge in bridges], [live_certificates(bridge.pki) for bridge in bridges]
    known = [len(bridge.events()) for bridge in bridges]
    with watched(nodes) as seen, ThreadPoolExecutor(len(bridges)) as pool:
        codes = list(pool.map(fire, bridges))
    print(f"exit codes: {codes}")
    assert [one[-1] for one in codes] == [Exit.DONE] * 3
    for bridge, old in zip(bridges, before, strict=True):
        new = live_certificates(bridge.pki)
        assert [name for name in old if new[name] == old[name]] == ["kubelet.conf"]
    assert_renewed(bridges, seen, known, STATIC, tried)
    assert {name for _, _, name in seen.down} == {node.name for node in nodes}  # or nothing was seen
    assert seen.elsewhere >= len(nodes)
    # A kubelet asks its own node's API server, and that its own etcd, so that a quorum elsewhere does not help it. If
    # etcd's manifest came back late, each kubelet would hang; on a machine that stalls, one was seen to.
    assert len([node for node in nodes if hung_at_etcd(node)]) <= 1


def hung_at_etcd(node: Node) -> bool:
    """Whether the kubelet waited in vain for its API server to delete etcd's mirror pod."""
    log = (kit.directory() / node.name / "kubelet.log").read_text(errors="replace").splitlines()
    hung = [line for line in log if "Failed deleting a mirror pod" in line and "Timeout" in line]
    return any(f"kube-system/etcd-{node.name}" in line for line in hung)


# --- peers that refuse -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_etcd_ca(bridge: LiveBridge, directory: Path) -> Iterator[None]:
    """A change of etcd's CA that only one node knows of: it trusts the new and the old one, and the new one signs."""
    file, settings = bridge.pki.pki_dir / "etcd/ca.crt", bridge.config.read_text()
    old = file.read_bytes()
    signer = Signer.make("etcd-ca", begin=datetime(2026, 1, 1, tzinfo=UTC), end=datetime(2036, 1, 1, tzinfo=UTC))
    desk = opensslca.make_ca_directory(directory, pem(signer.certificate), key_pem(signer.key))
    mount = f"{bridge.node.name}-etcd-ca"
    other = f'backend = "other"\n\n[backend.other]\ntype = "openssl"\ndir = "{desk}"\n'
    asks = f'backend = "{mount}"\nmount = "{mount}"\nrole = "kubeadm-{{name}}"'
    assert settings.count(asks) == 1
    file.write_bytes(pem(signer.certificate) + old)
    bridge.config.write_text(settings.replace(asks, other))
    try:
        yield
    finally:
        file.write_bytes(old)
        bridge.config.write_text(settings)


def test_peers_that_refuse_bring_the_old_certificate_back(bridges: list[LiveBridge], tmp_path: Path) -> None:
    """etcd-peer passes every check and no other member takes it: exit 8, and three members are well again."""
    wait_for("three nodes that are well", lambda: all_are_well(bridges))
    bridge, before = bridges[2], live_certificates(bridges[2].pki)
    with new_etcd_ca(bridge, tmp_path / "desk"):
        text = bridge.config.read_text()
        [components] = [line for line in text.splitlines() if line.startswith("components = ")]
        bridge.config.write_text(text.replace(components, 'components = ["etcd"]\ntimeout = "90s"'))
        bridge.change(prove_for="10s")
        with watched([one.node for one in bridges]) as seen:
            run = bridge.run("renew", "etcd-peer", timeout=1500)
    print(run.stdout, run.stderr)
    assert run.returncode == Exit.ROLLED_BACK, run.stderr
    assert "etcd" in run.stderr
    assert live_certificates(bridge.pki) == before
    assert {name for _, name, _ in seen.away} == {bridge.node.name}
    assert bridge.node.name in {
        name for begin, end, name in seen.down + seen.leaderless if end - begin > ELECTION_SECONDS
    }
    assert seen.longest_without_quorum() < ELECTION_SECONDS, (seen.down, seen.leaderless)
    assert seen.failed == []
    wait_for("three nodes that are well", lambda: all_are_well(bridges))
    for one in bridges:
        assert one.run("prove", "--wait", "3m").returncode == 0
