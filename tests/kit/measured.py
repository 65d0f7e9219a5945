"""How long the program runs, and how much memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.kit.cas import Bridge

#: Resident, of the whole program; a renewal by itself takes some 90.
MOST_MEGABYTES = 200


def run_measured(bridge: Bridge, *args: str) -> tuple[int, str, float, float]:
    """Exit code, standard error, seconds, and megabytes at most (of the program itself, not of what it started)."""
    command = [str(Path(sys.executable).with_name("ca-bridge")), *args, "--config", str(bridge.config)]
    error = bridge.directory / "stderr"
    begin = time.monotonic()
    with error.open("wb") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, error.read_text(), time.monotonic() - begin, usage.ru_maxrss / 1024
