"""The node's side of the air gap: its ca-bridge, a place from where files are carried, and what it has asked for."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from bridge.pki import bundle_format
from bridge.pki.bundle import RequestBundle
from bridge.specs import AUTHORITIES
from bridge.state import Store
from bridge.state.open_requests import OpenRequest, OpenRequests
from tests.kit.cas import Bridge, live_certificates
from tests.kit.pki import NODE, Pki


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node, and the place from where files are carried."""

    bridge: Bridge
    carried: Path

    @classmethod
    def make(cls, directory: Path, pki: Pki, *, name: str = NODE) -> Node:
        """It knows no CA."""
        bridge = Bridge(pki=pki, directory=directory / "bridge")
        bridge.tables[0] += f'name = "{name}"\n'
        bridge.add("backups", {"keep": 3})
        (directory / "carried").mkdir()
        return cls(bridge=bridge, carried=directory / "carried")

    @property
    def pki(self) -> Pki:
        """The control plane."""
        return self.bridge.pki

    @property
    def state(self) -> Path:
        """The state directory."""
        return self.bridge.directory / "state"

    def run(self, *args: str | Path) -> subprocess.CompletedProcess[str]:
        """The installed program."""
        return self.bridge.run(*map(str, args))

    def open(self) -> dict[str, OpenRequest]:
        """The open requests by name."""
        return OpenRequests(Store(self.state)).by_name()

    def export(self, *names: str, to: str = "bundle.json") -> RequestBundle:
        """Must succeed."""
        path = self.carried / to
        run = self.run("export", path, *names)
        assert run.returncode == 0, run.stderr
        return bundle_format.loads_request(path.read_bytes())

    def events(self, event: str) -> list[str]:
        """Names on the record, in order."""
        lines = (self.state / "audit.jsonl").read_text().splitlines()
        return [line.get("name", "") for line in map(json.loads, lines) if line["event"] == event]

    def live(self) -> dict[str, x509.Certificate]:
        """The certificates by name."""
        return live_certificates(self.pki)

    def add_exchange(self) -> tuple[Path, Path]:
        """An outbox and an inbox, through which all authorities are asked."""
        outbox, inbox = self.carried / "outbox", self.carried / "inbox"
        outbox.mkdir()
        inbox.mkdir()
        self.bridge.add("backend.door", {"type": "exchange", "outbox": str(outbox), "inbox": str(inbox)})
        for authority in AUTHORITIES:
            self.bridge.add(f"authority.{authority}", {"backend": "door"})
        return outbox, inbox


def at_a_terminal(command: Sequence[str], words: Sequence[str], question: bytes) -> tuple[int, str]:
    """
    Run a program with a terminal of its own.

    Args:
        command: The program.
        words: What a person types there, one for each question.
        question: What each question ends with.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], list(command))  # noqa: S606 (the child's own program)
    seen, answered, end = b"", 0, time.monotonic() + 400
    while time.monotonic() < end:
        ready, _, _ = select.select([terminal], [], [], 1)
        try:
            part = os.read(terminal, 65536) if ready else b""
        except OSError:
            break  # EIO: the other side is closed
        if ready and not part:
            break
        seen += part
        if answered < min(seen.count(question), len(words)):
            os.write(terminal, words[answered].encode() + b"\n")
            answered += 1
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), seen.decode(errors="replace")
