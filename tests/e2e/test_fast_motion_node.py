"""
Two weeks of a control plane in fast motion: one second stands for one hour.

Certificates live 6 minutes (15 days) and are due when less than 5 min 15 s are left (13 days); the timer, a bare
`ca-bridge renew`, fires every 6 s (four times a day) for 336 s (two weeks), on a slow machine until the last outage is
over. OpenBao is away twice, once for 50 s (two days), and refuses once. kubelet.conf keeps kubeadm's year, since
`kubeadm certs renew` makes no shorter one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pytest

from bridge.errors import Exit
from bridge.renewal.gate import MANY
from bridge.specs import AUTHORITIES, Component
from tests.counts import Tried
from tests.kit import nodes
from tests.kit.cas import add_vault, live_certificates
from tests.kit.doors import Door, door
from tests.kit.node import AT_ONCE, Node
from tests.kit.nodes import LiveBridge, NodePki
from tests.kit.openbao import OpenBao
from tests.kit.pki import PKI_SPECS, Pki

pytestmark = [pytest.mark.node, pytest.mark.slow, pytest.mark.nightly]

NAME, IP = f"fast-{os.getpid() % 100_000}", "198.18.77.130"
NAMES = [name for name in PKI_SPECS if name != "kubelet.conf"]
#: Who goes on with an old certificate on 1.37, and where it has it from.
RESTARTED = {"kube-controller-manager": "controller-manager.conf", "kube-scheduler": "scheduler.conf"}

TWO_WEEKS, FIRING = 336.0, 6.0


@dataclass(frozen=True, kw_only=True)
class Outage:
    """From a renewal on; so that something will be due in it."""

    kind: Literal["away", "refuses"]
    seconds: float  #: After the first run that failed.
    firings: int = 1  #: That fail in it, however slow the machine is.


#: The first is longer than three firings, and ends in their pause.
OUTAGES = (
    Outage(kind="away", seconds=50, firings=2 * MANY + 2),
    Outage(kind="away", seconds=1),
    Outage(kind="refuses", seconds=1),
)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A node in external-CA mode, and its CA."""

    node: Node
    bao: OpenBao
    bridge: LiveBridge
    door: Door


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, bao: OpenBao) -> Iterator[Site]:
    """With the settings of a cron job."""
    directory = tmp_path_factory.mktemp("site")
    keys = directory / "ca-keys"
    with Node.up(NAME, IP, ca_dir=keys, kubelet=AT_ONCE) as node:
        nodes.make_ready(node)
        pki = NodePki(root=node.root, external=True, keys=keys)
        bridge = LiveBridge(pki=pki, directory=directory / "bridge", node=node)
        bridge.add("renewal", {"before": "5m15s", "validity": "6m", "min_validity": "1m"})
        for authority in AUTHORITIES:
            add_vault(bridge, bao, authority, NAME)
        bridge.add(
            "restart", {"method": "static-pods", "components": "needed", "min_interval": "1s", "prove_for": "5m"}
        )
        port = urlsplit(bao.url).port
        assert port is not None
        _shorten(node, keys)
        with door(node, port) as found:
            yield Site(node=node, bao=bao, bridge=bridge, door=found)


def _shorten(node: Node, keys: Path) -> None:
    """Certificates of four minutes by kubeadm, since no renewal may end before what it replaces."""
    config = (node.kubeconfig_dir / "kubeadm.yaml").read_text()
    kind = "kind: ClusterConfiguration\n"
    assert kind in config
    (node.kubeconfig_dir / "short.yaml").write_text(config.replace(kind, f"{kind}certificateValidityPeriod: 4m\n"))
    places = [f"{AUTHORITIES[name].certificate_file.removesuffix('.crt')}.key" for name in AUTHORITIES]
    for place in places:
        shutil.copy(keys / place, node.pki_dir / place)
    node.exec("kubeadm", "certs", "renew", "all", "--config", "/etc/kubernetes/short.yaml")
    for place in places:
        (node.pki_dir / place).unlink()


@dataclass(kw_only=True)
class Disk:
    """What was seen of the certificates, twice a second."""

    looks: int = 0
    least: timedelta = timedelta.max  #: That any had left.
    expired: list[str] = field(default_factory=list)
    serials: dict[str, set[int]] = field(default_factory=lambda: {name: set() for name in NAMES})


@contextlib.contextmanager
def watched(pki: Pki) -> Iterator[Disk]:
    """Look until the end of the block."""
    seen, stop = Disk(), threading.Event()

    def work() -> None:
        while not stop.wait(0.5):
            now, seen.looks = datetime.now(UTC), seen.looks + 1
            for name, certificate in live_certificates(pki).items():
                if name in seen.serials:
                    left = certificate.not_valid_after_utc - now
                    seen.least = min(seen.least, left)
                    seen.expired += [f"{name} at {now}"] if left <= timedelta() else []
                    seen.serials[name].add(certificate.serial_number)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True, kw_only=True)
class Firing:
    """One of the timer's runs."""

    begin: float  #: Seconds from the beginning of the two weeks.
    end: float
    code: int
    connections: int  #: That the CA got from it.
    outage: Outage | None
    renewed: bool  #: Any certificate.
    stderr: str


def test_two_weeks(site: Site, tried: Tried) -> None:
    """Nothing ever expires, nothing is restarted without need, no CA is asked again and again while it is away."""
    first = site.bridge.run("renew", *NAMES)
    assert first.returncode == 0, first.stderr
    before, restarts_before = nodes.containers(site.node), _restarts(site.bridge)
    containers = {component: {one} for component, one in before.items()}
    with watched(site.bridge.pki) as seen:
        firings = list(_two_weeks(site, containers))
    renewals = {name: len(serials) - 1 for name, serials in seen.serials.items()}
    restarts = _restarts(site.bridge) - restarts_before
    for one in firings:
        if one.code or one.end - one.begin > FIRING:
            words = one.stderr.strip().splitlines()[:1]
            print(f"{one.begin:5.0f}-{one.end:3.0f} s: exit {one.code}, {one.connections} connections {words}")
    codes = Counter(one.code for one in firings)
    print(f"{len(firings)} firings, exit codes {dict(codes)}; renewals {renewals}; restarts {dict(restarts)}")
    print(f"least left {seen.least.total_seconds():.0f} s in {seen.looks} looks; {site.door.connections} connections")

    assert site.bridge.run("prove", "--wait", "3m").returncode == 0
    assert seen.expired == []
    assert set(seen.serials) == set(NAMES)
    assert min(renewals.values()) >= 3
    assert restarts == Counter({component: renewals[name] for component, name in RESTARTED.items()})
    assert {component.value for component, ids in containers.items() if len(ids) > 1} == set(RESTARTED)
    for component, name in RESTARTED.items():
        assert len(containers[Component(component)]) == renewals[name] + 1
    _assert_codes(firings)
    _assert_no_hammering(firings)
    tried("firings of the timer in two weeks of fast motion", len(firings))
    tried("renewals in them, nothing ever expired", sum(renewals.values()))
    tried("restarts in them, each for a new certificate", restarts.total())
    tried("firings during outages that asked no CA", sum(map(_held_off, firings)))


def _two_weeks(site: Site, containers: dict[Component, set[str]]) -> Iterator[Firing]:
    beginning, to_come = time.monotonic(), list(OUTAGES)
    outage: Outage | None = None
    until: float | None = None
    failed = 0  # firings of the outage
    is_over = False  # the last outage, and what was due in it
    with contextlib.ExitStack() as stack:
        while (begin := time.monotonic() - beginning) < TWO_WEEKS or not is_over:
            assert begin < 10 * TWO_WEEKS, f"to come: {to_come}, now: {outage}"
            if outage is not None and until is not None and begin >= until and failed >= outage.firings:
                stack.close()
                outage = until = None
            connections, before = site.door.connections, live_certificates(site.bridge.pki)
            run = site.bridge.run("renew")
            end = time.monotonic() - beginning
            fired = Firing(
                begin=begin,
                end=end,
                code=run.returncode,
                connections=site.door.connections - connections,
                outage=outage,
                renewed=live_certificates(site.bridge.pki) != before,
                stderr=run.stderr,
            )
            yield fired
            for component, one in nodes.containers(site.node).items():
                containers[component].add(one)
            failed += bool(outage is not None and fired.code)
            if outage is not None and until is None and fired.code:
                until = end + outage.seconds
            if outage is None and to_come and fired.connections and fired.code == Exit.DONE:
                outage, failed = to_come.pop(0), 0
                stack.enter_context(_out(site, outage))
            is_over = not to_come and outage is None and fired.code == Exit.DONE
            time.sleep(max(0.0, FIRING - (time.monotonic() - beginning - begin)))


@contextlib.contextmanager
def _out(site: Site, outage: Outage) -> Iterator[None]:
    path = f"{NAME}-ca/roles/kubeadm-scheduler.conf"
    role = site.bao.read(path)["data"]
    if outage.kind == "away":
        site.door.is_open = False
    else:
        site.bao.write(path, **(role | {"client_flag": False, "ext_key_usage": ["ServerAuth"]}))
    try:
        yield
    finally:
        site.door.is_open = True
        site.bao.write(path, **role)


def _restarts(bridge: LiveBridge) -> Counter[str]:
    return Counter(one["name"] for one in bridge.events() if one["event"] == "restarted" and one["exitCode"] == 0)


def _held_off(firing: Firing) -> bool:
    return firing.code != Exit.DONE and firing.connections == 0


def _assert_codes(firings: list[Firing]) -> None:
    """Who was asked in vain was so in an outage; all three of them were felt."""
    codes = {one.code for one in firings}
    assert codes <= {Exit.DONE, Exit.WAITING, Exit.UNAVAILABLE, Exit.REFUSED}
    assert firings[-1].code == Exit.DONE, firings[-1].stderr
    in_vain = [one for one in firings if one.code and one.connections]
    assert [one for one in in_vain if one.outage is None] == []
    assert {id(one.outage) for one in in_vain} == set(map(id, OUTAGES))


def _assert_no_hammering(firings: list[Firing]) -> None:
    """Three runs ask a CA that is away; the others wait, and say so. When nothing is due, no run asks the CA."""
    asked = [one for one in firings if one.outage is OUTAGES[0] and one.code and one.connections]
    assert len(asked) == MANY
    assert sum(map(_held_off, firings)) > MANY
    done = [one for one in firings if one.code == Exit.DONE]
    assert [one for one in done if one.connections and not one.renewed] == []
    assert not all(one.connections for one in done)
