"""
A real cluster with an external CA whose kubelets get all their certificates from OpenBao through gateways.

One control plane and two workers that join by bootstrap token, `serverTLSBootstrap: true`, and an API server that
verifies kubelets. Two gateways run on this machine with the rights and policies of `setup kubernetes`; `Motion` kills
what they need at random, asks for certificates that the policy allows no client, and watches every kubelet's certificates.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import requests
from cryptography import x509

from bridge.gateway.rules import CLIENT_KUBELET, SERVING
from bridge.node.sample_pki import ThrowawayCA
from bridge.pki.certificates import san_entries
from bridge.words import counted
from tests.kit import est, gateways, openbao
from tests.kit.api_client import CSRS, ApiClient
from tests.kit.cluster_api import ClusterApi
from tests.kit.gateways import Gateway, Place, csr_pem, node_subject
from tests.kit.issuing import Signer
from tests.kit.node import Node
from tests.kit.nodes import wait_for
from tests.kit.openbao import OpenBao

ACCOUNT = "system:serviceaccount:ca-bridge:ca-bridge-gateway"
CLUSTER = """\
apiServer:
  extraArgs:
  - {name: kubelet-certificate-authority, value: /etc/kubernetes/pki/ca.crt}
"""
POLICY = f"""\
[allow]
clusters = ["kubernetes"]
nodes = ["*"]
max_validity = "{{validity}}"
[signer."{CLIENT_KUBELET}"]
bootstrap_groups = ["system:bootstrappers:kubeadm:default-node-token"]
[signer."{SERVING}"]
"""
#: A container that was killed again and again is started again soon: kubelets wait up to five minutes by default.
KUBELET = """\
serverTLSBootstrap: true
crashLoopBackOff: {maxContainerRestartPeriod: 5s}
"""
#: Where a kubelet keeps what it uses, by what it is for.
CURRENT = {"client": "kubelet-client-current.pem", "serving": "kubelet-server-current.pem"}


@dataclass(kw_only=True)
class GatewayCluster:
    """All of it."""

    nodes: list[Node]  #: The control plane first.
    api: ClusterApi
    bao: OpenBao
    place: Place
    gateways: dict[str, Gateway] = field(default_factory=dict)
    manifests: Path = Path()  #: What `setup kubernetes` wrote.

    @property
    def control_plane(self) -> Node:
        """The first one."""
        return self.nodes[0]

    @property
    def admin(self) -> ApiClient:
        """An administrator; one for each thread."""
        pair = self.api.credentials("kubernetes-super-admin", "system:masters")
        return ApiClient(url=self.api.url, trust=self.api.pki_dir / "ca.crt", pair=pair)

    def start_gateway(self, name: str) -> Gateway:
        """One more replica, or one again."""
        self.gateways[name] = self.place.start(name)
        return self.gateways[name]

    def holder(self) -> str | None:
        """The name of the gateway that works; None while none does."""
        return next(
            (name for name, one in self.gateways.items() if one.process.poll() is None and one.is_working()), None
        )

    def certificate(self, node: Node, kind: str) -> x509.Certificate | None:
        """What a kubelet uses; None until it has one."""
        pki = node.root / "var/lib/kubelet/pki"
        with contextlib.suppress(OSError, ValueError):
            target = (pki / CURRENT[kind]).readlink()
            return x509.load_pem_x509_certificate((pki / target.name).read_bytes())
        return None

    def has_short(self, node: Node, kind: str) -> bool:
        """One of the gateway's: the first that a control plane's kubelet has is kubeadm's, and lives a year."""
        found = self.certificate(node, kind)
        return found is not None and found.not_valid_after_utc - found.not_valid_before_utc < timedelta(hours=1)

    def apply(self, text: str) -> None:
        """Manifests in YAML."""
        (self.control_plane.kubeconfig_dir / "apply.yaml").write_text(text)
        self.control_plane.kubectl("apply", "-f", "/etc/kubernetes/apply.yaml")

    def kill_api_server(self) -> bool:
        """As the kernel would, for want of memory; its kubelet starts another one. False: none ran."""
        found = self.control_plane.crictl(
            "ps", "--name", "kube-apiserver", "--state", "running", "--quiet"
        ).stdout.split()
        template = ("inspect", "--output", "go-template", "--template", "{{.info.pid}}")
        for container in found:
            with contextlib.suppress(ProcessLookupError, ValueError):  # it has just ended
                os.kill(int(self.control_plane.crictl(*template, container, check=False).stdout), signal.SIGKILL)
                return True
        return False


@contextlib.contextmanager
def running(place_dir: Path, *, validity: str, number: int = 140) -> Iterator[GatewayCluster]:
    """
    The cluster with one gateway that works and one that stands by; all kubelets have both certificates.

    Args:
        place_dir: For files; made if it is not there.
        validity: Of the certificates, as the policy has it.
        number: Of the first node's address; the others follow.
    """
    ips = [f"198.18.77.{number + step}" for step in range(3)]
    names = [f"gw{os.getpid() % 10_000:04}-{role}" for role in ("cp", "w1", "w2")]
    keys = place_dir / "ca-keys"
    with contextlib.ExitStack() as stack:
        bao = stack.enter_context(_openbao(place_dir / "bao"))
        first = stack.enter_context(Node.up(names[0], ips[0], ca_dir=keys, cluster=CLUSTER, kubelet=KUBELET))
        api = api_of(ips[0], keys, place_dir / "api")
        place = _place(api, bao, place_dir, validity, dict(zip(names, ips, strict=True)))
        cluster = GatewayCluster(nodes=[first], api=api, bao=bao, place=place)
        stack.callback(_end_gateways, cluster)
        _install_manifests(cluster, place_dir)
        refused = first.kubectl("logs", "--namespace=kube-system", f"kube-apiserver-{names[0]}", check=False)
        assert refused.returncode, "wanted no way to a kubelet without a serving certificate"
        gateway = cluster.start_gateway("one")
        gateway.until(gateway.is_working, 180, "wanted it to work")
        cluster.start_gateway("two")
        for name, ip in zip(names[1:], ips[1:], strict=True):
            cluster.nodes.append(stack.enter_context(Node.worker(name, ip, first, form="token")))
        for node, kind in itertools.product(cluster.nodes, CURRENT):
            wait_for(f"a short {kind} certificate of {node.name}", lambda: cluster.has_short(node, kind))  # noqa: B023
        yield cluster


def _end_gateways(cluster: GatewayCluster) -> None:
    for gateway in cluster.gateways.values():
        if gateway.process.poll() is None:
            gateway.kill()


@contextlib.contextmanager
def _openbao(files_dir: Path) -> Iterator[OpenBao]:
    """With storage on disk, so that it may be killed and started again."""
    tls = est.make_tls(files_dir)
    with openbao.tls_server(tls.server_cert, tls.server_key, tls.ca) as server:
        yield server


def api_of(ip: str, keys: Path, files_dir: Path) -> ClusterApi:
    """The node's API server, and the clients that its CA makes."""
    (files_dir / "kubernetes/pki").mkdir(parents=True)
    certificate, key = (keys / "ca.crt").read_bytes(), (keys / "ca.key").read_bytes()
    signer = Signer.load(certificate, key)
    ca = ThrowawayCA(certificate=signer.certificate, key=signer.key)
    (files_dir / "kubernetes/pki/ca.crt").write_bytes(certificate)
    return ClusterApi(directory=files_dir, ca=ca, cas={"ca": ca}, port=6443, host=ip)


def _place(api: ClusterApi, bao: OpenBao, files_dir: Path, validity: str, nodes: Mapping[str, str]) -> Place:
    first, *_ = nodes
    inventory = ['[cluster]\nendpoints = ["api.example.com"]\nservice_networks = ["10.96.0.0/12"]\n']
    inventory.append(f'[node.{ASKS}]\naddresses = ["198.18.77.250"]\n')
    for name, ip in nodes.items():
        inventory.append(f'[node.{name}]\naddresses = ["{ip}"]\n' + ("control_plane = true\n" if name == first else ""))
    place = Place(
        cluster=api, directory=files_dir / "gateways", user=ACCOUNT, policy=POLICY.replace("{validity}", validity),
        inventory="".join(inventory),
        gateway={"lease_namespace": "ca-bridge", "lease_duration": "5s", "min_validity": "1m", "node_rate": 60},
    ).with_vault(bao)  # fmt: skip
    place.tables = [table.replace("url = ", f'ca_file = "{bao.verify}"\nurl = ') for table in place.tables]
    return place


def _install_manifests(cluster: GatewayCluster, files_dir: Path) -> None:
    """What `setup kubernetes` prints, but for the pods."""
    config = cluster.place.write()
    program = str(Path(sys.executable).with_name("ca-bridge"))
    cluster.manifests = out = files_dir / "manifests"
    subprocess.run(
        [program, "setup", "kubernetes", "--config", str(config), "-o", str(out)], check=True, capture_output=True
    )
    for name in ("00-namespace", "10-rbac", "20-admission"):
        cluster.apply((out / f"{name}.yaml").read_text())


# --- motion -----------------------------------------------------------------------------------------------------------


#: Requests with as many annotations as the admission policy lets through: the queue has room for 900.
_BURST = 1_200
#: A node of the inventory that has no kubelet: its certificates say how long an honest request waits.
ASKS = "asks"
#: After a kill everything works again by then.
_UPSET_SECONDS = 30.0
_SOON_SECONDS = 10.0


@dataclass(kw_only=True)
class Figures:
    """What was seen."""

    seconds: float = 0
    rotations: Counter[str] = field(default_factory=Counter)  #: By node and kind.
    least_left: dict[str, float] = field(default_factory=dict)  #: Seconds that a certificate in use had left, at least.
    kills: Counter[str] = field(default_factory=Counter)
    hostile: Counter[str] = field(default_factory=Counter)  #: By what became of them.
    takeovers: list[float] = field(default_factory=list)  #: Seconds until another gateway worked.
    outages: list[float] = field(default_factory=list)  #: Seconds that the API server did not answer.
    flooded: int = 0  #: Large requests of one worker.
    most_mb: float = 0  #: DoorDatabase of a gateway.
    waited: list[float] = field(default_factory=list)  #: Seconds until an honest request was answered, nothing killed.
    waited_upset: list[float] = field(default_factory=list)  #: The same with a kill shortly before or meanwhile.
    untrue: list[str] = field(default_factory=list)  #: What a gateway said of its health that was not so.
    signed: int = 0
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """For a page."""
        yield f"{self.seconds:.0f} s"
        yield f"rotations: {sum(self.rotations.values())} ({', '.join(f'{k} {v}' for k, v in sorted(self.rotations.items()))})"
        yield f"shortest remaining lifetime of a certificate in use: {min(self.least_left.values(), default=0):.0f} s"
        kills = [f"{kind} {counted(count, 'time')}" for kind, count in sorted(self.kills.items())]
        yield f"killed: {', '.join(kills)}"
        yield f"takeovers by another gateway: {len(self.takeovers)}, longest {max(self.takeovers, default=0):.1f} s"
        yield f"API server unreachable: {counted(len(self.outages), 'time')}, longest {max(self.outages, default=0):.0f} s"
        yield f"hostile requests: {', '.join(f'{kind} {count}' for kind, count in sorted(self.hostile.items()))}"
        if self.flooded:
            yield f"large requests from one worker: {self.flooded}, peak memory of a gateway {self.most_mb:.0f} MB"
        if self.waited:
            yield f"honest requests from another node: {len(self.waited)}, longest wait {max(self.waited):.1f} s"
            upset = f"{len(self.waited_upset)}, longest wait {max(self.waited_upset, default=0):.1f} s"
            yield f"honest requests with a kill during the wait, or up to {_UPSET_SECONDS:.0f} s before: {upset}"
            yield f"wrong reports of a gateway's health: {len(self.untrue)}"
        yield f"certificates signed: {self.signed}; wrong: {len(self.wrong)}"


class Motion:
    """Lets a cluster go on for a while, kills, asks and watches."""

    def __init__(self, cluster: GatewayCluster, seed: int, tell: Callable[[str], None] = lambda _: None) -> None:
        """Prepare; `tell` gets what was seen by then, once a minute."""
        self._cluster = cluster
        self._tell = tell
        self._random = random.Random(seed)  # noqa: S311 (to kill by, not to hide by)
        self._end = threading.Event()
        self._admin = cluster.admin  # whose certificate is made here, and not by two threads at once
        self._pair = cluster.api.credentials(f"system:node:{cluster.nodes[1].name}", "system:nodes")
        self._upset = time.monotonic()  #: When something was killed last.
        self._known: dict[str, int] = {}
        self._objects: dict[str, dict[str, Any]] = {}  #: By uid, as each was last seen: the cluster clears them away.
        self.figures = Figures()

    def run(
        self,
        seconds: float,
        kills: Mapping[float, str] | None = None,
        *,
        pause: float = 40,
        flood: bool = False,
        rotations: int = 0,
    ) -> Figures:
        """
        Let it go.

        Args:
            seconds: How long.
            kills: What to kill when, in seconds from the start; None: at random, all the time.
            pause: Between two at random, on average.
            flood: A worker fills the queues of the gateways with large requests, each minute anew.
            rotations: It goes on until so many certificates have been replaced, for twice as long at most.

        Raises:
            AssertionError: A thread could not go on.
        """
        errors: list[BaseException] = []

        def guarded(work: Callable[[], None]) -> Callable[[], None]:
            def go() -> None:
                try:
                    work()
                except BaseException as e:  # noqa: BLE001 (reported by the main thread)
                    errors.append(e)
                    self._end.set()

            return go

        began = time.monotonic()
        works = [self._watch, self._ask, self._collect, *([self._flood, self._wait] if flood else [])]
        threads = [threading.Thread(target=guarded(work)) for work in works]
        for thread in threads:
            thread.start()
        try:
            for moment, what in _planned(kills) if kills is not None else self._endless(pause):
                if self._end.wait(max(0.0, min(moment, seconds) - (time.monotonic() - began))) or moment >= seconds:
                    break
                self._kill(what)
            self._end.wait(max(0.0, seconds - (time.monotonic() - began)))
            self._go_on(rotations, began + 2 * seconds)
        finally:
            self._end.set()
            for thread in threads:
                thread.join()
        if errors:
            raise AssertionError(f"{errors[0]!r}\n{list(self.figures.lines())}") from errors[0]
        self.figures.seconds = time.monotonic() - began
        self._judge()
        return self.figures

    def _go_on(self, rotations: int, until: float) -> None:
        while len(self.figures.rotations) < rotations and time.monotonic() < until:
            if self._end.wait(1):
                return

    def _endless(self, pause: float) -> Iterator[tuple[float, str]]:
        moment = 0.0
        while True:
            moment += self._random.uniform(0.5, 1.5) * pause
            yield moment, self._random.choice(["gateway", "API server", "CA"])

    def _kill(self, what: str) -> None:
        cluster, self._upset = self._cluster, time.monotonic()
        if what == "gateway":
            name = wait_for("a gateway that works", cluster.holder, seconds=300)
            began = time.monotonic()
            cluster.gateways[name].kill()
            wait_for("another gateway that works", cluster.holder)
            self.figures.takeovers.append(time.monotonic() - began)
            cluster.start_gateway(name)
        elif what == "API server":
            wait_for("an API server to kill", cluster.kill_api_server, seconds=300)
        else:
            cluster.bao.stop()
            time.sleep(self._random.uniform(2, 10))
            cluster.bao.start_again()
        self._upset = time.monotonic()
        self.figures.kills[what] += 1

    def _watch(self) -> None:
        """Every half second each certificate in use: how long it has, and whether it is another one."""
        while not self._end.wait(0.5):
            for node, kind in itertools.product(self._cluster.nodes, CURRENT):
                certificate = self._cluster.certificate(node, kind)
                assert certificate is not None, f"{node.name} has no {kind} certificate any more"
                key = f"{node.name.partition('-')[2]} {kind}"
                left = (certificate.not_valid_after_utc - datetime.now(UTC)).total_seconds()
                self.figures.least_left[key] = min(left, self.figures.least_left.get(key, left))
                if self._known.setdefault(key, certificate.serial_number) != certificate.serial_number:
                    self.figures.rotations[key] += 1
                    self._known[key] = certificate.serial_number

    def _ask(self) -> None:
        """What a worker's kubelet may not have, as that kubelet."""
        worker, first = self._cluster.nodes[1], self._cluster.control_plane
        address = worker.ip
        own = [x509.DNSName(worker.name), x509.IPAddress(ip_address(address))]
        tries = itertools.cycle([
            (CLIENT_KUBELET, csr_pem([*node_subject(first.name), node_subject(worker.name)[1]])),
            (SERVING, csr_pem(node_subject(worker.name), [*own, x509.DNSName("kubernetes.default.svc")])),
            (SERVING, csr_pem(node_subject(worker.name), [*own, x509.IPAddress(ip_address(first.ip))])),
            (SERVING, csr_pem(node_subject(worker.name), [*own, x509.IPAddress(ip_address("10.96.0.1"))])),
            (SERVING, csr_pem(node_subject(worker.name))),
        ])  # fmt: skip
        who = self._kubelet()
        answered, away = time.monotonic(), False
        for number in itertools.count():
            if self._end.wait(2):
                return
            signer, text = next(tries)
            try:
                who.create_csr(text, signer, gateways.USAGES[signer], name=f"hostile-{number}")
            except (requests.RequestException, ValueError):  # it was killed
                away = True
                continue
            if away:
                self.figures.outages.append(time.monotonic() - answered)
            answered, away = time.monotonic(), False

    def _kubelet(self) -> ApiClient:
        """A client with the first worker's own rights, for one thread."""
        api = self._cluster.api
        return ApiClient(url=api.url, trust=api.pki_dir / "ca.crt", pair=self._pair)

    def _flood(self) -> None:
        """More large requests of one worker than the queue has room for; an administrator deletes them after a minute."""
        worker = self._cluster.nodes[1].name
        who, admin = self._kubelet(), self._cluster.admin
        text = csr_pem(node_subject(worker), [x509.DNSName("auth.company.example")])
        made = gateways.body(text, SERVING)
        made["metadata"] = {"labels": {"flood": "yes"}, "annotations": {"x": "x" * 24_000}}
        for number in itertools.count():
            if self._end.wait(0 if number % _BURST else 60):
                return
            with contextlib.suppress(requests.RequestException, ValueError):  # it was killed
                if number % _BURST == 0:
                    admin.ask("DELETE", f"{CSRS}?labelSelector=flood%3Dyes")
                made["metadata"]["name"] = f"hostile-flood-{number}"
                self.figures.flooded += who.ask("POST", CSRS, made).ok
            for gateway in self._cluster.gateways.values():
                with contextlib.suppress(OSError):  # it was killed, too
                    self.figures.most_mb = max(self.figures.most_mb, gateway.peak_mb())

    def _wait(self) -> None:
        """An honest node asks for a certificate every ten seconds, and looks at what the gateways say meanwhile."""
        api, admin = self._cluster.api, self._cluster.admin
        pair = api.credentials(f"system:node:{ASKS}", "system:nodes")
        who = ApiClient(url=api.url, trust=api.pki_dir / "ca.crt", pair=pair)
        wait_for("a node", lambda: _is_made(admin, "/api/v1/nodes", {"metadata": {"name": ASKS}}))
        for number in itertools.count():
            if self._end.wait(10):
                return
            made = gateways.body(csr_pem(node_subject(ASKS)), CLIENT_KUBELET, name=f"asks-{number}")
            wait_for("an API server", lambda: _is_made(who, CSRS, made), seconds=300)  # noqa: B023
            asked, reported = time.monotonic(), False
            while not self._is_answered(admin, f"asks-{number}"):
                is_late = time.monotonic() - max(asked, self._upset + _UPSET_SECONDS) > _SOON_SECONDS
                if is_late and not reported and (name := self._cluster.holder()):
                    reported = True
                    self.figures.untrue.append(f"{name} works, and asks-{number} waits")
                if self._end.wait(0.2):
                    return
            is_upset = self._upset > asked - _UPSET_SECONDS
            (self.figures.waited_upset if is_upset else self.figures.waited).append(time.monotonic() - asked)
            if not is_upset:
                self._look_at_health()

    def _is_answered(self, admin: ApiClient, name: str) -> bool:
        with contextlib.suppress(requests.RequestException, ValueError, KeyError):
            return bool(gateways.chain(admin.csr(name)))
        return False

    def _look_at_health(self) -> None:
        """Nothing was killed for a while, and a certificate has just come: all replicas are well."""
        pages = {
            (name, page): one.page(page)
            for name, one in self._cluster.gateways.items()
            for page in ("healthz", "readyz")
        }
        if self._upset < time.monotonic() - _UPSET_SECONDS:
            self.figures.untrue += [f"{key}: {said}" for key, said in pages.items() if said[0] != 200]

    def _collect(self) -> None:
        """Once a minute all objects: those whose certificate has ended are cleared away by the hour."""
        admin = self._cluster.admin
        while not self._end.wait(60):
            self._objects |= {one["metadata"]["uid"]: one for one in _objects(admin) or ()}
            self._tell("; ".join(self.figures.lines()))

    def _judge(self) -> None:
        """Judge every object that there was: its certificate has to fit the inventory, whatever the request said."""
        addresses = {ASKS: ""} | {node.name: node.ip for node in self._cluster.nodes}
        admin = self._cluster.admin
        last = wait_for("the API server", lambda: _objects(admin), seconds=300)
        self._objects |= {one["metadata"]["uid"]: one for one in last}
        for one in self._objects.values():
            name, state = one["metadata"]["name"], gateways.state_of(one)
            if name.startswith("hostile-"):
                self.figures.hostile[state] += 1
            for certificate in gateways.chain(one)[:1]:
                self.figures.signed += 1
                common = certificate.subject.rfc4514_string()
                owner = next((node for node in addresses if common == f"CN=system:node:{node},O=system:nodes"), None)
                sans = set(san_entries(certificate))
                may = {("DNS", owner), ("IP", addresses.get(owner or "", ""))}
                if name.startswith("hostile-") or owner is None or not sans <= may:
                    self.figures.wrong.append(f"{name}: {common} {sans}")


def _planned(kills: Mapping[float, str]) -> Iterator[tuple[float, str]]:
    yield from sorted(kills.items())


def _is_made(who: ApiClient, path: str, document: dict[str, Any]) -> bool:
    """Whether the object is there; an API server that was killed may have made it."""
    with contextlib.suppress(requests.RequestException, ValueError):
        return who.ask("POST", path, document).status in {201, 409}
    return False


def _objects(admin: ApiClient) -> list[dict[str, Any]] | None:
    with contextlib.suppress(requests.RequestException, ValueError):
        reply = admin.ask("GET", CSRS)
        if reply.status == 200:
            return list(reply.document["items"])
    return None
