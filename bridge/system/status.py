"""
Progress of what takes long, on standard error: a line that moves on a terminal, a plain line elsewhere.

Nothing is shown in the first two seconds. On a terminal the line is gone when what it tells of is over; into a file or
a journal goes one line for each thing that takes that long.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO

_QUIET_SECONDS = 2.0
_FRAME_SECONDS = 0.25
_FRAMES = ("|", "/", "-", "\\")
_CLEAR = "\r\x1b[K"


def is_lively(stream: TextIO | None) -> bool:
    """Whether it is a terminal on which a line can be written over; None: it was closed from the beginning."""
    return stream is not None and stream.isatty() and os.environ.get("TERM", "") not in {"", "dumb"}


def is_coloured(stream: TextIO | None) -> bool:
    """Whether colours are seen there, and wanted (https://no-color.org)."""
    return is_lively(stream) and not os.environ.get("NO_COLOR")


@dataclass
class Doing:
    """Something that goes on."""

    text: str
    since: float = field(default_factory=time.monotonic)
    is_told: bool = False  #: On a plain line, or not to be.


class _Line:
    """The newest of what goes on, shown by a thread that lives while there is anything."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._going: list[Doing] = []
        self._wake = threading.Condition(self.lock)
        self._thread: threading.Thread | None = None
        self._is_shown = False

    def begin(self, one: Doing) -> None:
        with self.lock:
            self._going.append(one)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="status", daemon=True)
                self._thread.start()

    def end(self, one: Doing) -> None:
        with self.lock:
            self._going.remove(one)
            self.clear()
            if not self._going:
                self._wake.notify()

    def clear(self) -> None:
        """Make room for another line."""
        with self.lock:
            if self._is_shown:
                _write(_CLEAR)
                self._is_shown = False

    def _run(self) -> None:
        frame = 0
        with self.lock:
            while self._going:
                one, passed = self._going[-1], time.monotonic() - self._going[-1].since
                if passed >= _QUIET_SECONDS:
                    self._show(one, passed, _FRAMES[frame % len(_FRAMES)])
                    frame += 1
                self._wake.wait(_FRAME_SECONDS)
            self._thread = None

    def _show(self, one: Doing, passed: float, frame: str) -> None:
        if is_lively(sys.stderr):
            room = shutil.get_terminal_size().columns - 1
            _write(f"{_CLEAR}{f'{frame} {one.text} … {passed:.0f} s'[:room]}")
            self._is_shown = True
        elif not one.is_told:
            one.is_told = True
            from bridge.system.console import log  # noqa: PLC0415 (which clears this line before it writes)

            log.info("%s …", one.text)


def _write(text: str) -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # nobody looks, or any more
        sys.stderr.write(text)
        sys.stderr.flush()


_line = _Line()


@contextlib.contextmanager
def doing(text: str, *, is_plain: bool = True) -> Iterator[Doing]:
    """
    Tell what goes on, if it takes long.

    Args:
        text: A clause such as `restarting etcd`; may be changed while it goes on.
        is_plain: Also where no terminal is; not for what most runs do, since cron mails each line.
    """
    one = Doing(text, is_told=not is_plain)
    _line.begin(one)
    try:
        yield one
    finally:
        _line.end(one)


def clear() -> None:
    """Take the line away, before something else is written."""
    _line.clear()
