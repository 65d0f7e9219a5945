"""
The common part of a `.deb` and an `.rpm`: the tree in /usr/lib/ca-bridge, and the files that distributions expect.

The tree is the offline file's without the installer, because the package manager installs it.
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
SUMMARY = "renews the certificates of a kubeadm control plane with an external CA"
DESCRIPTION = (
    "ca-bridge renews the certificates of a kubeadm control plane whose CA keys are",
    "not on its nodes: it makes keys and CSRs on the node, has the company's CA",
    "(Vault, OpenBao, cfssl, openssl ca, CMP, EST or a program) sign them, verifies",
    "the certificates, and installs them in one step that survives a crash.",
    "It contains every Python package that it needs, and uses none of the system's.",
)
#: The scripts' error on a machine that has the offline file's installation.
OFFLINE_IS_THERE = (
    "wanted no other installation, found one in /opt/ca-bridge: run /opt/ca-bridge/uninstall (settings and state stay)"
)
#: Shell for upgrade and removal; it looks in each state directory that the settings name. A run at work would lose its
#: modules, and only the program can finish or undo an interrupted run, whose journals are the arguments.
ASSERT_AT_REST = r"""assert_at_rest() {
  IFS='
'
  for state in /var/lib/ca-bridge $(/usr/bin/ca-bridge settings show 2>/dev/null | sed -n '/^\[node\]/,/^\[/s/^state_dir = "\(.*\)"$/\1/p'); do
    if [ -f "$state/lock" ] && ! flock -w 5 "$state/lock" true; then
      echo "error: $state: wanted no run at work, found one" >&2
      echo "hint: wait until it ends (ca-bridge doctor names it), then try again" >&2
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
#: Shell for removal.
STOP_AND_DISABLE = """\
  if command -v systemctl >/dev/null; then
    timers="ca-bridge.timer ca-bridge-desk.timer"
    [ ! -d /run/systemd/system ] || systemctl stop $timers 'ca-bridge-gateway*.service' 'ca-bridge-serve*.service' || :
    systemctl disable --quiet $timers ca-bridge-recover.service ca-bridge-gateway.service || :
  fi
"""
#: Shell for an upgrade: running services still use the modules of the previous version.
RESTART_SERVICES = "systemctl try-restart 'ca-bridge-gateway*.service' 'ca-bridge-serve*.service' || :"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Files and links of a root file system, by path without a leading slash."""

    files: Tree
    links: Mapping[str, str]
    release: Wheel = field(repr=False)

    def write(self, root: Path, epoch: int) -> None:
        """Write it into an empty directory, all files and directories with the same time and with fixed modes."""
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
            files[f"usr/lib/systemd/system/{unit}"] = file  # also in its own place, where `setup systemd` reads it
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
    """The name of a unit that the offline file's installer also writes; other units are examples."""
    place, _, name = path.rpartition("/")
    is_installed = place in {f"share/kubeadm-ca-bridge/{kind}" for kind in ("systemd", "desk")}
    return name if is_installed and name.endswith((".service", ".timer")) else ""
