"""A program is held to its limits, and whatever it does, a run goes on."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import pytest

from bridge.system import run_command
from bridge.system.run_command import (
    LONGEST_LINE,
    MOST_LOGGED,
    Command,
    Ended,
    OutputLines,
    openssl_environment,
    python_command,
    run,
    run_logged,
)
from tests.kit import dead_fs
from tests.kit.measured import is_running

LONG = timedelta(minutes=10)
PATH = {"PATH": os.environ["PATH"]}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


def test_a_command_is_reported_line_by_line_with_its_errors() -> None:
    """The last line needs no newline, and bytes that are no text are replaced."""
    lines: list[str] = []
    script = "echo one; echo two >&2; printf 'thr\\377'"
    assert run_logged(["sh", "-c", script], PATH, LONG, OutputLines(lines.append)) == Ended(0)
    assert lines == ["one", "two", "thr\N{REPLACEMENT CHARACTER}"]


def test_an_empty_path_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crontab may leave it so: commands are found in the usual places; in a place that is named, and there alone."""
    for path, is_found in (("", True), ("/nonexistent", False)):
        monkeypatch.setenv("PATH", path)
        logged = run_logged(["true"], {}, LONG, OutputLines(lambda _: None))
        plain = run(Command(words=["true"], environment=openssl_environment(), limit=LONG))
        assert (logged.code, plain.code) == ((0, 0) if is_found else (None, None))


@dead_fs.needs_mount
def test_a_program_on_a_dead_file_system_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is looked at, started, or started in a folder there; the same with a living one is done."""
    with dead_fs.mounted(tmp_path / "dead") as dead, monkeypatch.context() as patch:
        patch.setattr(run_command, "_REACH_SECONDS", 0.3)
        begun = time.monotonic()
        failure = "could not be started: no answer of its file system"
        assert run(Command(words=[f"{dead}/program"], environment=PATH, limit=LONG)).failure == failure
        assert run(Command(words=["true"], environment={"PATH": str(dead)}, limit=LONG)).failure == failure
        assert run(Command(words=["true"], environment=PATH, limit=LONG, folder=dead / "x")).failure == failure
        logged = run_logged([f"{dead}/program"], PATH, LONG, OutputLines(lambda _: None))
        assert "a program that we can look at, found no answer" in logged.failure
        assert time.monotonic() - begun < 300
    assert run(Command(words=["true"], environment=PATH, limit=LONG, folder=tmp_path)) == Ended(0)


@dead_fs.needs_mount
def test_a_script_whose_interpreter_is_on_a_dead_file_system_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by its first line, by that of its interpreter, by a path from its folder, or by env(1); with a living one it runs."""

    def script(name: str, interpreter: str) -> str:
        path = tmp_path / name
        path.write_text(f"#! {interpreter}\n")
        path.chmod(0o755)
        return str(path)

    def ended(words: list[str], seconds: float = 30) -> Ended:
        return run(Command(words=words, environment=PATH, limit=timedelta(seconds=seconds), folder=tmp_path))

    assert ended([script("lives", script("between", "/bin/true"))]) == Ended(0)
    with dead_fs.mounted(tmp_path / "dead") as dead:
        failure = "could not be started: no answer of its file system"
        with monkeypatch.context() as patch:
            patch.setattr(run_command, "_REACH_SECONDS", 0.3)
            assert ended([script("itself", f"{dead}/python3 -u")]).failure == failure
            assert ended([script("twice", script("between", f"{dead}/python3"))]).failure == failure
            assert ended([script("relative", "dead/python3")]).failure == failure
        assert ended([script("by-env", f"/usr/bin/env {dead}/python3")], 1).failure.startswith(
            "was still running after 1 s"
        )


def test_a_command_has_no_input_and_no_terminal() -> None:
    """One that asks is not answered, and does not wait."""
    lines: list[str] = []
    script = "cat; pwd; if : </dev/tty; then echo terminal; fi 2>/dev/null"
    run_logged(["sh", "-c", script], PATH, LONG, OutputLines(lines.append))
    assert lines == ["/"]


@pytest.mark.parametrize(
    ("words", "ended"),
    [
        (["sh", "-c", "exit 3"], Ended(3, "ended with code 3")),
        (["sh", "-c", "kill -TERM $$"], Ended(-15, "was ended by signal 15")),
        (["/nowhere/x"], Ended(None, "could not be started: No such file or directory")),
        (["/etc"], Ended(None, "could not be started: Permission denied")),
        (["a\0b"], Ended(None, "could not be started: embedded null byte")),
    ],
    ids=["code", "signal", "not there", "no program", "NUL"],
)
def test_a_failed_command_says_how(words: list[str], ended: Ended) -> None:
    """The words fit into a sentence."""
    assert run_logged(words, PATH, LONG, OutputLines(print)) == ended


def test_at_its_time_limit_a_command_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    """Grandchildren that ignore the friendly signals, too."""
    pids = tmp_path / "pids"
    script = f"trap '' TERM HUP; (trap '' TERM HUP; sh -c 'echo $$ >>{pids}; exec sleep 600' & sh -c 'echo $$ >>{pids}; sleep 600') & echo $$ >>{pids}; wait"
    pids.touch()
    started = time.monotonic()
    while len(pids.read_text().split()) < 3:  # it may be killed before all of it has begun
        pids.write_text("")
        ended = run_logged(["sh", "-c", script], PATH, timedelta(seconds=3), OutputLines(print))
        assert ended == Ended(None, "was still running after 3 s, and was killed")
        assert time.monotonic() - started < 300
    deadline = time.monotonic() + 180
    while any(is_running(int(pid)) for pid in pids.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(pids.read_text().split()) == 3
    assert not [pid for pid in pids.read_text().split() if is_running(int(pid))]


def test_a_command_that_closes_its_output_has_the_same_time_limit() -> None:
    """There is nothing more to read then, and still something to wait for."""
    ended = run_logged(
        ["sh", "-c", "exec >/dev/null 2>&1; sleep 600"], PATH, timedelta(seconds=0.5), OutputLines(print)
    )
    assert ended.code is None


def test_what_a_command_left_in_the_background_is_not_waited_for(tmp_path: Path) -> None:
    """The run ends though it holds the output open, and all earlier output is kept."""
    lines: list[str] = []
    pid = tmp_path / "pid"
    started = time.monotonic()
    assert run_logged(
        ["sh", "-c", f"sleep 600 & echo $! >{pid}; echo done"], PATH, LONG, OutputLines(lines.append)
    ) == Ended(0)
    assert time.monotonic() - started < 300
    assert lines == ["done"]
    os.kill(int(pid.read_text()), signal.SIGKILL)


def test_output_without_end_is_cut_and_does_not_stop_the_command() -> None:
    """A few screens are kept, the rest is counted."""
    lines: list[str] = []
    output = OutputLines(lines.append)
    total = 50 << 20
    assert run_logged(["head", "-c", str(total), "/dev/zero"], PATH, LONG, output) == Ended(0)
    assert output.left_out == total - MOST_LOGGED
    assert [len(line) for line in lines] == [LONGEST_LINE + 1]


def test_what_a_program_leaves_behind_is_ended_where_that_is_asked_for(tmp_path: Path) -> None:
    """All that it printed before is kept."""
    pid, output = tmp_path / "pid", bytearray()
    words = ["sh", "-c", f"sleep 600 & echo $! >{pid}; echo done"]
    command = Command(words=words, environment=PATH, limit=LONG, ends_background=True)
    assert run(command, output.extend) == Ended(0)
    assert output == b"done\n"
    deadline = time.monotonic() + 180
    while is_running(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(int(pid.read_text()))


@pytest.mark.parametrize("words", [["yes"], ["sh", "-c", "yes >&2"]], ids=["output", "messages"])
def test_a_program_that_prints_without_end_is_killed(words: list[str]) -> None:
    """A program is killed at a limit of bytes for both of its outputs."""
    command = Command(words=words, environment=PATH, limit=LONG, most_output=64 << 10)
    ended = run(command, len, len)
    assert (ended.stopped, ended.failure) == ("output", "printed more than 64 KiB, and was killed")


def test_a_program_is_stopped_when_it_is_enough() -> None:
    """The program is stopped long before its limit of time."""
    begin = time.monotonic()
    command = Command(words=["sleep", "600"], environment=PATH, limit=LONG)
    assert run(command, is_enough=lambda seconds: seconds > 0.1).stopped == "enough"
    assert time.monotonic() - begin < 300


def test_a_kernel_without_process_descriptors_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end is seen a moment later."""

    def lacking(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("os.pidfd_open", lacking)
    assert run(Command(words=["sh", "-c", "exec >&- 2>&-; sleep 0.1; exit 4"], environment=PATH, limit=LONG)).code == 4


@pytest.mark.attack("N3")
@needs_root
@pytest.mark.parametrize(
    ("script", "failure"),
    [
        ("echo up >&2; exec sleep 600", "was still running after 60 s, and can't be killed: it goes on"),
        (
            "setpriv --reuid=NOBODY --clear-groups sh -c 'echo up >&2; exec sleep 600' & sleep 600",
            "was still running after 60 s, and was killed, but something that it started goes on",
        ),
    ],
    ids=["itself", "what it started"],
)
def test_a_program_that_we_may_not_kill_is_given_up(script: str, failure: str) -> None:
    """Root without CAP_KILL, as below a unit: the run goes on, and says what is left; nothing waits for it."""
    is_itself = "NOBODY" not in script
    script = script.replace("NOBODY", str(pwd.getpwnam("nobody").pw_uid))
    code = f"""
        from datetime import timedelta
        from bridge.system import run_command
        from bridge.system.run_command import Account, Command, run
        run_command._KILL_SECONDS = {0.5 if is_itself else 10}
        account = Account.of("nobody" if {is_itself} else "")
        words = ["sh", "-c", "echo $$ >&2; " + {script!r}]
        command = Command(words=words, environment={PATH!r}, limit=timedelta(seconds=60), account=account)
        said = bytearray()
        ended = run(command, messages=said.extend, is_enough=lambda _: b"up" in said)
        print(said.split()[0].decode(), ended.failure)
    """
    done = subprocess.run(
        ["setpriv", "--bounding-set=-kill", *python_command(textwrap.dedent(code))],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    pid, _, found = done.stdout.strip().partition(" ")
    os.killpg(int(pid), signal.SIGKILL)
    assert found == failure


def test_finds_what_this_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports from a directory that only this process has in its path, as a release's tree is; arguments arrive."""
    (tmp_path / "only_here.py").write_text("import sys; print(sys.argv[1:])")
    command = python_command("import only_here", "a", "b c")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    monkeypatch.syspath_prepend(tmp_path)
    command = python_command("import only_here", "a", "b c")
    assert subprocess.check_output(command, text=True) == "['a', 'b c']\n"


def test_its_surroundings_have_no_say(tmp_path: Path) -> None:
    """$PYTHONPATH and the working directory have no effect."""
    (tmp_path / "json.py").write_text("print('theirs')")
    done = subprocess.run(
        python_command("import json; print(json.loads('1'))"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"


@pytest.mark.attack("N12")
@needs_root
@pytest.mark.parametrize(
    ("mode", "owner", "found"),
    [(0o777, 0, "mode 0777"), (0o775, 0, "mode 0775"), (0o755, 12345, "user 12345")],
    ids=["all", "a group", "an owner"],
)
def test_a_command_that_others_can_change_is_not_run(tmp_path: Path, mode: int, owner: int, found: str) -> None:
    """Hooks and restart commands go by the rule that settings and helpers go by; its owner's alone is run."""
    program = tmp_path / "hook"
    program.write_text(f"#!/bin/sh\necho ran >>{tmp_path}/ran\n")
    os.chown(program, owner, owner)
    program.chmod(mode)
    ended = run_logged([str(program)], PATH, LONG, OutputLines(print))
    assert ended.code is None
    assert f"is not run: {program}: wanted " in ended.failure
    assert found in ended.failure
    assert not (tmp_path / "ran").exists()
    os.chown(program, 0, 0)
    program.chmod(0o755)
    assert run_logged([str(program)], PATH, LONG, OutputLines(print)) == Ended(0)
    assert (tmp_path / "ran").exists()
