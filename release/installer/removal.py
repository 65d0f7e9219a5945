"""Taking the program away again: what it brought goes, what is the operator's stays."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from release.installer import installation, machine, places, units
from release.installer.places import InstallError

#: Left by a run that was cut off: only the program knows how to go on.
_INTERRUPTED = ("journal.json", "restart.json", "staging.json")
_STATE = Path("/var/lib/ca-bridge")


def uninstall(*, purge: bool) -> None:
    """Remove the program, its command and its units."""
    machine.assert_root()
    if purge and not sys.stdin.isatty():
        raise InstallError(
            "--purge: wanted a terminal to ask on, found none", "uninstall without it, and remove the rest"
        )
    if not places.VERSIONS.is_dir():
        raise InstallError(f"wanted an installation in {places.TOP}, found none")
    _assert_nothing_is_interrupted()
    with installation.locked():
        units.remove()
        for link in (places.COMMAND, places.TOP / "bin/ca-bridge", places.UNINSTALL, places.CURRENT):
            if places.is_ours(link):
                link.unlink()
        shutil.rmtree(places.VERSIONS)
    print("removed the program, its command and its units")
    if purge:
        _purge()
    if places.TOP.is_dir() and not any(places.TOP.iterdir()):
        places.TOP.rmdir()
    _tell()


def _assert_nothing_is_interrupted() -> None:
    for state in dict.fromkeys([_STATE, *_named_states()]):
        found = [name for name in _INTERRUPTED if (state / name).exists()]
        if found:
            raise InstallError(
                f"{state}: wanted no interrupted renewal, found {', '.join(found)}",
                "run `ca-bridge recover` first: only the program can finish or undo it",
            )


def _named_states() -> list[Path]:
    """State directories that the settings name, as far as the program can still read them."""
    tree = installation.current()
    shown = installation.run(tree, "settings", "show").stdout if tree is not None else ""
    return [Path(found) for found in re.findall(r'^state_dir = "(.*)"$', shown, re.MULTILINE)]


def _purge() -> None:
    for path, what in places.KEPT.items():
        if not os.path.lexists(path):
            continue
        answer = input(f"remove {path} ({what})? [y/N] ")
        if answer.strip().lower() in {"y", "yes"}:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _tell() -> None:
    for path, what in places.KEPT.items():
        if os.path.lexists(path):
            print(f"kept:     {path} ({what})")
    if (places.TOP / "pyvenv.cfg").is_file():
        print(f"kept:     the virtual environment in {places.TOP}")
    own = [*places.OWN_UNITS.glob("ca-bridge*"), *Path("/etc/cron.d").glob("ca-bridge*")]
    for path in sorted(own):
        print(f"kept:     {path}; it may still start the program that is gone")
