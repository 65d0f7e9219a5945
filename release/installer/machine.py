"""Whether the program runs on this machine, and whether the installer may write to it."""

from __future__ import annotations

import os
import platform
import re
import stat
import sys
from pathlib import Path

from release.installer.payload import Manifest
from release.installer.places import InstallError

_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


def glibc() -> tuple[int, int] | None:
    """The system's version of glibc; None with another C library, as on Alpine."""
    try:
        text = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return None
    match = re.fullmatch(r"glibc (\d+)\.(\d+).*", text)
    return (int(match[1]), int(match[2])) if match else None


def architecture() -> str:
    """The machine's architecture, with the name that wheels use."""
    machine = platform.machine().lower()
    return _NAMES.get(machine, machine)


def assert_fits(manifest: Manifest) -> None:
    """Assert the architecture, C library and Python that the program was compiled for."""
    if architecture() != manifest.platform:
        raise InstallError(
            f"wanted a machine with {manifest.platform}, which this file is for, found {architecture()}",
            f"take the file whose name ends in {architecture()}.run",
        )
    found, wanted = glibc(), ".".join(map(str, manifest.glibc))
    if found is None or found < manifest.glibc:
        name = "another C library" if found is None else "glibc " + ".".join(map(str, found))
        raise InstallError(
            f"wanted glibc {wanted} or newer, found {name}",
            "Debian 12, Ubuntu 24.04, RHEL 8 and newer releases have it",
        )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version not in manifest.pythons:
        raise InstallError(f"wanted Python {', '.join(manifest.pythons)}, found {version} ({sys.executable})")


def assert_root() -> None:
    """Assert that the installer may write the program's files."""
    if os.geteuid() != 0:
        raise InstallError(f"wanted root, found user {os.geteuid()}", "run it with sudo")


def assert_roots_own(path: Path) -> None:
    """Refuse a path whose target another user than root can change (InstallError); a missing part passes."""
    real = Path(os.path.realpath(path))
    for one in [*reversed(real.parents), real]:
        try:
            status = one.lstat()
        except FileNotFoundError:
            return
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid or mode & 0o022:
            raise InstallError(
                f"{one}: wanted a directory that belongs to root and that only root can write to, "
                f"found user {status.st_uid} and mode {mode:04o}",
                f"a user who can write there could change programs that root runs: chown root {one}; chmod go-w {one}",
            )
