"""Install, enable and remove systemd units. Without a running systemd only the files change."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from release.installer import places
from release.installer.places import InstallError

#: The units that run renewals; `--enable` enables them.
NIGHTLY = ("ca-bridge.timer", "ca-bridge-recover.service")
#: The units that run all the time, if they run; the operator installs the second.
_LASTING = ("ca-bridge-gateway*.service", "ca-bridge-serve*.service")


def shipped(tree: Path) -> dict[str, bytes]:
    """Return the content of each unit of the tree, by name."""
    share = tree / "share/kubeadm-ca-bridge"
    found = sorted(path for name in ("systemd", "desk") for path in (share / name).glob("ca-bridge*.*"))
    return {path.name: path.read_bytes() for path in found if path.suffix in {".service", ".timer"}}


def install(tree: Path) -> None:
    """Write the tree's units, and remove units of an earlier version that it no longer has."""
    wanted = shipped(tree)
    for name, data in wanted.items():
        places.write(places.UNITS / name, data)
    for path in installed():
        if path.name not in wanted:
            path.unlink()
    if is_running():
        _systemctl("daemon-reload")


def enable() -> None:
    """Enable them from the next boot, and start the timer now if systemd runs."""
    _systemctl("enable", *NIGHTLY)
    if is_running():
        _systemctl("start", "ca-bridge.timer")


def restart_services() -> None:
    """Restart running services with the version in use: the next upgrade removes the version that they were started from."""
    if is_running():
        _systemctl("try-restart", *_LASTING)


def remove() -> None:
    """Stop, disable and remove all our units; the caller has made sure that no renewal is at work."""
    found = installed()
    if found and shutil.which("systemctl"):
        names = [path.name for path in found]
        timers = [name for name in names if name.endswith(".timer")]
        if is_running() and timers:
            _systemctl("stop", *timers, *_LASTING)
        _systemctl("disable", "--quiet", *names)
    for path in found:
        path.unlink()
    for directory in (places.UNITS, places.UNITS.parent):  # usually made for these units
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
    if found and is_running():
        _systemctl("daemon-reload")


def installed() -> list[Path]:
    """The unit files that the installer has written."""
    return sorted(path for path in places.UNITS.glob("ca-bridge*.*") if path.suffix in {".service", ".timer"})


def hidden() -> Iterator[tuple[Path, str]]:
    """The operator's unit files that systemd uses instead of ours, and the program that each starts."""
    for path in sorted(places.OWN_UNITS.glob("ca-bridge*.service")):
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""  # a broken link, or a mask
        starts = [line.partition("=")[2].split() for line in text.splitlines() if line.startswith("ExecStart=")]
        yield path, next((words[0] for words in starts if words), "nothing")


def is_running() -> bool:
    """Whether systemd is this system's init (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def _systemctl(*arguments: str) -> None:
    if not shutil.which("systemctl"):
        raise InstallError("wanted systemctl, found none", "use cron instead: `ca-bridge setup cron --enable`")
    done = subprocess.run(["systemctl", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise InstallError(f"systemctl {' '.join(arguments)}: {said}")
