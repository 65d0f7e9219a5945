"""The gateway's audit log: lines of many threads, written and synced together, keyed by the object's uid."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridge.gateway.rules import spec_of
from bridge.gateway.watch import AnyObject, PodObject
from bridge.settings.tables import AuditSettings
from bridge.specs import POD_SPECS, CertificateSpec
from bridge.state.audit import AuditError, Record
from bridge.state.store import Store
from bridge.system.many import Combined
from bridge.words import one_line

_MOST_TOGETHER = 256
#: After a failure so much space must be free before writing, so that the lease does not change with each line.
_ROOM_BYTES = 256 << 10
_AGAIN_SECONDS = 5.0


Line = dict[str, Any]  #: One event of one request, for `Record.add`.


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """The facts that each line about a request repeats."""

    spec: CertificateSpec
    more: Mapping[str, str]

    @classmethod
    def of(cls, one: AnyObject, backend: str = "", identity: str = "") -> About:
        """The facts about an object of one of our signers; names in it are the requester's choice."""
        spec = POD_SPECS["peer"] if isinstance(one, PodObject) else spec_of(one.request.signer)
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
        if isinstance(one, PodObject):
            pod_request = one.request
            pod = {
                "namespace": pod_request.namespace,
                "pod": pod_request.pod,
                "serviceAccount": pod_request.service_account,
            }
            pod |= {"podUID": pod_request.pod_uid, "requester": f"system:node:{pod_request.node}"}
            found |= {key: one_line(value) for key, value in pod.items()}
        return cls(spec=spec, more={key: value for key, value in found.items() if value})

    def line(self, event: str, **values: Any) -> Line:
        """One event."""
        spec = self.spec
        return {"event": event, "name": spec.name, "authority": spec.authority.name, "more": self.more, **values}


class Ledger:
    """May be used by any thread; the store's lock is held."""

    def __init__(self, store: Store, settings: AuditSettings) -> None:
        self.trouble = ""  #: Why the latest lines were not written.
        self._failing_since = self._tried = 0.0
        self._head_is_old = self._head_is_due = False
        self._path = store.audit
        self._record = Record(store, settings)
        self._together: Combined[Line | None, None] = Combined(self._write, _MOST_TOGETHER)
        self._noted: list[Line] = []
        self._mutex = threading.Lock()

    def write(self, line: Line) -> None:
        """Write a line, which is safe on disk when this returns."""
        self._together(line)

    def note(self, line: Line) -> None:
        """Write a line with the next that is written, or at the next `flush`: it is about what has happened already."""
        with self._mutex:
            self._noted.append(line)

    def flush(self) -> None:
        """Write noted lines and the newest line's number; called each second, it tries less often after a failure."""
        if self.trouble:
            if time.monotonic() - self._tried < _AGAIN_SECONDS:
                return
            self._tried = time.monotonic()
            self._try_room()
        if self._noted or self._head_is_old or self.trouble:
            self._head_is_due = True
            self._together(None)

    def failing_seconds(self) -> float:
        """Seconds since writing began to fail; 0: it works."""
        return time.monotonic() - self._failing_since if self.trouble else 0.0

    def _try_room(self) -> None:
        path = self._path.with_name(".gateway-room")
        try:
            with path.open("wb") as file:
                file.write(bytes(_ROOM_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise AuditError(f"{path}: the audit log could not be written: {e.strerror}") from None
        finally:
            path.unlink(missing_ok=True)

    def _write(self, lines: Sequence[Line | None]) -> list[None]:
        with self._mutex:
            noted, self._noted = self._noted, []
        for line in [*noted, *filter(None, lines)]:
            self._record.add(**line)
        try:
            self._record.write(head_later=True)
            self._head_is_old = True
            if self._head_is_due:
                self._record.write_head()
                self._head_is_old = self._head_is_due = False
        except AuditError as e:
            if not self.trouble:
                self._failing_since = time.monotonic()
            self.trouble = str(e)
            raise
        self.trouble = ""
        return [None] * len(lines)
