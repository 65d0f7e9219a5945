"""
Which settings file was checked whole, with all of its backends' tables, so that the next run need not load backends for it.

A cron run with nothing due compares a few numbers of stat(2); whatever has changed is checked again.
"""

from __future__ import annotations

from pathlib import Path

from bridge.settings.tables import Settings
from bridge.state.store import Store

#: Where distributions are installed: what is added or removed there may be a backend.
_INSTALLED = Path(__file__).parents[2]


def is_checked(settings: Settings, store: Store) -> bool:
    """Whether this very file was checked by this very installation; without a file there is nothing to check."""
    if settings.source.file is None:
        return True
    try:
        return store.checked_settings.read_text() == _signature(settings.source.file)
    except (OSError, ValueError):
        return False


def remember(settings: Settings, store: Store) -> None:
    """
    Remember settings that were checked; if that can't be written, it costs the next run some time, and no more.

    Args:
        settings: As checked.
        store: Its lock is held.
    """
    from bridge.system.files import write_atomically  # noqa: PLC0415 (a look needs none of it)

    if settings.source.file is None or is_checked(settings, store):
        return
    try:
        write_atomically(store.checked_settings, _signature(settings.source.file).encode())
    except OSError:
        return


def _signature(file: Path) -> str:
    """
    Raises:
        OSError: It is away.
    """
    status, installed = file.stat(), _INSTALLED.stat()
    numbers = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, installed.st_mtime_ns)
    return f"{file} {' '.join(map(str, numbers))}\n"
