"""
Restarts of a real control plane: what still runs on old certificates, all of it, and runs killed in the middle.

A client reads through the API every 0.1 s meanwhile; how long it went without an answer is printed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bridge import control_plane
from bridge.node import kubeconfig, manifests
from bridge.specs import Component
from tests.kit import looking, nodes
from tests.kit import node as kit
from tests.kit.looking import API_PORT, client, connection
from tests.kit.node import Node
from tests.kit.nodes import wait_for

pytestmark = [pytest.mark.node, pytest.mark.slow]

NAME, IP = f"restart-{os.getpid() % 100_000}", "198.18.77.70"
CONTROLLERS = (Component.CONTROLLER_MANAGER, Component.SCHEDULER)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A node, and ca-bridge in its network and with its files."""

    node: Node
    directory: Path

    def command(self, *args: str) -> list[str]:
        """To be run on this machine."""
        pid = (kit.directory() / self.node.name / "pid").read_text().strip()
        program = str(Path(sys.executable).with_name("ca-bridge"))
        config = str(self.directory / "config.toml")
        return ["nsenter", "--mount", "--net", f"--target={pid}", "--", program, *args, "--config", config]

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        """To its end."""
        environment = {**os.environ, "PATH": f"{os.environ.get('KUBE_BIN_DIR', '/opt/k8s')}:{os.environ['PATH']}"}
        return subprocess.run(
            self.command(*args), capture_output=True, text=True, check=False, timeout=900, env=environment
        )

    @property
    def journal(self) -> Path:
        """There while a manifest is out."""
        return self.directory / "state/restart.json"

    def files(self) -> dict[str, tuple[bytes, int, int]]:
        """The manifests: content, inode, mode; and whatever else is where they wait."""
        directory = self.node.kubeconfig_dir / "manifests"
        paths = [*directory.iterdir(), *self.node.kubeconfig_dir.glob(".*")]
        return {path.name: (path.read_bytes(), path.stat().st_ino, path.stat().st_mode) for path in paths}

    def wait_until_well(self) -> None:
        """Each component says so, from where ca-bridge sees it."""
        look = (
            "import sys; from pathlib import Path; from bridge import control_plane;"
            "from bridge.control_plane import probes; from bridge.node import inventory;"
            "k = Path('/etc/kubernetes'); n = inventory.read(k / 'pki', k);"
            "sys.exit(any(probes.trouble(c, n, k) for c in control_plane.ORDER))"
        )
        python = ("env", "-C", "/", sys.executable, "-c", look)
        wait_for("a healthy control plane", lambda: self.node.exec(*python, check=False).returncode == 0, seconds=330)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A node that is up."""
    directory = tmp_path_factory.mktemp("restart")
    with Node.up(NAME, IP, ca_dir=directory / "ca-keys") as node:
        (directory / "config.toml").write_text(
            f'[node]\nstate_dir = "{directory / "state"}"\nname = "{NAME}"\n'
            '[restart]\nmethod = "static-pods"\nmin_interval = "1s"\n[cluster]\nlease = false\n'
        )
        site = Site(node=node, directory=directory)
        site.wait_until_well()
        yield site


@dataclass(kw_only=True)
class Reader:
    """A client of the API, on a new connection each time."""

    asked: int = 0
    gaps: list[float] = field(default_factory=list)  #: Seconds from the first failure to the next answer.
    errors: list[str] = field(default_factory=list)


@contextlib.contextmanager
def reading(node: Node) -> Iterator[Reader]:
    """Reads every 0.1 s from a first answer on, while the block runs, and at the end until there is an answer."""
    seen, stop, context = Reader(), threading.Event(), client(node, "admin.conf")

    def answered() -> bool:
        with connection(node, API_PORT, context) as opened:
            try:
                return looking.ask_again(opened, "/api/v1/namespaces/default").status == http.client.OK
            except (OSError, http.client.HTTPException) as e:
                seen.errors.append(repr(e))
                return False

    def work() -> None:
        failed: float | None = None
        while not stop.wait(0.1) or failed is not None:
            seen.asked, begin = seen.asked + 1, time.monotonic()
            if not answered():
                failed = begin if failed is None else failed
            elif failed is not None:
                seen.gaps.append(time.monotonic() - failed)
                failed = None

    wait_for("a first answer", answered)  # on a busy machine a new API server has let the first one wait for 10 s
    seen.errors.clear()
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def restarted(run: subprocess.CompletedProcess[str]) -> dict[Component, float]:
    """What a run with `-o json` says."""
    assert run.returncode == 0, run.stderr
    return {Component(one["component"]): one["seconds"] for one in json.loads(run.stdout)["restarted"]}


def test_what_reads_its_file_once_is_restarted_and_no_client_notices(site: Site) -> None:
    """After a renewal of the two kubeconfigs: these two components, and no other; the manifests are the same files."""
    files, before = site.files(), nodes.containers(site.node)
    for name in ("controller-manager.conf", "scheduler.conf"):
        site.node.exec("cp", "-p", f"/etc/kubernetes/{name}", f"/etc/kubernetes/{name}.new")
        site.node.exec("mv", f"/etc/kubernetes/{name}.new", f"/etc/kubernetes/{name}")  # as an installation does it
        site.node.exec("touch", f"/etc/kubernetes/{name}")
    with reading(site.node) as seen:
        took = restarted(site.run("restart", *(c.value for c in CONTROLLERS), "-o", "json"))
    print(f"restarted: { {c.value: s for c, s in took.items()} }; {seen.asked} requests, without answer: {seen.gaps}")
    after = nodes.containers(site.node)
    assert tuple(took) == CONTROLLERS
    assert seen.asked > 3
    assert seen.gaps == [], seen.errors
    assert {component for component in before if before[component] != after[component]} == set(CONTROLLERS)
    assert site.files() == files


def killed_in_the_middle(site: Site, component: Component, manifest: Path) -> bool:
    """Whether its journal is left; a run whose manifest was out while this machine stalled has ended, and is none."""
    process = subprocess.Popen(
        site.command("restart", component.value), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while manifest.exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    return process.wait() == -signal.SIGKILL and site.journal.exists()


@pytest.mark.parametrize("component", [*CONTROLLERS, Component.ETCD, Component.APISERVER])
def test_a_run_killed_in_the_middle_leaves_nothing_away(site: Site, component: Component) -> None:
    """SIGKILL while the manifest is out; `recover` puts the same file back, and everything becomes healthy."""
    files = site.files()
    manifest = site.node.kubeconfig_dir / "manifests" / manifests.path_of(component, Path("/")).name
    wait_for(
        "a run that was killed while its manifest was out", lambda: killed_in_the_middle(site, component, manifest)
    )
    if not manifest.exists():  # etcd's may have come back just before
        recovered = site.run("recover")
        assert recovered.returncode == 0, recovered.stderr
        assert f"{component.value}: an interrupted restart" in recovered.stdout
    else:
        site.run("recover")
    assert site.files() == files
    assert not site.journal.exists()
    site.wait_until_well()  # a kubelet that had not seen yet that it was away has restarted nothing


def test_all_are_restarted_in_order_and_come_back(site: Site) -> None:
    """The documented four; how long the API was away is printed, and the kubelet waits for no etcd that it has stopped."""
    files, before, log = site.files(), nodes.containers(site.node), kit.directory() / NAME / "kubelet.log"
    logged = log.stat().st_size
    with reading(site.node) as seen:
        took = restarted(site.run("restart", "all", "-o", "json"))
    print(
        f"restarted: { {c.value: s for c, s in took.items()} }; without answer: {[round(gap, 1) for gap in seen.gaps]}"
    )
    assert tuple(took) == control_plane.ORDER[:4]
    after = nodes.containers(site.node)
    assert [component for component in before if before[component] == after[component]] == []
    hung = [
        line
        for line in log.read_bytes()[logged:].decode(errors="replace").splitlines()
        if "Failed deleting a mirror pod" in line and "Timeout" in line
    ]
    assert [line for line in hung if f"kube-system/etcd-{NAME}" in line] == []  # it would wait for half a minute
    assert site.files() == files
    site.wait_until_well()


KUBELET_RESTART = """\
here=$(readlink /proc/self/ns/net)
for comm in /proc/[0-9]*/comm; do
  process=${comm%/comm}
  [ "$(cat "$comm" 2>/dev/null)" = kubelet ] && [ "$(readlink "$process/ns/net")" = "$here" ] && break
done
tr '\\0' '\\n' <"$process/cmdline" >"$0.words"
mapfile -t words <"$0.words"
kill "${process#/proc/}"
while [ -e "$process/cmdline" ] && [ -n "$(tr -d '\\0' <"$process/cmdline")" ]; do sleep 0.1; done
setsid "${words[@]}" >>"$1" 2>&1 </dev/null &
"""


def test_a_kubelet_takes_its_certificate_from_its_kubeconfig_again(site: Site) -> None:
    """Its copy of another certificate is taken away first, and kept; the pods go on."""
    script, log = site.directory / "kubelet.sh", kit.directory() / NAME / "kubelet.log"
    script.write_text(KUBELET_RESTART)
    with (site.directory / "config.toml").open("a") as config:
        config.write(f'[restart.commands]\nkubelet = "bash {script} {log}"\n')
    scheduler = kubeconfig.parse((site.node.kubeconfig_dir / "scheduler.conf").read_bytes()).certificate_data or b""
    wanted = kubeconfig.parse((site.node.kubeconfig_dir / "kubelet.conf").read_bytes()).certificate_data or b""
    copy = site.node.root / "var/lib/kubelet/pki/kubelet-client-current.pem"
    other = copy.with_name("kubelet-client-2020-01-01-00-00-00.pem")
    other.write_bytes(scheduler)
    os.utime(other, (0, 0))  # it was there before kubelet.conf
    copy.unlink()
    copy.symlink_to(Path("/var/lib/kubelet/pki", other.name))
    before = nodes.containers(site.node)
    took = restarted(site.run("restart", "kubelet", "-o", "json"))
    print(f"restarted: { {c.value: s for c, s in took.items()} }")
    assert (site.directory / "state/kubelet-client-current.pem").read_bytes() == scheduler
    made = wait_for("the kubelet's new copy", lambda: copy.is_symlink() and copy.readlink().name)
    assert made != other.name
    assert wanted.strip() in (copy.parent / str(made)).read_bytes()
    assert nodes.containers(site.node) == before
    site.wait_until_well()
