"""What the tests of releases share: the offline file, built once, and Debians to try it in."""

from __future__ import annotations

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
