"""The installer's command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from release.installer import installation, machine, payload, places, removal
from release.installer.places import InstallError

_ABOUT = "Installs, upgrades and removes ca-bridge on this machine, without a network or a package index."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit with 0 (done), 1 (not done, or output not written) or 2 (usage)."""
    try:
        _run(arguments)
    finally:
        try:
            print(end="", flush=True)
        except OSError as e:  # Python would print its own message, and exit with 120
            os.write(2, f"error: standard output: {e.strerror}\n".encode())
            os._exit(1)


def _run(arguments: Sequence[str] | None) -> None:
    given = _parser().parse_args(arguments)
    try:
        given.do(given)
    except InstallError as e:
        print(f"error: {e}", file=sys.stderr)
        if e.hint:
            print(f"hint: {e.hint}", file=sys.stderr)
        sys.exit(1)
    except OSError as e:
        print(f"error: {e.filename or 'system'}: {e.strerror or e}", file=sys.stderr)
        print("hint: the version that was installed before is still in use", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"sh {Path(sys.argv[0]).name}", description=_ABOUT)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="check whether it runs on this machine; changes nothing")
    check.set_defaults(do=lambda _: _check())
    install = commands.add_parser("install", help="install, or upgrade: settings and state stay as they are")
    install.add_argument("--enable", action="store_true", help="enable the nightly timer, and recovery at boot")
    install.add_argument("--despite-settings", action="store_true", help="even if the new version refuses the settings")
    install.set_defaults(do=_install)
    uninstall = commands.add_parser("uninstall", help="remove the program; settings, state and plug-ins stay")
    uninstall.add_argument("--purge", action="store_true", help="remove settings, state and plug-ins, too; asks first")
    uninstall.set_defaults(do=lambda given: removal.uninstall(purge=given.purge))
    return parser


def _install(given: argparse.Namespace) -> None:
    opened = payload.Payload(Path(sys.argv[0]))
    installation.install(opened, enable=given.enable, despite_settings=given.despite_settings)


def _check() -> None:
    manifest = payload.Payload(Path(sys.argv[0])).manifest
    machine.assert_fits(manifest)
    there = installation.current()
    print(f"ca-bridge {manifest.version} runs here, on {sys.executable}")
    if there:
        damaged = payload.changed(there)
        state = f"changed files: {', '.join(damaged)}" if damaged else "all files are as they were installed"
        print(f"installed: {there} ({state})")
        if damaged:
            raise InstallError(
                f"{there}: wanted files as they were installed, found {len(damaged)} others", "install again"
            )
    else:
        print(f"installed: nothing in {places.TOP}")
