"""
Draws `tests/measure/curves.png` from `curves.json`: `python -m tests.measure.plot`.

Needs matplotlib alone (`pip install --require-hashes --no-deps -r requirements-bench.lock`), and no part of the program.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
_COLOURS = ("#0072b2", "#e69f00", "#cc3311")  # the colour-blind see the difference, too


def main() -> None:
    """Read, draw, write."""
    values = json.loads(HERE.joinpath("curves.json").read_text(encoding="utf-8"))
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.color": "#dddddd", "legend.frameon": False})  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_openssl(left, values["openssl"])
    draw_servers(right, values["servers"])
    figure.savefig(HERE / "curves.png", dpi=150, metadata={"Software": None})


def draw_openssl(axes: Any, batches: list[dict[str, Any]]) -> None:
    """Seconds by number of CSRs, for each length of the index."""
    for colour, rows in zip(_COLOURS, sorted({one["rows"] for one in batches}), strict=False):
        mine = [one for one in batches if one["rows"] == rows]
        sizes = [one["csrs"] for one in mine]
        axes.plot(sizes, [one["ours"] for one in mine], "o-", color=colour, label=f"ca-bridge, {rows:,} rows")
        bare = [one["bare"] for one in mine]
        axes.plot(sizes, bare, "s--", color=colour, alpha=0.6, markersize=4, label=f"bare, {rows:,} rows")
    axes.set(xscale="log", yscale="log", xlabel="CSRs", ylabel="seconds")
    axes.set_title("openssl ca, by rows in its index", loc="left")
    axes.legend()


def draw_servers(axes: Any, served: list[dict[str, Any]]) -> None:
    """Certificates a second by requests at a time."""
    for colour, server in zip(_COLOURS, sorted({one["server"] for one in served}), strict=False):
        mine = [one for one in served if one["server"] == server]
        threads = [one["concurrency"] for one in mine]
        axes.plot(threads, [one["csrs"] / one["ours"] for one in mine], "o-", color=colour, label=server)
        axes.set_xticks(threads, [str(number) for number in threads])
    axes.set(xlabel="requests at a time", ylabel="certificates a second")
    axes.set_ylim(bottom=0)
    axes.set_title("cfssl and OpenBao on the same machine", loc="left")
    axes.legend()


if __name__ == "__main__":
    main()
