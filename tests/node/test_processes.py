"""The process table tells who runs what on this node, and since when."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.node import processes
from bridge.system.waiting import wait_until

LONG = timedelta(minutes=3)
#: So that no real one is found.
PROGRAM = f"kube-scheduler-{os.getpid()}"


@contextlib.contextmanager
def process(*arguments: str, prefix: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A process that calls itself by the program's name, and has said that it runs."""
    program = "import sys; print('up', flush=True); sys.stdin.read()"
    # bash: a shell whose `exec` knows -a
    command = [*prefix, "bash", "-c", 'exec -a "$0" "$@"', f"/usr/local/bin/{PROGRAM}", sys.executable, "-c", program]
    with subprocess.Popen([*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "up\n"
        try:
            yield started
        finally:
            started.kill()


def test_finds_a_program_by_its_name() -> None:
    """With its arguments, its start by the wall clock, and its own view of the files."""
    begin = datetime.now(UTC)
    assert processes.running(PROGRAM) == []
    with process("--kubeconfig=/a b") as started:
        end = datetime.now(UTC)
        (found,) = processes.running(PROGRAM)
        assert found.pid == started.pid
        assert found.arguments[0] == f"/usr/local/bin/{PROGRAM}"
        assert found.arguments[-1] == "--kubeconfig=/a b"
        tick = timedelta(seconds=0.02)
        assert begin - tick <= found.started <= end + tick
        assert (found.root / "etc/hostname").exists() == Path("/etc/hostname").exists()
    assert processes.running(PROGRAM) == []


@pytest.mark.parametrize("call", range(1, 5))
def test_a_busy_machine_makes_no_process_younger(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Other programs may run for seconds between the readings of two clocks; the process has its start all the same."""
    calls, behind = itertools.count(1), [0.0]

    def after_a_while(read: Callable[..., float]) -> Callable[..., float]:
        def reading(*clock: int) -> float:
            behind[0] += 5 * (next(calls) == call)
            return read(*clock) + behind[0]

        return reading

    with process():
        (before,) = processes.running(PROGRAM)
        for name in ("time", "clock_gettime"):
            monkeypatch.setattr(time, name, after_a_while(getattr(time, name)))
        (found,) = processes.running(PROGRAM)
        monkeypatch.undo()
    assert next(calls) > call
    assert abs(found.started - before.started) < timedelta(seconds=1)


def test_the_oldest_comes_first() -> None:
    """The older of two processes of a program comes first, since it may still run on an old file."""
    with process("first") as first:
        time.sleep(2 / os.sysconf("SC_CLK_TCK"))  # of two that begin in one tick none is the older
        with process("second") as second:
            assert [found.pid for found in processes.running(PROGRAM)] == [first.pid, second.pid]


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root; run the tests as root")
def test_another_nodes_processes_are_not_this_nodes() -> None:
    """Several nodes may be on one machine, each in a network of its own."""
    assert shutil.which("unshare")
    with process("other", prefix=("unshare", "--net")), process("this") as ours:
        assert [found.pid for found in processes.running(PROGRAM)] == [ours.pid]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user; run the tests as root")
@pytest.mark.parametrize(("uid", "counts"), [(1000, False), (65534, False), (998, True), (0, True)])
def test_a_persons_process_is_no_component(uid: int, counts: bool) -> None:
    """Any user may give a process any name and arguments: a renewal would wait for its end, or be rolled back for it."""
    words = ["setpriv", f"--reuid={uid}", "--clear-groups", "bash", "-c", 'exec -a "$0" sleep 600', PROGRAM]
    with subprocess.Popen(words) as started:
        try:
            line = Path(f"/proc/{started.pid}/cmdline")
            assert wait_until(line.read_bytes, lambda text: text.startswith(PROGRAM.encode()), LONG, pause_seconds=0.02)
            assert [found.pid for found in processes.running(PROGRAM)] == [started.pid] * counts
        finally:
            started.kill()
