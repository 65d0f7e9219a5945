"""The whole of day 0 on real machines: from nothing to a cluster, by the commands of docs/day-0.md, with real CAs."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.errors import Exit
from bridge.pki.certificates import load_pem_certificates
from bridge.specs import AUTHORITIES
from tests.kit import node as kit
from tests.kit import opensslca, programs
from tests.kit.desks import Desk
from tests.kit.key_watch import KeyWatch
from tests.kit.node import Node
from tests.kit.nodes import wait_for
from tests.kit.openbao import OpenBao
from tests.kit.pki import Pki

#: What a machine of the kit lacks beside a real one, and kubeadm looks for; nothing of it is about certificates.
LACKING = (
    "SystemVerification,Swap,Hostname,Service-Kubelet,FileContent--proc-sys-net-ipv4-ip_forward,NumCPU,Mem,"
    "FileExisting-conntrack,FileExisting-crictl,FileExisting-tc,FileExisting-iptables,FileExisting-ethtool,"
    "FileExisting-socat,FileExisting-ip,FileExisting-mount,FileExisting-losetup,KubeletVersion,ImagePull,CRI,"
    "ContainerRuntimeVersion,IsPrivilegedUser"
)
VERSION = "v1.37.2"
_KUBELET_PORT = 10250


@dataclass(kw_only=True)
class Machine:
    """One that is to become a node; ca-bridge and kubeadm run on it, the CAs are elsewhere."""

    node: Node
    directory: Path  #: Settings and state, seen by both.
    cas: CAs
    walk: Walk

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True)
        self.config.write_text(f'[node]\nstate_dir = "{self.directory}/state"\n\n{self.cas.tables}')

    @property
    def config(self) -> Path:
        """The settings file."""
        return self.directory / "config.toml"

    @property
    def socket(self) -> str:
        """The container runtime's."""
        return f"unix://{kit.directory()}/{self.node.name}/run/containerd.sock"

    def alone(self, *args: str | Path) -> subprocess.CompletedProcess[str]:
        """ca-bridge as cron runs it: wholly on the node."""
        program = Path(sys.executable).with_name("ca-bridge")
        runtime = {"CRI_CONFIG_FILE": "/etc/kubernetes/crictl.yaml", "LC_ALL": "C.UTF-8"}
        return self.node.exec(program, *args, "--config", self.config, check=False, timeout_seconds=400, env=runtime)

    def ca_bridge(self, *args: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
        """With the node's files and this host's network, where the CAs are."""
        pid = (kit.directory() / self.node.name / "pid").read_text().strip()
        program = Path(sys.executable).with_name("ca-bridge")
        words = ["nsenter", "--mount", f"--target={pid}", "--", program, *args, "--config", self.config]
        path = f"{programs.directory()}:{os.environ['PATH']}"
        return subprocess.run(
            list(map(str, words)),
            capture_output=True,
            text=True,
            check=False,
            input=given,
            timeout=300,
            env={**os.environ, "LC_ALL": "C.UTF-8", "PATH": path},
        )

    def kubeadm(self, *args: str) -> subprocess.CompletedProcess[str]:
        """As an operator runs it, but for what the machine lacks."""
        return self.node.exec("kubeadm", *args, "--ignore-preflight-errors", LACKING, check=False, timeout_seconds=600)

    def init(self, office: Path) -> None:
        """The first node, as docs/day-0.md has it."""
        self.until_done(
            "bootstrap init", "init", "--kubeadm-config", office / "cluster.yaml", "--ca-dir", office / "cas"
        )
        self.timed("kubeadm init", lambda: self.kubeadm("init", "--config", "/etc/kubernetes/kubeadm.yaml"))

    def join(self, first: Machine, office: Path, *, control_plane: bool) -> None:
        """A further one: an order, what the first one shares, and what the operator wants besides."""
        role = () if control_plane else ("--worker",)
        shared = self.timed("bootstrap share", lambda: first.ca_bridge("bootstrap", "share", *role))
        own = self.join_configuration(control_plane=control_plane)
        options = ("--order", office / f"orders/{self.node.name}.order.json", "--shared", "-", "--kubeadm-config", own)
        self.until_done("bootstrap join", "join", *options, given=shared)
        self.timed("kubeadm join", lambda: self.kubeadm("join", "--config", "/etc/kubernetes/join.yaml"))

    def until_done(self, what: str, *args: str | Path, given: str = "") -> None:
        """Run it, and again when the answer has been carried."""
        began = time.monotonic()
        run = self.ca_bridge("bootstrap", *args, given=given)
        if run.returncode == Exit.WAITING:
            self.cas.answer()
            run = self.ca_bridge("bootstrap", *args, given=given)
        self.walk.step(f"{self.node.name}: {what}", run, began)

    def timed(self, what: str, run: Callable[[], subprocess.CompletedProcess[str]]) -> str:
        """A step that has to succeed; what it prints."""
        began = time.monotonic()
        return self.walk.step(f"{self.node.name}: {what}", run(), began)

    def patches(self) -> str:
        """A directory for kubeadm: each node of the kit has a cgroup root of its own."""
        directory = self.directory / "patches"
        directory.mkdir()
        (directory / "kubeletconfiguration+merge.yaml").write_text(f"{{cgroupRoot: /{self.node.name}}}\n")
        return str(directory)

    def join_configuration(self, *, control_plane: bool) -> Path:
        """The operator's part of it."""
        document: dict[str, object] = {
            "apiVersion": "kubeadm.k8s.io/v1beta4",
            "kind": "JoinConfiguration",
            "nodeRegistration": {
                "name": self.node.name,
                "criSocket": self.socket,
                "imagePullPolicy": "Never",  # there is no registry
                "kubeletExtraArgs": [{"name": "node-ip", "value": self.node.ip}],
            },
            "patches": {"directory": self.patches()},
            "timeouts": {"kubernetesAPICall": "5m0s"},
        }
        if control_plane:
            document["controlPlane"] = {"localAPIEndpoint": {"advertiseAddress": self.node.ip}}
        path = self.directory / "join.yaml"
        path.write_text(yaml.safe_dump(document))
        return path


def cluster_configuration(machine: Machine, version: str = VERSION, more: str = "") -> str:
    """kubeadm's file for the first node, with more lines of its ClusterConfiguration."""
    name, ip = machine.node.name, machine.node.ip
    return f"""\
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {{advertiseAddress: {ip}}}
nodeRegistration: {{name: {name}, criSocket: "{machine.socket}", imagePullPolicy: Never}}
timeouts: {{kubernetesAPICall: 5m0s}}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: {version}
controlPlaneEndpoint: {ip}:6443
encryptionAlgorithm: ECDSA-P256
{more}
---
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
rotateCertificates: false
cgroupDriver: cgroupfs
cgroupRoot: /{name}
failCgroupV1: false
failSwapOn: false
fileCheckFrequency: 20s
evictionHard: {{imagefs.available: "1%", nodefs.available: "1%", memory.available: 50Mi}}
"""


@dataclass(kw_only=True)
class Walk:
    """What was done, and how long each step took."""

    seconds: dict[str, float] = field(default_factory=dict)
    nodes: Mapping[str, Sequence[str]] = field(default_factory=dict)  #: Roles by name.
    members: int = 0  #: Of etcd.
    requests: int = 0  #: CertificateSigningRequest objects.
    seen: int = 0  #: Files that the watch looked at.

    def look(self, machine: Machine, nodes: Sequence[Node]) -> None:
        """What the cluster says of itself, once each kubelet has said that it is there; and what kubelets serve with."""
        wait_for("all nodes", lambda: len(nodes_of(machine)) == len(nodes))
        self.nodes = nodes_of(machine)
        for node in nodes:
            served = ssl.PEM_cert_to_DER_cert(wait_for("a kubelet that serves", lambda: _shown(node.ip)))  # noqa: B023
            [ours, *_] = load_pem_certificates((node.root / "var/lib/kubelet/pki/kubelet.crt").read_bytes())
            assert served == ours.public_bytes(Encoding.DER), f"{node.name}: its kubelet serves another certificate"
        found = machine.node.kubectl("get", "csr", "-o", "json").stdout
        self.requests = len(json.loads(found)["items"])
        pki = "/etc/kubernetes/pki/etcd"
        credentials = ("--cacert", f"{pki}/ca.crt", "--cert", f"{pki}/server.crt", "--key", f"{pki}/server.key")
        listed = machine.node.exec(
            "etcdctl", "--command-timeout=120s", *credentials, "member", "list", "-w", "json"
        ).stdout
        self.members = len(json.loads(listed)["members"])

    def step(self, what: str, run: subprocess.CompletedProcess[str], began: float) -> str:
        """
        Note a step.

        Raises:
            AssertionError: It did not end as it should.
        """
        self.seconds[what] = time.monotonic() - began
        assert run.returncode == 0, f"{what}: exit {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
        return run.stdout


def _shown(ip: str) -> str | None:
    with contextlib.suppress(OSError):  # its Node object is there a moment before it listens
        return ssl.get_server_certificate((ip, _KUBELET_PORT), timeout=120)
    return None


def policy(nodes: Mapping[str, str], allow: str = "") -> str:
    """A desk's, which lets these nodes have certificates with these addresses, with more lines for its `[allow]`."""
    addresses = list(nodes.values())
    service = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
    etcd = json.dumps(["{node}", "localhost", "127.0.0.1", "::1", *addresses])
    return (
        f"[allow]\nclusters = ['kubernetes']\nnodes = {json.dumps(list(nodes))}\nmasters = ['super-admin.conf']\n{allow}\n"
        f"[certificate.apiserver]\nsans = {json.dumps(['{node}', *service, '10.96.0.1', *addresses])}\n"
        f"[certificate.etcd-server]\nsans = {etcd}\n[certificate.etcd-peer]\nsans = {etcd}\n"
        f"[certificate.kubelet-server]\nsans = {json.dumps(['{node}', *addresses])}\n"
    )


def nodes_of(machine: Machine) -> Mapping[str, Sequence[str]]:
    """The cluster's nodes: the roles of each by name."""
    found = json.loads(machine.node.kubectl("get", "nodes", "-o", "json").stdout)["items"]
    prefix = "node-role.kubernetes.io/"
    return {
        one["metadata"]["name"]: [
            key.removeprefix(prefix) for key in one["metadata"]["labels"] if key.startswith(prefix)
        ]
        for one in found
    }


def hosts(stack: ExitStack, names: Mapping[str, str]) -> dict[str, Node]:
    """Machines before kubeadm, by name; they go with the stack."""
    return {name: stack.enter_context(Node.host(name, ip)) for name, ip in names.items()}


class CAs(Protocol):
    """Where the three CAs are; never on a node."""

    tables: str  #: Of a node's settings.
    certificates: dict[str, bytes]  #: PEM by authority; no node could ask for those of a desk.

    def prepare(self, roles: Sequence[str | Path], machines: Mapping[str, Machine], office: Office) -> None:
        """What the CAs' administrator does for these nodes."""

    def answer(self) -> None:
        """A person carries the waiting bundles."""


@dataclass(kw_only=True)
class Office:
    """An administrator's machine."""

    directory: Path
    tables: str
    walk: Walk

    def run(self, what: str, *args: str | Path) -> None:
        """A command of `bootstrap`, which has to succeed."""
        program, began = Path(sys.executable).with_name("ca-bridge"), time.monotonic()
        command = list(map(str, (program, "bootstrap", *args, "--config", self.directory / "config.toml")))
        self.walk.step(what, subprocess.run(command, capture_output=True, text=True, check=False, timeout=400), began)

    def orders(self, cluster: str, nodes: Sequence[str], certificates: Mapping[str, bytes]) -> list[str | Path]:
        """One for each node of a list, as options."""
        place = self.directory
        (place / "cas/etcd").mkdir(parents=True)
        (place / "config.toml").write_text(f'[node]\nstate_dir = "{place}/state"\n\n{self.tables}')
        (place / "cluster.yaml").write_text(cluster)
        (place / "nodes.txt").write_text("\n".join(nodes) + "\n")
        for name, pem in certificates.items():
            (place / "cas" / AUTHORITIES[name].certificate_file).write_bytes(pem)
        given = ("--nodes", place / "nodes.txt", "--kubeadm-config", place / "cluster.yaml", "--ca-dir", place / "cas")
        self.run("bootstrap orders", "orders", *given, "-o", place / "orders")
        return [word for path in sorted((place / "orders").iterdir()) for word in ("--order", path)]


@dataclass(kw_only=True)
class Online:
    """Keys that OpenBao has made inside, or was given; each node has a login of its own."""

    bao: OpenBao
    prefix: str
    given: Mapping[str, tuple[bytes, bytes]] = field(default_factory=dict)  #: Certificate and key in PEM by authority.
    tables: str = ""
    certificates: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tables = [f'[backend.corp]\ntype = "vault"\nurl = "{self.bao.url}"\n']
        for name in AUTHORITIES:
            mount = f"{self.prefix}-{name}"
            if name in self.given:
                self.bao.add_ca(mount, *self.given[name])
            else:
                self.bao.write(f"sys/mounts/{mount}", type="pki", config={"max_lease_ttl": "87600h"})
                self.bao.write(
                    f"{mount}/root/generate/internal", common_name=name, ttl="87600h", key_type="ec", key_bits=256
                )
            tables.append(f'[authority.{name}]\nbackend = "corp"\nmount = "{mount}"\n')
            self.certificates[name] = self.bao.request("GET", f"{mount}/ca/pem").content
        self.tables = "\n".join(tables)

    def prepare(self, roles: Sequence[str | Path], machines: Mapping[str, Machine], office: Office) -> None:
        """The scripts that `bootstrap setup` writes, and a login for each node."""
        scripts = office.directory / "roles"
        office.run("bootstrap setup vault", "setup", "vault", *roles, "-o", scripts)
        for name, machine in machines.items():
            policies = [self._policy(script) for script in sorted(scripts.glob(f"{name}-*.sh"))]
            role_id, secret_id = self.bao.add_approle(name, *policies, token_ttl="10m")
            lines = ["", "[backend.corp.auth]", 'method = "approle"']
            for key, value in (("role_id", role_id), ("secret_id", secret_id)):
                path = machine.directory / key
                path.touch(mode=0o600)
                path.write_text(value)
                lines.append(f'{key}_file = "{path}"')
            with machine.config.open("a") as config:
                config.write("\n".join(lines) + "\n")

    def _policy(self, script: Path) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "BAO_ADDR": self.bao.url, "BAO_TOKEN": self.bao.root_token, "HOME": "/"}
        run = subprocess.run(["sh", script], capture_output=True, text=True, check=False, env=environment)
        assert run.returncode == 0, f"{script}: {run.stdout}{run.stderr}"
        [name] = re.findall(r"^policy (\S+),", run.stdout, re.MULTILINE)
        return str(name)

    def answer(self) -> None:
        """Nothing waits."""
        raise AssertionError("a CA that answers at once has made a node wait")


@dataclass(kw_only=True)
class Beside:
    """`openssl ca` directories on this machine, outside all nodes; they answer at once, and need no network."""

    directory: Path
    pki: Pki
    tables: str = ""
    certificates: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tables = []
        for name in AUTHORITIES:
            place = opensslca.make_ca_directory(self.directory / name, *self.pki.ca_pem(name))
            tables.append(f'[backend.{name}-signer]\ntype = "openssl"\ndir = "{place}"\n')
            tables.append(f'[authority.{name}]\nbackend = "{name}-signer"\n')
            self.certificates[name] = self.pki.ca_pem(name)[0]
        self.tables = "\n".join(tables)

    def prepare(self, roles: Sequence[str | Path], machines: Mapping[str, Machine], office: Office) -> None:
        """Nothing is to be prepared."""

    def answer(self) -> None:
        """Nothing waits."""
        raise AssertionError("a CA that answers at once has made a node wait")


@dataclass(kw_only=True)
class AirGap:
    """A desk with `openssl ca`; bundles are carried."""

    desk: Desk
    pki: Pki
    tables: str = ""
    certificates: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        door = f'[backend.door]\ntype = "exchange"\noutbox = "{self.desk.inbox}"\ninbox = "{self.desk.outbox}"\n'
        self.tables = "\n".join([door, *(f'[authority.{name}]\nbackend = "door"\n' for name in AUTHORITIES)])
        self.certificates = {name: self.pki.ca_pem(name)[0] for name in AUTHORITIES}

    def prepare(self, roles: Sequence[str | Path], machines: Mapping[str, Machine], office: Office) -> None:
        """A policy that names nodes and addresses, as docs/day-0.md has it."""
        del roles, office
        addresses = {name: machine.node.ip for name, machine in machines.items()}
        self.desk.policy.write_text(policy(addresses, "proof = 'optional'"))

    def answer(self) -> None:
        """The desk's job."""
        run = self.desk.run("sign", self.desk.inbox, "-o", self.desk.outbox)
        assert run.returncode == 0, run.stderr


@dataclass(kw_only=True)
class Cluster:
    """Machines that are to become one; what the CAs' administrator does is done."""

    machines: dict[str, Machine]
    control_planes: Sequence[str]  #: Names; the first of them is made by `kubeadm init`.
    office: Path

    @property
    def first(self) -> Machine:
        """Made by `kubeadm init`."""
        return self.machines[self.control_planes[0]]

    def make(self) -> None:
        """
        By the documented commands.

        Raises:
            AssertionError: A step did not end as it should; with the nodes' logs.
        """
        try:
            self.first.init(self.office)
            for name, machine in self.machines.items():
                if machine is not self.first:
                    machine.join(self.first, self.office, control_plane=name in self.control_planes)
        except AssertionError as e:
            raise self.with_logs(e) from None

    def with_logs(self, error: AssertionError) -> AssertionError:
        """What went wrong, and what the nodes say."""
        logs = "\n".join(machine.node.logs() for machine in self.machines.values())
        return AssertionError(f"{error}\n{logs}")


def prepare(
    stack: ExitStack,
    directory: Path,
    cas: CAs,
    control_planes: Mapping[str, str],
    workers: Mapping[str, str],
    done: Walk,
    version: str = VERSION,
    more: str = "",
) -> Cluster:
    """
    Start the machines, and let the CAs know of them.

    Args:
        stack: Ends the machines.
        directory: Empty.
        cas: Sign.
        control_planes: Name and address.
        workers: Name and address.
        done: Where steps are noted.
        version: Of Kubernetes, which is that of the kit's programs.
        more: Lines of kubeadm's ClusterConfiguration.
    """
    began = time.monotonic()
    nodes = hosts(stack, {**control_planes, **workers})
    done.seconds["machines"] = time.monotonic() - began
    machines = {
        name: Machine(node=node, directory=directory / name, cas=cas, walk=done) for name, node in nodes.items()
    }
    first = next(iter(machines.values()))
    roles = ["init", *["control-plane"] * (len(control_planes) - 1), *["worker"] * len(workers)]
    lines = [f"{role} {node.name} {node.ip}" for role, node in zip(roles, nodes.values(), strict=True)]
    office = Office(directory=directory / "office", tables=cas.tables, walk=done)
    configuration = cluster_configuration(first, version, more)
    cas.prepare(office.orders(configuration, lines, cas.certificates), machines, office)
    return Cluster(machines=machines, control_planes=list(control_planes), office=office.directory)


def walk(
    stack: ExitStack, directory: Path, cas: CAs, control_planes: Mapping[str, str], workers: Mapping[str, str]
) -> Walk:
    """
    All of it; its arguments are those of `prepare`.

    Raises:
        AssertionError: A step did not end as it should, or a CA's key was on a node.
    """
    done = Walk()
    cluster = prepare(stack, directory, cas, control_planes, workers, done)
    machines = list(cluster.machines.values())
    nodes = [machine.node for machine in machines]
    places = [path for node in nodes for path in (node.kubeconfig_dir, node.root / "var/lib/kubelet")]
    known = [x509.load_pem_x509_certificate(pem) for pem in cas.certificates.values()]
    with KeyWatch([*places, *(one.directory for one in machines)], known) as watch:
        cluster.make()
        try:
            done.look(cluster.first, nodes)
            for machine in machines:
                machine.timed("check-expiration", functools.partial(machine.ca_bridge, "check-expiration"))
        except AssertionError as e:
            raise cluster.with_logs(e) from None
    done.seen = watch.seen
    assert watch.found == [], watch.found
    return done
