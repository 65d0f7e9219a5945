"""
After an installation: restart components on old certificates, prove that all run on the new ones, or roll back.

The states of an installation, in the order of this file:

- unproven: recorded on disk before the installation, until every certificate is seen in use. A run that was cut off,
  or could not restart a component, leaves the work to the next run, even if nothing is due then.
- proving: components are restarted, then checked until all use the new files or `restart.prove_for` is over.
- outcome: two rules turn the findings into a ruling.
- rollback: the old files come back, unless `restart.on_failure` is "keep". It is recorded the same way, until every
  restarted component runs on the old files again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from bridge import control_plane
from bridge.control_plane import proof
from bridge.control_plane.probes import ProofState
from bridge.control_plane.proof import ProofFinding, ProofReport
from bridge.control_plane.restarts import ImpossibleError, Restarted, Restarts, restarted_since
from bridge.errors import BridgeError, Exit, PostponedError
from bridge.node.inventory import Node
from bridge.pki.certificates import serial_hex
from bridge.renewal import in_use
from bridge.renewal.hooks import HookEvent
from bridge.renewal.in_use import NotLiveError, sentence
from bridge.specs import AUTHORITIES, Component
from bridge.state import Outcome, backups
from bridge.state.obligations import NotProven, unproven_file
from bridge.state.session import Run
from bridge.state.static_pods import StoppedError
from bridge.system.console import log
from bridge.system.state_file import StateError

_FAILED = ("refused", "no-answer")
_STAYS = "it stays, as in each emergency: do the same on the other nodes; each run here restarts and looks again"


class RolledBackError(BridgeError):
    """An installed certificate did not work, and the old files are back."""

    exit_code: ClassVar[int] = Exit.ROLLED_BACK
    hint = "the new files had passed every check before; the error says what failed, or did not start again, with them"


class UnprovenError(BridgeError):
    """The proof could not tell whether an installed certificate works."""

    hint = "the next `ca-bridge renew` looks again; `ca-bridge prove` shows what could not be seen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """The result of restarts, proof and rollback."""

    restarted: tuple[Restarted, ...] = ()
    proven: int | None = None  #: Number of checks that passed in the last look; None: no look.
    errors: tuple[BridgeError, ...] = ()
    rolled_back: RolledBackError | None = None  #: Also among the errors.
    events: Mapping[str, HookEvent] = field(default_factory=dict)  #: For hooks; by ID of the run that installed.
    may_go_on: bool = True  #: False: stopped by a signal, or in the middle of a rollback; nothing must be installed.


# --- unproven --------------------------------------------------------------------------------------------------------


def record_due(run: Run, outcomes: Sequence[Outcome], *, stays: bool = False) -> None:
    """Record, before the installation, which certificates must be proven; those of earlier runs stay recorded."""
    node, unproven = run.read_node(), unproven_file(run.store).read() or NotProven(certificates=())
    failed = [f for f in proof.look(node, run.settings, run.now()).wrong if f.state in _FAILED]
    unproven = unproven.live_on(node).with_installed(
        outcomes, run.record.run_id, lambda name: frozenset(f.what for f in failed if f.certificate == name)
    )
    unproven_file(run.store).put(dataclasses.replace(unproven, going_back="", stays=stays or unproven.stays or None))


def finish(run: Run, node: Node) -> Activation:
    """Continue the installations of this run and of earlier ones from their recorded state, as far as possible."""
    try:
        unproven = unproven_file(run.store).read()
    except StateError as e:
        return Activation(errors=(e,), may_go_on=False)
    return Activation() if unproven is None else _finish(run, node, unproven)


def _finish(run: Run, node: Node, unproven: NotProven) -> Activation:
    if run.settings.restart.method == "none":
        return _left_to_people(run, node, unproven)
    if unreadable := unproven.unreadable_on(node):
        troubles = "; ".join(f"{item.spec.name}: {item.trouble}" for item in unreadable)
        return _result(run, unproven, [UnprovenError(f"installed, and not proven: {troubles}")])
    if unproven.going_back:
        return _roll_back(run, unproven)
    unproven = unproven.live_on(node)
    if not unproven.certificates and not unproven.to_restart:
        unproven_file(run.store).remove()
        return Activation()
    return _prove(run, node, unproven)


def _left_to_people(run: Run, node: Node, unproven: NotProven) -> Activation:
    """With `restart.method = "none"` an operator restarts: each run reports certificates that are not seen in use."""
    live = unproven.live_on(node)
    left, errors = in_use.finish(run, node, unproven)
    in_use.keep(unproven_file(run.store), dataclasses.replace(left, going_back=""))
    if unproven.going_back and live.certificates:
        errors.insert(0, NotLiveError(f"installed, and it was to go back, since {unproven.going_back}"))
    in_use_now = tuple(certificate for certificate in live.certificates if certificate not in left.certificates)
    done = dataclasses.replace(live, certificates=in_use_now)
    waiting = _result(run, left, errors)
    return dataclasses.replace(waiting, events={**_result(run, done, []).events, **waiting.events})


# --- proving: restarts -----------------------------------------------------------------------------------------------


def _prove(run: Run, node: Node, unproven: NotProven) -> Activation:
    restarted = _restart(run, node, _to_restart(run, node, unproven), force=bool(unproven.stays))
    if _is_stopped(restarted):
        return _result(run, unproven, _errors_of(restarted), restarted)
    report, more = _look(run, unproven, restarted)
    restarted += more
    if _is_stopped(more):
        return _result(run, unproven, _errors_of(restarted), restarted)
    return _judged(run, unproven, restarted, report)


def _to_restart(run: Run, node: Node, unproven: NotProven) -> list[Component]:
    """Choose what to restart before a look: nothing that reloads, and for earlier runs or "needed" only if stale."""
    wanted = run.settings.restart.components
    reloads = control_plane.reloading(node, run.settings.node)
    specs = {name: in_use.installed_spec(node, name) for name in unproven.names}
    is_ours = {certificate.name: certificate.newest_run == run.record.run_id for certificate in unproven.certificates}
    new = control_plane.stale([specs[name] for name in unproven.names if is_ours[name]], reloads, wanted)
    others = control_plane.stale([specs[name] for name in unproven.names if not is_ours[name]], reloads, wanted)
    old = {*others, *unproven.to_restart}
    stale: list[Component] = []
    is_looked_at = bool(node.manifests) or node.is_worker
    if is_looked_at and (old or (new and wanted.which == "needed")):
        report = proof.look(node, run.settings, run.now())
        stale = report.stale
        if wanted.which == "needed":
            new = [c for c in new if c in stale or (c is Component.KUBELET and not _has_read(report))]
    done = restarted_since(run.store, _backup_of(run, unproven, newest=True)) if old else []
    unseen = [c for c in old if c not in done and (c is Component.KUBELET or not is_looked_at)]
    return [c for c in control_plane.ORDER if c in new or (c in old and (c in stale or c in unseen))]


def _has_read(report: ProofReport) -> bool:
    """Whether the kubelet is seen to use or reload its new client certificate."""
    return _all_in_use(f for f in report.findings if f.component is Component.KUBELET and f.what.startswith("has read"))


def _all_in_use(findings: Iterable[ProofFinding]) -> bool:
    states = {finding.state for finding in findings}
    return bool(states) and states <= {"current", "next-connection"}


def _backup_of(run: Run, unproven: NotProven, *, newest: bool) -> backups.Backup | None:
    """Return the backup of the newest or of the first installation; None: it is gone."""
    wanted = {certificate.newest_run if newest else certificate.backup_of for certificate in unproven.certificates}
    backups_of_runs = [backup for backup in backups.read_all(run.store)[0] if backup.run_id in wanted]
    return backups_of_runs[0 if newest else -1] if backups_of_runs else None


def _restart(
    run: Run, node: Node, components: Sequence[Component], *, force: bool = False, going_back: bool = False
) -> list[Restarted]:
    restarts = Restarts(
        node=node, settings=run.settings, store=run.store, record=run.record, force=force, going_back=going_back
    )
    return restarts.all(components)


def _errors_of(restarted: Sequence[Restarted]) -> list[BridgeError]:
    return [restart.error for restart in restarted if restart.error is not None]


def _is_stopped(restarted: Sequence[Restarted]) -> bool:
    """Whether a signal stopped the restarts: a component that may still be starting can't be proven."""
    return any(isinstance(restart.error, StoppedError) for restart in restarted)


def _look(run: Run, unproven: NotProven, restarted: Sequence[Restarted]) -> tuple[ProofReport, list[Restarted]]:
    """Look until every check passes; restart a component that should have reloaded and did not."""
    names, done = unproven.names, {restart.component for restart in restarted}
    if any(isinstance(restart.error, PostponedError) for restart in restarted):
        return _look_until(
            run, lambda f: f.certificate in names and f.state in _FAILED and unproven.is_new(f.certificate, f.what)
        ), []
    stuck = {restart.component for restart in restarted if isinstance(restart.error, ImpossibleError)}

    def counts(finding: ProofFinding) -> bool:
        return finding.certificate in names and not (finding.state == "stale" and finding.component in stuck)

    report = _look_until(run, counts)
    late = {f.component for f in report.wrong if f.state == "stale" and f.certificate in names}
    more = [component for component in control_plane.ORDER if component in late and component not in done]
    if not more or run.settings.restart.components.which == "listed":
        return report, []
    again = _restart(run, run.read_node(), more, force=bool(unproven.stays))
    stuck |= {restart.component for restart in again if isinstance(restart.error, ImpossibleError)}
    return _look_until(run, counts), again


def _look_until(run: Run, counts: Callable[[ProofFinding], bool]) -> ProofReport:
    return proof.within(run.read_node, run.settings, run.now, run.settings.restart.prove_for, counts=counts)


# --- outcome: the rules ----------------------------------------------------------------------------------------------


class Meaning(Enum):
    """The meaning of one finding about a certificate for its installation."""

    AS_BEFORE = "it was so before the installation"
    LATER = "its component's restart is postponed"
    LEFT = "its component's restart is left to the operator"
    UNSEEN = "it can't be seen now"
    NOT_IN_USE = "its component runs on the old one"
    BROKEN = "it does not work"


class Ruling(Enum):
    """The decision about the installation as a whole."""

    PROVEN = "it stays, and no work is open"
    POSTPONED = "it stays, and the next run goes on"
    LEFT = "it stays, and the operator restarts the rest"
    UNPROVEN = "it stays, and the next run looks again"
    FAILED = "it goes back, or stays, as restart.on_failure says"


def meaning(state: ProofState, *, postponed: bool, ours: bool, new: bool) -> Meaning | None:
    """
    Return the meaning of one finding; None: nothing is wrong. A component is `ours` to restart if the settings list it,
    or list none, and it can be restarted; a finding is `new` if it did not exist before the installation.
    """
    if state not in ("stale", "unknown", *_FAILED):
        return None
    if not new:
        return Meaning.AS_BEFORE
    if state != "stale":
        return Meaning.UNSEEN if state == "unknown" else Meaning.BROKEN
    if postponed:
        return Meaning.LATER
    return Meaning.NOT_IN_USE if ours else Meaning.LEFT


def rule(meanings: Collection[Meaning], *, postponed: bool, failed: bool, impossible: bool = False) -> Ruling:
    """Decide the outcome of the installation; a postponed or impossible restart does not count as failed."""
    if postponed and not failed and Meaning.BROKEN not in meanings:
        return Ruling.POSTPONED
    if failed or Meaning.BROKEN in meanings or Meaning.NOT_IN_USE in meanings:
        return Ruling.FAILED
    if Meaning.UNSEEN in meanings and not impossible:
        return Ruling.UNPROVEN
    return Ruling.LEFT if impossible or Meaning.LEFT in meanings else Ruling.PROVEN


# --- outcome ---------------------------------------------------------------------------------------------------------


def _judged(run: Run, unproven: NotProven, restarted: Sequence[Restarted], report: ProofReport) -> Activation:
    """Judge an installation by its own certificates alone, ignoring faults that existed before it."""
    postponed = {restart.component: restart.error for restart in restarted if isinstance(restart.error, PostponedError)}
    impossible = _impossible(unproven, restarted, report)
    failures = [e for e in _errors_of(restarted) if not isinstance(e, PostponedError | ImpossibleError)]
    seen = _meanings(run, unproven, postponed, impossible, report)
    ruling = rule(seen.keys(), postponed=bool(postponed), failed=bool(failures), impossible=bool(impossible))
    proven = len(report.findings) - len(report.wrong)
    if ruling is Ruling.FAILED:
        decisive = [f for m in (Meaning.BROKEN, Meaning.NOT_IN_USE, Meaning.UNSEEN) for f in seen.get(m, [])]
        why = "; ".join([*map(str, failures), *([sentence(decisive)] if decisive else [])])
        if unproven.stays or run.settings.restart.on_failure == "keep":
            error = NotLiveError(f"installed, and not in use: {why}", hint=_STAYS if unproven.stays else None)
            return _result(run, unproven, [error], restarted, proven)
        log.error("the new certificates do not work, so the old ones are put back: %s", why)
        back = _roll_back(run, dataclasses.replace(unproven, going_back=why))
        return dataclasses.replace(back, restarted=tuple(restarted), proven=proven)
    if ruling is Ruling.PROVEN:
        unproven_file(run.store).remove()
    errors = [*postponed.values()] if ruling is Ruling.POSTPONED else _remaining(ruling, seen, [*impossible.values()])
    return _result(run, unproven, errors, restarted, proven)


def _impossible(
    unproven: NotProven, restarted: Sequence[Restarted], report: ProofReport
) -> dict[Component | None, ImpossibleError]:
    """Find components that can't be restarted from here, and that no operator has visibly restarted by hand."""
    findings = [finding for finding in report.findings if finding.certificate in unproven.names]
    return {
        restart.component: restart.error
        for restart in restarted
        if isinstance(restart.error, ImpossibleError)
        and not _all_in_use(finding for finding in findings if finding.component is restart.component)
    }


def _meanings(
    run: Run,
    unproven: NotProven,
    postponed: Collection[Component],
    impossible: Collection[Component | None],
    report: ProofReport,
) -> dict[Meaning, list[ProofFinding]]:
    listed = run.settings.restart.components.listed
    seen: dict[Meaning, list[ProofFinding]] = {}
    for finding in report.wrong:
        verdict = meaning(
            finding.state,
            postponed=finding.component in postponed,
            ours=(not listed or finding.component in listed) and finding.component not in impossible,
            new=unproven.is_new(finding.certificate, finding.what),
        )
        if verdict is not None and finding.certificate in unproven.names:
            seen.setdefault(verdict, []).append(finding)
    return seen


def _remaining(
    ruling: Ruling, seen: Mapping[Meaning, Sequence[ProofFinding]], impossible: Sequence[ImpossibleError]
) -> list[BridgeError]:
    """Return errors about installed certificates that stay unused or unproven for now."""
    if ruling is Ruling.UNPROVEN:
        return [UnprovenError(f"installed, and not proven: {sentence(seen[Meaning.UNSEEN])}")]
    if ruling is Ruling.LEFT and impossible:
        return [NotLiveError(f"installed, and still to be restarted: {e}", hint=e.hint) for e in impossible]
    if ruling is Ruling.LEFT:
        text = f"installed, and not in use by components that restart.components does not list: {sentence(seen[Meaning.LEFT])}"
        return [NotLiveError(text, hint="restart it (`ca-bridge restart NAME`), or list it")]
    if as_before := seen.get(Meaning.AS_BEFORE):
        text = f"installed, and as before the renewal this does not work: {sentence(as_before)}"
        return [NotLiveError(text, hint="`ca-bridge prove` shows each check")]
    return []


def _result(
    run: Run,
    unproven: NotProven,
    errors: Sequence[BridgeError],
    restarted: Sequence[Restarted] = (),
    proven: int | None = None,
    *,
    may_go_on: bool = True,
) -> Activation:
    rolled_back = next((error for error in errors if isinstance(error, RolledBackError)), None)
    return Activation(
        restarted=tuple(restarted),
        proven=proven,
        errors=tuple(errors),
        rolled_back=rolled_back,
        events=_hook_events(run, unproven, errors, is_back=rolled_back is not None),
        may_go_on=may_go_on and not _is_stopped(restarted),
    )


def _hook_events(
    run: Run, unproven: NotProven, errors: Sequence[BridgeError], *, is_back: bool
) -> dict[str, HookEvent]:
    items = {item.spec.name: item for item in run.read_node().items}
    replaced = {backup.run_id: backup for backup in backups.read_all(run.store)[0]}
    serials = {
        (id_, certificate.get("name")): certificate.get("old_serial")
        for id_, backup in replaced.items()
        for certificate in backup.certificates
    }
    hook_events = {}
    for run_id in dict.fromkeys(certificate.newest_run for certificate in unproven.certificates):
        certificates = [certificate for certificate in unproven.certificates if certificate.newest_run == run_id]
        live = (
            []
            if is_back
            else [
                certificate.name
                for certificate in certificates
                if certificate.name in items and items[certificate.name].certificates
            ]
        )
        new = {name: serial_hex(items[name].certificates[0]) for name in live}
        old = {
            certificate.name: serials.get((certificate.backup_of, certificate.name))
            for certificate in certificates
            if certificate.name in new
        }
        paths = [p for name in new for p in (items[name].certificate_path, items[name].key_path) if p is not None]
        hook_events[run_id] = HookEvent(
            names=tuple(certificate.name for certificate in certificates),
            old_serials={name: serial for name, serial in old.items() if serial},
            new_serials=new,
            files=tuple(map(str, paths)),
            backup_id=replaced[run_id].backup_id if run_id in replaced else None,
            exit_code=Exit.worst([error.exit_code for error in errors]),
            errors=tuple(map(str, errors)),
        )
    return hook_events


# --- rollback --------------------------------------------------------------------------------------------------------


def _roll_back(run: Run, unproven: NotProven) -> Activation:
    """Put the old files back and restart the components that run on the new ones, or continue a rollback."""
    live = unproven.live_on(run.read_node())
    # certificates replaced since then stay; if none of the new ones is live, all old files are back already
    unproven = live if live.certificates else unproven
    if live.certificates:
        on_new = restarted_since(run.store, _backup_of(run, unproven, newest=False))
        unproven = dataclasses.replace(unproven, to_restart=tuple(dict.fromkeys([*unproven.to_restart, *on_new])))
    has_begun = False
    late: Sequence[BridgeError] = ()
    try:
        backup = _backup(run, live) if live.certificates else None
        unproven_file(run.store).put(unproven)
        has_begun = True
        if backup is not None:
            # these files were in use a minute ago, so only damage counts, not the rules for new certificates
            late = backups.put_back(run, backup, run.read_node(), lambda problem: not problem.is_damage).late
    except BridgeError as e:
        text = f"installed, and not in use: {unproven.going_back}; it was not rolled back: {e}"
        return _result(run, unproven, [NotLiveError(text)], may_go_on=not has_begun)
    wanted, restarted = _restart_back(run, unproven)
    done = {restart.component for restart in restarted if restart.error is None}
    left = tuple(component for component in wanted if component not in done)
    with contextlib.suppress(BridgeError):  # if it fails, the next run restarts more than it needs to
        unproven_file(run.store).put(dataclasses.replace(unproven, to_restart=left))
    if left and all(isinstance(restart.error, PostponedError) for restart in restarted if restart.component in left):
        after = f"the next run goes on: {'; '.join(map(str, _errors_of(restarted)))}"
    else:
        after = _on_the_old_files(run, unproven, restarted)
    if not left:
        unproven_file(run.store).remove()
    where = f" to {backup.backup_id}" if backup is not None else ""
    error = RolledBackError(f"rolled back{where}, since {unproven.going_back}; {after}")
    return _result(run, unproven, [error, *late], restarted)


def backup_of(run: Run, unproven: NotProven, *more: str) -> backups.Backup:
    """Merge the backups of one or several runs: files that were in use, and `more` (BridgeError: a backup is gone)."""
    by_run = {backup.run_id: backup for backup in backups.read_all(run.store)[0]}
    missing = {certificate.backup_of for certificate in unproven.certificates} - by_run.keys()
    if missing:
        raise BridgeError(f"there is no backup of run {', '.join(sorted(missing))}")
    sources = list(
        {certificate.backup_of: by_run[certificate.backup_of] for certificate in unproven.certificates}.values()
    )
    files = [
        f
        for certificate in unproven.certificates
        for f in by_run[certificate.backup_of].files
        if f.certificate == certificate.name
    ]
    files += [f for source in sources for f in source.files if f.certificate in more]
    return dataclasses.replace(
        sources[0], backup_id=", ".join(source.backup_id for source in sources), files=tuple(files)
    )


def _backup(run: Run, unproven: NotProven) -> backups.Backup:
    """Return `backup_of`, with the CAs that were replaced beside the files (BridgeError: it can't be put back)."""
    node, now = run.read_node(), run.now()
    backup = backup_of(run, unproven, *AUTHORITIES)
    damage = [str(problem) for problem in backups.problems_of(backup, run.settings, node, now) if problem.is_damage]
    if damage:
        raise BridgeError("; ".join(damage))
    expired = [o.name for o in backups.outcomes_of(backup, node) if o.new and o.new.not_valid_after_utc <= now]
    if expired:
        raise BridgeError(f"the old certificates have expired: {', '.join(expired)}")
    return backup


def _restart_back(run: Run, unproven: NotProven) -> tuple[list[Component], list[Restarted]]:
    """Restart the components that the run had restarted, and those that reloaded the new files and still use them."""
    node = run.read_node()
    stale = proof.look(node, run.settings, run.now()).stale if node.manifests else []
    components = [c for c in control_plane.ORDER if c in unproven.to_restart or c in stale]
    return components, _restart(run, node, components, going_back=True)


def _on_the_old_files(run: Run, unproven: NotProven, restarted: Sequence[Restarted]) -> str:
    report = _look_until(run, lambda f: f.certificate in unproven.names)
    wrong = [finding for finding in report.wrong if finding.certificate in unproven.names]
    failures = list(map(str, _errors_of(restarted)))
    if failures or wrong:
        text = "; ".join([*failures, *([sentence(wrong)] if wrong else [])])
        return f"the old ones do not work, either: {text}"
    return f"everything runs on the old files again ({len(report.findings) - len(report.wrong)} checks hold)"
