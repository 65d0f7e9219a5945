"""
Restarts a static pod: manifest out, wait until the kubelet has forgotten the pod, manifest back, wait for health.

When a kubelet has forgotten a pod, it deletes its mirror in the API. While that API server has no etcd, the request
hangs, and the kubelet does nothing else for 34 s, up to five times. A quorum elsewhere does not help, since a control
plane's kubelet uses its own API server, and that uses its own etcd (measured on 1.37: 145 s with three members). So
etcd's manifest comes back while the pod is still ending, and etcd is back after 10 s.

The journal is written before the manifest leaves its directory, so that `recover` can restore the manifest after any
interruption.
"""

from __future__ import annotations

import base64
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal

from bridge.errors import BridgeError, Exit, PostponedError
from bridge.pki.expiry import duration_text
from bridge.state import Store, changed_here
from bridge.state.install import STAGED_PREFIX, attributes_from, attributes_json
from bridge.system.console import log
from bridge.system.files import Attributes, digest, exchange, reasons, sync_directory, write_atomically, write_staged
from bridge.system.state_file import OnDamage, StateFile, unsealed
from bridge.system.waiting import wait_until

_POLL_SECONDS = 0.2
_HEALTHY = "to be healthy"

#: leaving: the manifest may still be in its place; out: it is away; back: it is in place, and the component has not been
#: seen healthy yet.
ParkingState = Literal["leaving", "out", "back"]


class RestartError(BridgeError):
    """A component was not restarted, or did not come back."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE


class StoppedError(PostponedError):
    """A signal ended the run in the middle of a restart; the manifest is back in place."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE
    hint = "run again: the next `ca-bridge renew` or `ca-bridge restart` goes on"


class NotEndedError(RestartError):
    """The component still runs after its manifest left the directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A static pod, and functions that observe it."""

    name: str  #: The component's name, or the pod's name in its manifest.
    manifest: Path
    instances: Callable[[], frozenset[str]]  #: Running instances: readable names, which differ after a restart.
    trouble: Callable[[], str | None]  #: Why it is not healthy; None: it is healthy.
    settle: timedelta  #: How long a kubelet takes to forget an ended pod; too early back costs 10 to 25 s.
    is_needed_by_api: bool = False  #: The kubelet's API server can't write without it: see above.
    content: bytes | None = None  #: The manifest's new text; None: it comes back unchanged.


def restart(pod: Pod, store: Store, timeout: timedelta) -> None:
    """
    Restart a pod, and wait until it is healthy; `timeout` applies to its end, and again to its return.

    Raises:
        RestartError: It did not end, or did not come back, in time; the manifest is in its place.
        StoppedError: A signal stopped the run; the manifest is in its place.
        OSError: The manifest could not be moved out; or not back, and the journal stays for `recover`.
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
                restart_file(store).remove()


def _wait(name: str, what: str, look: Callable[[], str | None], timeout: timedelta, check: Callable[[], None]) -> None:
    """Wait until `look` finds nothing (RestartError: the time is over)."""
    trouble = wait_until(
        look, lambda trouble: trouble is None, timeout, pause_seconds=_POLL_SECONDS, between=lambda _: check()
    )
    if trouble is not None:
        kind = RestartError if what == _HEALTHY else NotEndedError
        hint = "its manifest is in its place; the logs of the kubelet and of the container tell more"
        raise kind(f"{name}: wanted it {what} within {duration_text(timeout)}, found: {trouble}", hint=hint)


def _begun(pod: Pod, before: frozenset[str]) -> str | None:
    """Return a sentence until the kubelet has noticed that the manifest is out."""
    is_over = pod.trouble() is not None or not before & pod.instances()
    return None if is_over else "it still runs"


def _named(instances: frozenset[str]) -> str | None:
    return ", ".join(sorted(instances)) or None


#: By then the kubelet has begun to end everything, and etcd takes 7 s to end.
_UNDER_WAY = timedelta(seconds=2)


def _settle(time_: timedelta, check: Callable[[], None]) -> None:
    wait_until(check, lambda _: False, time_, pause_seconds=_POLL_SECONDS)


@contextlib.contextmanager
def _signals_wait() -> Iterator[Callable[[], None]]:
    """Hold back signals until the manifest is back; yields a function that raises StoppedError after a signal."""
    caught: list[int] = []

    def check() -> None:
        if caught:
            raise StoppedError(f"stopped by {signal.Signals(caught[0]).name} in the middle of a restart")

    if threading.current_thread() is not threading.main_thread():  # only it gets signals; `recover` does the rest
        yield check
        return
    signals = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in signals}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    check()


_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


# --- the manifest while it is away: the journal, and the recovery after a crash -------------------------------------------


def aside(manifest: Path) -> Path:
    """The path for a manifest that is away: on the same file system, outside the directory whose files a kubelet reads."""
    return manifest.parent.resolve().parent / f"{STAGED_PREFIX}{manifest.name}"


def recover(store: Store) -> str | None:
    """Put back a manifest that an interrupted restart moved away, and return a sentence about it."""
    journal = restart_file(store).read()
    if journal is None:
        return None
    done = put_back(store, journal)
    restart_file(store).remove()
    name, state = journal["component"], journal["state"]
    if done is not None:
        return f"{name}: an interrupted restart had moved its manifest away: {done}"
    if state == "leaving":
        return f"{name}: an interrupted restart had not begun; its manifest is in its place"
    return f"{name}: a restart was interrupted before {name} was seen healthy; its manifest is in its place"


def journal_of(name: str, manifest: Path, content: bytes | None) -> dict[str, Any]:
    """A journal with the whole manifest to restore (None: unchanged), even if the moved file is lost."""
    if content is not None and manifest.is_symlink():
        raise RestartError(f"{manifest}: can't change the manifest of {name}: it is a symlink")
    with reasons(RestartError, f"{manifest}: can't change the manifest of {name}"):
        old, attributes = manifest.read_bytes(), Attributes.of(manifest)
    return {
        "component": name,
        "manifest": str(manifest),
        "aside": str(aside(manifest)),
        "content": base64.b64encode(old if content is None else content).decode(),
        "attributes": attributes_json(attributes),
    }


def replace(manifest: Path, content: bytes) -> None:
    """Replace a manifest's text in one step; it is staged outside, since a kubelet reads each file of its directory."""
    exchange(manifest, content, aside(manifest))
    changed_here.append(manifest)
    sync(manifest)


def enter(store: Store, journal: dict[str, Any], state: ParkingState) -> None:
    """Record the progress of a restart."""
    journal["state"] = state
    restart_file(store).replace(journal)


def restart_file(store: Store) -> StateFile[dict[str, Any]]:
    """The journal of a restart: while it exists, a component's manifest may be out of its directory."""
    return StateFile(
        path=store.restart,
        what="our own journal of a restart",
        parse=_journal_of,
        on_damage=OnDamage.REFUSE,
        afterwards=f"see that each manifest is in its place: one that is not may be called {STAGED_PREFIX}….yaml, "
        "in the directory above",
        exit_code=Exit.NOT_LIVE,
    )


def _journal_of(data: bytes) -> dict[str, Any]:
    """Parse a journal, which has the manifest's name twice."""
    document = unsealed(data)
    base64.b64decode(document["content"], validate=True)
    attributes_from(document["attributes"])
    manifest, waiting = Path(document["manifest"]), Path(document["aside"])
    if not isinstance(document["component"], str) or not document["component"].isprintable():
        raise TypeError("not written by this program")
    if waiting.name != f"{STAGED_PREFIX}{manifest.name}" or document["state"] not in ("leaving", "out", "back"):
        raise ValueError("not written by this program")
    return document


def put_back(store: Store, journal: dict[str, Any]) -> str | None:
    """Put a manifest in its place, and say what was done; a newer manifest of kubeadm's or an operator's stays."""
    manifest, waiting = Path(journal["manifest"]), Path(journal["aside"])
    content, done = base64.b64decode(journal["content"]), None
    if not is_there(manifest):
        if not _is_whole(waiting, content):
            waiting.unlink(missing_ok=True)
            write_staged(waiting, content, attributes_from(journal["attributes"]))
        waiting.rename(manifest)
        done = f"{manifest} is back"
    elif is_there(waiting):
        if manifest.read_bytes() != content:
            kept = store.directory / f"{manifest.stem}-{digest(content)[:8]}.yaml"
            write_atomically(kept, content)
            done = f"there is a new {manifest}, which stays; the old one is {kept}"
        waiting.unlink()
    sync(manifest)
    return done


def _is_whole(waiting: Path, content: bytes) -> bool:
    """Whether the waiting manifest is complete; a `recover` that was interrupted may leave a partial one."""
    if waiting.is_symlink():
        return True
    try:
        return waiting.exists() and waiting.read_bytes() == content
    except OSError:  # a file that can't be read can still be moved
        return True


def is_there(path: Path) -> bool:
    """Whether a file or symlink exists; a symlink's target may be missing while it is away."""
    return path.exists() or path.is_symlink()


def sync(manifest: Path) -> None:
    """Sync a manifest's directories, so that its move survives a power cut."""
    for directory in (manifest.parent, aside(manifest).parent):
        sync_directory(directory)
