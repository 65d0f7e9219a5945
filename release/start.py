"""Runs for `bin/ca-bridge`: puts this tree's modules first, and the operator's plug-ins after them."""

from __future__ import annotations

import os
import stat
import sys

TYPE_CHECKING = False  # as in `typing`, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

#: The operator's directory for backends that are plug-ins (`pip install --target`). Upgrades keep it.
PLUGINS = "/opt/ca-bridge/plugins"


def assert_roots(path: str) -> None:
    """Exit if a user other than root can change a file that root runs; a link's target may have another owner."""
    its = os.lstat(path)
    if its.st_uid or stat.S_ISLNK(its.st_mode) or its.st_mode & 0o002 or (its.st_mode & 0o020 and its.st_gid):
        text = f"error: {path}: wanted a file or directory that only root can write to, and no link\n"
        os.write(2, f"{text}hint: check the files, then chown -R root {PLUGINS}; chmod -R go-w {PLUGINS}\n".encode())
        sys.exit(1)


class RootsOwn:
    """Python's own module search; checks a plug-in's file, and the directories above it, when it is imported."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder`."""
        spec = PathFinder.find_spec(name, path, target)
        for file in (spec.origin, spec.cached) if spec and spec.origin else ():
            if file and file.startswith(f"{PLUGINS}/"):
                parts = file[len(PLUGINS) + 1 :].split("/")
                for depth in range(1, len(parts) + 1):
                    step = "/".join((PLUGINS, *parts[:depth]))
                    if os.path.lexists(step):  # bytecode may be missing
                        assert_roots(step)
        return spec


here = __file__.rpartition("/")[0]  # absolute, since `bin/ca-bridge` has resolved it
sys.path[:0] = [f"{here}/any", f"{here}/cp{sys.version_info.major}{sys.version_info.minor}"]
if os.path.lexists(PLUGINS):
    assert_roots(PLUGINS)
    for entry in os.scandir(PLUGINS):  # metadata and libraries are read without an import
        assert_roots(entry.path)
        if entry.name.endswith((".dist-info", ".libs")):
            for file in os.scandir(entry.path):
                assert_roots(file.path)
    from importlib.machinery import PathFinder  # only here, to start faster without plug-ins

    sys.meta_path.insert(0, RootsOwn)
    sys.path.append(PLUGINS)
del sys.argv[0]  # the rest begins with the name that the program was called by

from bridge.entry import main  # noqa: E402 (it is in the tree)

main()
