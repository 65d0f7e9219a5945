"""
What a `.deb` and an `.rpm` have in common: the tree in /usr/lib/ca-bridge, and around it what a distribution wants.

The tree is that of the offline file without its installer, whose work is the package manager's.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from release.tree import File, Tree
from release.wheels import Wheel

HOME = "usr/lib/ca-bridge"
SUMMARY = "renews a kubeadm control plane's certificates by a CA that is elsewhere"
DESCRIPTION = (
    "ca-bridge renews the certificates of a kubeadm control plane whose CA keys are",
    "not on its disks: keys and CSRs are made on the node, signed by the company's",
    "CA (Vault, OpenBao, cfssl, openssl ca, CMP, EST or a program), proven, and",
    "installed in one step that survives a crash.",
    "It brings every Python package that it needs, and uses none of the system's.",
)
#: The scripts' error on a machine that has the offline file's installation.
OFFLINE_IS_THERE = (
    "wanted no other installation, found one in /opt/ca-bridge: run /opt/ca-bridge/uninstall (settings and state stay)"
)
#: Shell of its upgrade and removal, wherever the settings have its state: a run that is at work would lose its modules in
#: the middle, and only the program can finish or undo what was cut off, in the journals that are named.
ASSERT_AT_REST = r"""assert_at_rest() {
  IFS='
'
  for state in /var/lib/ca-bridge $(/usr/bin/ca-bridge settings show 2>/dev/null | sed -n '/^\[node\]/,/^\[/s/^state_dir = "\(.*\)"$/\1/p'); do
    if [ -f "$state/lock" ] && ! flock -w 5 "$state/lock" true; then
      echo "error: $state: wanted no run at work, found one" >&2
      echo "hint: wait until it has ended (ca-bridge doctor names it), then do this again" >&2
      exit 1
    fi
    for left in "$@"; do
      if [ -e "$state/$left.json" ]; then
        echo "error: $state: wanted no interrupted renewal, found $left.json" >&2
        echo "hint: run ca-bridge recover first" >&2
        exit 1
      fi
    done
  done
  unset IFS
}
"""
#: Shell of its removal.
STOP_AND_DISABLE = """\
  if command -v systemctl >/dev/null; then
    timers="ca-bridge.timer ca-bridge-desk.timer"
    [ ! -d /run/systemd/system ] || systemctl stop $timers 'ca-bridge-gateway*.service' 'ca-bridge-serve*.service' || :
    systemctl disable --quiet $timers ca-bridge-recover.service ca-bridge-gateway.service || :
  fi
"""
#: Shell of its upgrade: the services that run have the modules of the version before.
RESTART_SERVICES = "systemctl try-restart 'ca-bridge-gateway*.service' 'ca-bridge-serve*.service' || :"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A root file system's part: files and links by path, without a slash before it."""

    files: Tree
    links: Mapping[str, str]
    release: Wheel = field(repr=False)

    def write(self, root: Path, epoch: int) -> None:
        """Write it into an empty directory, each file and directory with the same time and a mode that is no accident."""
        root.mkdir(parents=True)
        for path, file in self.files.items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.data)
            target.chmod(file.mode)
        for path, leads_to in self.links.items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(leads_to)
        for one in [*root.rglob("*"), root]:
            if one.is_dir() and not one.is_symlink():
                one.chmod(0o755)
            os.utime(one, (epoch, epoch), follow_symlinks=False)


def layout(tree: Tree, project: Wheel) -> Layout:
    """The common part: program, command, units, examples, manual pages, completion."""
    files: Tree = {}
    for path, file in tree.items():
        place = _place(path)
        data = gzip.compress(file.data, 9, mtime=0) if place.endswith(".gz") else file.data
        files[place] = File(data, file.executable)
        if unit := _unit(path):
            files[f"usr/lib/systemd/system/{unit}"] = file  # and in its place, since `setup systemd` reads it there
    links = {
        "usr/bin/ca-bridge": "../lib/ca-bridge/bin/ca-bridge",
        "usr/share/doc/kubeadm-ca-bridge": "../../lib/ca-bridge/share/doc/kubeadm-ca-bridge",
        "usr/share/kubeadm-ca-bridge": "../lib/ca-bridge/share/kubeadm-ca-bridge",
    }
    return Layout(files=files, links=links, release=project)


def _place(path: str) -> str:
    if path.startswith("share/man/"):
        return f"usr/{path}.gz"
    if path.startswith("share/") and not path.startswith(("share/kubeadm-ca-bridge/", "share/doc/")):
        return f"usr/{path}"
    return f"{HOME}/{path}"


def _unit(path: str) -> str:
    """The name of one of the units that the offline file's installer writes, too; others are examples."""
    place, _, name = path.rpartition("/")
    is_installed = place in {f"share/kubeadm-ca-bridge/{kind}" for kind in ("systemd", "desk")}
    return name if is_installed and name.endswith((".service", ".timer")) else ""
