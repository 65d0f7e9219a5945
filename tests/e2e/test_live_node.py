"""
The whole loop on a control plane that runs: cron's `ca-bridge renew` signs by OpenBao, restarts, proves, and goes back.

While it works, a client writes and reads through the API every 0.1 s, and each failed turn counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cryptography import x509

from bridge.certificates import fingerprint, load_pem_certificates, pem
from bridge.specs import AUTHORITIES, SPECS, Component
from tests.counts import Tried
from tests.e2e import nodes
from tests.e2e.cas import add_vault, live_certificates
from tests.e2e.doors import door
from tests.e2e.looking import Audit, traffic
from tests.e2e.nodes import NodeBridge, NodePki, wait_for
from tests.kit.issuing import Signer
from tests.kit.node import Node
from tests.kit.openbao import OpenBao

pytestmark = [pytest.mark.node, pytest.mark.slow]

NAME, IP = f"live-{os.getpid() % 100_000}", "198.18.77.90"
STATIC = (Component.ETCD, Component.APISERVER, Component.CONTROLLER_MANAGER, Component.SCHEDULER)
USERS = {
    "controller-manager.conf": "system:kube-controller-manager",
    "scheduler.conf": "system:kube-scheduler",
}


@dataclass(kw_only=True)
class LiveBridge(NodeBridge):
    """ca-bridge as cron runs it: wholly on the node, without a terminal."""

    def run(self, *args: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        """Run the installed program."""
        program = Path(sys.executable).with_name("ca-bridge")
        environment = {"CRI_CONFIG_FILE": "/etc/kubernetes/crictl.yaml"}
        return self.node.exec(
            program, *args, "--config", self.config, check=False, timeout_seconds=timeout, env=environment
        )


@dataclass(frozen=True, kw_only=True)
class Site:
    """A node in external-CA mode, and its CA."""

    node: Node
    bao: OpenBao
    bridge: LiveBridge
    audit: Audit


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, bao: OpenBao) -> Iterator[Site]:
    """Its settings are those of a cron job that restarts what is needed."""
    directory = tmp_path_factory.mktemp("site")
    audit, keys = Audit(directory=directory / "audit"), directory / "ca-keys"
    with Node.up(NAME, IP, ca_dir=keys, cluster=audit.cluster()) as node:
        nodes.make_ready(node)
        pki = NodePki(root=node.root, external=True, keys=keys)
        bridge = LiveBridge(pki=pki, directory=directory / "bridge", node=node)
        for authority in AUTHORITIES:
            add_vault(bridge, bao, authority, NAME)
        bridge.add("restart", {"method": "static-pods", "components": "needed", "min_interval": "1s"})
        bridge.add("cluster", {"lease": True})
        port = urlsplit(bao.url).port
        assert port is not None
        with door(node, port):
            yield Site(node=node, bao=bao, bridge=bridge, audit=audit)


@contextlib.contextmanager
def setting(bridge: LiveBridge, old: str, new: str) -> Iterator[None]:
    """Another value, for a while."""
    before = bridge.config.read_text()
    assert old in before
    bridge.config.write_text(before.replace(old, new))
    try:
        yield
    finally:
        bridge.config.write_text(before)


def seconds_without_answer(errors: list[str]) -> float:
    """Turns are 0.1 s apart, and a failed one says how long it took."""
    return sum(0.1 + float(found[1]) for error in errors if (found := re.search(r"after ([0-9.]+) s", error)))


STATIC_NAMES = [name for name in SPECS if name != "kubelet.conf"]


def test_needed_restarts_cost_not_one_answer(site: Site, tried: Tried) -> None:
    """Controller manager and scheduler are restarted, the rest reloads; no turn of the client fails; all is proven."""
    before, containers = live_certificates(site.bridge.pki), nodes.containers(site.node)
    with traffic(site.node) as seen:
        run = site.bridge.run("renew", *STATIC_NAMES, "-o", "json")
    assert run.returncode == 0, run.stderr
    print(run.stderr)
    result = json.loads(run.stdout)
    print(f"{seen.turns} turns, {seconds_without_answer(seen.errors):.1f} s without answer; {result['restarted']}")
    assert seen.turns > 20
    assert seen.errors == []
    after = live_certificates(site.bridge.pki)
    assert {name for name in after if after[name] != before[name]} == set(STATIC_NAMES)
    now = nodes.containers(site.node)
    assert {component for component in STATIC if now[component] != containers[component]} == {
        Component.CONTROLLER_MANAGER,
        Component.SCHEDULER,
    }
    assert [text.split(" ")[0] for text in result["restarted"]] == ["kube-controller-manager", "kube-scheduler"]
    assert result["proven"] > 10
    proof = site.bridge.run("prove")
    assert proof.returncode == 0, proof.stdout
    assert not (site.bridge.directory / "state/unproven.json").exists()
    tried("turns of a client during a renewal with the needed restarts, none failed", seen.turns, exact=False)


def test_they_really_use_the_new_certificates(site: Site) -> None:
    """The API server knows controller manager and scheduler by the new ones alone."""
    new, since = live_certificates(site.bridge.pki), datetime.now(UTC)
    for name, user in USERS.items():
        wait_for(f"requests by {user}", lambda user=user: site.audit.certificates_of(user, since))  # type: ignore[misc]
        assert site.audit.certificates_of(user, since) == {fingerprint(new[name])}


def test_all_four_restarted(site: Site, tried: Tried) -> None:
    """`components = "all"`: the documented way, one after the other; how long the API does not answer is printed."""
    containers = nodes.containers(site.node)
    with setting(site.bridge, '"needed"', '"all"'), traffic(site.node) as seen:
        run = site.bridge.run("renew", *STATIC_NAMES, "-o", "json")
    assert run.returncode == 0, run.stderr
    now = nodes.containers(site.node)
    assert not [component for component in STATIC if now[component] == containers[component]]
    away = seconds_without_answer(seen.errors)
    print(f"{seen.turns} turns, {away:.1f} s without answer; {json.loads(run.stdout)['restarted']}")
    assert site.bridge.run("prove").returncode == 0
    tried(
        'seconds without an answer of the API while components = "all" restarted four components',
        round(away),
        exact=False,
    )


def test_a_broken_ca_restarts_nothing(site: Site) -> None:
    """A role with other usages: exit 5, no file and no component is touched."""
    before, containers = live_certificates(site.bridge.pki), nodes.containers(site.node)
    path = f"{NAME}-ca/roles/kubeadm-scheduler.conf"
    role = site.bao.read(path)["data"]
    site.bao.write(path, **(role | {"client_flag": False, "ext_key_usage": ["ServerAuth"]}))
    try:
        with traffic(site.node) as seen:
            run = site.bridge.run("renew", "scheduler.conf", "controller-manager.conf", "--all-or-nothing")
    finally:
        site.bao.write(path, **role)
    assert run.returncode == 5, run.stderr
    assert seen.errors == []
    assert live_certificates(site.bridge.pki) == before
    assert nodes.containers(site.node) == containers


@contextlib.contextmanager
def another_etcd_ca(site: Site) -> Iterator[Signer]:
    """
    `etcd/ca.crt` on disk is another one than the etcd that runs has read: a CA change that was forgotten half way.

    OpenBao signs with that one, so that its certificates pass every check of the files.
    """
    path = site.node.pki_dir / "etcd/ca.crt"
    before = path.read_bytes()
    signer = Signer.make("etcd-ca", begin=datetime(2026, 1, 1, tzinfo=UTC), end=datetime(2036, 1, 1, tzinfo=UTC))
    path.write_bytes(pem(signer.certificate))
    try:
        yield signer
    finally:
        path.write_bytes(before)


def test_a_certificate_that_passes_and_can_not_work_is_rolled_back(site: Site, tmp_path: Path) -> None:
    """etcd refuses the API server's new certificate: the old one comes back by itself, exit 8, and the API answers."""
    from tests.kit import opensslca

    before = live_certificates(site.bridge.pki)
    with another_etcd_ca(site) as signer:
        from bridge.csr import key_pem

        desk = opensslca.make_ca_directory(tmp_path / "etcd-desk", pem(signer.certificate), key_pem(signer.key))
        text = site.bridge.config.read_text()
        mount = f'backend = "{NAME}-etcd-ca"\nmount = "{NAME}-etcd-ca"'
        assert mount in text
        site.bridge.config.write_text(
            text.replace(mount, f'backend = "other"\n\n[backend.other]\ntype = "openssl"\ndir = "{desk}"\n')
        )
        try:
            run = site.bridge.run("renew", "apiserver-etcd-client")
        finally:
            site.bridge.config.write_text(text)
    print(run.stdout, run.stderr)
    assert run.returncode == 8, run.stderr
    assert "apiserver-etcd-client" in run.stderr
    assert live_certificates(site.bridge.pki) == before
    assert site.node.kubectl("get", "--raw", "/readyz").stdout == "ok"
    assert site.bridge.run("prove", "--wait", "60s").returncode == 0
    events = [json.loads(line) for line in (site.bridge.directory / "state/audit.jsonl").read_text().splitlines()]
    assert [event["name"] for event in events if event["event"] == "rolled-back"] == ["apiserver-etcd-client"]


def test_a_lost_binding_is_seen_and_kept_when_so_set(site: Site) -> None:
    """The API server's client lost its RBAC binding: exit 7 with `on_failure = "keep"`, and the message says what."""
    binding = "kubeadm:apiserver-kubelet-client"

    def kubectl(*args: str) -> subprocess.CompletedProcess[str]:
        return site.node.exec("kubectl", "--kubeconfig", "/etc/kubernetes/super-admin.conf", *args)

    kept = json.loads(kubectl("get", "clusterrolebinding", binding, "-o", "json").stdout)
    kubectl("delete", "clusterrolebinding", binding)
    try:
        with setting(site.bridge, 'min_interval = "1s"', 'min_interval = "1s"\non_failure = "keep"\nprove_for = "5s"'):
            run = site.bridge.run("renew", "apiserver-kubelet-client")
    finally:
        file = site.node.kubeconfig_dir / "binding.json"
        file.write_text(json.dumps({key: kept[key] for key in ("apiVersion", "kind", "roleRef", "subjects")}
                                   | {"metadata": {"name": binding}}))  # fmt: skip
        kubectl("create", "-f", "/etc/kubernetes/binding.json")
        file.unlink()
    assert run.returncode == 7, run.stderr
    assert "apiserver-kubelet-client" in run.stderr
    unproven = site.bridge.directory / "state/unproven.json"
    assert unproven.exists()

    def proven() -> bool:
        return site.bridge.run("renew").returncode == 0

    wait_for("the kubelet to forget its no", proven, seconds=120)
    assert not unproven.exists()


def test_the_kubelet_is_restarted_on_its_new_certificate(site: Site) -> None:
    """kubelet.conf with embedded data, by the settings' command; its copy of the old one is taken away."""
    script = site.bridge.directory / "restart-kubelet"
    log = site.node.root.parent / "kubelet.log"
    script.write_text(
        "#!/bin/sh\nset -eu\npid=$(pidof kubelet)\ntr '\\0' '\\n' </proc/$pid/cmdline >/run/kubelet.args\n"
        "kill $pid\nwhile kill -0 $pid 2>/dev/null; do sleep 0.1; done\n"
        f"xargs -d '\\n' -a /run/kubelet.args setsid >>{log} 2>&1 </dev/null &\n"
    )
    script.chmod(0o755)
    site.bridge.add("restart.commands", {"kubelet": str(script)})
    run = site.bridge.run("renew", "kubelet.conf")
    assert run.returncode == 0, run.stderr
    assert "kubelet in " in run.stdout
    assert site.bridge.run("prove", "--wait", "60s").returncode == 0
    copy = site.node.root / "var/lib/kubelet/pki/kubelet-client-current.pem"
    new = live_certificates(site.bridge.pki)["kubelet.conf"]
    wait_for("the kubelet's new copy", lambda: _first(copy) == new, seconds=60)


def _first(path: Path) -> x509.Certificate | None:
    try:
        return load_pem_certificates(path.resolve().read_bytes())[0] if path.exists() else None
    except (OSError, ValueError):
        return None
