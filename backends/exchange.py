"""
A CA behind a door: request bundles into an outbox, answer bundles out of an inbox; a person or a job carries them.

Directories may be on a medium that comes and goes. Nothing here is trusted: whoever may write to the inbox can only
delay, since each answer is proven like that of any other CA.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from bridge.bundle import (
    AnswerBundle,
    BundleError,
    IncompleteBundleError,
    Refusal,
    RequestBundle,
    bundle_of,
    digest,
    dumps,
    loads_answer,
    loads_request,
    request_file_name,
    short_fingerprint,
)
from bridge.contract import BackendSettings, Issued, Pending, SignRequest
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError, SettingsProblem, Violation
from bridge.files import write_atomically
from bridge.reading import UnreadableError, read
from bridge.specs import CertificateSpec

#: Requests hold nothing secret, and who carries them is usually another user.
REQUEST_MODE = 0o644


@dataclass(frozen=True, kw_only=True)
class ExchangeSettings(BackendSettings):
    """Table `[backend.NAME]` with `type = "exchange"`."""

    outbox: Path  #: Request bundles are written here.
    inbox: Path  #: Answer bundles are looked for here, whatever they are called.
    retry_for: timedelta = timedelta()  #: A directory that is not there now is looked for by the next run.

    def problems(self) -> Iterator[SettingsProblem]:
        """One directory can't be both."""
        if self.outbox == self.inbox:
            yield SettingsProblem("inbox", "another directory than the outbox", str(self.inbox))


class ExchangeBackend:
    """Asks by a file, and answers when the answer's file is there."""

    settings_type = ExchangeSettings
    carries = True

    def __init__(self, settings: ExchangeSettings) -> None:
        self._settings = settings

    @classmethod
    def from_settings(cls, settings: ExchangeSettings) -> Self:
        """Make the backend; no directory is looked at yet."""
        return cls(settings)

    def check(self, specs: Sequence[CertificateSpec]) -> Mapping[str, Sequence[Violation]]:
        """Whether both directories are there; what the CA will make of a request nobody knows here."""
        del specs
        for key in ("outbox", "inbox"):
            directory: Path = getattr(self._settings, key)
            if not directory.is_dir():
                raise BackendUnavailableError(
                    f"{directory}: wanted the {key}, found no directory", hint="mount or make it, or mend the settings"
                )
        return {}

    def sign(self, request: SignRequest) -> Issued | Pending:
        """One request in a bundle of its own."""
        [answer] = self.sign_many([request])
        if isinstance(answer, BackendError):
            raise answer
        return answer

    def sign_many(self, requests: Sequence[SignRequest]) -> Sequence[Issued | Pending | BackendError]:
        """All requests in one bundle; one that lies in the outbox already is not written again."""
        self.check(())
        bundle = bundle_of(requests, datetime.now(UTC))
        path = self._settings.outbox / request_file_name(bundle)
        there = _bundle_at(path)
        if there is not None and {r.csr for r in there.requests} >= {r.csr for r in bundle.requests}:
            bundle = there  # written by a run that was cut off before it could say so
        else:
            try:
                write_atomically(path, dumps(bundle), REQUEST_MODE)
            except OSError as e:
                raise BackendUnavailableError(
                    f"{path}: wanted to write the request bundle, found: {e.strerror}", hint="mend the outbox"
                ) from e
            except BundleError as e:
                raise BackendRefusedError(f"no bundle can be made of these requests: {e}") from e
        return [self._pending(digest(bundle), path, bundle)] * len(requests)

    def _pending(self, reference: str, path: Path, bundle: RequestBundle) -> Pending:
        return Pending(
            reference=reference, note=f"{path} is to be carried out, fingerprint {short_fingerprint(bundle)}"
        )

    def collect(self, request: SignRequest, reference: str) -> Issued | Pending:
        """Look for an answer bundle to the request bundle with this digest."""
        self.check(())
        found, notes = self._inbox
        path, answers = self._outbox_path(request), found.get(reference, [])
        for answer in sorted(answers, key=lambda one: one.signed, reverse=True):
            given = answer.answers.get(request.spec.name)
            if given is not None and path is not None:
                with contextlib.suppress(OSError):  # it is in nobody's way
                    path.unlink(missing_ok=True)
            if isinstance(given, Refusal):
                raise BackendRefusedError(f"{answer.signer} refused: {given.reason}")
            if given is not None:
                return given
        bundle = _bundle_at(path) if path is not None else None
        if answers:
            notes = [f"the answer of {answers[0].signer} leaves it out", *notes]
        elif bundle is not None and path is not None:
            notes = [self._pending(reference, path, bundle).note, *notes]
        else:
            notes = ["the request bundle has left the outbox, and no answer is in the inbox", *notes]
        return Pending(reference=reference, note="; ".join(notes))

    def _outbox_path(self, request: SignRequest) -> Path | None:
        who = request.continuity
        return self._settings.outbox / f"{who.node}-{who.batch}.request.json" if who is not None else None

    @functools.cached_property
    def _inbox(self) -> tuple[dict[str, list[AnswerBundle]], list[str]]:
        """Whole answer bundles by the digest of what they answer, and what is to be said of the other files."""
        found: dict[str, list[AnswerBundle]] = {}
        notes = []
        for path in sorted(self._settings.inbox.iterdir()):
            if path.name.startswith(".") or path.suffix != ".json" or not path.is_file():
                continue
            try:
                answer = loads_answer(read(path) or b"")
            except IncompleteBundleError:
                notes.append(f"{path} is not whole yet")
            except (BundleError, UnreadableError) as e:
                notes.append(f"{path} is no answer: {e}")
            else:
                found.setdefault(answer.request_digest, []).append(answer)
        return found, notes


def _bundle_at(path: Path) -> RequestBundle | None:
    """What an earlier run wrote there."""
    try:
        data = read(path)
        return loads_request(data) if data is not None else None
    except (BundleError, UnreadableError):
        return None
