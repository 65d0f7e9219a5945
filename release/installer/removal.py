"""Uninstall: remove the program's files, and keep the operator's."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from release.installer import installation, machine, places, units
from release.installer.places import InstallError

#: An interrupted run left these; only the program knows how to continue.
_INTERRUPTED = ("journal.json", "restart.json", "staging.json")
_STATE = Path("/var/lib/ca-bridge")


def uninstall(*, purge: bool) -> None:
    """Remove the program, its command and its units."""
    machine.assert_root()
    if purge and not sys.stdin.isatty():
        raise InstallError(
            "--purge: wanted a terminal to ask on, found none", "uninstall without --purge, and remove the rest by hand"
        )
    if not places.VERSIONS.is_dir():
        raise InstallError(f"wanted an installation in {places.TOP}, found none")
    with installation.locked(), _at_rest():
        units.remove()
        own = (places.COMMAND, places.TOP / "bin/ca-bridge", places.UNINSTALL, places.CURRENT)
        for link in (*filter(places.is_ours, own), *places.by_hand()):
            link.unlink()
        _remove_versions()
    print("removed the program, its command and its units")
    if purge:
        _purge()
    if places.TOP.is_dir() and not any(places.TOP.iterdir()):
        places.TOP.rmdir()
    _tell()


@contextmanager
def _at_rest() -> Iterator[None]:
    """Keep runs from starting (InstallError: a run is at work and would lose its modules, or was interrupted)."""
    with ExitStack() as held:
        for state in dict.fromkeys([_STATE, *_named_states()]):
            _hold(state, held)
            found = [name for name in _INTERRUPTED if (state / name).exists()]
            if found:
                raise InstallError(
                    f"{state}: wanted no interrupted renewal, found {', '.join(found)}",
                    "run `ca-bridge recover` first: only the program can finish or undo it",
                )
        yield


def _hold(state: Path, held: ExitStack) -> None:
    """Take the lock that keeps two runs from working at the same time (`bridge/system/locks.py`)."""
    try:
        descriptor = os.open(state / "lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        hint = "wait until it ends (`ca-bridge doctor` names it), then uninstall again"
        raise InstallError(f"{state}: wanted no run at work, found one", hint) from e


def _named_states() -> list[Path]:
    """The state directory of a node or desk that the settings name, if the program can still read them."""
    tree = installation.current()
    shown = installation.run(tree, "settings", "show").stdout if tree is not None else ""
    node = shown.partition("[node]\n")[2].partition("\n[")[0]
    return [Path(found) for found in re.findall(r'^state_dir = "(.*)"$', node, re.MULTILINE)]


def _remove_versions() -> None:
    """Remove the trees that the installer made; other files beside them stay."""
    for left in places.VERSIONS.glob(".new-*"):
        shutil.rmtree(left)
    installation.remove_trees(set())
    if not places.VERSIONS.is_symlink() and not any(places.VERSIONS.iterdir()):
        places.VERSIONS.rmdir()


def _purge() -> None:
    for path, what in places.KEPT.items():
        if not os.path.lexists(path):
            continue
        if _is_wanted(f"remove {path} ({what})? [y/N] "):
            path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _is_wanted(question: str) -> bool:
    try:
        return input(question).strip().lower() in {"y", "yes"}
    except EOFError:  # Ctrl-D is not a yes
        print()
        return False


def _tell() -> None:
    if places.VERSIONS.is_dir():
        print(f"kept:     {places.VERSIONS}, without the installer's files")
    for path, what in places.KEPT.items():
        if os.path.lexists(path):
            print(f"kept:     {path} ({what})")
    if (places.TOP / "pyvenv.cfg").is_file():
        print(f"kept:     the virtual environment in {places.TOP}")
    own = [*places.OWN_UNITS.glob("ca-bridge*"), *Path("/etc/cron.d").glob("ca-bridge*")]
    for path in sorted(own):
        print(f"kept:     {path}; it may still start the removed program")
