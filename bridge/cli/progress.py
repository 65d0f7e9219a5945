"""Who looks on while a CA is asked: a line on a terminal, plain lines for cron."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from bridge.system.console import Progress, log
from bridge.system.status import Doing, doing


class _Shown:
    """Who was asked and has answered, in words; shown where it takes long."""

    def __init__(self, line: Doing) -> None:
        self._line = line
        self._lock = threading.Lock()
        self._asked: dict[str, list[str]] = {}  #: By backend: who has not answered yet.
        self._total = 0

    def signing(self, backend: str, names: Sequence[str]) -> None:
        log.debug("asking %s for %s", backend, ", ".join(names))
        with self._lock:
            self._asked.setdefault(backend, []).extend(names)
            self._total += len(names)
            self._line.text = self._text()

    def signed(self, name: str) -> None:
        log.debug("%s was answered", name)
        with self._lock:
            for names in self._asked.values():
                if name in names:
                    names.remove(name)
            self._line.text = self._text()

    def note(self, text: str) -> None:
        log.warning("%s", text)

    def _text(self) -> str:
        waiting = {backend: names for backend, names in self._asked.items() if names}
        left = sum(map(len, waiting.values()))
        if not waiting:
            return f"all {self._total} requests are answered; verifying and installing"
        return f"asking {' and '.join(waiting)}: {self._total - left} of {self._total} requests are answered"


@contextlib.contextmanager
def progress_shown() -> Iterator[Progress]:
    """Show progress in the way that fits standard error; a line on a terminal is gone in the end."""
    with doing("making new keys and requests", is_plain=False) as line:
        yield _Shown(line)
