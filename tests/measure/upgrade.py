"""
A real upgrade from Kubernetes 1.36 to 1.37 on a node whose CA keys are elsewhere, and what `doctor` had said of it.

`python -m tests.measure.upgrade [--docs]` starts a node with the programs that `tests/kit/binaries.sh --older 1.36` builds.
A certificate expires, `doctor --before-upgrade` says where kubeadm will abort, and the real `kubeadm upgrade apply` of
1.37 does so; renewed by ca-bridge, it goes through, and the new programs run on what ca-bridge renews after that.
It prints what was seen; with `--docs` also into docs/evidence/upgrade.md, whose figures come from nowhere else.
Images come from the kit; CoreDNS and kube-proxy do not run, and there is no pod network.
Needs root, and the Python of `.cache/venv-test`, which `scripts/test` made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bridge.node import inventory
from bridge.node.kubeconfig import parse as parse_kubeconfig
from bridge.specs import AUTHORITIES, SPECS, Component
from tests.kit import node as kit
from tests.kit import nodes, programs
from tests.kit.cas import add_openssl, live_certificates
from tests.kit.issuing import Signer, signed_again
from tests.kit.node import Node
from tests.kit.nodes import LiveBridge, NodePki, wait_for
from tests.measure.__main__ import write_between

DOCUMENT = Path(__file__).parents[2] / "docs/evidence/upgrade.md"
START = "<!-- numbers: written by `python -m tests.measure.upgrade --docs` -->"
FROM, TO = "1.36", "v1.37.2"
NAME, IP = f"up-{os.getpid() % 100_000}", "198.18.77.160"
EXPIRED = "front-proxy-client"
APPROVE = ("kubeadm:node-autoapprove-bootstrap", "kubeadm:node-autoapprove-certificate-rotation")


@dataclass(kw_only=True)
class Seen:
    """One walk, as rows of a table."""

    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, what: str, seen: object) -> None:
        """A row; and on standard output, so that a walk that ends early has said something."""
        self.rows.append((what, str(seen).replace("|", "/")))
        print(f"{what}: {seen}", flush=True)

    def table(self) -> str:
        """For the document."""
        lines = [f"| {what} | {seen} |\n" for what, seen in self.rows]
        return "".join(["| step | result |\n| --- | --- |\n", *lines])


@contextmanager
def _site(directory: Path, old: Path, new: Path) -> Iterator[LiveBridge]:
    """A node of the older version in external-CA mode, with `openssl ca` directories for its CAs."""
    os.environ["KUBE_BIN_DIR"] = str(new)
    with Node.host(f"{NAME}i", "198.18.77.161"):  # makes the newer version's images
        pass
    os.environ["KUBE_BIN_DIR"] = str(old)
    keys = directory / "ca-keys"
    with Node.up(NAME, IP, ca_dir=keys) as node:
        nodes.make_ready(node)
        pki = NodePki(root=node.root, external=True, keys=keys)
        bridge = LiveBridge(pki=pki, directory=directory / "bridge", node=node)
        for authority in AUTHORITIES:
            add_openssl(bridge, authority)
        bridge.add("restart", {"method": "static-pods", "components": "needed", "min_interval": "1s"})
        bridge.add("restart.commands", {"kubelet": bridge.kubelet_command()})
        os.environ["KUBE_BIN_DIR"] = str(new)
        import_images(node)
        yield bridge


def import_images(node: Node) -> None:
    """
    What kubelet would pull from a registry.

    kubeadm pulls CoreDNS and kube-proxy, too, and tries for minutes where there is no registry: nothing runs these here,
    so that their names on another image will do.
    """
    ctr = ("ctr", "-a", kit.directory() / node.name / "run/containerd.sock", "-n", "k8s.io", "images")
    for archive in sorted(kit.directory().glob(f"images-{TO}-*/*.tar")):
        node.exec(*ctr, "import", archive)
    there = node.exec(*ctr, "ls", "-q").stdout.split()
    pause = next(reference for reference in there if "/pause:" in reference)
    for reference in node.exec("kubeadm", "config", "images", "list", "--kubernetes-version", TO).stdout.split():
        if reference not in there:
            node.exec(*ctr, "tag", pause, reference)


def digests_of(node: Node) -> dict[str, str]:
    """The digests of every certificate, key and kubeconfig."""
    files = [*node.pki_dir.rglob("*"), *node.kubeconfig_dir.glob("*.conf")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files) if path.is_file()}


def versions_of(node: Node) -> dict[str, str]:
    """The images' tags in the manifests."""
    found = {}
    for component in (Component.ETCD, Component.APISERVER, Component.CONTROLLER_MANAGER, Component.SCHEDULER):
        text = (node.kubeconfig_dir / f"manifests/{component.value}.yaml").read_text()
        found[component.value] = re.search(r"image: .*:(\S+)", text)[1]  # type: ignore[index]
    return found


def _upgrade(node: Node, *options: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """`kubeadm upgrade apply` of the newer version; preflight looks for what a real machine has beside this one."""
    begin = time.monotonic()
    command = ("kubeadm", "upgrade", "apply", TO, "--yes", "--ignore-preflight-errors=all", *options)
    run = node.exec(*command, check=False, timeout_seconds=900)
    print(run.stdout[-6000:], run.stderr[-3000:], flush=True)
    return run, time.monotonic() - begin


def _doctor(bridge: LiveBridge) -> tuple[int, dict[str, list[str]], str]:
    return findings_of(bridge.run("doctor", "--before-upgrade", "-o", "json"))


def findings_of(run: subprocess.CompletedProcess[str]) -> tuple[int, dict[str, list[str]], str]:
    """The findings of `doctor -o json`: the exit code, errors and warnings, and all texts."""
    reported = json.loads(run.stdout)
    wrong: dict[str, list[str]] = {}
    for one in reported["findings"]:
        if one["level"] != "ok":
            wrong.setdefault(one["check"], []).extend(one["about"])
    return run.returncode, wrong, " ".join(one["text"] for one in reported["findings"])


def _expire(bridge: LiveBridge, name: str) -> None:
    """A certificate of the right CA for the same key, which has ended."""
    path = bridge.pki.pki_dir / f"{SPECS[name].base}.crt"
    old = live_certificates(bridge.pki)[name]
    signer = Signer.load(*bridge.pki.ca_pem(SPECS[name].authority.name))
    path.write_bytes(signed_again(old, signer, end=datetime.now(UTC) - timedelta(minutes=5)))


def words_of(run: subprocess.CompletedProcess[str]) -> str:
    """The cause, without what kubeadm says around it."""
    said = re.sub(r"\s+", " ", run.stderr)
    said = said.partition(" To see the stack trace")[0]
    found = re.search(r"failed to renew certificates[^\]]*?current time", said) or re.search(r"error: .{0,300}", said)
    return found[0].removesuffix(": current time") if found else said[-300:]


def walk(directory: Path, old: Path, new: Path) -> Seen:
    """
    Expire, read the warning, abort, renew, upgrade, renew again.

    Raises:
        AssertionError: The program had said something else than what happened.
    """
    seen = Seen()
    with _site(directory, old, new) as bridge:
        node = bridge.node
        seen.add("versions before the upgrade", ", ".join(f"{name} {tag}" for name, tag in versions_of(node).items()))
        code, wrong, _ = _doctor(bridge)
        seen.add("`doctor --before-upgrade` on the healthy node", f"exit {code}, {shown(wrong)}")
        assert not any(check == "upgrade-aborts" for check in wrong)
        node.kubectl("delete", "clusterrolebinding", *APPROVE)
        _local_edit(node)
        _expire(bridge, EXPIRED)
        code, wrong, text = _doctor(bridge)
        seen.add(
            f"the same with {EXPIRED} expired, the auto-approve bindings deleted, and a local edit of the kubelet's config.yaml",
            f"exit {code}, {shown(wrong)}",
        )
        assert wrong["upgrade-aborts"] == [EXPIRED]
        assert "the manifest of etcd is exchanged already" in text
        assert {"upgrade-auto-approve", "upgrade-kubelet-config"} <= set(wrong)
        _aborted(seen, bridge)
        _renewed(seen, bridge, EXPIRED)
        before = digests_of(node)
        run, seconds = _upgrade(node)
        seen.add("`kubeadm upgrade apply` after that", f"exit {run.returncode}, {seconds:.0f} s")
        assert run.returncode == 0, run.stderr
        external = len(re.findall(r"External CA detected", run.stdout))
        seen.add("… certificates for which it prints `External CA detected, … can't be renewed`", external)
        _afterwards(seen, bridge, before)
    return seen


def shown(wrong: dict[str, list[str]]) -> str:
    """What is wrong, on one line."""
    return "; ".join(f"{check}: {', '.join(about)}" for check, about in sorted(wrong.items())) or "nothing is wrong"


def _local_edit(node: Node) -> None:
    path = node.root / "var/lib/kubelet/config.yaml"
    path.write_text(path.read_text() + "maxPods: 77\n")


def _aborted(seen: Seen, bridge: LiveBridge) -> None:
    """Make the upgrade that `doctor` said would abort."""
    node = bridge.node
    before, files = versions_of(node), digests_of(node)
    run, seconds = _upgrade(node)
    seen.add("then `kubeadm upgrade apply`", f"exit {run.returncode} after {seconds:.0f} s: `{words_of(run)}`")
    assert run.returncode == 1
    after = versions_of(node)
    exchanged = [name for name in after if after[name] != before[name]]
    seen.add("… manifests that it had replaced by then", ", ".join(exchanged) or "none")
    assert exchanged == ["etcd"], exchanged
    changed = [path for path, digest in digests_of(node).items() if files.get(path) != digest]
    seen.add("… certificates, keys and kubeconfigs that changed", len(changed))
    wait_for(
        "an API server that answers",
        lambda: node.kubectl("get", "--raw", "/readyz", check=False).stdout == "ok",
        seconds=180,
    )


def _renewed(seen: Seen, bridge: LiveBridge, *names: str) -> None:
    run = bridge.run("renew", *names)
    print(run.stdout, run.stderr, flush=True)
    seen.add(f"`ca-bridge renew {' '.join(names) if len(names) < 3 else 'all'}`", f"exit {run.returncode}")
    assert run.returncode == 0, run.stderr
    code, wrong, _ = _doctor(bridge)
    assert "upgrade-aborts" not in wrong, (code, wrong)


def _afterwards(seen: Seen, bridge: LiveBridge, before: dict[str, str]) -> None:
    node = bridge.node
    seen.add("versions after the upgrade", ", ".join(f"{name} {tag}" for name, tag in versions_of(node).items()))
    changed = sorted(Path(path).name for path, digest in digests_of(node).items() if before.get(path) != digest)
    seen.add("… certificates, keys and kubeconfigs that changed", ", ".join(changed) or "none")
    server = parse_kubeconfig((node.kubeconfig_dir / "kubelet.conf").read_bytes()).server
    seen.add("… API server in kubelet.conf", server.replace(IP, "the node's own address"))
    edited = "maxPods: 77" in (node.root / "var/lib/kubelet/config.yaml").read_text()
    seen.add("… local edit of the kubelet's config.yaml", "kept" if edited else "lost")
    bindings = [
        name for name in APPROVE if node.kubectl("get", "clusterrolebinding", name, check=False).returncode == 0
    ]
    seen.add("… auto-approve bindings that kubeadm created again", f"{len(bindings)} of {len(APPROVE)}")
    assert (edited, len(bindings)) == (False, len(APPROVE))
    bound = node.kubectl("get", "clusterrolebinding", "kubeadm:apiserver-kubelet-client", check=False).returncode == 0
    seen.add("… ClusterRoleBinding kubeadm:apiserver-kubelet-client", "exists" if bound else "missing")
    nodes.restart_kubelet(node)
    names = [item.spec.name for item in inventory.read(node.pki_dir, node.kubeconfig_dir).items if item.certificates]
    wait_for(
        "a kubelet of the new version",
        lambda: TO in node.kubectl("get", "nodes", "-o", "wide", check=False).stdout,
        seconds=120,
    )
    seen.add("version of the kubelet after its restart", TO)
    _renewed(seen, bridge, *names)
    proof = bridge.run("prove", "--wait", "90s")
    print(proof.stdout, proof.stderr, flush=True)
    seen.add("`ca-bridge prove`", f"exit {proof.returncode}")
    assert proof.returncode == 0
    adopted = bridge.run("renew", "apiserver-kubelet-client", "--adopt-defaults")
    seen.add("`ca-bridge renew apiserver-kubelet-client --adopt-defaults`", f"exit {adopted.returncode}")
    assert adopted.returncode == 0, adopted.stderr
    logs = ("logs", "-n", "kube-system", f"kube-apiserver-{node.name}", "--tail", "1")
    wait_for("logs through the API server", lambda: node.kubectl(*logs, check=False).returncode == 0, seconds=90)
    seen.add("`kubectl logs` after that", "works")


def release_of(directory: Path) -> str:
    """What the kubeadm in there says that it is; `none`: there is none."""
    program = directory / "kubeadm"
    if not program.exists():
        return "none"
    return subprocess.run(
        [program, "version", "-o", "short"], capture_output=True, text=True, check=True
    ).stdout.strip()


def _programs_of_both(parser: argparse.ArgumentParser) -> tuple[Path, Path]:
    """Where the older version's programs are, and the newer one's; without them the program ends."""
    new = programs.directory()
    old = Path(f"{new}-{FROM}")
    if not release_of(old).startswith(f"v{FROM}.") or release_of(new) != TO:
        parser.error(
            f"wanted Kubernetes {FROM} and {TO}: run {programs.COMMAND}, and {programs.COMMAND} --older {FROM}"
        )
    return old, new


def run(program: str, start: str, walk: Callable[[Path, Path, Path], Seen]) -> None:
    """Walk from the older version to the newer one, print, and with `--docs` write behind the mark `start`."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    old, new = _programs_of_both(parser)
    with tempfile.TemporaryDirectory() as directory:
        text = walk(Path(directory), old, new).table()
    print(text)
    if options.docs:
        write_between(DOCUMENT, start, text)


if __name__ == "__main__":
    run("tests.measure.upgrade", START, walk)
