"""A real haproxy that serves a further pair over TLS, and reads it again at SIGUSR2."""

from __future__ import annotations

import contextlib
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography import x509

from bridge.system.waiting import wait_until
from tests.kit.loopback import free_port

#: The key of `tls.crt` is in `tls.key`, as well as in `tls.crt` itself.
_CONFIG = """\
global
  ssl-load-extra-del-ext
defaults
  mode http
  timeout client 3m
  timeout connect 3m
  timeout server 3m
frontend tls
  bind 127.0.0.1:{port} ssl crt {certificate}
  http-request return status 200
"""
_START_SECONDS = 180


@dataclass(frozen=True, slots=True, kw_only=True)
class HaProxy:
    """One that runs."""

    port: int
    pid: int

    @property
    def reload(self) -> str:
        """The command that has it read its configuration and its pair again."""
        return f"/bin/kill -USR2 {self.pid}"

    def shown(self) -> x509.Certificate:
        """The certificate that it shows; while it reads its pair again it may end a connection."""
        found = wait_until(self.look, bool, timedelta(seconds=_START_SECONDS), pause_seconds=0.05)
        assert found is not None
        return found

    def look(self) -> x509.Certificate | None:
        """The same at this moment; None: the connection was ended."""
        try:
            pem = ssl.get_server_certificate(("127.0.0.1", self.port), timeout=180)
        except OSError:
            return None
        return x509.load_pem_x509_certificate(pem.encode())


def program() -> str | None:
    """The program; None: it is not here."""
    return shutil.which("haproxy", path="/usr/sbin:/usr/bin")


@contextlib.contextmanager
def serving(directory: Path, certificate: Path) -> Iterator[HaProxy]:
    """Serve the pair whose certificate this is; its key is in the same file, or beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    port, config = free_port(), directory / "haproxy.cfg"
    config.write_text(_CONFIG.format(port=port, certificate=certificate))
    command = program()
    assert command is not None, "apt-get install haproxy"
    with (directory / "haproxy.log").open("wb") as log:
        process = subprocess.Popen([command, "-W", "-f", str(config)], stdout=log, stderr=log)
    try:
        found = HaProxy(port=port, pid=process.pid)
        end = time.monotonic() + _START_SECONDS
        while found.look() is None:
            assert process.poll() is None, (directory / "haproxy.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        yield found
    finally:
        process.terminate()
        process.wait(180)
