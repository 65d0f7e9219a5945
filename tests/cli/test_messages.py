"""A user who made a mistake, lacks rights, or is on the wrong machine reads what to do next."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bridge import diagnosis
from bridge.cli.app import app
from bridge.cli.results import grouped
from bridge.errors import BackendRefusedError, BridgeError
from bridge.pki.expiry import duration_text, parse_duration
from bridge.specs import AUTHORITIES
from bridge.state import Outcome
from bridge.system.console import ROOT_HINT, hint_of
from tests.kit import openbao
from tests.kit.cas import Bridge, add_openssl
from tests.kit.pki import Pki, handmade_pki


@pytest.fixture
def bridge(tmp_path: Path) -> Bridge:
    """A node with its CAs."""
    made = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    for authority in ("ca", "etcd-ca", "front-proxy-ca"):
        add_openssl(made, authority)
    return made


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("renew", "apiservr"), "apiserver"),
        (("plan", "admin.con"), "admin.conf"),
        (("audit", "show", "--name", "apiservr"), "apiserver"),
        (("restart", "kube-schduler"), "kube-scheduler"),
        (("setup", "vault", "--authority", "etcd"), "etcd-ca"),
        (("pending", "cancel", "etcd-pear"), "etcd-peer"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(bridge: Bridge, arguments: tuple[str, ...], meant: str) -> None:
    """The exit code is 2, and the error lists the existing names."""
    run = bridge.run(*arguments)
    assert run.returncode == 2, run.stdout
    assert f"(did you mean {meant!r}?)" in run.stderr


@pytest.mark.first_use("27")
@pytest.mark.parametrize(
    "words", [("rnew",), ("backups", "--foo"), ("audit", "shw"), ("doctor", "-o", "tabel"), ("--foo",)]
)
def test_a_usage_error_reads_as_all_errors_do(words: tuple[str, ...]) -> None:
    """`error:` as elsewhere, below how it is used; without any word the help comes."""
    run = CliRunner().invoke(app, list(words))
    assert (run.exit_code, run.stdout) == (2, "")
    usage, *_, error = run.stderr.splitlines()
    assert usage.startswith("Usage: ")
    assert error.startswith("error: ")
    assert "Error:" not in run.stderr
    assert "Usage: " in CliRunner().invoke(app, []).output


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("--config", "x.toml", "renew"), "ca-bridge COMMAND --config"),
        (("-v", "renew"), "ca-bridge COMMAND -v"),
        (("bootstrap", "--state-dir=x", "check"), "ca-bridge bootstrap COMMAND --state-dir"),
    ],
)
def test_an_option_of_every_command_before_the_command(words: tuple[str, ...], meant: str) -> None:
    """The help lists it for each command: the error says where it belongs; of another word it says nothing."""
    run = CliRunner().invoke(app, list(words), prog_name="ca-bridge")
    assert (run.exit_code, run.stderr.splitlines()[-1].endswith(f"; write it behind the command: {meant}")) == (2, True)
    assert "behind the command" not in CliRunner().invoke(app, ["--foo", "renew"]).stderr


def test_an_unknown_authority_gets_a_suggestion(bridge: Bridge) -> None:
    """An unknown authority in the settings gets a suggestion, with its line."""
    bridge.config.write_text(bridge.config.read_text().replace("[authority.etcd-ca]", "[authority.etcd]"))
    run = bridge.run("plan")
    assert (run.returncode, "(did you mean 'etcd-ca'?)" in run.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--csr-only",), "--csr-only needs --csr-dir"), (("--csr-dir", "x"), "--csr-dir needs --csr-only")],
)
def test_the_option_that_is_missing_is_named(bridge: Bridge, arguments: tuple[str, ...], says: str) -> None:
    """The error names the missing option, and does not say that both go together when one is not given."""
    run = bridge.run("renew", *arguments)
    assert (run.returncode, says in " ".join(run.stderr.split())) == (2, True), run.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("check-expiration", "--pki-dir", ""),
        ("plan", "--config="),
        ("setup", "vault", "--output", ""),
        ("import", "answer.json", ""),
        ("kubeconfig", "user", "alice", "--ca", ""),
    ],
)
def test_an_empty_path_is_a_usage_error(words: tuple[str, ...]) -> None:
    """A script whose variable is not set means no path, and not the working directory, which is `.`."""
    run = CliRunner().invoke(app, list(words))
    assert (run.exit_code, run.stdout) == (2, "")
    assert "wanted a path, found an empty text" in run.stderr
    assert "wanted a path" not in CliRunner().invoke(app, ["check-expiration", "--pki-dir", "."]).stderr


@pytest.mark.parametrize("command", [("renew",), ("renew", "all"), ("plan",), ("export", "bundle.json")])
def test_on_a_machine_that_is_no_node_one_sentence_is_enough(tmp_path: Path, command: tuple[str, ...]) -> None:
    """With the options that tell where a node's files are, and not once for each certificate."""
    bridge = Bridge(pki=Pki(root=tmp_path / "empty", external=True), directory=tmp_path / "bridge")
    words = [str(tmp_path / word) if word.endswith(".json") else word for word in command]
    run = bridge.run(*words)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("error: no control plane here: wanted kubeadm's certificates in ")
    assert "--pki-dir" in run.stderr
    assert run.stderr.count("\n") == 2


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """Run as another user for a while."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user; run as root")
@pytest.mark.parametrize(
    "command", [("plan",), ("pending", "list"), ("backups",), ("audit", "show"), ("doctor",), ("check-expiration",)]
)
def test_a_user_without_rights_reads_to_become_root(bridge: Bridge, command: tuple[str, ...]) -> None:
    """The hint does not say to put good copies back, nor to move anything away."""
    runner, arguments = CliRunner(), [*command, "--config", str(bridge.config)]
    assert bridge.run("renew", "apiserver").returncode == 0
    assert runner.invoke(app, arguments).exit_code == 0  # and all that it needs is loaded
    for path in [*bridge.directory.parents][:4]:
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    with another_user():
        result = runner.invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert f"hint: {ROOT_HINT}" in result.output
    for wrong in ("put a good copy back", "move it away", "lists what there is", "internal error"):
        assert wrong not in result.output


@pytest.mark.first_use("2")
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user; run as root")
@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory to another user; run as root")
def test_root_gets_no_hint_to_take_a_desks_directory(bridge: Bridge) -> None:
    """The desk would sign nothing any more; where only the mode is wrong, that alone is to be mended."""
    state = bridge.directory / "state"
    state.mkdir(mode=0o755)
    hint = f"chown 0 {state} && chmod 700 {state}, after a look at who else uses it"
    assert f"hint: {hint}" in bridge.run("renew", "apiserver").stderr
    state.chmod(0o700)
    os.chown(state, 65534, -1)
    for run in (bridge.run("renew", "apiserver"), bridge.run("doctor")):
        assert (
            f"hint: is it a CA desk's or a door's? run it as its user (`runuser -u nobody -- ca-bridge …`); otherwise {hint}"
            in run.stderr + run.stdout
        )


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user; run as root")
def test_the_hint_to_be_root_is_for_those_who_are_not() -> None:
    """To root the system says no for another reason, which the error's own hint is about."""
    error = BridgeError(f"x: {os.strerror(errno.EACCES)}", hint="chattr -i")
    assert hint_of(error) == "chattr -i"
    with another_user():
        assert hint_of(error) == ROOT_HINT
        assert hint_of(BridgeError("x: no such file", hint="make it")) == "make it"


def test_a_backends_type_is_shown_once() -> None:
    """The message begins `corp: vault: GET …`, and not `corp (vault): vault: GET …`."""
    outcome = Outcome(name="apiserver", authority="ca", backend="corp (vault)", error=BackendRefusedError("vault: no"))
    other = Outcome(name="etcd-peer", authority="etcd-ca", backend="desk (openssl)", error=BackendRefusedError("no"))
    assert [about for about, _ in grouped([outcome, other])] == ["apiserver: corp", "etcd-peer: desk (openssl)"]


@pytest.mark.first_use("13")
def test_a_missing_policy_is_one_error(tmp_path: Path) -> None:
    """A missing policy is one error with one hint for all twelve certificates; `doctor` shows it as one cause."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    with openbao.dev_server() as bao:
        for authority in AUTHORITIES:
            bao.add_ca(authority, *bridge.pki.ca_pem(authority))
        bridge.add("backend.corp", {"type": "vault", "url": bao.url})
        bridge.add("backend.corp.auth", {"method": "token", "token_file": bridge.secret("token", bao.token())})
        for authority in AUTHORITIES:
            bridge.add(f"authority.{authority}", {"backend": "corp", "mount": authority})
        run, doctor = bridge.run("renew", "all"), bridge.run("doctor", "-o", "json")
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.stderr
    assert run.returncode == 5
    assert errors[0].count(", ") >= 11
    assert run.stderr.count("hint: ") == 1
    found = [one for one in json.loads(doctor.stdout)["findings"] if one["check"] == "what-the-ca-would-sign"]
    assert [len(one["about"]) for one in found] == [12], found


def test_causes_stay_apart_where_files_differ() -> None:
    """Paths make no difference in what a CA says, and all in what this node's files say."""
    said = [
        diagnosis.Finding.error(check, name, f"{text} {path}")
        for check, text in (("backend", "refused at"), ("key-missing", "nothing in"))
        for name, path in (("apiserver", "/a/apiserver"), ("etcd-peer", "/b/etcd/peer"))
    ]
    assert [cause.about for cause in diagnosis.causes(said)] == [
        ("apiserver", "etcd-peer"),
        ("apiserver",),
        ("etcd-peer",),
    ]


def open_secrets(bridge: Bridge) -> list[dict[str, Any]]:
    """What `doctor` finds of them."""
    found = json.loads(bridge.run("doctor", "-o", "json").stdout)["findings"]
    return [one for one in found if one["check"] == "open-secret"]


def test_open_key_files_are_one_cause(bridge: Bridge) -> None:
    """With all of their names in the text, and one command that closes them all; another mode is another cause."""
    keys = sorted(path for path in bridge.pki.pki_dir.rglob("*.key") if path.name != "sa.key")
    for key in keys:
        key.chmod(0o666 if key == keys[0] else 0o644)

    alone, alike = sorted(open_secrets(bridge), key=lambda one: len(one["about"]))
    assert len(alike["about"]) == len(keys) - 1 > 4
    assert [key for key in keys if str(key) not in alike["text"]] == keys[:1]
    assert alone["text"].startswith(f"{keys[0]}: wanted it for its owner alone, found mode 0666")
    subprocess.run(alike["hint"].partition(";")[0].split(), check=True)
    assert open_secrets(bridge) == [alone]


@pytest.mark.first_use("13")
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user; run as root")
def test_doctor_of_another_user_says_so_first(bridge: Bridge) -> None:
    """One line and one hint for all that only root may see; programs get each of them as before."""
    runner, arguments = CliRunner(), ["doctor", "--config", str(bridge.config)]
    assert bridge.run("renew", "apiserver").returncode == 0
    assert runner.invoke(app, arguments).exit_code == 0
    for path in [*bridge.directory.parents][:4]:
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    with another_user():
        result, reported = runner.invoke(app, arguments), runner.invoke(app, [*arguments, "-o", "json"])
    assert result.output.split()[:4] == ["error", "this", "user", "only"]
    assert result.output.count(ROOT_HINT) == 1
    assert "rights" not in {one["check"] for one in json.loads(reported.output)["findings"]}


def test_durations_are_read_back_as_they_were_written() -> None:
    """364 days stay days, and do not become 52 weeks; a long number of seconds is a number."""
    assert [duration_text(parse_duration(text)) for text in ("364d", "7d", "36h", "90s")] == [
        "364d",
        "7d",
        "36h",
        "90s",
    ]
    assert parse_duration("10000000s").total_seconds() == 10_000_000
    with pytest.raises(ValueError, match="at most 100 years"):
        parse_duration("999999999999w")
