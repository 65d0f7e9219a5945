"""A real node under a test: its PKI as seen from here, ca-bridge on it, its state, its restarts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from bridge.specs import Component
from tests.kit import node as kit
from tests.kit import programs
from tests.kit.cas import Bridge
from tests.kit.node import Node
from tests.kit.pki import Pki

#: Where these two say on the node's loopback that they are well, without authentication.
HEALTH = {
    Component.CONTROLLER_MANAGER: ("https://127.0.0.1:10257", "/healthz"),
    Component.SCHEDULER: ("https://127.0.0.1:10259", "/livez"),
}

_Found = TypeVar("_Found")


def wait_for(what: str, look: Callable[[], _Found | None], *, seconds: float = 180) -> _Found:
    """
    What `look` finds, as soon as that is true; as long as a look took, the next one waits, and at least 0.1 s.

    Raises:
        AssertionError: It found nothing in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        begin = time.monotonic()
        if found := look():
            return found
        now = time.monotonic()
        if now > deadline:
            raise AssertionError(f"wanted {what} within {seconds:.0f} s")
        time.sleep(max(0.1, now - begin))


# --- the node and ca-bridge on it ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePki(Pki):
    """A node's PKI, seen from this machine."""

    keys: Path  #: Where the CA keys went.

    @property
    def ca_dir(self) -> Path:
        """Where the CAs' certificates and keys are."""
        return self.keys


@dataclass(kw_only=True)
class NodeBridge(Bridge):
    """ca-bridge on the node, where every path is the usual one, so that its settings name none; the host is shared."""

    node: Node

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True)
        self.add("node", {"name": self.node.name, "state_dir": str(self.directory / "state")})

    def run(self, *args: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        """Run the installed program with the node's files and this machine's network, where the CAs are."""
        pid = (kit.directory() / self.node.name / "pid").read_text().strip()
        program = Path(sys.executable).with_name("ca-bridge")
        return subprocess.run(
            ["nsenter", "--mount", f"--target={pid}", "--", program, *args, "--config", self.config],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )


@dataclass(kw_only=True)
class LiveBridge(NodeBridge):
    """ca-bridge as cron runs it: wholly on the node, without a terminal."""

    def run(self, *args: str, timeout: float = 400, columns: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the installed program; with so many columns for its lines, unless that is 0."""
        program = Path(sys.executable).with_name("ca-bridge")
        environment = {"CRI_CONFIG_FILE": "/etc/kubernetes/crictl.yaml", "COLUMNS": str(columns)}
        return self.node.exec(
            program, *args, "--config", self.config, check=False, timeout_seconds=timeout, env=environment
        )

    def change(self, **values: str) -> None:
        """Other values for keys that are in the settings once."""
        lines = self.config.read_text().splitlines()
        for key, value in values.items():
            [number] = [i for i, line in enumerate(lines) if line.startswith(f"{key} = ")]
            lines[number] = f"{key} = {json.dumps(value)}"
        self.config.write_text("\n".join(lines) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """The record so far."""
        return [json.loads(line) for line in (self.directory / "state/audit.jsonl").read_text().splitlines()]

    def kubelet_command(self) -> str:
        """
        A command for `[restart.commands]`: what `systemctl restart kubelet` does, where there is no systemd.

        A node with the kit's stand-in of it (systemctl.sh) must use that: after a kill the stand-in starts a kubelet of
        its own, and of two kubelets the one that began first stays, which may be the one that read the old files.
        """
        if (self.node.root.parent / "bin/systemctl").exists():
            return "systemctl restart kubelet"
        script = self.directory / "restart-kubelet"
        log = self.node.root.parent / "kubelet.log"
        # Processes of all nodes of this machine are to be seen, so that its name is not enough; a child that the kubelet
        # is about to turn into another program looks like a second one, so that the oldest counts.
        script.write_text(
            f"#!/bin/sh\nset -eu\npid=$(pgrep -o -f '^kubelet .*--hostname-override={self.node.name} ')\n"
            f"tr '\\0' '\\n' </proc/$pid/cmdline >{self.directory}/kubelet.args\n"
            "kill $pid\nwhile kill -0 $pid 2>/dev/null; do sleep 0.1; done\n"
            f"xargs -d '\\n' -a {self.directory}/kubelet.args setsid >>{log} 2>&1 </dev/null &\n"
        )
        script.chmod(0o755)
        return str(script)


# --- its state -------------------------------------------------------------------------------------------------------


def make_ready(node: Node, plugin: Path | None = None) -> None:
    """
    Let the Node object become Ready.

    That takes a pod network, for which the mention of one is enough: static pods use the node's own.

    Args:
        node: The node.
        plugin: A network plug-in for other pods.
    """
    network = {"cniVersion": "1.0.0", "name": "none", "plugins": [{"type": plugin.name if plugin else "loopback"}]}
    directory = node.root / "etc/cni/net.d"
    directory.mkdir(parents=True, exist_ok=True)
    if plugin is not None:
        (node.root / "etc/cni/bin").mkdir(exist_ok=True)
        shutil.copy(plugin, node.root / "etc/cni/bin")
    (directory / "10-none.conflist").write_text(json.dumps(network))
    wait_for("a node that is Ready", lambda: is_ready(node))


def import_image(node: Node, archive: Path) -> None:
    """Into the container runtime of a node."""
    socket = kit.directory() / node.name / "run/containerd.sock"
    command = [str(programs.require("ctr")), "-a", str(socket), "-n", "k8s.io", "images", "import", str(archive)]
    subprocess.run(command, check=True, capture_output=True)


def assert_confined(node: Node, container: str) -> None:
    """The kernel says of a container's process: the image's user, no capability, no new privileges, filtered system calls."""
    found = node.crictl("ps", "--name", container, "--state", "running", "--quiet").stdout.split()
    template = ("inspect", "--output", "go-template", "--template", "{{.info.pid}}")
    status = Path(f"/proc/{node.crictl(*template, found[0]).stdout.strip()}/status").read_text()
    assert "Uid:\t65532\t65532" in status
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status


def is_ready(node: Node) -> bool:
    """Whether the cluster holds the kubelet for healthy."""
    path = '{.status.conditions[?(@.type=="Ready")].status}'
    return node.kubectl("get", "node", node.name, "-o", f"jsonpath={path}", check=False).stdout == "True"


def asked_by(node: Node, conf: Path) -> str:
    """What the API server says to the user of a kubeconfig, once it answers."""

    def said() -> str | None:
        done = node.exec("kubectl", "--kubeconfig", conf, "get", "--raw", "/readyz", check=False)
        return None if kit.answers_in_a_moment(done.stderr) else done.stdout or done.stderr

    return wait_for("an answer of the API server", said)


def is_healthy(node: Node, component: Component) -> bool:
    """The controller manager's or the scheduler's own word."""
    server, path = HEALTH[component]
    # Without any credentials kubectl asks for a name and a password, and neither of the two is looked at here.
    anonymous = ("--kubeconfig", "/dev/null", "--username", "none", "--password", "none")
    command = ("kubectl", *anonymous, "--server", server, "--insecure-skip-tls-verify", "get", "--raw", path)
    return node.exec(*command, check=False).stdout.strip() == "ok"


def containers(node: Node) -> dict[Component, str]:
    """
    The ids of the control plane's pods.

    A container that ends by itself, say without its lease where the machine stalls, is started again in the same one, and
    not always at once.
    """
    listed: dict[str, Any] = json.loads(node.crictl("pods", "--state", "ready", "-o", "json").stdout)
    known = {one.value: one for one in Component}
    labels = [(one["labels"].get("component"), one["id"]) for one in listed["items"]]
    return {known[label]: pod for label, pod in labels if label in known}


def lease_renewed(node: Node, namespace: str, name: str) -> datetime:
    """When the holder of a lease last renewed it."""
    path = "{.spec.renewTime}"
    return datetime.fromisoformat(node.kubectl("get", "lease", "-n", namespace, name, "-o", f"jsonpath={path}").stdout)


# --- its restarts ----------------------------------------------------------------------------------------------------


def restart_static_pod(node: Node, manifest: str, list_pods: Sequence[str]) -> datetime:
    """
    Restart a component as the program's message says.

    Args:
        node: The node.
        manifest: A path on the node.
        list_pods: The command that tells whether the pod is gone.

    Returns:
        When the manifest was back.
    """
    name, aside = Path(manifest).stem, f"/etc/kubernetes/{Path(manifest).name}"
    environment = {"CRI_CONFIG_FILE": "/etc/kubernetes/crictl.yaml"}
    node.exec("mv", manifest, aside)
    wait_for(f"no {name}", lambda: name not in node.exec(*list_pods, env=environment).stdout)
    time.sleep(3)
    back = datetime.now(UTC)
    node.exec("mv", aside, manifest)
    wait_for(f"{name} in good health", lambda: is_healthy(node, Component(name)))
    return back


def restart_kubelet(node: Node) -> datetime:
    """
    Do what `systemctl restart kubelet` does, where there is no systemd.

    Returns:
        When the old one was gone, and all that it had asked for was answered.
    """
    pid = wait_for("a kubelet", lambda: kubelet_pid(node))
    command = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
    node.exec("kill", str(pid))
    wait_for("the end of the kubelet", lambda: not kubelet_pid(node))
    time.sleep(1)  # until its last requests have arrived
    gone = datetime.now(UTC)
    log = kit.directory() / node.name / "kubelet.log"
    node.exec("sh", "-c", f'setsid "$@" >>{log} 2>&1 </dev/null &', "-", *command)
    return gone


def kubelet_pid(node: Node) -> int:
    """The kubelet that runs on the node; 0 if there is none."""
    found = subprocess.run(["ip", "netns", "pids", node.name], capture_output=True, text=True, check=True)
    for pid in found.stdout.split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # that one has ended meanwhile
            if Path(f"/proc/{pid}/comm").read_text() == "kubelet\n":
                return int(pid)
    return 0
