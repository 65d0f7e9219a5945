"""What keeps a machine that stalls apart from a component that is away."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _patient(patient: None) -> None:
    """For each test of the room."""
