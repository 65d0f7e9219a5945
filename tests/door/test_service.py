"""What is asked about the door's readiness."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import sqlalchemy as sa

from bridge.door.service import Service
from bridge.door.store import DoorDatabase


def test_a_look_at_readiness_counts_nothing(memory: DoorDatabase) -> None:
    """Strangers may ask: the database says in one step that it answers, however many requests it has."""
    statements: list[str] = []
    sa.event.listen(memory.engine, "before_cursor_execute", lambda *about: statements.append(about[2]))
    door: Any = SimpleNamespace(_door=Mock(ending=threading.Event()), _trouble="", memory=memory)

    assert list(Service._unready(door)) == []
    assert statements
    assert not any("count(" in one for one in statements)
