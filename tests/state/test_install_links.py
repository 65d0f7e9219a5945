"""A symlink that is swapped with what it leads to, failed and killed at every system call: all old or all new."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.state import Store
from bridge.state.install import KEY_MASK, KUBECONFIG_MASK, InstallError, Replacement, fingerprint, install, recover

CALLS = ("open", "fsync", "fchmod", "rename", "unlink", "mkdir", "symlink")
CURRENT, OLD, NEW, CONF = "current.pem", "dated-1.pem", "dated-2.pem", "kubelet.conf"
#: More system calls than a whole run makes.
MOST = 120

Install = Callable[[Path, Store], Any]


def _make(directory: Path, before: str) -> None:
    """A kubelet's directory, with a symlink, a file in its place, or nothing."""
    directory.mkdir()
    (directory / OLD).write_bytes(b"old pair")
    (directory / CONF).write_bytes(b"old conf")
    if before == "link":
        (directory / CURRENT).symlink_to(directory / OLD)
    elif before == "file":
        (directory / CURRENT).write_bytes(b"old pair")


def _seen(directory: Path) -> dict[str, str]:
    """What is at each path itself."""
    return {path.name: str(fingerprint(path)) for path in directory.iterdir()}


def _install(directory: Path, store: Store) -> str:
    current, conf = directory / CURRENT, directory / CONF
    was = fingerprint(current)
    return install(
        store,
        [
            Replacement(certificate="x", path=directory / NEW, data=b"new pair", mode_mask=KEY_MASK, was=None),
            Replacement(
                certificate="x",
                path=current,
                data=None,
                mode_mask=KEY_MASK,
                was=was,
                is_link=True,
                leads_to=str(directory / NEW),
            ),
            Replacement(certificate="x", path=conf, data=b"new conf", mode_mask=KUBECONFIG_MASK, was=fingerprint(conf)),
        ],
        "run1",
        {},
    )


def _careless(directory: Path, _store: Store) -> None:
    """What a script would do, without a journal."""
    (directory / NEW).write_bytes(b"new pair")
    (directory / CURRENT).unlink(missing_ok=True)
    (directory / CURRENT).symlink_to(directory / NEW)
    (directory / CONF).write_bytes(b"new conf")


def _wrapped(call: Callable[..., Any], count: list[int], at: int, act: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == at:
            act()
        return call(*args, **kwargs)

    return wrapped


def _child(work: Callable[[], object], at: int, act: Callable[[], None]) -> int:
    """
    The exit code of a process in which something happens at the n-th system call.

    0: it did not make so many; 3: an installation's error; 4: it went on.
    """
    child = os.fork()
    if child == 0:
        count = [0]
        for name in CALLS:
            setattr(os, name, _wrapped(getattr(os, name), count, at, act))
        try:
            work()
        except InstallError:
            os._exit(3)
        os._exit(4 if count[0] >= at else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _die() -> None:
    os._exit(9)


def _halves(tmp_path: Path, before: str, work: Install, act: Callable[[], None]) -> tuple[int, list[int]]:
    """How many points there were, and those after which something is neither old nor new."""
    whole = tmp_path / "whole"
    _make(whole, before)
    old = _seen(whole)
    halves: list[int] = []
    for point in range(1, MOST):
        base = tmp_path / str(point)
        base.mkdir()
        store = Store(base / "state")
        store.prepare()
        (base / "x").mkdir()
        directory = whole.with_name(f"{point}") / "kubelet"
        _make(directory, before)
        old = _seen(directory)
        code = _child(lambda d=directory, s=store: work(d, s), point, act)  # type: ignore[misc]
        recover(store)
        found = _seen(directory)
        is_new = found.get(CURRENT) != old.get(CURRENT) and (directory / CONF).read_bytes() == b"new conf"
        is_whole = found == old or (is_new and (directory / CURRENT).read_bytes() == b"new pair" and len(found) == 4)
        halves += [] if is_whole else [point]
        if code == 0:
            return point, halves
    raise AssertionError(f"more than {MOST} system calls")


@pytest.mark.parametrize("act", [_die, _fail])
@pytest.mark.parametrize("before", ["link", "file", "nothing"])
def test_all_old_or_all_new_at_every_point(tmp_path: Path, before: str, act: Callable[[], None]) -> None:
    """Killed, or with an error of the file system, at each system call in turn; after the next run's recovery."""
    points, halves = _halves(tmp_path, before, _install, act)
    assert points > 40
    assert halves == []


def test_a_careless_swap_is_seen(tmp_path: Path) -> None:
    """The same look finds what a script without a journal leaves."""
    _, halves = _halves(tmp_path, "link", _careless, _die)
    assert halves


@pytest.mark.parametrize("before", ["link", "file", "nothing"])
def test_recovery_goes_back_to_what_was_there(tmp_path: Path, before: str) -> None:
    """A new file that is gone makes the installation go back, at whatever point that is cut off itself."""
    for point in range(1, MOST):
        directory, store = tmp_path / str(point) / "kubelet", Store(tmp_path / str(point) / "state")
        directory.parent.mkdir()
        store.prepare()
        _make(directory, before)
        old = _seen(directory)
        # the first of the new files is in its place, and the next one is lost
        renamed = _killed_at_rename(directory, store, 2)
        assert renamed
        (directory / f".ca-bridge-run1-{CONF}").unlink()
        code = _child(lambda s=store: recover(s), point, _die)  # type: ignore[misc]
        recover(store)
        assert _seen(directory) == old
        if code == 0:
            return
    raise AssertionError(f"more than {MOST} system calls")


def _killed_at_rename(directory: Path, store: Store, at: int) -> bool:
    child = os.fork()
    if child == 0:
        rename, count = os.rename, [0]

        def counting(source: Any, target: Any, **kwargs: Any) -> None:
            count[0] += ".ca-bridge-" in str(source)
            if count[0] == at + 1:
                os._exit(9)
            rename(source, target, **kwargs)

        setattr(os, "rename", counting)  # noqa: B010 (another signature)
        _install(directory, store)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_symlink_that_changed_since_stops_everything(tmp_path: Path) -> None:
    """A kubelet has rotated meanwhile: its own certificate stays, and so does everything else."""
    directory, store = tmp_path / "kubelet", Store(tmp_path / "state")
    store.prepare()
    _make(directory, "link")
    was = fingerprint(directory / CURRENT)
    (directory / "dated-3.pem").write_bytes(b"the kubelet's own")
    (directory / CURRENT).unlink()
    (directory / CURRENT).symlink_to(directory / "dated-3.pem")
    before = _seen(directory)
    with pytest.raises(InstallError, match="found another content"):
        install(
            store,
            [
                Replacement(certificate="x", path=directory / NEW, data=b"new", mode_mask=KEY_MASK, was=None),
                Replacement(
                    certificate="x",
                    path=directory / CURRENT,
                    data=None,
                    mode_mask=KEY_MASK,
                    was=was,
                    is_link=True,
                    leads_to=str(directory / NEW),
                ),
            ],
            "run1",
            {},
        )
    assert _seen(directory) == before
