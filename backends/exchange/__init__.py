"""A CA behind files: request bundles go into an outbox, answer bundles come from an inbox; neither is trusted."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from bridge.contract import GIVEN, Backend, BackendSettings, Issued, Pending, SignRequest
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError, SettingsProblem, Violation
from bridge.pki.budget import MOST_BYTES, Budget, OverBudgetError
from bridge.pki.bundle import AnswerBundle, BundleError, IncompleteBundleError, Refusal, RequestBundle, bundle_of
from bridge.pki.bundle_format import (
    digest,
    dumps,
    is_authentic,
    loads_answer,
    loads_request,
    request_file_name,
    short_fingerprint,
)
from bridge.specs import CertificateSpec
from bridge.system.files import reasons, write_atomically
from bridge.system.files import version as version_of
from bridge.system.paths import UnreadableError, read_once, read_public_key

#: Limits of one look at an inbox; files that were read are remembered, so the next look goes on from there.
_MOST_READ, _MOST_FILES, _LONGEST_LOOK_SECONDS = 64 << 20, 2000, 10.0

#: Requests hold no secret, and usually another user carries them.
REQUEST_MODE = 0o644


@dataclass(frozen=True, kw_only=True)
class ExchangeSettings(BackendSettings):
    """Table `[backend.NAME]` with `type = "exchange"`."""

    outbox: Path  #: The directory for request bundles.
    inbox: Path  #: The directory for answer bundles; any file that ends in `.json` is read.
    #: `node.desk_key`, which the bridge fills in: only answers signed with this key count.
    signed_by: Path | None = field(default=None, metadata={GIVEN: True})
    retry_for: timedelta = timedelta()  #: How long to wait for a missing directory; the next run looks again.

    def writes(self) -> Sequence[Path]:
        """The outbox, and the inbox, from which installed answers are removed."""
        return (self.outbox, self.inbox)

    def problems(self) -> Iterator[SettingsProblem]:
        """Refuse the same directory for outbox and inbox."""
        if self.outbox == self.inbox:
            yield SettingsProblem("inbox", "another directory than the outbox", str(self.inbox))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A file of the inbox, and its content if it answers our request."""

    digest: str = ""  #: Digest of the request bundle that it answers.
    answer: AnswerBundle | None = None
    note: str = ""  #: Why it is no answer.


class ExchangeBackend(Backend):
    """Writes requests into files, and returns answers once their files are there."""

    settings_type = ExchangeSettings
    carries = True
    asks_validity = True

    def __init__(self, settings: ExchangeSettings) -> None:
        self._settings = settings
        self._desk_key = None if settings.signed_by is None else read_public_key(settings.signed_by, "node.desk_key")
        #: Answers are proven to be the desk's, not from anyone who can write to the inbox.
        self.authenticated = self._desk_key is not None
        self._read: dict[Path, tuple[tuple[int, ...], _Found]] = {}

    def check(self, specs: Sequence[CertificateSpec]) -> Mapping[str, Sequence[Violation]]:  # noqa: ARG002
        """Check that both directories are there; files can't ask the CA."""
        for key in ("outbox", "inbox"):
            directory: Path = getattr(self._settings, key)
            if not directory.is_dir():
                missing = f"{directory}: there is no such directory (the {key})"
                raise BackendUnavailableError(missing, hint="mount or make it, or fix the settings")
        return {}

    def sign_many(self, requests: Sequence[SignRequest]) -> Sequence[Issued | Pending | BackendError]:
        """Write each batch as one bundle, unless it is already in the outbox."""
        self.check(())
        batches: dict[str, list[SignRequest]] = {}
        for request in requests:
            batches.setdefault(request.continuity.batch if request.continuity else "", []).append(request)
        answers = {batch: self._submit(bundle_of(requests)) for batch, requests in batches.items()}
        return [answers[request.continuity.batch if request.continuity else ""] for request in requests]

    def _submit(self, bundle: RequestBundle) -> Pending:
        csrs = {request.csr for request in bundle.requests}
        there = (
            (path, sent)  # from a run that died before it could report it
            for path, sent in self._outbox(bundle.node)
            if sent.batch == bundle.batch and csrs <= {request.csr for request in sent.requests}
        )
        path, bundle = next(there, None) or self._write(bundle)
        return Pending(reference=digest(bundle), note=_to_carry(path, bundle))

    def _write(self, bundle: RequestBundle) -> tuple[Path, RequestBundle]:
        path = self._settings.outbox / request_file_name(bundle)
        try:
            with reasons(BackendUnavailableError, f"{path}: can't write the request bundle", hint="fix the outbox"):
                write_atomically(path, dumps(bundle), REQUEST_MODE)
        except BundleError as e:
            raise BackendRefusedError(f"no bundle can be made of these requests: {e}") from e
        return path, bundle

    def collect(self, request: SignRequest, reference: str) -> Issued | Pending:
        """Look for an answer bundle to the request bundle with this digest."""
        self.check(())
        answers, notes = self._inbox(_node_of(request), reference)
        outbox = self._outbox(request.continuity.node) if request.continuity is not None else ()
        sent = [(path, there) for path, there in outbox if digest(there) == reference]
        given = _given(answers, request)
        certificates = [answer for _, answer in given if isinstance(answer, Issued)]
        if certificates:  # whatever refusals there are beside them
            return certificates[0]
        for answer, refused in given:
            if isinstance(refused, Refusal):
                raise BackendRefusedError(f"{answer.signer} refused: {refused.reason}")
        if answers:
            notes = [f"the answer of {answers[0].signer} leaves it out", *notes]
        elif sent:
            notes = [_to_carry(*sent[0]), *notes]
        else:
            notes = ["the request bundle has left the outbox, and no answer is in the inbox", *notes]
        return Pending(reference=reference, note="; ".join(notes))

    def candidates(self, request: SignRequest, reference: str) -> Sequence[Issued]:
        """Certificates in all answer bundles to the request bundle with this digest, the latest first."""
        answers, _ = self._inbox(_node_of(request), reference)
        return [answer for _, answer in _given(answers, request) if isinstance(answer, Issued)]

    def accepted(self, request: SignRequest, reference: str) -> None:
        """Remove the request bundle from the outbox once all of it is answered; until then another desk may need it."""
        with contextlib.suppress(OSError, BackendUnavailableError):  # a bundle that stays does no harm
            answered = {name for answer in self._inbox(_node_of(request), reference)[0] for name in answer.answers}
            for path, bundle in self._outbox(_node_of(request)):
                if digest(bundle) == reference and answered >= {request.name for request in bundle.requests}:
                    path.unlink(missing_ok=True)

    def put_away(self, reference: str) -> None:
        """Remove the answer bundles to this request bundle from the inbox, and the bundle itself from the outbox."""
        self._inbox("", reference)
        found = [(path, version) for path, (version, seen) in self._read.items() if seen.digest == reference]
        for path, version in found:
            failed = f"{path}: can't remove the installed answer"
            with reasons(BackendUnavailableError, failed, hint="remove it by hand"):
                _remove(path, version)
            del self._read[path]
        for path in [path for path, bundle in self._outbox("") if digest(bundle) == reference]:
            with reasons(BackendUnavailableError, f"{path}: can't remove the request", hint="remove it by hand"):
                path.unlink(missing_ok=True)

    def _outbox(self, node: str) -> Iterator[tuple[Path, RequestBundle]]:
        """A node's request bundles that are still in the outbox."""
        for path in self._files(self._settings.outbox):
            if path.name.startswith(node):
                with contextlib.suppress(FileNotFoundError, BundleError, UnreadableError):  # not our file, or gone
                    yield path, loads_request(read_once(path)[0])

    def _inbox(self, node: str, reference: str) -> tuple[list[AnswerBundle], list[str]]:
        """Complete answer bundles to this request bundle, the likeliest first, and notes about other files."""
        found: list[AnswerBundle] = []
        notes: list[str] = []
        budget = Budget(_MOST_READ, _MOST_FILES, seconds=_LONGEST_LOOK_SECONDS, clock=time.monotonic)
        files = self._files(self._settings.inbox)
        for path in sorted(files, key=lambda path: (path.name.startswith(node), _written(path)), reverse=True):
            try:
                seen = self._look(path, reference, budget)
            except OverBudgetError:
                notes.append(f"{self._settings.inbox} holds more than one look reads ({len(files)} files): empty it")
                break
            if seen is not None and seen.answer is not None and seen.digest == reference:
                found.append(seen.answer)
            elif seen is not None and seen.note:
                notes.append(seen.note)
        return found, notes

    def _look(self, path: Path, reference: str, budget: Budget) -> _Found | None:
        """Read a file once while it stays the same, since each request of a run looks at it; None: it is gone."""
        try:
            status = path.lstat()
        except OSError:
            return None
        version = version_of(status)
        known = self._read.get(path)
        if known is None or known[0] != version or (known[1].answer is None and known[1].digest == reference):
            budget.spend(min(status.st_size, MOST_BYTES), 1)
            known = self._read[path] = version, self._answer_at(path, reference)
        return known[1]

    def _answer_at(self, path: Path, reference: str) -> _Found:
        """Read the answer in a file; keep only the digest of another request's answer, since inboxes never end."""
        try:
            answer = loads_answer(read_once(path)[0])
        except IncompleteBundleError:
            return _Found(note=f"{path} is not whole yet")
        except (FileNotFoundError, BundleError, UnreadableError) as e:
            return _Found(note=f"{path} is no answer: {e}")
        if not is_authentic(answer, self._desk_key):
            return _Found(note=f"{path} is passed over: it is not signed by the desk's key (node.desk_key)")
        is_ours = answer.request_digest == reference
        return _Found(digest=answer.request_digest, answer=answer if is_ours else None)

    @staticmethod
    def _files(directory: Path) -> list[Path]:
        failed = f"{directory}: can't look for bundles there"
        with reasons(BackendUnavailableError, failed, hint="mount or fix it"):
            return sorted(path for path in directory.iterdir() if path.suffix == ".json" and path.name[0] != ".")


def _node_of(request: SignRequest) -> str:
    return request.continuity.node if request.continuity is not None else ""


def _remove(path: Path, version: tuple[int, ...]) -> None:
    """Remove this very file: a user who can move the directory could put another one in its place meanwhile."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(FileNotFoundError):
            if version_of(os.stat(path.name, dir_fd=directory, follow_symlinks=False)) == version:
                os.unlink(path.name, dir_fd=directory)
    finally:
        os.close(directory)


def _written(path: Path) -> int:
    """When the file was last written; 0 if it is gone."""
    try:
        return path.lstat().st_mtime_ns
    except OSError:
        return 0


def _given(answers: Sequence[AnswerBundle], request: SignRequest) -> list[tuple[AnswerBundle, Issued | Refusal]]:
    """Each answer to a request with its bundle, the latest first by the sender's own time of signing."""
    latest = sorted(answers, key=lambda answer: answer.signed, reverse=True)
    answered = ((answer, answer.answers.get(request.spec.name)) for answer in latest)
    return [(answer, given) for answer, given in answered if given is not None]


def _to_carry(path: Path, bundle: RequestBundle) -> str:
    return f"{path} is to be carried out, fingerprint {short_fingerprint(bundle)}"
