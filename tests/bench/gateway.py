"""
A burst of kubelets: what the gateway does in a second beside its CA alone and the API server alone, in one run.

`python -m tests.bench.gateway [--requests N] [--ca vault|openssl] [--docs]`: all objects are there when the gateway
begins. The API server alone gets the two writes that each certificate needs, the CA alone the same CSRs, both over
connections that are kept, from as many threads. Needs `kube-apiserver` and `etcd` of `tests/kit/binaries.sh`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from bridge.contract import Issued, SignRequest
from bridge.kubernetes.api import MERGE_PATCH, Api
from bridge.pki.csr import generate_key
from bridge.settings.load import parse
from bridge.signing import registry
from bridge.signing.signer_rules import CLIENT_KUBELET
from bridge.specs import KUBELET_CLIENT
from tests.kit import cluster_api, gateways, openbao
from tests.kit.cluster_api import BOOTSTRAP_GROUP, CSRS, ClusterApi
from tests.kit.gateways import Place, csr_pem, node_subject

THREADS = 32
LIMIT, MOST_MEMORY_MB = 0.8, 150
_USER = "system:bootstrap:abcdef"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run."""

    requests: int
    ca: str
    ca_rate: float  #: Certificates a second of the CA alone.
    api_rate: float  #: Of the API server alone: two writes each.
    rate: float  #: The gateway's.
    memory_mb: float  #: The gateway's peak.
    audited: int  #: Certificates with all their lines in the record.

    @property
    def ratio(self) -> float:
        """Of the slower of the two."""
        return self.rate / min(self.ca_rate, self.api_rate)

    def row(self) -> str:
        """A line of a table."""
        return (
            f"| {self.requests} | {self.ca} | {self.ca_rate:.0f} | {self.api_rate:.0f} | {self.rate:.0f} "
            f"| {self.ratio:.2f} | {self.memory_mb:.0f} | {self.audited} |"
        )


HEAD = (
    "| requests | CA | CA alone, 1/s | API server alone, 1/s | gateway, 1/s | of the slower | memory, MB | audited |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def _rate(work: Callable[[Any], object], items: Sequence[Any]) -> float:
    begin = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, items))
    return len(items) / (time.monotonic() - begin)


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


def ca_alone(config: Path, pems: Sequence[bytes]) -> tuple[float, list[Issued]]:
    """By the backend itself."""
    settings = parse(config.read_text())
    backend = registry.configured(settings, ["ca"])["ca"].open()
    wanted = [SignRequest(spec=KUBELET_CLIENT, csr_pem=pem, validity=timedelta(days=1)) for pem in pems]
    answers: list[Any] = []
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(registry.close, backend)
        begin = time.monotonic()
        answers = list(registry.sign_all(backend, wanted, registry.Outage(timedelta(seconds=5)), lambda _: None))
        rate = len(pems) / (time.monotonic() - begin)
    assert all(isinstance(one, Issued) for one in answers), answers[:1]
    return rate, answers


def api_alone(cluster: ClusterApi, names: Sequence[str], answers: Sequence[Issued]) -> float:
    """Approve and issue, each onto a resourceVersion, as the gateway does."""
    admin = cluster.client()
    versions = {one["metadata"]["name"]: one["metadata"] for one in admin.get(CSRS)["items"]}
    api = Api(cluster.kubeconfig("kubernetes-super-admin", "system:masters"))
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    condition = {"type": "Approved", "status": "True", "reason": "x", "message": "x", "lastUpdateTime": now}

    def both(item: tuple[str, Issued]) -> None:
        name, issued = item
        pem = issued.leaf.public_bytes(Encoding.PEM)
        metadata = {key: versions[name][key] for key in ("uid", "resourceVersion")}
        path = f"{CSRS}/{name}"
        reply = api.ask(
            "PATCH", f"{path}/approval", {"metadata": metadata, "status": {"conditions": [condition]}}, MERGE_PATCH
        )
        assert reply.status == 200, reply.message
        metadata["resourceVersion"] = reply.document["metadata"]["resourceVersion"]
        status = {"certificate": base64.b64encode(pem).decode()}
        reply = api.ask("PATCH", f"{path}/status", {"metadata": metadata, "status": status}, MERGE_PATCH)
        assert reply.status == 200, reply.message

    with contextlib.closing(api):
        return _rate(both, list(zip(names, answers, strict=True)))


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
            gateway={"requester_rate": 10 * count, "lease_duration": "30s"},
        )
        if ca == "vault":
            place.with_vault(stack.enter_context(openbao.dev_server()))
        else:
            place.with_openssl()
        ca_rate, answers = ca_alone(place.write(), pems)
        names = create_all(cluster, pems, "alone")
        api_rate = api_alone(cluster, names, answers)
        create_all(cluster, pems, "burst")
        gateway = stack.enter_context(gateways.running(place))
        gateway.until(lambda: _are_signed(gateway, count), 600)
        rate = count / _seconds(gateway)
        memory = _peak_mb(gateway.process.pid)
        assert gateway.end() == 0
        return Measured(
            requests=count, ca=ca, ca_rate=ca_rate, api_rate=api_rate, rate=rate, memory_mb=memory,
            audited=_audited(gateway),
        )  # fmt: skip


def _seconds(gateway: gateways.Gateway) -> float:
    """From the beginning of the watch to the last certificate, by the gateway's own log."""
    lines = gateway.lines()
    begin = next(line["time"] for line in lines if line["message"].startswith("watching"))
    end = [line["time"] for line in lines if line.get("outcome") == "signed"][-1]
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def _are_signed(gateway: gateways.Gateway, count: int) -> bool:
    time.sleep(0.2)
    return gateway.metric("requests_total", signer=CLIENT_KUBELET, outcome="signed") >= count


def _peak_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")) / 1024


def _audited(gateway: gateways.Gateway) -> int:
    found: dict[str, set[str]] = {}
    for line in gateway.audit():
        found.setdefault(line["request"], set()).add(line["event"])
    return sum({"asked", "issued", "installed"} <= events for events in found.values())


def main(arguments: Sequence[str] | None = None, directory: Path | None = None) -> list[Measured]:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gateway", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--ca", action="append", choices=["vault", "openssl"])
    given = parser.parse_args(arguments)
    found = []
    print(HEAD)
    for ca in given.ca or ["vault", "openssl"]:
        with tempfile.TemporaryDirectory(prefix="bench-gateway-", dir=directory) as place:
            found.append(measure(Path(place), given.requests, ca))
            print(found[-1].row(), flush=True)
    return found


if __name__ == "__main__":
    main()
