"""
After an installation: restart what runs on old certificates, prove that all runs on the new ones, or go back.

That this is owed is on disk before anything is installed, and stays there until it is proven: a run that was cut off, or
could not restart a component, leaves it to the next one, due or not. So is that the old files are coming back, until
everything that had been restarted runs on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar

from bridge.control_plane import proof, restart_plan
from bridge.control_plane.proof import ProofFinding, ProofReport
from bridge.control_plane.restarts import ImpossibleError, Restarted, restart_all, restarted_since
from bridge.control_plane.static_pods import StoppedError
from bridge.errors import BridgeError, Exit, PostponedError
from bridge.node.inventory import Item, Node
from bridge.pki.certificates import serial_hex
from bridge.renewal.hooks import HookEvent
from bridge.renewal.ruling import Meaning, Ruling, meaning, rule
from bridge.settings.tables import Components
from bridge.specs import SPECS, CertificateSpec, Component
from bridge.state import backup_check, backups, rollback
from bridge.state.outcome import Outcome
from bridge.state.session import Run
from bridge.state.store import Store
from bridge.system.state_file import OnDamage, StateError, StateFile

log = logging.getLogger("ca-bridge")

_MOST_SHOWN = 3


class NotLiveError(BridgeError):
    """What was installed is not in use, or does not work."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE
    hint = "`ca-bridge prove` shows each check; `ca-bridge rollback` puts the old files back"


class RolledBackError(BridgeError):
    """What was installed did not work, and the old files are back."""

    exit_code: ClassVar[int] = Exit.ROLLED_BACK
    hint = "the CA's certificates passed every check and can't work in this cluster: see the failed check"


class UnprovenError(BridgeError):
    """Whether it works could not be found out."""

    hint = "the next `ca-bridge renew` looks again; `ca-bridge prove` shows what could not be seen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What came of it."""

    restarted: tuple[Restarted, ...] = ()
    proven: int | None = None  #: Checks that hold, of the last look; None: nobody looked.
    errors: tuple[BridgeError, ...] = ()
    rolled_back: RolledBackError | None = None  #: One of the errors.
    about: Mapping[str, HookEvent] = dataclasses.field(default_factory=dict)  #: For hooks; by the run that installed.
    may_go_on: bool = True  #: False: stopped by a signal, or in the middle of the way back; nothing is to be installed.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unproven:
    """A certificate that was installed, perhaps by several runs, before anybody has seen it in use."""

    name: str  #: kubeadm's.
    runs: Mapping[str, str]  #: What they installed, or were about to: the run by the serial.
    backup_of: str  #: The first of them, whose backup has what was in use.
    before: frozenset[str] = frozenset()  #: Checks that failed before it, as in `Finding.what`.

    @property
    def newest_run(self) -> str:
        """Whose certificate it is, as far as that is known."""
        return list(self.runs.values())[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Owed:
    """What is not proven."""

    certificates: tuple[_Unproven, ...]
    going_back: str = ""  #: Why all of it goes back; empty: it does not.
    to_restart: tuple[Component, ...] = ()  #: Restarted on what goes back, or went, and not on the old files yet.

    @property
    def names(self) -> list[str]:
        """Of the certificates."""
        return [one.name for one in self.certificates]

    def live_on(self, node: Node) -> _Owed:
        """Without what is not there: it was not installed, or was replaced by somebody else."""
        live = {i.spec.name: serial_hex(i.certificates[0]) for i in node.items if i.certificates}
        odd = {item.spec.name for item in self.unreadable_on(node)}
        ours = tuple(one for one in self.certificates if live.get(one.name) in one.runs or one.name in odd)
        return dataclasses.replace(self, certificates=ours)

    def unreadable_on(self, node: Node) -> list[Item]:
        """What may come back."""
        return [
            item
            for item in node.items
            if item.spec.name in self.names
            and item.state != "present"
            and not (item.state == "missing" and item.spec.optional)
        ]

    def is_new(self, finding: ProofFinding) -> bool:
        """Whether it worked before the installation."""
        return not any(finding.certificate == one.name and finding.what in one.before for one in self.certificates)


_FAILED = ("refused", "no-answer")


def owe(run: Run, outcomes: Sequence[Outcome]) -> None:
    """
    Before the installation of these, where components are restarted (`restart.method` is not "none").

    What an earlier run has installed and nobody has proven is no reason to forget what was in use before that; nor is
    what is still to be restarted forgotten.

    Raises:
        BridgeError: It can't be remembered; then nothing must be installed.
    """
    node, owed = run.read_node(), unproven_file(run.store).read()
    earlier = {one.name: one for one in owed.live_on(node).certificates} if owed is not None else {}
    failed = [f for f in proof.look(node, run.settings, run.now()).wrong if f.state in _FAILED]
    run_id = run.record.run_id
    for name, serial in ((o.name, serial_hex(o.new)) for o in outcomes if o.new is not None):
        before = frozenset(f.what for f in failed if f.certificate == name)
        one = earlier.pop(name, _Unproven(name=name, runs={}, backup_of=run_id, before=before))
        earlier[name] = dataclasses.replace(one, runs={**one.runs, serial: run_id})
    to_restart = owed.to_restart if owed is not None else ()
    _write(run.store, _Owed(certificates=tuple(earlier.values()), to_restart=to_restart))


def settle(run: Run, node: Node) -> Settled:
    """
    Restart, prove, and go back if need be; what this or earlier runs have installed.

    Args:
        run: Its lock is held.
        node: As it is now.
    """
    try:
        owed = unproven_file(run.store).read()
    except StateError as e:
        return Settled(errors=(e,), may_go_on=False)
    return _settle_owed(run, node, owed) if owed is not None else Settled()


def _settle_owed(run: Run, node: Node, owed: _Owed) -> Settled:
    if run.settings.restart.method == "none":
        return _left_to_people(run, node, owed)
    if odd := owed.unreadable_on(node):
        troubles = "; ".join(f"{item.spec.name}: {item.trouble}" for item in odd)
        return _settled(run, owed, [UnprovenError(f"installed, and not proven: {troubles}")])
    if owed.going_back:
        return _go_back(run, owed)
    owed = owed.live_on(node)
    if not owed.certificates and not owed.to_restart:
        unproven_file(run.store).remove()
        return Settled()
    return _prove(run, node, owed)


def _left_to_people(run: Run, node: Node, owed: _Owed) -> Settled:
    """The settings are others now: what was still to be done is said once."""
    unproven_file(run.store).remove()
    live = owed.live_on(node)
    reloads = restart_plan.reloading(node, run.settings.node.kubernetes_version)
    users = restart_plan.stale([SPECS[name] for name in live.names], reloads, Components("needed"))
    components = [c for c in restart_plan.ORDER if c in users or c in owed.to_restart]
    if not components and not (owed.going_back and live.certificates):
        return Settled()
    names = ", ".join(component.value for component in components) or "nothing"
    text = f'installed by an earlier run, and with restart.method = "none" not proven; to be restarted: {names}'
    if owed.going_back and live.certificates:
        text = f"{text}; and it was to go back, since {owed.going_back}"
    manifests = run.settings.node.kubeconfig_dir / "manifests"
    hint = "; ".join(restart_plan.how(component, manifests) for component in components) or NotLiveError.hint
    return _settled(run, owed, [NotLiveError(text, hint=hint)])


def _prove(run: Run, node: Node, owed: _Owed) -> Settled:
    restarted = _restart(run, node, owed)
    report: ProofReport | None = None
    if not _is_stopped(restarted):
        report, more = _look(run, owed, restarted)
        restarted += more
    if report is None or _is_stopped(restarted):
        return _settled(run, owed, _errors(restarted), restarted)
    return _judged(run, owed, restarted, report)


def _is_stopped(restarted: Sequence[Restarted]) -> bool:
    """By a signal: what was restarted may still be starting, and its proof would tell nothing."""
    return any(isinstance(one.error, StoppedError) for one in restarted)


def _settled(
    run: Run,
    owed: _Owed,
    errors: Sequence[BridgeError],
    restarted: Sequence[Restarted] = (),
    proven: int | None = None,
    *,
    may_go_on: bool = True,
) -> Settled:
    rolled_back = next((error for error in errors if isinstance(error, RolledBackError)), None)
    return Settled(
        restarted=tuple(restarted),
        proven=proven,
        errors=tuple(errors),
        rolled_back=rolled_back,
        about=_occasions(run, owed, errors, is_back=rolled_back is not None),
        may_go_on=may_go_on and not _is_stopped(restarted),
    )


def _judged(run: Run, owed: _Owed, restarted: Sequence[Restarted], report: ProofReport) -> Settled:
    """What is wrong with other certificates is none of this installation's doing, nor what was so before it."""
    postponed = {one.component: one.error for one in restarted if isinstance(one.error, PostponedError)}
    impossible = _impossible(owed, restarted, report)
    failures = [e for e in _errors(restarted) if not isinstance(e, PostponedError | ImpossibleError)]
    seen = _meanings(run, owed, postponed, impossible, report)
    ruling = rule(seen.keys(), postponed=bool(postponed), failed=bool(failures), impossible=bool(impossible))
    proven = len(report.findings) - len(report.wrong)
    if ruling is Ruling.FAILED:
        decisive = [f for m in (Meaning.BROKEN, Meaning.NOT_IN_USE, Meaning.UNSEEN) for f in seen.get(m, [])]
        why = "; ".join([*map(str, failures), *([_sentence(decisive)] if decisive else [])])
        return _failed(run, owed, restarted, proven, why)
    if ruling is Ruling.PROVEN:
        unproven_file(run.store).remove()
    said = [*postponed.values()] if ruling is Ruling.POSTPONED else _said_of(ruling, seen, [*impossible.values()])
    return _settled(run, owed, said, restarted, proven)


def _impossible(
    owed: _Owed, restarted: Sequence[Restarted], report: ProofReport
) -> dict[Component | None, ImpossibleError]:
    """What nobody can restart from here, unless it is seen to have been restarted by hand."""
    states: dict[Component | None, set[str]] = {}
    for finding in report.findings:
        if finding.certificate in owed.names:
            states.setdefault(finding.component, set()).add(finding.state)
    return {
        one.component: one.error
        for one in restarted
        if isinstance(one.error, ImpossibleError)
        and not states.get(one.component, {"unknown"}) <= {"current", "next-connection"}
    }


def _meanings(
    run: Run,
    owed: _Owed,
    postponed: Collection[Component],
    impossible: Collection[Component | None],
    report: ProofReport,
) -> dict[Meaning, list[ProofFinding]]:
    """All that is wrong with our certificates, by what it says of the installation."""
    listed = run.settings.restart.components.listed
    seen: dict[Meaning, list[ProofFinding]] = {}
    for finding in report.wrong:
        found = meaning(
            finding.state,
            postponed=finding.component in postponed,
            ours=(not listed or finding.component in listed) and finding.component not in impossible,
            new=owed.is_new(finding),
        )
        if found is not None and finding.certificate in owed.names:
            seen.setdefault(found, []).append(finding)
    return seen


def _said_of(
    ruling: Ruling, seen: Mapping[Meaning, Sequence[ProofFinding]], impossible: Sequence[ImpossibleError]
) -> list[BridgeError]:
    """What stays, and what is left to do."""
    if ruling is Ruling.UNPROVEN:
        return [UnprovenError(f"installed, and not proven: {_sentence(seen[Meaning.UNSEEN])}")]
    if ruling is Ruling.LEFT and impossible:
        return [NotLiveError(f"installed, and still to be restarted: {e}", hint=e.hint) for e in impossible]
    if ruling is Ruling.LEFT:
        text = f"installed, and not in use by what restart.components does not list: {_sentence(seen[Meaning.LEFT])}"
        return [NotLiveError(text, hint="restart it (`ca-bridge restart NAME`), or list it")]
    if as_before := seen.get(Meaning.AS_BEFORE):
        text = f"installed, and as before the renewal this does not work: {_sentence(as_before)}"
        return [NotLiveError(text, hint="`ca-bridge prove` shows each check")]
    return []


def _failed(run: Run, owed: _Owed, restarted: Sequence[Restarted], proven: int, why: str) -> Settled:
    if run.settings.restart.on_failure == "keep":
        return _settled(run, owed, [NotLiveError(f"installed, and not in use: {why}")], restarted, proven)
    log.error("the new certificates do not work, so the old ones are put back: %s", why)
    back = _go_back(run, dataclasses.replace(owed, going_back=why))
    return dataclasses.replace(back, restarted=tuple(restarted), proven=proven)


def _errors(restarted: Sequence[Restarted]) -> list[BridgeError]:
    return [one.error for one in restarted if one.error is not None]


# --- restart and proof -----------------------------------------------------------------------------------------------


def _restart(run: Run, node: Node, owed: _Owed) -> list[Restarted]:
    """
    First those that are known not to reload, as the settings say; if only what is needed, as proof shows it.

    What an earlier run has installed is not restarted for once more: of its users those that proof shows, and where
    there is none, those that were not restarted since.
    """
    wanted = run.settings.restart.components
    reloads = restart_plan.reloading(node, run.settings.node.kubernetes_version)
    specs = {name: SPECS[name] for name in owed.names} | _read_at_start(node, owed)
    ours = [specs[one.name] for one in owed.certificates if one.newest_run == run.record.run_id]
    others = [specs[one.name] for one in owed.certificates if one.newest_run != run.record.run_id]
    new, old = (
        restart_plan.stale(ours, reloads, wanted),
        {*restart_plan.stale(others, reloads, wanted), *owed.to_restart},
    )
    stale: list[Component] = []
    is_looked_at = bool(node.manifests) or node.is_worker
    if is_looked_at and (old or (new and wanted.which == "needed")):
        report = proof.look(node, run.settings, run.now())
        stale = report.stale
        if wanted.which == "needed":
            new = [c for c in new if c in stale or (c is Component.KUBELET and not _has_read(report))]
    done = restarted_since(run.store, _since(run, owed, newest=True)) if old else []
    unseen = [c for c in old if c not in done and (c is Component.KUBELET or not is_looked_at)]
    return _restarted(
        run, node, [c for c in restart_plan.ORDER if c in new or (c in old and (c in stale or c in unseen))]
    )


def _has_read(report: ProofReport) -> bool:
    """Whether the kubelet is seen to have its new client certificate, or to take it by itself."""
    found = [f for f in report.findings if f.component is Component.KUBELET and f.what.startswith("has read")]
    return bool(found) and all(f.state in ("current", "next-connection") for f in found)


def _read_at_start(node: Node, owed: _Owed) -> dict[str, CertificateSpec]:
    """A pair that a kubelet got from a signer is read by nobody but itself, and at its start (measured on 1.37)."""
    return {
        item.spec.name: dataclasses.replace(item.spec, reloaded=False)
        for item in node.items
        if item.spec.name in owed.names and item.rotates
    }


def _since(run: Run, owed: _Owed, *, newest: bool) -> datetime:
    """When the newest, or the first, of the installations began; the beginning of time where no backup tells."""
    wanted = {one.newest_run if newest else one.backup_of for one in owed.certificates}
    created = [one.created for one in backups.read_all(run.store)[0] if one.run_id in wanted]
    return (max if newest else min)(created, default=datetime.min.replace(tzinfo=UTC))


def _restarted(run: Run, node: Node, components: Sequence[Component], *, going_back: bool = False) -> list[Restarted]:
    if not components:
        return []
    return restart_all(
        components,
        node,
        run.settings,
        run.store,
        tell=lambda text: log.info("%s", text),
        record=run.record,
        going_back=going_back,
    )


def _look(run: Run, owed: _Owed, restarted: Sequence[Restarted]) -> tuple[ProofReport, list[Restarted]]:
    """
    Look until all is well; what was trusted to reload and did not is restarted after all.

    What could not be restarted now is on its old certificate, and not waited for.
    """
    names, done = owed.names, {one.component for one in restarted}
    if any(isinstance(one.error, PostponedError) for one in restarted):
        return _looked(run, lambda f: f.certificate in names and f.state in _FAILED and owed.is_new(f)), []
    stuck = {one.component for one in restarted if isinstance(one.error, ImpossibleError)}
    report = _looked(run, lambda f: f.certificate in names and not (f.state == "stale" and f.component in stuck))
    late = [f.component for f in report.wrong if f.state == "stale" and f.certificate in names and f.component]
    more = [component for component in restart_plan.ORDER if component in late and component not in done]
    if not more or run.settings.restart.components.which == "listed":
        return report, []
    again = _restarted(run, run.read_node(), more)
    stuck |= {one.component for one in again if isinstance(one.error, ImpossibleError)}
    report = _looked(run, lambda f: f.certificate in names and not (f.state == "stale" and f.component in stuck))
    return report, again


def _looked(run: Run, counts: Callable[[ProofFinding], bool]) -> ProofReport:
    return proof.within(run.read_node, run.settings, run.now, run.settings.restart.prove_for, counts=counts)


def _sentence(findings: Sequence[ProofFinding]) -> str:
    parts = [f"{f.certificate}: {f.what}: {f.state}: {f.detail}" for f in findings[:_MOST_SHOWN]]
    more = len(findings) - _MOST_SHOWN
    return "; ".join([*parts, *([f"and {more} more"] if more > 0 else [])])


# --- the way back ----------------------------------------------------------------------------------------------------


def _go_back(run: Run, owed: _Owed) -> Settled:
    """Put the old files back, and what was restarted back on them; or go on with it where a run was cut off."""
    live = owed.live_on(run.read_node())
    owed = live if live.certificates else owed  # what was replaced meanwhile stays; else all of it is back already
    if live.certificates:
        on_new = restarted_since(run.store, _since(run, owed, newest=False))
        owed = dataclasses.replace(owed, to_restart=tuple(dict.fromkeys([*owed.to_restart, *on_new])))
    has_begun = False
    late: Sequence[BridgeError] = ()
    try:
        backup = _backup(run, live) if live.certificates else None
        _write(run.store, owed)
        has_begun = True
        if backup is not None:
            # all of it was in use a minute ago, whatever a new certificate would have to be
            done_back = rollback.put_back(
                backup, run.settings, run.store, run.record, run.read_node(), run.now(), lambda one: not one.is_damage
            )
            late = done_back.late
    except BridgeError as e:
        text = f"installed, and not in use: {owed.going_back}; it was not rolled back: {e}"
        return _settled(run, owed, [NotLiveError(text)], may_go_on=not has_begun)
    wanted, restarted = _restart_back(run, owed)
    done = {one.component for one in restarted if one.error is None}
    left = tuple(component for component in wanted if component not in done)
    with contextlib.suppress(BridgeError):  # then the next run restarts more than it needs to
        _write(run.store, dataclasses.replace(owed, to_restart=left))
    if all(isinstance(one.error, PostponedError) for one in restarted if one.component in left) and left:
        after = f"the next run goes on: {'; '.join(map(str, _errors(restarted)))}"
    else:
        after = _on_the_old_set(run, owed, restarted)
    if not left:
        unproven_file(run.store).remove()
    where = f" to {backup.backup_id}" if backup is not None else ""
    error = RolledBackError(f"rolled back{where}, since {owed.going_back}; {after}")
    return _settled(run, owed, [error, *late], restarted)


def _backup(run: Run, owed: _Owed) -> backups.Backup:
    """
    What was in use, from the backups of one or several runs.

    Raises:
        BridgeError: It can't be put back; nothing was touched.
    """
    node, now = run.read_node(), run.now()
    found = {one.run_id: one for one in backups.read_all(run.store)[0]}
    missing = {one.backup_of for one in owed.certificates} - found.keys()
    if missing:
        raise BridgeError(f"wanted the backup of run {', '.join(sorted(missing))}, found none")
    sources = list({one.backup_of: found[one.backup_of] for one in owed.certificates}.values())
    files = [f for one in owed.certificates for f in found[one.backup_of].files if f.certificate == one.name]
    backup = dataclasses.replace(sources[0], backup_id=", ".join(one.backup_id for one in sources), files=tuple(files))
    damage = [str(one) for one in backup_check.problems_of(backup, run.settings, node, now) if one.is_damage]
    if damage:
        raise BridgeError("; ".join(damage))
    expired = [o.name for o in rollback.outcomes_of(backup, node) if o.new and o.new.not_valid_after_utc <= now]
    if expired:
        raise BridgeError(f"the old certificates have expired: {', '.join(expired)}")
    return backup


def _restart_back(run: Run, owed: _Owed) -> tuple[list[Component], list[Restarted]]:
    """Everything that had been restarted, and what took the new files up by itself and did not let go; what became of it."""
    node = run.read_node()
    stale = proof.look(node, run.settings, run.now()).stale if node.manifests else []
    components = [c for c in restart_plan.ORDER if c in owed.to_restart or c in stale]
    return components, _restarted(run, node, components, going_back=True)


def _on_the_old_set(run: Run, owed: _Owed, restarted: Sequence[Restarted]) -> str:
    report = _looked(run, lambda f: f.certificate in owed.names)
    wrong = [finding for finding in report.wrong if finding.certificate in owed.names]
    failures = list(map(str, _errors(restarted)))
    if failures or wrong:
        text = "; ".join([*failures, *([_sentence(wrong)] if wrong else [])])
        return f"the old ones do not work, either: {text}"
    return f"everything runs on the old files again ({len(report.findings) - len(report.wrong)} checks hold)"


# --- what hooks are told ---------------------------------------------------------------------------------------------


def _occasions(run: Run, owed: _Owed, errors: Sequence[BridgeError], *, is_back: bool) -> dict[str, HookEvent]:
    """By the run that installed."""
    items = {item.spec.name: item for item in run.read_node().items}
    replaced = {one.run_id: one for one in backups.read_all(run.store)[0]}
    found = {}
    for run_id in dict.fromkeys(one.newest_run for one in owed.certificates):
        ours = [one for one in owed.certificates if one.newest_run == run_id]
        live = [] if is_back else [one.name for one in ours if one.name in items and items[one.name].certificates]
        new = {name: serial_hex(items[name].certificates[0]) for name in live}
        old = {one.name: _old_serial(replaced.get(one.backup_of), one.name) for one in ours if one.name in new}
        paths = [p for name in new for p in (items[name].certificate_path, items[name].key_path) if p is not None]
        found[run_id] = HookEvent(
            names=tuple(one.name for one in ours),
            old_serials={name: serial for name, serial in old.items() if serial},
            new_serials=new,
            files=tuple(map(str, paths)),
            backup_id=replaced[run_id].backup_id if run_id in replaced else None,
            exit_code=Exit.worst([error.exit_code for error in errors]),
            errors=tuple(map(str, errors)),
        )
    return found


def _old_serial(backup: backups.Backup | None, name: str) -> str:
    entries = backup.certificates if backup is not None else ()
    return next((entry["old_serial"] or "" for entry in entries if entry["name"] == name), "")


# --- what is owed ----------------------------------------------------------------------------------------------------


def unproven_file(store: Store) -> StateFile[_Owed]:
    """What was installed and is not proven; a damaged one may owe a restart, or the way back."""
    return StateFile(
        path=store.unproven,
        what="what was installed and not proven",
        parse=_owed,
        keys=frozenset({"certificates", "going_back", "to_restart"}),
        on_damage=OnDamage.REFUSE,
        afterwards="`ca-bridge prove` shows whether all is in use, and `ca-bridge restart` restarts what is not",
        exit_code=Exit.NOT_LIVE,
    )


def _owed(document: Mapping[str, Any]) -> _Owed:
    return _Owed(
        certificates=tuple(map(_unproven, document["certificates"])),
        going_back=str(document["going_back"]),
        to_restart=tuple(map(Component, document["to_restart"])),
    )


def _unproven(entry: Mapping[str, Any]) -> _Unproven:
    return _Unproven(
        name=SPECS[entry["name"]].name,
        runs={str(serial): str(run_id) for serial, run_id in entry["runs"].items()},
        backup_of=str(entry["backup_of"]),
        before=frozenset(map(str, entry["before"])),
    )


def _write(store: Store, owed: _Owed) -> None:
    certificates = [{**dataclasses.asdict(one), "before": sorted(one.before)} for one in owed.certificates]
    document: dict[str, object] = {"certificates": certificates, "going_back": owed.going_back}
    document["to_restart"] = [component.value for component in owed.to_restart]
    unproven_file(store).replace(document)
