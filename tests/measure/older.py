"""
A renewal on a real node of an older Kubernetes: no client misses the API, also when the old certificates have expired.

`python -m tests.measure.older 1.34 [--minutes N] [--docs]` starts a node with the programs that
`tests/kit/binaries.sh --older 1.34` builds, whose certificates live ten minutes, renews all of them through OpenBao
with `components = "needed"` while a client writes and reads, waits for the end of the old ones, and looks again.
It prints what was seen; with `--docs` also into docs/evidence/versions.md, whose figures come from nowhere else.
Needs root, and the Python of `.cache/venv-test`, which `scripts/test` made.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from bridge.specs import AUTHORITIES, Component
from tests.kit import nodes, openbao, programs
from tests.kit.cas import add_vault, live_certificates
from tests.kit.doors import door
from tests.kit.looking import Traffic, traffic
from tests.kit.node import Node
from tests.kit.nodes import LiveBridge, NodePki, wait_for
from tests.kit.pki import PKI_SPECS
from tests.measure.__main__ import write_between

DOCUMENT = Path(__file__).parents[2] / "docs/evidence/versions.md"
NAME, IP = f"older-{os.getpid() % 100_000}", "198.18.77.150"
#: Read their certificates again by themselves.
RELOADING = (Component.ETCD, Component.APISERVER)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One walk."""

    lifetime: int  #: Of the old certificates, in minutes.
    renewed: int
    proven: int
    restarted: list[str]
    during: Traffic  #: While all was renewed.
    after: Traffic  #: When the old certificates had expired.

    def table(self) -> str:
        """For the document; all that is in it was asserted or counted."""
        rows = (
            ("kubeadm, kubelet and the control plane", _version("kubeadm", "version", "-o", "short")),
            ("etcd", _version("etcd", "--version")),
            ("container runtime", _version("containerd", "--version")),
            ("lifetime of the old certificates", f"{self.lifetime} minutes"),
            ("certificates renewed through OpenBao", self.renewed),
            ("restarted", "; ".join(self.restarted)),
            ("containers of API server and etcd", "the same before and after"),
            ("checks of the proof that passed", self.proven),
            ("turns of the client (one write, one read) during the renewal", self.during.turns),
            ("… that failed", len(self.during.errors)),
            ("turns of the client after the old certificates expired", self.after.turns),
            ("… that failed", len(self.after.errors)),
            ("a kubelet started after they expired", "the same API server process reads its logs"),
            ("an etcd started after they expired", "the same API server process writes to it"),
        )
        return "".join(["| measured | result |\n| --- | --- |\n", *(f"| {what} | {seen} |\n" for what, seen in rows)])


def _version(program: str, *args: str) -> str:
    said = subprocess.run([programs.require(program), *args], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+\.\d+\.\d+", said)
    assert found is not None, said
    return found[0]


@contextmanager
def _site(directory: Path, lifetime: int) -> Iterator[LiveBridge]:
    """A node in external-CA mode with OpenBao for its CA, and the settings of a cron job."""
    keys = directory / "ca-keys"
    short = f"certificateValidityPeriod: {lifetime}m"
    with openbao.dev_server() as bao, Node.up(NAME, IP, ca_dir=keys, cluster=short) as node:
        nodes.make_ready(node)
        bridge = LiveBridge(
            pki=NodePki(root=node.root, external=True, keys=keys), directory=directory / "bridge", node=node
        )
        for authority in AUTHORITIES:
            add_vault(bridge, bao, authority, NAME)
        bridge.add("restart", {"method": "static-pods", "components": "needed", "min_interval": "1s"})
        bridge.add("restart.commands", {"kubelet": bridge.kubelet_command()})
        port = urlsplit(bao.url).port
        assert port is not None
        with door(node, port):
            yield bridge


def walk(directory: Path, lifetime: int) -> Seen:
    """
    Renew, wait, look again.

    Raises:
        AssertionError: Something was missed by the client, restarted without need, or is on an old certificate.
    """
    with _site(directory, lifetime) as bridge:
        old, before = live_certificates(bridge.pki), nodes.containers(bridge.node)
        assert set(old) == set(PKI_SPECS)
        with traffic(bridge.node) as during:
            run = bridge.run("renew", *PKI_SPECS, "-o", "json")
        print(run.stdout, run.stderr)
        assert run.returncode == 0
        end = max(one.not_valid_after_utc for one in old.values())
        assert datetime.now(UTC) < end, "the old certificates ended meanwhile: wanted more --minutes"
        result, new = json.loads(run.stdout), live_certificates(bridge.pki)
        assert [name for name in PKI_SPECS if new[name] == old[name]] == []
        assert during.errors == []
        assert during.turns > 0
        _assert_untouched(bridge, before)
        time.sleep(max(0.0, (end - datetime.now(UTC)).total_seconds() + 2))
        after = _after(bridge, before)
    return Seen(
        lifetime=lifetime,
        renewed=len(new),
        proven=result["proven"],
        restarted=result["restarted"],
        during=during,
        after=after,
    )


def _assert_untouched(bridge: LiveBridge, before: dict[Component, str], *components: Component) -> None:
    now = nodes.containers(bridge.node)
    assert [one for one in components or RELOADING if now[one] != before[one]] == []


def _after(bridge: LiveBridge, before: dict[Component, str]) -> Traffic:
    """The old certificates have expired: every component serves, and every new connection sees, only the new ones."""
    node = bridge.node
    with traffic(node) as seen:
        nodes.restart_kubelet(node)
        logs = ("logs", "-n", "kube-system", f"kube-apiserver-{node.name}", "--tail", "1")
        wait_for("logs through the API server", lambda: node.kubectl(*logs, check=False).returncode == 0, seconds=90)
        proof = bridge.run("prove", "--wait", "60s")
        print(proof.stdout, proof.stderr)
        assert proof.returncode == 0
    assert seen.errors == []
    assert seen.turns > 0
    _assert_untouched(bridge, before)
    restart = bridge.run("restart", "etcd")
    assert restart.returncode == 0, restart.stderr
    assert nodes.containers(node)[Component.ETCD] != before[Component.ETCD]
    write = ("create", "configmap", "after-etcd")
    wait_for("a write after etcd is back", lambda: node.kubectl(*write, check=False).returncode == 0, seconds=60)
    _assert_untouched(bridge, before, Component.APISERVER)
    return seen


def main() -> None:
    """Walk, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.older")
    parser.add_argument("version", choices=["1.34"])
    parser.add_argument("--minutes", type=int, default=10, help="lifetime of the certificates that expire meanwhile")
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    os.environ["KUBE_BIN_DIR"] = f"{programs.directory()}-{options.version}"
    if programs.lacking(["kubeadm"]) or not _version("kubeadm", "version", "-o", "short").startswith(options.version):
        parser.error(f"wanted Kubernetes {options.version}: run {programs.COMMAND} --older {options.version}")
    with tempfile.TemporaryDirectory() as directory:
        text = walk(Path(directory), options.minutes).table()
    print(text)
    if options.docs:
        start = f"<!-- numbers: written by `python -m tests.measure.older {options.version} --docs` -->"
        write_between(DOCUMENT, start, text)


if __name__ == "__main__":
    main()
