"""Where the real programs are that tests run against; `tests/kit/binaries.sh` brings them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

KIT = Path(__file__).resolve().parent

#: What brings the programs, as a person would type it in the project's directory.
COMMAND = "tests/kit/binaries.sh"

#: What a node is made of (`tests/kit/node.sh`): the kit's programs, then those of Debian packages.
NODE_PROGRAMS = (
    *("kubeadm", "kubelet", "kubectl", "kube-apiserver", "kube-controller-manager", "kube-scheduler"),
    *("containerd", "containerd-shim-runc-v2", "ctr", "crictl", "etcd", "etcdctl"),
    *("runc", "ip", "gcc", "nsenter", "unshare"),
)


def directory() -> Path:
    """Where the kit's programs are: `$KUBE_BIN_DIR`."""
    return Path(os.environ.get("KUBE_BIN_DIR", "/opt/k8s"))


def find(name: str) -> Path | None:
    """The program of this name: the kit's, or else the first in `$PATH`."""
    found = shutil.which(name, path=os.pathsep.join([str(directory()), os.environ.get("PATH", os.defpath)]))
    return Path(found) if found else None


def require(name: str) -> Path:
    """
    The program of this name.

    Raises:
        FileNotFoundError: It is not there; the text names the command that brings it.
    """
    found = find(name)
    if found is None:
        raise FileNotFoundError(f"{lacking([name])}")
    return found


def environment() -> dict[str, str]:
    """For a server that gets nothing else from this process: where programs are, and how often Go looks for garbage."""
    return {"PATH": os.defpath, **{name: os.environ[name] for name in ("GOGC",) if name in os.environ}}


def lacking(names: Iterable[str]) -> str:
    """One sentence about those that are not there, and what brings them; empty if all are."""
    missing = [name for name in names if find(name) is None]
    return f"{', '.join(missing)} not found in {directory()} or $PATH; run {COMMAND}" if missing else ""
