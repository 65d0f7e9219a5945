"""Who else may change what a path leads to: owners, modes and links of all that is on the way."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.errors import SettingsError
from bridge.system.paths import UnreadableError, exposure, foreign_link, open_secret, own_text, read, read_once
from bridge.system.run_command import python_command

SOMEBODY = 12345

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A file two directories down."""
    path = tmp_path / "etc/site/config.toml"
    path.parent.mkdir(parents=True)
    for directory in (path.parent, path.parent.parent):
        directory.chmod(0o755)
    path.touch(mode=0o644)
    return path


def test_what_is_ours_alone_is_not_exposed(place: Path) -> None:
    """A missing file is not exposed either, nor one below a directory like /tmp, where all users write with the sticky bit."""
    assert exposure(place) is None
    assert exposure(place.with_name("none")) is None
    place.parent.chmod(0o1777)
    assert exposure(place) is None
    assert exposure(place.parent) is None


def test_where_others_can_make_files_is_named(place: Path) -> None:
    """The sticky bit keeps others from renaming files, and not from making one first; a directory above may have it."""
    place.parent.parent.chmod(0o1777)
    assert exposure(place.parent, new_files=True) is None
    place.parent.chmod(0o1777)
    found = exposure(place.parent, new_files=True)
    assert found is not None
    assert (found.path, found.found) == (place.parent, "mode 1777")


@pytest.mark.parametrize("up", [0, 1, 2])
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_what_others_can_write_to_is_named(place: Path, up: int, mode: int) -> None:
    """The file, and each directory on the way to it, with what to do."""
    one = [place, *place.parents][up]
    one.chmod(mode)
    found = exposure(place)
    assert found is not None
    assert (found.path, found.found) == (one, f"mode {mode:04o}")
    assert str(one) in found.hint


@needs_root
@pytest.mark.parametrize("up", [0, 1, 2])
def test_what_belongs_to_another_user_is_named(place: Path, up: int) -> None:
    """Another user's file is named with any mode, since its owner can change that."""
    one = [place, *place.parents][up]
    os.chown(one, SOMEBODY, 0)
    found = exposure(place)
    assert found is not None
    assert (found.path, found.found) == (one, f"user {SOMEBODY}")


@needs_root
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda link, _: os.lchown(link, SOMEBODY, 0), id="the link"),
        pytest.param(lambda _, target: os.chown(target, SOMEBODY, 0), id="its target"),
        pytest.param(lambda _, target: os.chown(target.parent, SOMEBODY, 0), id="the target's directory"),
    ],
)
def test_links_are_followed(place: Path, tmp_path: Path, spoil: Callable[[Path, Path], None]) -> None:
    """Each of them, and everything on the way to what it leads to."""
    target = tmp_path / "real/config.toml"
    target.parent.mkdir()
    target.touch(mode=0o600)
    place.unlink()
    place.symlink_to("../../real/config.toml")
    assert exposure(place) is None
    assert foreign_link(place) is None
    spoil(place, target)
    assert exposure(place) is not None


def test_links_without_end_lead_nowhere(tmp_path: Path) -> None:
    """A circle of links ends as in the kernel."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert exposure(tmp_path / "a") is None
    with pytest.raises(OSError, match="symbolic links"):
        (tmp_path / "a").read_bytes()


@needs_root
def test_a_link_counts_where_others_can_put_one(place: Path, tmp_path: Path) -> None:
    """A link counts in another user's directory, or in one that others can write to; a plain file there is no link."""
    target = tmp_path / "target"
    target.touch(mode=0o600)
    os.chown(place.parent, SOMEBODY, 0)
    assert foreign_link(place) is None
    place.unlink()
    place.symlink_to(target)
    found = foreign_link(place)
    assert found is not None
    assert found.path == place
    os.chown(place.parent, 0, 0)
    assert foreign_link(place) is None
    place.parent.chmod(0o777)
    assert foreign_link(place) is not None


@pytest.mark.parametrize(("mode", "is_open"), [(0o600, False), (0o400, False), (0o604, True), (0o644, True)])
def test_a_secret_is_for_its_owner(place: Path, mode: int, is_open: bool) -> None:
    """Others may not even read it."""
    place.chmod(mode)
    assert (open_secret(place) is not None) is is_open


@needs_root
def test_a_group_of_others_is_others(place: Path) -> None:
    """Root's own group is not."""
    place.chmod(0o640)
    assert open_secret(place) is None
    os.chown(place, 0, SOMEBODY)
    assert open_secret(place) is not None


_IN_OPEN = 0x20  # inotify(7)


def opens(path: Path, act: Callable[[], object]) -> bool:
    """Whether something was opened to be read or written while we act."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(watch, os.fsencode(path), _IN_OPEN) >= 0
    with contextlib.suppress(UnreadableError, SettingsError):
        act()
    try:
        return bool(os.read(watch, 4096))
    except BlockingIOError:
        return False
    finally:
        os.close(watch)


@pytest.mark.attack("N8")
@pytest.mark.parametrize("name", ["read", "read_once", "own_text"])
def test_what_is_no_file_is_not_even_opened(tmp_path: Path, name: str) -> None:
    """Opening a watchdog or a tape has an effect; a regular file is opened by the same calls."""

    def text(path: Path) -> str:
        return own_text(path, "a text", "")

    acts: dict[str, Callable[[Path], object]] = {"read": read, "read_once": read_once, "own_text": text}
    act = acts[name]
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe, 0o600)
    link.symlink_to(pipe)
    file.write_text("here")
    file.chmod(0o600)
    assert not opens(pipe, lambda: act(pipe))
    assert not opens(pipe, lambda: act(link))
    assert opens(file, lambda: act(file))
    with pytest.raises((UnreadableError, SettingsError), match="not a regular file"):
        act(pipe)


@pytest.mark.attack("G10")
@needs_root
@pytest.mark.parametrize(
    ("mapping", "is_trusted"),
    [
        pytest.param(["--map-root-user"], False, id="root of its own"),
        pytest.param(["--map-user=1000", "--map-group=1000"], True, id="no root"),
    ],
)
def test_who_is_unknown_to_a_user_namespace(tmp_path: Path, mapping: list[str], is_trusted: bool) -> None:
    """With a root of its own, as below `PrivateUsers=yes`, an unknown user is just another user, and not root outside."""
    place = tmp_path / "policy.toml"
    place.touch(0o600)
    os.chown(place, SOMEBODY, SOMEBODY)
    code = "import sys; from pathlib import Path; from bridge.system.paths import exposure; print(exposure(Path(sys.argv[1])))"
    command = ["unshare", "--user", *mapping, *python_command(code, str(place))]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (found.strip() == "None") is is_trusted, found
    os.chown(place, 0, 0)
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "None"
