"""
The desk's records: which requests CAs received (the journal), and the answer to each (the archive), found by CSR, so
that no request is signed twice; and how the files of many answers are written.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

from cryptography import x509

from bridge.contract import Issued, Pending, SignRequest
from bridge.desk.node_identity import Owner, key_digest, keys_in
from bridge.errors import BridgeError
from bridge.pki.bundle import AnswerBundle, BundledRequest, BundleError, RequestBundle
from bridge.pki.bundle_format import file_names, loads_answer
from bridge.pki.certificates import csr_fingerprint
from bridge.specs import USER
from bridge.state import Store
from bridge.state.open_requests import Kind, RequestLog
from bridge.system.files import (
    DIRECTORY_MODE,
    SECRET_MODE,
    private_directory,
    remove_unfinished,
    side_by_side,
    sync_directory,
)
from bridge.system.paths import UnreadableError, exposure, read_once

_ARCHIVE = "desk-done"
_ANSWERS = "desk-answered"
_DONE_MODE = 0o644  #: Nothing in a bundle is secret; the directory's mode decides who may read it.


class ArchiveError(BridgeError):
    """Other users could change the archive."""

    hint = "use a directory that only this user can write to; without desk.archive it is in the state directory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A request that was signed before."""

    signed: datetime
    issued: Issued | None  #: None: the answer is unreadable now.


def archive_directory(store: Store) -> Path:
    """The archive's default path: a directory that no other user can reach."""
    return store.directory / _ARCHIVE


class Archive:
    """The archive's two directories; the writing process holds the desk's lock, and may write from several threads."""

    def __init__(self, directory: Path, state_dir: Path) -> None:
        self.directory = directory
        self._answers = state_dir / _ANSWERS

    def prepare(self) -> None:
        """Make the directories, and remove files that a killed run left half-written."""
        private_directory(self._answers)
        self.directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        if self.directory.is_symlink():
            found = "a symbolic link"
        elif (exposed := exposure(self.directory, new_files=True)) is not None:
            found = exposed.found if exposed.path == self.directory else f"{exposed.path} with {exposed.found}"
        else:
            remove_unfinished(self._answers, ".*.json.*")
            remove_unfinished(self.directory, ".*.request.json.*")
            return
        wanted = f"an archive of user {os.geteuid()} that no other user can write to"
        raise ArchiveError(f"{self.directory}: wanted {wanted}, found {found}")

    def answers(self, bundle: RequestBundle) -> Mapping[str, Answered]:
        """Earlier answers to the same CSRs, by certificate name."""
        found = {request.name: self._answered(request) for request in bundle.requests}
        return {name: answered for name, answered in found.items() if answered is not None}

    def _answered(self, request: BundledRequest) -> Answered | None:
        path = self._path(request)
        try:
            data, status = _record(path)
        except FileNotFoundError:
            return None
        with contextlib.suppress(BundleError):
            answer = loads_answer(data)
            issued = answer.answers.get(request.name)
            if isinstance(issued, Issued):
                return Answered(signed=answer.signed, issued=issued)
        return Answered(signed=datetime.fromtimestamp(status.st_mtime, UTC), issued=None)

    def owners(self, bundle: RequestBundle) -> dict[str, list[Owner]]:
        """The nodes for which a bundle's keys were signed, by `key_digest`."""
        found: dict[str, list[Owner]] = {}
        read_already: dict[int, tuple[str, str]] = {}  # an answer has a name for each of its keys
        for key in keys_in(bundle):
            for is_proven in (True, False):
                # a damaged record proves nothing; `answers` refuses what it answered
                with contextlib.suppress(FileNotFoundError, BundleError):
                    path = self._key_path(key, is_proven=is_proven)
                    if (inode := path.stat().st_ino) not in read_already:
                        answer = loads_answer(_record(path)[0])
                        read_already[inode] = answer.node, answer.cluster
                    node, cluster = read_already[inode]
                    found.setdefault(key, []).append(Owner(node=node, cluster=cluster, is_proven=is_proven))
        return found

    def _key_path(self, key: str, *, is_proven: bool) -> Path:
        return self._answers / f"{'key' if is_proven else 'claimed-key'}-{key}.json"

    def files(
        self, bundle: RequestBundle, digest: str, data: bytes, answer: AnswerBundle, written: bytes, *, is_proven: bool
    ) -> list[NewFile]:
        """Files that record what was signed (`written`), and that archive the bundle as it was judged (`data`)."""
        done = NewFile(path=self.directory / file_names(bundle.node, digest)[0], data=data, mode=_DONE_MODE)
        # one file with a name for each CSR: names cost next to nothing, and thousands of them are looked up
        new = [path for request in bundle.requests if isinstance(answer.answers.get(request.name), Issued)
               and (not os.access(path := self._path(request), os.F_OK) or request.name == USER.name)]  # fmt: skip
        keys = [self._key_path(key_digest(request.csr.public_key()), is_proven=is_proven) for request in bundle.requests
                if isinstance(answer.answers.get(request.name), Issued) and request.name != USER.name]  # fmt: skip
        return [NewFile(path=new[0], data=written, links=[*new[1:], *keys]), done] if new else [done]

    def _path(self, request: BundledRequest) -> Path:
        # a person may send the same CSR again and again
        lifetime = f"-{request.validity.total_seconds():.0f}s" if request.name == USER.name else ""
        return self._answers / f"{request.name}-{csr_fingerprint(request.csr)}{lifetime}.json"


def _record(path: Path) -> tuple[bytes, os.stat_result]:
    try:
        return read_once(path)
    except UnreadableError as e:
        raise ArchiveError(f"{path}: wanted a record of the desk's answers, found: {e}") from e


#: Older entries were delivered already, or their bundle was deleted.
_KEPT = timedelta(days=90)


@dataclass(frozen=True, slots=True)
class Submitted:
    """An earlier run sent the request to a CA, and ended before it wrote the answer."""

    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class _AtDesk:
    key: str
    written: datetime  #: When a CA was about to get the request, or else when it answered.
    reference: str | None = None  #: With the note: the CA answers later.
    note: str | None = None
    chain: Issued | None = None  #: The CA's answer.


_DESK = Kind(
    name="desk",
    type=_AtDesk,
    key_of=lambda entry: entry.key,
    what="what CAs were asked and answered",
    lies_on_disk=True,
)


class Journal:
    """The journal file; the caller holds the desk's lock, and several of its threads may add entries."""

    def __init__(self, path: Path, now: datetime) -> None:
        self._now = now
        #: Called before a CA gets a request; its error keeps the request back.
        self.before_asking: Callable[[], None] = lambda: None
        #: Certificates that are in the audit log, but were not delivered; a door keeps them.
        self.recorded: set[x509.Certificate] = set()
        self._log = RequestLog(path, _DESK, self._is_fresh)

    def _is_fresh(self, entry: _AtDesk) -> bool:
        return self._now - entry.written <= _KEPT

    def get(self, request: SignRequest) -> Issued | Pending | Submitted | None:
        """A CA's latest known answer to exactly this request."""
        entry = self._log.get(key_of(request))
        if entry is None:
            return None
        if entry.reference is not None:
            return Pending(reference=entry.reference, note=entry.note or "")
        return entry.chain or Submitted(since=entry.written)

    def add(self, answers: Iterable[tuple[SignRequest, Issued | Pending | Submitted]]) -> None:
        """Record answers, safe on disk when this returns (StateError: only the CA knows them)."""
        for request, answer in answers:
            if isinstance(answer, Submitted):
                self.before_asking()
            self._log.put(_at_desk(key_of(request), answer, self._now))
        self._log.save()

    def forget(self, requests: Iterable[SignRequest]) -> None:
        """Drop requests with delivered answers; on disk after `tidy`."""
        for request in requests:
            self._log.forget(key_of(request))

    def tidy(self) -> None:
        """Keep only undelivered entries on disk."""
        self._log.tidy()


def key_of(request: SignRequest) -> str:
    """The SHA-256 (hex) of a CSR with its certificate's name, authority and validity."""
    about = json.dumps([request.spec.name, request.spec.authority.name, request.validity.total_seconds()])
    return sha256(about.encode() + b"\0" + request.csr_pem).hexdigest()


def _at_desk(key: str, answer: Issued | Pending | Submitted, now: datetime) -> _AtDesk:
    if isinstance(answer, Submitted):
        return _AtDesk(key=key, written=answer.since)
    if isinstance(answer, Pending):
        return _AtDesk(key=key, written=now, reference=answer.reference, note=answer.note)
    return _AtDesk(key=key, written=now, chain=answer)


# --- the files of many bundles ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFile:
    """A file to write, which replaces any existing file."""

    path: Path
    data: bytes
    mode: int = SECRET_MODE
    links: Sequence[Path] = ()  #: Its other names, in the same directory; existing names stay unchanged.


def write_together(groups: Sequence[Sequence[NewFile]]) -> list[OSError | None]:
    """Write groups of files side by side, and return the error of each group."""
    return side_by_side(_write_group, groups)


def _write_group(group: Sequence[NewFile]) -> OSError | None:
    """Write files that are useless without each other: none is put in place before all are on disk."""
    path, staged = Path(), list[Path]()
    try:
        for new in group:
            path = new.path
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
            staged.append(Path(temporary))
            _write(descriptor, new)
        for new, unnamed in zip(group, staged, strict=True):
            path = new.path
            _put_in_place(unnamed, new)
        for path in {new.path.parent for new in group}:
            sync_directory(path)  # or a power cut may remove the new names
    except OSError as e:
        return OSError(e.errno, e.strerror, str(path))
    finally:
        for unnamed in staged:
            with contextlib.suppress(OSError):  # it has its name by now, or the first error is the cause
                unnamed.unlink()
    return None


def _write(descriptor: int, new: NewFile) -> None:
    with os.fdopen(descriptor, "wb") as file:
        file.write(new.data)
        file.flush()
        os.fchmod(descriptor, new.mode)
        os.fsync(descriptor)


def _put_in_place(unnamed: Path, new: NewFile) -> None:
    unnamed.rename(new.path)
    for link in new.links:
        with contextlib.suppress(FileExistsError):
            os.link(new.path, link)
