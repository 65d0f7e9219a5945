"""
A burst of kubelets: what the gateway does in a second beside its CA alone and the API server alone, in one run.

`python -m tests.measure.gateway [--requests N] [--ca vault|openssl] [--rounds N] [--docs]`: all objects are there when the
gateway begins. The API server alone gets the two writes that each certificate needs, of the same client, byte for byte
what the gateway writes; the CA alone the same CSRs through the same backend. Each has as many connections as the
gateway. It reports the round with the middle ratio.
Beside the rates stands the processor time that each program took for one request (user and system, by /proc), so that
it can be seen where the time goes, and on a machine that others use as well. Needs `kube-apiserver` and `etcd` of
`tests/kit/binaries.sh`; `--docs` writes the tables into docs/gateway.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from bridge.ca import registry
from bridge.cluster.api import MERGE_PATCH, Api
from bridge.contract import Issued, SignRequest
from bridge.gateway import watch
from bridge.gateway.csrs import with_certificate, with_condition
from bridge.gateway.rules import CLIENT_KUBELET
from bridge.pki.csr import generate_key
from bridge.settings.load import parse
from bridge.specs import KUBELET_CLIENT
from tests.kit import cluster_api, gateways, openbao
from tests.kit.api_client import CSRS
from tests.kit.cluster_api import BOOTSTRAP_GROUP, ClusterApi
from tests.kit.gateways import Place, csr_pem, node_subject
from tests.measure.__main__ import write_between

THREADS = 32  #: As `gateway.concurrency` is by default.
MOST_MEMORY_MB = 150
#: The gateway's own processor time for a certificate of OpenBao, as a ratio to the API server's in the same run.
MOST = 1.25
DOCS = Path(__file__).parents[2] / "docs"
START = "<!-- numbers: written by `python -m tests.measure.gateway --docs` -->"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"
_USER = "system:bootstrap:abcdef"
_TICKS = os.sysconf("SC_CLK_TCK")
#: Of the table of processor time, in its order.
PROGRAMS = ("gateway", "kube-apiserver", "etcd", "OpenBao", "client")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One of the three."""

    rate: float  #: Certificates a second.
    cpu_ms: Mapping[str, float]  #: Of one certificate, by program.

    def row(self, name: str) -> str:
        """A line of the table of processor time."""
        cells = [f"{self.cpu_ms[program]:.2f}" if program in self.cpu_ms else "" for program in PROGRAMS]
        return f"| {name} | {' | '.join(cells)} | {sum(self.cpu_ms.values()):.2f} |"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One burst."""

    requests: int
    ca: str
    ca_alone: Run
    api_alone: Run  #: Two writes each.
    gateway: Run
    memory_mb: float  #: The gateway's peak.
    audited: int  #: Certificates with all their lines in the record.

    @property
    def ratio(self) -> float:
        """The ratio to the slower of the two."""
        return self.gateway.rate / min(self.ca_alone.rate, self.api_alone.rate)

    def row(self) -> str:
        """A line of the first table."""
        rates = " | ".join(f"{run.rate:.0f}" for run in (self.ca_alone, self.api_alone, self.gateway))
        return f"| {self.requests} | {self.ca} | {rates} | {self.ratio:.2f} | {self.memory_mb:.0f} | {self.audited} |"

    def where(self) -> str:
        """How the gateway's own processor time stands to its limit; with `openssl ca`, most of it is the CA's."""
        if self.ca != "vault":
            return (
                f"With {self.ca}, the gateway's time has that of its `openssl ca` processes, one for each certificate."
            )
        return f"With {self.ca}, {against_limit(self.gateway.cpu_ms)}."

    def cpu_rows(self) -> list[str]:
        """Lines of the second."""
        runs = {"the CA alone": self.ca_alone, "the API server alone": self.api_alone, "the gateway": self.gateway}
        return [run.row(f"{self.ca}: {name}") for name, run in runs.items()]


def against_limit(cpu_ms: Mapping[str, float]) -> str:
    """How the gateway's own processor time for a certificate stands to its limit."""
    own, api = cpu_ms["gateway"], cpu_ms["kube-apiserver"]
    is_met = "is met" if own <= MOST * api else "is **missed**"
    return (
        f"the gateway takes {own:.2f} ms of processor time for a certificate, and the API server {api:.2f} ms in the same "
        f"run: a ratio of {own / api:.2f}; the limit of {MOST} {is_met}"
    )


HEAD = (
    "| requests | CA | CA alone, per s | API server alone, per s | gateway, per s | gateway / slower of the two | "
    "peak memory, MB | fully audited |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)
CPU_HEAD = (
    f"| processor time per certificate, ms | {' | '.join(PROGRAMS)} | total |\n| --- |{' --- |' * (len(PROGRAMS) + 1)}"
)


def _cpu_seconds(pid: int) -> float:
    """User and system, with those of its children that have ended: `openssl ca` is one."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, words[11:15])) / _TICKS


class _Clock:
    """The clock of one run, from its beginning."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = pids
        self._before = {name: _cpu_seconds(pid) for name, pid in pids.items()}
        self._begin = time.monotonic()

    def run(self, count: int, seconds: float | None = None) -> Run:
        """It has ended."""
        seconds = time.monotonic() - self._begin if seconds is None else seconds
        used = {name: _cpu_seconds(pid) - self._before[name] for name, pid in self._pids.items()}
        return Run(rate=count / seconds, cpu_ms={name: 1000 * one / count for name, one in used.items()})


def create_all(cluster: ClusterApi, pems: Sequence[bytes], prefix: str) -> list[str]:
    """Objects as so many joining kubelets make them."""
    cluster.kubeconfig("kubernetes-super-admin", "system:masters")
    clients = [cluster.client("kubernetes-super-admin", "system:masters", f"thread-{n}") for n in range(4)]

    def create(item: tuple[int, bytes]) -> str:
        number, pem = item
        body = gateways.body(pem, CLIENT_KUBELET, name=f"{prefix}-{number}")
        headers = {"Impersonate-User": _USER, "Impersonate-Group": BOOTSTRAP_GROUP}
        client = clients[number % 4]
        answer = client.session.post(f"{client.url}{CSRS}", json=body, headers=headers, timeout=60)
        assert answer.status_code == 201, answer.text[-300:]
        return f"{prefix}-{number}"

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(create, enumerate(pems)))


def ca_alone(config: Path, pems: Sequence[bytes], pids: Mapping[str, int]) -> tuple[Run, list[Issued]]:
    """By the backend itself; one that has many signed at once gets them all."""
    settings = parse(config.read_text())
    backend = registry.configured(settings, ["ca"])["ca"].open()
    wanted = [SignRequest(spec=KUBELET_CLIENT, csr_pem=pem, validity=timedelta(days=1)) for pem in pems]
    with contextlib.ExitStack() as stack:
        stack.callback(backend.close)
        clock = _Clock(pids)
        if backend.can("sign_many"):
            answers = list(backend.sign_many(wanted))
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                answers = list(pool.map(backend.sign, wanted))
        run = clock.run(len(pems))
    found = [one for one in answers if isinstance(one, Issued)]
    assert len(found) == len(pems), answers[:1]
    return run, found


def api_alone(cluster: ClusterApi, names: Sequence[str], answers: Sequence[Issued], pids: Mapping[str, int]) -> Run:
    """Approve and issue, each onto a resourceVersion and with no more rights, as the gateway does."""
    there = {one["metadata"]["name"]: watch.parse(one, 0) for one in cluster.client().get(CSRS)["items"]}
    api = Api.of_gateway(
        cluster.kubeconfig(gateways.USER)
    )  # whose rights are looked up, unlike those of system:masters

    def both(item: tuple[str, Issued]) -> None:
        one, now = there[item[0]], datetime.now(UTC)
        reply = api.ask(
            "PATCH", f"{one.path}/approval", with_condition(one, watch.APPROVED, watch.ALLOWS, now), MERGE_PATCH
        )
        assert reply.status == 200, reply.message
        one = watch.parse(reply.document, 0)
        body = with_certificate(one, item[1].leaf.public_bytes(Encoding.PEM))
        reply = api.ask("PATCH", f"{one.path}/status", body, MERGE_PATCH)
        assert reply.status == 200, reply.message

    with contextlib.closing(api):
        clock = _Clock(pids)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(both, zip(names, answers, strict=True)))
        return clock.run(len(names))


def measure(directory: Path, count: int, ca: str) -> Measured:
    """One run of each."""
    keys = [generate_key("ecdsa-p256") for _ in range(min(count, 50))]
    workers = [f"w{number}" for number in range(1, count + 1)]
    pems = [csr_pem(node_subject(node), key=keys[n % len(keys)]) for n, node in enumerate(workers)]
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(cluster_api.running(directory / "cluster", on_disk=True))
        gateways.grant_rights(cluster)
        place = Place(
            cluster=cluster,
            directory=directory / "gateway",
            inventory=gateways.INVENTORY + gateways.workers(*workers),
            gateway={"requester_rate": 10 * count, "lease_duration": "60s"},
        )
        here, ca_pids, api_pids = {"client": os.getpid()}, {}, _pids(cluster)
        if ca == "vault":
            bao = stack.enter_context(openbao.dev_server())
            place.with_vault(bao)
            ca_pids = {"OpenBao": bao.process.pid}
        else:
            place.with_openssl()
        ca_run, answers = ca_alone(place.write(), pems, ca_pids | here)
        names = create_all(cluster, pems, "alone")
        api_run = api_alone(cluster, names, answers, api_pids | here)
        create_all(cluster, pems, "burst")
        cluster.client().create(LEASES, _held())
        gateway = stack.enter_context(_standing_by(place))
        clock = _Clock(api_pids | ca_pids | {"gateway": gateway.process.pid})
        assert cluster.client().ask("DELETE", f"{LEASES}/{_held()['metadata']['name']}").ok
        gateway.until(lambda: _are_signed(gateway, count), 600)
        run = clock.run(count, _seconds(gateway))
        memory = gateway.peak_mb()
        assert gateway.end() == 0
        return Measured(
            requests=count, ca=ca, ca_alone=ca_run, api_alone=api_run, gateway=run, memory_mb=memory,
            audited=_audited(gateway),
        )  # fmt: skip


def _held() -> dict[str, Any]:
    """A lease of another holder, so that the gateway is up and does nothing until the burst begins."""
    spec = {"holderIdentity": "bench", "leaseDurationSeconds": 300}
    return {"metadata": {"name": "ca-bridge-gateway"}, "spec": spec}


@contextlib.contextmanager
def _standing_by(place: Place) -> Iterator[gateways.Gateway]:
    gateway = place.start()
    try:
        gateway.until(lambda: "standing by" in gateway.page("readyz")[1])
        time.sleep(1)  # what was made for it is in the caches of all of them
        yield gateway
    finally:
        if gateway.process.poll() is None:
            gateway.kill()


def _pids(cluster: ClusterApi) -> dict[str, int]:
    assert cluster.server is not None
    assert cluster.etcd is not None
    return {"kube-apiserver": cluster.server.pid, "etcd": cluster.etcd.pid}


def _seconds(gateway: gateways.Gateway) -> float:
    """From the beginning of the watch to the last certificate, by the gateway's own log."""
    lines = gateway.lines()
    begin = next(line["time"] for line in lines if line["message"].startswith("watching"))
    end = [line["time"] for line in lines if line.get("outcome") == "signed"][-1]
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def _are_signed(gateway: gateways.Gateway, count: int) -> bool:
    time.sleep(1)  # by the log: the page of metrics has a line for each node, and the gateway pays for it
    return gateway.text().count('"outcome": "signed"') >= count


def _audited(gateway: gateways.Gateway) -> int:
    found: dict[str, set[str]] = {}
    for line in gateway.audit():
        found.setdefault(line["request"], set()).add(line["event"])
    return sum({"asked", "issued", "installed"} <= events for events in found.values())


def main(arguments: Sequence[str] | None = None, directory: Path | None = None) -> list[Measured]:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.gateway", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--ca", action="append", choices=["vault", "openssl"])
    parser.add_argument("--rounds", type=int, default=3, help="the one with the middle ratio is reported")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/gateway.md")
    given = parser.parse_args(arguments)
    found = []
    for ca in given.ca or ["vault", "openssl"]:
        rounds = []
        for _ in range(given.rounds):
            with tempfile.TemporaryDirectory(prefix="bench-gateway-", dir=directory) as place:
                rounds.append(measure(Path(place), given.requests, ca))
        found.append(sorted(rounds, key=lambda one: one.ratio)[len(rounds) // 2])
        print(
            "\n".join([HEAD, found[-1].row(), "", CPU_HEAD, *found[-1].cpu_rows(), "", found[-1].where(), ""]),
            flush=True,
        )
    if given.docs:
        rows = [row for one in found for row in one.cpu_rows()]
        text = "\n".join(
            [HEAD, *(one.row() for one in found), "", CPU_HEAD, *rows, "", *(one.where() for one in found)]
        )
        write_between((directory or DOCS) / "gateway.md", START, f"{text}\n")
    return found


if __name__ == "__main__":
    main()
