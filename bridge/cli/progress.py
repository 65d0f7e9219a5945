"""Who looks on while a CA is asked: lines for cron, a bar for a terminal."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from bridge.system.console import Progress, log


class _PlainProgress:
    """Lines on standard error, which cron mails: only what somebody has to know."""

    def signing(self, backend: str, names: Sequence[str]) -> None:
        log.debug("asking %s for %s", backend, ", ".join(names))

    def signed(self, name: str) -> None:
        log.debug("%s was answered", name)

    def note(self, text: str) -> None:
        log.warning("%s", text)


class _TerminalProgress(_PlainProgress):
    """A bar for each CA; made at the first question, since most runs have none."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._lock = threading.Lock()
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def signing(self, backend: str, names: Sequence[str]) -> None:
        with self._lock:
            if self._bars is None:
                self._bars = self._stack.enter_context(_bars())
            task = self._bars.add_task(f"asking {backend}", total=len(names), detail="")
            self._tasks.update(dict.fromkeys(names, task))

    def signed(self, name: str) -> None:
        with self._lock:
            self._bars.update(self._tasks[name], advance=1, detail=name)


def _bars() -> Any:
    from rich.console import Console  # noqa: PLC0415 (60 ms; only on a terminal, when a CA is asked)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn  # noqa: PLC0415

    layout = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*layout, TextColumn("{task.fields[detail]}"), console=Console(stderr=True), transient=True)


@contextlib.contextmanager
def progress_shown() -> Iterator[Progress]:
    """What fits standard error; a bar is gone in the end."""
    with contextlib.ExitStack() as stack:
        yield _TerminalProgress(stack) if sys.stderr.isatty() else _PlainProgress()
