"""A node of files, and what keeps tests of its CAs apart from other tests' nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.settings.tables import Settings
from tests.kit.pki import Pki, handmade_pki
from tests.kit.rotating import with_next


@pytest.fixture(autouse=True)
def _patient(patient: None) -> None:
    """For each test of the room."""


@pytest.fixture
def no_process_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kubelet of another test's node is not this node's."""
    monkeypatch.setattr("bridge.node.processes.running", lambda *_: [])


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """A node whose CA keys are elsewhere."""
    return handmade_pki(tmp_path / "node")


@pytest.fixture
def settings(pki: Pki, tmp_path: Path) -> Settings:
    """Its settings, with a new CA in the place of each."""
    return with_next(pki, tmp_path)
