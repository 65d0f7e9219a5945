"""
Three CAs at once are replaced on real machines: `python -m tests.measure.rotation`, or with `back` behind it.

Three control-plane nodes with stacked etcd and a worker, with CAs in an OpenBao server; `ca`, `etcd-ca` and
`front-proxy-ca` get successors in mounts of their own. Meanwhile a client writes and reads by whichever API server takes
it, and every member of etcd is asked every 0.2 s. With `back` each phase is gone back from once. Prints what took how
long, and what the client saw.
Takes root, the kit's programs, and about twenty minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from bridge.errors import Exit
from bridge.specs import AUTHORITIES
from tests.kit import next_cas, nodes, openbao
from tests.kit.cas import add_vault
from tests.kit.doors import door
from tests.kit.next_cas import NextCa
from tests.kit.node import AT_ONCE, Node
from tests.kit.nodes import LiveBridge, NodePki
from tests.kit.openbao import OpenBao
from tests.kit.watching import Seen, watched

CONTROL_PLANES = {"rc-cp1": "198.18.77.61", "rc-cp2": "198.18.77.62", "rc-cp3": "198.18.77.63"}
WORKER, WORKER_IP = "rc-w1", "198.18.77.64"
FORWARD = (("trust", "trusted"), ("issue", "issued"), ("drop", "new"))
THERE_AND_BACK = (
    *(("trust", "trusted"), ("back", "old"), ("trust", "trusted")),
    *(("issue", "issued"), ("back", "trusted"), ("issue", "issued")),
    *(("drop", "new"), ("back", "issued"), ("drop", "new")),
)


@dataclass(kw_only=True)
class Step:
    """One verb on all nodes."""

    verb: str
    phase: str
    seconds: dict[str, float] = field(default_factory=dict)  #: By node.
    seen: Seen = field(default_factory=Seen)


@contextmanager
def cluster(directory: Path, bao: OpenBao) -> Iterator[list[LiveBridge]]:
    """The nodes, each with its settings."""
    keys, port, made = directory / "ca-keys", urlsplit(bao.url).port, next_cas.make(directory / "next")
    if port is None:
        raise AssertionError("a server without a port")
    names, ips = list(CONTROL_PLANES), list(CONTROL_PLANES.values())
    with ExitStack() as stack:
        first = stack.enter_context(Node.up(names[0], ips[0], ca_dir=keys, kubelet=AT_ONCE))
        found = [first]
        for name, ip in zip(names[1:], ips[1:], strict=True):
            found.append(stack.enter_context(Node.join(name, ip, first, kubelet=AT_ONCE)))
        found.append(stack.enter_context(Node.worker(WORKER, WORKER_IP, first)))
        for node in found:
            if node.name != WORKER:
                nodes.make_ready(node)
            stack.enter_context(door(node, port))
        yield [_bridge(node, bao, keys, directory / node.name, made) for node in found]


def _bridge(node: Node, bao: OpenBao, keys: Path, directory: Path, made: Mapping[str, NextCa]) -> LiveBridge:
    bridge = LiveBridge(
        pki=NodePki(root=node.root, external=True, keys=keys), directory=directory / "bridge", node=node
    )
    for authority in AUTHORITIES if node.name != WORKER else ["ca"]:
        add_vault(bridge, bao, authority, node.name)
        next_cas.add_vault(bridge, bao, authority, node.name, made[authority])
    bridge.add("restart", {"method": "static-pods", "components": "needed", "min_interval": "1s"})
    bridge.add("restart.commands", {"kubelet": bridge.kubelet_command()})
    bridge.add("cluster", {"lease": True})
    return bridge


def taken(bridges: Sequence[LiveBridge], steps: Sequence[tuple[str, str]]) -> Iterator[Step]:
    """Each verb on each node, one after the other (AssertionError: a node is not in its phase)."""
    watch = [bridge.node for bridge in bridges if bridge.node.name != WORKER]
    for verb, phase in steps:
        step = Step(verb=verb, phase=phase)
        with watched(watch) as step.seen:
            for bridge in bridges:
                begin = time.monotonic()
                run = bridge.run("rotate-ca", verb, timeout=1500)
                step.seconds[bridge.node.name] = time.monotonic() - begin
                if run.returncode != Exit.DONE:
                    raise AssertionError(f"{bridge.node.name}: {verb}: {run.returncode}\n{run.stdout}{run.stderr}")
        for bridge in bridges:
            _assert_whole(bridge, phase)
        print(f"{verb}: {step.seconds}, {step.seen.turns} turns, failed {step.seen.failed}", flush=True)
        yield step


def _assert_whole(bridge: LiveBridge, phase: str) -> None:
    found = json.loads(bridge.run("rotate-ca", "status", "-o", "json").stdout)["cas"]
    if {one["phase"] for one in found} != {phase}:
        raise AssertionError(f"{bridge.node.name}: wanted {phase}, found {found}")
    proof = bridge.run("prove", "--wait", "120s")
    if proof.returncode != Exit.DONE:
        raise AssertionError(f"{bridge.node.name}: {phase}\n{proof.stdout}")


def table(steps: Sequence[Step]) -> str:
    """What took how long, in Markdown."""
    lines = [
        "| command | seconds a control-plane node | the worker | turns of the client | … on to another API server | … that no API server took | most members of etcd down at once |\n",
        "| --- | --- | --- | --- | --- | --- | --- |\n",
    ]
    for step in steps:
        of_control_planes = sorted(seconds for name, seconds in step.seconds.items() if name != WORKER)
        span = f"{of_control_planes[0]:.0f} to {of_control_planes[-1]:.0f}"
        seen = (step.seen.turns, step.seen.elsewhere, len(step.seen.failed), step.seen.most_down())
        row = (f"`rotate-ca {step.verb}`", span, f"{step.seconds[WORKER]:.0f}", *map(str, seen))
        lines.append(f"| {' | '.join(row)} |\n")
    whole = sum(itertools.chain.from_iterable(step.seconds.values() for step in steps))
    return "".join([*lines, f"\nAll of it took {whole / 60:.0f} minutes, without the waiting for pods and people.\n"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Replace and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.rotation")
    parser.add_argument("way", nargs="?", choices=["back"], help="go back from each phase once")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as directory,
        openbao.dev_server() as bao,
        cluster(Path(directory), bao) as bridges,
    ):
        done = list(taken(bridges, THERE_AND_BACK if options.way else FORWARD))
    print(table(done))


if __name__ == "__main__":
    main()
