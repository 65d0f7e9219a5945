"""The record of the gateway: lines of many threads, written and made safe together, keyed by the object's uid."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509

from bridge.errors import BridgeError
from bridge.gateway.rules import spec_of
from bridge.gateway.watch import SigningRequest
from bridge.settings.tables import AuditSettings
from bridge.specs import CertificateSpec
from bridge.state.audit import AuditError, Record
from bridge.state.store import Store
from bridge.system.many import Combined
from bridge.words import one_line

_MOST_TOGETHER = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One event of one request."""

    event: str
    spec: CertificateSpec
    more: Mapping[str, str]
    new: x509.Certificate | None = None
    error: BridgeError | None = None
    result: str = "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """The facts that each line about a request repeats."""

    spec: CertificateSpec
    more: Mapping[str, str]

    @classmethod
    def of(cls, one: SigningRequest, backend: str = "", identity: str = "") -> About:
        """The facts about an object of one of our signers; names in it are the requester's choice."""
        spec = spec_of(one.request.signer)
        if spec is None:
            raise AssertionError("only signers that have a spec are looked at")
        found = {
            "request": one.uid,
            "object": one_line(one.name),
            "signer": one.request.signer,
            "requester": one_line(one.request.username),
            "csrSha256": hashlib.sha256(one.request.pem).hexdigest(),
            "backend": backend,
            "identity": identity,
        }
        return cls(spec=spec, more={key: value for key, value in found.items() if value})

    def line(self, event: str, **values: Any) -> Line:
        """One event."""
        return Line(event=event, spec=self.spec, more=self.more, **values)


@dataclass(eq=False)
class Ledger:
    """May be used by any thread."""

    store: Store  #: Its lock is held.
    settings: AuditSettings
    trouble: str = ""  #: Why the latest lines were not written.
    _head_is_old: bool = False
    _head_is_due: bool = False
    _record: Record = field(init=False)
    _together: Combined[Line | None, None] = field(init=False)
    _noted: list[Line] = field(default_factory=list)
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._record = Record(self.store, self.settings)
        self._together = Combined(self._write, _MOST_TOGETHER)

    def write(self, line: Line) -> None:
        """
        Write a line, which is safe on disk when this returns.

        Raises:
            AuditError: It is not.
        """
        self._together(line)

    def note(self, line: Line) -> None:
        """Write a line with the next that is written, or at the next `flush`: it is about what has happened already."""
        with self._mutex:
            self._noted.append(line)

    def flush(self) -> None:
        """
        Write what was noted, and which line is the newest; called every second or so.

        Raises:
            AuditError: It could not be written.
        """
        if self._noted or self._head_is_old:
            self._head_is_due = True
            self._together(None)

    def _write(self, lines: Sequence[Line | None]) -> list[None]:
        with self._mutex:
            noted, self._noted = self._noted, []
        for line in [*noted, *filter(None, lines)]:
            self._record.add(
                line.event,
                line.spec.name,
                authority=line.spec.authority.name,
                new=line.new,
                error=line.error,
                result=line.result,
                more=line.more,
            )
        try:
            self._record.write(head_later=True)
            self._head_is_old = True
            if self._head_is_due:
                self._record.write_head()
                self._head_is_old = self._head_is_due = False
        except AuditError as e:
            self.trouble = str(e)
            raise
        self.trouble = ""
        return [None] * len(lines)
