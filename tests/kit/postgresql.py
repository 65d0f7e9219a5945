"""A PostgreSQL server for tests: Debian's, in a directory of its own, as a user that is not root, on a free loopback port."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from tests.kit.loopback import free_port

PASSWORD = "a passphrase of the database: %/@"
_USER = "postgres"
_START_SECONDS = 180
_PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@dataclass(kw_only=True)
class PostgreSql:
    """A server; it knows the password that `PASSWORD` is."""

    directory: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    made: list[str] = field(default_factory=list)  #: The databases so far.

    def ask(self, text: str, name: str = "postgres") -> list[tuple[object, ...]]:
        """The rows of one statement, which is written at once."""
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user=_USER, password=PASSWORD, dbname=name, autocommit=True
        ) as connection:
            cursor = connection.execute(sql.SQL(text))
            return list(cursor.fetchall()) if cursor.description is not None else []

    def database(self) -> str:
        """A new and empty database; its URL, without the password."""
        name = f"door_{len(self.made)}"
        self.made.append(name)
        self.ask(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://{_USER}@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = {
            "listen_addresses": "127.0.0.1", "port": str(self.port), "unix_socket_directories": str(self.directory),
            "shared_buffers": "16MB", "max_connections": "200",
        }  # fmt: skip
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(_PROGRAMS[-1] / "postgres"), "-D", str(self.directory / "data"), *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory, **_as_its_user(),
            )  # fmt: skip
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.ask("SELECT 1")
            except psycopg.OperationalError:
                assert self.process.poll() is None, (self.directory / "log").read_text()
                assert time.monotonic() < end, (self.directory / "log").read_text()
                time.sleep(0.1)
            else:
                return

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Stop it by its pid, without waiting for its clients."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(_START_SECONDS)

    def program(self, name: str, arguments: Sequence[str]) -> bytes:
        """What one of its programs writes to standard output."""
        environment = {**os.environ, "PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": _USER}
        run = subprocess.run(
            [str(_PROGRAMS[-1] / name), *arguments],
            env={**environment, "PGPASSWORD": PASSWORD}, stdout=subprocess.PIPE, check=True, timeout=_START_SECONDS,
        )  # fmt: skip
        return run.stdout


def is_installed() -> bool:
    """Whether the server's programs are on this machine."""
    return bool(_PROGRAMS)


@contextlib.contextmanager
def running() -> Iterator[PostgreSql]:
    """A server for as long as the block runs, which asks for the password."""
    directory = Path(tempfile.mkdtemp(prefix="postgresql-"))
    try:
        password = directory / "password"
        password.write_text(PASSWORD)
        if os.geteuid() == 0:
            for path in (directory, password):
                shutil.chown(path, _USER)
        subprocess.run(
            [str(_PROGRAMS[-1] / "initdb"), "-D", str(directory / "data"), "--username", _USER, "--encoding", "UTF8",
             "--locale", "C", "--auth", "scram-sha-256", "--pwfile", str(password), "--no-sync"],
            check=True, stdout=subprocess.DEVNULL, cwd=directory, **_as_its_user(),
        )  # fmt: skip
        server = PostgreSql(directory=directory, port=free_port())
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory)


def _as_its_user() -> dict[str, Any]:
    """PostgreSQL refuses to run as root."""
    return {"user": _USER, "group": _USER, "extra_groups": ()} if os.geteuid() == 0 else {}
