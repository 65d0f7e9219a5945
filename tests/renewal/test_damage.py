"""A damaged journal or state file: nothing is done over it, everything that it may concern stays, and there is a way on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bridge.cli.app import app
from bridge.errors import Exit
from bridge.renewal.transaction import state_files
from bridge.state import Store, audit, install
from bridge.state.install import CERTIFICATE_MASK, KEY_MASK, Replacement
from bridge.system.files import digest
from bridge.system.state_file import StateDamagedError, sealed
from tests.kit.pairs import assert_pairs
from tests.kit.pki import Pki, handmade_pki

RUN = "0123abcd"


class CutOffError(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    return handmade_pki(tmp_path / "node")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "state")
    store.prepare()
    return store


def pair(node: Pki) -> list[Path]:
    return [node.pki_dir / "apiserver.key", node.pki_dir / "apiserver.crt"]


@pytest.fixture
def interrupted(node: Pki, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, bytes]:
    """An installation of another pair that ended at its commit point; all files of the node and the state directory."""
    other = handmade_pki(tmp_path / "other")
    new = dict(zip(pair(node), pair(other), strict=True))
    replacements = [
        Replacement(
            certificate="apiserver",
            path=path,
            data=new[path].read_bytes(),
            mode_mask=KEY_MASK if path.suffix == ".key" else CERTIFICATE_MASK,
            was=digest(path.read_bytes()),
        )
        for path in new
    ]

    def cut_off(*_: object) -> None:
        raise CutOffError

    with monkeypatch.context() as patch:
        patch.setattr(install, "_forward", cut_off)
        with pytest.raises(CutOffError):
            install.install(store, replacements, RUN, {})
    assert store.journal.exists()
    return everything(node, store)


def everything(node: Pki, store: Store) -> dict[Path, bytes]:
    roots = (node.kubeconfig_dir, store.directory)
    return {path: path.read_bytes() for root in roots for path in root.rglob("*") if path.is_file()}


def flipped(data: bytes, step: int) -> Iterator[bytes]:
    """Each with another bit of it the other way round."""
    for bit in range(0, len(data) * 8, step):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def test_no_bit_flip_installs_under_a_wrong_name(node: Pki, store: Store, interrupted: dict[Path, bytes]) -> None:
    """Reported, and nothing touched; or finished as it was meant, with nothing left over."""
    whole = store.journal.read_bytes()
    done = reported = 0
    for data in flipped(whole, 13):
        for path, content in interrupted.items():
            path.write_bytes(content)
        store.journal.write_bytes(data)
        damaged = interrupted | {store.journal: data}
        try:
            install.recover(store)
        except StateDamagedError:
            reported += 1
            assert everything(node, store) == damaged
        else:
            done += 1
            assert data.split() != whole.split()
            assert_pairs(node)
            assert not list(node.kubeconfig_dir.rglob(".ca-bridge-*"))
            assert {path.name for path in node.pki_dir.iterdir()} == {
                path.name for path in interrupted if path.parent == node.pki_dir and not path.name.startswith(".")
            } | {"etcd"}
    assert reported > 20
    assert done < reported


def config(node: Pki, tmp_path: Path) -> list[str]:
    places = {
        "--pki-dir": node.pki_dir,
        "--kubeconfig-dir": node.kubeconfig_dir,
        "--state-dir": tmp_path / "state",
    }
    return [str(word) for pair in places.items() for word in pair]


def run(node: Pki, tmp_path: Path, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, *config(node, tmp_path)])


def test_there_is_a_way_on_from_a_damaged_journal(
    node: Pki, store: Store, interrupted: dict[Path, bytes], tmp_path: Path
) -> None:
    """`recover` says how; --set-aside keeps all files and names the backup, with which `rollback` puts the old pair back."""
    damaged = interrupted[store.journal].replace(b"apiserver.key", b"apiserver.kex", 1)
    store.journal.write_bytes(damaged)
    staged = [path for path in interrupted if path.name.startswith(".ca-bridge-")]
    assert staged
    staged[0].rename(pair(node)[0])  # the swap had begun

    plain = run(node, tmp_path, "recover")
    assert plain.exit_code == Exit.FAILED
    assert "recover --set-aside" in plain.output

    result = run(node, tmp_path, "recover", "--set-aside")
    assert result.exit_code == 0, result.output
    [backup] = store.backups.iterdir()
    assert f"in the backup {backup.name}" in result.stdout
    assert f"{staged[1]} was staged and not installed; it stays" in result.stdout
    assert staged[1].exists()
    [kept] = store.directory.glob("journal.json.damaged-*")
    assert kept.read_bytes() == damaged
    assert [line["event"] for line in audit.events(store, None, None)] == [
        audit.DAMAGED,
        audit.DAMAGED,
    ]

    assert run(node, tmp_path, "rollback", backup.name).exit_code == 0
    assert {path: path.read_bytes() for path in pair(node)} == {path: interrupted[path] for path in pair(node)}
    assert run(node, tmp_path, "recover", "--set-aside").stdout == "nothing to recover\n"


def test_every_state_file_can_be_set_aside(node: Pki, store: Store, tmp_path: Path) -> None:
    """Each file whose damage can stop a run can be set aside; whole ones stay."""
    files = state_files(store)
    assert {file.path for file in files} == {
        *(
            store.journal,
            store.staging,
            store.requests,
            store.restart,
            store.restarted,
            store.unproven,
            store.postponed,
            store.pairs,
        ),
        *(store.hooks, store.attempts, store.revocations, store.copies, store.users, store.next_ca),
    }
    for file in files:
        file.path.write_bytes(b"{")
    store.attempts.write_bytes(sealed({"authorities": {}}))
    result = run(node, tmp_path, "recover", "--set-aside")
    assert result.exit_code == 0, result.output
    assert len(list(store.directory.glob("*.damaged-*"))) == len(files) - 1
    assert store.attempts.exists()
    assert not any(file.path.exists() for file in files if file.path != store.attempts)
