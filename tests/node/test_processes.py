"""The process table tells who runs what on this node, and since when."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.node import processes
from bridge.node.processes import Written
from bridge.specs import Component
from bridge.system.paths import UnreadableError
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


# --- ages ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "scheduler.conf"
    path.write_text("old")
    return path


@contextlib.contextmanager
def scheduler(file: Path, *, prefix: Sequence[str] = ()) -> Iterator[None]:
    """A process that is called by a file's name, as a scheduler is, and does nothing."""
    program = "import sys; print('up', flush=True); sys.stdin.read()"
    # bash: a shell whose `exec` knows -a
    command = [*prefix, "bash", "-c", 'exec -a kube-scheduler "$@"', "-", sys.executable, "-c", program]
    with subprocess.Popen(
        [*command, f"--kubeconfig={file}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "up\n"
        time.sleep(0.02)  # the process table counts in hundredths of a second
        try:
            yield
        finally:
            started.kill()


def older(file: Path) -> bool | None:
    return processes.compare_age(Component.SCHEDULER, file).older


def test_a_process_that_started_later_is_younger(file: Path) -> None:
    """A process that started after the file was written is younger, and one that ran when the file was written again is older."""
    time.sleep(0.02)
    with scheduler(file):
        assert older(file) is False
        file.write_text("new")
        assert older(file) is True
    time.sleep(0.02)  # the start of a process is known to a hundredth of a second
    with scheduler(file):
        assert older(file) is False


def test_times_that_are_set_back_deceive_no_check(file: Path) -> None:
    """`cp -p` and backups set times back; a rename counts, too."""
    time.sleep(0.02)
    with scheduler(file):
        file.write_text("new")
        os.utime(file, (0, 0))
        assert older(file) is True
    time.sleep(0.02)
    waiting = file.with_name("waiting")
    waiting.write_text("newer")
    with scheduler(file):
        waiting.rename(file)
        assert older(file) is True


@pytest.mark.parametrize("target", ["other.conf"])
def test_a_symlink_that_leads_elsewhere_is_another_file(file: Path, target: str) -> None:
    """A changed link counts as a new file, though its target is older."""
    old, new = file.with_name("real.conf"), file.with_name(target)
    file.rename(old)
    new.write_text("new")
    file.symlink_to(old)
    time.sleep(0.02)
    with scheduler(file):
        assert older(file) is False
        file.unlink()
        file.symlink_to(new)
        assert older(file) is True


def test_other_programs_of_the_same_name_do_not_count(file: Path) -> None:
    """A second scheduler, perhaps another cluster's, has a kubeconfig of its own; alone it says nothing of ours."""
    other = file.with_name("other.conf")
    with scheduler(other):
        time.sleep(0.02)
        file.write_text("new")
        time.sleep(0.02)
        with scheduler(file):
            assert older(file) is False
        age = processes.compare_age(Component.SCHEDULER, file)
        assert age.older is None
        assert f"with {file} among its arguments" in age.detail
        assert processes.compare_age(Component.SCHEDULER, file, by=[other]).older is True


def test_a_process_may_have_another_path_to_the_same_file(file: Path) -> None:
    """A process may reach the file by a link, or below another root."""
    link = file.with_name("link.conf")
    link.symlink_to(file)
    time.sleep(0.02)
    with scheduler(link):
        assert older(file) is False


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount needs root; run the tests as root")
def test_what_a_container_sees_counts_more_than_times(file: Path) -> None:
    """A file that is mounted by itself stays the old one when another takes its place."""
    directory, hold = file.parent / "etc", file.with_name("hold")
    directory.mkdir()
    hold.touch()
    file = file.rename(directory / file.name)
    time.sleep(0.02)
    # on a directory of its own, as in a container: a mount on the very file would go as the file goes
    steps = (
        f"mount --bind {file} {hold}",
        f"mount -t tmpfs none {directory}",
        f"touch {file}",
        f"mount --bind {hold} {file}",
        'exec "$@"',
    )
    mounted = ("unshare", "--mount", "bash", "-c", " && ".join(steps), "-")
    with scheduler(file, prefix=mounted):
        assert older(file) is False
        file.with_name("new").write_text("new")
        file.with_name("new").rename(file)
        age = processes.compare_age(Component.SCHEDULER, file)
        assert age.older is True
        assert age.detail.startswith("still sees")


def test_without_a_process_the_container_runtime_is_asked(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """crictl's date of the oldest running container, without those of users' pods; without crictl nothing is known."""
    proc = tmp_path / "proc"
    (proc / "self/ns").mkdir(parents=True)
    (proc / "self/ns/net").symlink_to("net:[1]")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def crictl(answer: str) -> processes.Age:
        program = tmp_path / "crictl"
        program.write_text(f"#!/bin/sh\necho '{answer}'\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return processes.compare_age(Component.SCHEDULER, file, proc)

    def created(*when: datetime, namespace: str = "kube-system") -> str:
        labels = {"io.kubernetes.pod.namespace": namespace}
        containers = [{"createdAt": str(int(one.timestamp() * 1e9)), "labels": labels} for one in when]
        return json.dumps({"containers": containers})

    now = datetime.now(UTC)
    assert crictl(created(now + timedelta(hours=1))).older is False
    assert crictl(created(now + timedelta(hours=1), now - timedelta(hours=1))).older is True
    assert crictl(created()).older is None
    assert crictl(created(now - timedelta(hours=1), namespace="team-a")).older is None
    assert crictl("no JSON").older is None


def test_a_file_from_the_future_tells_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is set back must not restart everything again and again."""

    class Earlier(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Earlier:
            assert tz is UTC
            return cls.fromtimestamp(file.stat().st_ctime - 3600, UTC)

    monkeypatch.setattr(processes, "datetime", Earlier)
    age = processes.compare_age(Component.SCHEDULER, file)
    assert age.older is None
    assert "in the future" in age.detail


def test_no_file(file: Path, tmp_path: Path) -> None:
    """A file that is not there, and one that is none, are errors."""
    file.unlink()
    with pytest.raises(ValueError, match="there is no such file"):
        processes.compare_age(Component.SCHEDULER, file)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(UnreadableError, match="not a regular file"):
        processes.compare_age(Component.SCHEDULER, fifo)


@pytest.mark.attack("N15")
def test_a_clock_that_was_wrong_then_does_not_count(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where we wrote down when we wrote the file, by the machine's own time; a file that another program has written has its ctime."""
    name = str(file)

    def by_record(written: Written) -> bool | None:
        return processes.compare_age(Component.SCHEDULER, file, written={name: written}).older

    with scheduler(file):
        before = Written.of(file)
        file.write_text("new")
        after = Written.of(file)
        assert by_record(after) is True
        # the record says that it was written before the process began, and is not of the file any more
        assert by_record(before) is True
    time.sleep(0.02)
    with scheduler(file):
        assert by_record(after) is False
        # as if it was written after the process began, by a clock that was behind
        late = dataclasses.replace(after, seconds=time.clock_gettime(time.CLOCK_BOOTTIME))
        assert older(file) is False
        assert by_record(late) is True
        # written before the machine was started: whatever runs has read it
        assert by_record(dataclasses.replace(late, boot="another")) is False
        monkeypatch.setattr(processes, "_boot_id", lambda: "another")
        assert by_record(late) is False
