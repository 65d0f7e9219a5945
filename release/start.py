"""What `bin/ca-bridge` runs: the modules of this tree, and after them the plug-ins that the operator has added."""

from __future__ import annotations

import os
import stat
import sys

TYPE_CHECKING = False  # as `typing` has it, which takes its time
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

#: The operator's own: backends that are plug-ins (`pip install --target`). It stays through upgrades.
PLUGINS = "/opt/ca-bridge/plugins"


def assert_roots(path: str) -> None:
    """Only root may change what root runs; a link would let the owner of its target do so."""
    its = os.lstat(path)
    if its.st_uid or stat.S_ISLNK(its.st_mode) or its.st_mode & 0o002 or (its.st_mode & 0o020 and its.st_gid):
        text = f"error: {path}: wanted what only root can write to, and no link\n"
        os.write(2, f"{text}hint: chown -R root {PLUGINS}; chmod -R go-w {PLUGINS}, after a look at it\n".encode())
        sys.exit(1)


class RootsOwn:
    """Python's own search for modules; a plug-in's file is looked at when it is imported, with all above it."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder`."""
        spec = PathFinder.find_spec(name, path, target)
        for file in (spec.origin, spec.cached) if spec and spec.origin else ():
            if file and file.startswith(f"{PLUGINS}/"):
                parts = file[len(PLUGINS) + 1 :].split("/")
                for depth in range(1, len(parts) + 1):
                    step = "/".join((PLUGINS, *parts[:depth]))
                    if os.path.lexists(step):  # bytecode need not be there
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
    from importlib.machinery import PathFinder  # what else needs it comes later, if at all

    sys.meta_path.insert(0, RootsOwn)
    sys.path.append(PLUGINS)
del sys.argv[0]  # what is left begins with the name by which the program was called

from bridge.entry import main  # noqa: E402 (it is in the tree)

main()
