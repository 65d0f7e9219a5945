"""What the tests of releases share: the offline file, built once, and Debians to try it in."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from tests.kit import releases, trees


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session")
def offline(shared: Path) -> Path:
    """The offline file of this commit."""
    return releases.offline(shared / "release")


@pytest.fixture(scope="session")
def released(shared: Path, offline: Path) -> Path:
    """A signed release of this commit for this machine's platform; the downloads are there by then."""
    assert offline
    return releases.release(shared / "released")


@pytest.fixture(params=trees.SUITES)
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> trees.Tree:
    """A bare Debian, each in turn."""
    if reason := trees.lacking():
        pytest.skip(reason)
    return trees.Tree.new(request.param, tmp_path / request.param)


@pytest.fixture
def bookworm(tmp_path: Path) -> trees.Tree:
    """A bare Debian 12, where the other would show the same."""
    if reason := trees.lacking():
        pytest.skip(reason)
    return trees.Tree.new("bookworm", tmp_path / "tree")


@pytest.fixture(params=trees.SUITES)
def installed(request: pytest.FixtureRequest, tmp_path: Path, shared: Path, offline: Path) -> trees.Tree:
    """A bare Debian, each in turn, with the offline file installed; its timer does not fire into a test at 03:17."""
    if reason := trees.lacking():
        pytest.skip(reason)
    base = shared / f"installed-{request.param}"
    with (shared / f"{base.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        once = trees.Tree(request.param, base)
        if not (base / "done").exists():
            once = trees.Tree.new(request.param, base)
            once.put("/root/ca-bridge.run", offline.read_bytes())
            once.run("sh /root/ca-bridge.run install --enable")
            once.put(trees.TIMER, b"[Timer]\nOnCalendar=\nOnCalendar=2099-01-01\n")
            (base / "done").touch()
    return once.copy(tmp_path / request.param)
