"""Damaged state files: finds them, and renames them for an operator who has read the consequences."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.control_plane.restarts import times_file
from bridge.renewal.gate import attempts_file, next_ca_file
from bridge.settings.tables import Settings
from bridge.state import Store, audit, backups
from bridge.state.install import journal_file, staging_file
from bridge.state.obligations import (
    copies_file,
    hooks_file,
    pairs_file,
    postponed_file,
    revocations_file,
    unproven_file,
)
from bridge.state.open_requests import RENEWALS, USERS, file_of
from bridge.state.static_pods import restart_file
from bridge.system.locks import lock
from bridge.system.state_file import StateError, StateFile


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """One file that was renamed."""

    path: Path  #: Where it was.
    kept: Path  #: Where it is.
    why: str
    afterwards: tuple[str, ...]  #: What is to be looked at now, a sentence each.


def state_files(store: Store) -> list[StateFile[Any]]:
    """All files whose damage stops a run; damage to the audit log's head does not."""
    makers = (
        restart_file,
        journal_file,
        staging_file,
        unproven_file,
        postponed_file,
        pairs_file,
        hooks_file,
        revocations_file,
        next_ca_file,
    )
    open_ = (file_of(RENEWALS, store.requests), file_of(USERS, store.users))
    return [*(make(store) for make in makers), *open_, copies_file(store), attempts_file(store), times_file(store)]


def set_aside(settings: Settings) -> list[SetAside]:
    """Rename every damaged state file, and record that; with a journal goes its list of staged files, whole or not."""
    store = Store(settings.node.state_dir)
    store.prepare()
    with lock(store.lock, shlex.join(sys.argv)), audit.Record(store, settings.audit) as record:
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
    """Sentences about the installation whose journal is damaged, by the list of staged files."""
    try:
        staged = staging_file(store).read() or ()
    except StateError:
        return ()
    there = [path for path in staged if path.exists()]
    made = [one for one in backups.read_all(store)[0] if any(f"-{one.run_id}-" in path.name for path in staged)]
    return (
        *(f"{path} was staged and not installed; it stays" for path in there),
        *(f"the old files of that run are in the backup {one.backup_id}" for one in made),
    )
