"""
The backups in the state directory: list them, put one back, delete old ones.

A backup is what an installation replaced (`bridge.state.install` makes it): copies of the files, and a manifest.
What is put back is checked as a new certificate is, against the live one's subject and SANs. The node ran on it
before, though: what a component can start with may be forced, and only what it can't start with may not.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from bridge.contract import Issued, SignRequest
from bridge.errors import BridgeError, VerificationError
from bridge.node import inventory, kubeconfig
from bridge.node.inventory import Item, Node
from bridge.pki import csr, verify
from bridge.pki.certificates import load_pem_certificates, serial_hex
from bridge.settings.tables import Settings
from bridge.state import audit
from bridge.state.install import (
    CERTIFICATE_MASK,
    KEY_MASK,
    KUBECONFIG_MASK,
    InstallError,
    Replacement,
    attributes_from,
    digest,
    install,
)
from bridge.state.outcome import Outcome
from bridge.state.session import alone
from bridge.state.store import Store
from bridge.system.files import Attributes, sync_directory

log = logging.getLogger("ca-bridge")

MANIFEST = "manifest.json"
#: What a manifest without them could not be listed or put back.
_NEEDED = {"id": str, "created": str, "run_id": str, "files": list}

#: An ID begins with the time at which it was made, in whole seconds.
_STAMP = len("20260101T000000Z")


class BackupError(BridgeError):
    """There is no such backup, or it can't be read."""

    hint = "`ca-bridge backups` lists what there is"

    def __init__(self, message: str, *, hint: str | None = None, backup_id: str = "") -> None:
        super().__init__(message, hint=hint)
        self.backup_id = backup_id  #: Of one that can't be read.


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
class Problem:
    """One reason not to put a backup back."""

    certificate: str  #: kubeadm's name.
    wanted: str
    found: str
    subject: str = ""  #: What is wrong with the certificate itself, as `bridge.pki.verify` calls it.

    @property
    def is_damage(self) -> bool:
        """Not something that the certificate says, but that it is not whole, not there, or apart from its key."""
        return not self.subject

    @property
    def can_be_forced(self) -> bool:
        """Whether the node could run on it nevertheless."""
        return not self.is_damage and self.subject not in _NEVER_FORCED

    def __str__(self) -> str:
        about = f"{self.subject}: " if self.subject else ""
        return f"{self.certificate}: {about}wanted {self.wanted}, found {self.found}"


#: Nobody would trust it: another CA's, or the CA was changed.
_NEVER_FORCED = ("chain", "issuer", "public key", "extensions", "critical extension")


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file as it was."""

    certificate: str  #: kubeadm's name of the certificate that it belongs to.
    path: Path  #: Where it was, symlinks resolved.
    copy: Path | None  #: None: there was no file.
    sha256: str | None
    attributes: Attributes | None

    @classmethod
    def of(cls, entry: Mapping[str, Any], directory: Path) -> File:
        """From a manifest's entry."""
        name, path = entry["certificate"], Path(entry["path"])
        if entry["backup"] is None:
            return cls(certificate=name, path=path, copy=None, sha256=None, attributes=None)
        return cls(
            certificate=name,
            path=path,
            copy=directory / Path(entry["backup"]).name,
            sha256=entry["sha256"],
            attributes=attributes_from(entry["attributes"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """What an installation replaced."""

    backup_id: str
    directory: Path
    created: datetime
    run_id: str
    command: str  #: Empty where the manifest does not tell.
    user: str
    host: str
    certificates: tuple[Mapping[str, Any], ...]  #: `name`, `old_serial`, `new_serial` each.
    files: tuple[File, ...]

    @property
    def names(self) -> list[str]:
        """Of its certificates, each once."""
        return list(dict.fromkeys(file.certificate for file in self.files))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """What was put back."""

    backup: Backup
    replaced_backup_id: str  #: The backup of what was there before.
    outcomes: tuple[Outcome, ...]
    removed: tuple[Path, ...]  #: Were not there when the backup was made.


# --- what there is ---------------------------------------------------------------------------------------------------


def read_all(store: Store) -> tuple[list[Backup], list[BackupError]]:
    """All backups, the newest first; and those that can't be read. One without a manifest is none."""
    found, broken = [], []
    try:
        directories = store.backup_directories()
    except OSError as e:
        return [], [BackupError(f"{store.backups}: wanted to look for backups, found: {e.strerror}")]
    for directory in directories:
        try:
            found.append(_read(directory))
        except FileNotFoundError:
            continue  # not finished, or being deleted
        except OSError as e:
            text = f"{directory / MANIFEST}: wanted a manifest, found: {e.strerror}"
            broken.append(BackupError(text, backup_id=directory.name))
        except BackupError as e:
            broken.append(BackupError(str(e), backup_id=directory.name))
    return sorted(found, key=lambda backup: (backup.created, backup.backup_id), reverse=True), broken


def _read(directory: Path) -> Backup:
    path = directory / MANIFEST
    data = path.read_bytes()
    try:
        manifest = json.loads(data)
        if not all(isinstance(manifest[key], kind) for key, kind in _NEEDED.items()):
            raise BackupError(f"{path}: wanted a manifest, found keys of other types")
        return Backup(
            backup_id=directory.name,
            directory=directory,
            created=datetime.fromisoformat(manifest["created"]),
            run_id=manifest["run_id"],
            command=manifest.get("command", ""),
            user=manifest.get("user", ""),
            host=manifest.get("host", ""),
            certificates=tuple(manifest.get("certificates", ())),
            files=tuple(File.of(entry, directory) for entry in manifest["files"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BackupError(f"{path}: wanted a manifest, found something else ({type(e).__name__})") from e


def find(store: Store, backup_id: str | None) -> Backup:
    """
    One backup.

    Args:
        store: Where to look.
        backup_id: None: the newest.

    Raises:
        BackupError: There is none, or it can't be read; nor is an older one taken in the place of the newest.
    """
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
    raise BackupError(f"wanted {wanted} in {store.backups}, found {f'{len(found)} others' if found else 'none'}")


# --- is it good? -----------------------------------------------------------------------------------------------------


def problems_of(backup: Backup, settings: Settings, node: Node, now: datetime) -> list[Problem]:
    """
    All that speaks against putting it back.

    Args:
        backup: What to look at.
        settings: The subject attributes that a certificate may have or lack are in there.
        node: With the live certificates.
        now: Aware, UTC.
    """
    items = {item.spec.name: item for item in node.items}
    found: list[Problem] = []
    for name in backup.names:
        item = items.get(name)
        if item is None:
            wanted = "a certificate of this node"
            found.append(Problem(certificate=name, wanted=wanted, found="a name that it does not have"))
        else:
            found += _problems(_files(backup, name), item, now, settings.extra_subject(item.spec.authority.name))
    return found


def _files(backup: Backup, name: str) -> list[File]:
    return [file for file in backup.files if file.certificate == name]


def _problems(files: Sequence[File], item: Item, now: datetime, extra: frozenset[tuple[str, str]]) -> Iterator[Problem]:
    """Of one certificate: its files, its pair, what is in it; later ones make no sense without the earlier."""
    name = item.spec.name
    found = [*_misplaced(name, files, item), *_damaged(name, files)]
    if found:
        yield from found
    elif any(file.copy is not None for file in files):
        try:
            certificates, key_pem = _pair(files, item)
            key = _key_of(certificates[0], key_pem)
        except (BridgeError, ValueError, TypeError, UnsupportedAlgorithm) as e:
            reason = str(e) if isinstance(e, BridgeError) else "another key, or none that can be read"
            yield Problem(certificate=name, wanted="a certificate and its private key", found=reason)
            return
        yield from _unproven(item, certificates, key, now, extra)


def _misplaced(name: str, files: Sequence[File], item: Item) -> Iterator[Problem]:
    """A backup is of this node's files, and writes no others."""
    places = {path.resolve() for path in (item.key_path, item.certificate_path) if path is not None}
    for file in files:
        if file.path.resolve() not in places:
            wanted = " or ".join(sorted(map(str, places)))
            yield Problem(certificate=name, wanted=f"a file for {wanted}", found=f"one for {file.path}")


def _damaged(name: str, files: Sequence[File]) -> Iterator[Problem]:
    for file in files:
        if file.copy is None:
            continue
        try:
            now = digest(file.copy.read_bytes())
        except OSError as e:
            yield Problem(certificate=name, wanted=f"the file {file.copy}", found=e.strerror or "an error")
        else:
            if now != file.sha256:
                wanted = f"{file.copy} with SHA-256 {str(file.sha256)[:16]}…"
                yield Problem(certificate=name, wanted=wanted, found=f"{now[:16]}…")


def _pair(files: Sequence[File], item: Item) -> tuple[list[x509.Certificate], bytes]:
    """
    Certificates, the leaf first, and key (PEM).

    Raises:
        BridgeError, ValueError: They can't be read.
    """
    contents = {file.path.resolve(): file.copy.read_bytes() for file in files if file.copy is not None}
    certificate_path = item.certificate_path.resolve()
    key_path = item.key_path.resolve() if item.key_path is not None else certificate_path
    missing = [str(path) for path in dict.fromkeys((certificate_path, key_path)) if path not in contents]
    if missing:
        raise BackupError(f"no {' and no '.join(missing)}")
    if item.key_path is None:
        parsed = kubeconfig.parse(contents[certificate_path])
        key = kubeconfig.key_data(contents[certificate_path])
        return load_pem_certificates(parsed.certificate_data or b""), key or b""
    return load_pem_certificates(contents[certificate_path]), contents[key_path]


def _key_of(certificate: x509.Certificate, key_pem: bytes) -> csr.PrivateKey:
    encoding = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    key = serialization.load_pem_private_key(key_pem, None)
    if key.public_key().public_bytes(*encoding) != certificate.public_key().public_bytes(*encoding):
        raise ValueError
    if not isinstance(key, csr.PrivateKey):
        raise BackupError(f"a key that Kubernetes can't use ({type(key).__name__})")
    return key


def _unproven(
    item: Item,
    certificates: Sequence[x509.Certificate],
    key: csr.PrivateKey,
    now: datetime,
    extra: frozenset[tuple[str, str]],
) -> Iterator[Problem]:
    """As an answer to a request that we would make now, but for how long it must be valid."""
    name, leaf = item.spec.name, certificates[0]
    live = item.certificates[0] if item.certificates else leaf
    try:
        expected = verify.Expectation(
            anchors=tuple(load_pem_certificates(item.anchor_path.read_bytes())),
            anchor_name=str(item.anchor_path),
            now=now,
            min_validity=timedelta(),
            extra_subject=extra,
        )
    except (OSError, ValueError) as e:
        reason = str(e.strerror if isinstance(e, OSError) else e)
        yield Problem(certificate=name, wanted=f"the CA certificate {item.anchor_path}", found=reason)
        return
    try:
        request = SignRequest(spec=item.spec, csr_pem=csr.build(live, key), validity=timedelta())
        verify.check(Issued(leaf=leaf, intermediates=tuple(certificates[1:])), request, expected)
    except csr.CannotCarryError as e:
        yield Problem(certificate=name, subject="live certificate", wanted="one to compare it with", found=str(e))
    except VerificationError as e:
        for violation in e.violations:
            yield Problem(certificate=name, subject=violation.subject, wanted=violation.want, found=violation.got)


# --- going back ------------------------------------------------------------------------------------------------------


def rollback(
    settings: Settings,
    backup_id: str | None,
    now: Callable[[], datetime],
    *,
    force: bool,
    wait: timedelta,
) -> tuple[Rollback, Node]:
    """
    Put a backup's files back, all or none, and back up what they replace (so that a second rollback undoes the first).

    Files that were not there when the backup was made are removed.

    Args:
        settings: Where everything is.
        backup_id: None: the newest.
        now: The node's clock.
        force: Also certificates that are not as a new one would have to be, if the node could run on them.
        wait: For the lock.

    Raises:
        LockedError: Another run works on this node.
        BackupError: No such backup.
        RollbackRefusedError: It is not fit.
        AuditError: It can't be recorded; nothing was replaced.
        InstallError: Nothing was replaced.
    """
    with alone(settings, wait, lambda found: log.warning("%s", found)) as (store, record):
        node = inventory.read(settings.node.pki_dir, settings.node.kubeconfig_dir)

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
    """
    The same for a run that holds the store's lock, and for what may pass of its problems.

    Raises:
        RollbackRefusedError, AuditError, InstallError: As `rollback`.
    """
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
        # a run may have installed something itself, and put several sets back
        run_id = f"{record.run_id}-{backup.run_id.partition('-')[0]}"
        replaced = install(store, [_replacement(file, node) for file in backup.files], run_id, about)
    except InstallError as e:
        for o in outcomes:
            record.add(audit.FAILED, o.name, authority=o.authority, old=o.old, error=e)
        raise
    for o in outcomes:
        record.add(audit.ROLLED_BACK, o.name, authority=o.authority, old=o.old, new=o.new, result=result)
    record.write_or_warn()  # what comes after it may take minutes, and be killed
    return Rollback(
        backup=backup,
        replaced_backup_id=replaced,
        outcomes=tuple(outcomes),
        removed=tuple(file.path for file in backup.files if file.copy is None),
    )


def _serial(certificate: x509.Certificate | None) -> str | None:
    return serial_hex(certificate) if certificate is not None else None


def outcomes_of(backup: Backup, node: Node) -> list[Outcome]:
    """
    What putting it back does, one a certificate; without a new one where its files are removed.

    Raises:
        BackupError: A copy is damaged.
    """
    outcomes = []
    for item in node.items:
        files = _files(backup, item.spec.name)
        if files:
            is_there = any(file.copy is not None for file in files)
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
        return _pair(files, item)[0][0]
    except (BridgeError, OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise BackupError(
            f"backup {backup.backup_id}: {item.spec.name}: wanted its certificate, found: {reason}",
            backup_id=backup.backup_id,
        ) from e


def _replacement(file: File, node: Node) -> Replacement:
    [item] = [item for item in node.items if item.spec.name == file.certificate]
    if item.key_path is None:
        mask = KUBECONFIG_MASK
    else:
        mask = KEY_MASK if file.path.resolve() == item.key_path.resolve() else CERTIFICATE_MASK
    return Replacement(
        certificate=file.certificate,
        path=file.path,
        data=file.copy.read_bytes() if file.copy is not None else None,
        mode_mask=mask,
        was=digest(file.path.read_bytes()) if file.path.exists() else None,
        attributes=file.attributes,
    )


# --- retention -------------------------------------------------------------------------------------------------------


def retire(store: Store, settings: Settings, node: Node, now: datetime) -> list[str]:
    """
    Delete the backups that nobody needs; its lock is held.

    A backup goes when `keep` newer ones exist or when it is older than `keep_for`; but never the newest, and never
    the newest that could be put back now, nor any while an installation is not proven. Keys are unlinked, not overwritten: a journaling file system or an SSD
    writes elsewhere.

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
    Its manifest first: what a crash leaves is no backup any more, and the next run removes it.

    Raises:
        OSError: Something of it is left.
    """
    (backup.directory / MANIFEST).unlink()
    sync_directory(backup.directory)
    shutil.rmtree(backup.directory)
