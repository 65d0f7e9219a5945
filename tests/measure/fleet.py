"""
A fleet's request bundles, the CA desk that signs them, and one bare `openssl ca` for comparison.

Every request has an elliptic key (P-256) of its own: making ten thousand RSA keys would take far longer than signing,
and a CSR's key type hardly matters to a CA. The CAs have RSA-2048, as kubeadm makes them.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from backends.openssl import settings as openssl_settings
from bridge.contract import Continuity, SignRequest
from bridge.node.sample_pki import Cluster, leaf_certificate
from bridge.pki import bundle, bundle_format, csr, signatures
from bridge.specs import AUTHORITIES, SPECS
from bridge.testing import TestCA
from tests.kit.opensslca import make_ca_directory
from tests.kit.pki import PKI_SPECS

#: What a node of this fleet asks for: ten certificates, of all three authorities and all usage classes.
NAMES = tuple(name for name in PKI_SPECS if name not in {"super-admin.conf", "kubelet.conf"})
VALIDITY = timedelta(days=365)
CLUSTER = "bench"
#: Looks at the memory: one at a desk's six processes takes 6 ms, and 20 a second were an eighth of a processor.
_SAMPLES_PER_SECOND = 4


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Nodes of one cluster, all due."""

    cas: dict[str, TestCA]
    bundles: list[bytes]
    csrs: list[bytes]  #: All that the bundles have, in their order.
    live: dict[str, x509.Certificate]  #: Of one node.


def make_fleet(nodes: int, names: Sequence[str] = NAMES) -> Fleet:
    """Bundles of this many nodes, with these certificates of each."""
    cas = {name: TestCA.make(name) for name in AUTHORITIES}
    made = [_requests(f"cp-{number}", cas, names) for number in range(nodes)]
    return Fleet(
        cas=cas,
        bundles=[bundle_format.dumps(bundle.bundle_of(requests)) for requests in made],
        csrs=[request.csr_pem for requests in made for request in requests],
        live={request.spec.name: request.replaces for request in made[0] if request.replaces},
    )


def _requests(node: str, cas: dict[str, TestCA], names: Sequence[str]) -> list[SignRequest]:
    batch, now = secrets.token_hex(16), datetime.now(UTC).replace(microsecond=0)
    requests = []
    for name in names:
        spec, old_key = SPECS[name], csr.generate_key("ecdsa-p256")
        ca, cluster = cas[spec.authority.name], Cluster(node=node)
        dates = {"not_before": now - timedelta(hours=12), "not_after": now + timedelta(days=1)}
        old = leaf_certificate(spec, old_key, ca, cluster, **dates)
        pem = csr.build(old, csr.generate_key("ecdsa-p256"))
        proof = signatures.sign_proof(
            old_key,
            x509.load_pem_x509_csr(pem),
            name=name,
            batch=batch,
            node=node,
            cluster=CLUSTER,
            validity=VALIDITY,
            created=now,
        )
        asker = Continuity(batch=batch, node=node, cluster=CLUSTER, proof=proof, asked=now)
        requests.append(SignRequest(spec=spec, csr_pem=pem, validity=VALIDITY, replaces=old, continuity=asker))
    return requests


def grow_index(directory: Path, rows: int) -> None:
    """Let the CA have issued so many before."""
    end = f"{datetime.now(UTC) + timedelta(days=300):%y%m%d%H%M%SZ}"
    subject = "/O=kubeadm:cluster-admins/CN=kubernetes-admin"
    with directory.joinpath("index.txt").open("a") as index:
        for number in range(rows):
            index.write(f"V\t{end}\t\t{(1 << 150) + number:040X}\tunknown\t{subject}\n")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run took."""

    seconds: float
    megabytes: float  #: All its processes together, at their highest.


def sign_inbox(directory: Path, fleet: Fleet, nodes: int) -> Run:
    """
    `ca-bridge sign INBOX -o OUTBOX` over the bundles of the first nodes, on a CA desk in a directory that is new.

    It must not have the name of one that was just removed: ext4 gives no inode away that was freed in the last minutes,
    and looks past each of them for a free one, which took a tenth of a run with thousands of files.

    Raises:
        SystemExit: Not every request was signed, so there is nothing to measure.
    """
    inbox, outbox = directory / "inbox", directory / "outbox"
    for folder in (inbox, outbox):
        folder.mkdir(parents=True)
    for number, data in enumerate(fleet.bundles[:nodes]):
        inbox.joinpath(f"{number}.request.json").write_bytes(data)
    config = _desk(directory, fleet)
    program = str(Path(sys.executable).with_name("ca-bridge"))
    command = [program, "sign", str(inbox), "-o", str(outbox), "--config", str(config)]
    run = measured(command, directory)
    signed = sum(path.read_bytes().count(b'"chain"') for path in outbox.iterdir())
    if signed != nodes * len(NAMES):
        raise SystemExit(f"wanted {nodes * len(NAMES)} answers of the desk, found {signed}")
    return run


def _desk(directory: Path, fleet: Fleet) -> Path:
    """A CA directory for each authority, settings, and a policy; the settings' path."""
    tables = ["[node]", f'state_dir = "{directory / "state"}"', "[backend.desk]", 'type = "openssl"']
    for name, ca in fleet.cas.items():
        made = make_ca_directory(directory / "ca" / name, ca.certificate_pem, ca.key_pem)
        tables += [f"[authority.{name}]", 'backend = "desk"', f'dir = "{made}"']
    config = directory / "config.toml"
    config.write_text("\n".join([*tables, ""]))
    directory.joinpath("desk-policy.toml").write_text(f'[allow]\nclusters = ["{CLUSTER}"]\nnodes = ["cp-*"]\n')
    return config


def sign_bare(directory: Path, ca: TestCA, live: dict[str, x509.Certificate], csrs: Sequence[bytes], rows: int) -> Run:
    """One `openssl ca -infiles` over all CSRs, as an administrator would have it: one CA, one usage class; as new."""
    make_ca_directory(directory, ca.certificate_pem, ca.key_pem)
    grow_index(directory, rows)
    config = openssl_settings.config_text(AUTHORITIES["ca"], live, VALIDITY, directory)
    directory.joinpath("openssl.cnf").write_text(config)
    names = [f"{number}.csr" for number in range(len(csrs))]
    for name, data in zip(names, csrs, strict=True):
        directory.joinpath(name).write_bytes(data)
    command = ["openssl", "ca", "-config", "openssl.cnf", "-batch", "-notext", "-extensions", "client"]
    run = measured([*command, "-out", "/dev/null", "-infiles", *names], directory)
    if len(list(directory.joinpath("newcerts").iterdir())) != len(csrs):
        raise SystemExit("a bare openssl ca did not sign all CSRs")
    return run


def measured(command: Sequence[str], directory: Path) -> Run:
    """
    Run a program to its end.

    Raises:
        SystemExit: It fails; its last words are shown.
    """
    begin = time.perf_counter()
    with directory.joinpath("messages").open("w+b") as messages:
        process = subprocess.Popen(
            command, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=messages
        )
        memory = DoorDatabase(process.pid)
        code = process.wait()
        seconds = time.perf_counter() - begin
        megabytes = memory.highest()
        if code:
            messages.seek(0)
            raise SystemExit(f"{command[0]}: exit {code}\n{messages.read()[-2000:].decode(errors='replace')}")
    return Run(seconds=seconds, megabytes=megabytes)


class DoorDatabase:
    """Looks now and then at what a process and its descendants have in memory, all together."""

    def __init__(self, pid: int) -> None:
        self._pid, self._highest, self._ended = pid, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(1 / _SAMPLES_PER_SECOND):
            self._highest = max(self._highest, sum(_resident(pid) for pid in family(self._pid)))

    def highest(self) -> float:
        """In megabytes; the process has ended."""
        self._ended.set()
        self._thread.join()
        return self._highest / 1e6


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, task.joinpath("children").read_text().split())
    return [pid, *(one for child in children for one in family(child))]


def _resident(pid: int) -> int:
    """Bytes, with its share of what several processes have together; 0 for a process that is no more."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return 0


def seconds(action: Callable[[], object]) -> float:
    """Wall time."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin
