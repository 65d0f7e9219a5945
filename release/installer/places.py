"""The installed paths, the paths that belong to the operator, and the error that ends an installation."""

from __future__ import annotations

import os
from pathlib import Path

TOP = Path("/opt/ca-bridge")
VERSIONS = TOP / "versions"
CURRENT = TOP / "current"  #: A link to one of the versions; an upgrade replaces it.
UNINSTALL = TOP / "uninstall"

#: In $PATH for cron (/usr/bin:/bin), for sudo on Debian, and for sudo on RHEL, which leaves /usr/local out.
COMMAND = Path("/usr/bin/ca-bridge")

#: For units that an administrator installs (systemd.unit(5)): after /etc/systemd/system, before those of packages.
UNITS = Path("/usr/local/lib/systemd/system")
OWN_UNITS = Path("/etc/systemd/system")

SETTINGS = Path("/etc/ca-bridge/config.toml")

#: Files that belong to the operator, or that the program made; only `--purge` removes them, after it has asked.
KEPT = {
    Path("/etc/ca-bridge"): "settings, and files that they name",
    Path("/var/lib/ca-bridge"): "state: audit log, backups with keys, waiting requests",
    TOP / "plugins": "plug-ins that you added",
}


#: Links to manual pages and completion that docs/install.md tells the operator to make.
_BY_HAND = (
    *("usr/local/share/man/man1/ca-bridge*", "etc/bash_completion.d/ca-bridge"),
    *("usr/local/share/zsh/site-functions/_ca-bridge", "etc/fish/completions/ca-bridge.fish"),
)


class InstallError(Exception):
    """Ends the installation. The text says what was wanted and what was found, the hint what to do next."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


def replace_link(link: Path, target: str) -> None:
    """Create a link, or change its target, in one step."""
    if link.is_symlink() and str(link.readlink()) == target:
        return
    temporary = link.with_name(f".{link.name}.new")  # fixed, to remove the link of a killed installer
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def write(path: Path, data: bytes) -> bool:
    """Write a file with mode 0644 in one step; return whether its content changes."""
    if path.is_file() and not path.is_symlink() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")  # as above
    try:
        temporary.write_bytes(data)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return True


def is_ours(link: Path) -> bool:
    """Whether a link leads into our tree, even if its target is gone."""
    if not link.is_symlink():
        return False
    named = Path(os.path.normpath(link.parent / link.readlink()))  # a link may lead to versions on another disk
    return named.is_relative_to(TOP) or Path(os.path.realpath(link)).is_relative_to(os.path.realpath(TOP))


def by_hand(root: Path = Path("/")) -> list[Path]:
    """The links made by hand that lead into the version in use."""
    found = (path for pattern in _BY_HAND for path in root.glob(pattern) if path.is_symlink())
    return [path for path in found if path.readlink().is_relative_to(CURRENT)]
