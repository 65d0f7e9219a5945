"""The node's processes: which of them run a program, since when, and which file they see."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

PROC = Path("/proc")

#: Of `/proc/PID/stat` behind the name, which may hold blanks: proc_pid_stat(5), field 22.
_START_FIELD = 22 - 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process, as it was a moment ago."""

    pid: int
    started: datetime
    arguments: tuple[str, ...]  #: The program first, as it was called.
    root: Path  #: What is `/` for it, seen from here.


def running(program: str, proc: Path = PROC) -> list[Process]:
    """
    Processes that run a program on this node, the oldest first.

    On this node means: in our own network namespace. Static pods of a control plane use their host's, and so does a
    kubelet; another node on the same machine has its own. Who may not look at other people's processes (not root)
    finds none.

    Args:
        program: Its file's name.
        proc: Where the process table is.
    """
    here = _network(proc / "self")
    return sorted((found for found in _all(program, proc, here)), key=lambda process: process.started)


def _all(program: str, proc: Path, network: str) -> Iterator[Process]:
    for entry in proc.iterdir():
        # one that ends while we look, or that is not ours to look at
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if entry.name.isdigit():
                arguments = tuple((entry / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0"))
                if os.path.basename(arguments[0]) == program and _network(entry) == network:  # noqa: PTH119 (a text)
                    yield Process(
                        pid=int(entry.name), started=_started(entry), arguments=arguments, root=entry / "root"
                    )


def _network(entry: Path) -> str:
    return os.readlink(entry / "ns/net")  # noqa: PTH115 (`net:[4026531840]` is no path)


def _started(entry: Path) -> datetime:
    """When it started, by today's clock, which may have been set since: the kernel counts from the machine's start."""
    behind_name = (entry / "stat").read_text(errors="replace").rpartition(")")[2]
    ticks = int(behind_name.split()[_START_FIELD])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return datetime.fromtimestamp(time.time() - age, UTC)
