"""The gateway's election: a replica works while it holds the lease, and stops before another one may take it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from bridge.cluster.api import Api, NoAnswerError
from bridge.cluster.lease import Keeper, Lease

log = logging.getLogger("ca-bridge")

#: A renewed lease counts for this share of its duration, so that we stop a while before another one begins.
_SHARE = 0.7
#: So many durations, by our settings, a replica waits for a holder that does not renew the lease.
_MOST_DURATIONS = 10


class Leader:
    """A replica's hold on the lease; without one (`Alone`) it always works."""

    def __init__(self, api: Api, path: tuple[str, str], identity: str, duration: timedelta) -> None:
        self._lease = Lease(api, path, identity, duration=duration, longest=_MOST_DURATIONS * duration)
        self._seconds = duration.total_seconds() * _SHARE
        self._good_until = 0.0
        self._said: str | None = None  #: The last trouble; None: nothing was logged yet.
        self._doubtful_before: datetime | None = None
        self._changed = threading.Condition()
        self._can_work: Callable[[], bool] = lambda: True
        self._keeper = Keeper(self._renew, duration)
        self.threads = (self._keeper.thread,)
        self.last_answer = time.monotonic()  #: When the API last answered.

    def start(self, can_work: Callable[[], bool]) -> None:
        """Begin to ask for it; while we can't work, another replica may have it."""
        self._can_work = can_work
        self._keeper.start()

    def is_ours(self) -> bool:
        """Whether we may work."""
        return time.monotonic() < self._good_until

    def doubtful_before(self) -> datetime | None:
        """When we took it from a replica that had not given it back, ourselves before a crash or an outage included."""
        return self._doubtful_before

    def wait(self, seconds: float) -> bool:
        """Wait for it to be ours."""
        with self._changed:
            return self._changed.wait_for(self.is_ours, seconds)

    def release(self) -> None:
        """Let the next replica have it at once; without an API it expires."""
        self._keeper.stop()
        self._give_back()

    def _give_back(self) -> None:
        if not self.is_ours():
            return
        self._good_until = 0.0
        try:
            self._lease.give_back()
        except NoAnswerError as e:
            log.warning("the lease %s was not given back, and expires: %s", self._lease.name, e)

    def _renew(self) -> None:
        if not self._can_work():
            self._give_back()
            self._say(f"the lease {self._lease.name} is left to others, since the record can't be written")
            return
        was_ours, began = self.is_ours(), time.monotonic()
        try:
            other = self._lease.take()
        except NoAnswerError as e:
            self._say(str(e))
            raise
        self.last_answer = time.monotonic()
        if other:
            self._good_until = 0.0
        else:
            if not was_ours:
                self._doubtful_before = datetime.now(UTC) if self._lease.taken_from else None
            self._good_until = began + self._seconds
        self._say(f"standing by: {other} has the lease {self._lease.name}" if other else "")
        with self._changed:
            self._changed.notify_all()

    def _say(self, trouble: str) -> None:
        if trouble != self._said:
            self._said = trouble
            (log.warning if trouble else log.info)("%s", trouble or f"the lease {self._lease.name} is ours")


class Alone:
    """There is no other replica (`lease = false`)."""

    threads = ()

    def __init__(self) -> None:
        self._began = datetime.now(UTC)

    def doubtful_before(self) -> datetime | None:
        """The beginning of this run, since the run before it may have died."""
        return self._began

    def start(self, _: Callable[[], bool]) -> None:
        """Do nothing."""

    def is_ours(self) -> bool:
        """Always."""
        return True

    def wait(self, _: float) -> bool:
        """No wait."""
        return True

    def release(self) -> None:
        """Do nothing."""
