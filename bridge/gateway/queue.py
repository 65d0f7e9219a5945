"""Waiting requests in their order or at their time, only the newest for a node."""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import field
from datetime import datetime
from typing import Any

from bridge import dataclass
from bridge.gateway.watch import AnyObject
from bridge.pki.verify import Verified
from bridge.system.waiting import remember

#: A flood waits in the API server, not here; it comes again with the next round of the watch. When the queue is full, the
#: requester with the most waiting requests loses some, so that a flood keeps no other requester out.
MOST_BYTES = 24 << 20
MOST_JOBS = 20_000
_MOST_REMEMBERED = 20_000
_MOST_REMOVED = 500
#: A CA that has not answered all of a lot by then gets a further one beside it: one request on which it hangs keeps no
#: others waiting but those of its lot.
_SLOW_SECONDS = 1.0
_MOST_LOTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a request says of itself, beside the files."""

    #: See `key_of`; empty: it may not be signed, or is about no node. Then it supersedes no other job, and no other job
    #: supersedes it: with a node's credentials and refused requests alone, its kubelet could be kept waiting for ever.
    key: str = ""
    is_known: bool = False  #: The inventory has the node.
    is_hostile: bool = False  #: It will be refused for its own words.


@dataclass(eq=False, kw_only=True)
class Job:
    """One object, and how far we are with it."""

    one: AnyObject
    look: Look
    arrived: float  #: Monotonic.
    lane: str = ""  #: The CA's name.
    lot: int = 0  #: The lot in which it is worked at.
    begun: bool = False  #: It has its turn by the rates.
    attempts: int = 0
    said: str = ""  #: The last reason why it was left, which is logged once.
    last_event: str = ""  #: The last reason in an event for the object's owner.
    verified: Verified | None = None  #: The CA's answer, not written yet.
    unrecorded: Verified | None = None  #: The CA's answer, which is not in the record yet.
    signed_for: tuple[object, ...] = ()  #: What the policy gave when `verified` was signed.
    facts: dict[str, Any] = field(default_factory=dict)  #: What each line of the audit log said about it then.
    was_asked: bool = False  #: The CA was asked, and its answer did not come.
    was_recalled: bool = False  #: Since then it was looked for, and was not there.
    later: AnyObject | None = None  #: A newer version, which has come while this one is worked at.
    removed: bool = False  #: While it is worked at.
    delay: int = 0  #: The number of its delay, while it has a time and no place in its lane's line.


def key_of(one: AnyObject, node: str | None) -> str:
    """Signer, user and node, of whose jobs only the newest counts: a kubelet reads only its newest request."""
    return f"{one.request.signer}\n{one.request.username}\n{node}"


class _Lane:
    """The jobs of one CA."""

    def __init__(self, most: int | None, most_lots: int) -> None:
        self._most_lots = most_lots
        self.most = most  #: Jobs in a lot; None: one job at a time, by as many threads as there are.
        #: By user, whose turn is next first, and by uid.
        self.ready: OrderedDict[str, dict[str, Job]] = OrderedDict()
        self.lots: Counter[int] = Counter()  #: Jobs that are worked at, by their lot.
        self.slow_at = 0.0  #: When the newest lot has taken too long.

    def due(self) -> float:
        """When a thread may take the next jobs; infinite: none are ready, or too many are worked at."""
        if not self.ready or len(self.lots) >= self._most_lots:
            return math.inf
        return self.slow_at if self.lots else -math.inf

    def withdraw(self, job: Job) -> None:
        """Take a job out of its line, if it is in one."""
        user = job.one.request.username
        line = self.ready.get(user, {})
        if line.pop(job.one.uid, None) is not None and not line:
            del self.ready[user]


class Queue:
    """May be used by any thread."""

    def __init__(
        self,
        lane: Callable[[AnyObject], str] = lambda _: "",
        lots: Mapping[str, int] | None = None,
        threads: int = _MOST_LOTS + 1,
    ) -> None:
        """
        Of a lane in `lots` one thread takes up to so many jobs at once, and no other thread takes any for a second; of all
        `threads` one is left for other lanes.
        """
        self._lane, self._most = lane, lots or {}
        self._most_lots = max(1, min(_MOST_LOTS, threads - 1))
        self._changed = threading.Condition()
        self._order, self._lots = itertools.count(1), itertools.count()
        self._lanes: dict[str, _Lane] = {}  # the lane that had its turn last is last
        self._working: dict[str, Job] = {}
        self._closed = False
        self._watched = math.inf  # when a thread wakes up for what is due then
        self._reset()

    def _reset(self) -> None:
        self._jobs: dict[str, Job] = {}  # by uid: waiting or delayed
        for lane in self._lanes.values():
            lane.ready.clear()
        self._delayed: list[tuple[float, int, Job]] = []
        self._newest: OrderedDict[str, tuple[tuple[datetime, int], str]] = OrderedDict()
        #: Uids that do not count: of two that were made in one second, a write on the older one gives it the greater version.
        self._older: OrderedDict[str, None] = OrderedDict()
        self._shares: Counter[str] = Counter()  # bytes by user
        self._bytes = 0
        self.overflowed = False

    def put(self, one: AnyObject, look: Callable[[AnyObject], Look]) -> list[str]:
        """Take in an object that is new or has changed; the uids of older objects of its key, which count no longer."""
        with self._changed:
            if self._is_known(one):
                return []
            if not self._make_room(one):
                self.overflowed = True
                return []
        found = look(one)  # without the lock: it takes a while
        with self._changed:
            if self._is_known(one):  # by now
                return []
            superseded = self._supersede(one, found.key)
            if superseded is None or not self._make_room(one):
                return []
            job = Job(one=one, look=found, arrived=time.monotonic(), lane=self._lane(one))
            self._add(job)
            self._line_up(job)
            return superseded

    def _is_known(self, one: AnyObject) -> bool:
        """Whether it has a job, which has this version from now on."""
        if (worked_at := self._working.get(one.uid)) is not None:
            worked_at.later, worked_at.removed = one, False
            return True
        known = self._jobs.get(one.uid)
        if known is None:
            return False
        if known.one.version != one.version:
            self._count(known.one, -1)
            known.one = one
            self._count(one, 1)
            if known.delay:
                self._line_up(known)
        return True

    def has_room(self) -> bool:
        """Whether half of the queue is free."""
        with self._changed:
            return 2 * self._bytes <= MOST_BYTES and 2 * len(self._jobs) <= MOST_JOBS

    def _make_room(self, one: AnyObject) -> bool:
        """Whether it fits, once requesters with more waiting than its own have lost some."""
        user = one.request.username
        while self._bytes + one.size > MOST_BYTES or len(self._jobs) >= MOST_JOBS:
            greediest = self.greediest()
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
            return max(self._shares, key=lambda name: self._shares[name], default="")

    def _line_up(self, job: Job) -> None:
        """Every user has a line, and the lines have their turns, so that a flood is in no other user's way."""
        if job.lane not in self._lanes:
            self._lanes[job.lane] = _Lane(self._most.get(job.lane), self._most_lots)
        job.delay = 0  # its place in the heap leads to nothing
        self._lanes[job.lane].ready.setdefault(job.one.request.username, {})[job.one.uid] = job
        self._wake_for(self._lanes[job.lane].due())

    def _wake_for(self, due: float) -> None:
        """Wake a thread, unless one wakes up by then: it takes what is due, or waits until it is."""
        if due < self._watched:
            self._changed.notify()

    def _add(self, job: Job) -> None:
        self._jobs[job.one.uid] = job
        self._count(job.one, 1)

    def _pop(self, uid: str) -> Job | None:
        job = self._jobs.pop(uid, None)
        if job is not None:
            self._count(job.one, -1)
        return job

    def _count(self, one: AnyObject, sign: int) -> None:
        user = one.request.username
        self._bytes += sign * one.size
        self._shares[user] += sign * one.size
        if self._shares[user] <= 0:
            del self._shares[user]

    def _supersede(self, one: AnyObject, key: str) -> list[str] | None:
        """The uids that this object supersedes; None: a newer one is known."""
        if not key:
            return []
        known = self._newest.get(key)
        if known is not None and known[1] == one.uid:
            return []
        if one.uid in self._older or (known is not None and known[0] > one.age_key):
            remember(self._older, one.uid, None, _MOST_REMEMBERED)
            return None
        remember(self._newest, key, (one.age_key, one.uid), _MOST_REMEMBERED)
        if known is None:
            return []
        remember(self._older, known[1], None, _MOST_REMEMBERED)
        self._remove(known[1])
        return [known[1]]

    def is_newest(self, job: Job) -> bool:
        """Whether no newer job of its key has come."""
        with self._changed:
            known = self._newest.get(job.look.key)  # never the empty one
            return known is None or known[1] == job.one.uid

    def remove(self, uid: str) -> bool:
        """Take an object out: it is finished, or gone. True: it is being worked at."""
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
            if len(self._delayed) > 2 * len(self._jobs) + _MOST_REMOVED:  # their time may keep them there for long
                self._delayed = [(due, number, job) for due, number, job in self._delayed if job.delay == number]
                heapq.heapify(self._delayed)

    def take(self, seconds: float) -> list[Job]:
        """The next jobs, for each of which `done` or `delay` has to be called; none came in time, or the queue is closed."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                now = time.monotonic()
                self._line_up_due(now)
                if jobs := self._next(now):
                    self._wake_for(self._due())  # this thread will not watch the time now
                    return jobs
                if self._closed or now >= deadline:
                    return []
                self._wait(now, deadline)

    def _line_up_due(self, now: float) -> None:
        while self._delayed and (self._delayed[0][0] <= now or self._delayed[0][2].delay != self._delayed[0][1]):
            _, number, job = heapq.heappop(self._delayed)
            if job.delay == number:
                self._line_up(job)

    def _due(self) -> float:
        """When there is something to do next."""
        delayed = self._delayed[0][0] if self._delayed else math.inf
        return min([delayed, *(lane.due() for lane in self._lanes.values())])

    def _next(self, now: float) -> list[Job]:
        for name in [name for name, lane in self._lanes.items() if lane.due() <= now]:
            lane = self._lanes[name] = self._lanes.pop(name)  # its next turn is after the others'
            if jobs := self._next_of(lane.ready, lane.most or 1):
                if lane.most is not None:
                    lot = next(self._lots)
                    lane.lots[lot], lane.slow_at = len(jobs), now + _SLOW_SECONDS
                    for job in jobs:
                        job.lot = lot
                return jobs
        return []

    def _next_of(self, ready: OrderedDict[str, dict[str, Job]], most: int) -> list[Job]:
        found: list[Job] = []
        while ready and len(found) < most:
            user, jobs = ready.popitem(last=False)
            job = jobs.pop(next(iter(jobs)))
            if jobs:
                ready[user] = jobs
            self._working[job.one.uid] = job
            self._pop(job.one.uid)
            found.append(job)
        return found

    def _wait(self, now: float, deadline: float) -> None:
        """Wait for a change; only one thread waits for the time of what is due, which would wake a hundred of them."""
        due = self._due()
        if due >= min(deadline, self._watched):
            self._changed.wait(deadline - now)
            return
        self._watched = due
        try:
            self._changed.wait(due - now)
        finally:
            if self._watched == due:
                self._watched = math.inf

    def _end_work(self, job: Job) -> AnyObject | None:
        """End the work on a job; its object as it is now, if that has changed meanwhile."""
        del self._working[job.one.uid]
        lane = self._lanes[job.lane]
        if lane.most is not None:
            lane.lots[job.lot] -= 1
            if not lane.lots[job.lot]:
                del lane.lots[job.lot]
                self._wake_for(lane.due())
        later, job.later = job.later, None
        return later if later is not None and later.version != job.one.version else None

    def done(self, job: Job) -> None:
        """End the work on a job, unless its object has changed meanwhile."""
        with self._changed:
            later = self._end_work(job)
        if later is not None and not later.is_finished:
            self.put(later, lambda _: job.look)

    def delay(self, job: Job, seconds: float) -> None:
        """Put a job back, unless it was removed meanwhile: it is looked at again after these seconds, or when its object changes."""
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
                self._wake_for(self._delayed[0][0])

    def wake(self) -> None:
        """Look at all delayed jobs at once: something has changed."""
        with self._changed:
            for _, number, job in self._delayed:
                if job.delay == number:
                    self._line_up(job)
            self._delayed.clear()
            self._changed.notify_all()

    def forget(self) -> None:
        """Another replica works from here on."""
        with self._changed:
            for job in self._working.values():
                job.removed, job.later = True, None
            self._reset()

    def close(self) -> None:
        """Take no new jobs, and forget those that are not being worked at."""
        with self._changed:
            self._closed = True
            for lane in self._lanes.values():
                lane.ready.clear()
            self._changed.notify_all()

    def counts(self) -> tuple[int, int]:
        """Waiting, and being worked at."""
        with self._changed:
            return len(self._jobs), len(self._working)
