"""
Day 0 at full size, on real machines: `python -m tests.e2e.day0`, or with `air-gap` behind it.

Three control-plane nodes and two workers from nothing, with CAs whose keys are made inside an OpenBao server, by the
commands of docs/day-0.md; a watch looks at every file that is made on the nodes. Prints what took how long.
With `air-gap` a CA desk with `openssl ca` signs, and bundles are carried.
Takes root, the kit's programs, and about five minutes on two idle cores.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.kit import openbao
from tests.kit.day_zero import AirGap, CAs, Online, walk
from tests.kit.desks import make_desk
from tests.kit.pki import handmade_pki

CONTROL_PLANES = {"dz-cp1": "198.18.77.51", "dz-cp2": "198.18.77.52", "dz-cp3": "198.18.77.53"}
WORKERS = {"dz-w1": "198.18.77.54", "dz-w2": "198.18.77.55"}


def main() -> None:
    """Walk, and print."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        cas: CAs
        if sys.argv[1:] == ["air-gap"]:
            pki = handmade_pki(place / "elsewhere")
            cas = AirGap(desk=make_desk(place / "desk", pki), pki=pki)
        else:
            cas = Online(bao=stack.enter_context(openbao.dev_server()), prefix="dz")
        done = walk(stack, place, cas, CONTROL_PLANES, WORKERS)
        for what, seconds in done.seconds.items():
            print(f"| {what} | {seconds:.1f} s |")
        print(f"{done.seen} files were looked at, and none held a CA's key; nodes: {', '.join(done.nodes)}")


if __name__ == "__main__":
    main()
