"""File systems and files that are in the way: a clear error before anything moves, or a correct installation."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import uuid
from pathlib import Path

import pytest

from bridge.errors import BridgeError
from bridge.state import Store
from bridge.state.install import CERTIFICATE_MASK, KEY_MASK, InstallError, Replacement, install, recover
from bridge.system.files import Attributes, digest, is_frozen
from tests.counts import Tried
from tests.kit.small_disk import fill, needs_root, tmpfs

OLD = {"server.key": b"old key", "server.crt": b"old certificate"}
NEW = {"server.key": b"new key" * 3000, "server.crt": b"new certificate"}
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


@pytest.fixture(autouse=True)
def counted(tried: Tried) -> None:
    """Each test is one case."""
    tried("file systems, links, attributes and modes that are in the way", 1)


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """A pair."""
    return filled(tmp_path / "pki")


def filled(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in OLD.items():
        (directory / name).write_bytes(content)
        (directory / name).chmod(0o600 if name.endswith(".key") else 0o644)
    return directory


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty state directory."""
    store = Store(tmp_path / "state")
    store.prepare()
    return store


def run(pki: Path, store: Store) -> None:
    masks = {"server.key": KEY_MASK, "server.crt": CERTIFICATE_MASK}
    files = [
        Replacement(certificate="x", path=pki / name, data=data, mode_mask=masks[name], was=digest(OLD[name]))
        for name, data in NEW.items()
    ]
    install(store, files, uuid.uuid4().hex[:8], {})


def contents(pki: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pki.iterdir()}


def assert_refused(pki: Path, store: Store) -> str:
    """All is as it was, and nothing left over; returns the message."""
    with pytest.raises(InstallError) as e:
        run(pki, store)
    recover(store)
    assert contents(pki) == OLD
    assert not store.is_interrupted
    return str(e.value)


@needs_root
def test_a_full_pki_directory(store: Store, tmp_path: Path) -> None:
    """Nothing is replaced; with room again it is."""
    with tmpfs(tmp_path / "full", "64k") as directory:
        pki = filled(directory)
        fill(pki)
        with pytest.raises(InstallError) as e:
            run(pki, store)
        assert "nothing was replaced" in str(e.value)
        assert str(directory) in str(e.value)
        (pki / "filler").unlink()
        assert contents(pki) == OLD
        run(pki, store)
        assert contents(pki) == NEW


@needs_root
@pytest.mark.parametrize("pages", range(12))
def test_a_state_directory_with_little_room(pki: Path, tmp_path: Path, pages: int) -> None:
    """Wherever the room ends (backup, journal), it is all old or all new, and `recover` needs no room."""
    with tmpfs(tmp_path / "small", "128k") as directory:
        store = Store(directory)
        store.prepare()
        fill(directory, spared_pages=pages)
        try:
            run(pki, store)
        except (BridgeError, OSError):
            recover(store)
            assert contents(pki) == OLD
        else:
            assert contents(pki) == NEW
        assert not store.is_interrupted


@needs_root
def test_a_read_only_pki_directory(store: Store, tmp_path: Path) -> None:
    """The message names the directory."""
    with tmpfs(tmp_path / "ro") as directory:
        pki = filled(directory)
        subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
        assert str(directory) in assert_refused(pki, store)
        subprocess.run(["mount", "-o", "remount,rw", str(directory)], check=True)
        run(pki, store)
        assert contents(pki) == NEW


@needs_root
@pytest.mark.parametrize("flag", ["i", "a"])
@pytest.mark.parametrize("name", ["server.crt", "."])
def test_an_immutable_file_or_directory_is_found_before_anything_moves(
    pki: Path, store: Store, name: str, flag: str
) -> None:
    """root may not replace it either, so it is found before; the hint says how to undo it."""
    path = pki / name
    if subprocess.run(["chattr", f"+{flag}", str(path)], capture_output=True, check=False).returncode:
        pytest.skip("this file system has no immutable files; run the tests on ext4, xfs or btrfs")
    try:
        assert is_frozen(path)
        assert str(path.resolve()) in assert_refused(pki, store)
        assert not list(store.backups.iterdir())
    finally:
        subprocess.run(["chattr", f"-{flag}", str(path)], check=True)
    assert not is_frozen(path)
    run(pki, store)
    assert contents(pki) == NEW


def test_a_dangling_symlink(pki: Path, store: Store, tmp_path: Path) -> None:
    """It leads to something that is not mounted, perhaps: it is not replaced by a file."""
    link = pki / "server.key"
    link.unlink()
    link.symlink_to(tmp_path / "elsewhere.key")
    file = Replacement(certificate="x", path=link, data=b"k", mode_mask=KEY_MASK, was=None)
    with pytest.raises(InstallError):
        install(store, [file], "run1", {})
    assert link.is_symlink()
    assert not store.is_interrupted
    link.unlink()
    install(store, [file], "run1", {})
    assert link.read_bytes() == b"k"


@needs_root
def test_a_symlink_to_another_file_system(pki: Path, store: Store, tmp_path: Path) -> None:
    """The new file is staged there, so that it still is one rename."""
    with tmpfs(tmp_path / "other") as other:
        (other / "real.key").write_bytes(OLD["server.key"])
        (pki / "server.key").unlink()
        (pki / "server.key").symlink_to(other / "real.key")
        run(pki, store)
        assert contents(pki) == NEW
        assert (pki / "server.key").is_symlink()
        assert [path.name for path in other.iterdir()] == ["real.key"]


@needs_root
def test_a_target_that_is_a_mount_of_its_own(pki: Path, store: Store, tmp_path: Path) -> None:
    """A bind mount over one file can't be renamed over: all is put back, its neighbour too."""
    source = tmp_path / "bound.crt"
    source.write_bytes(OLD["server.crt"])
    subprocess.run(["mount", "--bind", str(source), str(pki / "server.crt")], check=True)
    try:
        assert "server.crt" in assert_refused(pki, store)
    finally:
        subprocess.run(["umount", str(pki / "server.crt")], check=True)
    run(pki, store)
    assert contents(pki) == NEW


def acl(*, named: int, mask: int, user: int = 12345) -> bytes:
    """An ACL as the kernel stores it: owner rw, one named user, group none, mask, others none."""
    none = 0xFFFFFFFF
    entries = [(0x01, 6, none), (0x02, named, user), (0x04, 0, none), (0x10, mask, none), (0x20, 0, none)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def set_acl(path: Path, kind: str, value: bytes) -> None:
    try:
        os.setxattr(path, kind, value)
    except OSError:
        pytest.skip("this file system has no POSIX ACLs; run the tests on ext4, xfs or btrfs")


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_acls_and_attributes_are_kept(pki: Path, store: Store, umask: int) -> None:
    """They are kept with any umask; a key's mode (with an ACL: its mask) is never looser than 0600."""
    set_acl(pki / "server.crt", ACCESS, acl(named=4, mask=4))
    set_acl(pki / "server.key", ACCESS, acl(named=4, mask=4))
    os.setxattr(pki / "server.crt", "user.note", b"kept")
    certificate = Attributes.of(pki / "server.crt")
    before = os.umask(umask)
    try:
        run(pki, store)
    finally:
        os.umask(before)
    assert Attributes.of(pki / "server.crt") == certificate
    key = Attributes.of(pki / "server.key")
    assert key.mode == 0o600
    assert key.extended[ACCESS] == acl(named=4, mask=0)


def test_a_default_acl_of_the_directory_gives_no_new_right(pki: Path, store: Store) -> None:
    """A file that had no ACL gets none from its directory."""
    before = {path: Attributes.of(path) for path in pki.iterdir()}
    set_acl(pki, DEFAULT, acl(named=6, mask=6))
    run(pki, store)
    assert {path: Attributes.of(path) for path in pki.iterdir()} == before


def test_one_attribute_that_cannot_be_read_hides_no_other(pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attribute that we may not read, such as a security module's label, hides no other."""
    os.setxattr(pki / "server.crt", "user.note", b"kept")
    monkeypatch.setattr(os, "listxattr", lambda _: ["trusted.none", "security.ima", "user.note"])
    assert Attributes.of(pki / "server.crt").extended == {"user.note": b"kept"}


def test_new_files_are_never_open_to_other_users(pki: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key's content comes after its owner, its ACL and its mode."""
    set_acl(pki / "server.key", ACCESS, acl(named=4, mask=4))
    seen = []
    setxattr = os.setxattr

    def looking(target: int, name: str, value: bytes) -> None:
        setxattr(target, name, value)
        seen.append((os.fstat(target).st_size, stat.S_IMODE(os.fstat(target).st_mode)))

    monkeypatch.setattr(os, "setxattr", looking)
    run(pki, store)
    assert seen
    assert {size for size, _ in seen} == {0}
