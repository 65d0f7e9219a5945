"""
One control-plane node after the other: a lease in the cluster, so that two nodes' timers never restart at once.

An object `Lease` of coordination.k8s.io/v1 in kube-system, kept as client-go's leader election keeps it (package
tools/leaderelection). Nodes' clocks are not compared: a lease has expired when it was *seen* not to change for its own
duration. Whom no API server answers has no lease, and is held up by nothing: only another holder that was seen is an
obstacle.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any

from bridge.cluster.api import Api
from bridge.cluster.errors import NoAnswerError
from bridge.errors import PostponedError
from bridge.pki.durations import duration_text
from bridge.system.status import doing
from bridge.system.waiting import wait_until

_API_VERSION = "coordination.k8s.io/v1"
_COLLECTION = f"/apis/{_API_VERSION}/namespaces/kube-system/leases"

#: How long an API that does not answer is asked again before that counts: an election in etcd takes about a second.
_BLINK_SECONDS = 10.0
_LOOK_SECONDS = 2.0
_TURNS = 5  # each 409 means that somebody else was faster


class LeaseHeldError(PostponedError):
    """Another node has the lease."""

    hint = "run again later; the lease of a run that died can be taken when it has expired"


@dataclass(frozen=True, slots=True)
class _Record:
    """The fields of a lease that decide how long one has to wait for it."""

    holder: str  #: Empty: nobody.
    seconds: float  #: For which it is good after it changed.
    renewed: str  #: Compared, and not read.
    transitions: int

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> _Record:
        spec = document.get("spec")
        found = spec if isinstance(spec, dict) else {}
        seconds, transitions = found.get("leaseDurationSeconds"), found.get("leaseTransitions")
        return cls(
            holder=str(found.get("holderIdentity") or ""),
            seconds=float(seconds) if isinstance(seconds, int) else 0.0,
            renewed=str(found.get("renewTime") or ""),
            transitions=transitions if isinstance(transitions, int) else 0,
        )


class Lease:
    """A run's hold on the lease, or the knowledge that there is no API to have one from."""

    def __init__(
        self, api: Api, name: str, holder: str, *, duration: timedelta, wait: timedelta, note: Callable[[str], None]
    ) -> None:
        self._held = False
        self._api = api
        self._name = name
        self._holder = holder
        self._duration = duration
        self._wait = wait
        self._note = note
        self._seen: tuple[_Record, float] | None = None  # and since when
        self._lost_to = ""
        self._goes_without = False  # there was no API, and that was said
        self._acquired = ""
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._keeper: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether it is ours, as far as we know."""
        return self._held and not self._lost_to

    def assert_held(self) -> None:
        """
        Renew it; call this before each restart.

        When there was no API so far, it is tried to have it now.

        Raises:
            LeaseHeldError: Another has it.
        """
        if not self._held:
            self._acquire()
            return
        try:
            with self._mutex:
                self._renew()
        except NoAnswerError as e:  # our own restart may be the reason
            self._note(f"the lease {self._name} could not be renewed: {e}")
        if self._lost_to:
            raise LeaseHeldError(f"the lease {self._name} was lost to {self._lost_to}, since it could not be renewed")

    def _acquire(self) -> None:
        """
        Wait for it.

        Raises:
            LeaseHeldError: It did not become free in time.
        """
        patience = timedelta(seconds=0 if self._goes_without else _BLINK_SECONDS)
        found = wait_until(
            self._tried, lambda seen: not isinstance(seen, NoAnswerError), patience, pause_seconds=_LOOK_SECONDS
        )
        if isinstance(found, NoAnswerError):
            if not self._goes_without:
                self._note(f"no lease was taken, other nodes may restart at the same time: {found}")
            self._goes_without = True
            return
        if found is not None:
            self._outlast(found)
        self._keep()

    def _outlast(self, held: _Record) -> None:
        """
        Wait for a holder that was seen; it stays an obstacle, answer or not: our own API server may be restarted.

        Raises:
            LeaseHeldError: It still is one.
        """
        holders = [held.holder]
        self._note(f"waiting for the lease {self._name}, which {held.holder} has")

        def tell(seen: _Record | NoAnswerError | None) -> None:
            if isinstance(seen, _Record) and seen.holder != holders[-1]:
                holders.append(seen.holder)
                self._note(f"waiting for the lease {self._name}, which {seen.holder} has")

        with doing(f"waiting for the lease {self._name}", is_plain=False):
            found = wait_until(
                self._tried, lambda seen: seen is None, self._wait, pause_seconds=_LOOK_SECONDS, between=tell
            )
        if found is not None:
            waited = duration_text(self._wait)
            raise LeaseHeldError(f"wanted the lease {self._name} within {waited}, found that {holders[-1]} has it")

    def _tried(self) -> _Record | NoAnswerError | None:
        """Call `_try`; an error of the API's is returned, not raised."""
        try:
            return self._try()
        except NoAnswerError as e:
            return e

    def _try(self) -> _Record | None:
        """
        Take it if it is free, or renew it; None: it is ours now, else who has it.

        Raises:
            NoAnswerError: The API does not answer, or not as it should.
        """
        for _ in range(_TURNS):
            found = self._api.ask("GET", f"{_COLLECTION}/{self._name}")
            if found.status == HTTPStatus.NOT_FOUND:
                wrote = self._api.ask("POST", _COLLECTION, self._made({"metadata": {"name": self._name}}))
            elif found.status == HTTPStatus.OK:
                record = _Record.of(found.document)
                if record.holder and not self._is_of_this_node(record) and not self._has_expired(record):
                    return record
                wrote = self._api.ask("PUT", f"{_COLLECTION}/{self._name}", self._made(found.document))
            else:
                wrote = found
            if wrote.status in {HTTPStatus.OK, HTTPStatus.CREATED}:
                return None
            # 404: deleted meanwhile. After a write that was carried out, and whose answer got lost, the next turn
            # finds that it is ours.
            if wrote.status not in {HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND}:
                raise NoAnswerError(f"wanted the lease {self._name}, found HTTP {wrote.status}")
        raise NoAnswerError(f"wanted the lease {self._name}, found that it changed each time")

    def _is_of_this_node(self, record: _Record) -> bool:
        """Ours, or that of a run of this node that was killed: only one at a time has the state directory's lock."""
        return record.holder.rpartition("_")[0] == self._holder.rpartition("_")[0]

    def _has_expired(self, record: _Record) -> bool:
        now = time.monotonic()
        if self._seen is None or self._seen[0] != record:
            self._seen = (record, now)
        return now >= self._seen[1] + record.seconds

    def _made(self, document: Mapping[str, Any], *, holder: str | None = None) -> dict[str, Any]:
        """The lease with another spec; its resourceVersion stays, so that a change in between is a 409."""
        before = _Record.of(document)
        name = self._holder if holder is None else holder
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        if before.holder != name and name:
            self._acquired = now
        return {
            "apiVersion": _API_VERSION,
            "kind": "Lease",
            "metadata": document["metadata"],
            "spec": {
                "holderIdentity": name,
                "leaseDurationSeconds": math.ceil(self._duration.total_seconds()),
                "acquireTime": self._acquired or now,
                "renewTime": now,
                "leaseTransitions": before.transitions + (name not in {"", before.holder}),
            },
        }

    def _keep(self) -> None:
        self._held = True
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
            self._keeper.start()

    def _keep_renewing(self) -> None:
        calm = self._duration.total_seconds() / 3
        pause = calm
        while not self._stop.wait(pause):
            with self._mutex:
                try:
                    self._renew()
                except NoAnswerError:
                    pause = min(calm, _LOOK_SECONDS)
                else:
                    pause = calm

    def _renew(self) -> None:
        """
        Raises:
            NoAnswerError: Nobody to ask.
        """
        if self._lost_to:
            return
        other = self._try()
        if other is not None:
            self._lost_to = other.holder

    def release(self) -> None:
        """Let the next one have it at once; without an API it expires."""
        self._stop.set()
        if self._keeper is not None:
            self._keeper.join()
        if not self.held:
            return
        self._held = False
        try:
            self._give_back()
        except NoAnswerError as e:
            self._note(f"the lease {self._name} was not given back and expires in {duration_text(self._duration)}: {e}")

    def _give_back(self) -> None:
        for _ in range(_TURNS):
            found = self._api.ask("GET", f"{_COLLECTION}/{self._name}")
            if found.status != HTTPStatus.OK or _Record.of(found.document).holder != self._holder:
                return
            wrote = self._api.ask("PUT", f"{_COLLECTION}/{self._name}", self._made(found.document, holder=""))
            if wrote.status == HTTPStatus.OK:
                return


@contextlib.contextmanager
def hold(
    api: Api, name: str, holder: str, *, duration: timedelta, wait: timedelta, note: Callable[[str], None]
) -> Iterator[Lease]:
    """
    Have the lease for as long as the block runs.

    Args:
        api: The more of its servers are known, the longer the lease is kept through restarts.
        name: The lease's.
        holder: Who we are: `NODE_RUN`; no two runs have the same, and of one node only one runs at a time.
        duration: After which others may take it when it is not renewed; a thread renews it three times in that.
        wait: For another that has it.
        note: Is told, in a sentence, what the operator should know; from this thread alone.

    Raises:
        LeaseHeldError: Another has it.
    """
    lease = Lease(api, name, holder, duration=duration, wait=wait, note=note)
    try:
        lease.assert_held()
        yield lease
    finally:
        lease.release()
