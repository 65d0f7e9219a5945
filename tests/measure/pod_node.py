"""
Pods on a real node, from minute to minute: 200 at once, the CA away for ten minutes, a renewal, and another root.

`python -m tests.measure.pod_node [--pods N] [--away MINUTES] [--docs]`, as root, takes about 40 minutes, most of them
waiting. Two pods of two namespaces shake hands all the time (OpenSSL, by SPIFFE ID), with the files that they have at that
moment. Their certificates live an hour, and the kubelet asks for the next one 8 to 15 minutes after it has got one: no
kubelet and no pod is restarted. `--docs` writes docs/evidence/pod-node.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tests.kit import pod_site, pods
from tests.kit.issuing import Signer
from tests.kit.nodes import wait_for
from tests.kit.pod_site import ROOTS_SECONDS, SYNC_SECONDS, Holder, Site, pod, talking
from tests.kit.pods import SIGNER

PAGE = Path(__file__).parents[2] / "docs/evidence/pod-node.md"
#: The shortest times that the API server and the kubelet take (docs/pod-certificates.md).
POLICY = pods.POLICY.replace(
    "namespaces = [", 'max_validity = "1h"\nbackdating = "5m"\nrefresh = 20\nnamespaces = [', 1
)
ROLE = {"not_before_duration": "280s"}
SOURCE = pods.source(maxExpirationSeconds=4200)
#: A fifth of the life less the backdating, the kubelet's draw of 5 minutes, its look each 1 to 2, and the file.
RENEWED_SECONDS = 500 + 300 + 120 + SYNC_SECONDS
PAIR = (("shop", "web"), ("bank", "till"))
WAITING = 10


@dataclass(kw_only=True)
class Figures:
    """What was seen, in the page's order."""

    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, what: str, found: str) -> None:
        """One more."""
        self.rows.append((what, found))
        print(f"{datetime.now(UTC):%H:%M:%S} {what}: {found}", flush=True)


@contextlib.contextmanager
def _away(site: Site) -> Iterator[None]:
    """The CA takes connections, and does not answer."""
    os.kill(site.bao.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(site.bao.process.pid, signal.SIGCONT)


def many(site: Site, count: int, figures: Figures) -> None:
    """All of them are made one after the other, within seconds."""
    names = [f"many-{number}" for number in range(count)]
    begin = time.monotonic()
    site.make(*(pod("shop", name, "web", SOURCE) for name in names))
    site.until_running("shop", *names, seconds=1200)
    figures.add(
        f"{count} pods created at once on one node: time until all run, each with its certificate", _since(begin)
    )
    site.remove("shop", *names)
    wait_for("their end", lambda: not set(names) & set(site.phases("shop")), seconds=600)


def without_ca(site: Site, minutes: float, figures: Figures) -> None:
    """Pods that begin meanwhile wait, and their events say why."""
    names = [f"wait-{number}" for number in range(WAITING)]
    with _away(site):
        site.make(*(pod("shop", name, "web", SOURCE) for name in names))
        time.sleep(60 * minutes)
        phases = {site.phases("shop")[name] for name in names}
        assert phases == {"Pending"}, phases
        assert "waits: the CA does not answer" in site.events("shop")
    begin = time.monotonic()
    site.until_running("shop", *names, seconds=600)
    figures.add(
        f"the CA does not answer for {minutes:g} minutes, and {WAITING} pods created meanwhile wait: time from its return "
        "until they run",
        _since(begin),
    )
    denied = site.gateway.metric("requests_total", signer=SIGNER, outcome="denied")
    figures.add("requests denied", f"{denied:.0f}")


def renewed(site: Site, holders: Sequence[Holder], before: Sequence[int], ca: Signer, figures: Figures) -> None:
    """Each has another certificate, below this CA, without a restart of its container or of the kubelet."""
    del site

    def have() -> bool:
        return all(
            one.leaf.serial_number != old and one.leaf.issuer == ca.certificate.subject
            for one, old in zip(holders, before, strict=True)
        )

    begin = time.monotonic()
    wait_for("renewed certificates", have, seconds=RENEWED_SECONDS)
    ages = [datetime.now(UTC) - one.leaf.not_valid_before_utc - timedelta(seconds=280) for one in holders]
    figures.add(f"time until both pods' files have a new certificate from {ca.certificate.subject.rfc4514_string()}",
                f"{_since(begin)} (the older of the two was signed {max(ages).total_seconds() / 60:.0f} min earlier)")  # fmt: skip


def replaced(site: Site, holders: Sequence[Holder], figures: Figures) -> None:
    """Both roots, then certificates below the new one, then the new one alone."""
    new = Signer.make("new pods of corp.example", begin=datetime.now(UTC) - timedelta(days=1))

    def have(count: int) -> bool:
        return all(one.roots.read_text().count("BEGIN") == count for one in holders)

    for roots, wanted in (((site.ca, new), "both roots"), ((new,), "only the new root")):
        begin = time.monotonic()
        pods.trust(site.place, *roots)
        wait_for(wanted, lambda: have(len(roots)), seconds=ROOTS_SECONDS)  # noqa: B023
        figures.add(f"time until both pods' files have {wanted}", _since(begin))
        if wanted == "both roots":
            site.sign_below(new)
            renewed(site, holders, [one.leaf.serial_number for one in holders], new, figures)


def _since(begin: float) -> str:
    return f"{time.monotonic() - begin:.0f} s"


def page(figures: Figures) -> str:
    """What was seen."""
    rows = "".join(f"| {what} | {found} |\n" for what, found in figures.rows)
    return f"""\
# Pods on a real node

Written by `python -m tests.measure.pod_node --docs` on {datetime.now(UTC):%Y-%m-%d}, on two busy cores; `tests/e2e/test_pods_node.py` is its short form.

The test runs a kubeadm node of Kubernetes 1.37 with the manifests of `ca-bridge setup kubernetes`, and a gateway whose CA for pods is OpenBao.
Two pods in two namespaces do TLS handshakes (OpenSSL) all the time, in both directions, each with the key, certificate and roots that its volumes have at that moment; each reads the other's SPIFFE ID.
Certificates are valid for an hour, and the kubelet requests the next one 8 to 15 minutes after it got one; neither the kubelet nor a pod is restarted.

| measured | result |
| --- | --- |
{rows}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 if a handshake failed, or a container was restarted."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.pod_node", description=__doc__)
    parser.add_argument("--pods", type=int, default=200)
    parser.add_argument("--away", type=float, default=10, metavar="MINUTES")
    parser.add_argument("--docs", action="store_true", help=f"write {PAGE.name}")
    given = parser.parse_args(arguments)
    figures, kubelet = Figures(), f"maxPods: {given.pods + 50}\n"
    with contextlib.ExitStack() as stack:
        files = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        site = stack.enter_context(
            pod_site.running("podnode", "198.18.77.198", files, policy=POLICY, kubelet=kubelet, **ROLE)
        )
        site.make(pod("shop", "web", "web", SOURCE), pod("bank", "till", source=SOURCE))
        for namespace, name in PAIR:
            site.until_running(namespace, name)
        holders = [site.holder(*one) for one in PAIR]
        first, containers = [one.leaf.serial_number for one in holders], [site.containers(*one) for one in PAIR]
        with talking(holders[0], holders[1], files) as talks:
            many(site, given.pods, figures)
            without_ca(site, given.away, figures)
            renewed(site, holders, first, site.ca, figures)
            replaced(site, holders, figures)
        figures.add("handshakes", f"{talks.done}, of which {len(talks.failed)} failed")
        is_same = containers == [site.containers(*one) for one in PAIR]
        figures.add("restarts of the two pods' containers", "none" if is_same else "some")
        figures.add("peak memory of the gateway", f"{site.gateway.peak_mb():.0f} MB")
    print(*talks.failed, sep="\n")
    if given.docs:
        PAGE.write_text(page(figures), encoding="utf-8")
    return 1 if talks.failed or not is_same else 0


if __name__ == "__main__":
    raise SystemExit(main())
