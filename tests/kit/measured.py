"""How long the program runs, and how much memory it takes; and whether a process is there."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kit.cas import Bridge

#: Resident, of the whole program; a renewal by itself takes some 90.
MOST_MEGABYTES = 200

#: A small process between the tests and the program: the kernel counts a parent's memory as the peak of its child.
_STARTER = """
import os, sys
quiet = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[quiet])
_, status, usage = os.wait4(pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss)
"""


def run_measured(bridge: Bridge, *args: str) -> tuple[int, str, float, float]:
    """Exit code, standard error, seconds, and megabytes at most (of the program itself, not of what it started)."""
    program = [str(Path(sys.executable).with_name("ca-bridge")), *args, "--config", str(bridge.config)]
    command = [sys.executable, "-I", "-S", "-c", _STARTER, *program]
    error = bridge.directory / "stderr"
    begin = time.monotonic()
    with error.open("wb") as stderr:
        said = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, check=True)
    seconds = time.monotonic() - begin
    code, kilobytes = map(int, said.stdout.split())
    return code, error.read_text(), seconds, kilobytes / 1024


@contextmanager
def traced() -> Iterator[Callable[[], tuple[int, int]]]:
    """The bytes that Python's objects take, of those made from here on: at present, and at most."""
    tracemalloc.start()
    try:
        yield tracemalloc.get_traced_memory
    finally:
        tracemalloc.stop()


def peak_mb(pid: int) -> float:
    """The most memory that a process had, as the kernel keeps it (proc(5), VmHWM): looking takes no time from it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def is_running(pid: int | str) -> bool:
    """Whether a process is there; one that has ended and was not waited for is none, nor one that goes while it is looked at."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
