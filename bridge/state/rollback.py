"""What becomes of backups: one is put back, if it is fit, or deleted when it is old."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from bridge.errors import BridgeError
from bridge.node import inventory
from bridge.node.inventory import Item, Node
from bridge.pki.certificates import serial_hex
from bridge.settings.tables import Settings
from bridge.state import audit, copies
from bridge.state.backup_check import Problem, files_of, pair_of, problems_of
from bridge.state.backups import Backup, BackupError, File, find, read_all
from bridge.state.install import (
    CERTIFICATE_MASK,
    KEY_MASK,
    KUBECONFIG_MASK,
    MANIFEST,
    InstallError,
    Replacement,
    fingerprint,
    install,
)
from bridge.state.session import alone
from bridge.state.store import Outcome, Store
from bridge.system.files import sync_directory
from bridge.system.state_file import StateError

log = logging.getLogger("ca-bridge")


class RollbackRefusedError(BridgeError):
    """The backup is not fit to be put back; all that is wrong, one a line. Nothing was replaced."""

    def __init__(self, backup_id: str, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        hint = (
            "choose another one of `ca-bridge backups`, or renew"
            if any(not problem.can_be_forced for problem in problems)
            else "--force puts it back nevertheless; components and clients may refuse what is wrong with it"
        )
        super().__init__("\n".join(f"backup {backup_id}: {problem}" for problem in problems), hint=hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """The result of a rollback."""

    backup: Backup
    replaced_backup_id: str  #: The backup of what was there before.
    outcomes: tuple[Outcome, ...]
    removed: tuple[Path, ...]  #: Were not there when the backup was made.
    late: tuple[BridgeError, ...] = ()  #: About copies that still hold what was replaced.


def put_back_and_retire(
    settings: Settings,
    backup_id: str | None,
    now: Callable[[], datetime],
    *,
    force: bool,
    wait: timedelta,
) -> tuple[Rollback, Node]:
    """
    Put back the files of a backup, or of the newest, all or none, and back up what they replace: a second rollback undoes it.

    Files that were not there when the backup was made are removed. `force` also puts back certificates that a CA must not
    sign like that now, if the node could run on them.

    Raises:
        RollbackRefusedError: The backup is not fit. As after any other error, nothing was replaced.
    """
    with alone(settings, wait, lambda found: log.warning("%s", found)) as (store, record):
        node = inventory.of(settings.node)

        def may_pass(problem: Problem) -> bool:
            return force and problem.can_be_forced

        done = put_back(find(store, backup_id), settings, store, record, node, now(), may_pass)
        retire(store, settings, node, now())
    return done, node


def put_back(
    backup: Backup,
    settings: Settings,
    store: Store,
    record: audit.Record,
    node: Node,
    now: datetime,
    may_pass: Callable[[Problem], bool],
) -> Rollback:
    """The same for a run that holds the store's lock, and for what may pass of its problems."""
    problems = problems_of(backup, settings, node, now)
    if not all(map(may_pass, problems)):
        error = RollbackRefusedError(backup.backup_id, problems)
        record.add(audit.REFUSED, error=error)
        raise error
    outcomes = outcomes_of(backup, node)
    result = f"backup {backup.backup_id}"
    for o in outcomes:
        record.add(audit.VERIFIED, o.name, authority=o.authority, old=o.old, new=o.new, result=result)
    record.write()  # nothing is put back that the record does not know
    about = {
        "command": shlex.join(sys.argv),
        **audit.who(),
        "rollback_to": backup.backup_id,
        "certificates": [
            {"name": o.name, "old_serial": _serial(o.old), "new_serial": _serial(o.new)} for o in outcomes
        ],
    }
    try:
        copies.owe(settings, store, node, {o.name: o.old for o in outcomes})
        # a run may have installed something itself, and put several sets back
        run_id = f"{record.run_id}-{backup.run_id.partition('-')[0]}"
        replaced = install(store, [_replacement(file, node) for file in backup.files], run_id, about)
    except (InstallError, StateError) as e:
        for o in outcomes:
            record.add(audit.FAILED, o.name, authority=o.authority, old=o.old, error=e)
        raise
    for o in outcomes:
        record.add(audit.ROLLED_BACK, o.name, authority=o.authority, old=o.old, new=o.new, result=result)
    late = copies.settle(settings, store, record)
    record.write_or_warn()  # what comes after it may take minutes, and be killed
    return Rollback(
        backup=backup,
        replaced_backup_id=replaced,
        outcomes=tuple(outcomes),
        removed=tuple(file.path for file in backup.files if not file.was_there),
        late=tuple(late),
    )


def _serial(certificate: x509.Certificate | None) -> str | None:
    return serial_hex(certificate) if certificate is not None else None


def outcomes_of(backup: Backup, node: Node) -> list[Outcome]:
    """The outcomes that putting a backup back has, one a certificate; without a new one where its files are removed."""
    outcomes = []
    for item in node.items:
        files = files_of(backup, item.spec.name)
        if files:
            is_there = any(file.was_there for file in files)
            outcomes.append(
                Outcome(
                    name=item.spec.name,
                    authority=item.spec.authority.name,
                    old=item.certificates[0] if item.certificates else None,
                    new=_leaf(backup, files, item) if is_there else None,
                )
            )
    return outcomes


def _leaf(backup: Backup, files: Sequence[File], item: Item) -> x509.Certificate:
    try:
        return pair_of(files, item)[0][0]
    except (BridgeError, OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise BackupError(
            f"backup {backup.backup_id}: {item.spec.name}: wanted its certificate, found: {reason}",
            backup_id=backup.backup_id,
        ) from e


def _replacement(file: File, node: Node) -> Replacement:
    [item] = [item for item in node.items if item.spec.name == file.certificate]
    if item.spec.kubeconfig and file.path.name == item.spec.base:
        mask = KUBECONFIG_MASK
    elif item.key_path is None or item.current is not None:
        mask = KEY_MASK
    else:
        mask = KEY_MASK if file.path.resolve() == item.key_path.resolve() else CERTIFICATE_MASK
    return Replacement(
        certificate=file.certificate,
        path=file.path,
        data=file.copy.read_bytes() if file.copy is not None else None,
        mode_mask=mask,
        was=fingerprint(file.path),
        attributes=file.attributes,
        is_link=file.is_link,
        leads_to=file.leads_to,
    )


def retire(store: Store, settings: Settings, node: Node, now: datetime) -> list[str]:
    """
    Delete the backups that nobody needs, and return their IDs.

    A backup goes when `keep` newer ones exist or when it is older than `keep_for`; but never the newest, and never
    the newest that could be put back now, nor any while an installation is not proven. Keys are unlinked, not
    overwritten: a journaling file system or an SSD writes elsewhere.
    """
    found, _ = read_all(store)
    keep = settings.backups
    old = [
        backup
        for newer, backup in enumerate(found)
        if newer > 0 and (newer >= keep.keep or now - backup.created > keep.keep_for)
    ]
    if not old or store.unproven.exists():
        return []
    last_good = next((backup for backup in found if not problems_of(backup, settings, node, now)), None)
    deleted = []
    for backup in reversed(old):
        if backup is last_good:
            continue
        try:
            delete(backup)
        except OSError as e:
            log.warning("the old backup %s could not be deleted: %s: %s", backup.backup_id, e.filename, e.strerror)
        else:
            log.debug("deleted the old backup %s", backup.backup_id)
            deleted.append(backup.backup_id)
    return deleted


def delete(backup: Backup) -> None:
    """Delete a backup, its manifest first: what a crash leaves is no backup any more, and the next run removes it."""
    (backup.directory / MANIFEST).unlink()
    sync_directory(backup.directory)
    shutil.rmtree(backup.directory)
