"""Hooks: real processes, their variables, their time limit, and that none is forgotten."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.errors import BackendRefusedError, Exit, SettingsError
from bridge.node import inventory, sample_pki
from bridge.node.inventory import Node
from bridge.pki.certificates import serial_hex
from bridge.renewal.hooks import HookError, HookEvent, Hooks, NotNowByHookError
from bridge.settings.load import overridden, parse
from bridge.settings.tables import Commands, Settings
from bridge.state import Outcome, Store
from bridge.system.console import LogFormat, set_up
from bridge.system.run_command import MOST_LOGGED

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
LONG = timedelta(seconds=30)
PATH = {"PATH": os.environ["PATH"]}

Make = Callable[..., Hooks]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    """A node with certificates."""
    directory = tmp_path_factory.mktemp("kubernetes")
    sample_pki.make(directory, now=NOW, not_after=NOW + timedelta(days=20), key="ecdsa-p256")
    return inventory.read(directory / "pki", directory)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty state directory."""
    store = Store(tmp_path / "state")
    store.prepare()
    return store


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where the hooks of a test write what they see."""
    return tmp_path / "log"


@pytest.fixture
def make(store: Store) -> Make:
    """Hooks of a run with these lines in the settings."""

    def make(*lines: str, run_id: str = "0badcafe") -> Hooks:
        return Hooks(settings(store, *lines), store, run_id)

    return make


def settings(store: Store, *lines: str) -> Settings:
    text = "\n".join(('[node]\nname = "cp1"\n[hooks]', *lines))
    return overridden(parse(text), None, None, store.directory)


def shell(script: str, event: str) -> str:
    """A line of the settings: this script at this event."""
    return f"{event} = {json.dumps([shlex.join(['sh', '-c', script])])}"


def renewed(node: Node, name: str = "apiserver", **about: int | str) -> HookEvent:
    """The node's certificate, taken for a new one."""
    [item] = [item for item in node.items if item.spec.name == name]
    live = item.certificates[0]
    outcome = Outcome(name=name, authority="ca", old=live, new=live)
    return HookEvent.of([item], [outcome], backup_id="20261125-1", exit_code=int(about.get("exit_code", 0)))


def to_run(store: Store) -> list[dict[str, object]]:
    if not store.hooks.exists():
        return []
    entries: list[dict[str, object]] = json.loads(store.hooks.read_text())["owed"]
    return entries


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_hook_is_a_command_or_a_list_of_them() -> None:
    """A command is split as a shell does, and no shell runs it."""
    hooks = parse("[hooks]\nbefore = \"/bin/a 'b c' d\"\nsuccess = ['x', 'y z']\ntimeout = '5s'\n").hooks
    assert hooks.before.words() == [["/bin/a", "b c", "d"]]
    assert hooks.success.words() == [["x"], ["y", "z"]]
    assert hooks.failure == Commands()
    assert hooks.timeout == timedelta(seconds=5)


@pytest.mark.parametrize("value", ['""', '["a", ""]', "'a \"b'", "3", "[3]", '[["a"]]'])
def test_what_is_no_command_is_a_settings_error(value: str) -> None:
    """The error has the line."""
    with pytest.raises(SettingsError) as e:
        parse(f"[hooks]\nsuccess = {value}\n")
    assert [(p.key, p.line) for p in e.value.problems] == [("hooks.success", 2)]


# --- a hook's variables ----------------------------------------------------------------------------------------------


def environment(log: Path) -> dict[str, str]:
    entries = log.read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


def test_a_hook_gets_the_renewed_names(make: Make, node: Node, store: Store, log: Path) -> None:
    """A hook gets them in the variables that docs/after-the-installation.md has."""
    hooks = make(shell(f"env -0 >{log}", "success"))
    assert hooks.finished(renewed(node)) == []
    [item] = [item for item in node.items if item.spec.name == "apiserver"]
    serial = serial_hex(item.certificates[0])
    found = environment(log)
    assert {name: value for name, value in found.items() if name.startswith("CA_BRIDGE_")} == {
        "CA_BRIDGE_EVENT": "success",
        "CA_BRIDGE_RUN_ID": "0badcafe",
        "CA_BRIDGE_NODE": "cp1",
        "CA_BRIDGE_CLUSTER": "kubernetes",
        "CA_BRIDGE_STATE_DIR": str(store.directory),
        "CA_BRIDGE_PKI_DIR": "/etc/kubernetes/pki",
        "CA_BRIDGE_KUBECONFIG_DIR": "/etc/kubernetes",
        "CA_BRIDGE_NAMES": "apiserver",
        "CA_BRIDGE_RENEWED": "apiserver",
        "CA_BRIDGE_OLD_SERIALS": f"apiserver={serial}",
        "CA_BRIDGE_NEW_SERIALS": f"apiserver={serial}",
        "CA_BRIDGE_FILES": f"{item.certificate_path}\n{item.key_path}",
        "CA_BRIDGE_BACKUP_ID": "20261125-1",
        "CA_BRIDGE_EXIT_CODE": "0",
        "CA_BRIDGE_ERRORS": "",
        "CA_BRIDGE_TRY": "1",
    }


def test_nothing_else_of_our_environment_is_reported(
    make: Make, node: Node, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that came to us in a variable stays with us."""
    monkeypatch.setenv("VAULT_TOKEN", "hvs.secret")
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.delenv("LANG", raising=False)
    make(shell(f"env -0 >{log}", "success")).finished(renewed(node))
    theirs = {name for name in environment(log) if not name.startswith("CA_BRIDGE_")}
    assert theirs - {"PWD", "SHLVL", "_", "OLDPWD"} == {"PATH", "HOME"}


def test_a_failure_is_reported_with_its_reasons(make: Make, node: Node, log: Path) -> None:
    """The CA's words without what could steer a terminal, cut where they are long."""
    error = BackendRefusedError("corp: no \x1b[31mrole" + "x" * 10_000)
    outcome = Outcome(name="apiserver", authority="ca", error=error)
    occasion = HookEvent.of(node.items[:2], [outcome], exit_code=5, errors=[BackendRefusedError("all of it")])
    make(shell(f"env -0 >{log}", "failure")).finished(occasion)
    found = environment(log)
    assert found["CA_BRIDGE_EVENT"] == "failure"
    assert found["CA_BRIDGE_EXIT_CODE"] == "5"
    assert found["CA_BRIDGE_NAMES"].split("\n")[:2] == [item.spec.name for item in node.items[:2]]
    assert found["CA_BRIDGE_RENEWED"] == ""
    assert found["CA_BRIDGE_ERRORS"].startswith("apiserver: corp: no \N{REPLACEMENT CHARACTER}[31mrole")
    assert len(found["CA_BRIDGE_ERRORS"]) == 4000


def test_the_output_of_a_hook_is_in_the_log(make: Make, node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error, with the event before it; standard output is for results."""
    set_up(0, LogFormat.TEXT)
    make(shell("echo done; echo trouble >&2; head -c 100000 /dev/zero", "success")).finished(renewed(node))
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line.rpartition(" [run ")[0] for line in err.splitlines()]
    assert lines[:2] == ["hook success: done", "hook success: trouble"]
    assert (
        lines[-1]
        == f"warning: hook success: sh: {100_000 + len('done trouble ') - MOST_LOGGED} more bytes of output are not shown"
    )


# --- which hooks run, and what a failure means -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "is_renewed", "event"),
    [
        (Exit.DONE, True, "success"),
        (Exit.WAITING, True, "success"),
        (Exit.DONE, False, ""),
        (Exit.WAITING, False, ""),
        (Exit.REFUSED, False, "failure"),
        (Exit.REFUSED, True, "failure"),
        (Exit.NOT_LIVE, True, "failure"),
        (Exit.ROLLED_BACK, True, "failure"),
    ],
)
def test_each_run_is_a_success_or_a_failure_or_waits(
    code: int, is_renewed: bool, event: str, make: Make, node: Node, log: Path
) -> None:
    """The exit code decides which hook runs."""
    log.touch()
    hooks = make(shell(f"echo success >>{log}", "success"), shell(f"echo failure >>{log}", "failure"))
    occasion = renewed(node, exit_code=code) if is_renewed else HookEvent(names=("apiserver",), exit_code=code)
    assert hooks.finished(occasion) == []
    assert log.read_text().split() == ([event] if event else [])


def test_a_before_hook_that_fails_stops_the_run(make: Make, log: Path, store: Store) -> None:
    """The hooks behind it do not run; no hook is left to run, since the next run begins with them anyway."""
    hooks = make(f'before = ["sh -c \\"exit 2\\"", "touch {log}"]')
    with pytest.raises(HookError) as e:
        hooks.before(HookEvent(names=("apiserver",)))
    assert e.value.exit_code == Exit.FAILED
    assert "hook before: sh ended with code 2" in str(e.value)
    assert not log.exists()
    assert not store.hooks.exists()


def test_a_before_hook_can_say_not_now(make: Make) -> None:
    """With the code that mailers use for "later"; the run's code is then that of "run again later"."""
    with pytest.raises(NotNowByHookError) as e:
        make(shell("exit 75", "before")).before(HookEvent(names=("apiserver",)))
    assert e.value.exit_code == Exit.UNAVAILABLE


def test_a_before_hook_that_agrees_lets_the_run_begin(make: Make, log: Path) -> None:
    """It gets the names of the certificates that are about to be renewed."""
    make(shell(f'echo "$CA_BRIDGE_EVENT $CA_BRIDGE_NAMES$CA_BRIDGE_EXIT_CODE" >{log}', "before")).before(
        HookEvent(names=("apiserver",))
    )
    assert log.read_text() == "before apiserver\n"


@pytest.mark.parametrize("event", ["after_install", "success"])
def test_a_hook_that_fails_after_the_installation_asks_for_a_look(event: str, make: Make, node: Node) -> None:
    """The exit code is 7, since the hook's work for the new certificates is not done."""
    hooks = make(shell("exit 1", event))
    [error] = hooks.installed(renewed(node)) if event == "after_install" else hooks.finished(renewed(node))
    assert error.exit_code == Exit.NOT_LIVE
    assert f"hook {event} of run 0badcafe: sh ended with code 1" in str(error)


def test_a_failure_hook_that_fails_changes_no_exit_code(make: Make, node: Node) -> None:
    """It is that of the failure."""
    [error] = make(shell("exit 1", "failure")).finished(renewed(node, exit_code=Exit.REFUSED))
    assert error.exit_code == Exit.REFUSED


# --- run again -------------------------------------------------------------------------------------------------------


def test_without_hooks_nothing_is_written(make: Make, node: Node, store: Store) -> None:
    """A run without hooks writes no file for them."""
    hooks = make()
    hooks.installing(renewed(node))
    assert hooks.installed(renewed(node)) + hooks.finished(renewed(node)) + hooks.again(node) == []
    assert not store.hooks.exists()


def test_a_failed_hook_is_run_again_by_the_next_run_as_it_was(make: Make, node: Node, store: Store, log: Path) -> None:
    """With the environment of its own run, and the number of the try; then it is forgotten."""
    script = f'echo "$CA_BRIDGE_RUN_ID $CA_BRIDGE_TRY $CA_BRIDGE_NEW_SERIALS" >>{log}; test $CA_BRIDGE_TRY -gt 2'
    line = shell(script, "success")
    assert len(make(line, run_id="aaaaaaaa").finished(renewed(node))) == 1
    assert stat.S_IMODE(store.hooks.stat().st_mode) == 0o600
    [error] = make(line, run_id="bbbbbbbb").again(node)
    assert error.exit_code == Exit.NOT_LIVE
    assert "run aaaaaaaa" in str(error)
    assert make(line, run_id="cccccccc").again(node) == []
    assert not store.hooks.exists()
    serial = renewed(node).new_serials["apiserver"]
    assert log.read_text().splitlines() == [f"aaaaaaaa {n} apiserver={serial}" for n in (1, 2, 3)]


def test_only_those_that_failed_run_again(make: Make, node: Node, log: Path) -> None:
    """One failure does not keep the others from running, either."""
    line = f'success = ["sh -c \\"echo 1 >>{log}\\"", "false", "sh -c \\"echo 3 >>{log}\\""]'
    make(line).finished(renewed(node))
    assert len(make(line).again(node)) == 1
    assert log.read_text() == "1\n3\n"


def test_a_hook_that_was_mended_in_the_settings_runs_in_the_place_of_the_old_one(
    make: Make, node: Node, store: Store, log: Path
) -> None:
    """The settings give the command, and the recorded event gives its variables."""
    make('success = "/nowhere/tell"').finished(renewed(node))
    assert make(shell(f"echo $CA_BRIDGE_TRY >{log}", "success")).again(node) == []
    assert log.read_text() == "2\n"
    assert not store.hooks.exists()


def test_a_hook_that_was_taken_out_is_dropped(
    make: Make, node: Node, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """A message says that it was dropped."""
    set_up(0, LogFormat.TEXT)
    make('success = "false"').finished(renewed(node))
    assert make().again(node) == []
    assert not store.hooks.exists()
    assert "hook success of run 0badcafe is not run again" in capsys.readouterr().err


def test_a_hook_about_certificates_that_are_not_in_use_is_dropped(make: Make, node: Node, store: Store) -> None:
    """These certificates were rolled back, or renewed once more, with hooks of their own."""
    gone = HookEvent(names=("apiserver",), new_serials={"apiserver": "00FF"}, exit_code=0)
    make('success = "false"').finished(gone)
    assert make('success = "false"').again(node) == []
    assert not store.hooks.exists()


def test_of_failures_the_newest_is_reported_again(make: Make, node: Node, store: Store) -> None:
    """A week of them is one message when the pager is back."""
    for number in range(7):
        make('failure = "false"', run_id=f"{number:08}").finished(HookEvent(names=("apiserver",), exit_code=6))
    assert [one["run_id"] for one in to_run(store)] == ["00000006"]
    [error] = make('failure = "false"').again(node)
    assert error.exit_code == Exit.FAILED


def test_the_hooks_to_run_have_a_limit(
    make: Make, node: Node, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hook that fails for years does not fill the disk; a message names each event that is given up."""
    set_up(0, LogFormat.TEXT)
    for number in range(22):
        make('success = "false"', run_id=f"{number:08}").finished(renewed(node))
    assert [one["run_id"] for one in to_run(store)] == [f"{number:08}" for number in range(2, 22)]
    assert "hook success of run 00000001 is given up" in capsys.readouterr().err


def test_a_crash_between_installation_and_hook_is_made_good(make: Make, node: Node, log: Path) -> None:
    """The hook was recorded before the installation, and runs afterwards."""
    line = shell(f"echo $CA_BRIDGE_NAMES >{log}", "after_install")
    make(line).installing(renewed(node))  # and then the machine goes down, with the new certificate in place
    assert make(line, run_id="bbbbbbbb").again(node) == []
    assert log.read_text() == "apiserver\n"


def test_a_crash_before_the_installation_leaves_no_hook(make: Make, node: Node, store: Store, log: Path) -> None:
    """The new certificates never came to life."""
    line = shell(f"echo $CA_BRIDGE_NAMES >{log}", "after_install")
    make(line).installing(HookEvent(names=("apiserver",), new_serials={"apiserver": "00FF"}))
    assert make(line, run_id="bbbbbbbb").again(node) == []
    assert not log.exists()
    assert not store.hooks.exists()


def test_after_the_installation_the_hook_runs_once(make: Make, node: Node, store: Store, log: Path) -> None:
    """The hook that was recorded before the installation is the same one, and runs once."""
    hooks = make(shell(f"echo x >>{log}", "after_install"))
    hooks.installing(renewed(node))
    assert len(to_run(store)) == 1
    assert hooks.installed(renewed(node)) == []
    assert hooks.again(node) == []
    assert log.read_text() == "x\n"


def test_a_hook_that_was_cut_off_by_kill_9_is_run_again(make: Make, node: Node, store: Store, log: Path) -> None:
    """The program is killed while the hook runs, and the hook with it, as systemd does."""
    line = (
        shell(f"echo $CA_BRIDGE_TRY >>{log}; test $CA_BRIDGE_TRY -gt 1 || sleep 600", "success") + "\ntimeout = '10m'"
    )
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from bridge.renewal.hooks import Hooks, HookEvent
        from bridge.settings.load import overridden, parse
        from bridge.state import Store
        state, text, serial = sys.argv[1:]
        settings = overridden(parse(text), None, None, Path(state))
        occasion = HookEvent(names=("apiserver",), new_serials={"apiserver": serial}, exit_code=0)
        Hooks(settings, Store(Path(state)), "aaaaaaaa").finished(occasion)
        """
    )
    serial = renewed(node).new_serials["apiserver"]
    process = subprocess.Popen([sys.executable, "-c", program, str(store.directory), f"[hooks]\n{line}", serial])
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    for child in children:
        os.killpg(int(child), signal.SIGKILL)
    assert len(children) == 1
    assert [(one["run_id"], one["tries"]) for one in to_run(store)] == [("aaaaaaaa", 1)]
    assert make(line, run_id="bbbbbbbb").again(node) == []
    assert log.read_text() == "1\n2\n"
    assert not store.hooks.exists()


BEFORE_DONE = {"event": "before", "run_id": "x", "environment": {}, "serials": {}, "done": [], "tries": 1}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"owed": [{}]}', json.dumps({"owed": [BEFORE_DONE]})],
    ids=["empty", "cut", "list", "no fields", "other event"],
)
def test_a_broken_file_is_set_aside_and_reported(text: str, make: Make, node: Node, store: Store) -> None:
    """The renewal goes on; a person looks at what the hooks would have done."""
    store.hooks.write_text(text)
    [error] = make('success = "true"').again(node)
    assert error.exit_code == Exit.FAILED
    [kept] = store.directory.glob("hooks.json.damaged-*")
    assert kept.read_text() == text
    assert str(kept) in error.hint
    assert make('success = "true"').again(node) == []


def test_where_nothing_can_be_remembered_nothing_is_installed(
    make: Make, node: Node, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an installation the hook runs all the same, and the failure is reported."""
    log = store.directory / "ran"
    hooks = make(shell(f"touch {log}; exit 1", "after_install"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bridge.system.state_file.write_atomically", full)
    with pytest.raises(HookError) as e:
        hooks.installing(renewed(node))
    assert e.value.exit_code == Exit.FAILED
    [error] = hooks.installed(renewed(node))
    assert "No space left on device" in str(error)
    assert log.exists()
