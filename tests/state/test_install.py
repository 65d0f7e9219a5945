"""The installation, failed and killed at every system call in turn: all old or all new, and nothing left over."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import BridgeError
from bridge.state import Store
from bridge.state.install import (
    CERTIFICATE_MASK,
    KEY_MASK,
    KUBECONFIG_MASK,
    PKI_DIRECTORY_MODE,
    InstallError,
    Recovery,
    Replacement,
    attributes_from,
    attributes_json,
    fingerprint,
    install,
    journal_file,
    manifest_file,
    recover,
    staging_file,
    written_file,
)
from bridge.system.files import Attributes, digest
from bridge.system.locks import LockedError, held_by, lock
from bridge.system.state_file import StateError, StateFile

#: What the installer asks of the system; Path's methods go through these too.
CALLS = ("open", "fsync", "fchmod", "rename", "unlink", "mkdir")

#: Parts of the path of the PKI's parent; pytest's own directories are one part deeper with several workers.
DEPTH = 7

FILES = {"server.key": b"old key", "server.crt": b"old certificate", "admin.conf": b"old kubeconfig"}
MASKS = {"server.key": KEY_MASK, "server.crt": CERTIFICATE_MASK, "admin.conf": KUBECONFIG_MASK}


def new(content: bytes) -> bytes:
    return content.replace(b"old", b"new")


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """A directory with a pair and a kubeconfig, always as deep: each step of the walk to it is a system call."""
    directory = tmp_path.joinpath(*["deep"] * (DEPTH - len(tmp_path.parts)), "pki")
    directory.mkdir(parents=True)
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
        (directory / name).chmod(0o644 if name.endswith(".crt") else 0o600)
    return directory


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty state directory."""
    store = Store(tmp_path / "state")
    store.prepare()
    return store


@pytest.mark.parametrize(
    "name",
    [
        *(
            "journal.json",
            "staging.json",
            "requests.json",
            "restart.json",
            "restarted.json",
            "unproven.json",
            "postponed.json",
            "pairs.json",
        ),
        *("hooks.json", "attempts.json", "audit.head", "audit.torn-7-01234567"),
        *("kubelet-client-current.pem", "kube-apiserver-01234567.yaml"),
    ],
)
def test_recover_removes_what_was_half_written(store: Store, name: str) -> None:
    """Recovery removes the half-written file of a killed process, and leaves the file itself."""
    (store.directory / "audit.head").write_text("kept")
    (store.directory / f".{name}.abcdefgh").write_text("half")
    recover(store)
    assert [path.name for path in store.directory.iterdir() if path.is_file()] == ["audit.head"]


def test_recover_leaves_alone_what_is_not_ours(store: Store) -> None:
    """An operator's files beside ours stay; an unfinished backup of ours is removed."""
    files = [".vault-token", ".journal.json.swp", ".notes.abcdefgh", ".journal.json"]
    for name in files:
        (store.directory / name).write_text("kept")
    directories = ["keep-2025", "lost+found"]
    for name in (*directories, "20260101T000000Z-0123abcd", "20260101T000000Z-0123abcd-back"):
        (store.backups / name).mkdir()
    (store.backups / "20260101T000001Z-0123abcd").symlink_to("keep-2025")
    recover(store)
    assert {path.name for path in store.directory.iterdir()} == {*files, "backups"}
    assert {path.name for path in store.backups.iterdir()} == {*directories, "20260101T000001Z-0123abcd"}


def replacements(pki: Path) -> list[Replacement]:
    return [
        Replacement(certificate="x", path=pki / name, data=new(old), mode_mask=MASKS[name], was=digest(old))
        for name, old in FILES.items()
    ]


def contents(pki: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pki.iterdir()}


NEW = {name: new(old) for name, old in FILES.items()}


def run(pki: Path, store: Store) -> str:
    return install(store, replacements(pki), "run1", {})


def test_replaces_all_files_and_leaves_nothing_over(pki: Path, store: Store) -> None:
    """New content under the old names, a backup with the old content, no journal."""
    backup = run(pki, store)
    assert contents(pki) == NEW
    saved = {path.read_bytes() for path in (store.backups / backup).iterdir()}
    assert saved >= set(FILES.values())
    assert {path.name for path in store.directory.iterdir()} == {"backups", "written.json"}
    written = written_file(store).read() or {}
    assert {path: one.is_of(Path(path)) for path, one in written.items()} == {str(pki / name): True for name in FILES}
    (pki / "another").write_bytes(b"another program's")
    (pki / "another").rename(pki / "server.crt")  # another file, whatever the clock of the file system has by then
    assert [path for path, one in written.items() if not one.is_of(Path(path))] == [str(pki / "server.crt")]


def test_a_time_that_cannot_be_written_down_stops_nothing(
    pki: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """The run says so, and the files are the new ones."""
    store.written.mkdir()
    run(pki, store)
    assert contents(pki) == NEW
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("the time of the installation could not be written down: ")
    assert str(store.written) in line


def test_backups_are_for_their_owner_alone(pki: Path, store: Store) -> None:
    """Only the owner may read backups, since they hold keys."""
    backup = store.backups / run(pki, store)
    assert stat.S_IMODE(backup.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in backup.iterdir()} == {0o600}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_are_kept_whatever_the_umask(pki: Path, store: Store, umask: int) -> None:
    """The mode is the replaced file's, but a key's is never looser than 0600."""
    (pki / "server.key").chmod(0o644)
    (pki / "server.crt").chmod(0o604)
    (pki / "admin.conf").chmod(0o666)
    before = os.umask(umask)
    try:
        run(pki, store)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in pki.iterdir()}
    assert modes == {"server.key": 0o600, "server.crt": 0o604, "admin.conf": 0o660}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away; run the tests as root")
def test_owners_are_kept(pki: Path, store: Store) -> None:
    """A component that runs as its own user goes on reading its files."""
    for path in pki.iterdir():
        os.chown(path, 12345, 54321)
    run(pki, store)
    assert {(path.stat().st_uid, path.stat().st_gid) for path in pki.iterdir()} == {(12345, 54321)}


def test_symlinks_stay_and_their_targets_are_replaced(pki: Path, store: Store) -> None:
    """The installer writes through links, as kubeadm does."""
    elsewhere = pki.parent / "elsewhere"
    elsewhere.mkdir()
    (pki / "server.crt").rename(elsewhere / "real.crt")
    (pki / "server.crt").symlink_to("../elsewhere/real.crt")
    run(pki, store)
    assert (pki / "server.crt").is_symlink()
    assert (elsewhere / "real.crt").read_bytes() == NEW["server.crt"]
    assert [path.name for path in elsewhere.iterdir()] == ["real.crt"]


def test_a_missing_key_is_made_for_its_owner_alone(pki: Path, store: Store) -> None:
    """A certificate without its key gets a new pair."""
    (pki / "server.key").unlink()
    files = [Replacement(certificate="x", path=pki / "server.key", data=b"k", mode_mask=KEY_MASK, was=None)]
    install(store, files, "run1", {})
    assert stat.S_IMODE((pki / "server.key").stat().st_mode) == 0o600


def test_a_file_that_changed_since_its_csr_was_made_stops_everything(pki: Path, store: Store) -> None:
    """Another program (kubeadm) renewed meanwhile: nothing is replaced."""
    files = replacements(pki)
    (pki / "server.crt").write_bytes(b"kubeadm's")
    with pytest.raises(InstallError) as e:
        install(store, files, "run1", {})
    wanted = "wanted the file that the CSR was made from, found another content"
    assert str(e.value) == f"nothing was replaced: {pki / 'server.crt'}: {wanted}"
    assert e.value.hint == "something else writes to the PKI; find it, then run again"
    assert contents(pki) == FILES | {"server.crt": b"kubeadm's"}
    assert store.backup_directories() == []


def test_a_directory_in_the_place_of_a_file_stops_everything(pki: Path, store: Store) -> None:
    """No file is replaced, and nothing is left over."""
    (pki / "server.crt").unlink()
    (pki / "server.crt").mkdir()
    with pytest.raises(InstallError) as e:
        run(pki, store)
    assert str(e.value) == f"nothing was replaced: {pki / 'server.crt'}: wanted a file, found something else"
    assert (pki / "server.key").read_bytes() == FILES["server.key"]
    _assert_whole_and_old(store)


def test_a_symlink_that_leads_nowhere_stops_everything(pki: Path, store: Store) -> None:
    """The file behind it may be on a disk that is not mounted."""
    (pki / "server.crt").unlink()
    (pki / "server.crt").symlink_to("/nonexistent/server.crt")
    with pytest.raises(InstallError) as e:
        run(pki, store)
    wanted = "wanted a file, found a symlink that leads nowhere"
    assert str(e.value) == f"nothing was replaced: {pki / 'server.crt'}: {wanted}"
    assert e.value.hint == "mount or fix what it leads to, or remove it"
    _assert_whole_and_old(store)


def test_a_directory_that_is_not_there_stops_everything(pki: Path, store: Store) -> None:
    """The path and the reason are named."""
    gone = pki / "gone" / "server.crt"
    files = [Replacement(certificate="x", path=gone, data=b"x", mode_mask=CERTIFICATE_MASK, was=None)]
    with pytest.raises(InstallError) as e:
        install(store, files, "run1", {})
    assert str(e.value) == f"nothing was replaced: {gone.parent}: No such file or directory"
    _assert_whole_and_old(store)


def test_a_directory_for_a_new_pair_is_made_once(pki: Path, store: Store) -> None:
    """It has kubeadm's mode for a directory of the PKI, whatever the umask; a later installation finds it there."""
    made, before = pki / "etcd", os.umask(0)
    try:
        for number, old in enumerate((None, digest(b"0"))):
            new_file = Replacement(
                certificate="x", path=made / "a.key", data=str(number).encode(), mode_mask=KEY_MASK, was=old,
                makes_directory=True,
            )  # fmt: skip
            install(store, [new_file], f"run{number}", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.stat().st_mode) == PKI_DIRECTORY_MODE
    assert (made / "a.key").read_bytes() == b"1"


def test_a_staged_file_that_is_gone_undoes_all(pki: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program has removed one meanwhile: the others are put back, and the error names both places."""
    gone, rename = pki / ".ca-bridge-run1-admin.conf", Path.rename

    def rename_and_remove(self: Path, target: Path) -> Path:
        gone.unlink(missing_ok=True)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_and_remove)
        with pytest.raises(InstallError) as e:
            run(pki, store)
    found = f"{pki / 'admin.conf'}: its new content is neither here nor in {gone}"
    assert str(e.value) == f"all was put back: {found}"
    assert contents(pki) == FILES
    assert recover(store) is None


def _assert_whole_and_old(store: Store) -> None:
    """Nothing was staged that is still there, and nothing is left of a backup."""
    assert [path.name for path in store.directory.iterdir()] == ["backups"]
    assert list(store.backups.iterdir()) == []


def test_a_backup_says_what_it_holds(pki: Path, store: Store) -> None:
    """Each file with its digest and attributes, what it is about, and its place in the order of backups."""
    (pki / "server.crt").unlink()
    files = replacements(pki)
    files[1] = replace(files[1], was=None)
    first = install(store, files, "run1", {"command": "renew", "certificates": ["x"]})
    manifest = manifest_file(store.backups / first).read()
    assert manifest is not None
    created = datetime.fromisoformat(manifest.pop("created"))
    assert first == f"{created:%Y%m%dT%H%M%SZ}-run1"
    assert abs(created - datetime.now(UTC)) < timedelta(minutes=5)
    attributes = {"mode": 0o600, "uid": os.getuid(), "gid": os.getgid(), "extended": {}}
    entries: list[dict[str, Any]] = [
        {"certificate": "x", "path": str(pki / name), "backup": f"{number:02}-{name}", "sha256": digest(FILES[name])}
        | {"attributes": attributes}
        for number, name in enumerate(FILES)
    ]
    entries[1] = {"certificate": "x", "path": str(pki / "server.crt"), "backup": None}
    about = {"command": "renew", "certificates": ["x"]}
    assert manifest == {"id": first, "number": 1, "run_id": "run1", "files": entries, **about}
    assert {path.name for path in (store.backups / first).iterdir()} == {
        *("00-server.key", "02-admin.conf", "manifest.json")
    }
    again = [
        Replacement(certificate="x", path=pki / name, data=old, mode_mask=MASKS[name], was=digest(new(old)))
        for name, old in FILES.items()
    ]
    second = manifest_file(store.backups / install(store, again, "run2", {})).read()
    assert second is not None
    assert second["number"] == 2


JOURNAL: dict[str, Any] = {
    "run_id": "run1",
    "backup": "20260101T000000Z-run1",
    "direction": "back",
    "targets": [{"certificate": "x", "path": "/pki/a", "staged": "/pki/.ca-bridge-run1-a", "sha256": None}],
}
TARGET: dict[str, Any] = JOURNAL["targets"][0]
STAGED = {"run_id": "run1", "staged": ["/pki/.ca-bridge-run1-a"]}
SAVED = {"certificate": "x", "path": "/pki/a", "backup": "00-a", "sha256": "0" * 64}
SAVED_LINK = {"certificate": "x", "path": "/pki/b", "backup": None, "leads_to": "c"}
SAVED_AS = {
    "id": "i",
    "number": 1,
    "created": "2026-01-01T00:00:00+00:00",
    "run_id": "run1",
    "files": [SAVED, SAVED_LINK],
}


@pytest.mark.parametrize(
    "change",
    [
        *({"direction": "sideways"}, {"run_id": 1}, {"backup": None}),
        *({"targets": [TARGET | change]} for change in ({"certificate": 1}, {"sha256": 1}, {"path": "/pki/b"})),
        *({"targets": [TARGET | change]} for change in ({"staged": "/pki/a"}, {"staged": "/pki/.ca-bridge-run2-a"})),
        {"targets": [TARGET | {"path": "pki/a", "staged": "pki/.ca-bridge-run1-a"}]},
        {"targets": [TARGET, TARGET | {"certificate": 1}]},
    ],
)
def test_a_journal_that_we_did_not_write_is_refused(store: Store, change: dict[str, Any]) -> None:
    """Each path in it is a place where files are put; its twin is read."""
    for direction in ("forward", "back"):
        journal_file(store).replace(JOURNAL | {"direction": direction})
        assert journal_file(store).read() == JOURNAL | {"direction": direction}
    journal_file(store).replace(JOURNAL | change)
    _assert_damaged(journal_file(store), "our journal of an installation", "`ca-bridge doctor` shows whether each key")


@pytest.mark.parametrize(
    "change",
    [
        *({"staged": ["pki/.ca-bridge-run1-a"]}, {"staged": ["/pki/a"]}, {"run_id": "run2"}),
        {"staged": ["/pki/.ca-bridge-run1-a", "/pki/.ca-bridge-run2-a"]},
    ],
)
def test_a_list_of_staged_files_that_we_did_not_write_is_refused(store: Store, change: dict[str, Any]) -> None:
    """Each path in it is one that we remove; its twin is read."""
    files: Any = staging_file(store)
    files.replace(STAGED)
    assert files.read() == (Path("/pki/.ca-bridge-run1-a"),)
    files.replace(STAGED | change)
    _assert_damaged(files, "the list of files that were staged", "remove what begins with .ca-bridge-")


@pytest.mark.parametrize(
    "change",
    [
        *({"number": "1"}, {"number": True}, {"id": 1}, {"created": None}, {"run_id": 1}, {"files": {}}),
        *({"files": [SAVED | change]} for change in ({"backup": 1}, {"sha256": 1}, {"certificate": 1}, {"path": 1})),
        *({"files": [SAVED, SAVED_LINK | change]} for change in ({"leads_to": 1}, {"path": None})),
    ],
)
def test_a_manifest_that_we_did_not_write_is_refused(store: Store, change: dict[str, Any]) -> None:
    """Without one of these fields a backup can't be listed or put back."""
    directory = store.backups / "i"
    directory.mkdir()
    manifest_file(directory).replace(SAVED_AS)
    assert manifest_file(directory).read() == SAVED_AS
    manifest_file(directory).replace(SAVED_AS | change)
    _assert_damaged(manifest_file(directory), "a backup's manifest", "`ca-bridge backups` lists the others")


def _assert_damaged(file: StateFile[Any], what: str, afterwards: str) -> None:
    with pytest.raises(StateError) as e:
        file.read()
    assert what in str(e.value)
    assert afterwards in f"{e.value} {e.value.hint}"


def test_attributes_are_written_and_read() -> None:
    """Extended attributes are written in hex."""
    attributes = Attributes(mode=0o640, uid=1, gid=2, extended={"user.x": b"\x00\xff"})
    assert attributes_json(attributes) == {"mode": 0o640, "uid": 1, "gid": 2, "extended": {"user.x": "00ff"}}
    assert attributes_from(attributes_json(attributes)) == attributes


def test_a_symlinks_fingerprint_is_no_files(tmp_path: Path) -> None:
    """Where it leads counts, and not what is there."""
    link, file = tmp_path / "link", tmp_path / "file"
    assert fingerprint(link) is None
    link.symlink_to("file")
    assert fingerprint(link) == digest(b"symlink\0file")
    file.write_bytes(b"symlink\0fil")
    assert fingerprint(file) == digest(b"symlink\0fil") != fingerprint(link)


class Tripwire:
    """Counts system calls, and does something at the n-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
        self.count = 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name), at, act))

    def _wrapped(self, call: Callable[..., Any], at: int, act: Callable[[], None]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == at:
                act()
            return call(*args, **kwargs)

        return wrapped


def _calls_of_a_run() -> int:
    """How many system calls of these kinds a whole installation makes; see the test that checks it."""
    return 115


POINTS = range(1, _calls_of_a_run() + 1)


def test_every_point_is_tried(pki: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of points in the tests below is that of a real run."""
    with monkeypatch.context() as patch:
        tripwire = Tripwire(patch, 0, lambda: None)
        run(pki, store)
    assert tripwire.count == _calls_of_a_run()


def _assert_whole(pki: Path, store: Store) -> None:
    assert contents(pki) in (FILES, NEW)
    assert {path.name for path in store.directory.iterdir()} <= {"backups", "written.json"}
    for backup in store.backups.iterdir():
        assert (backup / "manifest.json").exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("point", POINTS)
def test_an_error_at_any_point_leaves_all_old_or_all_new(
    pki: Path, store: Store, monkeypatch: pytest.MonkeyPatch, point: int, code: int
) -> None:
    """The error is reported, and the files are as a whole run or none would leave them."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        Tripwire(patch, point, fail)
        try:
            run(pki, store)
        except InstallError:  # any other error would not tell the operator which files are in place
            reported = True
        else:
            reported = False
    assert reported or contents(pki) == NEW
    recover(store)
    _assert_whole(pki, store)


def test_a_journal_that_stays_does_not_hide_that_all_was_put_back(
    pki: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A swap fails, then the journal can't be removed; the next run has nothing to undo."""

    def failing(call: Callable[..., Any], place: Path) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if str(place) in map(str, args):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing(os.rename, pki / "admin.conf"))
        patch.setattr(os, "unlink", failing(os.unlink, store.journal))
        with pytest.raises(InstallError, match=r"^all was put back: .*Input/output error$"):
            run(pki, store)
    assert contents(pki) == FILES
    assert store.is_interrupted
    assert (journal_file(store).read() or {})["direction"] == "back"
    recover(store)
    _assert_whole(pki, store)
    assert contents(pki) == FILES


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_leaves_all_old_or_all_new(
    pki: Path, store: Store, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    """All files are old, or all are new, after the next run's recovery."""
    child = os.fork()
    if child == 0:
        Tripwire(monkeypatch, point, lambda: os._exit(9))
        run(pki, store)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    committed, was_done = store.journal.exists(), contents(pki) == NEW
    found = recover(store)
    _assert_whole(pki, store)
    assert committed == (found is not None)
    assert (committed or was_done) == (contents(pki) == NEW)  # the journal is the commit point


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_during_recovery_is_recovered_from(
    pki: Path, store: Store, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    """Recovery may itself be cut off at any point, forward and back."""
    _interrupted(pki, store, monkeypatch)
    (pki / ".ca-bridge-run1-admin.conf").unlink()  # so that it must go back
    child = os.fork()
    if child == 0:
        Tripwire(monkeypatch, point, lambda: os._exit(9))
        recover(store)
        os._exit(0)
    os.waitpid(child, 0)
    recover(store)
    assert contents(pki) == FILES
    _assert_whole(pki, store)


def _interrupted(pki: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that was killed just after its first file was swapped."""
    child = os.fork()
    if child == 0:
        count = 0
        rename = os.rename

        def counting(source: Any, target: Any, **kwargs: Any) -> None:
            nonlocal count
            count += str(source).find(".ca-bridge-") >= 0
            if count == 2:
                os._exit(9)
            rename(source, target, **kwargs)

        monkeypatch.setattr(os, "rename", counting)
        run(pki, store)
        os._exit(0)
    os.waitpid(child, 0)
    assert contents(pki) not in (FILES, NEW)


def test_recovery_goes_forward_if_all_new_files_are_there(
    pki: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recovery finishes an installation whose new files are all there, and says so."""
    _interrupted(pki, store, monkeypatch)
    found = recover(store)
    assert found is not None
    assert found == Recovery(
        run_id="run1", direction="forward", paths=tuple(str(pki / name) for name in FILES), certificates=("x",)
    )
    assert str(found) == "finished the installation of run run1, which was interrupted: 3 files of x"
    assert str(replace(found, direction="back", certificates=("x", "y"))) == (
        "undid the installation of run run1, which was interrupted: 3 files of x, y"
    )
    assert contents(pki) == NEW
    assert recover(store) is None


def test_recovery_that_can_go_nowhere_keeps_the_journal(
    pki: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is kept while files do not match."""
    _interrupted(pki, store, monkeypatch)
    (pki / ".ca-bridge-run1-admin.conf").unlink()
    for saved in store.backups.glob("*/*key"):
        saved.unlink()
    [backup] = store.backups.iterdir()
    with pytest.raises(InstallError) as e:
        recover(store)
    reason = f"{backup / '00-server.key'}: No such file or directory"
    assert str(e.value) == f"an interrupted installation can neither be finished nor undone: {reason}"
    assert e.value.hint == f"the old files are in {backup}, the journal is {store.journal}"
    assert store.journal.exists()
    (backup / "manifest.json").unlink()
    with pytest.raises(InstallError, match=f"{backup / 'manifest.json'}: the backup's manifest is missing"):
        recover(store)


@pytest.mark.parametrize("name", FILES)
def test_a_directory_in_the_place_of_a_file_after_the_commit_point_is_named(
    pki: Path, store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each run says which, and what to do; when it was moved away, the next one goes on, and all files are old."""
    _interrupted(pki, store, monkeypatch)
    (pki / name).unlink()
    (pki / name).mkdir()
    (pki / name / "theirs").touch()
    for _ in range(2):
        with pytest.raises(InstallError) as e:
            recover(store)
        assert f"{pki / name}: wanted a file that can be replaced, or none, found a directory" in str(e.value)
        assert str(e.value.hint).startswith(f"move the directory {pki / name} away, then run `ca-bridge recover`; ")
    (pki / name).rename(pki.parent / "away")
    found = recover(store)
    assert found is not None
    assert found.direction == "back"
    assert contents(pki) == FILES
    assert recover(store) is None


def test_an_installation_that_meets_a_directory_says_which(
    pki: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears after the commit point, where the installation can neither go on nor back."""
    rename = Path.rename

    def rename_and_make(self: Path, target: Path) -> Path:
        if self.name == ".ca-bridge-run1-server.key" and (pki / "admin.conf").is_file():
            (pki / "admin.conf").unlink()
            (pki / "admin.conf").mkdir()
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_and_make)
        with pytest.raises(InstallError, match=f"nor put back .{pki / 'admin.conf'}: wanted a file") as e:
            run(pki, store)
    assert e.value.hint == f"move the directory {pki / 'admin.conf'} away, then run `ca-bridge recover`"
    (pki / "admin.conf").rmdir()
    assert recover(store) is not None
    assert contents(pki) == FILES


def test_a_backup_of_other_files_is_not_put_back(pki: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal names a file that its backup does not hold."""
    _interrupted(pki, store, monkeypatch)
    (pki / ".ca-bridge-run1-admin.conf").unlink()
    [backup] = store.backups.iterdir()
    manifest = manifest_file(backup).read()
    assert manifest is not None
    manifest_file(backup).replace(manifest | {"files": manifest["files"][:1]})
    lacking = f"{pki / 'admin.conf'}, {pki / 'server.crt'}"
    with pytest.raises(InstallError, match=f"{backup}: it has no backup of {lacking}"):
        recover(store)
    assert store.journal.exists()


@pytest.mark.parametrize("what", [".journal.json.abcdefgh", "20260101T000000Z-0123abcd"])
def test_recovery_that_cannot_clear_away_says_what(store: Store, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """An error of ours, with the file's name; when the disk is well again the same call works."""
    if what.startswith("."):
        (store.directory / what).write_text("half")
    else:
        (store.backups / what).mkdir()

    def fail(path: object, **_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        patch.setattr(os, "rmdir", fail)
        with pytest.raises(InstallError, match=re.escape(what)):
            recover(store)
    assert recover(store) is None
    assert [path.name for path in store.directory.rglob("*")] == ["backups"]


@pytest.fixture
def holder(store: Store) -> Iterator[None]:
    """Another run."""
    with lock(store.lock, "ca-bridge renew"):
        yield


def test_one_run_at_a_time(store: Store) -> None:
    """The second run's error says who holds the lock; when the first has ended it is free."""
    with lock(store.lock, "ca-bridge renew"), pytest.raises(LockedError) as e, lock(store.lock, "other"):
        pass
    assert f"process {os.getpid()} " in str(e.value)
    with lock(store.lock, "other"):
        pass


def test_a_look_at_the_lock_holds_up_no_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """`doctor` has it for a moment, in which a nightly run would end; a run that has it for longer is one."""
    with lock(store.lock, "before"):
        pass
    looking = store.lock.open("rb")
    fcntl.flock(looking, fcntl.LOCK_SH)
    pause = time.sleep

    def sleep(seconds: float) -> None:
        looking.close()
        pause(seconds)

    with monkeypatch.context() as patch:
        patch.setattr(
            "bridge.system.locks._LOOK", timedelta(minutes=3)
        )  # a stalled machine has not looked twice by then
        patch.setattr("bridge.system.waiting.time.sleep", sleep)
        with lock(store.lock, "renew"):
            assert "renew" in str(held_by(store.lock))
    with lock(store.lock, "first"), pytest.raises(LockedError, match="first"), lock(store.lock, "second"):
        pass


def test_a_lock_that_cannot_tell_its_holder_is_a_lock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the command goes on, and the second one waits for a process that did not write its name."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with lock(store.lock, "ca-bridge renew"):
        pass
    monkeypatch.setattr(os, "pwrite", full)
    with lock(store.lock, "ca-bridge recover"), pytest.raises(LockedError) as e, lock(store.lock, "other"):
        pass
    assert "did not write its name" in str(e.value)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777])
def test_a_state_directory_for_others_is_refused(tmp_path: Path, mode: int) -> None:
    """It holds keys."""
    directory = tmp_path / "state"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(BridgeError):
        Store(directory).prepare()
    directory.chmod(0o700)
    Store(directory).prepare()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_state_directory_is_made_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    """No other user can write to a directory on the way that was made with it, which would be refused."""
    before = os.umask(umask)
    try:
        Store(tmp_path / "a/b/state").prepare()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / place).stat().st_mode) for place in ("a", "a/b", "a/b/state")]
    assert modes == [0o755 & ~umask, 0o755 & ~umask, 0o700]


def test_a_file_that_says_the_same_keeps_its_time(tmp_path: Path) -> None:
    """A reader of the unchanged file need not read it again; the twin's change is seen."""
    store = Store(tmp_path / "state")
    store.prepare()
    paths = {name: tmp_path / name for name in ("same", "other")}
    for path in paths.values():
        path.write_bytes(b"old")

    def replaced(data: bytes, *, says_the_same: bool, run_id: str) -> dict[str, float]:
        files = [
            Replacement(
                certificate="ca",
                path=path,
                data=data,
                mode_mask=0o777,
                was=fingerprint(path),
                says_the_same=says_the_same and name == "same",
            )
            for name, path in paths.items()
        ]
        install(store, files, run_id, {})
        written = written_file(store).read() or {}
        return {name: written[str(path)].seconds for name, path in paths.items()}

    first = replaced(b"new", says_the_same=False, run_id="r1")
    second = replaced(b"wen", says_the_same=True, run_id="r2")
    assert second["same"] == first["same"]
    assert second["other"] > first["other"]
    (tmp_path / "third").write_bytes(b"by another program")
    (tmp_path / "third").rename(paths["same"])
    assert replaced(b"third", says_the_same=True, run_id="r3")["same"] == 0  # as before the machine's start
