"""
The desk's journal: which requests CAs were asked for, and what they answered, until the answers are delivered.

A run that was killed signs nothing twice. Answers stay on disk; memory holds only where each line is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path

from bridge.contract import Issued, Pending, SignRequest
from bridge.state.open_requests import Kind, RequestLog

#: Older entries were delivered already, or their bundle was deleted.
_KEPT = timedelta(days=90)


@dataclass(frozen=True, slots=True)
class Asked:
    """A CA was asked by a run that ended before it wrote down the answer."""

    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class _AtDesk:
    """A request, and the last that is known of it."""

    key: str
    asked: datetime | None = None  #: A CA was about to be asked.
    added: datetime | None = None  #: It answered; earlier versions did not write it for an answer that comes later.
    reference: str | None = None
    note: str | None = None
    chain: Issued | None = None

    def __post_init__(self) -> None:
        if self.asked is None and self.reference is None and self.chain is None:
            raise ValueError("neither a question nor an answer")


_DESK = Kind(
    name="desk", type=_AtDesk, key_of=lambda one: one.key, what="what CAs were asked and answered", lies_on_disk=True
)


class Journal:
    """The file; the desk's lock is held, and several threads of the desk may add."""

    def __init__(self, path: Path, now: datetime) -> None:
        self._now = now
        self._log = RequestLog(path, _DESK, self._fresh)

    def _fresh(self, one: _AtDesk) -> _AtDesk | None:
        since = one.added or one.asked
        if since is None:
            return dataclasses.replace(one, added=self._now)
        return one if self._now - since <= _KEPT else None

    def get(self, request: SignRequest) -> Issued | Pending | Asked | None:
        """A CA's latest answer to exactly this request, as far as it is known."""
        one = self._log.get(key_of(request))
        if one is None:
            return None
        if one.asked is not None:
            return Asked(since=one.asked)
        return one.chain or Pending(reference=one.reference or "", note=one.note or "")

    def add(self, answers: Iterable[tuple[SignRequest, Issued | Pending | Asked]]) -> None:
        """Write answers down, safe on disk when this returns; StateError: the CA alone knows them."""
        for request, answer in answers:
            self._log.put(_at_desk(key_of(request), answer, self._now))
        self._log.save()

    def forget(self, requests: Iterable[SignRequest]) -> None:
        """Drop requests whose answers were delivered; on disk after `tidy`."""
        for request in requests:
            self._log.drop(key_of(request))

    def tidy(self) -> None:
        """Keep on disk only the entries that are still to be delivered, as a rule none."""
        self._log.tidy()


def key_of(request: SignRequest) -> str:
    """The SHA-256 (hex) of a CSR, its certificate's name, authority and validity."""
    about = json.dumps([request.spec.name, request.spec.authority.name, request.validity.total_seconds()])
    return sha256(about.encode() + b"\0" + request.csr_pem).hexdigest()


def _at_desk(key: str, answer: Issued | Pending | Asked, now: datetime) -> _AtDesk:
    if isinstance(answer, Asked):
        return _AtDesk(key=key, asked=answer.since)
    if isinstance(answer, Pending):
        return _AtDesk(key=key, added=now, reference=answer.reference, note=answer.note)
    return _AtDesk(key=key, added=now, chain=answer)
