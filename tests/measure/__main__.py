"""
The program's speed as ratios, each measured in one run against something real beside it.

`python -m tests.measure [--rounds N] [--nodes N] [--docs]` prints a table and writes it to `tests/measure/results.md`;
with `--docs` also into docs/evidence/numbers.md, whose numbers come from nowhere else, and with it go the tables of
`desk_profile` and `start_up`.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bridge.specs import AUTHORITIES
from tests.kit import openbao
from tests.kit.cas import Bridge, add_vault
from tests.kit.pki import KubeadmPki, kubeadm_pki
from tests.measure import desk_profile, fleet, start_up
from tests.measure.fleet import seconds

_RATIO = (
    "A ratio is the median of the rounds' own ratios, so it can differ from the quotient of the two medians; "
    "**missed** marks a limit that the ratio exceeds."
)
_MEMORY_LIMIT = 400.0  # MB
HERE = Path(__file__).parent
NUMBERS = HERE.parents[1] / "docs/evidence/numbers.md"
START, END = "<!-- numbers: written by `python -m tests.measure --docs` -->", "<!-- end of numbers -->"
PROFILE = "<!-- desk: written by `python -m tests.measure --docs` -->"
START_UP = "<!-- start: written by `python -m tests.measure --docs` -->"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    work: str
    against: str
    ours: list[float]  #: One a round.
    theirs: list[float]  #: Measured right after ours in the same round.
    limit: float  #: Infinite: shown for comparison.
    unit: str = "s"

    @property
    def ratio(self) -> float:
        """The median of the rounds' own ratios, as the table has it, so that its verdict is about what a reader sees."""
        return round(statistics.median(o / t for o, t in zip(self.ours, self.theirs, strict=True)), 2)

    def cells(self) -> tuple[str, ...]:
        """For the table."""
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        values = [f"{value:.3f} s" if self.unit == "s" else f"{value:.0f} {self.unit}" for value in (ours, theirs)]
        return (
            self.work,
            self.against,
            *values,
            f"{self.ratio:.2f}",
            f"{self.limit:.1f}" + ", **missed**" * (self.ratio > self.limit),
        )


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
    bridge = Bridge(pki=pki, directory=directory / "bridge", warm=False)  # as users start it
    with openbao.dev_server() as bao:
        for name in AUTHORITIES:
            add_vault(bridge, bao, name, "bench")
        yield paired(
            "`renew all` of 11 RSA-2048 certificates through OpenBao",
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
        lambda: python("pass"),
        rounds * 2,
        11.0,
    )


def python(code: str) -> None:
    """Run a Python that does just this."""
    subprocess.run([sys.executable, "-c", code], check=True)


def measure_desk(directory: Path, rounds: int, nodes: int) -> Iterator[Row]:
    """The CA desk with a whole fleet's bundles."""
    made = fleet.make_fleet(nodes)
    few, count = max(1, nodes // 10), f"{nodes * len(fleet.NAMES):,}"
    fleet.sign_inbox(directory / "first", made, few)
    runs = [
        (
            fleet.sign_inbox(directory / f"desk-{number}", made, nodes),
            fleet.sign_bare(directory / f"bare-{number}", made.cas["ca"], made.live, made.csrs, 0),
            fleet.sign_inbox(directory / f"part-{number}", made, few),
        )
        for number in range(rounds)
    ]
    ours = [many.seconds for many, _, _ in runs]
    yield Row(
        work=f"`sign` of an inbox: {nodes:,} bundles, {count} P-256 CSRs, three RSA-2048 CAs with `openssl ca`",
        against="one bare `openssl ca -infiles` over the same CSRs",
        ours=ours,
        theirs=[bare.seconds for _, bare, _ in runs],
        limit=2.0,
    )
    yield Row(
        work=f"the same {count} CSRs",
        against=f"{few * len(fleet.NAMES):,} of them",
        ours=ours,
        theirs=[part.seconds for _, _, part in runs],
        limit=11.0,
    )
    yield Row(
        work="the desk's memory, all processes together",
        against="a limit",
        ours=[many.megabytes for many, _, _ in runs],
        theirs=[_MEMORY_LIMIT] * len(runs),
        limit=1.0,
        unit="MB",
    )


def machine() -> str:
    """The machine that is measured."""
    return f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = ("work", "compared with", "ca-bridge", "the other", "ratio", "limit")
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *(row.cells() for row in rows))]
    fewest = min(len(row.ours) for row in rows)
    said = f"Times are medians of at least {fewest} rounds, both sides in turn, on {machine()}."
    return "\n".join([*lines, "", said, _RATIO, ""])


def write_between(file: Path, start: str, text: str) -> None:
    """Into a document, between the mark `start` and `END`."""
    old = file.read_text(encoding="utf-8")
    between = re.compile(f"{re.escape(start)}.*?{re.escape(END)}", re.DOTALL)
    file.write_text(between.sub(lambda _: f"{start}\n\n{text}\n{END}", old), encoding="utf-8")


def _profile_desk(nodes: int, *, docs: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        text = desk_profile.table(desk_profile.measure(Path(directory), nodes))
    print(text)
    if docs:
        write_between(NUMBERS, PROFILE, f"{nodes:,} bundles, ten requests each; {machine()}.\n\n{text}")


def _count_start_up(*, docs: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        text = start_up.table(Path(directory))
    print(text)
    if docs:
        write_between(NUMBERS, START_UP, f"{text}\n")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nodes", type=int, default=1000, help="of the fleet, ten certificates each")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--desk-profile", action="store_true", help="only where the desk's time goes, a request")
    parser.add_argument("--start-up", action="store_true", help="only what a command with nothing due loads")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each run compiles what an installed program has compiled
    if options.start_up:
        _count_start_up(docs=options.docs)
        return
    if options.desk_profile:
        _profile_desk(options.nodes, docs=options.docs)
        return
    with tempfile.TemporaryDirectory() as directory:
        # the desk's rows take half a minute a round, and differ less
        desk = measure_desk(Path(directory), max(1, options.rounds // 2), options.nodes)
        text = table([*measure(Path(directory), options.rounds), *desk])
        print(text)
        (HERE / "results.md").write_text(text, encoding="utf-8")
        if options.docs:
            write_between(NUMBERS, START, text)
            _profile_desk(options.nodes, docs=True)  # while the other files are there, see `fleet.sign_inbox`
            _count_start_up(docs=True)


if __name__ == "__main__":
    main()
