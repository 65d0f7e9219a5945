"""
A burst of pods: what the gateway's processor takes for a pod's certificate, beside the API server and OpenBao in one run.

`python -m tests.measure.pods [--requests N] [--answered N] [--docs]`: all requests are there when the gateway begins, among others
that were answered before and stay for a quarter of an hour; each is judged twice by its pod, service account and node, as
the API server has them. What it takes to read the others alone is measured first, by another gateway. `--docs` writes the table into docs/pod-certificates.md. Needs `kube-apiserver` and `etcd` of `tests/kit/binaries.sh`.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bridge.pki.expiry import rfc3339
from tests.kit import cluster_api, gateways, openbao, pods
from tests.kit.api_client import ApiClient
from tests.kit.cluster_api import ClusterApi
from tests.kit.issuing import Signer
from tests.measure.__main__ import write_between
from tests.measure.gateway import (
    DOCS,
    LEASES,
    MOST_MEMORY_MB,
    _are_signed,
    _Clock,
    _held,
    _pids,
    _standing_by,
    against_limit,
)

_THREADS, _PODS_A_NODE = 8, 100
START = "<!-- numbers: written by `python -m tests.measure.pods --docs` -->"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.pods", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--answered", type=int, default=18_000)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/pod-certificates.md")
    given = parser.parse_args(arguments)
    count = given.requests
    with tempfile.TemporaryDirectory() as name, cluster_api.running() as cluster, openbao.dev_server() as bao:
        gateways.grant_rights(cluster)
        pods.grant_rights(cluster)
        ca = Signer.make("pods", begin=datetime.now(UTC) - timedelta(days=1))
        place = pods.with_vault(pods.place(cluster, Path(name)), bao, ca)
        place.gateway |= {"pod_rate": 100_000, "pod_namespace_rate": 100_000, "lease_duration": "60s"}
        made = [pods.make_pod(cluster, node=f"w{number // _PODS_A_NODE}") for number in range(count)]
        _by_all(cluster, _answer, itertools.repeat(made[0].body(), given.answered))
        cluster.client().create(LEASES, _held())
        with _standing_by(place) as gateway:
            reading = _Clock({"gateway": gateway.process.pid})
            _let_work(cluster)
            gateway.until(lambda: _has_read_all(gateway), 600)
            read_ms = reading.run(count).cpu_ms["gateway"]
            assert gateway.end() == 0
        _let_work(cluster)
        _by_all(cluster, _ask, (pod.body() for pod in made))
        cluster.client().create(LEASES, _held())
        with _standing_by(place) as gateway:
            clock = _Clock({"gateway": gateway.process.pid, **_pids(cluster), "OpenBao": bao.process.pid})
            _let_work(cluster)
            gateway.until(lambda: _are_signed(gateway, count), 600)
            run, memory = clock.run(count), gateway.peak_mb()
            assert gateway.end() == 0
    used = run.cpu_ms
    cells = " | ".join(f"{one:.2f} ms" for one in used.values())
    text = (
        f"| new requests | all requests | peak memory, MB | {' | '.join(used)} |\n| --- | --- | --- |{' --- |' * len(used)}\n"
        f"| {count} | {count + given.answered} | {memory:.0f} | {cells} |\n\nFor pods, "
        f"{against_limit(used)}.\nThe limit of memory is {MOST_MEMORY_MB} MB.\nTo read the other {given.answered} requests once, the "
        f"gateway takes {read_ms:.2f} ms of processor time for each of the {count}."
    )
    print(text, f"{run.rate:.0f} a second", sep="\n")
    if given.docs:
        write_between(DOCS / "pod-certificates.md", START, f"{text}\n")


def _let_work(cluster: ClusterApi) -> None:
    """Take the lease from its holder."""
    assert cluster.client().ask("DELETE", f"{LEASES}/{_held()['metadata']['name']}").ok


def _has_read_all(gateway: gateways.Gateway) -> bool:
    time.sleep(1)  # the gateway pays for the page
    return gateway.metric("watch_complete") == 1


def _by_all(
    cluster: ClusterApi, act: Callable[[ApiClient, dict[str, Any]], None], bodies: Iterable[dict[str, Any]]
) -> None:
    """Each thread with a connection of its own, as an administrator."""
    everything = list(bodies)
    pair = cluster.credentials("kubernetes-super-admin", "system:masters")

    def work(number: int) -> None:
        who = ApiClient(url=cluster.url, trust=cluster.pki_dir / "ca.crt", pair=pair)
        for body in everything[number::_THREADS]:
            act(who, body)
        who.session.close()

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(work, range(_THREADS)))


def _ask(who: ApiClient, body: dict[str, Any]) -> None:
    who.create(pods.collection(body["metadata"]["namespace"]), body)


def _answer(who: ApiClient, body: dict[str, Any]) -> None:
    """A request that was denied."""
    collection = pods.collection(body["metadata"]["namespace"])
    name = who.create(collection, body)["metadata"]["name"]
    condition = {
        "type": "Denied",
        "status": "True",
        "reason": "Bench",
        "lastTransitionTime": rfc3339(datetime.now(UTC)),
    }
    reply = who.patch(f"{collection}/{name}/status", {"status": {"conditions": [condition]}})
    assert reply.ok, reply.text[-300:]


if __name__ == "__main__":
    main()
