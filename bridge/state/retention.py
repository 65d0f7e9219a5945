"""Delete the backups that nobody needs any more."""

from __future__ import annotations

import logging
import shutil
from datetime import datetime

from bridge.node.inventory import Node
from bridge.settings.tables import Settings
from bridge.state.backup_check import problems_of
from bridge.state.backups import Backup, read_all
from bridge.state.install import MANIFEST
from bridge.state.store import Store
from bridge.system.files import sync_directory

log = logging.getLogger("ca-bridge")


def retire(store: Store, settings: Settings, node: Node, now: datetime) -> list[str]:
    """
    Delete the backups that nobody needs; its lock is held.

    A backup goes when `keep` newer ones exist or when it is older than `keep_for`; but never the newest, and never
    the newest that could be put back now, nor any while an installation is not proven. Keys are unlinked, not
    overwritten: a journaling file system or an SSD writes elsewhere.

    Returns:
        Their IDs. What could not be deleted is a warning: the installation before it is done.
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
    """
    Delete a backup, its manifest first: what a crash leaves is no backup any more, and the next run removes it.

    Raises:
        OSError: Something of it is left.
    """
    (backup.directory / MANIFEST).unlink()
    sync_directory(backup.directory)
    shutil.rmtree(backup.directory)
