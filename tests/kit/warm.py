"""
The installed program in processes that are forked from one that has loaded its modules.

A run that asks no CA takes a fifth of the processor time, for tests whose subject is not how the program starts. Each run is
a process of its own: with its own environment, directory, streams and exit code. Where what counts
when a process starts (`fits`) is no longer as it was, a run is a new process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.kit import fence

#: The command line, with what `renew`, `sign` and `bootstrap` load of the rooms and of two backends.
_MODULES = (
    *("bridge.cli.app", "bridge.cli.bootstrap", "bridge.cli.desk", "bridge.cli.renew"),
    *("backends.openssl", "backends.vault.server"),
)
#: Bytes of a command with its environment.
_LARGEST = 1 << 17
#: How variables begin that count when a process starts, and not later.
_READ_AT_THE_START = ("PYTHON", "OPENSSL_", "LD_", "TZ")
_SERVER = """
import importlib, json, os, runpy, socket, sys, traceback
gate = socket.socket(fileno=int(sys.argv[1]))
runpy.run_path(sys.argv[2])["hold"]()
for name in sys.argv[3:]:
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
    child = os.pidfd_open(pid)
    socket.send_fds(gate, [b"begun"], [child])
    os.close(child)
    gate.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
"""


class Begun:
    """A run that has begun; until it is waited for no other begins."""

    def __init__(self, child: int, end: Callable[[], int]) -> None:
        self._child, self._end = child, end

    def kill(self) -> None:
        """As `kill -9`; one that has ended stays as it is."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._child, signal.SIGKILL)

    @property
    def has_ended(self) -> bool:
        """Without waiting."""
        return bool(select.select([self._child], [], [], 0)[0])

    def wait(self) -> int:
        """Its exit code; negative: the signal that ended it."""
        try:
            return self._end()
        finally:
            os.close(self._child)


class Warm:
    """The process that is forked; one run at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gate, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        python = [sys.executable, "-P", "-c", _SERVER.format(largest=_LARGEST)]
        with theirs:
            self._process = subprocess.Popen(
                [*python, str(theirs.fileno()), fence.__file__, *_MODULES],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def run(
        self, command: Sequence[str], *, timeout: float, more: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """
        As `subprocess.run` does it, with `more` in the environment; nothing to read on standard input.

        Where a fork would not find what a new process finds (`fits`), it is a new process.
        """
        if not fits():
            environment = {**_environment(), **(more or {})}
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
            return subprocess.run(command, **streams, check=False, timeout=timeout, env=environment, cwd=cwd)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = self._begin(command, (out.fileno(), err.fileno()), timeout, more or {}, cwd).wait()
            texts = [_text(file.fileno()) for file in (out, err)]
        return subprocess.CompletedProcess(list(command), code, *texts)

    def begin(self, command: Sequence[str], *, timeout: float) -> Begun:
        """
        Begin one to be killed, whose output is not looked at.

        Raises:
            AssertionError: A fork would not find what a new process finds.
        """
        assert fits(), f"wanted {_PLACE}, in which the modules were loaded, found {_place()}"
        with Path(os.devnull).open("r+b") as none:
            return self._begin(command, (none.fileno(), none.fileno()), timeout, {}, None)

    def _begin(
        self,
        command: Sequence[str],
        streams: tuple[int, int],
        timeout: float,
        more: Mapping[str, str],
        cwd: Path | None,
    ) -> Begun:
        order = json.dumps([list(command), {**_environment(), **more}, str(cwd or Path.cwd())]).encode()
        self._lock.acquire()

        @contextlib.contextmanager
        def in_time() -> Iterator[None]:
            try:
                yield
            except TimeoutError:  # a later run must not get this one's exit code
                self.close()
                shared.cache_clear()
                raise subprocess.TimeoutExpired(command, timeout) from None

        def end() -> int:
            try:
                with in_time():
                    code = self._gate.recv(64)
            finally:
                self._lock.release()
            assert code, "the process that is forked has ended"
            return int(code)

        try:
            self._gate.settimeout(timeout)
            with in_time(), Path(os.devnull).open("rb") as none:
                socket.send_fds(self._gate, [order], [none.fileno(), *streams])
                begun, children, _, _ = socket.recv_fds(self._gate, 64, 1)
            assert begun, "the process that is forked has ended"
        except BaseException:
            self._lock.release()
            raise
        return Begun(children[0], end)

    def close(self) -> None:
        """End it, with a run that was not over in time."""
        self._gate.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def fits() -> bool:
    """Whether a new process would find what the forked one has found when it began; if not, a new one it must be."""
    return _place() == _PLACE


def _place() -> tuple[str, ...]:
    """Where this thread is, and what a Python or its libraries read of the environment when they start."""
    status = Path("/proc/thread-self/status").read_text(encoding="ascii")
    umask = next(line for line in status.splitlines() if line.startswith("Umask:"))
    read = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(_READ_AT_THE_START))
    return (umask, *(str(Path(f"/proc/thread-self/ns/{name}").readlink()) for name in ("mnt", "net")), *read)


_PLACE = _place()


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
