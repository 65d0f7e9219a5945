"""`settings init` and `settings check`: a file to keep, all mistakes at once, what can't work though it is well-formed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bridge.cli.app import app
from bridge.cli.settings import doubts, initial
from bridge.errors import SettingsError
from bridge.settings.load import parse
from tests.kit.pki import handmade_pki


def run(*words: str | Path) -> Result:
    """The program, as it is called."""
    return CliRunner().invoke(app, [*map(str, words)])


def test_settings_init_writes_a_file_once(tmp_path: Path) -> None:
    """Never over an older one; a kind comes before the file, and a path alone is the file."""
    path = tmp_path / "etc/ca-bridge/config.toml"
    assert run("settings", "init", path).exit_code == 0
    assert (stat.S_IMODE(path.stat().st_mode), path.read_text()) == (0o644, initial(None))
    path.write_text("mine")
    result = run("settings", "init", "vault", path)
    assert (result.exit_code, path.read_text()) == (1, "mine")
    assert "`ca-bridge settings init vault FILE`" in result.stderr
    path.unlink()
    assert run("settings", "init", "vault", "--config", path).exit_code == 0
    assert path.read_text() == initial("vault")


@pytest.mark.first_use("6")
def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    """A misspelt authority, table or backend type hides no mistake of a backend's keys; by line, each once."""
    path = tmp_path / "config.toml"
    path.write_text(
        """[renewal]
befor = "30d"
[backend.desk]
type = "openssl"
pasphrase_file = "/etc/ca-bridge/ca-passphrase"
[backend.x]
tpye = "openssl"
[authority.etcd]
backend = "desk"
dir = "srv/ca"
[authority.ca]
backend = "dsk"
[authority.front-proxy-ca]
backend = "desk"
allow_extra_subject = 3
dir = "srv/fp"
"""
    )
    result = run("settings", "check", "--config", path)
    assert result.exit_code == 2
    lines = [int(line.split(f"{path}:")[1].split(":")[0]) for line in result.stderr.splitlines() if str(path) in line]
    assert lines == [2, 5, 6, 8, 10, 12, 15, 16]
    right = "\n".join(path.read_text().splitlines()[2:5]).replace("pasph", "passph")
    path.write_text(f'{right}\ndir = "/srv/ca"\n')
    assert run("settings", "check", "--config", path).exit_code == 0


@pytest.mark.first_use("7")
def test_what_is_declared_twice_has_its_first_line_named() -> None:
    """The error for a second table or key names the first one's line; other syntax errors name none."""
    text = initial("vault")
    first = text.splitlines().index("[authority.ca]") + 1
    for more, key in (("[authority.ca]", "authority.ca"), ("[authority.ca.x]\ny = 1\ny = 2", "authority.ca.x.y")):
        with pytest.raises(SettingsError) as e:
            parse(f"{text}\n{more}\n")
        line = first if key == "authority.ca" else len(text.splitlines()) + 3
        assert e.value.hint == f"line {line} has {key} already: keep one of the two, or merge them"
    with pytest.raises(SettingsError) as e:
        parse("[renewal]\nbefore = \n")
    assert e.value.hint == ""


@pytest.mark.first_use("5")
def test_what_is_well_formed_and_cannot_work_is_doubted(tmp_path: Path) -> None:
    """Hosts and names of the examples, files that are not there; no doubt where they are, and none without a twin."""
    pki = handmade_pki(tmp_path / "node")
    node = f'[node]\npki_dir = "{pki.pki_dir}"\nkubeconfig_dir = "{pki.root / "etc/kubernetes"}"\n'
    for kind in ("vault", "cfssl", "cmp", "est", "exec", "kubernetes", "door"):
        assert any("is still an example's: " in one for one in doubts(parse(initial(kind)))), kind
    text = initial("cfssl").replace("/etc/ca-bridge", str(tmp_path)).replace("\n[node]\n", f"\n{node}")
    text = text.replace("cfssl.corp.example", "ca.lan")
    ours = ("ca-client", "ca-server", "etcd-ca-client", "etcd-ca-peer", "front-proxy-ca-client")
    names = ["cfssl-ca.pem", "client.pem", "client-key.pem", *(f"{name}.hex" for name in ours)]
    assert set(doubts(parse(text))) == {f"signer (cfssl): {tmp_path / name} is not there" for name in names}
    for name in names:
        (tmp_path / name).touch()
    assert list(doubts(parse(text))) == []
    (one,) = doubts(parse(initial(None)))
    assert "no CA is named" in one
    assert list(doubts(parse(initial("openssl").replace("/srv/ca", str(tmp_path))))) != []


@pytest.mark.parametrize("is_there", [True, False])
def test_programs_that_are_not_there_are_doubted(tmp_path: Path, *, is_there: bool) -> None:
    """A program of a hook, a restart, a pair, the gateway or a backend: one that is missing, or can't be run, is named."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755 if is_there else 0o644)
    text = f"""
[hooks]
failure = ["true", "{program} one"]
[restart]
commands = {{ kubelet = "{program} two" }}
[gateway]
inventory_command = "{program}"
[certificate.lb]
authority = "ca"
usages = ["server"]
certificate_file = "{tmp_path}/lb.crt"
key_file = "{tmp_path}/lb.key"
common_name = "lb"
sans = ["lb.lan"]
reload = "{program} three"
[backend.helper]
type = "exec"
command = ["{program}", "four"]
[backend.openssl]
type = "openssl"
dir = "{tmp_path}"
openssl = "{program}"
[authority.ca]
backend = "helper"
[authority.etcd-ca]
backend = "openssl"
"""
    where = ["hooks.failure", "restart.commands.kubelet", "gateway.inventory_command", "certificate.lb.reload"]
    where += ["helper (exec)", "openssl (openssl)"]
    wanted = set() if is_there else {f"{key}: {program} is no program that can be run here" for key in where}
    assert set(doubts(parse(text))) == wanted


@pytest.mark.first_use("5")
def test_settings_check_says_well_formed_and_doubts(tmp_path: Path) -> None:
    """The exit code is 0, since the settings may exist before the CA; `doctor` tries it."""
    path = tmp_path / "config.toml"
    path.write_text(initial("vault"))
    result = run("settings", "check", "--config", path)
    assert result.exit_code == 0
    assert result.stdout == f"{path}: well-formed; `ca-bridge doctor` tries it\n"
    assert "corp (vault): url is still an example's: https://vault.corp.example:8200" in result.stderr
    assert "corp (vault): /etc/ca-bridge/role-id is not there" in result.stderr


@pytest.mark.parametrize("kind", ["cfssl", "cmp", "est", "kubernetes", "openssl"])
def test_setup_prints_the_names_that_init_writes(kind: str, tmp_path: Path) -> None:
    """A CA's administrator and a node's speak of the same backend; the settings' own names come back, too."""
    pki, path = handmade_pki(tmp_path / "node"), tmp_path / "config.toml"
    places = f'[node]\npki_dir = "{pki.pki_dir}"\nkubeconfig_dir = "{pki.kubeconfig_dir}"\n'
    path.write_text(initial(kind).replace("\n[node]\n", f"\n{places}"))
    (backend,) = parse(path.read_text()).backends
    printed = run("setup", kind, "--authority", "ca", "--config", path).stdout
    assert f"[backend.{backend}]" in printed
    assert f'backend = "{backend}"' in printed
