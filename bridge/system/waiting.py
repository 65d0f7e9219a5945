"""
Waiting: for an event, after failures, for threads, for a turn among threads; and the interruption of a run by Ctrl-C
(SIGINT) or SIGTERM.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

K = TypeVar("K")
R = TypeVar("R")
T = TypeVar("T")
V = TypeVar("V")
#: More doublings would only enlarge a number that is capped anyway.
_MOST_DOUBLINGS = 30


def wait_until(
    look: Callable[[], T],
    is_enough: Callable[[T], bool],
    limit: timedelta,
    *,
    pause_seconds: float | Callable[[T], float],
    between: Callable[[T], object] = lambda _: None,
) -> T:
    """
    Look until the result is enough, and return the last look, which begins when the time is over; `between` may end it.
    A function for `pause_seconds` gets what was seen.

    A look during which the time ran out is not the last: the machine may have stalled in it.
    """
    end = time.monotonic() + limit.total_seconds()
    while True:
        is_last = time.monotonic() >= end
        if is_enough(seen := look()):
            return seen
        between(seen)
        if is_last:
            return seen
        pause = pause_seconds(seen) if callable(pause_seconds) else pause_seconds
        time.sleep(max(0.0, min(end - time.monotonic(), pause)))


def back_off_seconds(failures: int, first: float, longest: float) -> float:
    """The pause after a number of failures in a row, counted from 0; each pause is twice the one before."""
    return min(first * 2.0 ** min(failures, _MOST_DOUBLINGS), longest)


# --- a time limit -----------------------------------------------------------------------------------------------------


def within(seconds: float, work: Callable[[], T]) -> T:
    """Call `work` in a thread, since a resolver has no timeout; after a TimeoutError its late result is closed."""
    from concurrent.futures import Future  # noqa: PLC0415 (every command loads this module)

    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as e:  # noqa: BLE001 (the caller's thread raises it)
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        future.add_done_callback(_close)
        raise


def _close(late: Future[Any]) -> None:
    if late.exception() is None and hasattr(late.result(), "close"):
        late.result().close()


# --- an interruption --------------------------------------------------------------------------------------------------

_WAKE_SECONDS = 1.0


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, which ends a run like Ctrl-C: cleanup on the way out still runs."""


def listen() -> None:
    """Make SIGTERM raise TerminatedError in the main thread, unless our parent ignores it, and make exit codes visible."""
    # a parent that ignores SIGCHLD passes that on, and the kernel then drops each exit code: Python takes it for 0
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminated)
    # a timer wakes that thread, or Python would handle a signal only after a wait; children inherit no timers
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, _WAKE_SECONDS, _WAKE_SECONDS)


def _terminated(*_: object) -> NoReturn:
    raise TerminatedError


def exit_code(error: KeyboardInterrupt) -> int:
    """128 plus the signal's number, like a shell: 130 or 143."""
    return 128 + (signal.SIGTERM if isinstance(error, TerminatedError) else signal.SIGINT)


@contextlib.contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that are waited for, unless the run is interrupted: then they are abandoned, and the process ends."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 (every command loads this module)

    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    except BaseException:
        pool.shutdown()
        raise
    pool.shutdown()


def remember(known: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    """Keep a value as the newest; above `most` the oldest is dropped, since strangers choose the keys."""
    known[key] = value
    known.move_to_end(key)
    if len(known) > most:
        known.popitem(last=False)


#: A result that strangers may request is kept this many times as long as it took to get; the limit is for stalls.
_CACHED_TIMES, _LONGEST_CACHED_SECONDS = 20, 5.0


class CachedResult(Generic[T]):
    """A result that strangers may request at will, at a twentieth of a processor at most. Usable from any thread."""

    def __init__(self, look: Callable[[], T]) -> None:
        self._look = look
        self._mutex = threading.Lock()
        self._seen: list[T] = []  # the last result, if there is one
        self._good_until = 0.0

    def __call__(self) -> T:
        """Return the last result, or a new one."""
        with self._mutex:
            began = time.monotonic()
            if not self._seen or began >= self._good_until:
                self._seen = [self._look()]
                ended = time.monotonic()
                self._good_until = ended + min(_CACHED_TIMES * (ended - began), _LONGEST_CACHED_SECONDS)
            return self._seen[0]


_MOST_BUCKETS = 10_000
_MINUTE_SECONDS = 60.0


class Rate:
    """A rate limit for each name: so many a minute, all at once after a quiet minute; as many more may queue."""

    def __init__(self, a_minute: int) -> None:
        self._a_minute = a_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def reserve(self, name: str, now: float) -> float | None:
        """Reserve a turn, and return the seconds until then; None: the queue is full."""
        left = self._left(name, now)
        if left <= -self._a_minute:
            return None
        remember(self._buckets, name, (left - 1, now), _MOST_BUCKETS)
        return max(0.0, 1 - left) * _MINUTE_SECONDS / self._a_minute

    def take(self, name: str, now: float) -> float:
        """Take a turn now, and return 0; otherwise return the seconds until a new try, and reserve nothing."""
        left = self._left(name, now)
        if left < 1:
            return (1 - left) * _MINUTE_SECONDS / self._a_minute
        self.reserve(name, now)
        return 0.0

    def _left(self, name: str, now: float) -> float:
        left, since = self._buckets.get(name, (float(self._a_minute), now))
        return min(float(self._a_minute), left + (now - since) * self._a_minute / _MINUTE_SECONDS)


# --- few places, and many addresses that want them --------------------------------------------------------------------


class FairQueue(Generic[T]):
    """
    A number of places, and a queue for each address, which take turns; the caller holds a lock.

    One address gets at most three quarters of the places, so that other addresses find a place, however long its own
    requests take; beyond that it waits for its own, and only other limits turn it away.
    """

    def __init__(self, places: int) -> None:
        self._free, self._most = places, places - places // 4
        self._has: Counter[str] = Counter()
        self._lines: dict[str, deque[T]] = {}  #: The address that was served last is last.

    def wait(self, peer: str, item: T) -> None:
        """Append an item to its address's queue."""
        self._lines.setdefault(peer, deque()).append(item)

    def withdraw(self, peer: str, item: T) -> bool:
        """Remove an item from its queue; False: it is no longer there."""
        line = self._lines.get(peer, deque())
        if item not in line:
            return False
        line.remove(item)
        if not line:
            del self._lines[peer]
        return True

    def next(self) -> tuple[str, T] | None:
        """The next address and item that get a place; None: no place is free for those that wait."""
        peer = next((peer for peer in self._lines if self._free and self._has[peer] < self._most), None)
        if peer is None:
            return None
        line = self._lines.pop(peer)
        item = line.popleft()
        if line:
            self._lines[peer] = line
        self._free -= 1
        self._has[peer] += 1
        return peer, item

    def open(self) -> None:
        """From now on give every item a place."""
        self._free = self._most = sys.maxsize

    def give_back(self, peer: str) -> None:
        """Free a place of this address."""
        self._free += 1
        self._has[peer] -= 1
        if not self._has[peer]:
            del self._has[peer]


class FairSemaphore:
    """A number of places that threads wait for, fairly by address."""

    def __init__(self, places: int) -> None:
        self._mutex = threading.Lock()
        self._shares = FairQueue[threading.Event](places)

    @contextlib.contextmanager
    def taken(self, peer: str, seconds: float) -> Iterator[bool]:
        """Run with a place; False: none became free in time."""
        turn = threading.Event()
        with self._mutex:
            self._shares.wait(peer, turn)
            self._call()
        if not turn.wait(seconds):
            with self._mutex:
                is_late = self._shares.withdraw(peer, turn)
            if is_late:
                yield False
                return
        try:
            yield True
        finally:
            with self._mutex:
                self._shares.give_back(peer)
                self._call()

    def _call(self) -> None:
        while (call := self._shares.next()) is not None:
            call[1].set()
