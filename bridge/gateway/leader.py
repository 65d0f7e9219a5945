"""
One replica works: a lease that is renewed all the time, as client-go's leader election does (tools/leaderelection).

Unlike the lease round restarts (`bridge.control_plane.lease`), nobody works without it: whoever can't renew it stops
before another one may have it. Clocks of replicas are not compared; a lease has expired when it was seen not to change
for its own duration.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any

from bridge.cluster.api import Api
from bridge.cluster.errors import NoAnswerError

log = logging.getLogger("ca-bridge")

_API_VERSION = "coordination.k8s.io/v1"


@dataclass(frozen=True, slots=True)
class _Seen:
    """A lease as it was seen, and since when it is so."""

    holder: str
    renewed: str
    version: str
    seconds: float
    since: float


class Leader:
    """A replica's hold on the lease; without one (`Alone`) it always works."""

    def __init__(self, api: Api, namespace: str, name: str, identity: str, duration: timedelta) -> None:
        self._api = api
        self._collection = f"/apis/{_API_VERSION}/namespaces/{namespace}/leases"
        self._name = name
        self._identity = identity
        self._seconds = duration.total_seconds()
        self._good_until = 0.0
        self._seen: _Seen | None = None
        self._told: str | None = None  #: The last trouble; None: nothing was said yet.
        self._doubtful_before: datetime | None = None
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self.last_answer = time.monotonic()  #: When the API last answered.

    def start(self) -> None:
        """Begin to ask for it."""
        self._thread.start()

    def is_ours(self) -> bool:
        """Whether we may work: renewed a while before another may take it."""
        return time.monotonic() < self._good_until

    def doubtful_before(self) -> datetime | None:
        """When we took it from one who had not given it back (ourselves, before a crash or an outage, among them)."""
        return self._doubtful_before

    def wait(self, seconds: float) -> bool:
        """Wait for it to be ours."""
        with self._changed:
            return self._changed.wait_for(self.is_ours, seconds)

    def release(self) -> None:
        """Let the next one have it at once; without an API it expires."""
        self._stop.set()
        self._thread.join()
        if not self.is_ours():
            return
        self._good_until = 0.0
        try:
            found = self._api.ask("GET", f"{self._collection}/{self._name}")
            if found.status == HTTPStatus.OK and _spec(found.document).get("holderIdentity") == self._identity:
                self._api.ask("PUT", f"{self._collection}/{self._name}", self._made(found.document, ""))
        except NoAnswerError as e:
            log.warning("the lease %s was not given back, and expires: %s", self._name, e)

    def _run(self) -> None:
        pause = self._seconds / 5
        while not self._stop.is_set():
            before, began = self.is_ours(), time.monotonic()
            try:
                trouble = self._try(began)
                self.last_answer = time.monotonic()
            except NoAnswerError as e:
                trouble = str(e)
            except (KeyError, TypeError, AttributeError, ValueError) as e:
                trouble = f"wanted the lease {self._name}, found something else ({type(e).__name__})"
            if trouble != self._told:
                self._told = trouble
                (log.info if not trouble else log.warning)("%s", trouble or f"the lease {self._name} is ours")
            if before != self.is_ours():
                with self._changed:
                    self._changed.notify_all()
            self._stop.wait(pause)

    def _try(self, began: float) -> str:
        """Take or renew it; the text says why it is not ours."""
        found = self._api.ask("GET", f"{self._collection}/{self._name}")
        is_new, left_behind = not self.is_ours(), bool(_spec(found.document).get("holderIdentity"))
        if found.status == HTTPStatus.NOT_FOUND:
            body = {"metadata": {"name": self._name}}
            wrote = self._api.ask("POST", self._collection, self._made(body, self._identity))
        elif found.status == HTTPStatus.OK:
            holder = self._other_holder(found.document)
            if holder:
                self._good_until = 0.0
                return f"standing by: {holder} has the lease {self._name}"
            body = self._made(found.document, self._identity)
            wrote = self._api.ask("PUT", f"{self._collection}/{self._name}", body)
        else:
            return f"wanted the lease {self._name}, found HTTP {found.status} {found.message}"
        if wrote.status in {HTTPStatus.OK, HTTPStatus.CREATED}:
            if is_new:
                self._doubtful_before = datetime.now(UTC) if left_behind else None
            self._good_until = began + self._seconds * 0.7
            return ""
        if wrote.status == HTTPStatus.CONFLICT:
            return f"standing by: another replica was faster to take the lease {self._name}"
        return f"wanted to write the lease {self._name}, found HTTP {wrote.status} {wrote.message}"

    def _other_holder(self, document: Mapping[str, Any]) -> str:
        """Who else has it; empty: nobody, or one that died."""
        spec, now = _spec(document), time.monotonic()
        holder, seconds = str(spec.get("holderIdentity") or ""), spec.get("leaseDurationSeconds")
        if not holder or holder == self._identity:
            return ""
        version = str(document.get("metadata", {}).get("resourceVersion", ""))
        seen = _Seen(holder, str(spec.get("renewTime") or ""), version, float(seconds or self._seconds), now)
        if self._seen is None or (self._seen.version, self._seen.holder) != (seen.version, seen.holder):
            self._seen = seen
        return "" if now - self._seen.since >= min(self._seen.seconds, 10 * self._seconds) else holder

    def _made(self, document: Mapping[str, Any], holder: str) -> dict[str, Any]:
        """The lease with another spec; its resourceVersion stays, so that a change in between is a 409."""
        before = _spec(document)
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        is_new = before.get("holderIdentity") != holder
        transitions = before.get("leaseTransitions")
        count = transitions if isinstance(transitions, int) else 0
        return {
            "apiVersion": _API_VERSION,
            "kind": "Lease",
            "metadata": document["metadata"],
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": math.ceil(self._seconds),
                "acquireTime": now if is_new else before.get("acquireTime") or now,
                "renewTime": now,
                "leaseTransitions": count + (is_new and bool(holder)),
            },
        }


def _spec(document: Mapping[str, Any]) -> Mapping[str, Any]:
    found = document.get("spec")
    return found if isinstance(found, dict) else {}


class Alone:
    """There is no other replica (`lease = false`)."""

    def __init__(self) -> None:
        self._began = datetime.now(UTC)

    def doubtful_before(self) -> datetime | None:
        """How the run before this one has ended nobody knows."""
        return self._began

    def start(self) -> None:
        """Do nothing."""

    def is_ours(self) -> bool:
        """Always."""
        return True

    def wait(self, _: float) -> bool:
        """No wait."""
        return True

    def release(self) -> None:
        """Do nothing."""
