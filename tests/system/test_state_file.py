"""State files: what is damaged is noticed and handled as its policy says; what can't be read now is never forgotten."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.bootstrap.make import kept_file
from bridge.door.doors import identity
from bridge.errors import Exit
from bridge.state import Store
from bridge.system.files import sync_directory
from bridge.system.state_file import (
    OnDamage,
    StateDamagedError,
    StateError,
    StateFile,
    StateUnreadableError,
    sealed,
    sealed_line,
    unsealed,
)

DOCUMENT = {"names": ["apiserver", "etcd-server"], "count": 3}


def names(data: bytes) -> list[str]:
    """As a real file's `parse` does."""
    return [str(name) for name in unsealed(data)["names"]]


def file(path: Path, policy: OnDamage = OnDamage.REFUSE, exit_code: int = Exit.FAILED) -> StateFile[list[str]]:
    """One with two keys."""
    return StateFile(
        path=path,
        what="the names",
        parse=names,
        on_damage=policy,
        afterwards="look around",
        exit_code=exit_code,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "names.json"


def test_what_was_written_is_read_until_it_is_removed(path: Path) -> None:
    """The file is for its owner alone, and a missing one is no error."""
    one = file(path)
    assert one.read() is None
    one.replace(DOCUMENT)
    assert one.read() == DOCUMENT["names"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert one.damage() is None
    one.remove()
    one.remove()
    assert one.read() is None


def test_a_document_without_a_digest_is_damaged(path: Path) -> None:
    """The error says so; with its digest the same document is read."""
    path.write_text(json.dumps(DOCUMENT))
    with pytest.raises(StateDamagedError, match="it has no digest"):
        file(path).read()
    path.write_bytes(sealed(DOCUMENT))
    assert file(path).read() == DOCUMENT["names"]


def test_every_flipped_bit_is_noticed(path: Path) -> None:
    """A read gives the written value or an error; spaces between values are no content."""
    whole = sealed(DOCUMENT)
    noticed = 0
    for bit in range(len(whole) * 8):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            found = file(path).read()
        except StateDamagedError:
            noticed += 1
        else:
            assert found == DOCUMENT["names"]
            assert whole[bit // 8 : bit // 8 + 1].isspace(), bytes(data)
    assert noticed > 7 * len(whole)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "\0", '{"names": 3}', "{}", "[" * 5000])
@pytest.mark.parametrize("policy", OnDamage)
def test_damage_is_what_its_policy_says(
    path: Path, text: str, policy: OnDamage, caplog: pytest.LogCaptureFixture
) -> None:
    """Damage is never silent, and only a file without open work counts as missing at once."""
    path.write_text(text)
    one = file(path, policy, Exit.NOT_LIVE)
    if policy is OnDamage.START_OVER:
        with caplog.at_level(logging.WARNING, logger="ca-bridge"):
            assert one.read() is None
        assert "wanted the names" in caplog.text
        assert path.read_text() == text
        return
    with pytest.raises(StateDamagedError, match="wanted the names, found something else") as e:
        one.read()
    assert e.value.exit_code == Exit.NOT_LIVE
    assert e.value.hint.endswith("look around")
    if policy is OnDamage.REFUSE:
        assert path.read_text() == text
        assert isinstance(one.damage(), StateDamagedError)
    else:
        assert one.read() is None
        [kept] = path.parent.iterdir()
        assert kept.read_text() == text
        assert str(kept) in e.value.hint


def test_the_command_is_named_only_where_it_finds_the_file(path: Path, tmp_path: Path) -> None:
    """A door's file, and copies in a directory of the administrator's, are renamed by hand."""

    def hint(read: Callable[[], object]) -> str:
        with pytest.raises(StateDamagedError) as e:
            read()
        return e.value.hint

    store, kept = Store(tmp_path / "door"), kept_file(tmp_path, "cp-1")
    store.prepare()
    for one in (path, store.door, kept.path):
        one.write_text("{")
    assert "recover --set-aside" in hint(file(path).read)
    for read in (kept.read, lambda: identity(store)):
        assert hint(read).startswith("rename it, and keep it; ")


@pytest.mark.parametrize("policy", OnDamage)
def test_what_cannot_be_read_now_is_neither_damaged_nor_none(
    path: Path, policy: OnDamage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that can't be read now stays, with any policy, and is read when the disk works again."""
    one = file(path, policy)
    one.replace(DOCUMENT)

    def broken(_: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", broken)
        for read in (one.read, one.damage, one.set_aside):
            with pytest.raises(StateUnreadableError, match="Input/output error"):
                read()
    assert one.read() == DOCUMENT["names"]
    assert [path] == list(path.parent.iterdir())


def test_what_cannot_be_written_leaves_the_old_content(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is an error that names the file."""
    one = file(path)
    one.replace(DOCUMENT)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StateError, match=f"{path}: .* No space left"):
            one.replace({"names": [], "count": 0})
    assert one.read() == DOCUMENT["names"]


def test_a_line_is_the_same_on_one_line() -> None:
    """Files with thousands of documents have one on each line."""
    line = sealed_line(DOCUMENT)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert json.loads(line) == json.loads(sealed(DOCUMENT))
    assert unsealed(line) == DOCUMENT


def test_a_digest_is_of_the_order_too() -> None:
    """The digest covers the order, since the last one may count as the newest."""
    swapped = dict(reversed(DOCUMENT.items()))
    assert unsealed(sealed(swapped)) == DOCUMENT
    mixed = json.loads(sealed(DOCUMENT)) | {"digest": json.loads(sealed(swapped))["digest"]}
    with pytest.raises(ValueError, match="digest"):
        unsealed(json.dumps(mixed).encode())


def test_a_directory_that_can_not_be_flushed_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have no such thing, /proc like some shares; a disk's error stays one."""
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(os.open("/proc", os.O_RDONLY))
    sync_directory(Path("/proc"))

    def fails(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        sync_directory(Path("/proc"))
