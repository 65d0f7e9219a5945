"""
Restart a static pod as its kubelet likes it: manifest out, wait until the pod is forgotten, manifest back, wait for health.

A kubelet that has forgotten a pod deletes its mirror in the API. When that API server has no etcd meanwhile, the request
hangs, and the kubelet does nothing else for 34 s, over and over: five times were seen. A quorum elsewhere does not help,
since kubeadm lets a control plane's kubelet ask its own API server, and that its own etcd (measured on 1.37: 145 s with
three members). So etcd's manifest comes back while the pod still ends, and etcd is back after 10 s.

The journal is written before the manifest leaves its directory, so that whatever ends this process, `recover` brings
the manifest back. Not here: whether this is a good moment (`bridge.restarting`), and what health is (`bridge.health`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal

from bridge.errors import BridgeError, Exit, PostponedError
from bridge.expiry import duration_text
from bridge.files import Attributes, sync_directory, write_atomically, write_staged
from bridge.install import STAGED_PREFIX, attributes_from, attributes_json, digest
from bridge.specs import Component
from bridge.store import Store

#: leaving: the manifest may still be in its place; out: it is not; back: it is there again, but nobody has seen the
#: component in good health.
State = Literal["leaving", "out", "back"]
Tell = Callable[[str], None]

_POLL_SECONDS = 0.2


class RestartError(BridgeError):
    """A component was not restarted, or did not come back."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE


class StoppedError(PostponedError):
    """A signal ended the run in the middle of a restart; the manifest is back."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE
    hint = "run again: the next `ca-bridge renew` or `ca-bridge restart` goes on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A static pod, and who looks at it."""

    component: Component
    manifest: Path
    instances: Callable[[], frozenset[str]]  #: What of it runs: names for people, different after a restart.
    trouble: Callable[[], str | None]  #: Why it is not healthy; None: it is.
    settle: timedelta  #: How long a kubelet needs after its end to forget it; too early back costs 10 to 25 s.
    is_needed_by_api: bool = False  #: The API server that the kubelet asks can't write without it: see above.


def aside(manifest: Path) -> Path:
    """
    Where a manifest waits: on the same file system, and where no kubelet looks.

    A kubelet takes every file of its directory for a manifest, whatever its name ends with.
    """
    return manifest.parent.resolve().parent / f"{STAGED_PREFIX}{manifest.name}"


def restart(pod: Pod, store: Store, timeout: timedelta, tell: Tell) -> None:
    """
    Restart it, and wait until it is healthy.

    Args:
        pod: Its manifest is there.
        store: Its lock is held, and `recover` was called.
        timeout: For it to end, and again for it to come back.
        tell: Is told each step.

    Raises:
        RestartError: It did not end, or not come back, in time; the manifest is in its place.
        StoppedError: By a signal; the manifest is in its place.
        OSError: The manifest could not be moved out; or not back, then the journal stays for `recover`.
    """
    name, journal, before = pod.component.value, _journal(pod), pod.instances()
    with _signals_wait() as check:
        try:
            try:
                _enter(store, journal, "leaving")
                tell(f"{name}: its manifest moves to {aside(pod.manifest)}")
                pod.manifest.rename(aside(pod.manifest))
                _sync(pod.manifest)
                _enter(store, journal, "out")
                if pod.is_needed_by_api:
                    _wait(pod.component, "to begin to end", lambda: _begun(pod, before), timeout, check)
                    _settle(_UNDER_WAY, check)
                else:
                    _wait(pod.component, "to end", lambda: _named(pod.instances()), timeout, check)
                    _settle(pod.settle, check)
            finally:
                _put_back(store, journal)
            _enter(store, journal, "back")
            tell(f"{name}: its manifest is back")
            _wait(pod.component, "to end", lambda: _named(before & pod.instances()), timeout, check)
            _wait(pod.component, "to be healthy", pod.trouble, timeout, check)
        finally:
            if _is_there(pod.manifest):
                _close(store)


def recover(store: Store) -> str | None:
    """
    Put back the manifest that an interrupted restart has moved away.

    Args:
        store: Its lock is held.

    Returns:
        What was found and done; None if there was nothing to do.

    Raises:
        RestartError: The journal can't be read.
        OSError: The manifest can't be put back; the journal stays.
    """
    if not store.restart.exists():
        return None
    journal = _read(store)
    done = _put_back(store, journal)
    _close(store)
    name, state = journal["component"], journal["state"]
    if done is not None:
        return f"{name}: an interrupted restart had moved its manifest away: {done}"
    if state == "leaving":
        return f"{name}: an interrupted restart had not begun; its manifest is in its place"
    return f"{name}: a restart was interrupted before {name} was seen healthy; its manifest is in its place"


# --- the manifest and the journal ------------------------------------------------------------------------------------


def _journal(pod: Pod) -> dict[str, Any]:
    """With the whole manifest, so that it comes back even if somebody takes the file that was moved away."""
    try:
        content, attributes = pod.manifest.read_bytes(), Attributes.of(pod.manifest)
    except OSError as e:
        raise RestartError(f"{pod.manifest}: wanted the manifest of {pod.component.value}, found: {e.strerror}") from e
    return {
        "version": 1,
        "component": pod.component.value,
        "manifest": str(pod.manifest),
        "aside": str(aside(pod.manifest)),
        "content": base64.b64encode(content).decode(),
        "attributes": attributes_json(attributes),
    }


def _enter(store: Store, journal: dict[str, Any], state: State) -> None:
    journal["state"] = state
    write_atomically(store.restart, json.dumps(journal).encode() + b"\n")


def _read(store: Store) -> dict[str, Any]:
    try:
        journal: dict[str, Any] = json.loads(store.restart.read_bytes())
        if {"component", "manifest", "aside", "content", "attributes", "state"} <= journal.keys():
            return journal
        reason = "something else"
    except (OSError, ValueError, AttributeError) as e:
        reason = f"{e}"
    raise RestartError(
        f"{store.restart}: wanted our own journal of a restart, found {reason}",
        hint=f"see that each manifest is in its place (and none is called {STAGED_PREFIX}….yaml), then remove it",
    )


def _put_back(store: Store, journal: dict[str, Any]) -> str | None:
    """
    See that a manifest is in its place; may be repeated.

    Somebody else's new manifest (kubeadm's, an operator's) stays; then ours goes to the state directory.

    Returns:
        What had to be done; None: it was in its place, and nowhere else.
    """
    manifest, waiting = Path(journal["manifest"]), Path(journal["aside"])
    content, done = base64.b64decode(journal["content"]), None
    if not _is_there(manifest):
        if not _is_whole(waiting, content):
            waiting.unlink(missing_ok=True)
            write_staged(waiting, content, attributes_from(journal["attributes"]))
        waiting.rename(manifest)
        done = f"{manifest} is back"
    elif _is_there(waiting):
        if manifest.read_bytes() != content:
            kept = store.directory / f"{manifest.stem}-{digest(content)[:8]}.yaml"
            write_atomically(kept, content)
            done = f"there is a new {manifest}, which stays; the old one is {kept}"
        waiting.unlink()
    _sync(manifest)
    return done


def _is_whole(waiting: Path, content: bytes) -> bool:
    """Whether it is more than the rest of a `recover` that was itself interrupted."""
    if waiting.is_symlink():
        return True
    try:
        return waiting.exists() and waiting.read_bytes() == content
    except OSError:  # a file that can't be read may still be moved
        return True


def _is_there(path: Path) -> bool:
    """A symlink is moved as such, and may lead nowhere while it is away."""
    return path.exists() or path.is_symlink()


def _sync(manifest: Path) -> None:
    for directory in (manifest.parent, aside(manifest).parent):
        sync_directory(directory)


def _close(store: Store) -> None:
    store.restart.unlink(missing_ok=True)
    sync_directory(store.directory)


# --- waiting ---------------------------------------------------------------------------------------------------------


def _wait(
    component: Component,
    what: str,
    look: Callable[[], str | None],
    timeout: timedelta,
    check: Callable[[], None],
) -> None:
    """
    Look until nothing is found.

    Raises:
        RestartError: Something still was when the time was over.
        StoppedError: From `check`.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while (found := look()) is not None:
        check()
        if time.monotonic() > deadline:
            raise RestartError(
                f"{component.value}: wanted it {what} within {duration_text(timeout)}, found: {found}",
                hint="its manifest is in its place; the logs of the kubelet and of the container tell more",
            )
        time.sleep(_POLL_SECONDS)


def _begun(pod: Pod, before: frozenset[str]) -> str | None:
    """None as soon as the kubelet has seen that the manifest is out."""
    is_over = pod.trouble() is not None or not before & pod.instances()
    return None if is_over else "it goes on as if nothing had happened"


def _named(instances: frozenset[str]) -> str | None:
    return ", ".join(sorted(instances)) or None


#: The kubelet has got everything under way by then, and etcd takes 7 s to end.
_UNDER_WAY = timedelta(seconds=2)


def _settle(time_: timedelta, check: Callable[[], None]) -> None:
    deadline = time.monotonic() + time_.total_seconds()
    while (left := deadline - time.monotonic()) > 0:
        check()
        time.sleep(min(left, _POLL_SECONDS))


@contextlib.contextmanager
def _signals_wait() -> Iterator[Callable[[], None]]:
    """
    Let what ends a run (systemd, a lost terminal, Ctrl-C) leave time to put the manifest back.

    What is given raises a StoppedError after the first signal; it is called where that does no harm. Signals belong
    to the main thread; in another one nothing changes, and `recover` does the rest.
    """
    caught: list[int] = []

    def check() -> None:
        if caught:
            raise StoppedError(f"stopped by {signal.Signals(caught[0]).name} in the middle of a restart")

    if threading.current_thread() is not threading.main_thread():
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
