"""
Requests that wait: new ones in their order, others when their time has come; only the newest of a node counts.

And how often a requester may ask: buckets of tokens.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime

from bridge.gateway.watch import SigningRequest
from bridge.pki.verify import Verified

#: A flood waits in the API server, not here; it comes again with the next round of the watch. When the queue is full, the
#: requester with the most waiting requests loses some, so that a flood keeps no other requester out.
MOST_BYTES = 24 << 20
MOST_JOBS = 20_000
_MOST_REMEMBERED = 20_000
#: Names are the requesters' choice; the bucket that was used the longest time ago is forgotten first.
_MOST_BUCKETS = 10_000
_MINUTE_SECONDS = 60.0

Newest = tuple[datetime, int]


@dataclass(eq=False, kw_only=True)
class Job:
    """One object, and how far we are with it."""

    one: SigningRequest
    node: str | None  #: Its certificate would be this node's; None: no node's.
    alone: bool = False  #: It supersedes no other job, and no other job supersedes it.
    arrived: float  #: Monotonic.
    begun: bool = False  #: It was counted by the rates.
    attempts: int = 0
    said: str = ""  #: The last reason why it was left, which is logged once.
    verified: Verified | None = None  #: The CA's answer, not written yet.
    was_asked: bool = False  #: The CA was asked, and its answer did not come.
    was_recalled: bool = False  #: Since then it was looked for, and was not there.
    removed: bool = field(default=False)

    @property
    def key(self) -> str:
        """The job's `key_of`: only the newest job of a key counts; empty: it stands alone."""
        return "" if self.alone else key_of(self.one, self.node)


def key_of(one: SigningRequest, node: str | None) -> str:
    """A key by signer, user and node: a kubelet reads only its newest request; empty without a node."""
    return f"{one.request.signer}\n{one.request.username}\n{node}" if node is not None else ""


class Queue:
    """May be used by any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: dict[str, Job] = {}  # by uid: waiting or delayed
        self._ready: deque[Job] = deque()
        self._delayed: list[tuple[float, int, Job]] = []
        self._order = itertools.count()
        self._working: dict[str, Job] = {}
        self._later: dict[str, SigningRequest] = {}  # a newer version of what is being worked at
        self._newest: OrderedDict[str, tuple[Newest, str]] = OrderedDict()
        self._shares: Counter[str] = Counter()  # bytes by user
        self._bytes = 0
        self._closed = False
        self.overflowed = False

    def put(
        self,
        one: SigningRequest,
        node_of: Callable[[SigningRequest], str | None],
        counts: Callable[[SigningRequest], bool] = lambda _: True,
    ) -> list[str]:
        """
        Take in an object that is new or has changed.

        Args:
            one: The object.
            node_of: The node whose certificate it asks for; looked at once.
            counts: Whether it may be signed. If not, it supersedes no other request: with a node's credentials and refused
                requests alone, its kubelet could be kept waiting for ever.

        Returns:
            The uids of older objects of the same key, which count no longer.
        """
        with self._changed:
            if one.uid in self._working:
                self._later[one.uid] = one
                return []
            known = self._jobs.get(one.uid)
            if known is not None:
                if known.one.version != one.version:
                    self._pop(one.uid)
                    known.one = one
                    self._soon(known)
                return []
        node = node_of(one)  # without the lock: it takes a while
        alone = node is None or not counts(one)
        with self._changed:
            superseded = self._supersede(one, "" if alone else key_of(one, node))
            if superseded is None:
                return []
            if not self._has_room(one):
                self.overflowed = True
                return superseded
            job = Job(one=one, node=node, alone=alone, arrived=time.monotonic())
            self._add(job)
            self._ready.append(job)
            self._changed.notify()
            return superseded

    def _has_room(self, one: SigningRequest) -> bool:
        """Whether it fits, once requesters with more waiting than its own have lost some."""
        user = one.request.username
        while self._bytes + one.size > MOST_BYTES or len(self._jobs) >= MOST_JOBS:
            greediest = self._greediest()
            if self._shares[greediest] <= self._shares[user] + one.size:
                return False
            theirs = [job for job in self._jobs.values() if job.one.request.username == greediest]
            # one that was not worked at yet, if there is one: the others may have a certificate already
            self._remove(next((job for job in theirs if not job.begun), theirs[0]).one.uid)
            self.overflowed = True
        return True

    def greediest(self) -> str:
        """The requester with the most waiting; empty: no request waits."""
        with self._changed:
            return self._greediest()

    def _greediest(self) -> str:
        return max(self._shares, key=lambda name: self._shares[name], default="")

    def _add(self, job: Job) -> None:
        self._jobs[job.one.uid] = job
        self._bytes += job.one.size
        self._shares[job.one.request.username] += job.one.size

    def _pop(self, uid: str) -> Job | None:
        job = self._jobs.pop(uid, None)
        if job is not None:
            user = job.one.request.username
            self._bytes -= job.one.size
            self._shares[user] -= job.one.size
            if self._shares[user] <= 0:
                del self._shares[user]
        return job

    def _supersede(self, one: SigningRequest, key: str) -> list[str] | None:
        """The uids that this object supersedes; None: a newer one is known."""
        if not key:
            return []
        known = self._newest.get(key)
        if known is not None and known[1] != one.uid and known[0] > one.age_key:
            return None
        if known is None or known[1] != one.uid:
            self._newest[key] = (one.age_key, one.uid)
            self._newest.move_to_end(key)
            if len(self._newest) > _MOST_REMEMBERED:
                self._newest.popitem(last=False)
        if known is None or known[1] == one.uid:
            return []
        self._remove(known[1])
        return [known[1]]

    def is_newest(self, job: Job) -> bool:
        """Whether no newer job of its key has come."""
        with self._changed:
            known = self._newest.get(job.key)
            return not job.key or known is None or known[1] == job.one.uid

    def remove(self, uid: str) -> None:
        """Take an object out: it is settled, or gone."""
        with self._changed:
            self._later.pop(uid, None)
            self._remove(uid)

    def _remove(self, uid: str) -> None:
        job = self._pop(uid)
        if job is not None:
            job.removed = True

    def _soon(self, job: Job) -> None:
        """A delayed job is looked at now; its old place in the heap leads to nothing."""
        fresh = replace(job)
        job.removed = True
        self._add(fresh)
        self._ready.append(fresh)
        self._changed.notify()

    def take(self, seconds: float) -> Job | None:
        """The next job, for which `done` or `delay` has to be called; None: none came in time, or the queue is closed."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                now = time.monotonic()
                while self._delayed and (self._delayed[0][0] <= now or self._delayed[0][2].removed):
                    job = heapq.heappop(self._delayed)[2]
                    if not job.removed:
                        self._ready.append(job)
                while self._ready:
                    job = self._ready.popleft()
                    if not job.removed:
                        self._working[job.one.uid] = job
                        self._pop(job.one.uid)
                        return job
                if self._closed or now >= deadline:
                    return None
                upcoming = self._delayed[0][0] if self._delayed else deadline
                self._changed.wait(max(0.0, min(deadline, upcoming) - now))

    def done(self, job: Job) -> None:
        """End the work on a job, unless its object has changed meanwhile."""
        with self._changed:
            del self._working[job.one.uid]
            later = self._later.pop(job.one.uid, None)
        if later is not None and not later.is_settled and later.version != job.one.version:
            self.put(later, lambda _: job.node, lambda _: not job.alone)

    def delay(self, job: Job, seconds: float) -> None:
        """Put a job back: it is looked at again after these seconds, or when its object changes."""
        with self._changed:
            del self._working[job.one.uid]
            later = self._later.pop(job.one.uid, None)
            if later is not None and later.is_settled:
                return
            has_changed = later is not None and later.version != job.one.version
            if has_changed and later is not None:
                job.one = later
            if self._closed:
                return
            self._add(job)
            if has_changed:
                self._ready.append(job)
            else:
                heapq.heappush(self._delayed, (time.monotonic() + seconds, next(self._order), job))
            self._changed.notify()

    def wake(self) -> None:
        """Look at all delayed jobs at once: something has changed."""
        with self._changed:
            self._ready.extend(job for _, _, job in self._delayed if not job.removed)
            self._delayed.clear()
            self._changed.notify_all()

    def forget(self) -> None:
        """Another replica works from here on."""
        with self._changed:
            for job in self._jobs.values():
                job.removed = True
            self._jobs.clear()
            self._ready.clear()
            self._delayed.clear()
            self._newest.clear()
            self._later.clear()
            self._shares.clear()
            self._bytes = 0
            self.overflowed = False

    def close(self) -> None:
        """Take no new jobs, and forget those that are not being worked at."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()

    def counts(self) -> tuple[int, int]:
        """Waiting, and being worked at."""
        with self._changed:
            return len(self._jobs), len(self._working)


class Rate:
    """So many a minute for each name, all of them at once if it has been quiet."""

    def __init__(self, a_minute: int) -> None:
        self._a_minute = a_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_seconds(self, name: str, now: float) -> float:
        """Seconds until one more may begin; 0: none."""
        left = self._left(name, now)
        return 0.0 if left >= 1 else (1 - left) * _MINUTE_SECONDS / self._a_minute

    def take(self, name: str, now: float) -> None:
        """Count one more."""
        self._buckets[name] = (self._left(name, now) - 1, now)
        self._buckets.move_to_end(name)
        if len(self._buckets) > _MOST_BUCKETS:
            self._buckets.popitem(last=False)

    def _left(self, name: str, now: float) -> float:
        left, since = self._buckets.get(name, (float(self._a_minute), now))
        return min(float(self._a_minute), left + (now - since) * self._a_minute / _MINUTE_SECONDS)
