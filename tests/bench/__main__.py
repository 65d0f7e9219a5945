"""
The program's speed as ratios, each measured in one run against something real beside it.

`python -m tests.bench [--rounds N] [--readme]` prints a table and writes it to `tests/bench/results.md`;
with `--readme` also into README.md, whose numbers come from nowhere else.
Needs root (kubeadm's `--rootfs` is a chroot) and the programs of `tests/kit/binaries.sh`; run it with the Python of
`.cache/venv-test`, which `scripts/test` made: what else is installed beside the program costs it start-up time.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bridge.specs import AUTHORITIES
from tests.e2e.cas import Bridge, add_vault
from tests.kit import openbao
from tests.kit.pki import KubeadmPki, kubeadm_pki

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
START, END = "<!-- numbers: written by `python -m tests.bench --readme` -->", "<!-- end of numbers -->"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    work: str
    against: str
    ours: list[float]  #: Seconds, one a round.
    theirs: list[float]  #: Seconds, measured right after ours in the same round.
    limit: float

    @property
    def ratio(self) -> float:
        """The median of the rounds' own ratios."""
        return statistics.median(o / t for o, t in zip(self.ours, self.theirs, strict=True))

    def cells(self) -> tuple[str, ...]:
        """For the table."""
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        return self.work, self.against, f"{ours:.3f} s", f"{theirs:.3f} s", f"{self.ratio:.2f}", f"{self.limit:.1f}"


def seconds(action: Callable[[], object]) -> float:
    """Wall time."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def paired(
    work: str, against: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int, limit: float
) -> Row:
    """Measure both by turns, after one round that does not count."""
    ours()
    theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return Row(work=work, against=against, ours=[o for o, _ in times], theirs=[t for _, t in times], limit=limit)


def succeed(bridge: Bridge, *args: str) -> None:
    """Run ca-bridge; a failing one is no measurement."""
    run = bridge.run(*args)
    if run.returncode:
        raise SystemExit(f"ca-bridge {' '.join(args)}: exit {run.returncode}\n{run.stderr}")


def measure(directory: Path, rounds: int) -> Iterator[Row]:
    """All rows; each with a PKI of its own for kubeadm, so that neither disturbs the other."""
    pki = kubeadm_pki(directory / "ours")
    # kubelet.conf is not among the eleven that kubeadm renews
    (pki.kubeconfig_dir / "kubelet.conf").rename(directory / "kubelet.conf")
    local = KubeadmPki(root=directory / "theirs", external=False, version="1.37")
    shutil.copytree(pki.root, local.root)
    for authority in AUTHORITIES.values():
        shutil.copy(pki.ca_dir / authority.key_file, local.pki_dir / authority.key_file)
    bridge = Bridge(pki=pki, directory=directory / "bridge")
    with openbao.dev_server() as bao:
        for name in AUTHORITIES:
            add_vault(bridge, bao, name, "bench")
        yield paired(
            "`renew all`, 11 certificates RSA-2048, through OpenBao",
            "`kubeadm certs renew all` with the CA keys on disk",
            lambda: succeed(bridge, "renew", "all"),
            lambda: local.run_kubeadm("certs", "renew", "all"),
            rounds,
            1.0,
        )
    yield paired(
        "`check-expiration`, cold start",
        "`kubeadm certs check-expiration`",
        lambda: succeed(bridge, "check-expiration"),
        lambda: pki.run_kubeadm("certs", "check-expiration"),
        rounds * 2,
        4.0,
    )
    yield paired(
        "`renew` with nothing due",
        "`python -c pass`",
        lambda: succeed(bridge, "renew"),
        lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
        rounds * 2,
        10.0,
    )


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = ("work", "against", "ours", "theirs", "ratio", "at most")
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *(row.cells() for row in rows))]
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return "\n".join([*lines, "", f"Medians of {len(rows[0].ours)} rounds or more, both by turns, on {machine}.", ""])


def write_readme(text: str) -> None:
    """Between the two marks."""
    old = README.read_text(encoding="utf-8")
    between = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    README.write_text(between.sub(lambda _: f"{START}\n\n{text}\n{END}", old), encoding="utf-8")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        text = table(list(measure(Path(directory), options.rounds)))
    print(text)
    (HERE / "results.md").write_text(text, encoding="utf-8")
    if options.readme:
        write_readme(text)


if __name__ == "__main__":
    main()
