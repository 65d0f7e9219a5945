"""The queue of requests: in order or at their time, fair among users, only the newest for a node."""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from bridge.gateway.watch import AnyObject
from bridge.pki.verify import Verified
from bridge.system.waiting import remember

#: A flood waits in the API server, not here, and the watch's next round delivers it again. When the queue is full, the
#: requester with the most waiting requests loses some, so that a flood keeps no other requester out.
MOST_BYTES = 24 << 20
MOST_JOBS = 20_000
_MOST_REMEMBERED = 20_000
_MOST_REMOVED = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a request and the files alone say about its job."""

    #: See `key_of`; empty: it may not be signed, or is about no node. Then it supersedes no job, and no job supersedes
    #: it, or refused requests, made with a node's credentials, could keep its kubelet waiting for ever.
    key: str = ""
    is_known: bool = False  #: The inventory has the node.
    is_hostile: bool = False  #: Its content alone is a reason to refuse it.


@dataclass(eq=False, kw_only=True)
class Job:
    """One object, and the progress of our work on it."""

    one: AnyObject
    look: Look
    arrived: float  #: Monotonic.
    lane: str = ""  #: The CA's name.
    begun: bool = False  #: The rate limits have let it proceed.
    attempts: int = 0
    judged: float = -math.inf  #: When the policy last gave its verdict (monotonic).
    said: str = ""  #: The last logged reason why it was left, so that each is logged once.
    last_event: str = ""  #: The last reason in an event for the object's owner.
    verified: Verified | None = None  #: The CA's answer, not yet written.
    unrecorded: Verified | None = None  #: The CA's answer, not yet in the audit log.
    signed_for: tuple[object, ...] = ()  #: What the policy gave when `verified` was signed.
    facts: dict[str, Any] = field(default_factory=dict)  #: The fields of its lines in the audit log, as of then.
    was_asked: bool = False  #: We asked the CA, and have no answer yet.
    was_recalled: bool = False  #: We have searched for a certificate since, and found none.
    later: AnyObject | None = None  #: A newer version, which came during the work on this one.
    removed: bool = False  #: It was removed during the work on it.
    delay: int = 0  #: The number of its delay while it waits for its time; 0: it is not delayed.


def key_of(request: AnyObject, node: str | None) -> str:
    """Return signer, user and node as a key; only its newest job counts, as a kubelet reads only its newest request."""
    return f"{request.request.signer}\n{request.request.username}\n{node}"


class _Lane:
    """The jobs of one CA."""

    def __init__(self, most: float) -> None:
        self._most = most  #: The most threads that work on them.
        self.working = 0
        #: The waiting jobs, by user (the next user comes first) and by uid.
        self.ready: OrderedDict[str, dict[str, Job]] = OrderedDict()

    def is_due(self) -> bool:
        """Whether a thread may take the next job."""
        return bool(self.ready) and self.working < self._most

    def pop(self) -> Job:
        """Remove the next job; its user goes to the end of the line."""
        user, jobs = self.ready.popitem(last=False)
        job = jobs.pop(next(iter(jobs)))
        if jobs:
            self.ready[user] = jobs
        return job

    def withdraw(self, job: Job) -> None:
        """Remove a job from its user's line, if it is in one."""
        user = job.one.request.username
        line = self.ready.get(user, {})
        if line.pop(job.one.uid, None) is not None and not line:
            del self.ready[user]


class Queue:
    """The jobs of all lanes; any thread may use it."""

    def __init__(self, lane: Callable[[AnyObject], str] = lambda _: "", most_per_lane: float = math.inf) -> None:
        """Of each lane, at most so many jobs are worked on at once, so that a CA that hangs leaves threads to the others."""
        self._lane, self._most = lane, most_per_lane
        self._changed = threading.Condition()
        self._order = itertools.count(1)
        self._lanes: dict[str, _Lane] = {}  # the lane that was served last comes last
        self._working: dict[str, Job] = {}
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self._jobs: dict[str, Job] = {}  # by uid: waiting or delayed
        for lane in self._lanes.values():
            lane.ready.clear()
        self._delayed: list[tuple[float, int, Job]] = []
        self._newest: OrderedDict[str, tuple[tuple[datetime, int], str]] = OrderedDict()
        #: Superseded uids: a write gives the older of two objects made in one second the greater resourceVersion.
        self._older: OrderedDict[str, None] = OrderedDict()
        self._shares: Counter[str] = Counter()  # bytes by user
        self._bytes = 0
        self.overflowed = False

    def put(self, request: AnyObject, look: Callable[[AnyObject], Look]) -> list[str]:
        """Take in an object that is new or has changed; return the uids of the older objects that it supersedes."""
        with self._changed:
            if self._is_known(request):
                return []
            if not self._make_room(request):
                self.overflowed = True
                return []
        found = look(request)  # without the lock, since it takes a while
        with self._changed:
            if self._is_known(request):  # it may have one now
                return []
            superseded = self._supersede(request, found.key)
            if superseded is None or not self._make_room(request):
                return []
            job = Job(one=request, look=found, arrived=time.monotonic(), lane=self._lane(request))
            self._add(job)
            self._line_up(job)
            return superseded

    def _is_known(self, request: AnyObject) -> bool:
        """Whether the object has a job; if so, give the job this version."""
        if (worked_at := self._working.get(request.uid)) is not None:
            worked_at.later, worked_at.removed = request, False
            return True
        known = self._jobs.get(request.uid)
        if known is None:
            return False
        if known.one.version != request.version:
            self._count(known.one, -1)
            known.one = request
            self._count(request, 1)
            if known.delay:
                self._line_up(known)
        return True

    def has_room(self) -> bool:
        """Whether half of the queue is free."""
        with self._changed:
            return 2 * self._bytes <= MOST_BYTES and 2 * len(self._jobs) <= MOST_JOBS

    def _make_room(self, request: AnyObject) -> bool:
        """Whether the object fits, after requesters with more waiting than its own have lost some."""
        user = request.request.username
        while self._bytes + request.size > MOST_BYTES or len(self._jobs) >= MOST_JOBS:
            greediest = self.greediest()
            if self._shares[greediest] <= self._shares[user] + request.size:
                return False
            candidates = [job for job in self._jobs.values() if job.one.request.username == greediest]
            # prefer a job without any work yet: the others may have a certificate already
            self._remove(next((job for job in candidates if not job.begun), candidates[0]).one.uid)
            self.overflowed = True
        return True

    def greediest(self) -> str:
        """Return the requester with the most bytes waiting; empty: no request waits."""
        with self._changed:
            return max(self._shares, key=lambda name: self._shares[name], default="")

    def _line_up(self, job: Job) -> None:
        """Add a job to its user's line; the lines take turns, so that a flood delays no other user."""
        if job.lane not in self._lanes:
            self._lanes[job.lane] = _Lane(self._most)
        job.delay = 0  # so that its entry in the heap no longer counts
        self._lanes[job.lane].ready.setdefault(job.one.request.username, {})[job.one.uid] = job
        self._changed.notify()

    def _add(self, job: Job) -> None:
        self._jobs[job.one.uid] = job
        self._count(job.one, 1)

    def _pop(self, uid: str) -> Job | None:
        job = self._jobs.pop(uid, None)
        if job is not None:
            self._count(job.one, -1)
        return job

    def _count(self, request: AnyObject, sign: int) -> None:
        user = request.request.username
        self._bytes += sign * request.size
        self._shares[user] += sign * request.size
        if self._shares[user] <= 0:
            del self._shares[user]

    def _supersede(self, request: AnyObject, key: str) -> list[str] | None:
        """Return the uids that this object supersedes; None: a newer object is known."""
        if not key:
            return []
        known = self._newest.get(key)
        if known is not None and known[1] == request.uid:
            return []
        if request.uid in self._older or (known is not None and known[0] > request.age_key):
            remember(self._older, request.uid, None, _MOST_REMEMBERED)
            return None
        remember(self._newest, key, (request.age_key, request.uid), _MOST_REMEMBERED)
        if known is None:
            return []
        remember(self._older, known[1], None, _MOST_REMEMBERED)
        self._remove(known[1])
        return [known[1]]

    def is_newest(self, job: Job) -> bool:
        """Whether no newer job of its key has come."""
        with self._changed:
            known = self._newest.get(job.look.key)  # an empty key is never in it
            return known is None or known[1] == job.one.uid

    def remove(self, uid: str) -> bool:
        """Remove an object that is finished or gone; True: a thread is working on it."""
        with self._changed:
            self._remove(uid)
            job = self._working.get(uid)
            if job is not None:
                job.removed, job.later = True, None
            return job is not None

    def _remove(self, uid: str) -> None:
        job = self._pop(uid)
        if job is not None:
            job.delay = 0
            self._lanes[job.lane].withdraw(job)
            if len(self._delayed) > 2 * len(self._jobs) + _MOST_REMOVED:  # withdrawn jobs stay until due
                self._delayed = [(due, number, job) for due, number, job in self._delayed if job.delay == number]
                heapq.heapify(self._delayed)

    def take(self, seconds: float) -> Job | None:
        """Return the next job, to end by `done` or `delay`; None: none came in time, or the queue is closed."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                now = time.monotonic()
                self._line_up_due(now)
                if (job := self._next()) is not None:
                    self._changed.notify()  # or no thread may be waiting for the next delayed job
                    return job
                if self._closed or now >= deadline:
                    return None
                due = self._delayed[0][0] if self._delayed else math.inf
                self._changed.wait(min(due, deadline) - now)

    def _line_up_due(self, now: float) -> None:
        while self._delayed and (self._delayed[0][0] <= now or self._delayed[0][2].delay != self._delayed[0][1]):
            _, number, job = heapq.heappop(self._delayed)
            if job.delay == number:
                self._line_up(job)

    def _next(self) -> Job | None:
        name = next((name for name, lane in self._lanes.items() if lane.is_due()), None)
        if name is None:
            return None
        lane = self._lanes[name] = self._lanes.pop(name)  # served last, so it goes last
        lane.working += 1
        job = lane.pop()
        self._working[job.one.uid] = job
        self._pop(job.one.uid)
        return job

    def _end_work(self, job: Job) -> AnyObject | None:
        """End the work on a job; return the object's newer version if it changed meanwhile."""
        del self._working[job.one.uid]
        lane = self._lanes[job.lane]
        lane.working -= 1
        self._changed.notify()
        later, job.later = job.later, None
        return later if later is not None and later.version != job.one.version else None

    def done(self, job: Job) -> None:
        """End the work on a job; queue it again if its object changed meanwhile."""
        with self._changed:
            later = self._end_work(job)
        if later is not None and not later.is_finished:
            self.put(later, lambda _: job.look)

    def delay(self, job: Job, seconds: float) -> None:
        """Put a job back for `seconds`, or until its object changes, unless it was removed meanwhile."""
        with self._changed:
            later = self._end_work(job)
            job.one = later or job.one
            if self._closed or job.removed or job.one.is_finished:
                return
            self._add(job)
            if later is not None:
                self._line_up(job)
            else:
                job.delay = next(self._order)
                heapq.heappush(self._delayed, (time.monotonic() + seconds, job.delay, job))
                self._changed.notify()

    def wake(self) -> None:
        """Make all delayed jobs due now, because something has changed."""
        with self._changed:
            for _, number, job in self._delayed:
                if job.delay == number:
                    self._line_up(job)
            self._delayed.clear()
            self._changed.notify_all()

    def forget(self) -> None:
        """Drop all jobs: another replica works from now on."""
        with self._changed:
            for job in self._working.values():
                job.removed, job.later = True, None
            self._reset()

    def close(self) -> None:
        """Give out no more jobs, and drop those that no thread works on."""
        with self._changed:
            self._closed = True
            for lane in self._lanes.values():
                lane.ready.clear()
            self._changed.notify_all()

    def counts(self) -> tuple[int, int]:
        """Return how many jobs wait, and how many are in progress."""
        with self._changed:
            return len(self._jobs), len(self._working)
