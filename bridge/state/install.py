"""
Replaces a set of files in one recoverable step.

Stage beside each target, back up by copy, write the journal (the commit point), swap by rename, remove the journal.
After a crash before the journal all files are old, after a later one all are new, once `recover` has run; every command
that writes runs it first. The caller has verified the files' content (`bridge.pki.verify`).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from bridge.errors import BridgeError
from bridge.node.processes import Written
from bridge.state import Store, replaced_here
from bridge.system.console import log
from bridge.system.files import Attributes, digest, is_frozen, side_by_side, sync_directory, write_staged
from bridge.system.paths import UnreadableError, foreign_link, read_once, real_path
from bridge.system.state_file import OnDamage, StateError, StateFile, coded, unsealed

STAGED_PREFIX = ".ca-bridge-"

# kubeadm keeps an existing file's mode; a private key is for its owner alone, a kubeconfig (which holds one) may be
# shared with a group of administrators
KEY_MASK = 0o600
KUBECONFIG_MASK = 0o660
CERTIFICATE_MASK = 0o777
#: kubeadm's mode for `pki/etcd`.
PKI_DIRECTORY_MODE = 0o755


MANIFEST = "manifest.json"
_PAIRS = (
    "`ca-bridge doctor` shows whether each key belongs to its certificate, and `ca-bridge rollback` puts files back"
)


class InstallError(BridgeError):
    """The files could not be replaced; the message says what is on disk now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """One file and its new content."""

    certificate: str  #: kubeadm's name of the file's certificate.
    path: Path  #: Unless `is_link`, a symlink is followed and stays.
    data: bytes | None  #: None: the file is removed.
    mode_mask: int  #: The permissions that the new file may have at most.
    was: str | None  #: `fingerprint` of the file when the CSR was made; None: there was none.
    attributes: Attributes | None = None  #: For a new file; None: it is for its owner alone.
    is_imposed: bool = False  #: An existing file gets these attributes as well.
    is_link: bool = False  #: The symlink itself is replaced, or a file in its place.
    leads_to: str | None = None  #: The target of the new symlink, which has no data; only with `is_link`.
    says_the_same: bool = False  #: A program that reads it only at its start need not be restarted.
    makes_directory: bool = False  #: The file may be the first of its directory.


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A replacement with its real path, the path of its staged content, and the old file's attributes."""

    replacement: Replacement
    path: Path
    staged: Path
    attributes: Attributes | None  #: None: there is no file yet.


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """The result of `recover`: the interrupted installation, and which way it was ended."""

    run_id: str
    direction: str  #: `forward` or `back`.
    paths: tuple[str, ...]
    certificates: tuple[str, ...]  #: kubeadm's names of the files' certificates.

    def __str__(self) -> str:
        verb = "finished" if self.direction == "forward" else "undid"
        which = f"{len(self.paths)} files of {', '.join(self.certificates)}"
        return f"{verb} the installation of run {self.run_id}, which was interrupted: {which}"


def fingerprint(path: Path) -> str | None:
    """The SHA-256 of a file's content, or of a symlink's target; None: neither exists (InstallError: something else)."""
    if path.is_symlink():
        return link_digest(str(path.readlink()))
    try:
        return digest(_content(path))
    except FileNotFoundError:
        return None


def _content(path: Path) -> bytes:
    try:
        return read_once(path)[0]
    except UnreadableError as e:
        raise InstallError(
            f"{path}: wanted the file that is to be replaced, found {e}", hint="find out who put it there"
        ) from e


def _holds(path: Path, sha256: str) -> bool:
    """Whether the path is a file with this content, or a symlink with this digest."""
    with contextlib.suppress(InstallError):
        return fingerprint(path) == sha256
    return False


def link_digest(leads_to: str) -> str:
    """The SHA-256 that represents a symlink; no file's content has it."""
    return digest(b"symlink\0" + leads_to.encode())


def install(store: Store, replacements: Sequence[Replacement], run_id: str, about: Mapping[str, Any]) -> str:
    """Replace all files or none; return the backup's ID (InstallError: all old, or the journal is for `recover`)."""
    targets = [_target(replacement, run_id) for replacement in replacements]
    backup_id = ""
    try:
        staging_file(store).replace({"run_id": run_id, "staged": [str(target.staged) for target in targets]})
        side_by_side(_stage, targets)
        backup_id = _back_up(store, targets, run_id, about)
        _assert_unchanged(targets)
        for directory in {target.path.parent for target in targets}:
            sync_directory(directory)
    except (OSError, InstallError, StateError) as e:
        _leave_all_old(store, e, backup_id)
    journal, kept = _journal(targets, run_id, backup_id), _times_to_keep(store, targets)
    try:
        journal_file(store).replace(journal)
    except StateError as e:
        if not store.journal.exists():
            _leave_all_old(store, e, backup_id)
        _give_up(store, journal, e)
    replaced_here.append(backup_id)
    try:
        _forward(journal)
    except (OSError, InstallError) as e:
        _give_up(store, journal, e)
    _note_time(store, [target.path for target in targets], kept)
    _close_at_last(store, "all files were replaced")
    return backup_id


def _times_to_keep(store: Store, targets: Sequence[Target]) -> dict[Path, Written | None]:
    """When files that keep their meaning were written (None: not by us); their readers need not read them again."""
    paths = [target.path for target in targets if target.replacement.says_the_same]
    if not paths:
        return {}
    with contextlib.suppress(StateError):
        earlier = written_file(store).read() or {}
        return {
            path: written if (written := earlier.get(str(path))) is not None and written.is_of(path) else None
            for path in paths
        }
    return {}


def _note_time(store: Store, paths: Sequence[Path], kept: Mapping[Path, Written | None]) -> None:
    """Record when files were written; otherwise their ctime counts, from a clock that may have been wrong."""
    file = written_file(store)
    try:
        earlier = {path: written for path, written in (file.read() or {}).items() if written.is_of(Path(path))}
        times = {path: Written.of(path) for path in paths if path.exists()}
        file.put(
            earlier
            | {str(path): written.since(kept[path]) if path in kept else written for path, written in times.items()}
        )
    except (OSError, StateError) as e:
        log.warning("the time of the installation could not be written down: %s", _reason(e))


def recover(store: Store) -> Recovery | None:
    """Finish or else undo an interrupted installation; None: none was interrupted (InstallError: neither works; StateError)."""
    try:
        return _recover(store)
    except OSError as e:
        raise InstallError(
            f"what an interrupted run left can't be cleared away: {_reason(e)}",
            hint="fix the file system, then run `ca-bridge recover`",
        ) from e


def _recover(store: Store) -> Recovery | None:
    journal = journal_file(store).read()
    staged = staging_file(store).read()
    for half_written in store.half_written():
        half_written.unlink()
    if journal is None:
        _forget_staged(store, staged)
        _forget_partial_backups(store)
        return None
    direction = journal["direction"]
    if direction == "forward":
        try:
            _forward(journal)
        except (OSError, InstallError):
            direction = "back"
    if direction == "back":
        try:
            _back(store, journal)
        except (OSError, InstallError, StateError) as e:
            places = f"the old files are in {store.backups / journal['backup']}, the journal is {store.journal}"
            raise InstallError(
                f"an interrupted installation can neither be finished nor undone: {_reason(e)}",
                hint="; ".join(filter(None, (getattr(e, "hint", ""), places))),
            ) from e
    _close(store)
    paths = tuple(target["path"] for target in journal["targets"])
    names = tuple(dict.fromkeys(target["certificate"] for target in journal["targets"]))
    return Recovery(run_id=journal["run_id"], direction=direction, paths=paths, certificates=names)


def _target(replacement: Replacement, run_id: str) -> Target:
    path = replacement.path
    try:
        if (foreign := foreign_link(path)) is not None:
            raise InstallError(f"nothing was replaced: {foreign}", hint=foreign.hint)
        if replacement.makes_directory:
            path.parent.mkdir(mode=PKI_DIRECTORY_MODE, exist_ok=True)
        # the PKI directory is mounted into pods, and operators have reasons for their symlinks: both stay
        is_followed = path.exists() and not replacement.is_link
        real = real_path(path, strict=True) if is_followed else real_path(path.parent, strict=True) / path.name
        is_file = real.exists() and not real.is_symlink()
        attributes = Attributes.of(real).narrowed(replacement.mode_mask) if is_file else None
    except OSError as e:
        raise InstallError(f"nothing was replaced: {_reason(e)}") from e
    if real.is_symlink() and not replacement.is_link:
        raise InstallError(
            f"nothing was replaced: {path}: wanted a file, found a symlink that leads nowhere",
            hint="mount or fix what it leads to, or remove it",
        )
    if real.exists() and not real.is_file() and not real.is_symlink():
        raise InstallError(f"nothing was replaced: {path}: wanted a file, found something else")
    for frozen in filter(is_frozen, (real.parent,) if real.is_symlink() else (real, real.parent)):
        raise InstallError(
            f"nothing was replaced: {frozen}: can't replace it: it is immutable or append-only",
            hint=f"chattr -i -a {frozen}, after a look at who set it",
        )
    return Target(replacement=replacement, path=real, staged=_staged(real, run_id), attributes=attributes)


def _staged(path: Path, run_id: str) -> Path:
    return path.parent / f"{STAGED_PREFIX}{run_id}-{path.name}"


def _stage(target: Target) -> None:
    """Write the new content beside the target: on the same file system, so that rename(2) is atomic."""
    fresh = Attributes.private()
    replacement = target.replacement
    given = replacement.attributes.narrowed(replacement.mode_mask) if replacement.attributes is not None else fresh
    if replacement.leads_to is not None:
        target.staged.symlink_to(replacement.leads_to)
    elif replacement.data is not None:
        kept = None if replacement.is_imposed else target.attributes
        write_staged(target.staged, replacement.data, kept or given)


def _assert_unchanged(targets: Sequence[Target]) -> None:
    """Make sure that no program or person replaced a file since its CSR was made."""
    for target in targets:
        if fingerprint(target.path) != target.replacement.was:
            raise InstallError(
                f"{target.path}: wanted the file that the CSR was made from, found another content",
                hint="something else writes to the PKI; find it, then run again",
            )


def _back_up(store: Store, targets: Sequence[Target], run_id: str, about: Mapping[str, Any]) -> str:
    """Back up by copying (kubeadm rewrites files in place, and so a hard link too); the manifest is written last."""
    created, place_in_order = datetime.now(UTC), newest_number(store) + 1
    backup_id = f"{created:%Y%m%dT%H%M%SZ}-{run_id}"
    directory = store.backups / backup_id
    directory.mkdir(mode=0o700)
    manifest = {
        "id": backup_id,
        "number": place_in_order,
        "created": created.isoformat(timespec="microseconds"),
        "run_id": run_id,
        **about,
        "files": side_by_side(partial(_backed_up, directory), list(enumerate(targets))),
    }
    manifest_file(directory).replace(manifest)
    sync_directory(store.backups)
    return backup_id


def _backed_up(directory: Path, numbered: tuple[int, Target]) -> dict[str, Any]:
    """Back up a file, and return its entry for the manifest."""
    number, target = numbered
    entry: dict[str, Any] = {
        "certificate": target.replacement.certificate,
        "path": str(target.path),
        "backup": None,
    }
    if target.replacement.is_link:
        entry["leads_to"] = str(target.path.readlink()) if target.path.is_symlink() else None
    if target.attributes is not None:
        data, name = _content(target.path), f"{number:02}-{target.path.name}"
        write_staged(directory / name, data, Attributes.private())
        entry |= {"backup": name, "sha256": digest(data), "attributes": attributes_json(Attributes.of(target.path))}
    return entry


def newest_number(store: Store) -> int:
    """The newest backup's number, which orders installations independently of the clock; 0: there is no backup."""
    numbers = [0]
    for directory in store.backup_directories():
        with contextlib.suppress(StateError):  # the functions that list backups report a damaged one
            numbers.append((manifest_file(directory).read() or {"number": 0})["number"])
    return max(numbers)


def _journal(targets: Sequence[Target], run_id: str, backup_id: str) -> dict[str, Any]:
    entries = []
    for target in targets:
        data, leads_to = target.replacement.data, target.replacement.leads_to
        wanted = digest(data) if data is not None else link_digest(leads_to) if leads_to is not None else None
        name = target.replacement.certificate
        entries.append({"certificate": name, "path": str(target.path), "staged": str(target.staged), "sha256": wanted})
    return {"run_id": run_id, "backup": backup_id, "direction": "forward", "targets": entries}


def _forward(journal: Mapping[str, Any]) -> None:
    """Put all new files in place, from beside each target unless it is there already; may be repeated."""
    for target in journal["targets"]:
        path, staged = Path(target["path"]), Path(target["staged"])
        _assert_no_directory(path)
        if target["sha256"] is None:
            path.unlink(missing_ok=True)
        elif _holds(staged, target["sha256"]):
            staged.rename(path)
        elif not _holds(path, target["sha256"]):
            raise InstallError(f"{path}: its new content is neither here nor in {staged}")
    for directory in {Path(target["path"]).parent for target in journal["targets"]}:
        sync_directory(directory)


def _assert_no_directory(path: Path) -> None:
    """Refuse to replace a directory, whose content is not ours to remove."""
    if path.is_dir() and not path.is_symlink():
        raise InstallError(
            f"{path}: wanted a file that can be replaced, or none, found a directory",
            hint=f"move the directory {path} away, then run `ca-bridge recover`",
        )


def _back(store: Store, journal: dict[str, Any]) -> None:
    """Put the backup back in place; may be repeated."""
    if journal["direction"] != "back":
        journal["direction"] = "back"
        journal_file(store).replace(journal)
    directory = store.backups / journal["backup"]
    manifest = manifest_file(directory).read()
    if manifest is None:
        raise InstallError(f"{directory / MANIFEST}: the backup's manifest is missing")
    files = {entry["path"]: entry for entry in manifest["files"]}
    if unknown := {target["path"] for target in journal["targets"]} - files.keys():
        raise InstallError(f"{directory}: it has no backup of {', '.join(sorted(unknown))}")
    for target in journal["targets"]:
        path, staged, entry = Path(target["path"]), Path(target["staged"]), files[target["path"]]
        _assert_no_directory(path)
        staged.unlink(missing_ok=True)
        if (leads_to := entry.get("leads_to")) is not None:
            staged.symlink_to(leads_to)
            staged.rename(path)
        elif entry["backup"] is None:
            path.unlink(missing_ok=True)
        elif not _holds(path, entry["sha256"]):
            write_staged(staged, (directory / entry["backup"]).read_bytes(), attributes_from(entry["attributes"]))
            staged.rename(path)
        sync_directory(path.parent)


def _leave_all_old(store: Store, error: Exception, backup_id: str) -> NoReturn:
    """Give up before the commit point: remove only the staged files and the backup."""
    try:
        if backup_id:
            manifest_file(store.backups / backup_id).path.unlink(missing_ok=True)
        _forget_staged(store, staging_file(store).read())
        _forget_partial_backups(store)
    except (OSError, StateError) as e:
        log.warning("new files that were not installed could not be removed (%s); the next run does", _reason(e))
    raise InstallError(f"nothing was replaced: {_reason(error)}", hint=getattr(error, "hint", "")) from error


def _give_up(store: Store, journal: dict[str, Any], error: Exception) -> NoReturn:
    """Undo at once a swap that can't be completed."""
    try:
        _back(store, journal)
    except (OSError, InstallError, StateError) as e:
        raise InstallError(
            f"the files could not be replaced ({_reason(error)}), nor put back ({_reason(e)})",
            hint=getattr(e, "hint", "") or "fix the file system, then run `ca-bridge recover`",
        ) from error
    _close_at_last(store, "all was put back")
    replaced_here.clear()
    raise InstallError(f"all was put back: {_reason(error)}") from error


def _close_at_last(store: Store, done: str) -> None:
    """Remove the journal; if that fails, the next run does it, since the files are complete."""
    try:
        _close(store)
    except StateError as e:
        log.warning("%s, but the journal could not be removed (%s); the next run does", done, _reason(e))


def _close(store: Store) -> None:
    journal_file(store).remove()
    staging_file(store).remove()


def _forget_staged(store: Store, staged: Sequence[Path] | None) -> None:
    """Remove staged files that no journal covers; None: there is no list of them."""
    if staged is None:
        return
    for path in staged:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # a read-only file system refuses to remove even a file that is not there
            path.unlink()
    store.staging.unlink()


def _forget_partial_backups(store: Store) -> None:
    """Remove backups without a manifest: they were never finished, and no file was replaced after them."""
    for directory in store.backup_directories():
        if not (directory / MANIFEST).exists() and not directory.is_symlink():
            shutil.rmtree(directory)


def attributes_json(attributes: Attributes) -> dict[str, Any]:
    """The attributes in the form of a journal or manifest."""
    extended = {name: value.hex() for name, value in attributes.extended.items()}
    return {"mode": attributes.mode, "uid": attributes.uid, "gid": attributes.gid, "extended": extended}


def attributes_from(value: Mapping[str, Any]) -> Attributes:
    """Read attributes from a backup's manifest."""
    extended = {name: bytes.fromhex(text) for name, text in value["extended"].items()}
    return Attributes(mode=value["mode"], uid=value["uid"], gid=value["gid"], extended=extended)


def journal_file(store: Store) -> StateFile[dict[str, Any]]:
    """The journal: while it exists, an installation is neither done nor undone."""
    return StateFile(
        path=store.journal,
        what="our journal of an installation",
        parse=_journal_of,
        on_damage=OnDamage.REFUSE,
        afterwards=_PAIRS,
    )


def _journal_of(data: bytes) -> dict[str, Any]:
    """Parse a journal, which has each path twice."""
    document = unsealed(data)
    if document["direction"] not in ("forward", "back") or not _names(document, "run_id", "backup"):
        raise ValueError("not written by this program")
    for target in document["targets"]:
        path = Path(target["path"])
        is_own = target["staged"] == str(_staged(path, document["run_id"])) and path.is_absolute()
        if not is_own or not isinstance(target["certificate"], str) or not isinstance(target["sha256"], str | None):
            raise ValueError("not written by this program")
    return document


def staging_file(store: Store) -> StateFile[tuple[Path, ...]]:
    """The list of files that an installation stages; without a journal all of them may be removed."""
    return StateFile(
        path=store.staging,
        what="the list of files that were staged",
        parse=_staged_of,
        on_damage=OnDamage.REFUSE,
        afterwards=f"remove what begins with {STAGED_PREFIX} in the directories with certificates and kubeconfigs",
    )


def _staged_of(data: bytes) -> tuple[Path, ...]:
    document = unsealed(data)
    paths = tuple(map(Path, document["staged"]))
    prefix = f"{STAGED_PREFIX}{document['run_id']}-"
    if not all(path.is_absolute() and path.name.startswith(prefix) for path in paths):
        raise ValueError("not written by this program")
    return paths


def written_file(store: Store) -> StateFile[dict[str, Written]]:
    """The times at which the installed files were written, by path; without it their ctime counts."""
    return coded(dict[str, Written], store.written, "when files were installed", OnDamage.START_OVER, key="files")


def manifest_file(directory: Path) -> StateFile[dict[str, Any]]:
    """A backup's manifest; a directory without a manifest is no backup."""
    return StateFile(
        path=directory / MANIFEST,
        what="a backup's manifest",
        parse=_manifest_of,
        on_damage=OnDamage.REFUSE,
        afterwards="`ca-bridge backups` lists the others",
    )


def _manifest_of(data: bytes) -> dict[str, Any]:
    """Check the fields without which a backup could not be listed or put back."""
    document = unsealed(data)
    if (
        type(document["number"]) is not int
        or not _names(document, "id", "created", "run_id")
        or not isinstance(document["files"], list)
    ):
        raise ValueError("not written by this program")
    for entry in document["files"]:
        kept = entry["backup"] is None or _names(entry, "backup", "sha256")
        leads_to = entry.get("leads_to")
        if not kept or not _names(entry, "certificate", "path") or not isinstance(leads_to, str | None):
            raise ValueError("not written by this program")
    return document


def _names(document: Mapping[str, Any], *keys: str) -> bool:
    """Whether all of these keys have a text."""
    return all(isinstance(document[key], str) for key in keys)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
