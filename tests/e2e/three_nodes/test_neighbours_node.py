"""
Three real control-plane nodes with three etcd members: no restart takes a second one down, and no two restart at once.

Restarts by three timers that fire at once are in `test_timers_node.py`. The rules in all their cases, and what no real server gives on demand, are in `tests/control_plane/test_neighbours.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import Exit
from bridge.specs import Component
from tests.kit import programs
from tests.kit.node import Node
from tests.kit.nodes import wait_for

pytestmark = [pytest.mark.node, pytest.mark.slow]

LEASE = "ca-bridge"
DURATION_SECONDS = 15
#: Of the clients that look: one that is away refuses at once, and one that a busy machine holds up is there.
_PATIENCE_SECONDS = 60.0

#: Runs on a node, where every path is the usual one; prints a line of JSON for each thing that happens.
PROGRAM = """
import json, os, subprocess, sys, time
from pathlib import Path
from bridge.control_plane import neighbours, turns
from bridge.node import inventory
from bridge.settings import load
from bridge.errors import BridgeError
from bridge.specs import Component

verb, rules, name, components = sys.argv[1], sys.argv[2], sys.argv[3], [Component(word) for word in sys.argv[4:]]
component = components[0]
text = f"[node]\\nname = '{name}'\\nstate_dir = '/nowhere'\\n[cluster]\\n{rules}\\n"
settings = load.parse(text)
node = inventory.read(settings.node.pki_dir, settings.node.kubeconfig_dir)

def tell(**what):
    print(json.dumps({**what, "name": name, "at": time.monotonic()}), flush=True)

def note(text):
    tell(event="note", text=text)

try:
    if verb == "look":
        found = neighbours.look(node, settings)
        tell(
            instances=[[one.component.value, one.name, one.own, one.state, one.reason] for one in found.instances],
            alarms=found.alarms,
            unseen=list(found.unseen.values()),
            quorum=found.quorum_without_own,
        )
    elif verb == "may":
        for component in components:
            neighbours.assert_may_restart(component, node, settings, note=note)
    else:
        with turns.turn(node, settings, f"run-{os.getpid()}", note=note):
            tell(event="begin")
            time.sleep(float(verb))
            tell(event="end")
except BridgeError as e:
    tell(event="error", text=str(e))
    sys.exit(e.exit_code)
"""


def command(node: Node, verb: str, *components: Component, rules: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, verb, rules, node.name, *(one.value for one in components or Component)]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run of the program on a node reported."""

    code: int
    events: list[dict[str, Any]]

    @property
    def texts(self) -> str:
        """Notes and errors."""
        return "\n".join(event["text"] for event in self.events if "text" in event)


def run(node: Node, verb: str, *components: Component, rules: str = "") -> Run:
    done = node.exec(*command(node, verb, *components, rules=rules), check=False, timeout_seconds=600)
    assert "Traceback" not in done.stderr, done.stderr
    return Run(code=done.returncode, events=lines(done.stdout))


def assert_may(node: Node, *components: Component, rules: str, is_silent: bool = False) -> None:
    """It may, without a note if that is wanted; where the machine stalls, an instance that is well may miss a look."""

    def may() -> bool:
        found = run(node, "may", *components, rules=rules)
        return found.code == Exit.DONE and not (is_silent and found.events)

    wait_for("no obstacle", may)


def refused(node: Node, component: Component, *words: str) -> Run:
    """Why it may not, once these instances are seen down, and no other."""

    def said() -> Run | None:
        found = run(node, "may", component, rules=REFUSE)
        return found if all(one in found.texts for one in words) else None

    found = wait_for(f"a refusal with {words}", said)
    assert found.code == Exit.UNAVAILABLE
    return found


def look(node: Node) -> dict[str, Any]:
    [found] = run(node, "look").events
    return found


def whole_look(node: Node) -> dict[str, Any]:
    """One that missed no instance."""

    def whole() -> dict[str, Any] | None:
        found = look(node)
        return found if found["quorum"] and not found["unseen"] else None

    return wait_for("a look at all", whole)


def states(node: Node) -> dict[tuple[str, str], str]:
    return {(component, name): state for component, name, _, state, _ in look(node)["instances"]}


REFUSE = "neighbours = 'refuse'"
#: Of a run that dies: others wait so long for it.
SHORT = f"lease_duration = '{DURATION_SECONDS}s'"


@pytest.fixture(autouse=True)
def healthy(nodes: list[Node]) -> None:
    """Before each test all is well."""
    wait_for("three nodes that are well", lambda: all_are_well(nodes))


def all_are_well(nodes: Sequence[Node]) -> bool:
    found = look(nodes[0])["instances"]
    return len(found) == 2 * len(nodes) and all(state == "healthy" for _, _, _, state, _ in found)


@contextlib.contextmanager
def without(node: Node, component: Component) -> Iterator[None]:
    """While a component is down, though its manifest is in place: its image is nowhere to be had."""
    manifest = node.kubeconfig_dir / "manifests" / f"{component.value}.yaml"
    original = manifest.read_bytes()
    replace(manifest, original.replace(b" image: ", b" image: none.invalid/"))
    try:
        running = ("ps", "-q", "--state", "running", "--name", f"^{component.value}$")
        wait_for(f"the end of {component.value}", lambda: not node.crictl(*running).stdout)
        yield
    finally:
        replace(manifest, original)


def replace(path: Path, data: bytes) -> None:
    """In one step, or the kubelet reads half of it; and from outside, since it reads all that is beside it."""
    fresh = path.parent.parent / f"{path.name}.new"
    fresh.write_bytes(data)
    fresh.rename(path)


# --- looking ---------------------------------------------------------------------------------------------------------


def test_each_node_sees_all_others(nodes: list[Node]) -> None:
    """Six instances from everywhere, in a moment, and every component may be restarted."""
    for own in nodes:
        found = whole_look(own)
        assert sorted((component, name, is_own) for component, name, is_own, _, _ in found["instances"]) == sorted(
            (component, node.name, node is own) for component in ("etcd", "kube-apiserver") for node in nodes
        )
        assert found["alarms"] == []
        assert_may(own, rules=REFUSE, is_silent=True)


def test_refuses_while_another_nodes_etcd_is_down(nodes: list[Node]) -> None:
    """Both that are left refuse, with the reason; the one that is down may be repaired; a wait ends when it is back."""
    first, second, third = nodes
    with without(second, Component.ETCD):
        for own in (first, third):
            for component in (Component.ETCD, Component.SCHEDULER):
                # its API server has no other etcd
                said = refused(own, component, f"etcd of {second.name}", f"kube-apiserver of {second.name}")
                assert ("without its quorum" in said.texts) is (component is Component.ETCD)
            assert run(own, "may", Component.KUBELET, rules=REFUSE).code == Exit.DONE
        assert run(first, "may", rules="neighbours = 'ignore'").code == Exit.DONE
        assert_may(second, Component.ETCD, rules=REFUSE)
        wanted = {("etcd", second.name): "unhealthy", ("etcd", first.name): "healthy"}
        wait_for("both as they are", lambda: wanted.items() <= states(second).items())
        stack = contextlib.ExitStack()
        waiting = stack.enter_context(started(first, "may", "neighbour_wait = '15m'"))
        assert "waiting up to 15m for" in first_line(waiting)["text"]
    with stack:
        waiting.communicate(timeout=900)
    assert waiting.returncode == Exit.DONE
    wait_for("three nodes that are well", lambda: all_are_well(nodes))


@pytest.mark.parametrize("number", [0, 2], ids=["that admin.conf leads to", "that joined"])
def test_a_node_whose_api_server_is_down_may_be_repaired(nodes: list[Node], number: int) -> None:
    """It sees the others by their own servers, takes the lease there, and is no obstacle to itself; to others it is."""
    own, other = nodes[number], nodes[1]
    with without(own, Component.APISERVER):

        def is_alone() -> bool:
            seen = states(own)
            others = [state for (_, name), state in seen.items() if name != own.name]
            return (seen["kube-apiserver", own.name], others) == ("unhealthy", ["healthy"] * 4)

        wait_for("the others", is_alone)
        assert_may(own, Component.APISERVER, rules=REFUSE, is_silent=True)

        def has_the_lease() -> bool:
            turn = run(own, "0")
            assert turn.code == Exit.DONE
            return [event["event"] for event in turn.events] == ["begin", "end"]  # and no note that it goes without

        wait_for("a turn with the lease", has_the_lease)
        refused(other, Component.APISERVER, f"kube-apiserver of {own.name}")


# --- the lease -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(node: Node, verb: str, rules: str = "") -> Iterator[subprocess.Popen[str]]:
    script = programs.KIT / "node.sh"
    words = [str(script), "exec", node.name, *command(node, verb, Component.ETCD, rules=rules)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.killpg(process.pid, signal.SIGKILL)


def first_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def wait_for_turn(process: subprocess.Popen[str]) -> None:
    """Until it has the lease; the one of the test before may have been killed with it."""
    while (event := first_line(process))["event"] != "begin":
        assert event["event"] == "note"


def lease_spec(node: Node) -> dict[str, Any]:
    """By the node's own API server."""
    server = ("--server", f"https://{node.ip}:6443")
    found: dict[str, Any] = json.loads(
        node.kubectl(*server, "get", "lease", "-n", "kube-system", LEASE, "-o", "json").stdout
    )["spec"]
    return found


def test_the_lease_is_kept_while_the_own_api_server_is_away(nodes: list[Node]) -> None:
    """The server is away for longer than the lease lasts; no other node gets the lease, and each reads who has it."""
    first, second, _ = nodes
    with started(first, "3600", SHORT) as held:
        wait_for_turn(held)
        assert lease_spec(second)["holderIdentity"].startswith(f"{first.name}_{first.ip}:6443_run-")
        with without(first, Component.APISERVER):
            time.sleep(DURATION_SECONDS * 1.5)
            turned_away = run(second, "0", rules="lease_wait = '1s'")
            assert turned_away.code == Exit.UNAVAILABLE
            assert f"{first.name}_{first.ip}:6443_run-" in turned_away.texts
            before = lease_spec(second)["renewTime"]
            wait_for("a lease that is renewed", lambda: lease_spec(second)["renewTime"] != before)
        assert held.poll() is None


def test_the_lease_of_a_run_that_was_killed_is_taken_when_it_has_expired(nodes: list[Node]) -> None:
    """Only one node takes it, and not before it has expired."""
    first, second, third = nodes
    with started(first, "3600", SHORT) as killed:
        wait_for_turn(killed)
    renewed = datetime.fromisoformat(lease_spec(second)["renewTime"])
    since = time.monotonic() - (datetime.now(UTC) - renewed).total_seconds()
    with started(second, "0") as one, started(third, "0") as another:
        reported = [lines(process.communicate(timeout=900)[0]) for process in (one, another)]
    begins = sorted(event["at"] for events in reported for event in events if event["event"] == "begin")
    assert len(begins) == 2
    assert begins[0] - since > DURATION_SECONDS - 1
    assert_one_after_the_other(reported)
    assert lease_spec(first)["holderIdentity"] == ""


def assert_one_after_the_other(reported: Sequence[Sequence[dict[str, Any]]]) -> None:
    turns = sorted((event["at"], event["event"]) for events in reported for event in events if event["event"] != "note")
    assert [what for _, what in turns] == ["begin", "end"] * len(reported), reported
