"""What counts this process's system calls, and does something at the n-th of them."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from typing import Any, Self

#: What the installer asks of the system, Path's methods included; reading goes through `io.open`.
CALLS = ("open", "fsync", "fchmod", "fchown", "setxattr", "rename", "unlink", "mkdir")


Act = Callable[[], None]


class Tripwire:
    """Counts system calls in this process, and does something at the n-th."""

    def __init__(self, at: int, act: Act) -> None:
        self.count, self.at, self.act = 0, at, act
        for name in CALLS:
            setattr(os, name, self._counting(getattr(os, name)))
        io.open = self._counting(io.open)
        fdopen = os.fdopen
        os.fdopen = lambda *args, **kwargs: Torn(fdopen(*args, **kwargs), self)  # type: ignore[assignment]

    def step(self) -> None:
        """One more call."""
        self.count += 1
        if self.count == self.at:
            self.act()

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return call(*args, **kwargs)

        return counting


class Torn:
    """A file whose write(2) may be cut off in the middle."""

    def __init__(self, file: Any, tripwire: Tripwire) -> None:
        self._file, self._tripwire = file, tripwire

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        """In two halves."""
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._file.write(part)
            self._file.flush()
            self._tripwire.step()

    def flush(self) -> None:
        """To the system."""
        self._file.flush()

    def fileno(self) -> int:
        """Its descriptor."""
        return int(self._file.fileno())


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failing(code: int) -> Act:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail
