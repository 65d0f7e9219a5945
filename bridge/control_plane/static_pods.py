"""
Restart a static pod: manifest out, wait until the kubelet has forgotten the pod, manifest back, wait for health.

A kubelet that has forgotten a pod deletes its mirror in the API. While that API server has no etcd, the request hangs,
and the kubelet does nothing else for 34 s, up to five times. A quorum elsewhere does not help, since a control plane's
kubelet asks its own API server, and that asks its own etcd (measured on 1.37: 145 s with three members). So etcd's
manifest comes back while the pod still ends, and etcd is back after 10 s.

The journal is written before the manifest leaves its directory, so that `recover` can bring the manifest back after any
interruption.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

from bridge.errors import Exit, PostponedError
from bridge.pki.expiry import duration_text
from bridge.state.parked_manifest import RestartError, aside, close, enter, is_there, journal_of, put_back, sync
from bridge.state.store import Store
from bridge.system.console import log
from bridge.system.waiting import wait_until

_POLL_SECONDS = 0.2
_HEALTHY = "to be healthy"


class StoppedError(PostponedError):
    """A signal ended the run in the middle of a restart; the manifest is back."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE
    hint = "run again: the next `ca-bridge renew` or `ca-bridge restart` goes on"


class NotEndedError(RestartError):
    """The component still runs after its manifest was moved out of its directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A static pod, and the functions that look at it."""

    name: str  #: The component's, or the one in its manifest.
    manifest: Path
    instances: Callable[[], frozenset[str]]  #: What of it runs: names for people, different after a restart.
    trouble: Callable[[], str | None]  #: Why it is not healthy; None: it is.
    settle: timedelta  #: How long a kubelet needs after its end to forget it; too early back costs 10 to 25 s.
    is_needed_by_api: bool = False  #: The API server that the kubelet asks can't write without it: see above.
    content: bytes | None = None  #: The manifest comes back with this text; None: as it was.


def restart(pod: Pod, store: Store, timeout: timedelta) -> None:
    """
    Restart it, and wait until it is healthy; `timeout` is for its end, and again for its return.

    Raises:
        RestartError: It did not end, or not come back, in time; the manifest is in its place.
        StoppedError: By a signal; the manifest is in its place.
        OSError: The manifest could not be moved out; or not back, then the journal stays for `recover`.
    """
    name, before = pod.name, pod.instances()
    journal = journal_of(name, pod.manifest, pod.content)
    with _signals_wait() as check:
        try:
            try:
                enter(store, journal, "leaving")
                log.info("%s: its manifest moves to %s", name, aside(pod.manifest))
                pod.manifest.rename(aside(pod.manifest))
                sync(pod.manifest)
                enter(store, journal, "out")
                if pod.is_needed_by_api:
                    _wait(name, "to begin to end", lambda: _begun(pod, before), timeout, check)
                    _settle(_UNDER_WAY, check)
                else:
                    _wait(name, "to end", lambda: _named(pod.instances()), timeout, check)
                    _settle(pod.settle, check)
            finally:
                put_back(store, journal)
            enter(store, journal, "back")
            log.info("%s: its manifest is back", name)
            _wait(name, "to end", lambda: _named(before & pod.instances()), timeout, check)
            _wait(name, _HEALTHY, pod.trouble, timeout, check)
        finally:
            if is_there(pod.manifest):
                close(store)


def _wait(name: str, what: str, look: Callable[[], str | None], timeout: timedelta, check: Callable[[], None]) -> None:
    """Look until nothing is found (RestartError: the time is over)."""
    found = wait_until(
        look, lambda found: found is None, timeout, pause_seconds=_POLL_SECONDS, between=lambda _: check()
    )
    if found is not None:
        kind = RestartError if what == _HEALTHY else NotEndedError
        hint = "its manifest is in its place; the logs of the kubelet and of the container tell more"
        raise kind(f"{name}: wanted it {what} within {duration_text(timeout)}, found: {found}", hint=hint)


def _begun(pod: Pod, before: frozenset[str]) -> str | None:
    """A sentence until the kubelet has noticed that the manifest is out."""
    is_over = pod.trouble() is not None or not before & pod.instances()
    return None if is_over else "it still runs"


def _named(instances: frozenset[str]) -> str | None:
    return ", ".join(sorted(instances)) or None


#: The kubelet has got everything under way by then, and etcd takes 7 s to end.
_UNDER_WAY = timedelta(seconds=2)


def _settle(time_: timedelta, check: Callable[[], None]) -> None:
    wait_until(check, lambda _: False, time_, pause_seconds=_POLL_SECONDS)


@contextlib.contextmanager
def _signals_wait() -> Iterator[Callable[[], None]]:
    """Hold back signals until the manifest is back; yields a function that raises a StoppedError after one."""
    caught: list[int] = []

    def check() -> None:
        if caught:
            raise StoppedError(f"stopped by {signal.Signals(caught[0]).name} in the middle of a restart")

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals; `recover` does the rest
        yield check
        return
    ours = [one for one in _ENDING if signal.getsignal(one) is not signal.SIG_IGN]  # as nohup has it
    before = {one: signal.signal(one, lambda number, _: caught.append(number)) for one in ours}
    try:
        yield check
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    check()


_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
