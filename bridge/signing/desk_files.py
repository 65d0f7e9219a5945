"""What `sign` does with files: bundles and CSRs in, answers out, and what a person sees of it."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import typer

from bridge.contract import Issued
from bridge.errors import BridgeError, Exit, SettingsError, SettingsProblem
from bridge.pki.bundle import (
    MAX_BYTES,
    AnswerBundle,
    Bundle,
    BundleError,
    IncompleteBundleError,
    Refusal,
    answer_suffix,
    digest,
    dumps,
    file_names,
    loads,
    loads_request,
)
from bridge.pki.certificates import load_pem_certificates
from bridge.pki.expiry import is_due
from bridge.settings.load import DEFAULT_FILE
from bridge.settings.tables import RenewalSettings, Settings
from bridge.signing import csr_directory
from bridge.signing.desk import Desk, Job, RefusedByPolicyError
from bridge.signing.desk_journal import Journal
from bridge.signing.desk_policy import Policy, parse
from bridge.specs import SPECS
from bridge.state import audit
from bridge.state.store import Store
from bridge.system.console import log, print_error, printable
from bridge.system.files import lock, write_atomically
from bridge.system.safe_read import UnreadableError, read

POLICY_NAME = "desk-policy.toml"
#: A copy that has not grown for so long will not be whole any more.
STALE = timedelta(minutes=10)
_ANSWER_MODE = 0o644  #: Certificates are public, and who fetches it is another user.
_SECONDS_BETWEEN_LINES = 10.0
#: Objects made until Python looks for cycles: a fleet's bundles are many objects with none, and looking takes a twentieth.
_GARBAGE = 100_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says."""

    source: Path
    out: Path | None = None
    policy: Path | None = None
    archive: Path | None = None
    dry_run: bool = False
    approve: bool = False
    without_proof: frozenset[str] = frozenset()
    node: str = ""  #: For a directory of CSRs, which say it nowhere.
    cluster: str = ""
    wait: timedelta = timedelta()


def sign(settings: Settings, options: Options, now: Callable[[], datetime]) -> int:
    """
    Sign, or say what would be signed, and return the exit code.

    Raises:
        BridgeError: Nothing could be begun; everything later is said as it happens, and in the exit code.
    """
    unknown = sorted(options.without_proof - SPECS.keys())
    if unknown:
        raise SettingsError([SettingsProblem("--without-proof", f"one of {', '.join(SPECS)}", ", ".join(unknown))])
    policy = _policy(settings, options)
    approve = _Terminal().approve if options.approve and not options.dry_run else None
    desk = Desk(settings, policy, now, without_proof=options.without_proof, approve=approve)
    if not options.source.exists():
        raise BridgeError(f"{options.source}: wanted a bundle, or a directory of bundles or CSRs, found nothing")
    with contextlib.closing(desk):
        work = _dry_run if options.dry_run else _run
        return work(desk, settings, policy, options, now)


def _run(desk: Desk, settings: Settings, policy: Policy, options: Options, now: Callable[[], datetime]) -> int:
    store = Store(settings.node.state_dir)
    store.prepare()
    gc.set_threshold(_GARBAGE)
    with lock(store.lock, "ca-bridge sign", options.wait), contextlib.ExitStack() as stack:
        journal = stack.enter_context(Journal(store.directory / "desk-answers.jsonl", now()))
        record = stack.enter_context(audit.Record(store, settings.audit))
        work = _jobs(desk, settings, policy, options, now)
        _sweep(options.out)
        observer = stack.enter_context(_observer(work))
        desk.run(work.jobs, journal, record, observer)
    if not observer.seen and not work.codes:
        _assert_inbox(options.source, _archive(policy, options))
        typer.echo(f"{options.source}: no request bundles")
    return Exit.worst([*work.codes, *observer.codes])


def _assert_inbox(source: Path, archive: Path) -> None:
    """
    Raises:
        BridgeError: What has no bundle has CSRs in directories below it.
    """
    if any(not path.is_relative_to(archive) for path in csr_directory.find(source)):
        raise _whose(source)


def _whose(source: Path) -> BridgeError:
    return BridgeError(f"{source}: wanted to know whose CSRs these are", hint="say it with --node and --cluster")


def _archive(policy: Policy, options: Options) -> Path:
    return options.archive or policy.desk.archive or options.source / "done"


def _sweep(outbox: Path | None) -> None:
    """Remove what a killed run left half written."""
    if outbox is not None and outbox.is_dir():
        for path in outbox.glob(".*.answer.json.*"):
            path.unlink()


def _policy(settings: Settings, options: Options) -> Policy:
    """
    Raises:
        SettingsError: There is none, it can't be read, or not everything in it is right.
    """
    beside = (settings.source.file or DEFAULT_FILE).with_name(POLICY_NAME)
    path = options.policy or beside
    try:
        data = read(path)
    except UnreadableError as e:
        raise SettingsError([SettingsProblem("", "a policy file", str(e), path)]) from None
    if data is None:
        hint = "config/desk/desk-policy.toml, which is installed with the program, is one to begin with"
        raise SettingsError([SettingsProblem("", "a policy file", "none", path)], hint=hint)
    try:
        return parse(data.decode(), path)
    except UnicodeDecodeError as e:
        raise SettingsError([SettingsProblem("", "UTF-8 text", f"byte {e.start} is not", path)]) from None


# --- where bundles come from, and where answers go --------------------------------------------------------------------


@dataclass(kw_only=True)
class _Work:
    """Jobs as they are read, and what became of files that make none."""

    jobs: Iterator[Job] = field(default_factory=lambda: iter(()))
    codes: list[int] = field(default_factory=list)
    total: int | None = None  #: Bundles; known before the first is read.
    seen: set[str] = field(default_factory=set)  #: Digests.


def _jobs(desk: Desk, settings: Settings, policy: Policy, options: Options, now: Callable[[], datetime]) -> _Work:
    source = options.source
    if not source.is_dir():
        beside = source.with_name(f"{source.stem}{answer_suffix(settings.authorities)}")
        return _one_bundle(source, options.out or beside)
    if options.node or options.cluster or (options.out is None and csr_directory.find(source)):
        return _csrs(desk, settings, options, now())
    if options.out is None or options.out.resolve() == source.resolve():
        raise BridgeError(f"{source}: wanted another directory for the answers", hint="name it with -o")
    if not options.out.is_dir():
        raise BridgeError(f"{options.out}: wanted a directory for the answers, found none")
    return _inbox(_Places(source, options.out, _archive(policy, options), tuple(settings.authorities)), now)


def _one_bundle(path: Path, out: Path) -> _Work:
    """
    Raises:
        BridgeError: It can't be read.
    """
    try:
        bundle = loads_request(read(path) or b"")
    except UnreadableError as e:
        raise BridgeError(f"{path}: wanted a request bundle, found: {e}") from None
    except BundleError as e:
        raise BridgeError(f"{path}: {e}", hint=e.hint) from None
    asked = digest(bundle)

    def deliver(answer: AnswerBundle) -> str:
        write_atomically(out, dumps(answer), _ANSWER_MODE)
        return str(out)

    return _Work(
        jobs=iter([Job(bundle=bundle, digest=asked, label=str(path), deliver=deliver, earlier=_earlier(out, asked))]),
        total=1,
    )


def _earlier(path: Path, asked: str) -> dict[str, Issued]:
    """Certificates that an earlier run has delivered for the same request."""
    with contextlib.suppress(UnreadableError, BundleError):
        answer = loads(read(path) or b"")
        if isinstance(answer, AnswerBundle) and answer.request_digest == asked:
            return {name: one for name, one in answer.answers.items() if isinstance(one, Issued)}
    return {}


def _csrs(desk: Desk, settings: Settings, options: Options, now: datetime) -> _Work:
    """
    Raises:
        BridgeError: No node and cluster were named, or not all files are kubeadm's.
    """
    if not options.node or not options.cluster:
        raise _whose(options.source)
    found = csr_directory.load(
        options.source,
        node=options.node,
        cluster=options.cluster,
        validity=settings.renewal.validity,
        created=now.replace(microsecond=0),
    )
    target = options.out or options.source
    asked, earlier = digest(found.bundle), _beside(found, target, settings.renewal, now)

    def deliver(answer: AnswerBundle) -> str:
        issued = {name: one for name, one in answer.answers.items() if isinstance(one, Issued)}
        csr_directory.deliver(found, target, issued, desk.anchor("ca"))
        return str(target)

    job = Job(bundle=found.bundle, digest=asked, label=str(options.source), deliver=deliver, earlier=earlier)
    return _Work(jobs=iter([job]), total=1)


def _beside(
    found: csr_directory.CsrDirectory, target: Path, renewal: RenewalSettings, now: datetime
) -> dict[str, Issued]:
    """Certificates that are where an earlier run has delivered its own, and are not due; whether they fit is seen later."""
    earlier = {}
    for name, relative in found.files.items():
        with contextlib.suppress(UnreadableError, ValueError):
            leaf, *intermediates = load_pem_certificates(read(target / relative.with_suffix(".crt")) or b"")
            if not is_due((leaf, *intermediates), renewal.before, renewal.validity, now):
                earlier[name] = Issued(leaf=leaf, intermediates=tuple(intermediates))
    return earlier


@dataclass(frozen=True, slots=True)
class _Places:
    """Of an inbox."""

    inbox: Path
    outbox: Path
    archive: Path
    authorities: tuple[str, ...]  #: The desk's, for the answers' names.


def _inbox(places: _Places, now: Callable[[], datetime]) -> _Work:
    names = sorted(
        entry.name
        for entry in os.scandir(places.inbox)
        if not entry.name.startswith(".") and not entry.is_dir(follow_symlinks=False)
    )
    work = _Work(total=len(names))

    def jobs() -> Iterator[Job]:
        for name in names:
            job = _inbox_job(places.inbox / name, places, work, now)
            if job is not None:
                yield job

    work.jobs = jobs()
    return work


def _inbox_job(path: Path, places: _Places, work: _Work, now: Callable[[], datetime]) -> Job | None:
    """None: nothing to sign, and said why."""
    try:
        status = path.lstat()
        bundle = _bundle(path)
    except FileNotFoundError:
        return None  # taken back
    except IncompleteBundleError as e:
        if now().timestamp() - status.st_mtime > STALE.total_seconds():
            work.codes.append(Exit.FAILED)
            print_error(e, f"{path}: not whole since {STALE}")
        else:
            log.info("%s: left alone, as it is still being copied", path)
        return None
    except BridgeError as e:
        work.codes.append(e.exit_code)
        print_error(e, str(path) if isinstance(e, BundleError) else "")
        return None
    if isinstance(bundle, AnswerBundle):
        return None  # both ways through one directory
    asked = digest(bundle)
    if asked in work.seen:
        log.info("%s: the same bundle once more; the next run puts it away", path)
        return None
    work.seen.add(asked)
    request_name, answer_name = file_names(bundle.node, asked, places.authorities)
    out = places.outbox / answer_name

    def deliver(answer: AnswerBundle) -> str:
        write_atomically(out, dumps(answer), _ANSWER_MODE)
        _put_away(path, status, places.archive / request_name)
        return str(out)

    return Job(bundle=bundle, digest=asked, label=str(path), deliver=deliver, earlier=_earlier(out, asked))


def _bundle(path: Path) -> Bundle:
    """
    Raises:
        BridgeError: It is none, or can't be read.
        FileNotFoundError: It is not there any more.
    """
    if path.is_symlink():
        raise BridgeError(f"{path}: wanted a file, found a symbolic link")
    if path.suffix == ".csr":
        hint = "kubeadm's CSRs are signed in a directory of their own: `sign DIR --node NAME --cluster NAME`"
        raise BridgeError(f"{path}: wanted a request bundle, found a CSR", hint=hint)
    try:
        return loads(read(path) or b"")
    except UnreadableError as e:
        raise BridgeError(f"{path}: wanted a bundle of at most {MAX_BYTES} bytes, found: {e}") from None


def _put_away(path: Path, status: os.stat_result, target: Path) -> None:
    """Into the archive, unless somebody has put another file there meanwhile."""
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        now = path.lstat()
        if (now.st_ino, now.st_mtime_ns, now.st_size) != (status.st_ino, status.st_mtime_ns, status.st_size):
            log.warning("%s: another file came under this name; the next run takes it", path)
            return
        if now.st_dev == target.parent.stat().st_dev:
            path.rename(target)  # undone by a power cut, it would be put away again
        else:
            write_atomically(target, path.read_bytes(), _ANSWER_MODE)
            path.unlink()


# --- what a person sees -----------------------------------------------------------------------------------------------


def _dry_run(desk: Desk, settings: Settings, policy: Policy, options: Options, now: Callable[[], datetime]) -> int:
    """Judge everything, write and sign nothing."""
    work, codes = _jobs(desk, settings, policy, options, now), []
    if not work.total:
        _assert_inbox(options.source, _archive(policy, options))
    for job in work.jobs:
        desk.judged(job)
        good = [request.name for request in job.to_sign]
        if good:
            typer.echo(f"{_who(job)}: would sign {', '.join(good)}")
        codes += _tell_troubles(job)
    return Exit.worst([*work.codes, *codes])


def _who(job: Job) -> str:
    return f"{job.bundle.node} ({job.bundle.cluster})"


def _tell_troubles(job: Job) -> list[int]:
    """Each reason once, with the names that it is for."""
    reasons: dict[tuple[str, int, str], list[str]] = {}
    errors: dict[str, BridgeError] = {
        **{name: RefusedByPolicyError(one.reason) for name, one in job.answers.items() if isinstance(one, Refusal)},
        **job.troubles,
    }
    for name, error in errors.items():
        reasons.setdefault((error.reason, error.exit_code, error.hint), []).append(name)
    for names in reasons.values():
        error = errors[names[0]]
        said = "refused: " if isinstance(error, RefusedByPolicyError) else ""
        print_error(error, f"{job.label}: {', '.join(names)}: {said}".removesuffix(": "))
    return [error.exit_code for error in errors.values()]


class _Observer:
    """Lines for what is done; where that takes long, the rate and the time that is left."""

    def __init__(self, total: int | None) -> None:
        self.codes: list[int] = []
        self.seen = 0
        self._total = total
        self._certificates = 0
        self._begin = self._last = time.monotonic()

    def answered(self, job: Job, where: str) -> None:
        self.seen += 1
        signed = sum(isinstance(answer, Issued) for answer in job.answers.values())
        self._certificates += signed
        refused = len(job.answers) - signed
        if where:
            counts = f"{signed} signed{f', {refused} refused' if refused else ''}"
            typer.echo(f"{_who(job)}: {counts}: {where}")
        self.codes += set(_tell_troubles(job))
        self._progress()

    def _progress(self) -> None:
        moment = time.monotonic()
        if moment - self._last >= _SECONDS_BETWEEN_LINES:
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


class _BarObserver(_Observer):
    """The same as a bar, on a terminal."""

    def __init__(self, total: int | None, bars: Any) -> None:
        super().__init__(total)
        self._bars = bars
        self._task = bars.add_task("signing", total=total)

    def _progress(self) -> None:
        self._bars.update(self._task, completed=self.seen, description=self._text(time.monotonic()))


@contextlib.contextmanager
def _observer(work: _Work) -> Iterator[_Observer]:
    if not (sys.stderr.isatty() and (work.total or 0) > 1):
        yield _Observer(work.total)
        return
    from rich.console import Console  # noqa: PLC0415 (60 ms; only on a terminal)
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn  # noqa: PLC0415

    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _BarObserver(work.total, bars)


class _Terminal:
    """The person at the desk, at the terminal that this process belongs to, wherever its input and output go."""

    def __init__(self) -> None:
        """
        Raises:
            BridgeError: There is no terminal.
        """
        try:
            self._out = open("/dev/tty", "w", encoding="utf-8", errors="replace")  # noqa: PTH123, SIM115 (for the whole run)
            self._in = open("/dev/tty", encoding="utf-8", errors="replace")  # noqa: PTH123, SIM115
        except OSError as e:
            hint = "cron has none; without --approve the policy alone decides"
            raise BridgeError(f"wanted a terminal to ask on, found: {e.strerror}", hint=hint) from None

    def approve(self, job: Job, text: str) -> tuple[bool | None, str]:
        """As `desk.Approver`."""
        names = ", ".join(request.name for request in job.to_sign)
        self._say(f"\n{printable(job.label)}\n{text}\n")
        while True:
            self._say(f"sign {names}? [yes: sign / no: refuse / later] ")
            answer = self._in.readline()
            if answer.strip().lower() in {"yes", "y"}:
                return True, _person()
            if answer.strip().lower() in {"no", "n"}:
                self._say("reason, for the node: ")
                return False, f"{self._in.readline().strip() or 'no reason was given'} ({_person()})"
            if not answer or answer.strip().lower() in {"later", "l"}:
                return None, _person()

    def _say(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def _person() -> str:
    """Who logged in, before sudo."""
    doer = audit.who()
    return doer.get("login") or os.environ.get("SUDO_USER") or doer["user"]
