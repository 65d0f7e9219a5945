"""A mistake in a backend's table is reported although nothing is due, and a checked file costs nothing more."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge import entry
from bridge.errors import Exit
from bridge.settings.load import load
from bridge.state import Store, is_checked, remember_checked
from tests.kit.pki import Pki, handmade_pki

GOOD = 'type = "vault"\nurl = "https://vault.example:8200"\nauth.token_file = "/etc/token"\n'


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    """Nothing of it is due."""
    return handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=300))


def write(node: Pki, tmp_path: Path, backend: str) -> Path:
    places = [
        f'pki_dir = "{node.pki_dir}"',
        f'kubeconfig_dir = "{node.kubeconfig_dir}"',
        f'state_dir = "{tmp_path}/state"',
    ]
    config = tmp_path / "config.toml"
    authorities = "\n".join(f'[authority.{name}]\nbackend = "corp"' for name in ("ca", "etcd-ca", "front-proxy-ca"))
    config.write_text("\n".join(["[node]", *places, "[backend.corp]", backend, authorities]))
    config.chmod(0o644)
    return config


def renew(config: Path) -> subprocess.CompletedProcess[str]:
    """As cron does it."""
    program = Path(sys.executable).with_name("ca-bridge")
    return subprocess.run([program, "renew", "--config", config], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ('type = "vault"\n', "backend.corp.url"),
        (f'{GOOD}ca_fiel = "/x"\n', "ca_fiel"),
        (f"{GOOD}timeout = 5\n", "timeout"),
        ('type = "valut"\n', "backend.corp.type"),
    ],
)
def test_a_broken_table_is_never_green(node: Pki, tmp_path: Path, backend: str, said: str) -> None:
    """Each run exits with 2 until the table is mended, also where it was whole before."""
    assert renew(write(node, tmp_path, GOOD)).returncode == 0
    for _ in range(2):
        run = renew(write(node, tmp_path, backend))
        assert (run.returncode, run.stdout) == (Exit.USAGE, "")
        assert said in run.stderr
    assert renew(write(node, tmp_path, GOOD)).returncode == 0


def test_what_was_checked_is_not_checked_again(node: Pki, tmp_path: Path) -> None:
    """The next runs load no backend; a file that was changed, or another one, is checked once."""
    config = write(node, tmp_path, GOOD)
    plain = ["renew", "--config", str(config)]
    assert entry.nothing_to_do(plain) is None
    first = renew(config)
    assert (first.returncode, first.stdout.startswith("nothing is due: ")) == (0, True)
    quiet = entry.nothing_to_do(plain)
    assert quiet is not None
    assert quiet.sentence.startswith("nothing is due: ")
    os.utime(config, ns=(1, 1))
    assert entry.nothing_to_do(plain) is None
    assert renew(config).returncode == 0
    assert entry.nothing_to_do(plain) is not None
    other = config.rename(tmp_path / "other.toml")
    assert entry.nothing_to_do(["renew", "--config", str(other)]) is None


def test_an_installation_that_changed_is_checked_again(
    node: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend's distribution may be gone."""
    config, store = write(node, tmp_path, GOOD), Store(tmp_path / "state")
    store.prepare()
    settings = load(config)
    remember_checked(settings, store)
    assert is_checked(settings, store)
    (tmp_path / "site").mkdir()
    monkeypatch.setattr("bridge.state._INSTALLED", tmp_path / "site")
    assert not is_checked(settings, store)


def test_a_plug_in_that_went_is_noticed(node: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offline installation's plug-ins are in a directory of their own; without a change nothing is checked again."""
    plug_ins = tmp_path / "plugins"
    (plug_ins / "ca_of_ours.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(plug_ins))
    settings, store = load(write(node, tmp_path, GOOD)), Store(tmp_path / "state")
    store.prepare()
    remember_checked(settings, store)
    assert is_checked(settings, store)
    (plug_ins / "ca_of_ours.dist-info").rmdir()
    assert not is_checked(settings, store)


def test_a_state_directory_that_cannot_be_written_costs_no_run(
    node: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is checked each time."""
    config, store = write(node, tmp_path, GOOD), Store(tmp_path / "state")
    store.prepare()

    def full(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("bridge.system.files.write_atomically", full)
    remember_checked(load(config), store)
    assert not is_checked(load(config), store)
