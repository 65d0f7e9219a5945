"""The name of one run: in each of its messages, in the audit log, and in its backup."""

from __future__ import annotations

import os

_ID_BYTES = 4
_ids: list[str] = []
_taken: set[str] = set()


def run_id() -> str:
    """
    The run that this process is at, in hexadecimal.

    It has its name before its record begins, so that what is said before that (the settings are wrong, another run is
    at work) has it, too.
    """
    if not _ids:
        _ids.append(os.urandom(_ID_BYTES).hex())
    return _ids[-1]


def begin() -> str:
    """For a record that begins: the process's name, or a new one if another record has it."""
    if run_id() in _taken:
        _ids[:] = [os.urandom(_ID_BYTES).hex()]
    _taken.clear()
    _taken.add(_ids[-1])
    return _ids[-1]
