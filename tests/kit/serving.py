"""A door to sign with: `ca-bridge serve` on loopback with `openssl ca` behind it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.specs import AUTHORITIES
from tests.kit.est import make_tls
from tests.kit.opensslca import make_ca_directory

CA_BRIDGE = str(Path(sys.executable).with_name("ca-bridge"))
_START_SECONDS = 60.0
_PORT = re.compile(r"serving at port (\d+)")


@dataclass(kw_only=True)
class ServeProgram:
    """The program, its settings and what it has said."""

    place: Path
    ca: Path  #: The CA certificate of the server certificate.
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    port: int = 0
    said: list[str] = field(default_factory=list)  #: Standard error, by line.

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"https://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, at the port that it had before, and wait until it serves."""
        self.write_listen(self.port)
        command = [CA_BRIDGE, "serve", "--config", str(self.place / "config.toml"), "--log-format", "json"]
        environment = {**os.environ, **self.environment}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        serving, stderr = threading.Event(), self.process.stderr
        assert stderr is not None

        def listen() -> None:
            with stderr:
                for line in stderr:
                    self.said.append(line)
                    if (match := _PORT.search(line)) is not None:
                        self.port = int(match[1])
                        serving.set()
            serving.set()

        self._listener = threading.Thread(target=listen)
        self._listener.start()
        assert serving.wait(_START_SECONDS)
        assert self.process.poll() is None, "".join(self.said)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it by its pid; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(_START_SECONDS)
        self._listener.join()
        return code

    def write_listen(self, port: int) -> None:
        """Keep the port, so that nodes find it again."""
        path = self.place / "config.toml"
        path.write_text(re.sub(r'listen = "[^"]*"', f'listen = "127.0.0.1:{port}"', path.read_text()))

    def lines(self) -> list[dict[str, Any]]:
        """What it has said, as objects."""
        return [json.loads(line) for line in self.said]


def make_place(
    place: Path, certificate_pem: bytes, key_pem: bytes, policy: str, *, authorities: Sequence[str] = tuple(AUTHORITIES)
) -> ServeProgram:
    """Settings, policy, the CA's directory and a server certificate; not started."""
    (place / "tls").mkdir()
    tls = make_tls(place / "tls")
    make_ca_directory(place / "ca", certificate_pem, key_pem)
    serve = f'[serve]\nlisten = "127.0.0.1:0"\ncertificate = "{tls.server_cert}"\nkey = "{tls.server_key}"'
    node = f'[node]\nstate_dir = "{place / "state"}"\npki_dir = "{place / "pki"}"'
    tables = [node, serve, f'[backend.desk]\ntype = "openssl"\ndir = "{place / "ca"}"']
    tables += [f'[authority.{name}]\nbackend = "desk"' for name in authorities]
    (place / "config.toml").write_text("\n\n".join(tables))
    (place / "desk-policy.toml").write_text(policy)
    return ServeProgram(place=place, ca=tls.ca)


@contextmanager
def running(program: ServeProgram) -> Iterator[ServeProgram]:
    """Started, and stopped at the end."""
    program.start()
    try:
        yield program
    finally:
        if program.process is not None and program.process.poll() is None:
            program.stop()
