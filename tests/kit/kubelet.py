"""
A stand-in for a kubelet: a process of that name, which serves TLS as its configuration says, and restarts on request.

It says what the real one says to `--exit-on-lock-contention` without a lock file, once its configuration is valid:
`tests/control_plane/test_kubelet_trial.py` asks the real one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

#: Its arguments: PORT MADE SIGNED --config=FILE, where MADE and SIGNED are certificates with their keys.
_CODE = """
import pathlib, socket, ssl, sys
port, made, signed, config, *flags = sys.argv[1:]
text = pathlib.Path(config.partition("=")[2]).read_text()
if "bad: true" in text:
    sys.exit('E1 "command failed" err="failed to validate kubelet configuration: bad"')
if "--exit-on-lock-contention" in flags:
    sys.exit('E1 "command failed" err="failed to run Kubelet: cannot exit on lock file contention: no lock file specified"')
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(signed if "serverTLSBootstrap: true" in text and pathlib.Path(signed).exists() else made)
server = socket.create_server(("127.0.0.1", int(port)))
while True:
    try:
        context.wrap_socket(server.accept()[0], server_side=True).close()
    except OSError:
        pass
"""


def _python() -> str:
    """One that another user may run, too: ours may be root's."""
    found = shutil.which("python3", path=os.defpath)
    assert found is not None
    return found


@dataclass(frozen=True, kw_only=True)
class StandInKubelet:
    """One, by its files."""

    directory: Path  #: Where `config.yaml` is.
    port: int

    @property
    def config(self) -> Path:
        """Its configuration."""
        return self.directory / "config.yaml"

    @property
    def signed(self) -> Path:
        """What a signer gives it, as soon as it is there."""
        return self.directory / "signed.pem"

    @property
    def made(self) -> Path:
        """What it makes itself."""
        return self.directory / "made.pem"

    @property
    def _pid(self) -> Path:
        return self.directory / "pid"

    @property
    def pid(self) -> int:
        """The PID of the running kubelet."""
        return int(self._pid.read_text())

    def start(self) -> None:
        """Begin to serve."""
        arguments = [
            "kubelet",
            "-c",
            _CODE,
            str(self.port),
            str(self.made),
            str(self.signed),
            f"--config={self.config}",
        ]
        nowhere = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
        # no child of `subprocess`, which would warn of one that runs on
        self._pid.write_text(str(os.posix_spawn(_python(), arguments, os.environ, file_actions=nowhere)))
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self._state() not in {"", "Z"}:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return

    def command(self) -> str:
        """A command that restarts it."""
        script = self.directory / "restart.py"
        root = Path(__file__).resolve().parents[2]
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(root)!r})\n"
            "from pathlib import Path\nfrom tests.kit.kubelet import StandInKubelet\n"
            f"one = StandInKubelet(directory=Path({str(self.directory)!r}), port={self.port})\none.stop()\none.start()\n"
        )
        return f"{sys.executable} {script}"

    def stop(self) -> None:
        """End it, and wait until it has."""
        try:
            os.kill(self.pid, signal.SIGKILL)
            while self._state() not in {"", "Z"}:
                time.sleep(0.01)
        except (FileNotFoundError, ProcessLookupError):
            return

    def _state(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return ""
