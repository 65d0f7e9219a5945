"""
The desk's archive: the request bundles that are done, and what was answered to each request.

A request is signed once. If it is handed in again, in whatever bundle, the answer is the same certificate; so an old
bundle is good for nothing new. What was signed is found by the CSR, in the state directory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from bridge.contract import Issued
from bridge.errors import BridgeError
from bridge.pki.bundle import AnswerBundle, BundledRequest, BundleError, RequestBundle
from bridge.pki.bundle_format import file_names, loads_answer
from bridge.state.store import Store
from bridge.system.files import DIRECTORY_MODE, private_directory
from bridge.system.many import NewFile, remove_unfinished
from bridge.system.paths import UnreadableError, exposure, read_once

_ARCHIVE = "desk-done"
_ANSWERS = "desk-answered"
_DONE_MODE = 0o644  #: Nothing in a bundle is secret; the directory's mode decides who may read it.


class ArchiveError(BridgeError):
    """Others could change what is in the archive."""

    hint = "a directory of this user's own, that nobody else can write to; without desk.archive it is in the state directory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A request that was signed before."""

    signed: datetime
    issued: Issued | None  #: None: the answer can't be read any more.


def archive_directory(store: Store) -> Path:
    """The archive unless the policy names another: a directory that no other user can reach."""
    return store.directory / _ARCHIVE


class Archive:
    """Both directories; the process that writes to them holds the desk's lock, and may do it from several threads."""

    def __init__(self, directory: Path, state_dir: Path) -> None:
        self.directory = directory
        self._answers = state_dir / _ANSWERS

    def prepare(self) -> None:
        """Make the directories, and remove what a killed run left half written in them."""
        private_directory(self._answers)
        self.directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        if self.directory.is_symlink():
            found = "a symbolic link"
        elif (exposed := exposure(self.directory)) is not None:
            found = exposed.found if exposed.path == self.directory else f"{exposed.path} with {exposed.found}"
        else:
            remove_unfinished(self._answers, ".*.json.*")
            remove_unfinished(self.directory, ".*.request.json.*")
            return
        wanted = f"an archive of user {os.geteuid()}'s own, that nobody else can write to"
        raise ArchiveError(f"{self.directory}: wanted {wanted}, found {found}")

    def answers(self, bundle: RequestBundle) -> Mapping[str, Answered]:
        """Answers that were signed before for the same CSRs, by certificate name."""
        return {request.name: found for request in bundle.requests if (found := self._answered(request)) is not None}

    def _answered(self, request: BundledRequest) -> Answered | None:
        path = self._path(request)
        try:
            data, status = read_once(path)
        except FileNotFoundError:
            return None
        except UnreadableError as e:
            raise ArchiveError(f"{path}: wanted what was answered, found: {e}") from e
        with contextlib.suppress(BundleError):
            answer = loads_answer(data)
            issued = answer.answers.get(request.name)
            if isinstance(issued, Issued):
                return Answered(signed=answer.signed, issued=issued)
        return Answered(signed=datetime.fromtimestamp(status.st_mtime, UTC), issued=None)

    def files(
        self, bundle: RequestBundle, digest: str, data: bytes, answer: AnswerBundle, written: bytes
    ) -> list[NewFile]:
        """List the files that remember what was signed (`written`), and that put the bundle away as it was judged (`data`)."""
        done = NewFile(path=self.directory / file_names(bundle.node, digest)[0], data=data, mode=_DONE_MODE)
        # one file under a name for each CSR: names cost next to nothing, and are looked up by the thousand
        new = [path for request in bundle.requests if isinstance(answer.answers.get(request.name), Issued)
               and not os.access(path := self._path(request), os.F_OK)]  # fmt: skip
        return [NewFile(path=new[0], data=written, links=new[1:]), done] if new else [done]

    def _path(self, request: BundledRequest) -> Path:
        csr_digest = sha256(request.csr.public_bytes(Encoding.DER)).hexdigest()
        return self._answers / f"{request.name}-{csr_digest}.json"
