"""A Lease object (coordination.k8s.io/v1), held as client-go's package tools/leaderelection does."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, Protocol

from bridge.cluster import mapping
from bridge.cluster.api import Api, NoAnswerError
from bridge.pki.expiry import rfc3339

log = logging.getLogger("ca-bridge")

_API_VERSION = "coordination.k8s.io/v1"
_TURNS = 5  # each 409 means that another client was faster
_LOOK_SECONDS = 2.0
#: Longer than the settings allow for any lease of ours.
_LONGEST = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class _Record:
    """The fields of a lease that decide how long others wait for it."""

    holder: str = ""  #: Empty: the lease is free.
    seconds: int = 0  #: How long it is valid after a change; a hostile API server may send any number of digits.
    renewed: str = ""  #: Only compared, never parsed.
    transitions: int = 0

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> _Record:
        found = mapping(document, "spec")
        seconds, transitions = found.get("leaseDurationSeconds"), found.get("leaseTransitions")
        return cls(
            holder=str(found.get("holderIdentity") or ""),
            seconds=seconds if isinstance(seconds, int) else 0,
            renewed=str(found.get("renewTime") or ""),
            transitions=transitions if isinstance(transitions, int) else 0,
        )


class Lease:
    """Our claim to one lease."""

    def __init__(
        self,
        api: Api,
        path: tuple[str, str],
        holder: str,
        *,
        duration: timedelta,
        longest: timedelta = _LONGEST,
        owner: str | None = None,
    ) -> None:
        """
        Claim the lease at `path` (namespace, name) for a unique `holder`. We wait at most `longest` for a holder that
        does not renew it, and not at all for `OWNER_…`, an earlier claim of ours.
        """
        namespace, self.name = path
        self._api = api
        self._collection = f"/apis/{_API_VERSION}/namespaces/{namespace}/leases"
        self._holder = holder
        self._duration = duration
        self._longest = longest.total_seconds()
        self._owner = owner
        self._seen: tuple[_Record, float] | None = None  # the record, and since when
        self._acquired = ""
        self.taken_from = ""  #: The holder that had not released it when `take` last wrote it.

    def take(self) -> str:
        """Take the lease if it is free, or renew it; return another holder's name, or an empty text if it is ours."""
        for _ in range(_TURNS):
            found = self._api.ask("GET", f"{self._collection}/{self.name}")
            record = _Record()
            if found.status == HTTPStatus.NOT_FOUND:
                wrote = self._api.ask("POST", self._collection, self._rewritten({"metadata": {"name": self.name}}))
            elif found.status == HTTPStatus.OK:
                record = _Record.of(found.document)
                if self._is_anothers(record):
                    return record.holder
                body = self._rewritten(found.document)
                wrote = self._api.ask("PUT", f"{self._collection}/{self.name}", body)
            else:
                wrote = found
            if wrote.status in {HTTPStatus.OK, HTTPStatus.CREATED}:
                self.taken_from = record.holder
                return ""
            # If a write's answer got lost, the next turn finds that the lease is ours. A 404 to a POST is about the namespace.
            was_deleted = found.status == HTTPStatus.OK and wrote.status == HTTPStatus.NOT_FOUND
            if wrote.status != HTTPStatus.CONFLICT and not was_deleted:
                raise NoAnswerError(f"wanted the lease {self.name}, found HTTP {wrote.status} {wrote.message}".rstrip())
        raise NoAnswerError(f"wanted the lease {self.name}, found that it changed each time")

    def trial(self) -> str:
        """Return why a dry run could not create the lease; empty: it exists, or we may create it."""
        if self._api.ask("GET", f"{self._collection}/{self.name}").status != HTTPStatus.NOT_FOUND:
            return ""
        body = self._rewritten({"metadata": {"name": self.name}})
        reply = self._api.ask("POST", f"{self._collection}?dryRun=All", body)
        is_good = reply.status in {HTTPStatus.CREATED, HTTPStatus.CONFLICT}
        return "" if is_good else f"HTTP {reply.status} {reply.message}".rstrip()

    def give_back(self) -> None:
        """Release the lease at once, if it is ours."""
        for _ in range(_TURNS):
            found = self._api.ask("GET", f"{self._collection}/{self.name}")
            if found.status != HTTPStatus.OK or _Record.of(found.document).holder != self._holder:
                return
            body = self._rewritten(found.document, holder="")
            if self._api.ask("PUT", f"{self._collection}/{self.name}", body).status == HTTPStatus.OK:
                return

    def _is_anothers(self, record: _Record) -> bool:
        if record.holder in {"", self._holder} or record.holder.rpartition("_")[0] == self._owner:
            return False
        now = time.monotonic()
        if self._seen is None or self._seen[0] != record:
            self._seen = (record, now)
        return now < self._seen[1] + min(record.seconds or self._duration.total_seconds(), self._longest)

    def _rewritten(self, document: Mapping[str, Any], *, holder: str | None = None) -> dict[str, Any]:
        """Return the lease with our spec and its old resourceVersion, so that a change in between is a 409."""
        before, metadata = _Record.of(document), document.get("metadata")
        if not isinstance(metadata, dict):
            raise NoAnswerError(f"wanted the lease {self.name}, found something else")
        name = self._holder if holder is None else holder
        now = rfc3339(datetime.now(UTC), "microseconds")
        if before.holder != name and name:
            self._acquired = now
        return {
            "apiVersion": _API_VERSION,
            "kind": "Lease",
            "metadata": metadata,
            "spec": {
                "holderIdentity": name,
                "leaseDurationSeconds": math.ceil(self._duration.total_seconds()),
                "acquireTime": self._acquired or now,
                "renewTime": now,
                "leaseTransitions": before.transitions + (name not in {"", before.holder}),
            },
        }


class Claim(Protocol):
    """A claim to a lease: `Lease`, or `EtcdClaim` on a host that has etcd alone."""

    def take(self) -> str:
        """Take the lease if it is free, or renew it; return another holder's name, or an empty text if it is ours."""

    def give_back(self) -> None:
        """Release the lease at once, if it is ours."""


class Keeper:
    """Our hold on a lease, which a thread renews five times per duration from `start` to `release`; no error ends it."""

    def __init__(self, lease: Claim, duration: timedelta, renew: Callable[[], object] | None = None) -> None:
        """The thread calls `renew`, or else `take`."""
        self.renewed = -math.inf  #: When the lease was last seen to be ours (monotonic); infinite: it is not.
        self._lease = lease
        self._mutex = threading.Lock()
        self._renew = renew or self.take
        self._pause = duration.total_seconds() / 5
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def take(self) -> str:
        """Take or renew the lease, as `Claim.take` does (NoAnswerError)."""
        with self._mutex:
            began = time.monotonic()
            other = self._lease.take()
            self.renewed = -math.inf if other else began
            return other

    def give_back(self) -> None:
        """Release the lease, unless it is known not to be ours (NoAnswerError: it expires)."""
        if self.renewed > -math.inf:
            self.renewed = -math.inf
            self._lease.give_back()

    def release(self) -> None:
        """End the thread, and release the lease (NoAnswerError: it expires)."""
        self.stop()
        self.give_back()

    def start(self) -> None:
        """Start to renew, the first time at once."""
        self.thread.start()

    def stop(self) -> None:
        """End the thread, if there is one."""
        self._stop.set()
        if self.thread.ident is not None:
            self.thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            pause = self._pause
            try:
                self._renew()
            except NoAnswerError:
                pause = min(pause, _LOOK_SECONDS)
            except Exception as e:  # noqa: BLE001 (without the thread the lease would never be ours again)
                log.error("the lease was not renewed: %s (a bug: report it)", type(e).__name__)  # noqa: TRY400
            self._stop.wait(pause)
