"""The door in a pod, by `scripts/image --serve` and `config/serve/kubernetes/`: on a node of one cluster, for another one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from backends.vault import setup as vault_setup
from bridge.desk.desk import SIGNED
from bridge.errors import Exit
from bridge.specs import AUTHORITIES, SPECS
from tests.kit import openbao, programs
from tests.kit.cas import VALIDITY, Bridge, live_certificates
from tests.kit.doors import door
from tests.kit.est import Tls, make_tls
from tests.kit.node import Node
from tests.kit.nodes import assert_confined, import_image, make_ready, wait_for
from tests.kit.openbao import OpenBao
from tests.kit.pki import handmade_pki

pytestmark = [pytest.mark.node, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "config/serve/kubernetes"
NAME, IP = f"dp-{os.getpid() % 100_000}", "198.18.77.203"
NAMESPACE = "ca-bridge-door"
POD = "ca-bridge-door-0"
#: What the site of the manifests would put in the place of examples.
MOUNTS = {"ca": "pki-kubernetes", "etcd-ca": "pki-etcd", "front-proxy-ca": "pki-front-proxy"}
OWN = "pki-own"  #: The CA of the pod's own cluster.
#: Where the StatefulSet's claim finds its room: a directory of the node.
VOLUME = f"""\
apiVersion: v1
kind: PersistentVolume
metadata: {{name: state}}
spec:
  accessModes: [ReadWriteOncePod]
  capacity: {{storage: 2Gi}}
  local: {{path: /var/lib/kubelet/door}}
  nodeAffinity:
    required:
      nodeSelectorTerms: [{{matchExpressions: [{{key: kubernetes.io/hostname, operator: In, values: [{NAME}]}}]}}]
"""


@dataclass(frozen=True, kw_only=True)
class Site:
    """The cluster of the security team, and a node of another one."""

    node: Node  #: Where the door's pod runs.
    bao: OpenBao  #: Of the door.
    bridge: Bridge  #: The other cluster's node, whose one backend is the door.
    tls: Tls  #: OpenBao's and the door's CA.
    files: Path  #: Below the node's /etc/kubernetes.
    config: str  #: The ConfigMap that is shipped, with this site's address of OpenBao.

    def kubectl(self, *args: str, check: bool = True) -> str:
        """In the door's namespace."""
        return self.node.kubectl("--namespace", NAMESPACE, *args, check=check).stdout

    def apply(self, text: str) -> None:
        """Manifests in YAML."""
        (self.files / "apply.yaml").write_text(text)
        self.kubectl("apply", "-f", "/etc/kubernetes/site/apply.yaml")

    def pod(self) -> dict[str, Any]:
        """The door's container, as the kubelet describes it; empty while there is none."""
        found = json.loads(self.kubectl("get", "pods", "-o", "json"))["items"]
        statuses = [one["status"].get("containerStatuses", []) for one in found]
        return {**statuses[0][0], "ip": found[0]["status"].get("podIP", "")} if statuses and statuses[0] else {}

    def until(self, what: str, key: str) -> str:
        """Wait for a word about the pod, and give its address and the word."""
        try:
            wait_for(what, lambda: key in json.dumps(self.pod()))
        except AssertionError as e:
            reported = self.kubectl("get", "events,pods", check=False)
            said = self.kubectl("logs", POD, "--all-containers", check=False)
            raise AssertionError(f"{e}\n{reported}\n{said[-2000:]}") from None
        return str(self.pod()["ip"])

    def begin(self, *names: str) -> subprocess.Popen[str]:
        """The other cluster's node asks, from this node's network, where the pod is reached."""
        command = ["ip", "netns", "exec", NAME, *self.bridge.command("renew", *names)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def renew(self, *names: str) -> tuple[int, str]:
        """The same, until it has ended: exit code and output."""
        with self.begin(*names) as run:
            said, _ = run.communicate(timeout=400)
        return run.returncode, said

    @property
    def state(self) -> Path:
        """The door's state directory, on its volume."""
        return self.node.root / "var/lib/kubelet/door/state"

    def events(self) -> list[str]:
        """The record so far."""
        return [json.loads(line)["event"] for line in (self.state / "audit.jsonl").read_text().splitlines()]

    def begun(self) -> int:
        """How many requests the door has begun, and not answered."""
        with closing(sqlite3.connect(self.state / "door.db")) as database:
            query = "SELECT count(*) FROM requests WHERE state != 'answered' AND begun IS NOT NULL"
            return int(database.execute(query).fetchone()[0])

    def takes_requests(self, address: str) -> bool:
        """Whether something listens there."""
        probe = f"import socket; socket.create_connection(({address!r}, 9443), 5).close()"
        command = ["ip", "netns", "exec", NAME, sys.executable, "-c", probe]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def signed(self) -> int:
        """How many certificates the other cluster's CA has signed; its mount keeps each."""
        return len(self.bao.request("LIST", f"{MOUNTS['ca']}/certs").json()["data"]["keys"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """All but the pod, as the manifests' own comments have it."""
    directory = tmp_path_factory.mktemp("site")
    image = directory / "ca-bridge.tar"
    built = subprocess.run([ROOT / "scripts/image", "--serve", image], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    tls = make_tls(directory / "tls", sans=["127.0.0.1", IP, *(f"10.244.77.{last}" for last in range(2, 32))])
    bridge = Bridge(pki=handmade_pki(directory / "node", node="cp-1"), directory=directory / "bridge")
    with ExitStack() as stack:
        bao = stack.enter_context(openbao.tls_server(tls.server_cert, tls.server_key, tls.ca))
        node = stack.enter_context(Node.up(NAME, IP))
        make_ready(node, plugin=programs.KIT / "cni.sh")
        node.kubectl("taint", "nodes", NAME, "node-role.kubernetes.io/control-plane-")
        import_image(node, image)
        port = urlsplit(bao.url).port or 0
        stack.enter_context(door(node, port, IP))
        files = node.kubeconfig_dir / "site"
        files.mkdir()
        (node.root / "var/lib/kubelet/door").mkdir()
        role_id, secret_id = prepare(bao, bridge, node)
        (files / "role-id").write_text(role_id)
        (files / "secret-id").write_text(secret_id)
        for source, name in ((tls.ca, "vault-ca.crt"), (tls.server_cert, "serve.crt"), (tls.server_key, "serve.key")):
            shutil.copy(source, files / name)
        config = (SHIPPED / "10-config.yaml").read_text().replace("vault.corp.example:8200", f"{IP}:{port}")
        found = Site(node=node, bao=bao, bridge=bridge, tls=tls, files=files, config=config)
        found.apply((SHIPPED / "00-namespace.yaml").read_text())
        found.apply(VOLUME)
        make_secrets(found)
        yield found


def prepare(bao: OpenBao, bridge: Bridge, node: Node) -> tuple[str, str]:
    """The other cluster's CAs and this one's in mounts with roles; the AppRole of the door."""
    live = live_certificates(bridge.pki)
    bao.add_ca(OWN, (node.pki_dir / "ca.crt").read_bytes(), (node.pki_dir / "ca.key").read_bytes())
    bao.add_policy(OWN, vault_setup.policy(OWN, ()))
    for authority, mount in MOUNTS.items():
        bao.add_ca(mount, *bridge.pki.ca_pem(authority))
        theirs = {name: one for name, one in live.items() if SPECS[name].authority.name == authority}
        roles = bao.add_kubeadm_roles(mount, theirs, VALIDITY)
        bao.add_policy(mount, vault_setup.policy(mount, roles))
    return bao.add_approle("door", OWN, *MOUNTS.values())


def make_secrets(site: Site) -> None:
    """By the commands that stand above the ConfigMap."""
    commands = re.findall(r"^# +kubectl (.*)$", site.config, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = [
            re.sub(r"(--from-file|--cert|--key)=", r"\1=/etc/kubernetes/site/", word) for word in shlex.split(command)
        ]
        site.kubectl(*words[2:])


def test_a_door_of_its_own_cluster_ends(site: Site) -> None:
    """With OpenBao's mount of the CA of the cluster in which its pod is, the container exits with 5, and says why."""
    site.apply(site.config.replace(f'"{MOUNTS["ca"]}"', f'"{OWN}"'))
    site.apply((SHIPPED / "20-door.yaml").read_text())
    site.until("the door's refusal", '"exitCode": 5')
    logs = (("logs", POD, "--previous"), ("logs", POD))
    said = "this door runs inside the cluster it signs for"
    wait_for("its words", lambda: any(said in site.kubectl(*look, check=False) for look in logs))


def test_it_serves_another_cluster(site: Site) -> None:
    """Without root, capabilities or anything else to write to; a node's renewal is signed, kept, and signed after a restart."""
    site.apply(site.config)
    site.kubectl("delete", "pod", POD)
    address = site.until("a door that is ready", '"ready": true')
    site.bridge.add(
        "backend.door",
        {
            "type": "door",
            "url": f"https://{address}:9443",
            "ca_file": str(site.tls.ca),
            "wait": "2m",
            "retry_for": "1s",
        },
    )
    for authority in AUTHORITIES:
        site.bridge.add(f"authority.{authority}", {"backend": "door"})
    before = live_certificates(site.bridge.pki)
    code, said = site.renew("apiserver", "etcd-server", "front-proxy-client")
    assert code == Exit.DONE, f"{said}\n{site.kubectl('logs', POD)}"
    after = live_certificates(site.bridge.pki)
    assert {name for name in after if after[name] != before[name]} == {"apiserver", "etcd-server", "front-proxy-client"}

    assert site.events() == [SIGNED] * 3
    assert "cp-1" in site.kubectl("exec", POD, "--container=door", "--", "ca-bridge", "fleet")


def test_a_deleted_pod_loses_nothing(site: Site) -> None:
    """While its CA hangs it ends by SIGTERM; the next one has its record and what waits, and the CA signs that once."""
    address, name = site.until("a door that is ready", '"ready": true'), "apiserver-kubelet-client"
    config, container = site.bridge.config, site.pod()["containerID"]
    events, signed = site.events(), site.signed()
    before = live_certificates(site.bridge.pki)[name]
    site.bao.process.send_signal(signal.SIGSTOP)
    try:
        run = site.begin(name)
        wait_for("a request that the door has begun", site.begun)
        site.kubectl("delete", "pod", POD, "--wait=false")
        wait_for("a door that takes no request", lambda: not site.takes_requests(address))
    finally:
        site.bao.process.send_signal(signal.SIGCONT)
    wait_for("the next pod", lambda: site.pod().get("containerID", container) != container)
    again = site.until("the next door", '"ready": true')
    with run:
        run.communicate(timeout=400)
    config.write_text(config.read_text().replace(address, again))
    if run.returncode != Exit.DONE:  # the answer came too late for the run, and is there for the next one
        assert site.renew(name)[0] == Exit.DONE
    assert live_certificates(site.bridge.pki)[name] != before
    assert site.signed() == signed + 1
    assert site.events()[: len(events)] == events
    assert site.events().count(SIGNED) == events.count(SIGNED) + 1
    assert site.begun() == 0


def test_it_may_do_nothing(site: Site) -> None:
    """What the kernel says of the process: another user than root, no capability, no new privileges, system calls filtered."""
    assert_confined(site.node, "door")
