"""
The whole loop on a control plane that runs: cron's `ca-bridge renew` signs by OpenBao, restarts, proves, and goes back.

While it works, a client writes and reads through the API every 0.1 s, and each failed turn counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.node import kubeconfig
from bridge.pki import csr
from bridge.pki.certificates import fingerprint, load_pem_certificates
from bridge.specs import AUTHORITIES, Component
from tests.counts import Tried
from tests.kit import nodes, programs
from tests.kit.cas import add_vault, live_certificates
from tests.kit.doors import door
from tests.kit.issuing import Signer, signed_again
from tests.kit.looking import Audit, traffic
from tests.kit.node import Node
from tests.kit.nodes import LiveBridge, NodePki, wait_for
from tests.kit.openbao import OpenBao
from tests.kit.pki import PKI_SPECS

pytestmark = [pytest.mark.node, pytest.mark.slow]

STATIC = (Component.ETCD, Component.APISERVER, Component.CONTROLLER_MANAGER, Component.SCHEDULER)
USERS = {
    "controller-manager.conf": "system:kube-controller-manager",
    "scheduler.conf": "system:kube-scheduler",
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """A node in external-CA mode, and its CA."""

    node: Node
    bao: OpenBao
    bridge: LiveBridge
    audit: Audit


@pytest.fixture(scope="module")
def site(
    node: Node, ca_keys: Path, audit: Audit, tmp_path_factory: pytest.TempPathFactory, bao: OpenBao
) -> Iterator[Site]:
    """Its settings are those of a cron job that restarts what is needed."""
    pki = NodePki(root=node.root, external=True, keys=ca_keys)
    bridge = LiveBridge(pki=pki, directory=tmp_path_factory.mktemp("site") / "bridge", node=node)
    for authority in AUTHORITIES:
        add_vault(bridge, bao, authority, node.name)
    bridge.add("restart", {"method": "static-pods", "components": "needed", "min_interval": "1s", "prove_for": "5m"})
    bridge.add("restart.commands", {"kubelet": bridge.kubelet_command()})
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


STATIC_NAMES = [name for name in PKI_SPECS if name != "kubelet.conf"]


def test_needed_restarts_cost_not_one_answer(site: Site, tried: Tried) -> None:
    """Controller manager and scheduler are restarted, the rest reloads; no turn of the client fails; all is proven."""
    before, containers = live_certificates(site.bridge.pki), nodes.containers(site.node)
    with traffic(site.node) as seen:
        run = site.bridge.run("renew", *STATIC_NAMES, "-o", "json")
    assert run.returncode == 0, run.stderr
    print(run.stderr)
    result = json.loads(run.stdout)
    print(f"{seen.turns} turns, {seconds_without_answer(seen.errors):.1f} s without answer; {result['restarted']}")
    assert seen.turns > 3  # a turn on a busy machine takes a second, and is under way all the time
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
    proof = site.bridge.run("prove", "--wait", "3m")
    assert proof.returncode == 0, proof.stdout
    assert not (site.bridge.directory / "state/unproven.json").exists()
    tried("turns of a client during a renewal with the needed restarts, none failed", seen.turns)


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
    assert site.bridge.run("prove", "--wait", "3m").returncode == 0
    tried(
        'seconds without an answer of the API while components = "all" restarted four components',
        round(away),
    )


def test_a_broken_ca_restarts_nothing(site: Site) -> None:
    """A role with other usages: exit 5, no file and no component is touched."""
    before, containers = live_certificates(site.bridge.pki), nodes.containers(site.node)
    path = f"{site.node.name}-ca/roles/kubeadm-scheduler.conf"
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
def without_binding(site: Site) -> Iterator[None]:
    """
    The API server's client towards kubelets has no rights there, for a while.

    A kubelet goes on allowing what it has allowed, by certificate; a new certificate is judged afresh.
    """
    binding = "kubeadm:apiserver-kubelet-client"

    def kubectl(*args: str) -> subprocess.CompletedProcess[str]:
        return site.node.exec("kubectl", "--kubeconfig", "/etc/kubernetes/super-admin.conf", *args)

    assert site.bridge.run("prove", "--wait", "3m").returncode == 0
    kept = json.loads(kubectl("get", "clusterrolebinding", binding, "-o", "json").stdout)
    kubectl("delete", "clusterrolebinding", binding)
    try:
        yield
    finally:
        file = site.node.kubeconfig_dir / "binding.json"
        again = {key: kept[key] for key in ("apiVersion", "kind", "roleRef", "subjects")}
        file.write_text(json.dumps(again | {"metadata": {"name": binding}}))
        kubectl("create", "-f", "/etc/kubernetes/binding.json")
        file.unlink()


def test_a_certificate_that_passes_and_can_not_work_is_rolled_back(site: Site) -> None:
    """Kubelets refuse the API server's new certificate: the old one comes back by itself, exit 8, and all works on it."""
    before = live_certificates(site.bridge.pki)
    with without_binding(site), setting(site.bridge, '"5m"', '"5s"'), traffic(site.node) as seen:
        run = site.bridge.run("renew", "apiserver-kubelet-client", "scheduler.conf")
    print(run.stdout, run.stderr)
    assert run.returncode == 8, run.stderr
    assert "apiserver-kubelet-client" in run.stderr
    assert "refused" in run.stderr
    assert "everything runs on the old files again" in run.stderr
    assert seen.errors == []
    assert live_certificates(site.bridge.pki) == before
    assert site.bridge.run("prove", "--wait", "3m").returncode == 0
    assert not (site.bridge.directory / "state/unproven.json").exists()
    events = [json.loads(line) for line in (site.bridge.directory / "state/audit.jsonl").read_text().splitlines()]
    back = {event["name"] for event in events if event["event"] == "rolled-back"}
    assert back == {"apiserver-kubelet-client", "scheduler.conf"}


def test_it_is_kept_when_so_set_and_looked_at_again(site: Site) -> None:
    """The same with `on_failure = "keep"`: exit 7, and the next run looks again until it works."""
    unproven = site.bridge.directory / "state/unproven.json"
    with setting(site.bridge, '"5m"', '"5s"\non_failure = "keep"'):
        with without_binding(site):
            run = site.bridge.run("renew", "apiserver-kubelet-client")
            assert run.returncode == 7, run.stderr
            assert "apiserver-kubelet-client" in run.stderr
            assert unproven.exists()
            assert site.bridge.run("renew").returncode == 7

        def proven() -> bool:
            again = site.bridge.run("renew")
            print(again.returncode, again.stdout, again.stderr)
            return again.returncode == 0

        wait_for("the kubelet to forget its no", proven)
    assert not unproven.exists()


def test_the_kubelet_is_restarted_on_its_new_certificate(site: Site) -> None:
    """kubelet.conf with embedded data, by the settings' command; it refers to the kubelet's own file from then on."""
    run = site.bridge.run("renew", "kubelet.conf")
    assert run.returncode == 0, run.stderr
    assert "kubelet in " in run.stdout
    assert site.bridge.run("prove", "--wait", "3m").returncode == 0
    current = "/var/lib/kubelet/pki/kubelet-client-current.pem"
    found = kubeconfig.parse((site.node.kubeconfig_dir / "kubelet.conf").read_bytes())
    assert (found.certificate_file, found.key_file, found.certificate_data) == (current, current, None)
    new = live_certificates(site.bridge.pki)["kubelet.conf"]
    assert load_pem_certificates(site.node.exec("cat", current).stdout.encode())[0] == new


def test_a_kubelet_that_an_expired_certificate_keeps_down_is_repaired_by_renew_alone(site: Site) -> None:
    """Its kubelet.conf refers to the kubelet's own file, as kubeadm leaves it, and that has ended: no start succeeds."""
    pki, node = site.bridge.pki, site.node
    assert site.bridge.run("renew", "kubelet.conf").returncode == 0
    certificate, key = pki.ca_pem("ca")
    signer = Signer(certificate=x509.load_pem_x509_certificate(certificate), key=load_pem_private_key(key, None))  # type: ignore[arg-type]
    old = live_certificates(pki)["kubelet.conf"]
    restart = Path(site.bridge.kubelet_command())
    node.exec(restart)  # which also writes its arguments down
    running = f"^kubelet .*--hostname-override={node.name} "
    wait_for("the kubelet that was started", lambda: not node.exec("pgrep", "-f", running, check=False).returncode)
    arguments, log = site.bridge.directory / "kubelet.args", node.root.parent / "kubelet.log"
    with arguments.open("a") as file:  # as kubeadm's unit has it; with an expired certificate it ends for want of it
        file.write("--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf\n")
    link = node.root / "var/lib/kubelet/pki/kubelet-client-current.pem"
    current = link.parent / link.readlink().name
    pair = current.read_bytes()
    current.write_bytes(signed_again(old, signer, end=datetime.now(UTC) - timedelta(minutes=1)) + csr.key_block(pair))
    # one that began slowly has read that one, and has ended by itself
    wait_for("no kubelet", lambda: node.exec("pkill", "-f", running, check=False).returncode == 1)
    # what systemd does: again and again
    again = f"while sleep 1; do xargs -d '\\n' -a {arguments} env </dev/null >>{log} 2>&1; done"
    ended = site.bridge.directory / "kubelet-ended"  # as `systemctl restart` ends one that is just beginning, too
    ended.write_text(f"#!/bin/sh\npkill -f '{running}'\nexit 0\n")
    ended.chmod(0o755)
    before = log.stat().st_size
    loop = subprocess.Popen([programs.KIT / "node.sh", "exec", node.name, "sh", "-c", again], start_new_session=True)

    def is_down() -> bool:
        return b"unable to load bootstrap kubeconfig" in log.read_bytes()[before:]

    try:
        wait_for("a kubelet that can not start", is_down)
        with setting(site.bridge, str(restart), str(ended)):
            run = site.bridge.run("renew")
        print(run.stdout, run.stderr)
        assert run.returncode == 0, run.stderr
        assert link.is_symlink()
        assert link.readlink().name > current.name
        wait_for("a node that is Ready", lambda: nodes.is_ready(node))
        assert site.bridge.run("prove", "--wait", "3m").returncode == 0
    finally:
        os.killpg(loop.pid, signal.SIGTERM)
        loop.wait()
