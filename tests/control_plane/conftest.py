"""What keeps a machine that stalls apart from a component that is away."""

from __future__ import annotations

import pytest

from bridge import cluster
from bridge.cluster import api


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A component that is away refuses at once here; one that this machine holds up for a minute is there."""
    monkeypatch.setattr(cluster, "TIMEOUT_SECONDS", 90)
    monkeypatch.setattr(api, "NODE_TIMEOUT_SECONDS", 90)
