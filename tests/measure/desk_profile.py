"""
Where the desk's processor time goes, a request: `python -m tests.measure --desk-profile [--nodes N] [--docs]`.

A whole run is measured from outside, all its processes together; then each step is done once more by itself over the
same bundles and answers, in one process. What the steps don't explain is the last row.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from bridge.contract import Issued
from bridge.desk.policy import judge, parse
from bridge.desk.records import Archive, Journal, NewFile, Submitted, write_together
from bridge.pki.bundle import AnswerBundle, RequestBundle, sign_request
from bridge.pki.bundle_format import dumps, loads, loads_answer
from bridge.pki.verify import Expectation, error_of
from bridge.settings.tables import AuditSettings
from bridge.state import Store, audit
from tests.measure import fleet

_HEAD = ("step", "process", "ms per request")
_T = TypeVar("_T")


class _Steps:
    """Rows of the table."""

    def __init__(self, requests: int) -> None:
        self._requests = requests
        self.rows: list[tuple[str, str, float]] = []

    def add(self, step: str, process: str, seconds: float) -> None:
        self.rows.append((step, process, 1000 * seconds / self._requests))

    def measure(self, step: str, process: str, action: Callable[[], _T]) -> _T:
        begin = time.process_time()
        result = action()
        self.add(step, process, time.process_time() - begin)
        return result

    def add_rest(self, total_seconds: float) -> None:
        """What no row explains, and the sum."""
        total = 1000 * total_seconds / self._requests
        rest = total - sum(milliseconds for _, _, milliseconds in self.rows)
        self.rows.append(("checking CSRs for `openssl ca`, reading its certificates, and all other work", "desk", rest))
        self.rows.append(("a whole run", "all", total))


def _of_children(action: Callable[[], object]) -> float:
    """Processor seconds of the programs that were run."""

    def so_far() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = so_far()
    action()
    return so_far() - before


def _start() -> None:
    """Load what each of them does."""
    for module in ("bridge.desk.workers", "bridge.desk.workers", "bridge.cli.app, bridge.cli.desk"):
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)


def measure(directory: Path, nodes: int) -> list[tuple[str, str, float]]:
    """All rows."""
    made = fleet.make_fleet(nodes)
    steps = _Steps(len(made.csrs))
    total = _of_children(lambda: fleet.sign_inbox(directory / "desk", made, nodes))
    bare = _of_children(lambda: fleet.sign_bare(directory / "bare", made.cas["ca"], made.live, made.csrs, 0))
    steps.add("bare `openssl ca` over the same CSRs", "openssl", bare)
    steps.add("starting the desk and two workers", "all", _of_children(_start))
    bundles = _computations(steps, made, directory / "desk")
    _desk(steps, made, bundles, directory)
    steps.add_rest(total)
    return steps.rows


def _computations(steps: _Steps, made: fleet.Fleet, desk: Path) -> list[RequestBundle]:
    policy, now = parse(desk.joinpath("desk-policy.toml").read_text()), datetime.now(UTC)
    cas = {name: (ca.certificate,) for name, ca in made.cas.items()}
    read = steps.measure("reading bundles", "worker", lambda: list(map(loads, made.bundles)))
    bundles = [bundle for bundle in read if isinstance(bundle, RequestBundle)]
    pairs = [(request, bundle) for bundle in bundles for request in bundle.requests]
    steps.measure(
        "judging requests: both signatures, the origin, the policy",
        "worker",
        lambda: [judge(request, bundle, policy, cas[request.authority], now) for request, bundle in pairs],
    )
    expected = {
        name: Expectation(anchors=some, anchor_name=name, now=datetime.now(UTC), min_validity=timedelta(days=7))
        for name, some in cas.items()
    }
    answers = {batch: _issued(answer) for batch, answer in _answers(desk).items()}
    issued = [
        (answers[bundle.batch][request.name], sign_request(request, bundle), expected[request.authority])
        for request, bundle in pairs
    ]
    errors = steps.measure(
        "comparing certificates with requests", "worker", lambda: [error_of(*compared) for compared in issued]
    )
    if any(errors):
        raise SystemExit(f"wanted certificates as they were asked for, found {errors}")
    return bundles


def _issued(answer: AnswerBundle) -> Mapping[str, Issued]:
    return {name: one for name, one in answer.answers.items() if isinstance(one, Issued)}


def _answers(desk: Path) -> dict[str, AnswerBundle]:
    """By batch."""
    answers = [loads_answer(path.read_bytes()) for path in desk.joinpath("outbox").iterdir()]
    return {answer.batch: answer for answer in answers}


def _desk(steps: _Steps, made: fleet.Fleet, bundles: Sequence[RequestBundle], directory: Path) -> None:
    answers = _answers(directory / "desk")
    asked = {one.batch: {r.name: sign_request(r, one) for r in one.requests} for one in bundles}
    pairs = [
        (asked[batch][name], issued) for batch, answer in answers.items() for name, issued in _issued(answer).items()
    ]
    state = directory / "again"
    shutil.rmtree(state, ignore_errors=True)
    store = Store(state)
    store.prepare()
    now = datetime.now(UTC)
    journal = Journal(state / "journal", now)

    def keep() -> None:
        journal.add((request, Submitted(now)) for request, _ in pairs)
        journal.add(pairs)
        journal.forget(request for request, _ in pairs)

    steps.measure("the journal", "desk", keep)

    def record() -> None:
        with audit.Record(store, AuditSettings()) as lines:
            for request, issued in pairs:
                lines.describe(request.spec.name, request, "bench", None)
                lines.add("signed", request.spec.name, old=request.replaces, new=issued.leaf)

    steps.measure("the audit log", "desk", record)
    texts = steps.measure("answers as JSON", "desk", lambda: [dumps(answers[one.batch]) for one in bundles])
    archive = Archive(state / "done", state)
    archive.prepare()

    def deliver() -> None:
        whole = zip(bundles, made.bundles, texts, strict=True)
        errors = write_together(
            [
                [
                    NewFile(path=state / f"{bundle.node}.answer.json", data=text),
                    *archive.files(bundle, bundle.batch, data, answers[bundle.batch], text, is_proven=True),
                ]
                for bundle, data, text in whole
            ]
        )
        if any(errors):
            raise SystemExit(f"wanted all answers written, found {errors}")

    steps.measure("writing answers and the archive", "desk", deliver)


def table(rows: Sequence[tuple[str, str, float]]) -> str:
    """Markdown."""
    lines = [_HEAD, ("---",) * len(_HEAD), *((step, where, f"{value:.3f}") for step, where, value in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
