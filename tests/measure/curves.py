"""
How long signing takes: `openssl ca` by the number of CSRs and the length of its index, servers by concurrency.

`python -m tests.measure.curves [--sizes N,…] [--rows N,…] [--concurrency N,…] [--requests N] [--without-servers]` prints
two tables and writes them to `tests/measure/curves.md`, and the values to `curves.json`, of which
`python -m tests.measure.plot` draws `curves.png`. Each backend is used through its contract alone. Needs the programs of
`tests/kit/binaries.sh`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from backends.openssl import OpensslBackend
from backends.openssl.settings import OpensslSettings
from bridge.ca import registry
from bridge.contract import Backend, Issued, SignRequest
from bridge.pki import csr
from bridge.settings.load import load
from bridge.specs import SPECS
from bridge.testing import TestCA
from tests.kit import openbao
from tests.kit.cas import Bridge, add_cfssl, add_vault, live_certificates
from tests.kit.opensslca import make_ca_directory
from tests.kit.pki import handmade_pki
from tests.measure.fleet import VALIDITY, grow_index, seconds, sign_bare

HERE = Path(__file__).parent
SPEC = SPECS["admin.conf"]
SIZES, ROWS, CONCURRENCY = (100, 1_000, 10_000), (0, 10_000, 100_000), (1, 4, 16)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """CSRs signed by `openssl ca`, by us and by one bare process."""

    rows: int  #: In the index before.
    csrs: int
    ours: float  #: Seconds.
    bare: float


@dataclass(frozen=True, kw_only=True)
class Served:
    """CSRs signed by a server."""

    server: str
    concurrency: int
    csrs: int
    ours: float  #: Seconds.


def requests_for(live: x509.Certificate, count: int) -> list[SignRequest]:
    """Renewals of one certificate, each with a key (P-256) of its own."""
    return [
        SignRequest(spec=SPEC, csr_pem=csr.build(live, csr.generate_key("ecdsa-p256")), validity=VALIDITY)
        for _ in range(count)
    ]


def batches(directory: Path, sizes: Sequence[int], rows: Sequence[int]) -> Iterator[Batch]:
    """Each size with each index; ours and the bare one right after another."""
    ca = TestCA.make()
    live = {SPEC.name: ca.leaf(SPEC)}
    requests = requests_for(live[SPEC.name], max(sizes))
    for old in rows:
        for size in sizes:
            new = directory / f"{old}-{size}"  # see `fleet.sign_inbox`
            ours = _ours(new / "ours", ca, requests[:size], old)
            bare = sign_bare(new / "bare", ca, live, [request.csr_pem for request in requests[:size]], old)
            yield Batch(rows=old, csrs=size, ours=ours, bare=bare.seconds)


def _ours(directory: Path, ca: TestCA, requests: Sequence[SignRequest], rows: int) -> float:
    make_ca_directory(directory, ca.certificate_pem, ca.key_pem)
    grow_index(directory, rows)
    backend = OpensslBackend.from_settings(OpensslSettings(dir=directory, timeout=timedelta(minutes=5)))
    answers: list[object] = []
    time = seconds(lambda: answers.extend(backend.sign_many(requests)))
    _check(answers)
    return time


def served(directory: Path, count: int, concurrency: Sequence[int]) -> Iterator[Served]:
    """A real cfssl with mutual TLS and a real OpenBao, set up as `ca-bridge setup` says."""
    pki = handmade_pki(directory / "pki", not_after=datetime.now(UTC) + timedelta(days=20))
    requests = requests_for(live_certificates(pki)[SPEC.name], count)
    with contextlib.ExitStack() as stack:
        signer, vault = (Bridge(pki=pki, directory=directory / name) for name in ("cfssl", "vault"))
        stack.enter_context(add_cfssl(signer, "ca"))
        add_vault(vault, stack.enter_context(openbao.dev_server()), "ca", "bench")
        for server, bridge in (("cfssl", signer), ("OpenBao", vault)):
            for threads in concurrency:
                backend = registry.configured(load(bridge.config), ["ca"])["ca"].open()
                yield Served(server=server, concurrency=threads, csrs=count, ours=_together(backend, requests, threads))
                backend.close()


def _together(backend: Backend, requests: Sequence[SignRequest], threads: int) -> float:
    backend.sign(requests[0])  # the login is not what is measured
    answers: list[object] = []
    with ThreadPoolExecutor(threads) as pool:
        time = seconds(lambda: answers.extend(pool.map(backend.sign, requests)))
    _check(answers)
    return time


def _check(answers: Sequence[object]) -> None:
    wrong = [answer for answer in answers if not isinstance(answer, Issued)]
    if wrong:
        raise SystemExit(f"wanted {len(answers)} certificates, found {len(wrong)} other answers, such as: {wrong[0]}")


def tables(signed: Sequence[Batch], by_servers: Sequence[Served]) -> str:
    """Markdown."""
    lines = ["| rows in the index | CSRs | `sign_many` | one bare `openssl ca` | ratio | each |", f"|{' --- |' * 6}"]
    for one in signed:
        each, ratio = 1000 * one.ours / one.csrs, one.ours / one.bare
        lines.append(
            f"| {one.rows:,} | {one.csrs:,} | {one.ours:.2f} s | {one.bare:.2f} s | {ratio:.2f} | {each:.2f} ms |"
        )
    if by_servers:
        lines += ["", "| server | requests at a time | CSRs | time | certificates a second |", f"|{' --- |' * 5}"]
    for answer in by_servers:
        rate = answer.csrs / answer.ours
        lines.append(f"| {answer.server} | {answer.concurrency} | {answer.csrs:,} | {answer.ours:.2f} s | {rate:.0f} |")
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    load_average = f"load {os.getloadavg()[2]:.1f} in the last quarter of an hour"
    return "\n".join(
        [*lines, "", f"CAs RSA-2048, CSRs P-256 with a key each; one round, on {machine}, {load_average}.", ""]
    )


def numbers(text: str) -> list[int]:
    """The numbers of an option."""
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None, out: Path = HERE) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.curves")
    parser.add_argument("--sizes", type=numbers, default=SIZES)
    parser.add_argument("--rows", type=numbers, default=ROWS)
    parser.add_argument("--concurrency", type=numbers, default=CONCURRENCY)
    parser.add_argument("--requests", type=int, default=1000, help="to each server, for each concurrency")
    parser.add_argument("--without-servers", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        signed = list(batches(Path(directory), options.sizes, options.rows))
        by_servers = (
            [] if options.without_servers else list(served(Path(directory), options.requests, options.concurrency))
        )
    text = tables(signed, by_servers)
    print(text)
    (out / "curves.md").write_text(text, encoding="utf-8")
    values = {
        "openssl": [dataclasses.asdict(one) for one in signed],
        "servers": [dataclasses.asdict(one) for one in by_servers],
    }
    (out / "curves.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
