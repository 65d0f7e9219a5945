"""
Day 0 at full size, on real machines: `python -m tests.measure.day0 [--docs]`, or with `air-gap` behind it.

Three control-plane nodes and two workers from nothing, with CAs whose keys are made inside an OpenBao server, by the
commands of docs/day-0.md; a watch looks at every file that is made on the nodes. Prints what took how long; with
`--docs` also into docs/evidence/day-0.md, whose figures come from nowhere else.
With `air-gap` a CA desk with `openssl ca` signs, and bundles are carried.
Takes root, the kit's programs, and about five minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.kit import openbao
from tests.kit.day_zero import AirGap, CAs, Online, Walk, walk
from tests.kit.desks import make_desk
from tests.kit.pki import handmade_pki
from tests.measure.__main__ import write_between

DOCUMENT = Path(__file__).parents[2] / "docs/evidence/day-0.md"
CONTROL_PLANES = {"dz-cp1": "198.18.77.51", "dz-cp2": "198.18.77.52", "dz-cp3": "198.18.77.53"}
WORKERS = {"dz-w1": "198.18.77.54", "dz-w2": "198.18.77.55"}
FIRST, *FURTHER = CONTROL_PLANES


def _seconds(taken: float) -> str:
    return f"{taken:.0f}" if taken >= 10 else f"{taken:.1f}"


def table(done: Walk) -> str:
    """For the document."""
    taken = done.seconds

    def between(nodes: Iterable[str], *steps: str) -> str:
        """Seconds that these steps took together: the least, and the most."""
        sums = sorted(sum(taken[f"{name}: {step}"] for step in steps) for name in nodes)
        return " to ".join(dict.fromkeys(map(_seconds, (sums[0], sums[-1]))))

    def joined(nodes: Sequence[str]) -> str:
        return f"{between(nodes, 'bootstrap share', 'bootstrap join')}, then {between(nodes, 'kubeadm join')}"

    office = [what for what in ("bootstrap orders", "bootstrap setup vault") if what in taken]
    rows = [
        (
            f"{' and '.join(f'`{what}`' for what in office)} for all nodes",
            _seconds(sum(taken[what] for what in office)),
        ),
        (
            "`bootstrap init`, then `kubeadm init`",
            f"{between([FIRST], 'bootstrap init')}, then {between([FIRST], 'kubeadm init')}",
        ),
        ("`bootstrap share` and `join`, then `kubeadm join`, for a control-plane node", joined(FURTHER)),
        ("`bootstrap share` and `join`, then `kubeadm join`, for a worker", joined(list(WORKERS))),
    ]
    seen = [
        (
            "control-plane nodes, all nodes",
            f"{sum('control-plane' in one for one in done.nodes.values())}, {len(done.nodes)}",
        ),
        ("etcd members", done.members),
        ("CertificateSigningRequests", done.requests),
        ("files on the nodes that the kernel reported to the test", done.seen),
        ("… that held a CA key or had its file name", 0),  # or `walk` had failed
    ]
    lines = ["| step | seconds |\n| --- | --- |\n", *(f"| {what} | {text} |\n" for what, text in rows)]
    return "".join(
        [*lines, "\n| counted | result |\n| --- | --- |\n", *(f"| {what} | {text} |\n" for what, text in seen)]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Walk, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.day0")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("cas", nargs="?", choices=["air-gap"], help="a CA desk, and bundles are carried")
    options = parser.parse_args(arguments)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        cas: CAs
        if options.cas == "air-gap":
            pki = handmade_pki(place / "elsewhere")
            cas = AirGap(desk=make_desk(place / "desk", pki), pki=pki)
        else:
            cas = Online(bao=stack.enter_context(openbao.dev_server()), prefix="dz")
        done = walk(stack, place, cas, CONTROL_PLANES, WORKERS)
    for what, seconds in done.seconds.items():
        print(f"{what}: {seconds:.1f} s")
    text = table(done)
    print(text)
    if options.docs:
        command = " ".join(["python -m tests.measure.day0 --docs", *([options.cas] if options.cas else [])])
        write_between(DOCUMENT, f"<!-- numbers: written by `{command}` -->", text)


if __name__ == "__main__":
    main()
