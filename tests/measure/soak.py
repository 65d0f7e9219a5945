"""
A cluster whose kubelets get their certificates through gateways, with what they need killed at random, and a flood.

usage: python -m tests.measure.soak [SECONDS] [SEED]     as root; an hour without SECONDS; writes docs/evidence/gateway-soak.md

Certificates live 10 minutes, and a gateway, the CA or the API server is killed once a minute on average.
A kubelet asks anew when 10 to 30 % of the time are left, and waits up to half a minute between two tries: with
certificates that live shorter, one that asks late while the API server is away ends by the kubelet's own patience.
When something went wrong, the logs stay in the directory that is named.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from tests.kit import gateway_cluster
from tests.kit.gateway_cluster import Figures, Motion

PAGE = Path(__file__).resolve().parents[2] / "docs/evidence/gateway-soak.md"
VALIDITY = "10m"
PAUSE_SECONDS = 60.0
#: An honest request has its certificate by then when nothing was killed, and so much memory is enough for a gateway.
SOON_SECONDS, MOST_MB = 10.0, 150.0


def page(figures: Figures, seed: int) -> str:
    """What was seen."""
    rows = "".join(
        f"| {line.partition(': ')[0]} | {line.partition(': ')[2]} |\n" for line in figures.lines() if ": " in line
    )
    return f"""\
# The gateway under random kills, for {figures.seconds / 60:.0f} minutes

Written by `python -m tests.measure.soak {figures.seconds:.0f} {seed}` on {datetime.now(UTC):%Y-%m-%d}; `tests/e2e/test_gateway_node.py` is its short form.

The cluster runs Kubernetes 1.37 without a CA key: one control-plane node, two workers that joined with a bootstrap token, `serverTLSBootstrap: true`, and an API server that verifies kubelets.
OpenBao signs every kubelet certificate, through two gateways, for {VALIDITY.removesuffix("m")} minutes.
Every {PAUSE_SECONDS:.0f} seconds on average, the test kills one of these with SIGKILL: the gateway that works, OpenBao, or the API server, which the kubelet restarts after at most 5 seconds (`crashLoopBackOff.maxContainerRestartPeriod`).
With a worker's kubelet certificate, the test makes a forbidden request every two seconds, and fills the gateways' queue with 1,200 requests of 25 kB each minute.
Every ten seconds another node, which has no kubelet, requests a certificate and waits for it.
Each kubelet requests its next certificate at a random moment after 70 to 90 % of the lifetime, when at least about a minute is left.

| in {figures.seconds / 60:.0f} minutes | |
| --- | --- |
{rows}"""


def main() -> int:
    """Run it; exit 1 if a kubelet's certificate expired, an honest request waited long, or a wrong one was signed."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3600.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    directory = Path(tempfile.mkdtemp(prefix="gateway-soak-"))
    print(f"logs: {directory}", flush=True)
    with gateway_cluster.running(directory, validity=VALIDITY, number=150) as cluster:
        motion = Motion(cluster, seed, lambda text: print(f"{datetime.now(UTC):%H:%M:%S} {text}", flush=True))
        try:
            figures = motion.run(seconds, pause=PAUSE_SECONDS, flood=True)
        finally:
            for node in cluster.nodes:
                shutil.copy(node.root.parent / "kubelet.log", directory / f"{node.name}.kubelet.log")
    print("\n".join(figures.lines()), *figures.wrong, *figures.untrue, sep="\n")
    is_late = max(figures.waited, default=0) > SOON_SECONDS or figures.most_mb > MOST_MB or figures.untrue
    if is_late or figures.wrong or min(figures.least_left.values()) <= 0 or set(figures.hostile) - {"denied", "open"}:
        return 1
    shutil.rmtree(directory)
    PAGE.write_text(page(figures, seed), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
