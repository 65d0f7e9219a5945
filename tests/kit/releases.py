"""Releases as `scripts/offline` and `scripts/release` build them, once for all workers of a run."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = os.uname().machine


def offline(directory: Path, **environment: str) -> Path:
    """
    The offline file for this machine; built if the directory has none yet.

    Args:
        directory: Where it is kept; the same for all who want the same.
        environment: On top of the tests' own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (ROOT / ".cache/release.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # they share .cache/wheels
        if not list(directory.glob("*.run")):
            command = [str(ROOT / "scripts/offline"), "--platform", PLATFORM, "--output", str(directory)]
            done = subprocess.run(
                command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=600
            )
            assert done.returncode == 0, done.stderr
        (built,) = directory.glob("*.run")
    return built
