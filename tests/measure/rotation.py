"""
Three CAs at once are replaced on real machines: `python -m tests.measure.rotation`.

Three control-plane nodes with stacked etcd and a worker; `ca`, `etcd-ca` and `front-proxy-ca` get successors in an OpenBao
server, or with `--through desk` at a CA desk; with `--adopt` the old ones are kubeadm's own, with their keys on the nodes;
with `--cross` they certify the new ones.
Meanwhile the clients of `rotation_clients.py` ask all API servers, a client writes and reads by whichever takes it, and
every member of etcd is asked every 0.2 s. With `back` each phase is then gone back from; with `--kill` each command is
killed on each node at a random moment, and typed again. Prints what took how long and what the clients saw, after each
phase what there is by then; with `--docs` also into docs/evidence/rotation.md.
With `--older 1.34` one control-plane node and a worker are of the programs that `tests/kit/binaries.sh --older 1.34` builds,
its API server verifies kubelets by the cluster's CA, and `trust` comes for that CA alone first: before 1.36 it reads that
file at its start alone. A program of that version that was started before is asked, too, and its kubeadm in each phase.
Takes root, the kit's programs, and about fifteen minutes on two idle cores; `back --kill` about thirty.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from bridge.errors import Exit
from bridge.pki.certificates import pem
from bridge.specs import AUTHORITIES, CA, ETCD_CA, FRONT_PROXY_CA, KUBELET_SERVER, Component
from bridge.state import Store
from tests.kit import next_cas, nodes, openbao, programs
from tests.kit.cas import add_openssl, add_vault
from tests.kit.desks import POLICY, Desk, make_desk
from tests.kit.doors import door
from tests.kit.next_cas import NextCa
from tests.kit.node import AT_ONCE, Node
from tests.kit.node import directory as node_directory
from tests.kit.nodes import LiveBridge, NodePki, wait_for
from tests.kit.openbao import OpenBao
from tests.kit.watching import Seen, watched
from tests.measure import rotation_clients as clients
from tests.measure.__main__ import write_between
from tests.measure.rotation_clients import Answer, Clients, Record

DOCUMENT = Path(__file__).parents[2] / "docs/evidence/rotation.md"
CONTROL_PLANES = {"rc-cp1": "198.18.77.61", "rc-cp2": "198.18.77.62", "rc-cp3": "198.18.77.63"}
WORKER, WORKER_IP = "rc-w1", "198.18.77.64"
OLDER_CONTROL_PLANE, OLDER_WORKER = ("ro-cp1", "198.18.77.155"), ("ro-w1", "198.18.77.156")
#: A verb, the phase afterwards, and the CAs that are named; none: all.
Turn = tuple[str, str, tuple[str, ...]]
FORWARD: tuple[Turn, ...] = (("trust", "trusted", ()), ("issue", "issued", ()), ("drop", "new", ()))
THERE_AND_BACK: tuple[Turn, ...] = (*FORWARD, ("back", "issued", ()), ("back", "trusted", ()), ("back", "old", ()))
#: Up to the first `back` for `ca` alone: a restart for `etcd-ca` would hide one that `ca` needs.
OLDER: tuple[Turn, ...] = (
    ("trust", "trusted", (CA.name,)),
    ("issue", "issued", (CA.name,)),
    ("back", "trusted", (CA.name,)),
    ("trust", "trusted", (ETCD_CA.name, FRONT_PROXY_CA.name)),
    *FORWARD[1:],
)
_SECONDS = 1500  #: At most, for a command on a node.
_READ_AGAIN_MINUTES = 5  #: client-go 1.36 and newer.
#: An API server has no use for kubelets that it can't verify.
_VERIFIES = "apiServer: {extraArgs: [{name: kubelet-certificate-authority, value: /etc/kubernetes/pki/ca.crt}]}"


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A command that was begun on a node, and killed."""

    node: str
    seconds: float  #: After its begin.
    is_over: bool  #: It had ended before.
    phases: Mapping[str, str]  #: Of each CA right afterwards, by its files.


@dataclass(kw_only=True)
class Step:
    """One verb on all nodes."""

    verb: str
    phase: str
    cas: tuple[str, ...] = ()  #: That are named; none: all.
    valid: Sequence[str]  #: The clients that nothing may refuse from its begin to its end.
    seconds: dict[str, float] = field(default_factory=dict)  #: By node.
    killed: list[Kill] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    record: Record = field(default_factory=Record)
    ended: Mapping[str, int] = field(default_factory=dict)  #: Streams.

    @property
    def title(self) -> str:
        """The verb, and where `back` leads."""
        typed = f"`{' '.join(self.words)}`"
        return f"{typed}, to “{self.phase}”" if self.verb == "back" else typed

    @property
    def words(self) -> list[str]:
        """As they are typed."""
        return [self.verb, *(word for name in self.cas for word in ("--ca", name))]

    @property
    def workers(self) -> list[str]:
        """The nodes without a control plane."""
        return [name for name in self.seconds if name in (WORKER, OLDER_WORKER[0])]

    @property
    def control_planes(self) -> list[str]:
        """The others."""
        return [name for name in self.seconds if name not in self.workers]


@dataclass(kw_only=True)
class Site:
    """The cluster under load."""

    bridges: list[LiveBridge]
    clients: Clients
    before: Path  #: Copies of `/etc/kubernetes`, by node.
    new: bytes  #: The new CAs, PEM.
    options: argparse.Namespace
    steps: Sequence[Turn]
    desk: Desk | None = None
    pod_seconds: list[float] = field(default_factory=list)  #: Until a pod's file had both CAs, after a phase with both.
    once: str = ""  #: What a program that was started before `trust`, and names a CA file, was answered at the end.
    once_minutes: float = 0  #: So long after its start.

    @property
    def control_planes(self) -> list[LiveBridge]:
        """All but the worker's."""
        return self.bridges[:-1]


# --- the cluster -----------------------------------------------------------------------------------------------------


@contextmanager
def site(directory: Path, bao: OpenBao, options: argparse.Namespace) -> Iterator[Site]:
    """The nodes, each with its settings, and the clients."""
    keys, made = directory / "ca-keys", next_cas.make(directory / "next")
    if options.adopt and options.cross:
        raise SystemExit("wanted old CAs whose keys are not on the nodes for --cross, found --adopt")
    with ExitStack() as stack:
        found = _older_nodes(stack, keys) if options.older else _nodes(stack, None if options.adopt else keys)
        for node in [] if options.older else found:
            stack.enter_context(door(node, urlsplit(bao.url).port or 0))
        if options.cross:
            made = {name: _certified(one, name, keys, directory / "cross") for name, one in made.items()}
        desk = _desk(directory, made, found[0]) if options.through == "desk" else None
        bridges = [_bridge(node, bao, keys, directory / node.name, made, desk, options) for node in found]
        if options.older:
            _served_by_the_ca(bridges)
        before = directory / "before"
        for node in found:
            shutil.copytree(node.kubeconfig_dir, before / node.name)
        old_conf = (before / found[0].name / "admin.conf").read_bytes()
        old_ca = (before / found[0].name / "pki/ca.crt").read_bytes()
        extension = stack.enter_context(clients.aggregated(found[:-1], directory / "extension"))
        clients.start_pod(found[:-1], found[-1])
        load = Clients(
            nodes=found[:-1],
            extension=extension,
            old_conf=old_conf,
            both=old_ca + pem(made[CA.name].signer.certificate),
        )
        yield Site(
            bridges=bridges,
            clients=load,
            before=before,
            new=pem(*(one.signer.certificate for one in made.values())),
            options=options,
            steps=_steps(options),
            desk=desk,
        )


def _steps(options: argparse.Namespace) -> list[Turn]:
    every = OLDER if options.older else THERE_AND_BACK if options.way else FORWARD
    return [one for one in every if one[0] != "trust" or not options.cross]


def _nodes(stack: ExitStack, keys: Path | None) -> list[Node]:
    names, ips = list(CONTROL_PLANES), list(CONTROL_PLANES.values())
    first = stack.enter_context(Node.up(names[0], ips[0], ca_dir=keys, kubelet=AT_ONCE))
    found = [first]
    for name, ip in zip(names[1:], ips[1:], strict=True):
        found.append(stack.enter_context(Node.join(name, ip, first, kubelet=AT_ONCE)))
    worker = stack.enter_context(Node.worker(WORKER, WORKER_IP, first))
    for node in found:
        nodes.make_ready(node)
        if keys is None:
            _sign_no_more(node)
    return [*found, worker]


def _older_nodes(stack: ExitStack, keys: Path) -> list[Node]:
    kubelet = f"featureGates: {{KubeletCrashLoopBackOffMax: true}}\n{AT_ONCE}"
    first = stack.enter_context(Node.up(*OLDER_CONTROL_PLANE, ca_dir=keys, cluster=_VERIFIES, kubelet=kubelet))
    nodes.make_ready(first)
    return [first, stack.enter_context(Node.worker(*OLDER_WORKER, first))]


def _served_by_the_ca(bridges: Sequence[LiveBridge]) -> None:
    """Kubelets that API servers can verify."""
    for bridge in bridges:
        run = bridge.run("renew", KUBELET_SERVER)
        print(run.stdout, run.stderr, flush=True)
        assert run.returncode == Exit.DONE


def _sign_no_more(node: Node) -> None:
    """The built-in signer is off, as an adoption wants it."""
    manifest = node.kubeconfig_dir / "manifests/kube-controller-manager.yaml"
    before = nodes.containers(node)[Component.CONTROLLER_MANAGER]
    aside = node.kubeconfig_dir / manifest.name
    aside.write_text(re.sub(r"(--cluster-signing-(?:cert|key)-file=).*", r"\1", manifest.read_text()))
    aside.chmod(0o600)
    aside.rename(manifest)
    wait_for(
        "another controller manager",
        lambda: nodes.containers(node).get(Component.CONTROLLER_MANAGER, before) != before,
        seconds=180,
    )
    wait_for("a healthy one", lambda: nodes.is_healthy(node, Component.CONTROLLER_MANAGER), seconds=180)


def _certified(ca: NextCa, name: str, keys: Path, directory: Path) -> NextCa:
    """The same with a cross certificate of the old CA."""
    certificate, key = AUTHORITIES[name].certificate_file, AUTHORITIES[name].key_file
    old = (keys / certificate).read_bytes(), (keys / key).read_bytes()
    path = next_cas.cross(old, pem(ca.signer.certificate), directory / name)
    return replace(ca, table={**ca.table, "cross": str(path)})


def _desk(directory: Path, made: Mapping[str, NextCa], node: Node) -> Desk:
    """The new CAs at a desk, whose policy takes proofs by certificates of the old ones."""
    former = []
    for name in made:
        shutil.copy(node.pki_dir / AUTHORITIES[name].certificate_file, directory / f"{name}.old.crt")
        former.append(f'{name} = "{directory}/{name}.old.crt"')
    policy = POLICY.replace('"cp-*"', '"rc-*"').replace("[desk]\n", f"[desk]\nformer_cas = {{ {', '.join(former)} }}\n")
    return make_desk(directory / "desk", next_cas.as_pki(made, directory / "next-keys"), policy=policy)


def _bridge(
    node: Node,
    bao: OpenBao,
    keys: Path,
    directory: Path,
    made: Mapping[str, NextCa],
    desk: Desk | None,
    options: argparse.Namespace,
) -> LiveBridge:
    bridge = LiveBridge(
        pki=NodePki(root=node.root, external=True, keys=keys), directory=directory / "bridge", node=node
    )
    if desk is not None:
        bridge.add("backend.desk", {"type": "exchange", "outbox": str(desk.inbox), "inbox": str(desk.outbox)})
    for authority in AUTHORITIES if node.name not in (WORKER, OLDER_WORKER[0]) else [CA.name]:
        if options.older:
            add_openssl(bridge, authority)
            bridge.add(f"authority.{authority}.next", made[authority].table)
            continue
        anchor = {key: text for key, text in made[authority].table.items() if key != "dir"}
        if not options.adopt:
            add_vault(bridge, bao, authority, node.name)
        if desk is None:
            next_cas.add_vault(bridge, bao, authority, node.name, made[authority])
        else:
            bridge.add(f"authority.{authority}.next", {"backend": "desk", **anchor})
        if options.adopt:  # the settings name the company's CA alone
            table = {"backend": "desk"} if desk else {"backend": (m := f"{node.name}-{authority}-2"), "mount": m}
            bridge.tables.pop()
            bridge.add(f"authority.{authority}", table)
            bridge.add(f"authority.{authority}.next", anchor)
    bridge.add("restart", {"method": "static-pods", "components": "needed", "min_interval": "1s"})
    bridge.add("restart.commands", {"kubelet": bridge.kubelet_command()})
    bridge.add("cluster", {"lease": True})
    return bridge


# --- the commands ----------------------------------------------------------------------------------------------------


def taken(found: Site, turn: Turn, before: str) -> Step:
    """
    A verb on each node, one after the other, from one phase to the next.

    Raises:
        AssertionError: A node has not done it.
    """
    verb, phase, cas = turn
    step = Step(verb=verb, phase=phase, cas=cas, valid=valid((before, phase), cross=found.options.cross))
    begin, ended = time.monotonic(), found.clients.ended.copy()
    with watched([bridge.node for bridge in found.control_planes]) as step.seen:
        for bridge in found.bridges if not cas or CA.name in cas else found.control_planes:
            since = time.monotonic()
            _typed(found, bridge, step)
            step.seconds[bridge.node.name] = time.monotonic() - since
    step.ended = found.clients.ended - ended
    step.record = found.clients.record.between(begin, time.monotonic())
    print(f"{step.title}: {step.seconds}; streams that ended {dict(step.ended)}", flush=True)
    _report(step)
    return step


def _finished(found: Site, step: Step) -> None:
    """Wait as the page says, and look at each node (AssertionError: one is not in its phase)."""
    if (step.verb, step.phase) in (found.steps[0][:2], ("back", "issued")):  # both CAs where there was one
        _pods_have(found, 2)
    for bridge in found.bridges:
        _assert_whole(bridge, step, asks_kubeadm=bool(found.options.older) and bridge in found.control_planes)


def _typed(found: Site, bridge: LiveBridge, step: Step) -> None:
    """The command as an operator types it until it is done."""
    args = ["rotate-ca", *step.words]
    if found.options.adopt and step.verb == "issue":
        disk = bridge.directory / "disk"
        disk.mkdir(mode=0o700, exist_ok=True)
        args += ["--keys-to", str(disk)]
    if found.options.kill:
        if found.desk is not None and step.verb == "issue":
            _killed(bridge, args, step, 5)  # it asks
            _run(found, bridge, args)  # the rest; what is killed next installs
        _killed(bridge, args, step, _kill_within(found, bridge, step))
        if step.verb == "back" and _is_back(bridge, step):
            return  # one more would lead back by one more phase
    for _ in range(6):
        run = _run(found, bridge, args)
        if run.returncode == Exit.UNAVAILABLE:
            time.sleep(10)  # as its own words say: again, later
        elif run.returncode != Exit.WAITING:
            break
    if run.returncode != Exit.DONE:
        raise AssertionError(f"{bridge.node.name}: {step.verb}: {run.returncode}\n{run.stdout}{run.stderr}")


def _is_back(bridge: LiveBridge, step: Step) -> bool:
    """Whether `back` had come to its end: each CA is in its phase, and the program remembers no way that it is on."""
    is_on_its_way = Store(bridge.directory / "state").going_back.exists()
    return not is_on_its_way and set(_phases(bridge).values()) == {step.phase}


def _run(found: Site, bridge: LiveBridge, args: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Once; what waits for the desk's people is signed by them."""
    run = bridge.run(*args, timeout=_SECONDS)
    print(f"{bridge.node.name}: {' '.join(args)}: exit {run.returncode}\n{run.stdout}{run.stderr}", flush=True)
    if run.returncode == Exit.WAITING and found.desk is not None:
        signed = found.desk.run("sign", found.desk.inbox, "-o", found.desk.outbox)
        print(signed.stdout, signed.stderr, flush=True)
    return run


def _kill_within(found: Site, bridge: LiveBridge, step: Step) -> float:
    """About the seconds that a command takes; without a restart of etcd it is short."""
    if bridge.node.name == WORKER:
        return 4
    keeps_cas = (step.verb, step.phase) in (("issue", "issued"), ("back", "trusted")) and found.steps[0][0] != step.verb
    return 18 if keeps_cas else 65


def _killed(bridge: LiveBridge, args: Sequence[str], step: Step, within: float) -> None:
    """Begin it, and kill the program at a random moment; what it had started goes on, as with a service manager."""
    begin = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(bridge.run, *args, timeout=_SECONDS)
        at = random.uniform(0.5, within)  # noqa: S311 (no secret)
        while not running.done() and time.monotonic() < begin + at:
            time.sleep(0.05)
        seconds = time.monotonic() - begin
        for pid in _programs(bridge):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        is_over = 0 <= running.result().returncode <= Exit.LOCKED
    kill = Kill(node=bridge.node.name, seconds=seconds, is_over=is_over, phases=_phases(bridge))
    step.killed.append(kill)
    print(f"killed {kill}", flush=True)


def _phases(bridge: LiveBridge) -> dict[str, str]:
    """The phases of each CA, by the files."""
    status = json.loads(bridge.run("rotate-ca", "status", "-o", "json").stdout)
    return {
        one["name"]: " → ".join(filter(None, (one["phase"] or "unknown", one["halfDone"]))) for one in status["cas"]
    }


def _programs(bridge: LiveBridge) -> Iterator[int]:
    """The processes of this node's ca-bridge, by its settings file."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if str(bridge.config) in words and "rotate-ca" in words and "python" in words[0]:
                yield int(place.name)


def _assert_whole(bridge: LiveBridge, step: Step, *, asks_kubeadm: bool) -> None:
    found = _phases(bridge)
    if {phase for name, phase in found.items() if not step.cas or name in step.cas} not in ({step.phase}, set()):
        raise AssertionError(f"{bridge.node.name}: wanted {step.phase}, found {found}")
    proof = bridge.run("prove", "--wait", "120s")
    if proof.returncode != Exit.DONE:
        raise AssertionError(f"{bridge.node.name}: {step.phase}\n{proof.stdout}")
    if asks_kubeadm:
        bridge.node.exec("kubeadm", "certs", "check-expiration")
        bridge.node.exec("kubeadm", "init", "phase", "kubeconfig", "all")


def _pods_have(found: Site, number: int) -> None:
    """As the page says: wait until a pod's own file has the CAs, then start anew what reads it once."""
    control_planes, worker = [one.node for one in found.control_planes], found.bridges[-1].node
    begin = time.monotonic()
    root_ca = ("get", "configmap", "kube-root-ca.crt", "-o", "jsonpath={.data}")
    wait_for(
        "the CAs in the object that pods read",  # a pod's file may still be of the phase before the last
        lambda: control_planes[0].kubectl(*root_ca, check=False).stdout.count("BEGIN CERTIFICATE") == number,
        seconds=180,
    )
    wait_for("the CAs in a pod", lambda: clients.cas_in_pod(control_planes[0], worker) == number, seconds=400)
    found.pod_seconds.append(time.monotonic() - begin)
    clients.start_pod(control_planes, worker)


@contextmanager
def _started_before(node: Node) -> Iterator[Callable[[], str]]:
    """
    A program of this node's client-go that names the CA file, as one in a pod does, and has asked nothing before; the last
    words of what it is answered when asked.
    """
    directory = node_directory() / node.name
    conf, socket, log = (directory / f"once.{what}" for what in ("conf", "sock", "log"))
    shutil.copy(node.kubeconfig_dir / "admin.conf", conf)
    ca = ("--certificate-authority", "/etc/kubernetes/pki/ca.crt")
    node.exec("kubectl", "config", "--kubeconfig", conf, "set-cluster", "kubernetes", *ca)
    command = ("kubectl", "proxy", "--kubeconfig", conf, f"--unix-socket={socket}")
    node.exec("sh", "-c", f'setsid "$@" >>{log} 2>&1 </dev/null & echo $! >{log}.pid', "-", *command)
    wait_for("a program that has read its CA", socket.exists)

    def ask() -> str:
        run = subprocess.run(
            ["curl", "-sS", "--max-time", "20", "--unix-socket", socket, "http://localhost/version"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return run.stdout + run.stderr

    try:
        yield ask
    finally:
        node.exec("sh", "-c", f"kill $(cat {log}.pid)", check=False)
        socket.unlink(missing_ok=True)


# --- what was seen ---------------------------------------------------------------------------------------------------


def valid(phases: Collection[str], *, cross: bool) -> Sequence[str]:
    """The clients that nothing may refuse between two phases; a cross certificate leads those of the old CA to the new one."""
    if "new" in phases:
        return clients.VALID
    return (*clients.VALID_UNTIL_DROP, clients.AS_IT_WAS) if cross else clients.VALID_UNTIL_DROP


def _report(step: Step) -> None:
    record, servers = step.record, step.control_planes
    for name in (*clients.VALID_UNTIL_DROP, clients.AS_IT_WAS, clients.FOLLOW):
        print(f"  {name}: { {one.value: n for one, n in record.counts(name).items()} }", flush=True)
    for one in record.refused(*step.valid)[:10]:
        print(f"  REFUSED {one}", flush=True)
    gone, slow = record.dark(clients.PULSE, servers, but=[Answer.SLOW]), record.dark(clients.PULSE, servers)
    print(
        f"  no API server: {gone:.2f} s ({slow:.2f} s with slow ones); turns {step.seen.turns}, failed {step.seen.failed}; "
        f"etcd: most down {step.seen.most_down()}, without a leader {_longest(step.seen.leaderless):.1f} s, "
        f"slow {_longest(step.seen.slow):.1f} s",
        flush=True,
    )


def _longest(spans: Sequence[tuple[float, float, str]]) -> float:
    return max((end - begin for begin, end, _ in spans), default=0.0)


def table(steps: Sequence[Step]) -> str:
    """What took how long, and what clients saw, in Markdown."""
    head = (
        "command", "seconds per control-plane node", "seconds for the worker", "requests of valid clients", "refused", "too late",
        "403 from a starting API server", "seconds without any API server", "turns of a client of all API servers, failed",
        "etcd members down at once",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |\n", f"|{' --- |' * len(head)}\n"]
    for step in steps:
        of_control_planes = sorted(step.seconds[name] for name in step.control_planes)
        asked = [one for one in step.record.asked if one.client in step.valid]
        row = (
            step.title.replace("`", "`rotate-ca ", 1),
            " to ".join(dict.fromkeys(f"{one:.0f}" for one in (of_control_planes[0], of_control_planes[-1]))),
            "".join(f"{step.seconds[name]:.0f}" for name in step.workers),
            f"{len(asked):,}",
            str(len(step.record.refused(*step.valid))),
            str(sum(one.answer is Answer.SLOW for one in asked)),
            str(sum(one.answer is Answer.LOADING for one in asked)),
            f"{step.record.dark(clients.PULSE, step.control_planes, but=[Answer.SLOW]):.1f}",
            f"{step.seen.turns:,}, {len(step.seen.failed)}",
            str(step.seen.most_down()),
        )
        lines.append(f"| {' | '.join(row)} |\n")
    return "".join(lines)


def by_client(steps: Sequence[Step]) -> str:
    """What each client was answered in each phase, in Markdown."""
    head = ("client", *(step.title for step in steps))
    lines = [f"| {' | '.join(head)} |\n", f"|{' --- |' * len(head)}\n"]
    for name in (*clients.VALID_UNTIL_DROP, clients.AS_IT_WAS):
        cells = [_cell(step.record, name) for step in steps]
        lines.append(f"| {name} | {' | '.join(cells)} |\n")
    ended = [", ".join(f"{number} of {name}" for name, number in step.ended.items()) or "none" for step in steps]
    return "".join([*lines, f"| streams that ended | {' | '.join(ended)} |\n"])


def _cell(record: Record, name: str) -> str:
    counts = record.counts(name)
    return ", ".join(f"{counts[one]:,} {one.value}" for one in Answer if counts[one]) or "none"


def _strangers(found: Site) -> list[str]:
    """What old certificates are answered; AssertionError: one of them is still taken."""
    rows = []
    for bridge in found.control_planes:
        for name, reported in clients.strangers(bridge.node, found.before / bridge.node.name, found.new):
            rows.append(f"{bridge.node.name}: {name}: {reported}")
    print("\n".join(rows), flush=True)
    taken_still = [row for row in rows if not row.endswith(("401", "TLS alert"))]
    if taken_still:
        raise AssertionError(f"wanted 401 or a TLS alert for each old certificate, found {taken_still}")
    return rows


def measured(found: Site, keep: Callable[[str], None]) -> None:
    """
    All of it, as the document has it; `keep` gets what there is after each phase.

    Raises:
        AssertionError: Something is not as the page of the replacement says.
    """
    works: list[Callable[[], None]] = list(found.clients.threads())
    done, rows = list[Step](), list[str]()
    with ThreadPoolExecutor(len(works)) as pool, ExitStack() as stack:
        running = [pool.submit(work) for work in works]
        try:
            node, begin = found.control_planes[0].node, time.monotonic()
            ask = stack.enter_context(_started_before(node)) if found.options.older else None
            for turn in found.steps:
                step = taken(found, turn, done[-1].phase if done else "old")
                done.append(step)
                keep(seen(found, done, rows))
                _finished(found, step)
                if ask is not None and step.phase in ("issued", "new"):  # a file may be read again later
                    found.once, found.once_minutes = ask(), (time.monotonic() - begin) / 60
                if step.phase == "new":
                    rows += _strangers(found)
                    keep(seen(found, done, rows))
        finally:
            found.clients.stop.set()
    for one in running:
        one.result()
    refused = [one for step in done for one in step.record.refused(*step.valid)]
    assert not refused, refused[:5]
    if len(found.control_planes) > 1:
        assert not [one for step in done for one in step.seen.failed], [step.seen.failed for step in done]
    if found.options.older:
        assert "x509: certificate signed by unknown authority" in found.once, found.once
        assert found.once_minutes > _READ_AGAIN_MINUTES
    assert max(step.seen.most_down() for step in done) <= 1


def seen(found: Site, done: Sequence[Step], rows: Sequence[str]) -> str:
    """What was seen in the phases that are over, in Markdown."""
    text = f"{table(done)}\n{by_client(done)}\n{kills(done)}"
    if left := [f"`{verb}` to “{phase}”" for verb, phase, _ in found.steps[len(done) :]]:
        text += f"The run ended before these steps: {', '.join(left)}.\n"
    seconds = sum(sum(step.seconds.values()) for step in done)
    text += f"All commands together took {seconds / 60:.0f} minutes.\n"
    if found.pod_seconds:
        pods = ", ".join(f"{one:.0f} s" for one in found.pod_seconds)
        text += (
            f"A pod's CA file had both CAs {pods} after the last node completed the step that adds the second one.\n"
        )
    text += f"The aggregated API had {len(found.clients.extension.refused)} failed TLS handshakes with API servers.\n"
    if found.options.older:
        text += _of_an_older_one(found)
    if rows:
        text += (
            f"After `drop`, {len(rows)} attempts with old client certificates were all refused, with 401 or by TLS.\n"
        )
    return text


def _of_an_older_one(found: Site) -> str:
    """The rest that was asked of it."""
    node = found.control_planes[0].node
    versions = [node.exec(*command).stdout.split() for command in (("kubelet", "--version"), ("etcd", "--version"))]
    text = (
        f"The node ran Kubernetes {versions[0][-1]} and etcd {versions[1][2]}; its kubeadm accepted the node in each phase "
        "(`certs check-expiration`, `init phase kubeconfig all`).\n"
    )
    if found.once:
        text += (
            "A program with this version's client-go, started before `trust` with a kubeconfig that names the CA file, got this "
            f"error {found.once_minutes:.0f} minutes later: `{found.once.strip()}`.\n"
        )
    return text


def kills(steps: Sequence[Step]) -> str:
    """The phases in which commands were killed, in Markdown; empty: none was."""
    head = ("killed command", "node", "after, s", *AUTHORITIES, "completed when run again")
    lines = [f"| {' | '.join(head)} |\n", f"|{' --- |' * len(head)}\n"]
    every = [(step, one) for step in steps for one in step.killed]
    for step, one in every:
        what = f"{step.title}{', already ended' if one.is_over else ''}"
        row = (what, one.node, f"{one.seconds:.0f}", *(one.phases.get(name, "") for name in AUTHORITIES), "yes")
        lines.append(f"| {' | '.join(row)} |\n")
    return "".join([*lines, "\n"]) if every else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Replace, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.rotation")
    parser.add_argument("way", nargs="?", choices=["back"], help="go back from each phase, too")
    parser.add_argument("--through", choices=["bao", "desk"], default="bao", help="who has the new CAs")
    parser.add_argument("--adopt", action="store_true", help="the old CAs are kubeadm's, with their keys on the nodes")
    parser.add_argument("--cross", action="store_true", help="the old CAs certify the new ones, and `trust` is spared")
    parser.add_argument("--kill", action="store_true", help="kill each command at a random moment once")
    parser.add_argument("--older", choices=["1.34"], help="one control-plane node and a worker of this version")
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args(arguments)
    if options.older:
        if options.way or options.adopt or options.cross or options.kill or options.through != "bao":
            parser.error("--older has a way of its own, through `openssl ca`")
        os.environ["KUBE_BIN_DIR"] = f"{programs.directory()}-{options.older}"
        os.environ["KUBE_NODE_DIR"] = f"{node_directory()}-{options.older}"  # whose images are no other node's
        if text := programs.lacking(["kubeadm", "curl"]):
            parser.error(f"{text} --older {options.older}")
    words = [f"--older {options.older}" if options.older else ""]
    words += [f"--through {options.through}" if options.through != "bao" else "", options.way or ""]
    words += [f"--{name}" for name in ("adopt", "cross", "kill") if getattr(options, name)]
    command = " ".join(["python -m tests.measure.rotation", *filter(None, words), "--docs"])

    def keep(text: str) -> None:
        print(text, flush=True)
        if options.docs:
            write_between(DOCUMENT, f"<!-- numbers: written by `{command}` -->", text)

    with (
        tempfile.TemporaryDirectory() as directory,
        openbao.dev_server() as bao,
        site(Path(directory), bao, options) as found,
    ):
        measured(found, keep)


if __name__ == "__main__":
    main()
