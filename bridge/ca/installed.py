"""Answers that are installed, which the backends of their CAs then put away; a killed run leaves that to the next one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

from bridge.ca import CA, registry
from bridge.errors import BackendError, SettingsError
from bridge.settings.tables import Settings
from bridge.state import Store
from bridge.state.obligations import Collected, collected_file
from bridge.state.open_requests import OpenRequests, OpenUsers
from bridge.system.state_file import StateError


def owe_putting_away(settings: Settings, store: Store, answers: Iterable[tuple[str, str]]) -> None:
    """Record, before an installation, which answers (authority and reference) their backends put away after it."""
    ours = [Collected(authority=a, reference=r) for a, r in answers if r and a in settings.authorities]
    configured = registry.configured(settings, dict.fromkeys(one.authority for one in ours))
    new = [one for one in ours if hasattr(configured[one.authority].backend_type, "put_away")]
    if new:
        file = collected_file(store)
        file.put(tuple(dict.fromkeys([*(file.read() or ()), *new])))


def put_away(settings: Settings, store: Store, note: Callable[[str], None]) -> None:
    """Have backends remove the answers of which no request is open any more; a failure is reported once."""
    if not store.collected.exists():
        return
    try:
        file = collected_file(store)
        every, waiting = file.read() or (), {one.reference for one in (*OpenRequests(store), *OpenUsers(store))}
        over = {one.reference: one.authority for one in every if one.reference not in waiting}
        names = [name for name in over.values() if name in settings.authorities]
        configured = registry.configured(settings, dict.fromkeys(names))
        for reference, name in over.items():
            try:
                if name in configured:
                    with contextlib.closing(CA.of(configured[name])) as ca:
                        ca.put_away(reference)
            except BackendError as e:
                note(f"installed answers stay where they are: {e}; {e.hint}")
        file.put(tuple(one for one in every if one.reference in waiting))
    except (SettingsError, StateError) as e:
        note(str(e))
