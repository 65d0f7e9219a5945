"""Completion in real shells, and the manual in real readers."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridge.cli import completion
from bridge.cli.settings import examples as initial_kinds
from tests.kit import manual
from tests.kit.commands import PROGRAM, commands

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "bash": ROOT / "share/bash-completion/completions/ca-bridge",
    "zsh": ROOT / "share/zsh/site-functions/_ca-bridge",
    "fish": ROOT / "share/fish/vendor_completions.d/ca-bridge.fish",
}
BIN = Path(sys.executable).parent


def program(name: str) -> str:
    """Its path."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def offered(*words: str) -> list[str]:
    return [word for word, _ in completion.offers(PROGRAM, words)]


def test_what_may_be_typed() -> None:
    """Commands, options, their values, names that were not given yet; nothing where only the operator knows."""
    assert {"renew", "check-expiration", "audit"} <= set(offered(""))
    assert offered("chec") == ["check-expiration"]
    assert offered("audit", "") == ["show", "verify"]
    assert offered("renew", "apiserver", "apiserver-e") == ["apiserver-etcd-client"]
    assert "apiserver" not in offered("renew", "--wait", "60s", "apiserver", "")
    assert offered("renew", "--any-identity", "scheduler.") == ["scheduler.conf"]
    assert offered("renew", "--dry") == ["--dry-run"]
    assert offered("renew", "--dry-run", "--dry") == []
    assert offered("check-expiration", "-o", "pro") == ["prometheus"]
    assert offered("check-expiration", "--output=pro") == ["prometheus"]
    assert offered("check-expiration", "--output", "=", "pro") == ["prometheus"]
    assert {"vault", "systemd"} <= set(offered("setup", ""))
    assert offered("settings", "init", "") == list(initial_kinds())
    assert offered("settings", "init", "d") == ["desk", "door"]
    assert offered("setup", "--authority", "etc") == ["etcd-ca"]
    assert offered("backend", "test", "front") == ["front-proxy-ca"]
    assert "etcd-peer" in offered("backend", "test", "etcd-ca", "")
    assert offered("restart", "kube-s") == ["kube-scheduler"]
    assert offered("export", "") == []
    assert "apiserver" in offered("export", "bundle.json", "")
    assert offered("nosuchcommand", "") == offered("")
    assert "complete" not in offered("")


def test_each_name_that_completion_knows_is_a_commands_parameter() -> None:
    """A parameter that was renamed is noticed."""
    there = {(one.words[-1], p.name) for one in commands() if one.words for p in one.context.command.params}
    known = {(command, name) for command, name in completion.VALUES if command}
    assert known <= there
    assert {name for command, name in completion.VALUES if not command} <= {name for _, name in there}


def test_backups_and_requests_of_this_node(tmp_path: Path) -> None:
    """From the state directory; without one, or with broken settings, there is just less."""
    state = tmp_path / "state"
    (state / "backups/20260101T000000Z-1").mkdir(parents=True)
    (state / "backups/20260202T000000Z-2").mkdir()
    state.chmod(0o700)
    place = ("--state-dir", str(state))
    assert offered("rollback", *place, "") == ["20260202T000000Z-2", "20260101T000000Z-1"]
    assert offered("rollback", "--state-dir", str(tmp_path / "nowhere"), "") == []
    assert offered("pending", "cancel", *place, "") == ["all"]
    config = tmp_path / "config.toml"
    config.write_text("broken")
    assert offered("rollback", "--config", str(config), "") == []
    assert "apiserver" in offered("renew", "--config", str(config), "")


def environment() -> dict[str, str]:
    return {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": "/nonexistent", "TERM": "dumb"}


def test_bash() -> None:
    """The script that is shipped."""
    code = (
        f"source {SCRIPTS['bash']}; COMP_WORDS=(ca-bridge renew apiserver-); COMP_CWORD=2; "
        '_ca_bridge ca-bridge; printf "%s\\n" "${COMPREPLY[@]}"; complete -p ca-bridge'
    )
    run = subprocess.run(
        [program("bash"), "--norc", "-c", code], env=environment(), check=True, capture_output=True, text=True
    )
    assert run.stdout.split("\n")[:-1] == [
        "apiserver-etcd-client",
        "apiserver-kubelet-client",
        "complete -o default -F _ca_bridge ca-bridge",
    ]


def test_fish(tmp_path: Path) -> None:
    """The script that is shipped; each word with its meaning, and files where nothing is offered."""
    (tmp_path / "answer.json").touch()
    code = f"source {SCRIPTS['fish']}; complete -C 'ca-bridge renew etcd-s'; complete -C 'ca-bridge import ans'"
    run = subprocess.run(
        [program("fish"), "--no-config", "-c", code],
        env={**environment(), "HOME": str(tmp_path)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.splitlines() == ["etcd-server\tsigned by etcd-ca", "answer.json"]


def test_zsh(tmp_path: Path) -> None:
    """The shipped script completes what a person types in an interactive shell."""
    (tmp_path / "_ca-bridge").write_bytes(SCRIPTS["zsh"].read_bytes())
    (tmp_path / ".zshrc").write_text(
        f"PS1='ready> '; fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -D -u\n"
        "zle -C whole-word complete-word _generic\n"
    )
    parent, child = pty.openpty()
    with subprocess.Popen(
        [program("zsh"), "-i"],
        env={**environment(), "ZDOTDIR": str(tmp_path), "HOME": str(tmp_path)},
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
    ) as process:
        os.close(child)
        read_until(parent, "ready> ")
        os.write(parent, b"ca-bridge renew scheduler.\t --dry\t \x01echo got: \n")
        shown = read_until(parent, "got: ca-bridge renew scheduler.conf --dry-run")
        os.write(parent, b"exit\n")
        process.kill()
    os.close(parent)
    assert "got: ca-bridge renew scheduler.conf --dry-run" in shown


def read_until(terminal: int, text: str) -> str:
    """What the terminal shows until it shows this; all of it after two minutes."""
    shown, end = "", time.monotonic() + 120
    while text not in shown and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
    return shown


def test_the_manual_s_pages_are_in_order() -> None:
    """mandoc and groff have nothing to say, and would about a page that is not."""
    pages = [str(path) for path in sorted(manual.DIRECTORY.glob("*.1"))]
    assert len(pages) > 20
    lint = [program("mandoc"), "-T", "lint", "-W", "warning"]
    groff = [program("groff"), "-man", "-ww", "-z", "-Tutf8"]
    for command in (lint, groff):
        run = subprocess.run([*command, *pages], check=False, capture_output=True, text=True)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_page_that_is_not_in_order_is_found(tmp_path: Path) -> None:
    """Both readers report a page that is not in order."""
    page = tmp_path / "broken.1"
    page.write_text((manual.DIRECTORY / "ca-bridge.1").read_text() + ".SH\n.NOSUCH x\n\\fQ\n")
    lint = subprocess.run([program("mandoc"), "-T", "lint", "-W", "warning", str(page)], check=False)
    assert lint.returncode != 0
    groff = [program("groff"), "-man", "-ww", "-z", "-Tutf8", str(page)]
    assert "NOSUCH" in subprocess.run(groff, check=False, capture_output=True, text=True).stderr
