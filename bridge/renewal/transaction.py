"""
The steps around an installation, which `renew`, `import` and `install` share; and two repairs by an operator: putting
an old backup back, and setting damaged state files aside.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from bridge.ca import owe_putting_away, put_away
from bridge.control_plane.restarts import times_file
from bridge.errors import BridgeError, Exit, PostponedError, SettingsError, WaitingError
from bridge.node.inventory import Node
from bridge.renewal import NotReadyError, Selection, activate, in_use, outcome_of, pairs, revocation
from bridge.renewal.activate import Activation
from bridge.renewal.gate import Attempts, attempts_file, next_ca_file
from bridge.renewal.hooks import HookError, HookEvent, Hooks, NotNowByHookError
from bridge.renewal.revocation import RevocationError
from bridge.renewal.selection import RunOptions
from bridge.renewal.verify_and_install import (
    HeldBackError,
    Proven,
    Result,
    await_validity,
    hold_back,
    install_all,
    record_failed,
)
from bridge.settings.tables import Settings
from bridge.state import Outcome, Store, audit, backups, copies, obligations
from bridge.state.copies import CopyError
from bridge.state.install import journal_file, staging_file
from bridge.state.open_requests import RENEWALS, USERS, Unkept, file_of
from bridge.state.session import Now, Run, alone, recording
from bridge.state.static_pods import restart_file
from bridge.system.console import Progress, print_error
from bridge.system.state_file import StateError, StateFile
from bridge.words import counted

#: Errors that no CA caused.
_NOT_OF_A_CA = (HookError, SettingsError, PostponedError, NotReadyError, RevocationError, CopyError, audit.AuditError)


class Transaction:
    """The steps of one run around its installation, in the methods' order; the node's lock is held."""

    def __init__(self, run: Run, options: RunOptions) -> None:
        self._run = run
        self._options = options
        self._node: Node | None = None  # before the installation
        self._errors: list[BridgeError] = []  # about earlier runs
        self._hooks = Hooks(run.settings, run.store, run.record.run_id)
        #: False: a signal or a failed rollback stopped an activation, and nothing more may be installed.
        self.may_go_on = True
        self._apart: Collection[str] = ()  # names of further pairs, each proven by itself
        self.attempts = Attempts(run.store)

    def going_on(self, run: Run, options: RunOptions) -> Transaction:
        """Return a transaction with other settings and options that keeps the errors about earlier runs."""
        other = Transaction(run, options)
        other._errors, other._node = self._errors, self._node
        return other

    # --- before ------------------------------------------------------------------------------------------------------

    def settle_earlier(self, node: Node) -> Node:
        """Finish what earlier runs left (hooks, proof, copies), even if nothing is due; return the node after that."""
        _assert_not_begun(self._run, node)
        self._errors += self._recorded(self._hooks.again(node))
        if self._is_to_prove:
            done = activate.finish(self._run, node)
            self.may_go_on = done.may_go_on
            self._errors += [*done.errors, *self._hooks_of_earlier(done.events)]
            node = self._run.read_node()
        if self.may_go_on and self._options.restarts and self._run.store.pairs.exists():
            self._errors += with_pairs(self._run, Result()).errors
            node = self._run.read_node()
        if self.may_go_on:  # copies are other users' files, and must not hold up the node
            self._errors += copies.finish(self._run.settings, self._run.store, self._run.record)
            put_away(self._run.settings, self._run.store, self._run.progress.note)
        self._node = node
        return node

    @property
    def _is_to_prove(self) -> bool:
        """Whether this run has something to restart and to prove, or to report."""
        return self._options.restarts and self._run.store.unproven.exists()

    @contextlib.contextmanager
    def about(self, selection: Selection) -> Iterator[None]:
        """Run the `before` hooks, then the block's work on these certificates; count its error and pass it to hooks."""
        try:
            try:
                self._hooks.before(HookEvent.of(selection.items))
            except HookError as e:
                self._run.record.add(audit.FAILED, error=e)
                raise
            yield
        except BridgeError as e:
            for error in self._count_and_run_hooks(selection, Result(outcomes=selection.failed), [e]):
                print_error(error)
            raise

    # --- the installation --------------------------------------------------------------------------------------------

    def install(self, selection: Selection, proven: Sequence[Proven], failed: Sequence[Outcome]) -> Result:
        """Record the work that follows, then install what passed in one step (BridgeError: nothing was replaced)."""
        if failed and self._options.all_or_nothing:
            return hold_back(self._run, [item.prepared for item in proven], failed)
        if not proven:
            return Result(outcomes=tuple(failed))
        done = [item.outcome for item in proven]
        await_validity([item.verified.leaf for item in proven])
        trust = self._options.trust
        self._run.record.write()  # the audit log comes before the installation
        with self.owing():
            trust.gate(proven)
            try:
                self._owe(selection, done)
                files = [*trust.files, *(trust.edit(file) for item in proven for file in item.files)]
                backup_id = install_all(self._run, proven, files)
            except BridgeError as e:
                record_failed(self._run.record, [outcome_of(item.prepared.item, e) for item in proven])
                raise
        return Result(outcomes=(*done, *failed), backup_id=backup_id)

    def _owe(self, selection: Selection, done: Sequence[Outcome]) -> None:
        """Record the revocations, copies, hooks, restarts and proof to come; if that fails, nothing may be installed."""
        revocation.record_due(self._run, done)
        copies.record_due(
            self._run.settings,
            self._run.store,
            self._run.read_node(),
            {certificate.name: certificate.old for certificate in done},
        )
        requests = ((certificate.authority, self._run.requests.get(certificate.name)) for certificate in done)
        owe_putting_away(
            self._run.settings, self._run.store, [(name, request.reference) for name, request in requests if request]
        )
        self._hooks.installing(HookEvent.of(selection.items, done))
        self.owe_use(done)

    @contextlib.contextmanager
    def owing(self) -> Iterator[None]:
        """If the block installs nothing, restore the unproven record: its serial numbers may be the live ones."""
        file = obligations.unproven_file(self._run.store)
        before = file.read() if self._options.restarts else None
        try:
            yield
        except BridgeError:
            if self._options.restarts and not self._run.store.journal.exists():  # else `recover` may finish it
                with contextlib.suppress(StateError):  # if it fails, the next run restarts more than it needs to
                    file.put(before)
            raise

    def owe_use(self, done: Sequence[Outcome]) -> None:
        """Record, before an installation, which components to restart and which certificates to see in use."""
        if self._run.settings.node.pairs:
            self._apart = pairs.record_due(self._run, done, by_hand=not self._options.restarts)
            done = [certificate for certificate in done if certificate.name not in self._apart]
        if not done:
            return
        if not self._options.restarts:
            in_use.record_due(self._run, done, obligations.postponed_file(self._run.store))
        elif self._run.settings.restart.method == "none":
            in_use.record_due(self._run, done, obligations.unproven_file(self._run.store))
        else:
            activate.record_due(self._run, done, stays=self._options.trust.stays)

    def activate(self, selection: Selection, result: Result) -> Result:
        """Run what follows an installation: hooks, restart, proof, a rollback if needed; then other users' copies."""
        if result.backup_id is None:
            return result
        occasion = HookEvent.of(selection.items, result.outcomes, backup_id=result.backup_id)
        result = dataclasses.replace(result, errors=(*result.errors, *self._hooks.installed(occasion)))
        result = self.activated(result)
        late = copies.finish(self._run.settings, self._run.store, self._run.record)
        put_away(self._run.settings, self._run.store, self._run.progress.note)
        return dataclasses.replace(result, errors=(*result.errors, *late))

    def activated(self, result: Result) -> Result:
        """Restart and prove the control plane, whose rollback waits for no further pair, then the further pairs."""
        result = self._activated(result)
        return with_pairs(self._run, result) if self.may_go_on and self._options.restarts else result

    def _activated(self, result: Result) -> Result:
        if not self._is_to_prove:
            return result
        if self._run.settings.restart.method == "none":  # each later run reports it
            unproven, run_id = obligations.unproven_file(self._run.store).read(), self._run.record.run_id
            is_ours = unproven is not None and any(each.newest_run == run_id for each in unproven.certificates)
            return dataclasses.replace(result, left_to_people=is_ours)
        done = activate.finish(self._run, self._run.read_node())
        if not self._is_to_prove:  # else the hooks of earlier installations ran already
            others = {run_id: event for run_id, event in done.events.items() if run_id != self._run.record.run_id}
            self._errors += self._hooks_of_earlier(others)
        self.may_go_on = done.may_go_on
        return with_activation(result, done, self._apart)

    # --- the end -----------------------------------------------------------------------------------------------------

    def nothing_to_install(self, selection: Selection) -> Result:
        """Return the result of a run that has nothing to install."""
        result = self._with_revocations(Result(outcomes=selection.failed))
        return self._ended(selection, result) if selection.failed or result.errors else self.with_earlier(result)

    def conclude(self, selection: Selection, result: Result) -> Result:
        """End a run that did something: revoke superseded certificates, count failures, run hooks, retire backups."""
        return self._ended(selection, self._with_revocations(result))

    def _with_revocations(self, result: Result) -> Result:
        if not self._run.store.revocations.exists():
            return result
        errors = revocation.finish(self._run, self._run.read_node())
        return dataclasses.replace(result, errors=(*result.errors, *errors))

    def _ended(self, selection: Selection, result: Result) -> Result:
        result = dataclasses.replace(result, errors=(*result.errors, *self._run.record.end()))
        more = self._count_and_run_hooks(selection, result, result.errors)
        if result.backup_id is not None:
            node = self._node or self._run.read_node()
            backups.retire(self._run.store, self._run.settings, node, self._run.now())
        return self.with_earlier(dataclasses.replace(result, errors=(*result.errors, *more)))

    def with_earlier(self, result: Result) -> Result:
        """Add errors about earlier runs, and about certificates of --no-restart that are not in use yet."""
        late = [*in_use.settle_postponed(self._run), *self._run.record.end()]
        return dataclasses.replace(result, errors=(*self._errors, *result.errors, *late))

    def _count_and_run_hooks(
        self, selection: Selection, result: Result, errors: Sequence[BridgeError]
    ) -> list[BridgeError]:
        """Count the run and run its last hooks; return errors about CAs that need an operator, and failed hooks."""
        if any(isinstance(error, NotNowByHookError) for error in errors):
            return []  # neither success nor failure
        more: list[BridgeError] = []
        of_the_run = [e for e in errors if not isinstance(e, _NOT_OF_A_CA)]
        try:
            for error in self.attempts.note(*by_authority(selection, result, of_the_run), self._run.now()):
                self._run.record.add(audit.NEEDS_A_PERSON, authority=error.authority, error=error)
                more.append(error)
        except StateError as e:
            more.append(e)
        code = Exit.worst([result.exit_code, *(error.exit_code for error in (*errors, *more))])
        if result.left_to_people and code in (Exit.DONE, Exit.WAITING):
            return more  # it succeeds once it is seen in use
        occasion = HookEvent.of(
            selection.items, result.outcomes, backup_id=result.backup_id, exit_code=code, errors=(*errors, *more)
        )
        return [*more, *self._recorded(self._hooks.finished(occasion))]

    def _hooks_of_earlier(self, events: Mapping[str, HookEvent]) -> list[HookError]:
        """Run the hooks of earlier runs with the current state of their installations."""
        earlier = [(Hooks(self._run.settings, self._run.store, run_id), event) for run_id, event in events.items()]
        return self._recorded([error for hooks, event in earlier for error in hooks.finished(event)])

    def _recorded(self, errors: list[HookError]) -> list[HookError]:
        for error in errors:
            self._run.record.add(audit.FAILED, error=error)
        return errors


def with_activation(result: Result, done: Activation, apart: Collection[str] = ()) -> Result:
    """Add what restarts and proof found to an installation's result; certificates `apart` are not rolled back."""
    outcomes, errors, back = result.outcomes, done.errors, done.rolled_back
    if back is not None:
        outcomes = _rolled_back(result, {o.name: back for o in outcomes if o.name not in apart})
        # an installation of CA files alone has no outcome that could carry the error
        errors = tuple(error for error in errors if error is not back or all(o.error is not back for o in outcomes))
    restarted = tuple(f"{each.component.value} in {each.seconds:.1f} s" for each in done.restarted if each.seconds)
    errors = (*result.errors, *errors)
    return dataclasses.replace(result, outcomes=outcomes, errors=errors, restarted=restarted, proven=done.proven)


def _assert_not_begun(run: Run, node: Node) -> None:
    """Refuse a new node whose bootstrap is unfinished, since that installs all files at once (NotReadyError)."""
    open_ = [each for each in run.requests if each.request.replaces is None and node.live(each.name) is None]
    if open_ and run.store.bootstrap.exists():
        raise NotReadyError(
            f"wanted a node that is made, found one whose bootstrap waits with {counted(len(open_), 'request')}; nothing was replaced",
            hint="run its `ca-bridge bootstrap init` or `join` again, with --answer FILE where the answer was carried; "
            "`ca-bridge pending cancel all` gives it up",
        )


def with_pairs(run: Run, result: Result) -> Result:
    """Have programs read their further pairs, prove it or put the old files back, and add the results."""
    if not run.store.pairs.exists():
        return result
    done = pairs.finish(run)
    outcomes = _rolled_back(result, done.back)
    earlier = [error for error in done.back.values() if all(outcome.error is not error for outcome in outcomes)]
    errors, read = (*result.errors, *done.errors, *earlier), tuple(done.read)
    proven = (result.proven or 0) + done.proven if done.proven else result.proven
    return dataclasses.replace(result, outcomes=outcomes, errors=errors, read_again=read, proven=proven)


def _rolled_back(result: Result, back: Mapping[str, BridgeError]) -> tuple[Outcome, ...]:
    """Return the outcomes, with these errors by name for certificates that were installed and are not any more."""
    return tuple(
        dataclasses.replace(outcome, new=None, error=back[outcome.name])
        if outcome.new is not None and outcome.name in back
        else outcome
        for outcome in result.outcomes
    )


def put_back_and_retire(
    settings: Settings, backup_id: str | None, now: Now, progress: Progress, *, force: bool, wait: timedelta
) -> tuple[backups.Rollback, Node]:
    """
    Put back a backup, or the newest, all or none, then delete old ones (RollbackRefusedError: it is not fit). This
    removes files that it has no copy of; `force` accepts what the node could run on. An operator restarts components.
    """
    with alone(settings, wait) as (store, record):
        run = Run(settings=settings, store=store, requests=Unkept(), record=record, progress=progress, now=now)
        node = run.read_node()
        found, stays = backups.with_pairs(backups.find(store, backup_id), node)
        owe = Transaction(run, RunOptions(restarts=False)).owe_use
        done = backups.put_back(run, found, node, lambda problem: force and problem.can_be_forced, owe=owe)
        backups.retire(store, settings, node, now())
        return dataclasses.replace(done, stays=stays, late=(*done.late, *record.end())), node


def by_authority(
    selection: Selection, result: Result, errors: Sequence[BridgeError]
) -> tuple[list[str], dict[str, BridgeError]]:
    """Return the authorities that failed or succeeded in this run, and the worst error of each that failed (pure)."""
    by_name = {outcome.name: outcome for outcome in result.outcomes}
    reached: dict[str, list[BridgeError]] = {}
    for item in selection.items:
        outcome, authority = by_name.get(item.spec.name), item.spec.authority.name
        own = outcome.error if outcome is not None else None
        if (outcome is None and not errors) or isinstance(own, WaitingError | HeldBackError | NotReadyError):
            continue
        reached.setdefault(authority, []).extend(error for error in (own, *errors) if error is not None)
    failed = {
        name: min(errors, key=lambda e: Exit.PRECEDENCE.index(e.exit_code))
        for name, errors in reached.items()
        if errors
    }
    return list(reached), failed


# --- damaged state files, for an operator who has read the consequences -----------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """One file that was renamed."""

    path: Path  #: The path that it had.
    kept: Path  #: The path that it has now.
    why: str
    afterwards: tuple[str, ...]  #: Sentences about what to check now.


def state_files(store: Store) -> list[StateFile[Any]]:
    """Return all files whose damage stops a run; damage to the audit log's head does not."""
    makers = (
        restart_file,
        journal_file,
        staging_file,
        obligations.unproven_file,
        obligations.postponed_file,
        obligations.pairs_file,
        obligations.hooks_file,
        obligations.revocations_file,
        next_ca_file,
    )
    others = (file_of(RENEWALS, store.requests), file_of(USERS, store.users), obligations.copies_file(store))
    return [*(make(store) for make in makers), *others, attempts_file(store), times_file(store)]


def set_damaged_aside(settings: Settings) -> list[SetAside]:
    """Rename and record every damaged state file; the list of staged files goes with a damaged journal."""
    with recording(settings, timedelta()) as (store, record):
        damaged = [(file, str(error)) for file in state_files(store) if (error := file.damage()) is not None]
        paths = [file.path for file, _ in damaged]
        if store.journal in paths and store.staging not in paths and store.staging.exists():
            damaged.append((staging_file(store), "it belongs to the journal"))
        moved = []
        for file, why in damaged:
            about = _of_the_interrupted(store) if file.path == store.journal else ()
            kept = file.set_aside()
            record.add(audit.DAMAGED, result=f"{file.path.name} is {kept.name} now: {why}")
            moved.append(SetAside(path=file.path, kept=kept, why=why, afterwards=(file.afterwards, *about)))
    return moved


def _of_the_interrupted(store: Store) -> tuple[str, ...]:
    """Describe the installation whose journal is damaged, from the list of staged files."""
    try:
        staged = staging_file(store).read() or ()
    except StateError:
        return ()
    there = [path for path in staged if path.exists()]
    related = [each for each in backups.read_all(store)[0] if any(f"-{each.run_id}-" in path.name for path in staged)]
    return (
        *(f"{path} was staged and not installed; it stays" for path in there),
        *(f"the old files of that run are in the backup {backup.backup_id}" for backup in related),
    )
