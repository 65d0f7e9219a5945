"""Where everything goes, what is the operator's, and the error that ends an installation."""

from __future__ import annotations

import os
from pathlib import Path

TOP = Path("/opt/ca-bridge")
VERSIONS = TOP / "versions"
CURRENT = TOP / "current"  #: A link to one of the versions; replacing it is the upgrade.
UNINSTALL = TOP / "uninstall"

#: In $PATH for cron (/usr/bin:/bin), for sudo on Debian, and for sudo on RHEL, which leaves /usr/local out.
COMMAND = Path("/usr/bin/ca-bridge")

#: For units that an administrator installs (systemd.unit(5)): /etc/systemd/system comes before, packages after it.
UNITS = Path("/usr/local/lib/systemd/system")
OWN_UNITS = Path("/etc/systemd/system")

SETTINGS = Path("/etc/ca-bridge/config.toml")

#: The operator's, or made by the program for the operator; only `--purge` removes it, and asks before.
KEPT = {
    Path("/etc/ca-bridge"): "settings, and what they name",
    Path("/var/lib/ca-bridge"): "state: audit log, backups with keys, requests that wait",
    TOP / "plugins": "plug-ins that were added",
}


#: Where docs/install.md has links made by hand, to manual pages and completion.
_BY_HAND = (
    *("usr/local/share/man/man1/ca-bridge*", "etc/bash_completion.d/ca-bridge"),
    *("usr/local/share/zsh/site-functions/_ca-bridge", "etc/fish/completions/ca-bridge.fish"),
)


class InstallError(Exception):
    """Nothing more is done. The text says what was wanted and what was found, the hint what to do next."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


def replace_link(link: Path, target: str) -> None:
    """Make a link, or have one lead elsewhere, in one step."""
    if link.is_symlink() and str(link.readlink()) == target:
        return
    temporary = link.with_name(f".{link.name}.new")  # always the same: what a killed installer has left is used up
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
    """Whether a link leads into our tree, also to something that is gone."""
    if not link.is_symlink():
        return False
    named = Path(os.path.normpath(link.parent / link.readlink()))  # the versions may be on another disk, by a link
    return named.is_relative_to(TOP) or Path(os.path.realpath(link)).is_relative_to(os.path.realpath(TOP))


def by_hand(root: Path = Path("/")) -> list[Path]:
    """Those of these links that lead into the version that is in force."""
    found = (path for pattern in _BY_HAND for path in root.glob(pattern) if path.is_symlink())
    return [path for path in found if path.readlink().is_relative_to(CURRENT)]
