"""Going back: what is listed, what is put back, what is refused, what is deleted; and runs that wait for each other."""

from __future__ import annotations

import dataclasses
import errno
import getpass
import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner, Result

from bridge.cli.app import app
from bridge.contract import SignRequest
from bridge.errors import SettingsError
from bridge.node import inventory
from bridge.pki import csr
from bridge.pki.certificates import load_pem_certificates, pem, serial_hex
from bridge.settings import load
from bridge.settings.tables import BackupSettings
from bridge.state import Store, backups
from bridge.state.audit import events
from bridge.state.install import KEY_MASK, MANIFEST, Replacement, install, manifest_file, recover
from bridge.system.files import digest
from bridge.system.state_file import sealed
from tests.kit import issuing, opensslca
from tests.kit.issuing import CLIENT, SERVER, Signer, cn
from tests.kit.pki import Pki, handmade_pki

Run = Callable[..., Result]


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    """A node whose certificates end in 20 days."""
    return handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))


@pytest.fixture
def config(node: Pki, tmp_path: Path) -> Path:
    """Settings with an `openssl ca` directory for each authority."""
    lines = [
        f'[node]\npki_dir = "{node.pki_dir}"\nkubeconfig_dir = "{node.kubeconfig_dir}"\nstate_dir = "{tmp_path}/state"',
        '[backend.desk]\ntype = "openssl"',
    ]
    for name in ("ca", "etcd-ca", "front-proxy-ca"):
        directory = opensslca.make_ca_directory(tmp_path / "cas" / name, *node.ca_pem(name))
        lines.append(f'[authority.{name}]\nbackend = "desk"\ndir = "{directory}"')
    file = tmp_path / "config.toml"
    file.write_text("\n".join([*lines, ""]))
    file.chmod(0o644)
    return file


@pytest.fixture
def run(config: Path) -> Run:
    """Run a command with these settings."""

    def run(*args: str) -> Result:
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*args, "--config", str(config)])

    return run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The state directory of these settings."""
    return Store(tmp_path / "state")


def files(node: Pki) -> dict[str, bytes]:
    """All of the PKI and the kubeconfigs."""
    return {str(path): path.read_bytes() for path in sorted(node.kubeconfig_dir.rglob("*")) if path.is_file()}


def serial(node: Pki, base: str = "apiserver") -> str:
    return serial_hex(load_pem_certificates((node.pki_dir / f"{base}.crt").read_bytes())[0])


def listed(run: Run) -> list[dict[str, Any]]:
    result = run("backups", "-o", "json")
    assert result.exit_code == 0, result.output
    return list(json.loads(result.stdout)["backups"])


def renewed(run: Run, *names: str) -> str:
    """The backup's ID."""
    result = run("renew", *(names or ("all",)), "-o", "json")
    assert result.exit_code == 0, result.output
    return str(json.loads(result.stdout)["backup"])


def problems(store: Store, node: Pki, backup_id: str | None = None) -> list[backups.Problem]:
    found = inventory.read(node.pki_dir, node.kubeconfig_dir)
    return backups.problems_of(backups.find(store, backup_id), load.parse(""), found, datetime.now(UTC))


# --- backups ---------------------------------------------------------------------------------------------------------


def test_lists_when_who_why_and_which(run: Run, node: Pki) -> None:
    """The newest first, with the serial numbers before and after; nothing at all is no error."""
    assert run("backups").exit_code == 0
    before = serial(node)
    first, second = renewed(run, "apiserver"), renewed(run, "etcd-peer", "admin.conf")
    found = listed(run)
    assert [entry["id"] for entry in found] == [second, first]
    assert [one["name"] for one in found[0]["certificates"]] == ["admin.conf", "etcd-peer"]
    assert found[1]["certificates"] == [
        {"name": "apiserver", "serialNumber": before, "replacedBySerialNumber": serial(node)}
    ]
    assert found[0]["user"] == getpass.getuser()
    assert found[0]["host"] == os.uname().nodename
    assert found[0]["command"]
    table = run("backups").stdout
    assert all(part in table for part in (first, second, "1 certificate ", "2 certificates", getpass.getuser()))
    assert len(table.splitlines()) == 2
    assert all(part in run("backups", first).stdout for part in (first, "apiserver", before, serial(node)))


def test_a_backup_that_cannot_be_read_is_named(run: Run, store: Store) -> None:
    """The exit code is 1, and the others are listed."""
    bad, good = renewed(run, "apiserver"), renewed(run, "apiserver")
    (store.backups / bad / MANIFEST).write_text("{}")
    result = run("backups")
    assert result.exit_code == 1
    assert good in result.stdout
    assert bad in result.stderr


def test_what_is_strange_among_the_backups_keeps_no_renewal_from_its_report(run: Run, store: Store) -> None:
    """A file, a directory that is not ours, a manifest that can't be read: only `backups` tells the last of them."""
    bad, good = renewed(run, "apiserver"), renewed(run, "apiserver")
    (store.backups / "notes.txt").write_text("mine")
    shutil.copytree(store.backups / good, store.backups / "keep-2025")
    (store.backups / bad / MANIFEST).unlink()
    (store.backups / bad / MANIFEST).mkdir()
    assert renewed(run, "apiserver")
    result = run("backups")
    assert result.exit_code == 1
    assert good in result.stdout
    assert "keep-2025" not in result.output
    assert "notes.txt" not in result.output
    assert f"{store.backups / bad / MANIFEST}: can't read a backup's manifest: Is a directory" in result.stderr


def test_a_directory_of_backups_that_cannot_be_read_is_named(
    run: Run, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both the list of backups and the restoration of one name it."""

    def fail(_: Store) -> list[Path]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Store, "backup_directories", fail)
    result = run("backups")
    assert result.exit_code == 1
    assert f"{store.backups}: can't look for backups: Input/output error" in result.stderr
    for backup_id in (None, "20260101T000000Z-0123abcd"):
        with pytest.raises(backups.BackupError, match="Input/output error"):
            backups.find(store, backup_id)


# --- rollback --------------------------------------------------------------------------------------------------------


def test_a_rollback_puts_every_byte_back_and_a_second_one_undoes_it(run: Run, node: Pki, store: Store) -> None:
    """Modes come back, too; the replaced files are a backup of its own, for its owner alone."""
    old = files(node)
    (node.pki_dir / "apiserver.crt").chmod(0o640)
    renewed(run)
    new = files(node)
    assert new != old
    result = run("rollback")
    assert result.exit_code == 0, result.output
    assert files(node) == old
    assert stat.S_IMODE((node.pki_dir / "apiserver.crt").stat().st_mode) == 0o640
    assert len(listed(run)) == 2
    modes = {stat.S_IMODE(path.stat().st_mode) for path in store.backups.rglob("*") if path.is_file()}
    assert modes == {0o600}
    assert run("rollback").exit_code == 0
    assert files(node) == new
    assert not store.is_interrupted


def test_a_rollback_goes_to_any_backup_and_says_what_to_restart(run: Run, node: Pki) -> None:
    """The ID selects the backup; as `renew` does, it names the components that still run on the replaced files."""
    before = serial(node)
    first = renewed(run, "apiserver", "kubelet.conf")
    between = serial(node)
    renewed(run, "apiserver", "etcd-peer")
    result = run("rollback", first, "-o", "json")
    assert result.exit_code == 0, result.output
    reported = json.loads(result.stdout)
    assert serial(node) == before != between
    assert reported["restored"] == first
    assert reported["restart"] == ["kube-apiserver", "kubelet"]
    assert [one["name"] for one in reported["certificates"]] == ["apiserver", "kubelet.conf"]
    assert "kube-apiserver: move" in run("rollback").stdout


def test_a_rollback_is_recorded(run: Run, node: Pki, store: Store) -> None:
    """The audit log records which certificate was replaced by which."""
    before = serial(node)
    renewed(run, "apiserver")
    between = serial(node)
    assert run("rollback").exit_code == 0
    [event] = [event for event in events(store, None, "apiserver") if event["event"] == "rolled-back"]
    assert (event["previousSerialNumber"], event["serialNumber"]) == (between, before)


@pytest.mark.parametrize("args", [("rollback",), ("rollback", "nonsense"), ("rollback", "../backups")])
def test_a_backup_that_is_not_there_is_1(run: Run, args: tuple[str, ...]) -> None:
    """Only a listed ID is taken."""
    result = run(*args)
    assert result.exit_code == 1
    assert "wanted" in result.stderr


def test_an_older_backup_is_not_taken_for_the_newest(run: Run, store: Store, node: Pki) -> None:
    """When the newest can't be read, the operator has to name a backup; an unreadable older one changes nothing."""
    good, newest = renewed(run, "apiserver"), renewed(run, "apiserver")
    older = "20200101T000000Z-01234567"
    shutil.copytree(store.backups / newest, store.backups / older)
    (store.backups / older / MANIFEST).write_text("{}")
    assert backups.find(store, None).backup_id == newest
    (store.backups / newest / MANIFEST).write_text("{}")
    before = files(node)
    for args in ((), (newest,)):
        result = run("rollback", *args)
        assert result.exit_code == 1
        assert newest in result.stderr
        assert files(node) == before
    assert run("rollback", good).exit_code == 0


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_text("{")])
@pytest.mark.parametrize("name", ["apiserver", "admin.conf"])
def test_what_a_damaged_backup_would_do_is_an_error_of_ours(
    run: Run, store: Store, node: Pki, name: str, damage: Callable[[Path], object]
) -> None:
    """It names backup and certificate."""
    made = backups.find(store, renewed(run, name))
    found = inventory.read(node.pki_dir, node.kubeconfig_dir)
    assert [outcome.name for outcome in backups.outcomes_of(made, found)] == [name]
    for file in made.files:
        assert file.copy is not None
        damage(file.copy)
    with pytest.raises(backups.BackupError, match=f"{made.backup_id}: {name}: "):
        backups.outcomes_of(made, found)


def _manifest(store: Store, backup_id: str) -> tuple[Path, dict[str, Any]]:
    file = manifest_file(store.backups / backup_id)
    found = file.read()
    assert found is not None
    return file.path, found


def _another_key(store: Store, backup_id: str) -> None:
    """The key of another pair, with a manifest that knows it."""
    path, manifest = _manifest(store, backup_id)
    key, other = (
        next(entry for entry in manifest["files"] if entry["path"].endswith(name))
        for name in ("/apiserver.key", "/front-proxy-client.key")
    )
    key |= {"backup": other["backup"], "sha256": other["sha256"]}
    path.write_bytes(sealed(manifest))


def _another_place(store: Store, backup_id: str) -> None:
    path, manifest = _manifest(store, backup_id)
    for entry in manifest["files"]:
        entry["path"] = entry["path"].replace("/apiserver.crt", "/sa.pub")
    path.write_bytes(sealed(manifest))


def _without_a_key(store: Store, backup_id: str) -> None:
    path, manifest = _manifest(store, backup_id)
    next(entry for entry in manifest["files"] if entry["path"].endswith("/apiserver.key"))["backup"] = None
    path.write_bytes(sealed(manifest))


def _saved(store: Store, backup_id: str) -> Path:
    [path] = (store.backups / backup_id).glob("*-apiserver.crt")
    return path


@pytest.mark.parametrize(
    "breaking",
    [
        pytest.param(lambda store, one: _saved(store, one).unlink(), id="file missing"),
        pytest.param(lambda store, one: _saved(store, one).write_bytes(b""), id="file empty"),
        pytest.param(_another_key, id="another key"),
        pytest.param(_another_place, id="another place"),
        pytest.param(_without_a_key, id="no key"),
    ],
)
def test_a_broken_backup_is_refused_and_cannot_be_forced(
    run: Run, node: Pki, store: Store, breaking: Callable[[Store, str], None]
) -> None:
    """Exit 1 and nothing replaced, not even what is good in it; before it was broken it would have been taken."""
    backup_id = renewed(run)
    before = files(node)
    assert problems(store, node) == []
    breaking(store, backup_id)
    assert {(problem.certificate, problem.can_be_forced) for problem in problems(store, node)} == {("apiserver", False)}
    for args in ((), ("--force",)):
        result = run("rollback", *args)
        assert result.exit_code == 1
        assert "apiserver: wanted" in result.stderr
    assert files(node) == before
    assert [entry["id"] for entry in listed(run)] == [backup_id]


def test_a_backup_of_another_ca_is_refused(run: Run, node: Pki, store: Store, tmp_path: Path) -> None:
    """The CA file that counts is the one that the node has now; the others' certificates are not in question."""
    renewed(run)
    other = handmade_pki(tmp_path / "other", not_after=datetime.now(UTC) + timedelta(days=20))
    present = (node.pki_dir / "etcd/ca.crt").read_bytes()
    (node.pki_dir / "etcd/ca.crt").write_bytes((other.pki_dir / "etcd/ca.crt").read_bytes())
    refused = {"apiserver-etcd-client", "etcd-healthcheck-client", "etcd-peer", "etcd-server"}
    assert {problem.certificate for problem in problems(store, node)} == refused
    assert run("rollback", "--force").exit_code == 1
    (node.pki_dir / "etcd/ca.crt").write_bytes(present)
    assert run("rollback").exit_code == 0


def test_a_ca_file_of_another_place_is_refused(node: Pki, store: Store, tmp_path: Path) -> None:
    """After a move to another directory it would be put back where nothing reads it, and that would count as done."""
    store.prepare()
    path = node.pki_dir / "front-proxy-ca.crt"
    data = path.read_bytes()
    install(
        store,
        [Replacement(certificate="front-proxy-ca", path=path, data=data, mode_mask=0o644, was=digest(data))],
        "0123abcd",
        {},
    )
    assert problems(store, node) == []
    moved = Pki(root=Path(shutil.copytree(node.root, tmp_path / "moved")), external=node.external)
    [found] = problems(store, moved)
    assert (found.certificate, found.is_damage, found.found) == ("front-proxy-ca", True, f"one for {path}")


def test_an_expired_backup_needs_force(tmp_path: Path, config: Path, run: Run, node: Pki) -> None:
    """The refusal has its dates, and `--force` puts it back."""
    now = datetime.now(UTC)
    expired = handmade_pki(tmp_path / "expired", now=now - timedelta(days=30), not_after=now - timedelta(days=1))
    for name in ("ca", "etcd-ca", "front-proxy-ca"):
        opensslca.make_ca_directory(tmp_path / "expired-cas" / name, *expired.ca_pem(name))
    text = config.read_text().replace(str(node.root), str(expired.root))
    config.write_text(text.replace(f"{tmp_path}/cas/", f"{tmp_path}/expired-cas/"))
    old = files(expired)
    renewed(run)
    new = files(expired)
    refused = run("rollback")
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert files(expired) == new
    assert run("rollback", "--force").exit_code == 0
    assert files(expired) == old


def _live_instead(node: Pki, name: str, **changes: Any) -> None:
    """Make it as another tool would: signed by the node's CA, with the key that is there."""
    [item] = [i for i in inventory.read(node.pki_dir, node.kubeconfig_dir).items if i.spec.name == name]
    assert item.key_path is not None
    certificate, key = node.ca_pem(item.spec.authority.name)
    own = load_pem_private_key(item.key_path.read_bytes(), None)
    request = SignRequest(spec=item.spec, csr_pem=csr.build(item.certificates[0], own), validity=timedelta(days=20))  # type: ignore[arg-type]
    now = datetime.now(UTC)
    authority = load_pem_private_key(key, None)
    signer = Signer(certificate=x509.load_pem_x509_certificate(certificate), key=authority)  # type: ignore[arg-type]
    issued = signer.issue(request, begin=now - timedelta(minutes=5), end=now + timedelta(days=20), **changes)
    item.certificate_path.write_bytes(pem(issued.leaf))


@pytest.mark.parametrize(
    ("subject", "changes"),
    [
        ("EKU", {"ekus": [SERVER, CLIENT]}),
        ("EKU", {"ekus": []}),
        ("KeyUsage", {"no_key_usage": True}),
        ("BasicConstraints", {"basic_constraints": x509.BasicConstraints(ca=True, path_length=None)}),
    ],
    ids=["EKU to spare", "no EKU", "no KeyUsage", "CA:TRUE"],
)
def test_a_backup_that_would_not_be_installed_today_needs_force(
    subject: str, changes: dict[str, Any], run: Run, node: Pki, store: Store
) -> None:
    """The certificate from before the first renewal may have been wrong; the refusal names the fault and is recorded."""
    _live_instead(node, "apiserver", **changes)
    old = files(node)
    renewed(run)
    new = files(node)
    assert [(p.certificate, p.subject, p.can_be_forced) for p in problems(store, node)] == [
        ("apiserver", subject, True)
    ]
    refused = run("rollback")
    assert refused.exit_code == 1
    assert f"apiserver: {subject}: wanted" in refused.stderr
    assert "--force" in refused.stderr
    assert files(node) == new
    [*_, line] = events(store, None, None)
    assert (line["event"], line["exitCode"]) == ("refused", 1)
    assert f"apiserver: {subject}: wanted" in line["result"]
    assert run("rollback", "--force").exit_code == 0
    assert files(node) == old


@pytest.mark.parametrize(
    ("subject", "changes"),
    [
        ("SAN", {"sans": [x509.DNSName("kubernetes"), x509.DNSName("api.example.com")]}),
        ("subject", {"subject": cn("kube-apiserver-2")}),
    ],
    ids=["SAN", "subject"],
)
def test_a_backup_with_other_names_than_the_live_certificate_needs_force(
    subject: str, changes: dict[str, Any], run: Run, node: Pki, store: Store
) -> None:
    """An operator changed them on purpose since, and a renewal would keep that; with the same names no option is needed."""
    renewed(run, "apiserver")
    assert problems(store, node) == []
    _live_instead(node, "apiserver", **changes)
    changed = files(node)
    [problem] = problems(store, node)
    assert (problem.subject, problem.can_be_forced) == (subject, True)
    assert run("rollback").exit_code == 1
    assert files(node) == changed
    assert run("rollback", "--force").exit_code == 0


WITH_OU = [(NameOID.COMMON_NAME, "kube-apiserver"), (NameOID.ORGANIZATIONAL_UNIT_NAME, "Platform")]


def _allow_ou(config: Path) -> None:
    allowed = '[authority.ca]\nallow_extra_subject = ["OU=Platform"]'
    config.write_text(config.read_text().replace("[authority.ca]", allowed))


def test_a_backup_from_before_a_ca_added_its_attribute_is_taken(
    run: Run, node: Pki, store: Store, config: Path
) -> None:
    """An attribute that the settings allow a CA to add may be missing, too; without the exception it needs force."""
    renewed(run, "apiserver")
    _live_instead(node, "apiserver", subject=issuing.name(*WITH_OU))
    assert [problem.subject for problem in problems(store, node)] == ["subject"]
    assert run("rollback").exit_code == 1
    _allow_ou(config)
    assert run("rollback").exit_code == 0


def test_what_was_not_there_is_removed_and_what_is_not_there_is_made(run: Run, node: Pki) -> None:
    """A rollback onto a node that lost a pair brings it back with its modes; undone, the pair is gone again."""
    renewed(run, "apiserver")
    pair = [node.pki_dir / "apiserver.key", node.pki_dir / "apiserver.crt"]
    modes = [stat.S_IMODE(path.stat().st_mode) for path in pair]
    for path in pair:
        path.unlink()
    assert run("rollback").exit_code == 0
    assert [stat.S_IMODE(path.stat().st_mode) for path in pair] == modes
    result = run("rollback")
    assert result.exit_code == 0, result.output
    assert not any(path.exists() for path in pair)
    assert str(pair[0]) in result.stdout
    assert run("rollback").exit_code == 0
    assert all(path.exists() for path in pair)


@pytest.mark.parametrize("direction", ["forward", "back"])
def test_an_interrupted_removal_is_recovered_from(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    """All removed if it can go on, all there if it can't."""
    store.prepare()
    first, second = tmp_path / "one.key", tmp_path / "two.key"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    replacements = [
        Replacement(certificate="x", path=first, data=None, mode_mask=KEY_MASK, was=digest(b"one")),
        Replacement(certificate="x", path=second, data=b"2", mode_mask=KEY_MASK, was=digest(b"two")),
    ]

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bridge.state.install._close", cut_off)
        with pytest.raises(KeyboardInterrupt):
            install(store, replacements, "run1", {})
    if direction == "back":
        second.write_bytes(b"something else")
    found = recover(store)
    assert found is not None
    assert found.direction == direction
    assert first.exists() == (direction == "back")
    assert second.read_bytes() == (b"two" if direction == "back" else b"2")


def test_recover_says_what_it_found_and_did(run: Run, store: Store, node: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, forward and back are three answers, each with the files; a rollback recovers first."""
    renewed(run, "apiserver")
    assert run("recover").stdout == "nothing to recover\n"
    target = node.pki_dir / "sa.pub"
    old = target.read_bytes()

    def interrupted(run_id: str) -> None:
        one = Replacement(
            certificate="x", path=target, data=b"new", mode_mask=KEY_MASK, was=digest(target.read_bytes())
        )

        def cut_off(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("bridge.state.install._forward", cut_off)
            with pytest.raises(KeyboardInterrupt):
                install(store, [one], run_id, {})

    interrupted("run1")
    (node.pki_dir / ".ca-bridge-run1-sa.pub").unlink()
    back = run("recover").stdout
    assert "undid the installation of run run1" in back
    assert str(target) in back
    assert target.read_bytes() == old
    interrupted("run2")
    forward = run("recover").stdout
    assert "finished the installation of run run2" in forward
    assert target.read_bytes() == b"new"
    interrupted("run3")
    assert "run3" in run("rollback", listed(run)[-1]["id"]).stderr
    assert not store.is_interrupted


# --- retention -------------------------------------------------------------------------------------------------------


def dated(store: Store, backup_id: str, created: datetime) -> None:
    """Give a backup this date."""
    path, manifest = _manifest(store, backup_id)
    path.write_bytes(sealed({**manifest, "created": created.isoformat()}))


def retired(store: Store, node: Pki, keep: int = 10, config: Path | None = None) -> list[str]:
    found = inventory.read(node.pki_dir, node.kubeconfig_dir)
    ours = dataclasses.replace(load.parse(config.read_text() if config else ""), backups=BackupSettings(keep=keep))
    return backups.retire(store, ours, found, datetime.now(UTC))


def test_only_so_many_are_kept(run: Run, store: Store, config: Path) -> None:
    """A renewal deletes what is beyond `backups.keep`, keys and all; so does a rollback."""
    config.write_text(config.read_text() + "[backups]\nkeep = 2\n")
    ids = [renewed(run, "apiserver") for _ in range(3)]
    assert [entry["id"] for entry in listed(run)] == ids[:0:-1]
    assert {path.name for path in store.backups.iterdir()} == set(ids[1:])
    assert run("rollback").exit_code == 0
    assert len(listed(run)) == 2
    assert ids[1] not in {path.name for path in store.backups.iterdir()}


def test_only_so_long_are_they_kept(run: Run, store: Store, node: Pki) -> None:
    """`backups.keep_for` decides; the newest stays at any age."""
    old, newest = renewed(run, "apiserver"), renewed(run, "apiserver")
    assert retired(store, node) == []
    for one, days in ((old, 402), (newest, 401)):
        dated(store, one, datetime.now(UTC) - timedelta(days=days))
    assert retired(store, node) == [old]
    assert retired(store, node) == []


@pytest.mark.parametrize("debt", ["unproven", "postponed", "pairs"])
def test_none_is_deleted_while_an_installation_is_not_proven(run: Run, store: Store, node: Pki, debt: str) -> None:
    """It may have to go back, a further pair, too, which may wait for its program for days."""
    old, _ = renewed(run, "apiserver"), renewed(run, "apiserver")
    unproven: Path = getattr(store, debt)
    unproven.touch()
    assert retired(store, node, keep=1) == []
    unproven.unlink()
    assert retired(store, node, keep=1) == [old]


def test_the_last_good_one_is_kept(run: Run, store: Store, node: Pki) -> None:
    """The last good backup is kept at any age, as long as no newer one could be put back."""
    good, bad, newest = (renewed(run, "apiserver") for _ in range(3))
    for one in (bad, newest):
        _saved(store, one).write_bytes(b"")
    assert retired(store, node, keep=1) == [bad]
    assert {entry["id"] for entry in listed(run)} == {good, newest}
    renewed(run, "apiserver")
    assert retired(store, node, keep=1) == [good, newest]


def test_what_a_ca_may_add_to_the_subject_is_no_reason_to_delete_the_last_good_one(
    run: Run, store: Store, node: Pki, config: Path
) -> None:
    """It is judged as by `rollback`, which would take it."""
    good, bad, newest = (renewed(run, "apiserver") for _ in range(3))
    for one in (bad, newest):
        _saved(store, one).write_bytes(b"")
    _live_instead(node, "apiserver", subject=issuing.name(*WITH_OU))
    _allow_ou(config)
    assert retired(store, node, 1, config) == [bad]
    assert run("rollback", good).exit_code == 0


def test_a_deletion_that_is_cut_off_leaves_no_backup(
    run: Run, store: Store, node: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not listed any more, and the next run removes the rest."""
    old, newest = renewed(run, "apiserver"), renewed(run, "apiserver")

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        assert retired(store, node, keep=1) == []
    assert (store.backups / old).exists()
    assert [entry["id"] for entry in listed(run)] == [newest]
    assert run("recover").exit_code == 0
    assert not (store.backups / old).exists()


@pytest.mark.parametrize("text", ["keep = 0", 'keep = "3"', 'keep_for = "0d"', "keep_four = 1"])
def test_settings_that_keep_nothing_are_refused(text: str) -> None:
    """The newest backup always stays."""
    with pytest.raises(SettingsError):
        load.parse(f"[backups]\n{text}\n")
    assert load.parse('[backups]\nkeep = 1\nkeep_for = "1d"\n').backups == BackupSettings(
        keep=1, keep_for=timedelta(days=1)
    )


@pytest.mark.parametrize("args", [("--dry-run",), ("--csr-only", "--csr-dir", "/nowhere")])
def test_waiting_for_a_lock_that_is_not_taken_is_a_usage_error(run: Run, args: tuple[str, ...]) -> None:
    """The exit code is 2, because the option would have no effect."""
    assert run("renew", "--wait", "1s", *args).exit_code == 2
    assert run("renew", "--wait", "1s").exit_code == 0


# --- the lock --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Programs:
    """Real processes of the program."""

    config: Path
    started: list[subprocess.Popen[str]] = dataclasses.field(default_factory=list)

    def start(self, *args: str) -> subprocess.Popen[str]:
        """One more."""
        program = str(Path(sys.executable).with_name("ca-bridge"))
        process = subprocess.Popen(
            [program, *args, "--config", str(self.config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.started.append(process)
        return process


@pytest.fixture
def programs(config: Path) -> Iterator[Programs]:
    """None of them outlives the test."""
    programs = Programs(config)
    yield programs
    for process in programs.started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def slow_ca(config: Path, tmp_path: Path) -> Path:
    """A CA whose openssl waits while the file is there, as one behind an HSM may."""
    brake = tmp_path / "brake"
    brake.touch()
    script = tmp_path / "openssl"
    # one whose program was killed signs nothing any more
    text = f'while [ -e "{brake}" ]; do sleep 0.05; done\nkill -0 $PPID && exec openssl "$@"\n'
    script.write_text(f"#!/bin/sh\n{text}")
    script.chmod(0o755)
    config.write_text(config.read_text().replace('type = "openssl"', f'type = "openssl"\nopenssl = "{script}"'))
    return brake


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _holds(store: Store, process: subprocess.Popen[str]) -> bool:
    return store.lock.exists() and f'"pid": {process.pid},' in store.lock.read_text()


def test_of_twenty_runs_at_once_one_works(programs: Programs, slow_ca: Path, node: Pki, store: Store) -> None:
    """Nineteen exit with 9 and name the one."""
    before = serial(node)
    first = programs.start("renew", "all")
    _wait_for(lambda: _holds(store, first))
    others = [programs.start("renew", "all") for _ in range(19)]
    said = [process.communicate()[1] for process in others]
    assert [process.returncode for process in others] == [9] * 19
    assert all(f"process {first.pid} " in text for text in said)
    assert serial(node) == before
    slow_ca.unlink()
    _, errors = first.communicate()
    assert first.returncode == 0, errors
    assert serial(node) != before


def test_runs_that_wait_come_one_after_the_other(programs: Programs, store: Store) -> None:
    """Each of twenty makes its renewal; a chain of backups shows that none saw another's half."""
    processes = [programs.start("renew", "apiserver", "--wait", "300s") for _ in range(20)]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 20, said
    chain = [entry.certificates[0] for entry in backups.read_all(store)[0]]
    assert len(chain) == BackupSettings().keep
    assert all(newer["old_serial"] == older["new_serial"] for newer, older in itertools.pairwise(chain))


def test_a_rollback_waits_too_and_not_for_ever(
    programs: Programs, slow_ca: Path, run: Run, node: Pki, store: Store
) -> None:
    """The exit code is 9 when the time is over, and 0 if the other run ended before."""
    slow_ca.unlink()
    renewed(run, "apiserver")
    before = files(node)
    slow_ca.touch()
    holder = programs.start("renew", "apiserver")
    _wait_for(lambda: _holds(store, holder))
    begin = time.monotonic()
    assert run("rollback", "--wait", "1s").exit_code == 9
    assert time.monotonic() - begin >= 1
    waiting = programs.start("rollback", "--wait", "10m")
    slow_ca.unlink()
    _, errors = waiting.communicate()
    assert waiting.returncode == 0, errors
    assert files(node) == before  # the rollback undid what the other run installed


def test_the_lock_of_a_killed_run_is_free_at_once(programs: Programs, slow_ca: Path, run: Run, store: Store) -> None:
    """No waiting, no file to remove by hand."""
    holder = programs.start("renew", "all")
    _wait_for(lambda: _holds(store, holder))
    assert run("renew", "apiserver").exit_code == 9
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    slow_ca.unlink()
    assert run("renew", "apiserver").exit_code == 0


# --- the order of backups, and whose they are -------------------------------------------------------------------------


@pytest.mark.attack("N23")
def test_the_newest_is_the_last_that_was_made(run: Run, store: Store, node: Pki) -> None:
    """The last backup is the newest, even if the clock was wrong at a renewal."""
    live = [node.pki_dir / "apiserver.crt"]
    ahead = renewed(run, "apiserver")
    between = live[0].read_bytes()
    newest = renewed(run, "apiserver")
    dated(store, ahead, datetime.now(UTC) + timedelta(days=1))
    assert [entry["id"] for entry in listed(run)] == [newest, ahead]
    assert retired(store, node, keep=1) == [ahead]
    result = run("rollback")
    assert result.exit_code == 0, result.output
    assert live[0].read_bytes() == between


def test_numbers_go_up_past_what_is_deleted_or_damaged(run: Run, store: Store) -> None:
    """The next one is after all that can be read, and after none it is the first."""
    first, second, third = (renewed(run, "apiserver") for _ in range(3))
    shutil.rmtree(store.backups / first)
    path, _ = _manifest(store, second)
    path.write_bytes(b"{")
    assert [backup.number for backup in backups.read_all(store)[0]] == [3]
    fourth = renewed(run, "apiserver")
    assert [(one.backup_id, one.number) for one in backups.read_all(store)[0]] == [(fourth, 4), (third, 3)]


@pytest.mark.attack("N9")
def test_two_clusters_do_not_share_a_state_directory(run: Run, store: Store, tmp_path: Path) -> None:
    """The second is refused before it forgets anything of the first; with one of its own it works."""
    renewed(run, "apiserver")
    other = handmade_pki(tmp_path / "other", not_after=datetime.now(UTC) + timedelta(days=20))
    words = ["--pki-dir", str(other.pki_dir), "--kubeconfig-dir", str(other.kubeconfig_dir)]
    before = {path: path.read_bytes() for path in store.directory.rglob("*") if path.is_file() and path != store.lock}
    for command in (["renew"], ["rollback"], ["recover"]):
        refused = run(*command, *words)
        assert (refused.exit_code, "node.state_dir" in refused.output) == (1, True), refused.output
        assert str(other.pki_dir) in refused.output
    after = {path: path.read_bytes() for path in store.directory.rglob("*") if path.is_file() and path != store.lock}
    assert after == before
    assert run("renew", "apiserver").exit_code == 0
    (tmp_path / "own").mkdir(mode=0o700)
    assert run("recover", *words, "--state-dir", str(tmp_path / "own")).exit_code == 0


def test_a_wrong_path_claims_no_state_directory(run: Run, store: Store, node: Pki, tmp_path: Path) -> None:
    """A first run whose path is mistyped, either of both, leaves the state to the node that is there."""
    for option in ("--pki-dir", "--kubeconfig-dir"):
        for command in (["renew"], ["restart"], ["rollback"], ["recover"]):
            run(*command, option, str(tmp_path / "kubernets"))
            assert not store.tree.exists(), (option, command)
    assert run("recover").exit_code == 0
    assert json.loads(store.tree.read_bytes())["pki_dir"] == str(node.pki_dir)


def test_a_state_directory_of_an_earlier_version_is_adopted(run: Run, store: Store, node: Pki, tmp_path: Path) -> None:
    """The first run that writes adopts it; and a link to the same files is the same cluster."""
    renewed(run, "apiserver")
    store.tree.unlink()
    assert run("recover").exit_code == 0
    assert json.loads(store.tree.read_bytes())["pki_dir"] == str(node.pki_dir)
    link = tmp_path / "kubernetes"
    link.symlink_to(node.kubeconfig_dir)
    words = ["--pki-dir", str(link / node.pki_dir.name), "--kubeconfig-dir", str(link)]
    assert run("recover", *words).exit_code == 0
