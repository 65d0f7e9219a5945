"""`sign`: the CA desk."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, TextIO

import typer

from bridge.cli.declare import Common, argument, command, option
from bridge.cli.options import PolicyOption, WaitOption, utc_now
from bridge.cli.printing import VALUES_BEGIN, say, say_sentence, wrapped
from bridge.contract import Issued
from bridge.desk.desk import Desk, Job, Observer, RefusedByPolicyError
from bridge.desk.files import Options, Session, load_answer_key, load_policy
from bridge.errors import BridgeError, Exit
from bridge.pki.bundle import Refusal
from bridge.settings.tables import Settings
from bridge.state import audit
from bridge.system import waiting
from bridge.system.console import Doing, columns, doing, is_lively, log, print_error, printable

_SECONDS_BETWEEN_LINES = 10.0
_WITHOUT_PROOF = (
    "after a look at who asks, `ca-bridge sign --without-proof NAME` signs what the policy allows without a proof"
)
_INTERRUPTED = "interrupted; the same command again delivers what was signed, and goes on"

commands = typer.Typer()


@command(commands, "sign")
def sign(
    common: Common,
    source: Annotated[Path, argument("A request bundle, a directory of them, or one of kubeadm's CSRs.", "BUNDLE|DIR")],
    out: Annotated[
        Path | None, option("Where answers go. [default: beside a bundle or the CSRs]", "--output", "-o", "ANSWER|DIR")
    ] = None,
    policy: PolicyOption = None,
    archive: Annotated[
        Path | None, option("Where answered bundles go. [default: desk.archive, or the state directory]")
    ] = None,
    dry_run: Annotated[bool, option("Say what would be signed and refused; sign nothing.")] = False,
    approve: Annotated[bool, option("Show each bundle on the terminal, and ask whether to sign it.")] = False,
    without_proof: Annotated[
        list[str] | None, option("Require no continuity proof for this certificate; may be repeated.", "NAME")
    ] = None,
    node: Annotated[str, option("The node whose CSRs the directory holds.")] = "",
    cluster: Annotated[str, option("The cluster of that node.")] = "",
    wait: WaitOption = timedelta(),
) -> int:
    """
    Sign what the policy allows, at the CA desk: request bundles of nodes, or kubeadm's CSRs.

    With a directory it is the CA host's cron job: it leaves half-copied bundles alone, archives answered ones, and
    does not sign again what an interrupted run had signed. A refusal goes back to its node in the answer.
    """
    options = Options(
        source=source.absolute(),
        out=out.absolute() if out is not None else None,
        policy=policy.absolute() if policy is not None else None,
        archive=archive.absolute() if archive is not None else None,
        without_proof=frozenset(without_proof or ()),
        node=node,
        cluster=cluster,
    )
    return _run(common.settings(), options, wait, dry_run=dry_run, approve=approve)


def _run(settings: Settings, options: Options, wait: timedelta, *, dry_run: bool, approve: bool) -> int:
    rules = load_policy(settings, options.policy)
    options.assert_usable(rules)
    approver = _Terminal().approve if approve and not dry_run else None
    codes: list[int] = []

    def passed_over(path: str, error: BridgeError) -> None:
        codes.append(error.exit_code)
        print_error(error, path)

    key = load_answer_key(rules)
    desk = Desk(settings, rules, utc_now, without_proof=options.without_proof, approve=approver, answer_key=key)
    session = Session(settings, rules, options, utc_now, passed_over)
    try:
        with contextlib.closing(desk):
            if dry_run:
                codes += _dry_run(desk, session)
            elif not session.run(desk, wait, lambda total: _observer(total, codes)):
                say(f"{options.source}: no request bundles")
    except KeyboardInterrupt as e:
        raise BridgeError(_INTERRUPTED, exit_code=waiting.exit_code(e)) from None
    return Exit.worst(codes)


def _dry_run(desk: Desk, session: Session) -> list[int]:
    """Judge every request; write and sign nothing."""
    codes: list[int] = []
    jobs, _ = session.work(desk)
    for job in jobs:
        desk.judged(job)
        if good := [request.name for request in job.to_sign]:
            say_sentence(f"{_who(job)}: would sign {', '.join(good)}")
        if job.reissued:
            say_sentence(f"{_who(job)}: signed before, and not again: {', '.join(sorted(job.reissued))}")
        codes += _tell_troubles(job)
    return codes


def _who(job: Job) -> str:
    return f"{job.bundle.node} ({job.bundle.cluster})"


def _tell_troubles(job: Job) -> list[int]:
    """Print each reason once, with the certificates that it is about; return the errors' exit codes."""
    reasons: dict[tuple[str, int, str], list[str]] = {}
    refusals = {name: answer for name, answer in job.answers.items() if isinstance(answer, Refusal)}
    errors: dict[str, BridgeError] = {name: _refused(job, name, refusal) for name, refusal in refusals.items()}
    errors |= job.troubles
    for name, error in errors.items():
        reasons.setdefault((error.reason, error.exit_code, error.hint), []).append(name)
    last = {hint: names for (_, _, hint), names in reasons.items()}
    for (_, _, hint), names in reasons.items():
        error = errors[names[0]]
        said = "refused: " if isinstance(error, RefusedByPolicyError) else ""
        about = f"{job.label}: {', '.join(names)}: {said}".removesuffix(": ")
        print_error(error, about, has_hint=names is last[hint])
    return [error.exit_code for error in errors.values()]


def _refused(job: Job, name: str, answer: Refusal) -> BridgeError:
    verdict = job.verdicts.get(name)
    is_for_proof = verdict is not None and verdict.may_waive and answer.reason.startswith("proof: ")
    return RefusedByPolicyError(answer.reason, hint=_WITHOUT_PROOF if is_for_proof else None)


class _Observer:
    """Prints each answered bundle and, if the run takes long, the rate and the time left."""

    def __init__(self, total: int, codes: list[int], line: Doing | None = None) -> None:
        self._codes = codes  #: Exit codes of the bundles are added here.
        self._line = line  #: The moving line on a terminal.
        self.seen = 0
        self._total = total
        self._certificates = 0
        self._begin = self._last = time.monotonic()

    def answered(self, job: Job, where: str) -> None:
        self.seen += 1
        issued = {name for name, answer in job.answers.items() if isinstance(answer, Issued)}
        self._certificates += len(issued)
        if where:
            new, again, refused = issued - job.reissued, issued & job.reissued, job.answers.keys() - issued
            say_sentence(f"{_who(job)}: {_counts(len(new), len(again), len(refused))}: {where}")
        self._codes += set(_tell_troubles(job))
        moment = time.monotonic()
        if self._line is not None:
            self._line.text = f"signing: {self._text(moment)}"
        elif moment - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = moment
            log.info("%s", self._text(moment))

    def _text(self, moment: float) -> str:
        passed = moment - self._begin
        rate = self._certificates / passed if passed else 0.0
        text = f"{self.seen} of {self._total} bundles, {self._certificates} certificates ({rate:.0f}/s)"
        if self._total and self.seen:
            left_seconds = (self._total - self.seen) * passed / self.seen
            text += f", about {timedelta(seconds=round(left_seconds))} left"
        return text


def _counts(signed: int, again: int, refused: int) -> str:
    parts = [f"{signed} signed"] if signed or not again else []
    parts += [f"{again} signed before, the same certificates again"] if again else []
    parts += [f"{refused} refused"] if refused else []
    return ", ".join(parts)


@contextlib.contextmanager
def _observer(total: int, codes: list[int]) -> Iterator[Observer]:
    is_line = is_lively(sys.stderr) and total > 1
    with doing("signing") if is_line else contextlib.nullcontext() as line:
        yield _Observer(total, codes, line).answered


class _Terminal:
    """The person at the desk, asked on the controlling terminal even if input and output are redirected."""

    def __init__(self) -> None:
        """Open the terminal (BridgeError: there is none)."""
        self._in: TextIO
        self._out: TextIO
        try:
            self._out = open("/dev/tty", "w", encoding="utf-8", errors="replace")  # noqa: PTH123, SIM115 (for the whole run)
            self._in = open("/dev/tty", encoding="utf-8", errors="replace")  # noqa: PTH123, SIM115
        except OSError as e:
            if sys.stdin.isatty():  # as under `su -c`
                self._out, self._in = sys.stderr, sys.stdin
                return
            hint = "cron has none; without --approve the policy alone decides"
            raise BridgeError(f"wanted a terminal to ask on, found: {e.strerror}", hint=hint) from None

    def approve(self, job: Job, text: str) -> tuple[bool | None, str]:
        names = ", ".join(request.name for request in job.to_sign)
        lines = [part for line in text.splitlines() for part in wrapped(line, columns(), VALUES_BEGIN)]
        question = wrapped(f"sign {names}?", columns(), len("sign "))
        self._say("\n".join(["", printable(job.label), *lines, "", *question, ""]))
        while True:
            self._say("[yes: sign / no: refuse / later] ")
            answer = self._in.readline()
            if answer.strip().lower() in {"yes", "y"}:
                return True, audit.person()
            if answer.strip().lower() in {"no", "n"}:
                self._say("reason, for the node: ")
                return False, f"{self._in.readline().strip() or 'no reason was given'} ({audit.person()})"
            if not answer or answer.strip().lower() in {"later", "l"}:
                return None, audit.person()
            self._say("the answer is yes, no or later\n")

    def _say(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
