"""
A real kubeadm node whose one way to the CAs is a door on another machine: its first certificates, and all the next ones.

The policy has a person approve super-admin.conf: the first time in the terminal, then in headless Chromium.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from bridge.errors import Exit
from bridge.specs import AUTHORITIES
from bridge.system.waiting import wait_until
from tests.kit import chromium
from tests.kit import node as kit
from tests.kit.cas import live_certificates
from tests.kit.day_zero import Machine, Walk, cluster_configuration, policy
from tests.kit.key_watch import KeyWatch
from tests.kit.node import AT_ONCE, Node
from tests.kit.nodes import NodePki, is_ready, make_ready, wait_for
from tests.kit.people import Team, make_team
from tests.kit.pki import handmade_pki
from tests.kit.serving import CA_BRIDGE, ServeProgram

pytestmark = [
    pytest.mark.node,
    pytest.mark.slow,
    pytest.mark.skipif(
        not chromium.is_here(), reason="needs root, chromium and certutil; install chromium libnss3-tools"
    ),
]

NAME, IP = f"dn-{os.getpid() % 100_000}", "198.18.77.201"
DOORS_NAME, DOORS_IP = f"dr-{os.getpid() % 100_000}", "198.18.77.202"
_PATIENCE = timedelta(minutes=3)
_DESKTOP, _PHONE = (1280, 900), (390, 844)
_NO_SIDEWAYS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
_TAB, _ENTER = ("Tab", 9), ("Enter", 13, "\r")
APPROVALS = """
[certificate."super-admin.conf"]
approval = "required"
[approvals]
approvers = ["alice"]
"""
#: All of a node's settings but its state directory; what it gets of the CAs is the door's CA certificate.
SETTINGS = """\
[backend.door]
type = "door"
url = "{door.url}"
ca_file = "{door.ca}"
wait = "1s"
enrolment_file = "{secret}"

{authorities}
[restart]
method = "static-pods"
components = "needed"
min_interval = "1s"

[restart.commands]
kubelet = "systemctl restart kubelet"
"""


@dataclass(kw_only=True)
class AtTheDoor:
    """As `bootstrap` sees the CAs; what waits is approved by alice in the terminal."""

    team: Team
    tables: str
    alice: dict[str, Path]  #: Her certificate and key.
    certificates: dict[str, bytes] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)  #: What was on the node while people had not decided.
    look: Callable[[], list[str]] = list  #: What is there now.

    def prepare(self, *_: object) -> None:
        """The policy is there."""

    def answer(self) -> None:
        """Approve what waits, and wait until it is signed."""
        self.before = self.look()
        case = self.waiting()
        run = self.team.run(self.alice, "approve", case, "--reason", "a new node")
        assert run.returncode == Exit.DONE, run.stderr
        self.signed(case)

    def waiting(self) -> str:
        """The digest of the one request that people decide about, once it is there."""

        def digests() -> list[str]:
            shown = self.team.ask(self.alice, "GET", "/v1/approvals")
            assert shown.status == 200, shown
            return [one["digest"] for one in shown.document["requests"]]

        [found] = wait_until(digests, bool, _PATIENCE, pause_seconds=0.1)
        return found

    def signed(self, digest: str) -> None:
        """Wait until the request's answer is there."""

        def state() -> str:
            return str(self.team.ask(self.alice, "GET", f"/v1/approvals/{digest}").document["state"])

        assert wait_until(state, lambda one: one == "answered", _PATIENCE, pause_seconds=0.1) == "answered"


@dataclass(frozen=True, kw_only=True)
class Site:
    """A node that has become one through the door, and the door's machine beside it."""

    machine: Machine
    cas: AtTheDoor
    watch: KeyWatch  #: Of all that ca-bridge, kubeadm and the kubelet write on the node, for the CAs' keys.

    @property
    def pki(self) -> NodePki:
        """The node's; the CAs' keys are at the door."""
        return NodePki(root=self.machine.node.root, external=True, keys=self.cas.team.desk.directory)


def files_of(node: Node) -> dict[str, bytes]:
    """Certificates, keys and kubeconfigs, by path."""
    kubelets = node.root / "var/lib/kubelet/pki"
    paths = [*node.pki_dir.rglob("*"), *node.kubeconfig_dir.glob("*.conf"), *kubelets.glob("*")]
    return {str(path.relative_to(node.root)): path.read_bytes() for path in paths if path.is_file()}


@contextlib.contextmanager
def on_its_machine(door: ServeProgram, doors: Node) -> Iterator[None]:
    """The door in the network and with the files of its own machine, which no cluster knows."""
    pid = (kit.directory() / doors.name / "pid").read_text().strip()
    door.start(["nsenter", "--mount", "--net", f"--target={pid}", "--", CA_BRIDGE])
    try:
        yield
    finally:
        if door.process is not None and door.process.poll() is None:
            door.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """`enroll` at the door; `bootstrap init` and `kubeadm init` on the node, as docs/day-0.md has it."""
    directory = tmp_path_factory.mktemp("site")
    elsewhere = handmade_pki(directory / "elsewhere")
    team = make_team(directory, elsewhere, policy({NAME: IP}) + APPROVALS, address=DOORS_IP)
    secret = directory / "node" / "enrolment"
    with (
        Node.host(DOORS_NAME, DOORS_IP) as doors,
        on_its_machine(team.door, doors),
        Node.host(NAME, IP) as node,
    ):
        authorities = "".join(f'[authority.{name}]\nbackend = "door"\n\n' for name in AUTHORITIES)
        tables = SETTINGS.format(door=team.door, secret=secret, authorities=authorities)
        cas = AtTheDoor(team=team, tables=tables, alice=team.agent("alice"), look=lambda: sorted(files_of(node)))
        machine = Machine(node=node, directory=directory / "node", cas=cas, walk=Walk())
        run = team.desk.run("enroll", NAME)
        assert run.returncode == Exit.DONE, run.stderr
        secret.touch(mode=0o600)
        secret.write_text(run.stdout)
        known = [x509.load_pem_x509_certificate(elsewhere.ca_pem(name)[0]) for name in AUTHORITIES]
        places = (node.kubeconfig_dir, node.root / "var/lib/kubelet", machine.directory)
        with KeyWatch(places, known) as watch:
            office = directory / "office"
            office.mkdir()
            (office / "cluster.yaml").write_text(f"{cluster_configuration(machine)}{AT_ONCE}\n")
            began(machine, office / "cluster.yaml")
            yield Site(machine=machine, cas=cas, watch=watch)


def began(machine: Machine, cluster: Path) -> None:
    """
    Day 0.

    Raises:
        AssertionError: A step did not end as it should; with the node's logs.
    """
    try:
        machine.until_done("bootstrap init", "init", "--kubeadm-config", cluster)
        machine.timed("kubeadm init", lambda: machine.kubeadm("init", "--config", "/etc/kubernetes/kubeadm.yaml"))
        make_ready(machine.node)
    except AssertionError as e:
        raise AssertionError(f"{e}\n{machine.node.logs()}") from None


def test_a_node_begins_with_a_one_time_secret(site: Site) -> None:
    """Nothing of a CA was on it before a person approved; then its control plane runs, and is proven."""
    machine = site.machine
    print(machine.walk.seconds)
    assert site.cas.before == []
    assert len(site.cas.team.desk.issued()) == 13
    proof = machine.alone("prove", "--wait", "3m")
    assert proof.returncode == Exit.DONE, proof.stdout
    assert [one["evidence"] for one in approvals(site)] == ["signature"]


def test_it_is_renewed_whole_once_a_person_has_approved(site: Site, tmp_path: Path) -> None:
    """While super-admin.conf waits no file moves; alice approves by keyboard, and the next run installs, restarts, proves."""
    machine, cas, desk = site.machine, site.cas, site.cas.team.desk
    old, files = live_certificates(site.pki), files_of(machine.node)
    waiting = machine.alone("renew", "all")
    assert waiting.returncode == Exit.WAITING, waiting.stderr
    assert "people decide about request" in waiting.stdout
    assert files_of(machine.node) == files

    case = cas.waiting()
    shown = approved_in_chromium(site, tmp_path, case)
    assert f"This gives {NAME} the certificate of super-admin.conf, in the group system:masters, which may" in shown, (
        shown
    )
    cas.signed(case)
    done = machine.alone("renew", "all", "-o", "json")
    assert done.returncode == Exit.DONE, done.stderr
    new, result = live_certificates(site.pki), json.loads(done.stdout)
    assert {name for name, one in new.items() if one != old[name]} == set(old)
    kept = {path for path, content in files_of(machine.node).items() if ".crt" in path and content == files[path]}
    assert kept == {f"etc/kubernetes/pki/{name}.crt" for name in ("ca", "etcd/ca", "front-proxy-ca")}
    assert result["proven"] > 10, result
    restarted = {text.partition(" ")[0] for text in result["restarted"]}
    assert {"kube-controller-manager", "kube-scheduler", "kubelet"} <= restarted, result
    assert machine.alone("prove", "--wait", "3m").returncode == Exit.DONE
    machine.node.exec("kubeadm", "certs", "check-expiration")
    # a kubelet that has just begun says for a moment that its container runtime is not there
    wait_for("a node that is Ready", lambda: is_ready(machine.node))

    fleet = desk.run("fleet", "-o", "json")
    assert [(one["node"], one["state"]) for one in json.loads(fleet.stdout)["nodes"]] == [(NAME, "ok")]
    assert desk.run("audit", "verify").returncode == Exit.DONE
    assert [one["evidence"] for one in approvals(site)] == ["signature", "door"]
    assert (len(desk.issued()), site.watch.found) == (26, [])
    assert site.watch.seen > len(files)


def approvals(site: Site) -> list[dict[str, Any]]:
    """What the door's audit log has of people's decisions."""
    lines = (site.cas.team.desk.state / "audit.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["event"] == "approved"]


def approved_in_chromium(site: Site, directory: Path, case: str) -> str:
    """Alice looks at the list and the request, on a desktop and a phone, and approves; what the request's page said."""
    url = site.cas.team.door.url
    shots = Path(os.environ.get("CA_BRIDGE_SHOTS") or directory)
    with chromium.browsing(directory / "browser", site.cas.team.door.ca, site.cas.alice, url) as browser:
        for width, height in (_PHONE, _DESKTOP):
            browser.look(width, height)
            for name, path in (("list", "/approvals"), ("case", f"/approvals/{case}")):
                browser.open(f"{url}{path}")
                browser.screenshot(shots / f"node-{name}-{width}.png")
                assert browser.value(_NO_SIDEWAYS) is True, (name, width)
        text = str(browser.value("document.body.innerText"))
        browser.value("document.querySelector('#reason').focus()")
        browser.write("change 4711")
        browser.key(*_TAB)
        assert browser.value("document.activeElement.innerText") == "Approve"
        browser.key(*_ENTER)
        browser.await_event("Page.loadEventFired")
        assert "alice approved it" in browser.value("document.body.innerText")
    return text
