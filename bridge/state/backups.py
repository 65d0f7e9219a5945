"""Lists the backups in the state directory, checks whether one can be put back, puts it back, and deletes old ones."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509

from bridge.errors import BridgeError
from bridge.node import kubeconfig, pairs
from bridge.node.inventory import Item, Node
from bridge.node.manifests import path_of
from bridge.pki import csr
from bridge.pki.certificates import UNREADABLE, anchor_of, load_pem_certificates
from bridge.settings.pair_tables import MOST_OF_A_KEY
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, CA, KUBELET_SERVER, SERVERS, is_pair_name
from bridge.state import Outcome, Store, audit, copies, static_pods
from bridge.state.install import (
    CERTIFICATE_MASK,
    KEY_MASK,
    KUBECONFIG_MASK,
    MANIFEST,
    InstallError,
    Replacement,
    attributes_from,
    fingerprint,
    install,
    manifest_file,
)
from bridge.system.console import log
from bridge.system.files import Attributes, digest, sync_directory
from bridge.system.paths import UnreadableError, read, read_ca_file, real_path
from bridge.system.state_file import StateError
from bridge.words import counted

if TYPE_CHECKING:
    from bridge.state.session import Run

#: An ID begins with the backup's time, in whole seconds.
_STAMP = len("20260101T000000Z")


class BackupError(BridgeError):
    """The backup does not exist or can't be read."""

    hint = "`ca-bridge backups` lists what there is"

    def __init__(self, message: str, *, hint: str | None = None, backup_id: str = "") -> None:
        super().__init__(message, hint=hint)
        self.backup_id = backup_id  #: The ID of a backup that can't be read.


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file, or symlink, in the state before the installation."""

    certificate: str  #: kubeadm's name of the file's certificate.
    path: Path  #: Where the file was, with parent symlinks resolved.
    copy: Path | None  #: None: there was no file.
    sha256: str | None
    attributes: Attributes | None
    is_link: bool = False  #: The old or the new file is a symlink.
    leads_to: str | None = None  #: The target of the symlink that was here.

    @property
    def was_there(self) -> bool:
        """Whether a file or symlink existed."""
        return self.copy is not None or self.leads_to is not None

    @property
    def target(self) -> Path | None:
        """The symlink's target, which is in the backup only if the backup undoes a rollback."""
        return self.path.parent / self.leads_to if self.leads_to is not None else None

    @classmethod
    def of(cls, entry: Mapping[str, Any], directory: Path) -> File:
        """Read a file's entry of a manifest."""
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
    number: int  #: Backups count up from 1.
    run_id: str
    command: str  #: Empty if the manifest does not have it.
    user: str
    host: str
    certificates: tuple[Mapping[str, Any], ...]  #: Each has `name`, `old_serial` and `new_serial`.
    files: tuple[File, ...]

    @property
    def names(self) -> list[str]:
        """The distinct names of its certificates."""
        return list(dict.fromkeys(file.certificate for file in self.files))


def read_all(store: Store) -> tuple[list[Backup], list[BackupError]]:
    """All backups, newest first, and errors about backups that can't be read."""
    backups, broken = [], []
    try:
        directories = store.backup_directories()
    except OSError as e:
        return [], [BackupError(f"{store.backups}: can't look for backups: {e.strerror}")]
    for directory in directories:
        try:
            backup = _read(directory)
        except (BackupError, StateError) as e:
            broken.append(BackupError(str(e), backup_id=directory.name))
        else:
            backups += [backup] if backup is not None else []
    return sorted(backups, key=lambda backup: (backup.number, backup.created, backup.backup_id), reverse=True), broken


def _read(directory: Path) -> Backup | None:
    """Read one backup; None: it is unfinished, or being deleted."""
    manifest_ = manifest_file(directory)
    manifest = manifest_.read()
    if manifest is None:
        return None
    try:
        return Backup(
            backup_id=directory.name,
            directory=directory,
            created=datetime.fromisoformat(manifest["created"]),
            number=manifest["number"],
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
    """Find a backup, or the newest; an unreadable newest backup is an error, and no older one replaces it."""
    backups, broken = read_all(store)
    newest = backups[0].backup_id[:_STAMP] if backups else ""
    for error in broken:
        if error.backup_id in ("", backup_id):
            raise error
        if backup_id is None and error.backup_id[:_STAMP] >= newest:
            raise BackupError(
                f"the newest backup can't be read: {error}",
                hint="`ca-bridge rollback ID` takes another one of `ca-bridge backups`",
            )
    for backup in backups:
        if backup_id in (None, backup.backup_id):
            return backup
    wanted = f"the backup {backup_id}" if backup_id else "a backup"
    others = counted(len(backups), "other") if backups else "none"
    raise BackupError(f"wanted {wanted} in {store.backups}, found {others}")


# --- fit to be put back -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One reason not to put a backup back."""

    certificate: str  #: kubeadm's name.
    wanted: str
    found: str
    subject: str = ""  #: The violated property of the certificate, as `bridge.pki.verify` calls it.

    @property
    def is_damage(self) -> bool:
        """Whether a file is damaged, missing or does not match its key, regardless of the certificate's content."""
        return not self.subject

    @property
    def can_be_forced(self) -> bool:
        """Whether the node could run with it nevertheless; a kubelet serves with any certificate."""
        return not self.is_damage and (self.certificate == KUBELET_SERVER or self.subject not in _NEVER_FORCED)

    def __str__(self) -> str:
        about = f"{self.subject}: " if self.subject else ""
        return f"{self.certificate}: {about}wanted {self.wanted}, found {self.found}"


_PAIR, _NO_PAIR = "a certificate and its private key", "another key, or none that can be read"
#: For a CA file of another phase, which `rotate-ca back` or the rollback of a failed step puts back.
PHASE = "phase"
#: No client would trust the certificate: another CA signed it, or the CA was replaced.
_NEVER_FORCED = ("chain", "issuer", "public key", "extensions", "critical extension", PHASE)


def problems_of(backup: Backup, settings: Settings, node: Node, now: datetime) -> list[Problem]:
    """All reasons against putting the backup back."""
    if backup.command.startswith("bootstrap "):
        none = f"those of `{backup.command}`, which can't be undone: before it there were none"
        return [Problem(certificate="all of it", wanted="files that this node had", found=none)]
    items = {item.spec.name: item for item in node.items}
    problems: list[Problem] = []
    for name in backup.names:
        item = items.get(name)
        if name in AUTHORITIES:
            problems += _trust_problems(backup, name, settings.node.kubeconfig_dir, node)
        elif item is None:
            wanted = f"a table [certificate.{name}]" if is_pair_name(name) else "a certificate of this node"
            problems.append(Problem(certificate=name, wanted=wanted, found="a name that it does not have"))
        else:
            anchor = next((f.copy for f in files_of(backup, item.spec.authority.name) if f.copy), item.anchor_path)
            problems += _problems(files_of(backup, name), replace(item, anchor_path=anchor), settings, now)
    return problems


def _trust_problems(backup: Backup, authority: str, kubeconfig_dir: Path, node: Node) -> Iterator[Problem]:
    """Problems of a CA file: damage, or CAs of another phase of a replacement, which no gate leads to."""
    files = files_of(backup, authority)
    state = next((state for state in node.authorities if state.authority.name == authority), None)
    places = {real_path(state.path)} if state is not None else set()
    damage = [*_elsewhere(authority, files, places), *_damaged(authority, files)]
    yield from damage
    if damage:
        return
    bundle = cas_of(backup, authority)
    if not bundle:
        yield Problem(
            certificate=authority, wanted="a file with CA certificates", found="none, or one that can't be read"
        )
    elif state is None or bundle == state.certificates:
        return
    elif state.certificates:
        wanted = f"the CAs of {state.path}, in their order"
        found = "those of another phase (`ca-bridge rotate-ca back` goes back by one)"
        yield Problem(certificate=authority, wanted=wanted, found=found, subject=PHASE)
    elif authority != CA.name or not _is_of_this_phase(bundle, kubeconfig_dir, node):  # kubeconfigs hold only `ca`
        wanted = f"the CAs of this node's kubeconfigs, of which the first signed its certificates, for {state.path}"
        found = "others, or no kubeconfig that shows the phase (copy the file from a node of the same phase)"
        yield Problem(certificate=authority, wanted=wanted, found=found, subject=PHASE)


def _is_of_this_phase(bundle: Sequence[x509.Certificate], kubeconfig_dir: Path, node: Node) -> bool:
    """Whether all kubeconfigs hold these CAs, and the first signed all certificates; the CA file can't tell."""
    items = [item for item in node.items if item.spec.authority == CA and not item.foreign]
    leaves = [item.certificates for item in items if item.certificates]
    try:
        texts = [read(kubeconfig_dir / item.spec.base) for item in items if item.spec.kubeconfig]
        held = [kubeconfig.parse(text).ca_data for text in texts if text is not None]
        trusted = [set(load_pem_certificates(data)) for data in held if data]
    except (BridgeError, UnreadableError, ValueError):
        return False
    signed = all(anchor_of(certificates, bundle) == bundle[0] for certificates in leaves)
    return bool(leaves and trusted) and signed and all(cas == set(bundle) for cas in trusted)


def cas_of(backup: Backup, authority: str) -> tuple[x509.Certificate, ...]:
    """The CAs in the backup's copy of a CA file; empty: the backup has none, or it can't be read."""
    for file in files_of(backup, authority):
        with contextlib.suppress(UnreadableError):
            return read_ca_file(file.copy) if file.copy is not None else ()
    return ()


def files_of(backup: Backup, name: str) -> list[File]:
    """The files of one certificate."""
    return [file for file in backup.files if file.certificate == name]


def _problems(files: Sequence[File], item: Item, settings: Settings, now: datetime) -> Iterator[Problem]:
    """Problems of one certificate: of its files, else of its pair, else of its content."""
    name = item.spec.name
    problems = [*_misplaced(name, files, item, settings.node.kubeconfig_dir), *_damaged(name, files)]
    if problems:
        yield from problems
    elif any(file.was_there for file in files):
        try:
            certificates, key_pem = pair_of(files, item)
        except (BridgeError, OSError, *UNREADABLE) as e:
            reason = str(e) if isinstance(e, BridgeError) else _NO_PAIR
            yield Problem(certificate=name, wanted=_PAIR, found=reason)
            return
        yield from _unproven(item, certificates, key_pem, now, settings)


def _misplaced(name: str, files: Sequence[File], item: Item, kubeconfig_dir: Path) -> Iterator[Problem]:
    """Problems of files that are not this node's certificate."""
    places = {real_path(path) for path in (item.key_path, item.certificate_path) if path is not None}
    if item.pair is not None:
        places = {real_path(path) for files in item.pair.places for _, path in files.paths()}
    if item.current is not None:
        places |= {real_path(kubeconfig_dir / item.spec.base), real_path(item.current.parent) / item.current.name}
    yield from _elsewhere(name, [file for file in files if not _is_kubelets(file, item)], places)


def _elsewhere(name: str, files: Sequence[File], places: Collection[Path]) -> Iterator[Problem]:
    """Problems of files that belong elsewhere on this node, or to another node."""
    for file in files:
        place = file.path if file.is_link else real_path(file.path)
        if place not in places:
            wanted = " or ".join(sorted(map(str, places))) or "a certificate of this node"
            yield Problem(certificate=name, wanted=f"a file for {wanted}", found=f"one for {file.path}")


def _is_kubelets(file: File, item: Item) -> bool:
    """Whether the file is one of the dated files beside the symlink to the current pair."""
    if item.current is None or real_path(file.path).parent != real_path(item.current.parent):
        return False
    return re.fullmatch(DATED.format(item.current.name.removesuffix("-current.pem")), file.path.name) is not None


#: The end of the name of a dated pair, whether the kubelet or ca-bridge wrote it.
DATED = r"{}-\d{{4}}(?:-\d\d){{5}}\.pem"


def _damaged(name: str, files: Sequence[File]) -> Iterator[Problem]:
    for file in files:
        if file.target is not None and _content_behind(file, files) is None:
            yield Problem(certificate=name, wanted=f"the file {file.target}, which stays there", found="nothing")
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


def _content_behind(link: File, files: Sequence[File]) -> bytes | None:
    """The content behind a symlink to restore: of a file in the backup, or one still there; None: neither exists."""
    target = link.target
    if target is None:
        return None
    copies = [file.copy for file in files if file.copy is not None and real_path(file.path) == real_path(target)]
    path = copies[0] if copies else target
    return path.read_bytes() if path.is_file() else None


def pair_of(files: Sequence[File], item: Item) -> tuple[list[x509.Certificate], bytes]:
    """The certificates, leaf first, and the key (PEM)."""
    if item.current is not None and (pair := _kubelets_pair(files, item)) is not None:
        return pair
    contents = {real_path(file.path): file.copy.read_bytes() for file in files if file.copy is not None}
    certificate_path = real_path(item.certificate_path)
    key_path = real_path(item.key_path) if item.key_path is not None else certificate_path
    missing = [str(path) for path in dict.fromkeys((certificate_path, key_path)) if path not in contents]
    if missing:
        raise BackupError(f"no {' and no '.join(missing)}")
    if item.key_path is None:
        parsed = kubeconfig.parse(contents[certificate_path])
        key = kubeconfig.key_data(contents[certificate_path])
        return load_pem_certificates(parsed.certificate_data or b""), key or b""
    return load_pem_certificates(contents[certificate_path]), contents[key_path]


def _kubelets_pair(files: Sequence[File], item: Item) -> tuple[list[x509.Certificate], bytes] | None:
    """The pair that a kubelet starts with: in its kubeconfig, or behind the symlink; None: neither is in the backup."""
    kubeconfigs = [file.copy for file in files if file.copy is not None and file.path.name == item.spec.base]
    for copy in kubeconfigs:
        data = copy.read_bytes()
        certificate, key = kubeconfig.parse(data).certificate_data, kubeconfig.key_data(data)
        if certificate or key:
            return load_pem_certificates(certificate or b""), key or b""
    links = [file for file in files if file.is_link and file.was_there]
    for file in links:
        data = file.copy.read_bytes() if file.copy is not None else _content_behind(file, files) or b""
        return load_pem_certificates(data), csr.key_block(data)
    if not kubeconfigs or item.current is None:
        return None
    data = item.current.read_bytes()
    return load_pem_certificates(data), csr.key_block(data)


def _unproven(
    item: Item,
    certificates: Sequence[x509.Certificate],
    key_pem: bytes,
    now: datetime,
    settings: Settings,
) -> Iterator[Problem]:
    """Problems of a certificate, judged as the answer to a new request, whatever its remaining validity."""
    name, leaf = item.spec.name, certificates[0]
    live = item.certificates[0] if item.certificates else leaf
    try:
        anchors, authority = read_ca_file(item.anchor_path), item.spec.authority.name
        usual = settings.expectation(authority, anchors, str(item.anchor_path), now)
    except UnreadableError as e:
        yield Problem(certificate=name, wanted=f"the CA certificate {item.anchor_path}", found=str(e))
        return
    expected = replace(usual, min_validity=timedelta())
    for finding in pairs.findings(item.spec, certificates, key_pem, expected, live):
        violation = finding.violation
        if finding.kind in ("certificate", "incomparable"):
            yield Problem(certificate=name, subject=violation.subject, wanted=violation.want, found=violation.got)
        else:
            yield Problem(
                certificate=name, wanted=_PAIR, found=violation.got if finding.kind == "unusable" else _NO_PAIR
            )


# --- put back, or deleted ---------------------------------------------------------------------------------------------


class RollbackRefusedError(BridgeError):
    """The backup is not fit to be put back, with one reason a line. Nothing was replaced."""

    def __init__(self, backup_id: str, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        hint = (
            "choose another one of `ca-bridge backups`, or renew"
            if any(not problem.can_be_forced for problem in problems)
            else "--force puts it back nevertheless; components and clients may refuse such a certificate"
        )
        super().__init__("\n".join(f"backup {backup_id}: {problem}" for problem in problems), hint=hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """The result of a rollback."""

    backup: Backup
    replaced_backup_id: str  #: The backup of the files that it replaced.
    outcomes: tuple[Outcome, ...]
    removed: tuple[Path, ...]  #: Files that did not exist when the backup was made.
    late: tuple[BridgeError, ...] = ()  #: About copies that still hold a replaced certificate, and the audit log.
    stays: tuple[str, ...] = ()  #: Certificates of which only the key existed before; they were left alone.


def with_pairs(backup: Backup, node: Node) -> tuple[Backup, tuple[str, ...]]:
    """The backup without certificates of which only the key existed, and their names; whole if it has no others."""
    two = {item.spec.name for item in node.items if item.key_path is not None and item.current is None}
    made = {
        str(certificate.get("name")) for certificate in backup.certificates if certificate.get("old_serial") is None
    } & two
    half = [name for name in backup.names if name in made and len({f.was_there for f in files_of(backup, name)}) > 1]
    if len(half) == len(backup.names):
        return backup, ()
    return replace(backup, files=tuple(file for file in backup.files if file.certificate not in half)), tuple(half)


def put_back(
    run: Run,
    backup: Backup,
    node: Node,
    may_pass: Callable[[Problem], bool],
    edit: Callable[[Replacement], Replacement] = lambda file: file,
    owe: Callable[[Sequence[Outcome]], None] = lambda _: None,
) -> Rollback:
    """Put back a backup in spite of problems that `may_pass` accepts; `owe` first records the work that follows it."""
    settings, store, record = run.settings, run.store, run.record
    problems = problems_of(backup, settings, node, run.now())
    if not all(map(may_pass, problems)):
        error = RollbackRefusedError(backup.backup_id, problems)
        record.add(audit.REFUSED, error=error)
        raise error
    outcomes = outcomes_of(backup, node)
    result = f"backup {backup.backup_id}"
    for o in outcomes:
        record.add(audit.VERIFIED, o.name, authority=o.authority, old=o.old, new=o.new, result=result)
    record.write()  # the audit log comes before the installation
    about = audit.about(((o.name, o.old, o.new) for o in outcomes), rollback_to=backup.backup_id)
    try:
        copies.record_due(settings, store, node, {o.name: o.old for o in outcomes})
        owe(outcomes)
        # a run may have installed files itself, and put several backups back
        run_id = f"{record.run_id}-{backup.run_id.partition('-')[0]}"
        with _left_out(backup, settings.node.kubeconfig_dir, store):
            replaced = install(store, [edit(_replacement(file, node)) for file in backup.files], run_id, about)
    except (InstallError, StateError) as e:
        for o in outcomes:
            record.add(audit.FAILED, o.name, authority=o.authority, old=o.old, error=e)
        raise
    for o in outcomes:
        record.add(audit.ROLLED_BACK, o.name, authority=o.authority, old=o.old, new=o.new, result=result)
    late = copies.finish(settings, store, record)
    record.write_late()  # the next steps may take minutes, and may be killed
    return Rollback(
        backup=backup,
        replaced_backup_id=replaced,
        outcomes=tuple(outcomes),
        removed=tuple(file.path for file in backup.files if not file.was_there),
        late=tuple(late),
    )


@contextlib.contextmanager
def _left_out(backup: Backup, kubeconfig_dir: Path, store: Store) -> Iterator[None]:
    """Take pairs that go away out of the manifests, or their components would not start; on failure put them in again."""
    before: dict[Path, bytes] = {}
    try:
        for path, text in _without_pairs(backup, kubeconfig_dir):
            before[path] = path.read_bytes()
            static_pods.replace(path, text)
        yield
    except (InstallError, OSError) as e:
        if not store.journal.exists():  # else `recover` may finish it
            with contextlib.suppress(OSError):  # the first error is the cause
                for path, text in before.items():
                    static_pods.replace(path, text)
        if isinstance(e, OSError):
            raise InstallError(f"nothing was replaced: {e.filename}: {e.strerror}") from e
        raise


def _without_pairs(backup: Backup, kubeconfig_dir: Path) -> Iterator[tuple[Path, bytes]]:
    """The manifests that name pairs that go away, with their texts without those pairs."""
    components = {spec.name: component for component, spec in SERVERS.items()}
    for file in backup.files:
        component = components.get(file.certificate)
        if component is None or file.was_there:
            continue
        try:
            text = pairs.manifest_without(component, file.path, kubeconfig_dir)
        except ValueError as e:
            raise InstallError(
                f"nothing was replaced: {e}", hint="take the flags out by hand, then run again"
            ) from None
        if text is not None:
            yield path_of(component, kubeconfig_dir), text


def outcomes_of(backup: Backup, node: Node) -> list[Outcome]:
    """The outcomes of putting a backup back; a certificate whose files are removed has no new certificate."""
    return [
        Outcome(
            name=item.spec.name,
            authority=item.spec.authority.name,
            old=item.certificates[0] if item.certificates else None,
            new=_leaf(backup, files, item) if any(file.was_there for file in files) else None,
        )
        for item in node.items
        if (files := files_of(backup, item.spec.name))
    ]


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
    item = node.item(file.certificate)
    if item is None:
        mask = CERTIFICATE_MASK  # a CA file
    elif item.pair is not None:
        keys = {real_path(files.key_file) for files in item.pair.places}
        mask = MOST_OF_A_KEY if real_path(file.path) in keys else CERTIFICATE_MASK
    elif item.spec.kubeconfig and file.path.name == item.spec.base:
        mask = KUBECONFIG_MASK
    elif item.key_path is None or item.current is not None:
        mask = KEY_MASK
    else:
        mask = KEY_MASK if real_path(file.path) == real_path(item.key_path) else CERTIFICATE_MASK
    return Replacement(
        certificate=file.certificate,
        path=file.path,
        data=file.copy.read_bytes() if file.copy is not None else None,
        mode_mask=mask,
        was=fingerprint(file.path),
        attributes=file.attributes,
        is_link=file.is_link,
        leads_to=file.leads_to,
        says_the_same=item is None and _has_the_same_cas(file),
    )


def _has_the_same_cas(file: File) -> bool:
    """Whether a CA file already holds the same CAs, perhaps in another order."""
    try:
        now, then = (set(read_ca_file(path)) for path in (file.path, file.copy or file.path))
    except UnreadableError:
        return False
    return now == then


def retire(store: Store, settings: Settings, node: Node, now: datetime) -> list[str]:
    """Delete old backups, and return their IDs; never the newest, the newest fit, `rotate-ca back`'s, or any before all is proven."""
    backups, _ = read_all(store)
    keep = settings.backups
    earliest = now - keep.keep_for
    old = [
        backup for newer, backup in enumerate(backups[1:], start=1) if newer >= keep.keep or backup.created < earliest
    ]
    if not old or any(map(Path.exists, (store.unproven, store.postponed, store.pairs))):
        return []
    last_good = next(
        (backup for backup in backups if not problems_of(with_pairs(backup, node)[0], settings, node, now)), None
    )
    kept = [last_good]
    for name, bundle in node.bundles.items():  # certificates of a former CA, which `rotate-ca back` puts back
        if bundle and name in settings.authorities and settings.authorities[name].next:
            kept.append(next((backup for backup in backups if cas_of(backup, name)[:1] not in ((), bundle[:1])), None))
    deleted = []
    for backup in reversed(old):
        if backup in kept:
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
    """Delete a backup, its manifest first, so that after a crash the next run removes the rest."""
    (backup.directory / MANIFEST).unlink()
    sync_directory(backup.directory)
    shutil.rmtree(backup.directory)
