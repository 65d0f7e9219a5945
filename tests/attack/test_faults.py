"""A renewal of all twelve certificates, failed and killed at every system call of its installation."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bridge.node import inventory
from bridge.state import Store
from bridge.state.install import (
    CERTIFICATE_MASK,
    KEY_MASK,
    KUBECONFIG_MASK,
    InstallError,
    Replacement,
    install,
    recover,
)
from bridge.system.files import Attributes, digest
from tests.counts import Tried
from tests.kit.pairs import assert_pairs
from tests.kit.pki import Pki, handmade_pki
from tests.kit.tripwire import Act, Tripwire, failing, kill


@dataclass(frozen=True, kw_only=True)
class Renewal:
    """Two PKIs of the same shape: one on the node, the other what the CAs answered."""

    old: Pki
    new: Pki

    @functools.cached_property
    def _files(self) -> list[Replacement]:
        """As `replacements`, for the old PKI itself: read once, and not anew for each of thousands of nodes."""
        found = []
        for item in inventory.read(self.old.pki_dir, self.old.kubeconfig_dir).items:
            pairs = [(item.key_path, KEY_MASK), (item.certificate_path, CERTIFICATE_MASK)]
            for path, mask in [(item.certificate_path, KUBECONFIG_MASK)] if item.embedded else pairs:
                assert path is not None
                found.append(
                    Replacement(
                        certificate=item.spec.name,
                        path=path,
                        data=(self.new.root / path.relative_to(self.old.root)).read_bytes(),
                        mode_mask=mask,
                        was=digest(path.read_bytes()),
                    )
                )
        return found

    def replacements(self, root: Path) -> list[Replacement]:
        """All files of the node at `root`, keys first, as a renewal would replace them."""
        return [replace(file, path=root / file.path.relative_to(self.old.root)) for file in self._files]


@pytest.fixture(scope="module")
def renewal(tmp_path_factory: pytest.TempPathFactory) -> Renewal:
    """All pairs match, before and after."""
    directory = tmp_path_factory.mktemp("renewal")
    made = Renewal(old=handmade_pki(directory / "old"), new=handmade_pki(directory / "new"))
    for pki in (made.old, made.new):
        assert_pairs(pki)
    return made


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node on which an installation is tried."""

    root: Path
    store: Store
    files: list[Replacement]

    @classmethod
    def make(cls, renewal: Renewal, directory: Path) -> Node:
        """With a file of another owner, one with an attribute of its own, and an odd mode."""
        root = directory / "node"
        shutil.copytree(renewal.old.root, root)
        node = cls(root=root, store=Store(directory / "state"), files=renewal.replacements(root))
        node.store.prepare()
        for file in node.files[::3]:
            os.setxattr(file.path, "user.note", b"kept")
        for file in node.files[:4]:
            if os.geteuid() == 0:
                os.chown(file.path, 12345, 54321)
        next(file for file in node.files if file.mode_mask == CERTIFICATE_MASK).path.chmod(0o604)
        return node

    def attributes(self) -> list[Attributes]:
        """The attributes of each file."""
        return [Attributes.of(file.path) for file in self.files]

    def state(self) -> str:
        """`old`, `new` or `apart`."""
        now = [file.path.read_bytes() for file in self.files]
        if now == [file.data for file in self.files]:
            return "new"
        return "old" if [digest(data) for data in now] == [file.was for file in self.files] else "apart"

    def rests(self) -> list[Path]:
        """What should not be there any more."""
        staged = [path for path in self.root.rglob("*") if path.name.startswith(".")]
        unfinished = [path for path in self.store.backups.iterdir() if not (path / "manifest.json").exists()]
        return [
            *staged,
            *unfinished,
            *(p for p in self.store.directory.iterdir() if p not in (self.store.backups, self.store.written)),
        ]


def attempt(node: Node, at: int, act: Act) -> tuple[int, int]:
    """
    Install in a child with something happening at one point.

    Returns:
        Its exit code (0 done, 5 an error was reported, negative: the signal), and how many calls it made.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        write, leave = os.write, os._exit
        tripwire = Tripwire(at, act)
        code = 70
        try:
            install(node.store, node.files, "run1", {})
            code = 0
        except InstallError:  # any other error would not tell the operator which files are in place
            code = 5
        finally:
            write(writer, json.dumps(tripwire.count).encode())
            leave(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(said or b"0")


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests never cut the power, and thousands of flushes would take minutes."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """In memory, where it can be, since thousands of trees are made and removed."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as directory:
        yield Path(directory)


@pytest.fixture
def calls(renewal: Renewal, place: Path) -> int:
    """How many a whole installation makes."""
    node = Node.make(renewal, place / "whole")
    before = node.attributes()
    code, count = attempt(node, 0, kill)
    assert (code, node.state(), node.rests(), node.attributes()) == (0, "new", [], before)
    assert count > 12 * 2 * 10
    return count


def assert_whole(node: Node, before: list[Attributes], at: int) -> None:
    committed = node.store.journal.exists()
    direction = json.loads(node.store.journal.read_bytes())["direction"] if committed else ""
    recover(node.store)
    assert node.state() in ("old", "new"), at
    assert not committed or node.state() == {"forward": "new", "back": "old"}[direction], at
    assert node.attributes() == before, at
    assert node.rests() == [], at
    assert recover(node.store) is None


def test_a_kill_at_every_call(renewal: Renewal, calls: int, place: Path, tried: Tried) -> None:
    """All old before the journal, all new after it, and never anything else."""
    seen = []
    for at in range(1, calls + 1):
        node = Node.make(renewal, place / str(at))
        before = node.attributes()
        assert attempt(node, at, kill)[0] == -signal.SIGKILL, at
        assert_whole(node, before, at)
        seen.append(node.state())
        shutil.rmtree(place / str(at))
    assert seen == sorted(seen, key=("old", "new").index)  # there is one commit point
    assert set(seen) == {"old", "new"}
    tried("points of a full renewal's installation at which it was killed", calls)


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EACCES", "EROFS"])
def test_an_error_of_every_call(renewal: Renewal, calls: int, place: Path, code: str, tried: Tried) -> None:
    """It is reported, or all files are new; what is reported as not replaced stays old."""
    for at in range(1, calls + 1):
        node = Node.make(renewal, place / str(at))
        before = node.attributes()
        result, _ = attempt(node, at, failing(getattr(errno, code)))
        assert result == 5 or (result, node.state()) == (0, "new"), at
        assert_whole(node, before, at)
        assert (result == 0) == (node.state() == "new"), at
        shutil.rmtree(place / str(at))
    tried(f"points of a full renewal's installation that failed with {code}", calls)


def test_the_two_sides_differ(renewal: Renewal) -> None:
    """The suite above would not notice a swap of equal files."""
    for file in renewal.replacements(renewal.old.root):
        assert digest(file.data or b"") != file.was
