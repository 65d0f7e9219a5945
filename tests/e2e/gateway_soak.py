"""
An hour of a cluster whose kubelets get their certificates through gateways, with what they need killed at random.

usage: python -m tests.e2e.gateway_soak [SECONDS] [SEED]     as root; writes docs/gateway-soak.md, to be linked in docs/README.md

Certificates live 6 minutes; gateway, CA or API server is killed every 40 s on average.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from tests.kit import gateway_cluster
from tests.kit.gateway_cluster import Figures, Motion

PAGE = Path(__file__).resolve().parents[2] / "docs/gateway-soak.md"
VALIDITY = "6m"


def page(figures: Figures, seed: int) -> str:
    """What was seen."""
    rows = "".join(
        f"| {line.partition(': ')[0]} | {line.partition(': ')[2]} |\n" for line in figures.lines() if ": " in line
    )
    return f"""\
# The gateway for an hour, with everything killed at random

Written by `python -m tests.e2e.gateway_soak {figures.seconds:.0f} {seed}` on {datetime.now(UTC):%Y-%m-%d}; `tests/e2e/test_gateway_node.py` is its short form.

A real cluster of Kubernetes 1.37 without a CA key: one control plane, two workers that joined by bootstrap token, `serverTLSBootstrap: true`, an API server that verifies kubelets.
Every certificate of a kubelet comes from OpenBao through two gateways, and lives {VALIDITY.removesuffix("m")} minutes.
Gateway, OpenBao and API server are killed by SIGKILL at random moments, and a worker's kubelet asks every two seconds for what it may not have.

| in {figures.seconds / 60:.0f} minutes | |
| --- | --- |
{rows}"""


def main() -> int:
    """Run it; exit 1 if a kubelet's certificate expired, or a wrong one was signed."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3600.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with (
        tempfile.TemporaryDirectory(prefix="gateway-soak-") as directory,
        gateway_cluster.running(Path(directory), validity=VALIDITY, number=150) as cluster,
    ):
        figures = Motion(cluster, seed).run(seconds)
    print("\n".join(figures.lines()), *figures.wrong, sep="\n")
    if figures.wrong or min(figures.least_left.values()) <= 0 or set(figures.hostile) - {"denied", "open"}:
        return 1
    PAGE.write_text(page(figures, seed), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
