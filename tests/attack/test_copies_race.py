"""The owner of the path to a copy changes it while root refreshes the copy: the program touches nothing outside of the user's home."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.node import inventory
from bridge.pki.certificates import fingerprint
from bridge.state import Store, audit, copies
from bridge.state.obligations import copies_file
from tests.kit.pki import handmade_pki
from tests.kit.renewing import settings_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users: run the tests as root")

ALICE = 12345
ROUNDS = 60
# renameat2(2)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def exchange(one: Path, other: Path) -> None:
    """Two names change places, at one moment."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), f"renameat2: {one}, {other}")


@contextlib.contextmanager
def exchanged(one: Path, other: Path) -> Iterator[threading.Lock]:
    """The two names are exchanged all the time; a caller that holds the lock finds both in their own places."""
    done, quiet = threading.Event(), threading.Lock()

    def attack() -> None:
        while not done.is_set():
            with quiet:
                exchange(one, other)
                exchange(one, other)

    thread = threading.Thread(target=attack)
    thread.start()
    try:
        yield quiet
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_race_is_never_won(tmp_path: Path, what: str) -> None:
    """The victim's file holds the very certificate that is replaced in the copy, and stays as it is."""
    tmp_path.chmod(0o755)
    node = handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))
    home, victim = tmp_path / "alice", tmp_path / "victim"
    copy, stolen = home / ".kube/config", victim / "config"
    old = (node.kubeconfig_dir / "super-admin.conf").read_bytes()
    for path in (copy, stolen):
        path.parent.mkdir(parents=True)
        path.write_bytes(old)
    mine, link, aim = (copy, home / ".kube/link", stolen) if what == "file" else (copy.parent, home / "link", victim)
    link.symlink_to(aim)
    for path in (home, home / ".kube", copy, link):
        os.chown(path, ALICE, ALICE, follow_symlinks=False)
    settings = settings_for(node, tmp_path, f'[copies]\nfiles = ["{copy}"]')
    store = Store(settings.node.state_dir)
    store.prepare()
    items = inventory.read(node.pki_dir, node.kubeconfig_dir).items
    [was] = [fingerprint(item.certificates[0]) for item in items if item.spec.name == "super-admin.conf"]

    def refresh() -> None:
        """Refresh the copies as if admin.conf's certificate had just replaced that one."""
        copies_file(store).replace({"certificates": {"admin.conf": [was]}})
        copies.finish(settings, store, audit.Record(store, settings.audit))

    before, refreshed = stolen.stat(), 0
    with exchanged(mine, link) as quiet:
        for _ in range(ROUNDS):
            refresh()
            with quiet:
                refreshed += copy.read_bytes() != old
                copy.write_bytes(old)
    after = stolen.stat()
    assert (after.st_ino, after.st_mtime_ns, stolen.read_bytes()) == (before.st_ino, before.st_mtime_ns, old)
    assert [path.name for path in victim.iterdir()] == ["config"]
    # in a quiet moment it is refreshed by the same steps
    refresh()
    assert copy.read_bytes() != old
    print(f"{refreshed} of {ROUNDS} were refreshed in spite of it")


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_write_by_name_loses_the_race(tmp_path: Path, what: str) -> None:
    """The same race against a write by name: the victim's file is overwritten."""
    copy, stolen = tmp_path / "alice/.kube/config", tmp_path / "victim/config"
    for path in (copy, stolen):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"old")
    mine, aim = (copy, stolen) if what == "file" else (copy.parent, stolen.parent)
    link = mine.with_name("link")
    link.symlink_to(aim)
    with exchanged(mine, link):
        for _ in range(100 * ROUNDS):
            copy.write_bytes(b"new")
            if stolen.read_bytes() == b"new":
                break
    assert stolen.read_bytes() == b"new"
