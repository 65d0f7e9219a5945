"""
The installed program in processes that are forked from one that has loaded its modules.

A run takes a third of the processor time, for tests with hundreds of runs whose subject is what a CA answers, and not how
the program starts. Each run is a process of its own: with its own environment, streams and exit code.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

#: The command line, with what `renew`, `sign` and `bootstrap` load of the rooms and of two backends.
_MODULES = (
    *("bridge.cli.app", "bridge.cli.bootstrap", "bridge.cli.desk", "bridge.cli.renew", "bridge.renewal.allowed"),
    *("backends.openssl", "backends.vault.server"),
)
#: Bytes of a command with its environment.
_LARGEST = 1 << 17
_SERVER = """
import importlib, json, os, socket, sys, traceback
gate = socket.socket(fileno=int(sys.argv[1]))
for name in sys.argv[2:]:
    importlib.import_module(name)
from bridge.entry import main
while True:
    order, streams, _, _ = socket.recv_fds(gate, {largest}, 3)
    if not order:
        break
    pid = os.fork()
    if pid == 0:
        gate.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.argv, environment, directory = json.loads(order)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        try:
            main()
        except BaseException:
            traceback.print_exc()
        os._exit(70)
    for stream in streams:
        os.close(stream)
    gate.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
"""


class Warm:
    """The process that is forked; one run at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gate, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SERVER.format(largest=_LARGEST), str(theirs.fileno()), *_MODULES],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def run(
        self, command: Sequence[str], *, timeout: float, more: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` does it, with `more` in the environment; nothing to read on standard input."""
        order = json.dumps([list(command), {**_environment(), **(more or {})}, str(Path.cwd())]).encode()
        with (
            self._lock,
            Path(os.devnull).open("rb") as none,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
        ):
            self._gate.settimeout(timeout)
            socket.send_fds(self._gate, [order], [none.fileno(), out.fileno(), err.fileno()])
            try:
                code = self._gate.recv(64)
            except TimeoutError:  # a later run must not get this one's exit code
                self.close()
                shared.cache_clear()
                raise subprocess.TimeoutExpired(command, timeout) from None
            assert code, "the process that is forked has ended"
            texts = [_text(file.fileno()) for file in (out, err)]
        return subprocess.CompletedProcess(list(command), int(code), *texts)

    def close(self) -> None:
        """End it, with a run that was not over in time."""
        self._gate.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8"}


def _text(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, encoding="utf-8", closefd=False) as file:
        return file.read()


@functools.cache
def shared() -> Warm:
    """Share one for this process, as long as it lives."""
    warm = Warm()
    atexit.register(warm.close)
    return warm
