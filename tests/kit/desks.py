"""A CA desk: `openssl ca` directories with encrypted keys, settings, a policy, and the program to run there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backends.openssl.index import Database
from bridge.specs import AUTHORITIES
from tests.kit import opensslca, warm
from tests.kit.pki import Pki

PASSPHRASE = "s3cret phrase"
POLICY = """\
[desk]
name = "desk-1"

[allow]
clusters = ["kubernetes"]
nodes = ["cp-*"]
masters = ["super-admin.conf"]
"""

#: Where a door that signs is killed, as `killing` takes it: module, function, and whether before it or behind.
SIGNING_STEPS = (
    ("door.doors", "Doors.begin", False),  # it is about to be signed
    ("state.open_requests", "RequestLog._append", False),  # what the CA is asked is in the journal
    ("ca", "CA.ask", False),  # signed, and not written down
    ("desk.desk", "Desk._verify", True),  # signed and in the journal
    ("desk.records", "_write_group", False),  # in the archive
    ("door.store", "DoorDatabase.conclude", True),  # as before
    ("door.store", "DoorDatabase.conclude", False),  # answered
)


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What is on the CA host; nothing of it is on a node."""

    directory: Path
    authorities: tuple[str, ...]

    @property
    def config(self) -> Path:
        """The settings file."""
        return self.directory / "config.toml"

    @property
    def policy(self) -> Path:
        """Where `sign` looks for it."""
        return self.directory / "desk-policy.toml"

    @property
    def inbox(self) -> Path:
        """For requests."""
        return self.directory / "inbox"

    @property
    def outbox(self) -> Path:
        """For answers."""
        return self.directory / "outbox"

    @property
    def archive(self) -> Path:
        """For requests that are done."""
        return self.state / "desk-done"

    @property
    def state(self) -> Path:
        """The state directory."""
        return self.directory / "state"

    def ca(self, authority: str) -> Path:
        """The CA's directory."""
        return self.directory / "cas" / authority

    def issued(self) -> list[str]:
        """The rows of all databases, while `openssl ca` may be at work on them."""
        databases = [Database(self.ca(name) / "index.txt", self.ca(name) / "newcerts") for name in self.authorities]
        return [row for database in databases for row in database.read().data.decode().splitlines()]

    def runs(self) -> list[str]:
        """The arguments of each `openssl` process so far."""
        log = self.directory / "openssl.log"
        return log.read_text().splitlines() if log.exists() else []

    def command(self, *args: str | Path) -> list[str]:
        """To run the installed program."""
        return [str(Path(sys.executable).with_name("ca-bridge")), *map(str, args), "--config", str(self.config)]

    def run(self, *args: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run it, without a terminal."""
        return warm.shared().run(self.command(*args), timeout=timeout)


def make_desk(
    directory: Path, pki: Pki, *, authorities: Sequence[str] = tuple(AUTHORITIES), policy: str = POLICY
) -> Desk:
    """
    Set one up.

    Args:
        directory: Empty or absent.
        pki: Whose CAs it has.
        authorities: Those of them that are at this desk.
        policy: The policy file.
    """
    desk = Desk(directory=directory, authorities=tuple(authorities))
    for path in (directory, desk.inbox, desk.outbox):
        path.mkdir(parents=True)
    passphrase = directory / "passphrase"
    passphrase.touch(mode=0o600)
    passphrase.write_text(f"{PASSPHRASE}\n")
    program = directory / "openssl"
    program.write_text(f'#!/bin/sh\necho "$@" >> {directory}/openssl.log\nexec openssl "$@"\n')
    program.chmod(0o755)
    lines = [
        f'[node]\nstate_dir = "{desk.state}"',
        f'[backend.desk]\ntype = "openssl"\nopenssl = "{program}"\npassphrase_file = "{passphrase}"\ntimeout = "3m"\nretry_for = "1s"',
    ]
    for name in authorities:
        opensslca.make_ca_directory(desk.ca(name), *pki.ca_pem(name), passphrase=PASSPHRASE)
        lines.append(f'[authority.{name}]\nbackend = "desk"\ndir = "{desk.ca(name)}"')
    desk.config.write_text("\n\n".join(lines) + "\n")
    desk.policy.write_text(policy)
    return desk


def killing(directory: Path, module: str, function: str, *, before: bool) -> Path:
    """The program as a script that kills itself at its first call of a function, before or after it."""
    script = directory / "killed.py"
    script.write_text(
        "import os, signal, sys\nfrom importlib import import_module\n"
        f"owner, name = import_module('bridge.{module}'), {function!r}\n"
        "while '.' in name:\n    first, name = name.split('.', 1)\n    owner = getattr(owner, first)\n"
        "real = getattr(owner, name)\n"
        "def killed(*args, **kwargs):\n"
        f"    {'pass' if before else 'real(*args, **kwargs)'}\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "setattr(owner, name, killed)\nfrom bridge.cli.app import app\napp(sys.argv[1:])\n"
    )
    return script
