"""A static pod's manifest goes out and comes back, whatever happens in between."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from bridge.errors import Exit
from bridge.specs import Component
from bridge.state import Store, static_pods
from bridge.state.static_pods import Pod, RestartError, StoppedError, aside, recover, replace, restart
from bridge.system.state_file import StateDamagedError
from tests.kit.static_pod import CONTENT, TIMEOUT, Site, attempt, interrupted
from tests.kit.tripwire import failing, kill


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """One to play with."""
    return Site.make(tmp_path / "site")


def looks(*found: str | None) -> Callable[[], str | None]:
    """Finds these, one at each look."""
    waiting = list(found)
    return lambda: waiting.pop(0)


# --- a whole restart -------------------------------------------------------------------------------------------------


def test_the_manifest_is_away_until_the_pod_is_gone_and_then_back(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """It is moved, not copied; the kubelet's directory never holds another file; the journal always knows."""
    caplog.set_level("INFO", "ca-bridge")
    inode, seen = site.manifest.stat().st_ino, []

    def look(who: str, answers: Callable[[], str | None]) -> Callable[[], str | None]:
        def looking() -> str | None:
            journal = json.loads(site.store.restart.read_bytes())["state"]
            seen.append((who, site.names(), aside(site.manifest).exists(), journal, site.store.is_interrupted))
            return answers()

        return looking

    site.at_remains = look("remains", looks("a pod", None))
    site.at_trouble = look("trouble", looks("not ready", "not ready", None))
    site.restart()
    away = ("remains", ["etcd.yaml"], True, "out", True)
    back = ("trouble", ["etcd.yaml", "kube-scheduler.yaml"], False, "back", True)
    assert seen == [away, away, back, back, back]
    assert site.manifest.stat().st_ino == inode
    assert len(caplog.messages) == 2
    site.assert_whole()
    assert recover(site.store) is None


def test_what_the_api_needs_comes_back_while_it_ends(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the kubelet has seen it; then the old instance has to end all the same, and a new one to be healthy."""
    monkeypatch.setattr(static_pods, "_UNDER_WAY", timedelta())
    troubles, running, seen = ["refused", "starting"], ["old", "old", "old", "", "new", "new"], []

    def instances() -> frozenset[str]:
        seen.append((running[0], site.manifest.exists()))
        return frozenset(filter(None, [running.pop(0)]))

    def trouble() -> str | None:
        healthy = running[:1] == ["old"] and not site.manifest.exists() and len(running) == 5  # not yet noticed
        return None if healthy or not troubles else troubles.pop(0)

    restart(
        Pod(
            name=Component.ETCD.value,
            manifest=site.manifest,
            instances=instances,
            trouble=trouble,
            settle=timedelta(hours=1),
            is_needed_by_api=True,
        ),
        site.store,
        TIMEOUT,
    )
    assert seen == [("old", True), ("old", False), ("old", True), ("", True)]
    site.assert_whole()


def test_the_manifest_waits_beside_the_real_directory(site: Site, tmp_path: Path) -> None:
    """Where the manifests directory is a symlink, its own file system is that of what it leads to."""
    elsewhere = tmp_path / "elsewhere/static"
    shutil.move(site.manifest.parent, elsewhere)
    site.manifest.parent.symlink_to(elsewhere)
    seen = []
    site.at_remains = lambda: seen.append(sorted(path.name for path in elsewhere.parent.iterdir()))
    site.restart()
    assert seen == [[".ca-bridge-kube-scheduler.yaml", "static"]]
    assert elsewhere.joinpath("kube-scheduler.yaml").read_bytes() == CONTENT


def test_a_symlinked_manifest_stays_one(site: Site) -> None:
    """A relative link stays one, too, though it leads nowhere while it is away."""
    real = site.manifest.parent / "../real.yaml"
    site.manifest.rename(real)
    site.manifest.symlink_to("../real.yaml")
    site.restart()
    assert site.manifest.readlink() == Path("../real.yaml")
    assert site.manifest.read_bytes() == CONTENT
    assert not aside(site.manifest).is_symlink()


def test_a_pod_that_does_not_end_gets_its_manifest_back(site: Site) -> None:
    """It comes back after the time limit; the error says what was found, and the exit code that it is not live."""
    site.at_remains = lambda: "a running pod"
    with pytest.raises(RestartError, match="found: a running pod") as e:
        site.restart(timedelta(seconds=0.3))
    assert e.value.exit_code == Exit.NOT_LIVE
    site.assert_whole()


def test_a_component_that_does_not_come_back_is_reported(site: Site) -> None:
    """With its own words; the manifest is in its place, and no journal claims otherwise."""
    site.at_trouble = lambda: "HTTP status 500: [-]etcd failed"
    with pytest.raises(RestartError, match=r"\[-\]etcd failed"):
        site.restart(timedelta(seconds=0.3))
    site.assert_whole()


def test_without_a_manifest_nothing_is_done(site: Site) -> None:
    """It is an error before anything moves."""
    site.manifest.unlink()
    with pytest.raises(RestartError, match="No such file"):
        site.restart()
    assert not site.store.is_interrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("when", ["at_remains", "at_trouble"])
def test_a_signal_ends_the_run_after_the_manifest_is_back(site: Site, number: signal.Signals, when: str) -> None:
    """systemd, Ctrl-C and a lost terminal may end a run at any time, twice if they like."""
    outside = signal.signal(number, signal.SIG_DFL)  # the tests themselves may have been started with nohup
    before = signal.getsignal(number)

    def look() -> str:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        return "busy"

    setattr(site, when, look)
    try:
        with pytest.raises(StoppedError, match=number.name):
            site.restart()
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, outside)
    site.assert_whole()


def test_what_nohup_keeps_away_stays_away(site: Site) -> None:
    """A terminal that is closed ends nothing that was started with nohup."""
    looks = iter(["busy", "busy"])

    def look() -> str | None:
        os.kill(os.getpid(), signal.SIGHUP)
        return next(looks, None)

    site.at_trouble = look
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        site.restart()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    site.assert_whole()


# --- a crash ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """In memory, where it can be."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as directory:
        yield Path(directory)


@pytest.fixture
def calls(place: Path) -> int:
    """How many system calls a whole restart makes."""
    site = Site.make(place / "whole")
    code, count = attempt(site.restart, 0, kill)
    assert code == 0
    site.assert_whole()
    assert count > 20
    return count


def clean(store: Store) -> str | None:
    """As every command that writes begins."""
    for half_written in store.half_written():
        half_written.unlink()
    return recover(store)


def test_a_kill_at_every_call(calls: int, place: Path) -> None:
    """After `recover` the manifest is in its place: same bytes, mode, owner and attributes, and nothing left over."""
    was_away = 0
    for at in range(1, calls + 1):
        site = Site.make(place / str(at))
        assert attempt(site.restart, at, kill)[0] == -signal.SIGKILL, at
        away, journal = not site.manifest.exists(), site.store.restart.exists()
        assert journal or not away, at
        said = clean(site.store)
        assert (said is not None) == journal, at
        assert ("is back" in (said or "")) == away, at
        site.assert_whole(at)
        was_away += away
    assert was_away > 5


def test_a_kill_while_the_text_changes_leaves_the_old_one_or_the_new_one(place: Path) -> None:
    """The new text, with mode, owner and attributes of the old, as soon as the manifest has been away; nothing is left over."""
    new, found = CONTENT + b"# new\n", set()

    def change(site: Site) -> None:
        restart(dataclasses.replace(site.pod, content=new), site.store, TIMEOUT)

    whole = Site.make(place / "whole")
    code, count = attempt(lambda: change(whole), 0, kill)
    assert code == 0
    whole.assert_whole(content=new)
    for at in range(1, count + 1):
        site = Site.make(place / str(at))
        assert attempt(functools.partial(change, site), at, kill)[0] == -signal.SIGKILL, at
        was_away = not site.manifest.exists()
        clean(site.store)
        found.add(content := site.manifest.read_bytes())
        assert content == new or not was_away, at
        site.assert_whole(at, content)
    assert found == {CONTENT, new}


def test_a_symlink_is_not_given_another_text(site: Site) -> None:
    """It has its reasons, and what it leads to may be another node's; the text of a manifest is replaced in one step."""
    replace(site.manifest, CONTENT + b"# new\n")
    site.assert_whole(content=CONTENT + b"# new\n")
    site.manifest.rename(site.root / "elsewhere")
    site.manifest.symlink_to(site.root / "elsewhere")
    with pytest.raises(RestartError, match="it is a symlink"):
        restart(dataclasses.replace(site.pod, content=CONTENT), site.store, TIMEOUT)


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EACCES"])
def test_an_error_of_every_call(calls: int, place: Path, code: str) -> None:
    """It is reported, or did not matter; the manifest is in its place, unless the very way back is barred."""
    left = 0
    for at in range(1, calls + 1):
        site = Site.make(place / str(at))
        result, _ = attempt(site.restart, at, failing(getattr(errno, code)))
        assert result in (0, 5), at
        assert site.manifest.exists() or site.store.restart.exists(), at
        left += not site.manifest.exists()
        clean(site.store)
        site.assert_whole(at)
    assert left <= 1


def test_a_manifest_that_is_nowhere_comes_back_from_the_journal(place: Path) -> None:
    """A lost manifest is written from the journal again; a kill at each call of the repair leaves it to the next try."""
    site = interrupted(place / "whole")
    aside(site.manifest).unlink()
    code, count = attempt(lambda: recover(site.store), 0, kill)
    assert code == 0
    site.assert_whole()
    for at in range(1, count + 1):
        site = interrupted(place / str(at))
        aside(site.manifest).unlink()
        assert attempt(lambda: recover(site.store), at, kill)[0] == -signal.SIGKILL, at  # noqa: B023
        clean(site.store)
        site.assert_whole(at)


def test_another_programs_new_manifest_stays(place: Path) -> None:
    """kubeadm upgrade may have written one while ours was away; the old one is kept, where no kubelet looks."""
    site = interrupted(place / "site")
    site.manifest.write_bytes(b"newer\n")
    said = recover(site.store)
    assert said is not None
    assert site.manifest.read_bytes() == b"newer\n"
    assert not aside(site.manifest).exists()
    [kept] = site.store.directory.glob("kube-scheduler-*.yaml")
    assert str(kept) in said
    assert kept.read_bytes() == CONTENT
    assert not site.store.is_interrupted


def test_crashes_before_and_after_have_their_own_messages(site: Site) -> None:
    """The message says whether the restart had not begun, or the component was not seen healthy."""
    site.at_trouble = kill
    attempt(site.restart, 0, kill)
    assert "before kube-scheduler was seen healthy" in (recover(site.store) or "")
    site.assert_whole()


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"component": "etcd"}', "\0"])
def test_a_journal_that_is_none_is_reported(site: Site, text: str) -> None:
    """It is not thrown away: a manifest may be out."""
    site.store.restart.write_text(text)
    with pytest.raises(StateDamagedError) as e:
        recover(site.store)
    assert str(site.store.restart) in str(e.value)
    assert (e.value.exit_code, "--set-aside" in e.value.hint) == (Exit.NOT_LIVE, True)
    assert site.store.is_interrupted
