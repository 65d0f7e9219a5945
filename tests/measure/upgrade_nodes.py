"""
A real upgrade of a cluster from Kubernetes 1.36 to 1.37 whose CA keys were never on a node, node by node.

`python -m tests.measure.upgrade_nodes [--docs]` makes two control-plane nodes and a worker of 1.36 by `ca-bridge bootstrap`,
with the programs that `tests/kit/binaries.sh --older 1.36` builds, and types what docs/changes.md says: `kubeadm upgrade
apply` on the first, `kubeadm upgrade node` on the others, all with `--certificate-renewal=false`; on the second one a
certificate has expired, and before that the worker's.
It prints what was seen; with `--docs` also into docs/evidence/upgrade.md, whose figures come from nowhere else.
Images come from the kit; CoreDNS and kube-proxy do not run, and there is no pod network.
Needs root, and the Python of `.cache/venv-test`, which `scripts/test` made.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from bridge.specs import KUBELET_CONF, SPECS
from tests.kit import node as kit
from tests.kit.day_zero import Beside, Machine, Walk, prepare
from tests.kit.issuing import Signer, signed_again
from tests.kit.node import Node
from tests.kit.nodes import wait_for
from tests.kit.pki import handmade_pki
from tests.measure import upgrade
from tests.measure.upgrade import EXPIRED, TO, Seen

START = "<!-- numbers: written by `python -m tests.measure.upgrade_nodes --docs` -->"
FIRST, SECOND, WORKER = "un-cp1", "un-cp2", "un-w1"
CONTROL_PLANES, WORKERS = {FIRST: "198.18.77.171", SECOND: "198.18.77.172"}, {WORKER: "198.18.77.173"}
NO_RENEWAL = "--certificate-renewal=false"
#: Each node of the kit has a cgroup root of its own, which is no part of the cluster's configuration.
_OF_THE_KIT = {"upgrade-kubelet-config": ["/var/lib/kubelet/config.yaml"]}

_CURRENT = "var/lib/kubelet/pki/kubelet-client-current.pem"
_END = "-----END CERTIFICATE-----\n"
_RESTART = """
[restart]
method = "static-pods"
components = "needed"
min_interval = "1s"

[restart.commands]
kubelet = "systemctl restart kubelet"
"""


@dataclass(kw_only=True)
class Site:
    """The cluster, and what was seen of it."""

    machines: dict[str, Machine]
    cas: Beside
    seen: Seen = field(default_factory=Seen)

    def doctor(self, name: str, *options: str) -> dict[str, list[str]]:
        """What is wrong by it, but for what the kit brings; a row."""
        code, wrong, _ = upgrade.findings_of(self.machines[name].alone("doctor", *options, "-o", "json"))
        self.seen.add(f"{name}: `{' '.join(('doctor', *options))}`", f"exit {code}, {upgrade.shown(wrong)}")
        return {check: about for check, about in wrong.items() if _OF_THE_KIT.get(check) != about}

    def plan(self, name: str) -> list[str]:
        """What is due by it; a row."""
        run = self.machines[name].alone("plan", "-o", "json")
        reported = json.loads(run.stdout)
        due = [one["name"] for one in reported["renew"]]
        drift = [one["about"] for one in reported["drift"]]
        text = f"exit {run.returncode}, due: {', '.join(due) or 'nothing'}; drift: {', '.join(drift) or 'none'}"
        self.seen.add(f"{name}: `plan`", text)
        return due

    def kubeadm(self, name: str, *args: str) -> subprocess.CompletedProcess[str]:
        """`kubeadm upgrade`; a row. Preflight looks for what a real machine has beside this one."""
        machine, begin = self.machines[name], time.monotonic()
        more = ["--patches", str(machine.directory / "patches")] if name != FIRST else []
        run = machine.node.exec(
            "kubeadm", "upgrade", *args, *more, "--ignore-preflight-errors=all", check=False, timeout_seconds=900
        )
        if run.returncode:
            print(run.stdout[-6000:], run.stderr[-3000:], flush=True)
        said = f"exit {run.returncode}, {time.monotonic() - begin:.0f} s"
        if run.returncode:
            said = f"{said}: `{upgrade.words_of(run)}`"
        self.seen.add(f"{name}: `kubeadm upgrade {' '.join(args)}`", said)
        return run

    def expire(self, authority: str, path: Path) -> None:
        """A certificate of the right CA for the same key, which has ended; a key behind it stays."""
        text = path.read_text()
        begin = text.index(_END) + len(_END)
        signer = Signer.load(*self.cas.pki.ca_pem(authority))
        old = x509.load_pem_x509_certificate(text[:begin].encode())
        new = signed_again(old, signer, end=datetime.now(UTC) - timedelta(minutes=5))
        path.write_bytes(new + text[begin:].encode())

    def digests(self) -> dict[str, dict[str, str]]:
        """The digests of every certificate, key and kubeconfig of each node, the kubelets' among them."""
        return {name: _digests(machine.node) for name, machine in self.machines.items()}


def _digests(node: Node) -> dict[str, str]:
    files = (node.root / "var/lib/kubelet/pki").iterdir()  # with a symlink, which leads to a path of the node
    kubelet = {str(path): str(path.readlink()) if path.is_symlink() else path.read_text() for path in files}
    return {**upgrade.digests_of(node), **kubelet}


def _site(stack: ExitStack, directory: Path, old: Path, new: Path) -> Site:
    """A cluster of the older version, in whose machines the newer one's images are."""
    os.environ["KUBE_BIN_DIR"] = str(new)
    with Node.host("un-images", "198.18.77.174"):  # makes the newer version's images
        pass
    os.environ["KUBE_BIN_DIR"] = str(old)
    cas = Beside(directory=directory / "cas", pki=handmade_pki(directory / "elsewhere"))
    steps = Walk()
    cluster = prepare(stack, directory, cas, CONTROL_PLANES, WORKERS, steps, upgrade.release_of(old))
    cluster.make()
    for what, seconds in steps.seconds.items():
        print(f"{what}: {seconds:.0f} s", flush=True)
    os.environ["KUBE_BIN_DIR"] = str(new)
    for machine in cluster.machines.values():
        upgrade.import_images(machine.node)
        with machine.config.open("a") as config:
            config.write(_RESTART)
    (cluster.first.node.kubeconfig_dir / "super-admin.conf").unlink()  # as docs/day-0.md has it
    for machine in cluster.machines.values():
        _make_ready(cluster.first.node, machine.node)
    return Site(machines=cluster.machines, cas=cas)


def _make_ready(first: Node, node: Node) -> None:
    """As `nodes.make_ready`, asked of a node that has admin.conf."""
    there, path = node.root / "etc/cni/net.d", '{.status.conditions[?(@.type=="Ready")].status}'
    there.mkdir(parents=True, exist_ok=True)
    network = {"cniVersion": "1.0.0", "name": "none", "plugins": [{"type": "loopback"}]}
    (there / "10-none.conflist").write_text(json.dumps(network))
    look = ("get", "node", node.name, "-o", f"jsonpath={path}")
    wait_for("a node that is Ready", lambda: first.kubectl(*look, check=False).stdout == "True", seconds=120)


def walk(directory: Path, old: Path, new: Path) -> Seen:
    """
    Look, upgrade one node after the other, exchange the kubelets, look again, renew.

    Raises:
        AssertionError: A command did not end as docs/changes.md has it, or ca-bridge had said something else.
    """
    with ExitStack() as stack:
        site = _site(stack, directory, old, new)
        site.seen.add("versions before the upgrade", _versions(site))
        for name in site.machines:
            assert site.doctor(name, "--before-upgrade") == {}
            assert site.plan(name) == []
        _worker_without_access(site)
        before = site.digests()
        run = site.kubeadm(FIRST, "apply", TO, "--yes", NO_RENEWAL)
        assert run.returncode == 0, run.stderr
        _second(site)
        _worker(site)
        site.seen.add("versions after the upgrade", _versions(site))
        after = site.digests()
        changed = [f"{name}: {Path(path).name}" for name in before for path in _differing(before[name], after[name])]
        site.seen.add("… certificates, keys and kubeconfigs that changed", ", ".join(changed) or "none")
        renewed = SPECS[EXPIRED].base
        assert changed == [f"{SECOND}: {renewed}.crt", f"{SECOND}: {renewed}.key"], changed
        _afterwards(site, new)
    return site.seen


def _worker_without_access(site: Site) -> None:
    """Its kubelet's certificate has expired, and kubeadm has no other there."""
    there = site.machines[WORKER].node.root
    site.expire("ca", there / str((there / _CURRENT).readlink()).lstrip("/"))
    site.seen.add(f"{WORKER}: the test makes {KUBELET_CONF} expire", "5 minutes ago")
    assert site.doctor(WORKER, "--before-upgrade") == {"upgrade-no-access": [KUBELET_CONF]}
    assert site.plan(WORKER) == [KUBELET_CONF]
    assert site.kubeadm(WORKER, "node", NO_RENEWAL).returncode == 1
    _run(site, WORKER, "renew")
    assert site.doctor(WORKER, "--before-upgrade") == {}
    assert site.plan(WORKER) == []


def _second(site: Site) -> None:
    """A further control-plane node, on which a certificate has expired."""
    node = site.machines[SECOND].node
    spec = SPECS[EXPIRED]
    site.expire(spec.authority.name, node.pki_dir / f"{spec.base}.crt")
    site.seen.add(f"{SECOND}: the test makes {EXPIRED} expire", "5 minutes ago")
    assert site.doctor(SECOND, "--before-upgrade") == {"upgrade-aborts": [EXPIRED]}
    assert site.plan(SECOND) == [EXPIRED]
    before = upgrade.versions_of(node)
    assert site.kubeadm(SECOND, "node", "--dry-run").returncode == 0, "the dry run looks at certificates now"
    aborted = site.kubeadm(SECOND, "node")
    assert (aborted.returncode, "failed to renew certificates" in aborted.stderr) == (1, True), aborted.stderr
    site.seen.add("… manifests that it had replaced by then", _exchanged(before, node))
    run = site.kubeadm(SECOND, "node", NO_RENEWAL)
    assert run.returncode == 0, run.stderr
    site.seen.add("… manifests that are replaced now", _exchanged(before, node))
    _run(site, SECOND, "renew")
    assert site.plan(SECOND) == []


def _exchanged(before: dict[str, str], node: Node) -> str:
    return ", ".join(name for name, tag in upgrade.versions_of(node).items() if tag != before[name]) or "none"


def _worker(site: Site) -> None:
    for options in (("--dry-run",), ()):
        run = site.kubeadm(WORKER, "node", *options, NO_RENEWAL)
        assert run.returncode == 0, run.stderr


def _afterwards(site: Site, new: Path) -> None:
    """The kubelets' program is the operator's to exchange; then all is looked at, renewed, and proven."""
    first = site.machines[FIRST].node
    for name, machine in site.machines.items():
        shutil.copy(new / "kubelet", kit.directory() / name / "bin/kubelet")
        machine.node.exec("systemctl", "restart", "kubelet")
    line = '{range .items[*]}{.status.nodeInfo.kubeletVersion}{" "}{end}'
    wait_for(
        "kubelets of the new version",
        lambda: set(first.kubectl("get", "nodes", "-o", f"jsonpath={line}", check=False).stdout.split()) == {TO},
        seconds=180,
    )
    site.seen.add("version of the kubelets after their restart", TO)
    for name in site.machines:
        assert site.doctor(name) == {}
        assert site.plan(name) == []
        _run(site, name, "prove", "--wait", "90s")
    for name in site.machines:
        _run(site, name, "renew", "all")
        _run(site, name, "prove", "--wait", "90s")
    logs = ("logs", "-n", "kube-system", f"kube-apiserver-{SECOND}", "--tail", "1")
    wait_for("logs through the API server", lambda: first.kubectl(*logs, check=False).returncode == 0, seconds=90)
    site.seen.add("`kubectl logs` after that", "works")


def _run(site: Site, name: str, *args: str) -> None:
    run = site.machines[name].alone(*args)
    site.seen.add(f"{name}: `ca-bridge {' '.join(args)}`", f"exit {run.returncode}")
    assert run.returncode == 0, f"{run.stdout}{run.stderr}"


def _differing(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(path for path in {*before, *after} if before.get(path) != after.get(path))


def _versions(site: Site) -> str:
    found = {name: upgrade.versions_of(site.machines[name].node) for name in CONTROL_PLANES}
    return "; ".join(
        f"{name}: {', '.join(f'{one} {tag}' for one, tag in tags.items())}" for name, tags in found.items()
    )


if __name__ == "__main__":
    upgrade.run("tests.measure.upgrade_nodes", START, walk)
