"""
The backups in the state directory: list them, find one.

A backup is what an installation replaced (`bridge.state.install` makes it): copies of the files, and a manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError
from bridge.state.install import attributes_from, manifest_file
from bridge.state.store import Store
from bridge.system.files import Attributes
from bridge.system.state_file import StateError

log = logging.getLogger("ca-bridge")

#: An ID begins with the time at which it was made, in whole seconds.
_STAMP = len("20260101T000000Z")


class BackupError(BridgeError):
    """There is no such backup, or it can't be read."""

    hint = "`ca-bridge backups` lists what there is"

    def __init__(self, message: str, *, hint: str | None = None, backup_id: str = "") -> None:
        super().__init__(message, hint=hint)
        self.backup_id = backup_id  #: Of one that can't be read.


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file, or symlink, as it was."""

    certificate: str  #: kubeadm's name of the certificate that it belongs to.
    path: Path  #: Where it was, symlinks on the way to it resolved.
    copy: Path | None  #: None: there was no file.
    sha256: str | None
    attributes: Attributes | None
    is_link: bool = False  #: A symlink is what was replaced here, or what came into the place of this file.
    leads_to: str | None = None  #: It was a symlink, to there.

    @property
    def was_there(self) -> bool:
        """Whether there was anything."""
        return self.copy is not None or self.leads_to is not None

    @property
    def target(self) -> Path | None:
        """The file that the symlink led to; it is in the backup only if that undoes a rollback."""
        return self.path.parent / self.leads_to if self.leads_to is not None else None

    @classmethod
    def of(cls, entry: Mapping[str, Any], directory: Path) -> File:
        """Read an entry of a manifest."""
        name, path = entry["certificate"], Path(entry["path"])
        has_copy = entry["backup"] is not None
        return cls(
            is_link="leads_to" in entry,
            leads_to=entry.get("leads_to"),
            certificate=name,
            path=path,
            copy=directory / Path(entry["backup"]).name if has_copy else None,
            sha256=entry["sha256"] if has_copy else None,
            attributes=attributes_from(entry["attributes"]) if has_copy else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """A backup: the files that an installation replaced."""

    backup_id: str
    directory: Path
    created: datetime
    number: int  #: In the order in which they were made; 0: an earlier version made it.
    run_id: str
    command: str  #: Empty where the manifest does not tell.
    user: str
    host: str
    certificates: tuple[Mapping[str, Any], ...]  #: `name`, `old_serial`, `new_serial` each.
    files: tuple[File, ...]

    @property
    def names(self) -> list[str]:
        """The names of its certificates, each once."""
        return list(dict.fromkeys(file.certificate for file in self.files))


def read_all(store: Store) -> tuple[list[Backup], list[BackupError]]:
    """All backups, the newest first; and those that can't be read. One without a manifest is none."""
    found, broken = [], []
    try:
        directories = store.backup_directories()
    except OSError as e:
        return [], [BackupError(f"{store.backups}: wanted to look for backups, found: {e.strerror}")]
    for directory in directories:
        try:
            backup = _read(directory)
        except (BackupError, StateError) as e:
            broken.append(BackupError(str(e), backup_id=directory.name))
        else:
            found += [backup] if backup is not None else []
    return sorted(found, key=lambda backup: (backup.number, backup.created, backup.backup_id), reverse=True), broken


def _read(directory: Path) -> Backup | None:
    """Read one; None: it is not finished, or being deleted."""
    manifest_ = manifest_file(directory)
    manifest = manifest_.read()
    if manifest is None:
        return None
    try:
        return Backup(
            backup_id=directory.name,
            directory=directory,
            created=datetime.fromisoformat(manifest["created"]),
            number=manifest.get("number", 0),
            run_id=manifest["run_id"],
            command=manifest.get("command", ""),
            user=manifest.get("user", ""),
            host=manifest.get("host", ""),
            certificates=tuple(manifest.get("certificates", ())),
            files=tuple(File.of(entry, directory) for entry in manifest["files"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BackupError(f"{manifest_.path}: wanted a manifest, found something else ({type(e).__name__})") from e


def find(store: Store, backup_id: str | None) -> Backup:
    """Find a backup, or the newest; if the newest can't be read, no older one is taken in its place."""
    found, broken = read_all(store)
    newest = found[0].backup_id[:_STAMP] if found else ""
    for error in broken:
        if error.backup_id in ("", backup_id):
            raise error
        if backup_id is None and error.backup_id[:_STAMP] >= newest:
            raise BackupError(
                f"the newest backup can't be read: {error}",
                hint="`ca-bridge rollback ID` takes another one of `ca-bridge backups`",
            )
    for backup in found:
        if backup_id in (None, backup.backup_id):
            return backup
    wanted = f"the backup {backup_id}" if backup_id else "a backup"
    raise BackupError(f"wanted {wanted} in {store.backups}, found {_others(len(found))}")


def _others(count: int) -> str:
    return "none" if not count else f"{count} other{'' if count == 1 else 's'}"
