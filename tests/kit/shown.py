"""
What a reader sees: commands of the pages, run for real on machines of their own, and their output as pages show it.

A machine is a set of namespaces in which `/etc`, `/var/lib`, `/srv` and `/media` are its own, so that paths are the
page's. In a page a block for the language `console` has a name behind that word, and perhaps how many lines it shows: `8` are
the first eight, `-8` the last.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from bridge.pki.certificates import pem
from bridge.pki.csr import key_pem
from bridge.specs import AUTHORITIES
from tests.kit import airgap, cluster_api, cmp, est, gateways, kube_api, openbao, opensslca, pods, programs, terminals
from tests.kit.issuing import Signer
from tests.kit.loopback import free_port
from tests.kit.node import Node
from tests.kit.pki import NODE as CP_1
from tests.kit.pki import KubeadmPki, Pki, handmade_pki, kubeadm_pki

ROOT = Path(__file__).parents[2]
PAGE, DAY_0, DESK_FILES = ROOT / "docs/first-renewal.md", ROOT / "docs/day-0.md", ROOT / "config/desk"
EXEC, NEXT_CA = ROOT / "docs/exec.md", ROOT / "docs/replace-the-ca.md"
COLUMNS = 80
_PLACES = ("etc", "var/lib", "srv", "media")
_OF_THE_SYSTEM = ("passwd", "group", "nsswitch.conf", "ssl", "ld.so.cache", "alternatives")
_NAMESPACES = ("unshare", "--mount", "--uts", "--ipc", "--propagation", "private")
_START = """\
root=$1 name=$2; shift 2
for place in etc var/lib srv media; do mount --bind "$root/$place" "/$place"; done
mount -t tmpfs tmpfs /dev/shm  # or another walk's CA, which has the same path, sweeps this one's folder away
hostname "$name"; cd /srv; stty cols 80 2>/dev/null || true; exec "$@"
"""
#: The installed program, under the path that the packages give it.
_PROGRAM = "import sys; from bridge.entry import main; sys.argv[0] = '/usr/bin/ca-bridge'; sys.exit(main())"


@dataclass(frozen=True)
class Machine:
    """A node or a desk, whose files are below a directory."""

    root: Path
    name: str
    is_alone: bool = True  #: It reaches no other machine, and none reaches it.

    def __post_init__(self) -> None:
        for place in _PLACES:
            (self.root / place).mkdir(parents=True, exist_ok=True)
        for found in (Path("/etc") / name for name in _OF_THE_SYSTEM):
            copy = shutil.copytree if found.is_dir() else shutil.copy2
            if found.exists():
                copy(found, self.root / "etc" / found.name)

    def write(self, path: str, text: str, mode: int = 0o600) -> None:
        """A file of the machine."""
        file = self.root / path.removeprefix("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=mode)
        file.write_text(text, encoding="utf-8")

    def run(self, line: str, typed: str = "") -> str:
        """What a terminal shows of a line of a page; `typed` is a person's answer to a question."""
        command = self.command(line)
        if typed:
            return terminals.Shown(*airgap.at_a_terminal(command, [typed], b"later] "), "").text
        return terminals.run(command, columns=COLUMNS).text

    def command(self, line: str, *, is_server: bool = False) -> list[str]:
        """How a line of a page is run on this machine; a server is the process itself, for a signal to end it."""
        words = shlex.split(line)
        program = [sys.executable, "-c", _PROGRAM] if words[0] == "ca-bridge" else words[:1]
        path = f"PATH={programs.directory()}:{os.environ['PATH']}"
        settings = ["env", path, "TZ=UTC", "LC_ALL=C.UTF-8", "TERM=xterm", f"COLUMNS={COLUMNS}"]
        network = ["--net"] if self.is_alone else []
        processes = [] if is_server else ["--pid", "--fork", "--mount-proc"]
        return [
            *_NAMESPACES,
            *network,
            *processes,
            "sh",
            "-ec",
            _START,
            "sh",
            str(self.root),
            self.name,
            *settings,
            *program,
            *words[1:],
        ]


class Normal:
    """The same text for the same run at any time: hours count from one moment, numbers and names count on."""

    #: When each run was, to the hour.
    THEN = datetime(2027, 3, 1, 3, tzinfo=UTC)

    def __init__(self) -> None:
        self.began = datetime.now(UTC)
        self._names: dict[str, str] = {}
        self.addresses: dict[str, str] = {}  #: Of servers here, and what the page calls them.

    def of(self, text: str) -> str:
        """A command's output."""
        text = _SECRET.sub("mJp7x1Wc5TQyq0ZVnKd3rEoA9sUf8hGiLbRX2tYv4Nw", text)
        for here, on_page in self.addresses.items():
            text = text.replace(here, on_page)
        for pattern, form in _DATES.items():
            text = re.sub(pattern, functools.partial(self._moved, form=form), text)
        text = re.sub(r"\d{4}-\d\d-\d\d(?= \((\d+)d left)", self._day, text)
        text = re.sub(r"\b\d{6,}(?=[s:])", lambda seconds: str(round(int(seconds[0]) / 3600) * 3600), text)
        text = text.replace(str(Path(sys.executable).with_name("ca-bridge")), "/usr/bin/ca-bridge")
        for pattern, words in _WORDS.items():
            text = re.sub(pattern, words, text)
        for pattern, form in _NAMES.items():
            text = re.sub(pattern, functools.partial(self._named, form=form), text)
        return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")

    def _moved(self, found: re.Match[str], form: str) -> str:
        hours = (datetime.strptime(found[0], form).replace(tzinfo=UTC) - self.began) / timedelta(hours=1)
        space = "".join(re.findall(r"\s+", found[0]))  # a line's end, where one ends there
        return (self.THEN + timedelta(hours=round(hours))).strftime(form).replace(" ", space)

    def _day(self, found: re.Match[str]) -> str:
        """The day of an end, by the days that are left and some hours: a run may go over midnight."""
        days = (date.fromisoformat(found[0]) - datetime.now(UTC).date()).days
        whole = int(found[1]) + 1
        return f"{self.THEN + timedelta(days=whole):%Y-%m-%d}" if days in {whole - 1, whole} else found[0]

    def _named(self, found: re.Match[str], form: str) -> str:
        number = len(self._names)
        digits = iter(hashlib.sha256(f"{number}".encode()).hexdigest().translate(_CASE if form.isupper() else {}))
        return self._names.setdefault(found[0], "".join(one if one in "-…" else next(digits) for one in form))


_CASE = str.maketrans("abcdef", "ABCDEF")
_DATES = {
    r"\d{4}-\d\d-\d\d\s+\d\d:\d\d(?!:)": "%Y-%m-%d %H:%M",
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d": "%Y-%m-%dT%H:%M:%S",
    r"\d{8}T\d{6}Z": "%Y%m%dT%H%M%SZ",
}
#: A one-time secret, which is a line of its own.
_SECRET = re.compile(r"^[\w-]{43}$", re.MULTILINE)
#: What is not worth a number.
_WORDS = {
    r"\b\S+ ends first": "apiserver ends first",
    r"\.\d{3}Z\b": ".000Z",
    r"\b\d+s ago": "0s ago",
    r"name or\s+service not known": "temporary failure in name\n           resolution",
    r"127\.0\.0\.1:\d{5}": "192.0.2.11:6443",
    r"\bgateway cp-1_[0-9a-f]{8}\b": "gateway cp-1_5fdbe1d4",
}
#: Serial numbers of OpenSSL's and of kubeadm's certificates, fingerprints, batches, digests, names of runs; each becomes
#: as long as most are.
_NAMES = {
    r"\b[0-9A-F]{34,40}\b": "X" * 40,
    r"\b[0-9A-F]{12,16}\b(?!…)": "X" * 16,
    r"\b[0-9A-Z]{5}(?:-[0-9A-Z]{5}){3}\b": "-".join(["X" * 5] * 4),
    r"\b[0-9a-f]{32}\b": "x" * 32,
    r"\b[0-9a-f]{16}…": "x" * 16 + "…",
    r"(?<![\w.])(?!31536000)[0-9a-f]{8}(?![\w.])": "x" * 8,
}

#: Typed one after the other, by the name of the block that shows it; `-` begins what no block shows.
NODE = {
    "check-expiration": "ca-bridge check-expiration",
    "settings-check": "ca-bridge settings check",
    "doctor": "ca-bridge doctor",
    "before-upgrade": "ca-bridge doctor --before-upgrade",
    "plan": "ca-bridge plan",
    "nagios": "ca-bridge check-expiration -o nagios -w 14d -c 5d",
    "plan-san": "ca-bridge plan --add-san apiserver=api2.example.com",
    "adopt-defaults": "ca-bridge plan all --adopt-defaults",
    "csr-only": "ca-bridge renew all --csr-only --csr-dir /srv/csrs",
    "rehearse": "ca-bridge renew --rehearse front-proxy-client",
    "renew-one": "ca-bridge renew front-proxy-client",
    "renew": "ca-bridge renew",
    "backups": "ca-bridge backups",
    "rollback": "ca-bridge rollback",
    "audit-show": "ca-bridge audit show --name front-proxy-client",
    "audit-verify": "ca-bridge audit verify",
    "cron": "ca-bridge setup cron",
    "recover": "ca-bridge recover",
    "user-request": "ca-bridge kubeconfig request bob --group dev --group ops",
    "user": "ca-bridge kubeconfig user bob --group dev --group ops --csr bob.csr --validity 8h",
    "export": "ca-bridge export /media/stick/cp-1.request.json",
    "setup-nodes": "ca-bridge setup openssl --nodes nodes.txt -o for-the-ca",
}
DESK = {
    "desk-doctor": "ca-bridge doctor",
    "inspect": "ca-bridge inspect /media/stick/cp-1.request.json",
    "sign-dry-run": "ca-bridge sign /media/stick/cp-1.request.json -o /media/stick/cp-1.answer.json --dry-run",
    "sign": "ca-bridge sign /media/stick/cp-1.request.json -o /media/stick/cp-1.answer.json --approve",
    "csr-sign": "ca-bridge sign /srv/csrs --node cp-1 --cluster kubernetes --without-proof admin.conf",
}
EST_SERVER = {
    "est-setup": "ca-bridge setup est --authority ca",
    "est-doctor": "ca-bridge doctor",
    "est-renew": "ca-bridge renew",
}
CMP_SERVER = {
    "cmp-setup": "ca-bridge setup cmp --authority ca",
    "cmp-doctor": "ca-bridge doctor",
    "cmp-renew": "ca-bridge renew",
}
CLUSTER = {
    "kubernetes-setup": "ca-bridge setup kubernetes --authority front-proxy-ca",
    "kubernetes-renew": "ca-bridge renew",
    "kubernetes-pending": "ca-bridge pending list",
}
APPROVED = {"kubernetes-collect": "ca-bridge renew"}
PROGRAM_AS_CA = {
    "exec-setup": "ca-bridge setup exec -o for-the-ca",
    "exec-renew": "ca-bridge renew apiserver",
    "exec-test": "ca-bridge backend test ca apiserver",
}
EXPIRED = {"expired": "ca-bridge check-expiration", "renew-expired": "ca-bridge renew all"}
WORKER = {
    "worker": "ca-bridge check-expiration",
    "-export": "ca-bridge export /media/stick/w-1.request.json kubelet.conf",
    "pending": "ca-bridge pending list",
}
NEW_NODE = {
    "version": "ca-bridge --version",
    "settings-init": "ca-bridge settings init openssl",
    "bootstrap-init": "ca-bridge bootstrap init --kubeadm-config cluster.yaml",
}
ADMINISTRATOR = {
    "orders": "ca-bridge bootstrap orders --nodes nodes.txt --kubeadm-config cluster.yaml --ca-dir ca-certificates -o orders",
    "orders-roles": "ca-bridge bootstrap setup vault --order orders/cp-1.order.json --order orders/w-1.order.json -o roles",
}
NEW_WORKER = {"bootstrap-join": "ca-bridge bootstrap join --order w-1.order.json"}
BACK = {
    "csr-install": "ca-bridge install /srv/csrs",
    "import": "ca-bridge import /media/stick/cp-1.answer.json",
}
MISSING = {
    "-rm": "rm /etc/kubernetes/pki/apiserver-kubelet-client.crt /etc/kubernetes/pki/apiserver-kubelet-client.key",
    "missing": "ca-bridge plan apiserver-kubelet-client --kubeadm-config cluster.yaml",
}
GATEWAY = {
    "gateway-check": "ca-bridge gateway --check",
    "gateway-setup": "ca-bridge setup kubernetes -o gateway/",
    "trust-publish": "ca-bridge trust publish corp.example/spiffe",
}
#: By a node whose CA has a successor.
REPLACED = {
    "rotate-ca-plan": "ca-bridge rotate-ca plan",
    "-rotate-ca-trust": "ca-bridge rotate-ca trust",
    "rotate-ca-status": "ca-bridge rotate-ca status",
}

PASSPHRASE = "s3cret phrase"


def blocks(directory: Path) -> dict[str, str]:
    """By name: what each block shows."""
    normal, node = Normal(), node_with_openssl(directory / "cp-1")
    others = {kind: same_node(node, directory / kind) for kind in ("est", "cmp", "kubernetes")}
    found = typed(NODE, node, normal)
    desk = desk_of(node, directory / "ca-1")
    shutil.copytree(node.root / "media", desk.root / "media", dirs_exist_ok=True)
    (desk.root / "srv/csrs").mkdir()
    shutil.copy2(node.root / "srv/csrs/admin.conf.csr", desk.root / "srv/csrs")
    found |= typed(DESK, desk, normal)
    for place in ("media", "srv/csrs"):
        shutil.copytree(desk.root / place, node.root / place, dirs_exist_ok=True)
    found |= typed(BACK, node, normal)
    found |= typed(MISSING, with_configuration(node), normal)
    found |= typed(PROGRAM_AS_CA, node_with_program(directory / "exec"), normal)
    found |= typed(EXPIRED, expired(node, directory / "expired"), normal)
    found |= typed(WORKER, worker(node, directory / "w-1"), normal)
    found |= typed(NEW_NODE, new_node(node, directory / "new"), normal)
    found |= typed(ADMINISTRATOR, office := administrator(node, directory / "office"), normal)
    found |= typed(NEW_WORKER, new_worker(node, office, directory / "new-worker"), normal)
    pki = KubeadmPki(root=node.root, external=True, version="1.37")
    found |= est_server(others["est"], pki, normal) | cmp_server(others["cmp"], pki, normal)
    found |= signing_cluster(others["kubernetes"], pki, normal) | gateway(directory, normal)
    return found | typed(REPLACED, with_next_ca(directory / "next"), normal)


#: What a node that runs shows (tests/e2e/one_node/test_prove_node.py compares it).
LIVE = {"prove": "ca-bridge prove", "restart": "ca-bridge restart", "kubelets": "ca-bridge doctor --kubelets"}


#: What a booted machine shows (tests/release/test_pages_typed.py compares it); no other run writes it.
BOOTED = {
    "systemd-enable": "ca-bridge setup systemd --enable",
    "cron-enable": "ca-bridge setup cron --enable",
    "offline-check": "sh ca-bridge-0.1.0-linux-x86_64.run check",
    "offline-install": "sh ca-bridge-0.1.0-linux-x86_64.run install",
    "offline-uninstall": "/opt/ca-bridge/uninstall",
}


#: What nodes show that work for minutes; the test that has each run compares it (`assert_shown`).
RUNNING = {
    "rotate-ca-issue": "ca-bridge rotate-ca issue",
    "rotate-ca-back": "ca-bridge rotate-ca back",
    "kubelets-on": "ca-bridge kubelets on",
    "kubelets-on-worker": "ca-bridge kubelets on",
    "serving-certs-on": "ca-bridge serving-certs on",
    "serving-certs-off": "ca-bridge serving-certs off",
}
#: Of every run the same: how long a restart took, how many checks there were, when a kubelet has made its own CA.
_RUNS = {
    r"\b(in|after) \d+(?:\.\d+)? s\b": r"\1 9 s",
    r"\bproven: \d+ checks": "proven: 42 checks",
    r"-ca@\d{10}\b": "-ca@1795909517",
}


def assert_shown(name: str, printed: str, names: Mapping[str, str]) -> None:
    """
    A page has this block of `RUNNING` as a run has printed it; with `CA_BRIDGE_SHOWN=write` in the environment it gets it.

    `printed` is for `COLUMNS` columns; `names` are the run's, which are always as long, and what pages call them.
    """
    normal = Normal()
    normal.addresses |= names
    for pattern, words in _RUNS.items():
        printed = re.sub(pattern, words, printed)
    block = {name: normal.of(f"$ {RUNNING[name]}\n{printed}")}
    [page] = [one for one in (ROOT / "docs").glob("*.md") if name in names_in(one.read_text(encoding="utf-8"))]
    text = page.read_text(encoding="utf-8")
    if os.environ.get("CA_BRIDGE_SHOWN") == "write":
        page.write_text(text := written(text, block), encoding="utf-8")
    assert text == written(text, block), f"run with CA_BRIDGE_SHOWN=write: {printed}"


def live(node: Node) -> dict[str, str]:
    """The blocks of a healthy control plane."""
    normal, run = (
        Normal(),
        functools.partial(node.exec, "env", f"COLUMNS={COLUMNS}", Path(sys.executable).with_name("ca-bridge")),
    )
    printed = {name: run(*line.split()[1:], check=False).stdout for name, line in LIVE.items()}
    return {name: f"$ {LIVE[name]}\n{normal.of(text.replace(node.name, CP_1))}" for name, text in printed.items()}


def typed(lines: Mapping[str, str], machine: Machine, normal: Normal) -> dict[str, str]:
    """Lines on one machine; to the question of `--approve` the answer is yes."""
    return {
        name: normal.of(f"$ {line}\n{machine.run(line, 'yes' if line.endswith('--approve') else '')}")
        for name, line in lines.items()
    }


def node_with_openssl(root: Path) -> Machine:
    """The page's settings, a PKI of the real kubeadm that ends in 20 days, and its CAs where the settings say."""
    pki = kubeadm_pki(root, validity=timedelta(days=20), extra_sans=())
    pki.run_kubeadm("init", "phase", "control-plane", "all")
    pki.run_kubeadm("init", "phase", "etcd", "local")
    (pki.kubeconfig_dir / "super-admin.conf").unlink()
    node = Machine(root, "cp-1")
    [text] = re.findall(r"```toml\n(.*?)```", _section(PAGE, "## openssl ca"), re.DOTALL)
    node.write("/etc/ca-bridge/config.toml", text)
    node.write("/srv/nodes.txt", "cp-1 192.0.2.11\ncp-2 192.0.2.12\n")
    (root / "media/stick").mkdir()
    add_cas(node, pki, text)
    return node


def desk_of(node: Machine, root: Path) -> Machine:
    """A desk with the CAs of a node, and the policy that is shipped."""
    desk = Machine(root, "ca-1")
    pki = KubeadmPki(root=node.root, external=True, version="1.37")
    text = (DESK_FILES / "config.toml").read_text(encoding="utf-8")
    desk.write("/etc/ca-bridge/config.toml", text)
    desk.write("/etc/ca-bridge/desk-policy.toml", (DESK_FILES / "desk-policy.toml").read_text(encoding="utf-8"))
    add_cas(desk, pki, text)
    return desk


def node_with_program(root: Path) -> Machine:
    """The settings and the program of the page, with a CA whose key has no passphrase."""
    machine, now = Machine(root, "cp-1"), datetime.now(UTC)
    pki = handmade_pki(root, now=now, not_after=now + timedelta(days=20))
    text = EXEC.read_text(encoding="utf-8")
    settings = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)[0].replace("/usr/local/libexec", "/etc")
    machine.write("/etc/ca-bridge/config.toml", settings)
    [script] = re.findall(r"```sh\n(#!/bin/sh.*?)```", text, re.DOTALL)
    machine.write("/etc/ca-bridge/site-ca", script, 0o755)
    (root / "srv/ca/ca").mkdir(parents=True)
    for source, name in zip(pki.ca_files("ca"), ("ca.crt", "ca.key"), strict=True):
        shutil.copy2(source, root / "srv/ca/ca" / name)
    return machine


def expired(node: Machine, root: Path) -> Machine:
    """A node with the same settings, all of whose certificates ended yesterday."""
    machine, now = Machine(root, "cp-1"), datetime.now(UTC)
    pki = handmade_pki(root, now=now - timedelta(days=366), not_after=now - timedelta(days=1))
    text = (node.root / "etc/ca-bridge/config.toml").read_text(encoding="utf-8")
    machine.write("/etc/ca-bridge/config.toml", text)
    add_cas(machine, pki, text)
    return machine


def with_next_ca(root: Path) -> Machine:
    """A node with the page's table for the CA that comes after `ca`, whose place at `openssl ca` is a directory."""
    now = datetime.now(UTC)
    pki = handmade_pki(root, now=now, not_after=now + timedelta(days=20), extra_sans=())
    machine = Machine(root, "cp-1")
    [settings] = re.findall(r"```toml\n(.*?)```", _section(PAGE, "## openssl ca"), re.DOTALL)
    [table] = re.findall(r"```toml\n(.*?)```", _section(NEXT_CA, "## Before"), re.DOTALL)
    table = "\n".join(line.strip() for line in table.splitlines()).replace("mount = ", "dir = ")
    machine.write(
        "/etc/ca-bridge/config.toml", f"{settings}\n{table.replace('pki-kubernetes-2', '/srv/ca/kubernetes-2')}\n"
    )
    add_cas(machine, pki, settings)
    signer = Signer.make("kubernetes-2", key_id=True, begin=now - timedelta(days=1), end=now + timedelta(days=4000))
    certificate, key = pem(signer.certificate), key_pem(signer.key)
    opensslca.make_ca_directory(root / "srv/ca/kubernetes-2", certificate, key, passphrase=PASSPHRASE)
    machine.write("/etc/ca-bridge/next/ca.crt", certificate.decode(), 0o644)
    return machine


def with_configuration(node: Machine) -> Machine:
    """The node with the file that kubeadm made its control plane from."""
    [cluster] = re.findall(r"```yaml\n(.*?)```", _section(DAY_0, "## The first control-plane node"), re.DOTALL)
    node.write("/srv/cluster.yaml", cluster)
    return node


def worker(node: Machine, root: Path) -> Machine:
    """A node with a kubelet alone."""
    machine = Machine(root, "w-1")
    (root / "media/stick").mkdir()
    for name in ("kubelet.conf", "pki/ca.crt"):
        machine.write(f"/etc/kubernetes/{name}", (node.root / "etc/kubernetes" / name).read_text(encoding="utf-8"))
    return machine


def new_node(node: Machine, root: Path) -> Machine:
    """Without settings and certificates, beside the same CAs."""
    machine = Machine(root, "cp-1")
    text = (node.root / "etc/ca-bridge/config.toml").read_text(encoding="utf-8")
    add_cas(machine, KubeadmPki(root=node.root, external=True, version="1.37"), text)
    return with_configuration(machine)


def administrator(node: Machine, root: Path) -> Machine:
    """A machine with the page's list of nodes, the cluster's configuration and the CAs' certificates."""
    machine = with_configuration(Machine(root, "office"))
    [nodes] = re.findall(r"<<'?END'?\n(.*?)^END$", DAY_0.read_text(encoding="utf-8"), BLOCK)
    machine.write("/srv/nodes.txt", nodes)
    for name in ("ca.crt", "front-proxy-ca.crt", "etcd/ca.crt"):
        certificate = (node.root / "etc/kubernetes/pki" / name).read_text(encoding="utf-8")
        machine.write(f"/srv/ca-certificates/{name}", certificate, 0o644)
    return machine


def new_worker(node: Machine, office: Machine, root: Path) -> Machine:
    """A worker-to-be with its order and the settings of the other nodes."""
    machine = Machine(root, "w-1")
    shutil.copy2(office.root / "srv/orders/w-1.order.json", machine.root / "srv")
    text = (node.root / "etc/ca-bridge/config.toml").read_text(encoding="utf-8")
    machine.write("/etc/ca-bridge/config.toml", text)
    add_cas(machine, KubeadmPki(root=node.root, external=True, version="1.37"), text)
    return machine


def same_node(node: Machine, root: Path) -> Machine:
    """A node with the same certificates, and nothing else of ours, which reaches the servers of this machine."""
    machine = Machine(root, node.name, is_alone=False)
    shutil.copytree(node.root / "etc/kubernetes", root / "etc/kubernetes")
    return machine


def est_server(machine: Machine, pki: Pki, normal: Normal) -> dict[str, str]:
    """With the page's settings and labels."""
    tls = est.make_tls(machine.root / "tls")
    labels = est.labels_of(pki, {"ca": "kubernetes", "etcd-ca": "etcd", "front-proxy-ca": "front-proxy"})
    with est.double(labels, tls, validity=timedelta(days=365), client_cn="cp-1") as server:
        normal.addresses[server.url] = "https://est.corp.example:8443"
        _settings_of(machine, "est", normal.addresses)
        for name, file in {**tls.agent("cp-1"), "ca": tls.ca}.items():
            place = {"ca": "est-tls-ca.crt", "client_cert": "agent.crt", "client_key": "agent.key"}[name]
            machine.write(f"/etc/ca-bridge/{place}", file.read_text(encoding="utf-8"))
        return typed(EST_SERVER, machine, normal)


def cmp_server(machine: Machine, pki: Pki, normal: Normal) -> dict[str, str]:
    """With the page's settings, but for the paths, which are this server's."""
    with cmp.registration_authority(machine.root / "ra") as ra:
        on_page = "http://ra.corp.example:8080/.well-known/cmp/p/k8s-"
        normal.addresses[f"http://127.0.0.1:{ra.port}/ca/.well-known/cmp/p/"] = on_page
        normal.addresses[f"http://127.0.0.1:{ra.port}"] = "http://ra.corp.example:8080"
        changes = {f'"{cmp.REFERENCE}"': '"cp-1"'}
        for authority, name in {"ca": "k8s", "etcd-ca": "etcd", "front-proxy-ca": "front-proxy"}.items():
            ra.add_ca(authority, *pki.ca_pem(authority), days=365)
            changes[f"{authority}/.well-known/cmp/p/{{usage}}"] = f".well-known/cmp/p/{name}-{{usage}}"
        _settings_of(machine, "cmp", {**normal.addresses, **changes})
        machine.write("/etc/ca-bridge/cmp.secret", Path(ra.mac()["secret_file"]).read_text(encoding="utf-8"))
        return typed(CMP_SERVER, machine, normal)


def signing_cluster(machine: Machine, pki: Pki, normal: Normal) -> dict[str, str]:
    """With the page's settings, an approver, and the page's policy for the gateway there."""
    with kube_api.serving(machine.root / "cluster") as api:
        normal.addresses[api.url] = "https://signing-cluster.example.com:6443"
        _settings_of(
            machine, "kubernetes-backend", {**normal.addresses, 'wait = "1s"\n[authority.ca]': "[authority.ca]"}
        )
        machine.write("/etc/ca-bridge/signing-cluster-ca.crt", api.trust.read_text(encoding="utf-8"))
        machine.write("/etc/ca-bridge/signing-cluster-token", "none yet")
        for authority in AUTHORITIES:
            command = machine.command(f"ca-bridge setup kubernetes --authority {authority}")
            api.apply(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        machine.write("/etc/ca-bridge/signing-cluster-token", api.bearer("ca-bridge", f"ca-bridge-{CP_1}").token)
        found = typed(CLUSTER, machine, normal)
        for one in api.admin.csrs():
            api.kubectl("certificate", "approve", one["metadata"]["name"])
        gateways.grant_rights(api.cluster)
        policy = gateways.page_policy(approval="required")
        place = gateways.for_control_planes(api.cluster, pki, machine.root / "gateway", policy)
        with gateways.running(place) as gateway:
            gateway.until(lambda: all(one["status"].get("certificate") for one in api.admin.csrs()), what="all signed")
        return found | typed(APPROVED, machine, normal)


def _settings_of(machine: Machine, page: str, here: Mapping[str, str]) -> None:
    """The settings of a page's worked example, with the addresses and names that are used `here` for the page's."""
    text = _section(ROOT / f"docs/{page}.md", "## A worked example")
    [settings] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    for ours, on_page in here.items():
        settings = settings.replace(on_page, ours)
    machine.write("/etc/ca-bridge/config.toml", settings)


def add_cas(machine: Machine, pki: Pki, settings: str) -> None:
    """The CAs of a PKI, where settings with `openssl ca` say that they are."""
    machine.write("/etc/ca-bridge/ca-passphrase", f"{PASSPHRASE}\n")
    for authority, table in tomllib.loads(settings)["authority"].items():
        place = machine.root / table["dir"].removeprefix("/")
        opensslca.make_ca_directory(place, *pki.ca_pem(authority), passphrase=PASSPHRASE)


def gateway(directory: Path, normal: Normal) -> dict[str, str]:
    """With the shipped policy and inventory, before a real API server, which is not in the machine's network."""
    machine, port = Machine(directory / "gateway", "cp-1", is_alone=False), free_port()
    normal.addresses[f"at port {port}"] = "at port 9880"
    with cluster_api.running(directory / "cluster") as cluster, openbao.dev_server() as bao:
        gateways.grant_rights(cluster)
        pods.grant_rights(cluster)
        (cluster.pki_dir / "pods.crt").write_bytes(pem(Signer.make("pods", begin=datetime.now(UTC)).certificate))
        place = gateways.Place(cluster=cluster, directory=directory / "place").with_vault(bao)
        table = (
            f'[node]\npki_dir = "{cluster.pki_dir}"\n'
            f'[gateway]\nkubeconfig = "{cluster.kubeconfig(gateways.USER)}"\nlisten = "127.0.0.1:{port}"\n'
        )
        machine.write("/etc/ca-bridge/config.toml", "\n".join([table, *place.tables]))
        for name, to in (("policy", "gateway-policy"), ("inventory", "inventory")):
            text = (DESK_FILES.parent / f"gateway/{name}.toml").read_text(encoding="utf-8")
            machine.write(f"/etc/ca-bridge/{to}.toml", text)
        found = typed(GATEWAY, machine, normal)
        line, says = "ca-bridge gateway", ("the lease", "gateway cp-1", "watching")  # its threads, in any order
        with terminals.working(machine.command(line, is_server=True), *says) as said:
            lines = [one for word in says for one in said.splitlines() if word in one]
        return found | {"gateway": normal.of("\n".join([f"$ {line}", *lines]))}


def _section(page: Path, heading: str) -> str:
    return page.read_text(encoding="utf-8").partition(f"{heading}\n")[2].partition("\n## ")[0]


#: Of a pattern for a block in a page.
BLOCK = re.DOTALL | re.MULTILINE


def written(text: str, shown: Mapping[str, str]) -> str:
    """A page, with what its blocks show now, as far in as they are; a block of something else stays."""

    def block(match: re.Match[str]) -> str:
        indent, name, limit = match.groups()
        if name not in shown:
            return match[0]
        lines, most = shown[name].splitlines(), int(limit or 0)
        if most and len(lines) > abs(most):
            lines = [*lines[:most], "…"] if most > 0 else [lines[0], "…", *lines[most:]]
        first = match[0].partition("\n")[0]
        return "\n".join([first, *(f"{indent}{line}".rstrip() for line in lines), f"{indent}```"])

    return re.sub(r"^( *)```console ([\w-]+)(?: (-?\d+))?\n.*?^ *```$", block, text, flags=BLOCK)


def names_in(text: str) -> list[str]:
    """The blocks of a page."""
    return re.findall(r"^ *```console ([\w-]+)", text, re.MULTILINE)
