"""The desk's answers: many files that are written together, and what a killed run leaves of them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.desk import records
from bridge.desk.records import NewFile, write_together
from bridge.system import files
from bridge.system.files import remove_unfinished


def test_all_are_there_under_all_their_names(tmp_path: Path) -> None:
    """With their contents and modes; nothing else is left."""
    groups = [
        [
            NewFile(
                path=tmp_path / f"{n}", data=b"%d" % n, mode=0o640, links=[tmp_path / f"{n}.b", tmp_path / f"{n}.c"]
            ),
            NewFile(path=tmp_path / f"{n}.own", data=b"own"),
        ]
        for n in range(250)
    ]
    (tmp_path / "0").write_bytes(b"old")

    assert write_together(groups) == [None] * len(groups)

    assert len(list(tmp_path.iterdir())) == 4 * len(groups)
    for n in range(len(groups)):
        assert {(tmp_path / name).read_bytes() for name in (f"{n}", f"{n}.b", f"{n}.c")} == {b"%d" % n}
        assert stat.S_IMODE((tmp_path / f"{n}").stat().st_mode) == 0o640
        assert stat.S_IMODE((tmp_path / f"{n}.own").stat().st_mode) == 0o600


def test_a_further_name_that_is_taken_stays_what_it_is(tmp_path: Path) -> None:
    """The file has its other names all the same."""
    (tmp_path / "b").write_bytes(b"first")

    assert write_together([[NewFile(path=tmp_path / "a", data=b"x", links=[tmp_path / "b", tmp_path / "c"])]]) == [None]

    assert [(tmp_path / name).read_bytes() for name in "abc"] == [b"x", b"first", b"x"]


@pytest.mark.parametrize("broken", ["nowhere/x", "taken"])
def test_an_error_ends_its_group_alone(tmp_path: Path, broken: str) -> None:
    """The error names the file; what is behind it in the group is not put in place, and the others are."""
    (tmp_path / "taken").mkdir()
    groups = [
        [NewFile(path=tmp_path / "a", data=b"a")],
        [NewFile(path=tmp_path / broken, data=b"b"), NewFile(path=tmp_path / "behind", data=b"b")],
        [NewFile(path=tmp_path / "c", data=b"c")],
    ]

    first, error, last = write_together(groups)

    assert (first, last) == (None, None)
    assert error is not None
    assert error.filename == str(tmp_path / broken)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c", "taken"}


def _failing(real: Callable[[int], None], name: str) -> Callable[[int], None]:
    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith(f".{name}."):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    return fsync


def test_what_the_disk_does_not_take_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of its group, not even what the disk has taken; the error names the file."""
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", _failing(os.fsync, "b"))
    groups = [[NewFile(path=tmp_path / "a", data=b"a"), NewFile(path=tmp_path / "b", data=b"b")]]
    groups += [[NewFile(path=tmp_path / "c", data=b"c")]]

    error, other = write_together(groups)

    assert other is None
    assert error is not None
    assert (error.errno, error.filename) == (errno.EIO, str(tmp_path / "b"))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c"}


def test_names_that_may_not_last_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that can't be synced is the error of each group with a file in it, and of no other."""
    (tmp_path / "d").mkdir()
    groups = [[NewFile(path=tmp_path / "d/a", data=b"a")], [NewFile(path=tmp_path / "b", data=b"b")]]

    def sync_directory(path: Path) -> None:
        if path.name == "d":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        files.sync_directory(path)

    monkeypatch.setattr(records, "sync_directory", sync_directory)

    error, other = write_together(groups)

    assert other is None
    assert error is not None
    assert error.filename == str(tmp_path / "d")


def test_all_are_on_disk_before_the_first_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are flushed first, then renamed, then their directories are flushed."""
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def reporting_fsync(descriptor: int) -> None:
        done.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def reporting_rename(*paths: Path) -> None:
        done.append("name")
        rename(*paths)

    monkeypatch.setattr(os, "fsync", reporting_fsync)
    monkeypatch.setattr(os, "rename", reporting_rename)

    write_together([[NewFile(path=tmp_path / name, data=b"x") for name in "abc"]])

    assert done == ["file"] * 3 + ["name"] * 3 + ["directory"]


def test_only_files_under_such_names_are_removed(tmp_path: Path) -> None:
    """The files of a killed process are removed; directories, links and finished files stay."""
    (tmp_path / ".a.json.x1").write_bytes(b"{")
    (tmp_path / ".b.json.x2").mkdir()
    (tmp_path / ".c.json.x3").symlink_to(tmp_path / "nowhere")
    (tmp_path / "d.json").write_bytes(b"{}")

    remove_unfinished(tmp_path, ".*.json.*")

    assert {path.name for path in tmp_path.iterdir()} == {".b.json.x2", ".c.json.x3", "d.json"}
