"""When to ask an unavailable CA again: a run waits for it, a service leaves it alone for a while."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type

from bridge.errors import BackendRefusedError, BackendUnavailableError, LocalFileError
from bridge.system.console import is_attended, log
from bridge.system.waiting import back_off_seconds

_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 15.0
_FIRST_REST_SECONDS, _LONGEST_REST_SECONDS = 1.0, 30.0
#: How often another thread of a service tries a CA that was away, if it keeps the previous thread waiting.
_TRIED_SECONDS = 5.0

T = TypeVar("T")


class WaitPolicy:
    """Waits for an unavailable CA in one run: `retry_for` from its first failure in a row, over all requests."""

    def __init__(
        self, retry_for: timedelta, label: str = "", tell: Callable[[str], None] = lambda text: log.info("%s", text)
    ) -> None:
        """`tell` gets one message per outage: the cause, and until when we try again; `-v` shows each further try."""
        self._retry_for_seconds = retry_for.total_seconds()
        self._label = label
        self._tell = tell
        self._lock = threading.Lock()
        self._since: float | None = None
        self._reported_since: float | None = None
        self._gave_up: BackendUnavailableError | None = None

    def ask(self, question: Callable[[], T]) -> T:
        """Ask, and ask again while the CA is unavailable; after giving up once, fail at once."""
        if self._gave_up is not None:
            raise BackendUnavailableError(str(self._gave_up), hint=self._gave_up.hint)
        policy = Retrying(
            retry=retry_if_exception_type(BackendUnavailableError),
            stop=lambda state: (
                self._is_over(state.upcoming_sleep) or (is_attended() and _is_connection_refused(_error_of(state)))
            ),
            wait=lambda state: _wait(state.attempt_number, _error_of(state)),
            before_sleep=lambda state: self._report(state.upcoming_sleep, _error_of(state)),
            reraise=True,
        )
        try:
            return policy(lambda: self._once(question))
        except BackendUnavailableError as e:
            self._gave_up = e
            raise

    def _once(self, question: Callable[[], T]) -> T:
        try:
            answer = question()
        except BackendUnavailableError:
            with self._lock:
                self._since = self._since or time.monotonic()
            raise
        except BackendRefusedError as e:
            if not isinstance(e, LocalFileError):  # a refusal is an answer
                self._is_there()
            raise
        self._is_there()
        return answer

    def _is_there(self) -> None:
        with self._lock:
            self._since = None

    def _report(self, upcoming_sleep_seconds: float, error: BaseException | None) -> None:
        with self._lock:
            since, is_new = self._since, self._reported_since != self._since
            self._reported_since = since
        left = self._retry_for_seconds - (time.monotonic() - since if since is not None else 0.0)
        until = datetime.now(UTC) + timedelta(seconds=max(0.0, left))
        about = f"{self._label}: {error}" if self._label else f"{error}"
        stops = "; Ctrl-C stops it" if is_attended() else ""
        if is_new:
            self._tell(f"{about}; asked again until {until:%H:%M:%S} UTC (retry_for){stops}")
        log.debug("%s; asked again in %.1f s, until %s UTC", about, upcoming_sleep_seconds, f"{until:%H:%M:%S}")

    def _is_over(self, upcoming_sleep_seconds: float) -> bool:
        with self._lock:  # another thread's success may have ended the outage: then a new one begins just now
            lasted = time.monotonic() - self._since if self._since is not None else 0.0
            return lasted + upcoming_sleep_seconds > self._retry_for_seconds


def _error_of(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _wait(attempt: int, error: BaseException | None) -> float:
    """Seconds to wait: the CA's own `Retry-After` if it is longer than our pause."""
    wanted = error.retry_after_seconds if isinstance(error, BackendUnavailableError) else None
    return max(back_off_seconds(attempt - 1, _FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS), wanted or 0.0)


def _is_connection_refused(error: BaseException | None) -> bool:
    """Whether nothing listens at the CA's port, or no route leads there: a person wants to know that at once."""
    reasons = (os.strerror(code).lower() for code in (errno.ECONNREFUSED, errno.ENETUNREACH))
    return any(reason in str(error).lower() for reason in reasons)


class NoWaitPolicy:
    """A policy that never waits: after a failure, leave the CA alone for `seconds_left`, longer each time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures = 0
        self._failed = 0.0  # time of the latest failure
        self._answered = 0.0
        self._until = 0.0

    def seconds_left(self) -> float:
        """How long to leave the CA alone."""
        return max(0.0, self._until - time.monotonic())

    def turn(self) -> float:
        """Seconds that the caller has to wait. After a failure, one caller at a time tries the CA; the others wait."""
        with self._lock:
            now = time.monotonic()
            left = max(0.0, self._until - now)
            if not left and self._failures:
                self._until = now + _TRIED_SECONDS
            return left

    def ask(self, question: Callable[[], T]) -> T:
        """Ask once; failures of concurrent questions count as one."""
        began = time.monotonic()
        try:
            answer = question()
        except BackendUnavailableError as e:
            with self._lock:
                now = time.monotonic()
                if self._answered > began:  # the CA is up, and stuck on this question alone
                    raise
                if began >= self._failed:
                    self._failures += 1
                self._failed = now
                rest = back_off_seconds(self._failures - 1, _FIRST_REST_SECONDS, _LONGEST_REST_SECONDS)
                # at least as long as the CA let us wait: other CAs lack the threads that it keeps
                wanted = min(max(e.retry_after_seconds or 0.0, now - began), _LONGEST_REST_SECONDS)
                self._until = max(self._until, now + max(rest, wanted))
            raise
        except BackendRefusedError as e:
            if not isinstance(e, LocalFileError):  # a refusal is an answer
                self._is_there(began)
            raise
        self._is_there(began)
        return answer

    def _is_there(self, began: float) -> None:
        with self._lock:
            self._failures, self._answered = 0, time.monotonic()
            if began >= self._failed:
                self._until = 0.0


#: The policy for a question while the CA is unavailable; a refusal is raised at once.
Retry = WaitPolicy | NoWaitPolicy
