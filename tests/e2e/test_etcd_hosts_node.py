"""
Three hosts of etcd alone, as kubeadm's "Set up a High Availability etcd Cluster" leaves them, and two control planes
beside them, all with CAs in OpenBao. Every member of etcd is asked every 0.2 s whether it can read through the quorum.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cryptography import x509

from bridge.node import inventory
from bridge.specs import AUTHORITIES
from tests.kit.cas import add_vault, live_certificates
from tests.kit.day_zero import Machine, Online, Walk, prepare
from tests.kit.doors import door
from tests.kit.looking import ETCD_PORT, ask, client, connection
from tests.kit.node import Node
from tests.kit.nodes import LiveBridge, NodePki, wait_for
from tests.kit.openbao import OpenBao

pytestmark = [pytest.mark.node, pytest.mark.slow]

HOSTS = {"eh-1": "198.18.77.180", "eh-2": "198.18.77.181", "eh-3": "198.18.77.182"}
CONTROL_PLANES = {"eh-cp1": "198.18.77.183", "eh-cp2": "198.18.77.184"}
OURS = {"apiserver-etcd-client", "etcd-healthcheck-client", "etcd-peer", "etcd-server"}
ELECTION_SECONDS = 15.0  #: At most, as the program has it.

CLIENT = Path("/etc/kubernetes/etcd-client")
EXTERNAL = f"""\
etcd:
  external:
    endpoints: [{", ".join(f"https://{ip}:2379" for ip in HOSTS.values())}]
    caFile: {CLIENT}/ca.pem
    certFile: {CLIENT}/client.pem
    keyFile: {CLIENT}/client-key.pem
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where etcd's CA is; its key is on no host."""
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def bridges(tmp_path_factory: pytest.TempPathFactory, keys: Path, bao: OpenBao) -> Iterator[list[LiveBridge]]:
    """The hosts, whose certificates end in a day, and ca-bridge on each."""
    port = urlsplit(bao.url).port
    assert port is not None
    directory = tmp_path_factory.mktemp("hosts")
    with contextlib.ExitStack() as stack:
        found = []
        for name, ip in HOSTS.items():
            short = "certificateValidityPeriod: 24h"
            node = stack.enter_context(Node.etcd_host(name, ip, HOSTS, ca_dir=keys, cluster=short))
            stack.enter_context(door(node, port))
            pki = NodePki(root=node.root, external=True, keys=keys)
            bridge = LiveBridge(pki=pki, directory=directory / name, node=node)
            bridge.add("renewal", {"before": "1h", "validity": "30d"})
            add_vault(bridge, bao, "etcd-ca", name)
            bridge.add(
                "restart", {"method": "static-pods", "components": "needed", "min_interval": "1s", "prove_for": "5m"}
            )
            bridge.add("restart.commands", {"kubelet": bridge.kubelet_command()})
            found.append(bridge)
        nodes = [bridge.node for bridge in found]
        wait_for("a cluster of three", lambda: all(map(is_well, nodes)))
        yield found


def is_well(node: Node) -> bool:
    """Whether its member reads through the quorum."""
    try:
        with connection(node, ETCD_PORT, client(node, "etcd-healthcheck-client")) as opened:
            return ask(opened, "/health").status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False


@dataclass(kw_only=True)
class Seen:
    """What the members answered."""

    looks: int = 0
    silent: set[str] = field(default_factory=set)  #: Hosts whose member does not answer now.
    ever: set[str] = field(default_factory=set)  #: Those whose member did not answer once.
    most: int = 0  #: How many did not answer at the same time.
    leaderless: float = 0  #: The longest time without a leader, in seconds.

    def note(self, name: str, *, answers: bool) -> None:
        """Note one look."""
        self.looks += 1
        (self.silent.discard if answers else self.silent.add)(name)
        self.ever |= self.silent
        self.most = max(self.most, len(self.silent))


@contextlib.contextmanager
def watched(nodes: Sequence[Node]) -> Iterator[Seen]:
    """Look until the end of the block."""
    seen, stop, mutex = Seen(), threading.Event(), threading.Lock()

    def look(node: Node) -> None:
        since = 0.0
        with connection(node, ETCD_PORT, client(node, "etcd-healthcheck-client")) as kept:
            while not stop.wait(0.2):
                status = 0
                try:
                    status = ask(kept, "/health").status
                except (OSError, http.client.HTTPException):
                    kept.close()
                now = time.monotonic()
                since = since or now if status and status != http.client.OK else 0.0
                with mutex:
                    seen.note(node.name, answers=status != 0)
                    seen.leaderless = max(seen.leaderless, now - since if since else 0.0)

    with ThreadPoolExecutor(len(nodes)) as pool:
        running = [pool.submit(look, node) for node in nodes]
        try:
            yield seen
        finally:
            stop.set()
    for one in running:
        one.result()


def assert_quorum(seen: Seen, count: int) -> None:
    """Two of three were always there."""
    print(f"{seen.looks} looks, silent {seen.ever}, at most {seen.most} at once, leaderless {seen.leaderless:.1f} s")
    assert seen.looks > 3
    assert (len(seen.ever), seen.most) == (count, min(count, 1))
    assert seen.leaderless < ELECTION_SECONDS


def test_a_night_with_nothing_due(bridges: list[LiveBridge]) -> None:
    """Each host is known for what it is: `renew`, `check-expiration` and `doctor` exit 0, and miss nothing."""
    for bridge in bridges:
        node = inventory.read(bridge.pki.pki_dir, bridge.pki.kubeconfig_dir)
        assert node.role == "etcd host"
        assert {item.spec.name for item in node.items} == OURS
        for command in (["renew"], ["plan"], ["check-expiration"], ["doctor"], ["prove", "--wait", "3m"]):
            run = bridge.run(*command)
            assert run.returncode == 0, f"{command}: {run.stdout}{run.stderr}"
            assert "MISSING" not in run.stdout


def test_three_timers_at_once(bridges: list[LiveBridge]) -> None:
    """All that is due is renewed through OpenBao, and members restart in turn: etcd is never without its quorum."""
    before = [live_certificates(bridge.pki) for bridge in bridges]
    for bridge in bridges:
        bridge.change(before="2d", components="all")
    with watched([bridge.node for bridge in bridges]) as seen, ThreadPoolExecutor(len(bridges)) as pool:
        runs = list(pool.map(lambda bridge: bridge.run("renew", timeout=1500), bridges))
    for run in runs:
        print(run.stdout, run.stderr)
    assert [run.returncode for run in runs] == [0, 0, 0]
    for bridge, old in zip(bridges, before, strict=True):
        new = live_certificates(bridge.pki)
        assert {name for name in new if new[name] != old[name]} == OURS
        restarted = [event["name"] for event in bridge.events() if event["event"] == "restarted"]
        assert restarted == ["etcd"]
        assert "no lease was taken" not in "".join(run.stderr for run in runs)
    assert_quorum(seen, 3)
    for bridge in bridges:
        assert bridge.run("prove", "--wait", "3m").returncode == 0


def test_back_and_forth(bridges: list[LiveBridge]) -> None:
    """`restart`, `rollback` and the metrics work for what is there."""
    bridge = bridges[0]
    before = live_certificates(bridge.pki)
    metrics = bridge.run("check-expiration", "-o", "prometheus").stdout
    assert {name for name in OURS if f'"{name}"' in metrics} == OURS
    assert '"apiserver"' not in metrics
    with watched([one.node for one in bridges]) as seen:
        assert bridge.run("restart", "etcd").returncode == 0
        back = bridge.run("rollback")
    assert back.returncode == 0, back.stderr
    now = live_certificates(bridge.pki)
    assert {name for name in now if now[name] != before[name]} == OURS
    assert_quorum(seen, 1)
    bridge.change(components="needed")
    assert bridge.run("renew").returncode == 0


def test_control_planes_beside_them(bridges: list[LiveBridge], keys: Path, tmp_path: Path, bao: OpenBao) -> None:
    """
    `bootstrap init` takes the client pair that was copied from an etcd host, `bootstrap join` has one made.

    kubeadm takes both, etcd's hosts go on meanwhile, and the pair is renewed where the API server's manifest names it.
    """
    pair = (keys / "etcd/ca.crt").read_bytes(), (keys / "etcd/ca.key").read_bytes()
    cas = Online(bao=bao, prefix="eh", given={"etcd-ca": pair})
    port = urlsplit(bao.url).port
    assert port is not None
    with contextlib.ExitStack() as stack, watched([one.node for one in bridges]) as seen:
        cluster = prepare(stack, tmp_path, cas, CONTROL_PLANES, {}, Walk(), more=EXTERNAL)
        first, second = cluster.machines.values()
        copied = bring_client_pair(bridges[0].node, first.node)
        cluster.make()
        assert client_certificate(first) == copied
        assert client_certificate(second) != copied
        for machine in (first, second):
            assert not (machine.node.pki_dir / "etcd").exists()
            stack.enter_context(door(machine.node, port))
            old = client_certificate(machine)
            renewed = machine.alone("renew", "apiserver-etcd-client")
            assert renewed.returncode == 0, f"{renewed.stdout}{renewed.stderr}"
            assert client_certificate(machine) != old
            proof = machine.alone("prove", "--wait", "3m")
            assert proof.returncode == 0, f"{proof.stdout}{proof.stderr}"
            assert "apiserver-etcd-client" in proof.stdout
            for command in (["renew"], ["check-expiration"], ["doctor"]):
                run = machine.alone(*command)
                assert run.returncode == 0, f"{command}: {run.stdout}{run.stderr}"
    assert_quorum(seen, 0)


def bring_client_pair(host: Node, machine: Node) -> x509.Certificate:
    """What kubeadm's documentation has an operator copy to the first control plane."""
    place = machine.root / CLIENT.relative_to("/")
    place.mkdir()
    for source, target in (
        ("etcd/ca.crt", "ca.pem"),
        ("apiserver-etcd-client.crt", "client.pem"),
        ("apiserver-etcd-client.key", "client-key.pem"),
    ):
        shutil.copy2(host.pki_dir / source, place / target)
    return x509.load_pem_x509_certificate((place / "client.pem").read_bytes())


def client_certificate(machine: Machine) -> x509.Certificate:
    """The one that the API server shows to etcd."""
    place = machine.node.root / CLIENT.relative_to("/")
    assert (place / "client-key.pem").stat().st_mode & 0o777 == 0o600
    return x509.load_pem_x509_certificate((place / "client.pem").read_bytes())


def test_the_authorities_of_both_are_one(bridges: list[LiveBridge], keys: Path) -> None:
    """One etcd CA serves both, and no host has its key."""
    files = {(bridge.pki.pki_dir / AUTHORITIES["etcd-ca"].certificate_file).read_bytes() for bridge in bridges}
    assert files == {(keys / "etcd/ca.crt").read_bytes()}
    assert not [bridge for bridge in bridges if (bridge.pki.pki_dir / "etcd/ca.key").exists()]
