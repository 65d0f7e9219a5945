"""The way back: the old files, and what was restarted back on them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

from bridge.control_plane import proof, restart_plan
from bridge.control_plane.restarts import Restarted, restarted_since
from bridge.errors import BridgeError, PostponedError
from bridge.renewal.settled import NotLiveError, RolledBackError, Settled, errors_of, settled
from bridge.renewal.taking_effect import began, look_until, restart_these, sentence
from bridge.specs import Component
from bridge.state import backup_check, backups, rollback
from bridge.state.obligations import Owed, unproven_file
from bridge.state.session import Run


def go_back(run: Run, owed: Owed) -> Settled:
    """Put the old files back, and what was restarted back on them; or go on with it where a run was cut off."""
    live = owed.live_on(run.read_node())
    owed = live if live.certificates else owed  # what was replaced meanwhile stays; else all of it is back already
    if live.certificates:
        on_new = restarted_since(run.store, began(run, owed, newest=False))
        owed = dataclasses.replace(owed, to_restart=tuple(dict.fromkeys([*owed.to_restart, *on_new])))
    has_begun = False
    late: Sequence[BridgeError] = ()
    try:
        backup = _backup(run, live) if live.certificates else None
        unproven_file(run.store).put(owed)
        has_begun = True
        if backup is not None:
            # all of it was in use a minute ago, whatever a new certificate would have to be
            done_back = rollback.put_back(
                backup, run.settings, run.store, run.record, run.read_node(), run.now(), lambda one: not one.is_damage
            )
            late = done_back.late
    except BridgeError as e:
        text = f"installed, and not in use: {owed.going_back}; it was not rolled back: {e}"
        return settled(run, owed, [NotLiveError(text)], may_go_on=not has_begun)
    wanted, restarted = _restart_back(run, owed)
    done = {one.component for one in restarted if one.error is None}
    left = tuple(component for component in wanted if component not in done)
    with contextlib.suppress(BridgeError):  # then the next run restarts more than it needs to
        unproven_file(run.store).put(dataclasses.replace(owed, to_restart=left))
    if all(isinstance(one.error, PostponedError) for one in restarted if one.component in left) and left:
        after = f"the next run goes on: {'; '.join(map(str, errors_of(restarted)))}"
    else:
        after = _on_the_old_set(run, owed, restarted)
    if not left:
        unproven_file(run.store).remove()
    where = f" to {backup.backup_id}" if backup is not None else ""
    error = RolledBackError(f"rolled back{where}, since {owed.going_back}; {after}")
    return settled(run, owed, [error, *late], restarted)


def _backup(run: Run, owed: Owed) -> backups.Backup:
    """
    A backup of what was in use, put together from those of one or several runs.

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


def _restart_back(run: Run, owed: Owed) -> tuple[list[Component], list[Restarted]]:
    """Everything that had been restarted, and what took the new files up by itself and did not let go; what became of it."""
    node = run.read_node()
    stale = proof.look(node, run.settings, run.now()).stale if node.manifests else []
    components = [c for c in restart_plan.ORDER if c in owed.to_restart or c in stale]
    return components, restart_these(run, node, components, going_back=True)


def _on_the_old_set(run: Run, owed: Owed, restarted: Sequence[Restarted]) -> str:
    report = look_until(run, lambda f: f.certificate in owed.names)
    wrong = [finding for finding in report.wrong if finding.certificate in owed.names]
    failures = list(map(str, errors_of(restarted)))
    if failures or wrong:
        text = "; ".join([*failures, *([sentence(wrong)] if wrong else [])])
        return f"the old ones do not work, either: {text}"
    return f"everything runs on the old files again ({len(report.findings) - len(report.wrong)} checks hold)"
