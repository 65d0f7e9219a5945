"""A real systemd-journald with a /run of its own, in a mount namespace; nothing of it is seen outside."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = Path("/lib/systemd/systemd-journald")

_START = """\
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal /run/log/journal
if ! grep -qE '^[0-9a-f]{32}$' /etc/machine-id 2>/dev/null; then
  echo 0123456789abcdef0123456789abcdef >/run/machine-id
  [ -e /etc/machine-id ] || : >/etc/machine-id
  mount --bind /run/machine-id /etc/machine-id
fi
exec "$0"
"""


@dataclass(frozen=True, slots=True)
class Journal:
    """One that listens."""

    pid: int

    def run(self, command: Sequence[str], timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """Run a program that has this journal."""
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--", *command]
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        return subprocess.run(
            inside,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=environment,
            stdin=subprocess.DEVNULL,
        )

    def entries(self, *matches: str) -> list[dict[str, Any]]:
        """What it has, the oldest first."""
        self.run(["journalctl", "--sync"])
        found = self.run(["journalctl", "--directory=/run/log/journal", "--output=json", "--all", *matches])
        assert found.returncode in (0, 1), found.stderr
        return [json.loads(line) for line in found.stdout.splitlines()]


def missing() -> str:
    """Why there can't be one here; empty: there can."""
    if os.geteuid() != 0:
        return "a journal of its own needs root; run the tests as root"
    return "" if PROGRAM.exists() else f"{PROGRAM} not found; install the Debian package systemd"


@contextlib.contextmanager
def journald() -> Iterator[Journal]:
    """Start one, and stop it."""
    command = ["unshare", "--mount", "--", "sh", "-c", _START, str(PROGRAM)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=subprocess.PIPE, text=True) as process:
        try:
            journal = Journal(process.pid)
            deadline = time.monotonic() + 180
            while journal.run(["test", "-S", "/run/systemd/journal/stdout"]).returncode:
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                assert time.monotonic() < deadline, "journald does not listen"
                time.sleep(0.05)
            yield journal
        finally:
            process.kill()
