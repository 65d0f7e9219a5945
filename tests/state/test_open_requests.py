"""Requests that are open, by their lines: what is written is what is read, and damage means what its kind says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from bridge.state.open_requests import Kind, RequestLog
from bridge.system.state_file import StateDamagedError


@dataclass(frozen=True)
class Entry:
    """A request, as far as the file is concerned."""

    name: str
    count: int


def kind(*, has_keys: bool = False, lies_on_disk: bool = False) -> Kind[Entry]:
    return Kind(
        name="entry",
        type=Entry,
        key_of=lambda one: one.name,
        what="entries",
        has_keys=has_keys,
        lies_on_disk=lies_on_disk,
    )


KINDS = {"added": kind(), "with keys": kind(has_keys=True), "on disk": kind(lies_on_disk=True)}


@pytest.fixture(params=KINDS)
def each(request: pytest.FixtureRequest) -> Kind[Entry]:
    return KINDS[request.param]


def test_changes_are_on_disk_after_save(tmp_path: Path, each: Kind[Entry]) -> None:
    """Changes are on disk after save and not before; the last line of a request counts; without requests there is no file."""
    path = tmp_path / "entries"
    log = RequestLog(path, each)
    log.put(Entry("a", 1))
    assert (log.get("a"), path.exists()) == (Entry("a", 1), False)
    log.save()
    assert path.stat().st_mode & 0o777 == 0o600
    log.put(Entry("b", 1))
    log.put(Entry("a", 2))
    log.save()
    assert RequestLog(path, each).by_name() == {"a": Entry("a", 2), "b": Entry("b", 1)}
    again = RequestLog(path, each)
    assert again.drop("a") == Entry("a", 2)
    assert (again.drop("a"), again.drop("c")) == (None, None)
    again.save()
    assert list(RequestLog(path, each)) == list(again) == [Entry("b", 1)]
    again.forget("b")
    again.forget("c")
    again.save()
    assert not path.exists()
    again.put(Entry("d", 1))
    again.save()
    assert list(RequestLog(path, each)) == [Entry("d", 1)]


def test_what_is_dropped_leaves_the_disk(tmp_path: Path) -> None:
    """A dropped request leaves the disk at once where the file has keys, elsewhere when there are many."""
    for name, one in KINDS.items():
        path = tmp_path / name
        log = RequestLog(path, one)
        for number in range(3000):
            log.put(Entry("same", number))
            if number < 2 or number > 2000:
                log.put(Entry(f"x{number}", 0))
            log.save()
            log.drop(f"x{number}")
            if one.has_keys and number > 5:
                break
        log.save()
        count = len(path.read_bytes().splitlines())
        assert count == 2 if one.has_keys else count < 1100
        log.tidy()
        assert len(path.read_bytes().splitlines()) == 1 + one.has_keys
        assert list(log) == list(RequestLog(path, one))


def test_a_cut_line_is_forgotten(tmp_path: Path) -> None:
    """Lines that are added later begin where the last whole one ends."""
    path, one = tmp_path / "entries", KINDS["added"]
    log = RequestLog(path, one)
    log.put(Entry("a", 1))
    log.save()
    with path.open("ab") as file:
        file.write(b'{"digest": "00')
    again = RequestLog(path, one)
    again.put(Entry("b", 1))
    again.save()
    assert list(RequestLog(path, one)) == [Entry("a", 1), Entry("b", 1)]


def test_damage_among_keys_is_an_error(tmp_path: Path) -> None:
    """Each flipped bit, and each line that is missing, is noticed; without keys the other lines count."""
    for name, one in KINDS.items():
        path = tmp_path / name
        log = RequestLog(path, one)
        for key in ("a", "b", "c"):
            log.put(Entry(key, 1))
        log.save()
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        damaged = [bytes([*whole[:at], whole[at] ^ 4, *whole[at + 1 :]]) for at in range(0, len(whole) - 1, 3)]
        for data in (*damaged, whole[:-5], b"".join(lines[:-1]), b"".join(lines[1:])):
            path.write_bytes(data)
            if one.has_keys:
                with pytest.raises(StateDamagedError):
                    RequestLog(path, one)
            else:
                assert 1 <= len(RequestLog(path, one)) <= 2
