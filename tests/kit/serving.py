"""A door to sign with: `ca-bridge serve` on loopback with `openssl ca` behind it, and a client that sends what it likes."""

from __future__ import annotations

import http.client
import json
import re
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from bridge.door.store import DoorDatabase, sqlite_url
from bridge.secret import Secret
from bridge.system.waiting import wait_until
from tests.kit.est import make_tls
from tests.kit.loopback import free_port
from tests.kit.opensslca import make_ca_directory

CA_BRIDGE = str(Path(sys.executable).with_name("ca-bridge"))
_START_SECONDS = 180.0
_PORT = re.compile(r"serving at port (\d+)")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the door said."""

    status: int
    headers: Mapping[str, str]  #: By name in small letters.
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        """Its JSON."""
        found: dict[str, Any] = json.loads(self.body)
        return found


def insist(exchange: Callable[[], Answer]) -> Answer:
    """What the door says in the end: 503 is "later", as while the disk of its database stalls."""
    return wait_until(exchange, lambda one: one.status != 503, timedelta(minutes=3), pause_seconds=0.5)


@dataclass(kw_only=True)
class ServeProgram:
    """The program, its settings and what it has said."""

    config: Path
    ca: Path  #: The CA certificate of the server certificate.
    certificate: Path  #: The server certificate.
    key: Path  #: Its key.
    address: str = "127.0.0.1"  #: Where it listens.
    process: subprocess.Popen[str] | None = None
    port: int = 0
    said: list[str] = field(default_factory=list)  #: Standard error, by line.

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"https://{self.address}:{self.port}"

    def start(self, program: Sequence[str] = (CA_BRIDGE,)) -> None:
        """Start it, at the port that it had before, which no other program gets meanwhile, and wait until it serves."""
        self.port = self.port or free_port()
        text = self.config.read_text()
        self.config.write_text(re.sub(r'listen = "[^"]*"', f'listen = "{self.address}:{self.port}"', text))
        command = [*program, "serve", "--config", str(self.config), "--log-format", "json"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        serving, stderr, ports = threading.Event(), self.process.stderr, list[int]()
        assert stderr is not None

        def listen() -> None:
            with stderr:
                for line in stderr:
                    self.said.append(line)
                    if (match := _PORT.search(line)) is not None:
                        ports.append(int(match[1]))
                        serving.set()
            serving.set()

        self._listener = threading.Thread(target=listen)
        self._listener.start()
        assert serving.wait(_START_SECONDS)
        assert ports, "".join(self.said)
        self.port = ports[0]

    def ended(self) -> int:
        """Its exit code, once it has ended."""
        assert self.process is not None
        code = self.process.wait(_START_SECONDS)
        self._listener.join()
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it by its pid; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.ended()

    def lines(self) -> list[dict[str, Any]]:
        """What it has said, as objects."""
        return [json.loads(line) for line in self.said]

    def context(self) -> ssl.SSLContext:
        """A client's, which trusts the door alone."""
        return ssl.create_default_context(cafile=str(self.ca))

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """One exchange on a connection of its own."""
        with closing(
            http.client.HTTPSConnection(self.address, self.port, context=self.context(), timeout=180)
        ) as client:
            client.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = client.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(status=answer.status, headers=found, body=answer.read())

    def post(self, bundle: bytes, **headers: str) -> Answer:
        """A request, as a node sends it: again while the door has no time for it."""
        return insist(lambda: self.post_once(bundle, **headers))

    def post_once(self, bundle: bytes, **headers: str) -> Answer:
        """The first answer to it, whatever that is."""
        return self.ask("POST", "/v1/requests", bundle, Content_Type="application/json", **headers)


@dataclass(frozen=True, kw_only=True)
class Database:
    """An empty database."""

    url: str  #: Empty: the door's own SQLite file.
    password_file: Path | None = None

    @property
    def settings(self) -> str:
        """Lines of `[serve]`."""
        found = {"database": self.url, "database_password_file": self.password_file}
        return "".join(f'{key} = "{value}"\n' for key, value in found.items() if value)

    @property
    def password(self) -> Secret | None:
        """As the settings have it."""
        return Secret("file", str(self.password_file)) if self.password_file is not None else None

    def memory(self, directory: Path) -> DoorDatabase:
        """What a door has of it; a SQLite file is in the directory."""
        return DoorDatabase(self.url or sqlite_url(directory / "door.db"), self.password)


def add_door(config: Path, directory: Path, more: str = "", address: str = "127.0.0.1") -> ServeProgram:
    """
    Add the door to a desk's settings, with a server certificate for this address; not started.

    Unless `more` says otherwise, no exchange is cut off that a stalled machine makes long.
    """
    more = more if "exchange_for" in more else f'exchange_for = "2m"\n{more}'
    tls = make_tls(directory / "tls", sans=[address])
    table = f'[serve]\nlisten = "{address}:0"\ncertificate = "{tls.server_cert}"\nkey = "{tls.server_key}"\n{more}\n'
    config.write_text(f"{config.read_text()}\n{table}")
    return ServeProgram(config=config, ca=tls.ca, certificate=tls.server_cert, key=tls.server_key, address=address)


def make_door(
    directory: Path, certificate_pem: bytes, key_pem: bytes, policy: str, authorities: Sequence[str]
) -> ServeProgram:
    """A door with one CA for all authorities."""
    make_ca_directory(directory / "ca", certificate_pem, key_pem)
    tables = [f'[node]\nstate_dir = "{directory / "state"}"']
    tables += [f'[backend.desk]\ntype = "openssl"\ndir = "{directory / "ca"}"']
    tables += [f'[authority.{name}]\nbackend = "desk"' for name in authorities]
    (directory / "config.toml").write_text("\n\n".join(tables))
    (directory / "desk-policy.toml").write_text(policy)
    return add_door(directory / "config.toml", directory)


@contextmanager
def running(program: ServeProgram, command: Sequence[str] = (CA_BRIDGE,)) -> Iterator[ServeProgram]:
    """Started, and stopped at the end, also where it does not begin to serve."""
    try:
        program.start(command)
        yield program
    finally:
        if program.process is not None and program.process.poll() is None:
            program.stop()
