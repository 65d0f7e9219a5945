"""What `bin/ca-bridge` runs: the modules of this tree, and after them the plug-ins that the operator has added."""

import os
import stat
import sys

#: The operator's own: backends that are plug-ins (`pip install --target`). It stays through upgrades.
PLUGINS = "/opt/ca-bridge/plugins"

here = __file__.rpartition("/")[0]  # absolute, since `bin/ca-bridge` has resolved it
sys.path[:0] = [f"{here}/any", f"{here}/cp{sys.version_info.major}{sys.version_info.minor}"]
try:
    status = os.stat(PLUGINS)  # noqa: PTH116 (pathlib takes a tenth of the time of a run with nothing due)
except OSError:
    pass
else:
    if status.st_uid or stat.S_IMODE(status.st_mode) & 0o022:
        sys.exit(
            f"error: {PLUGINS}: wanted a directory that only root can write to\nhint: chown -R root {PLUGINS}; chmod -R go-w {PLUGINS}"
        )
    for entry in os.scandir(PLUGINS):  # what is further down costs too much time at each start
        its = entry.stat(follow_symlinks=False)
        if its.st_uid or (not entry.is_symlink() and its.st_mode & 0o002):
            sys.exit(
                f"error: {entry.path}: wanted what only root can write to\nhint: chown -R root {PLUGINS}; chmod -R go-w {PLUGINS}"
            )
    sys.path.append(PLUGINS)
del sys.argv[0]  # what is left begins with the name by which the program was called

from bridge.entry import main  # noqa: E402 (it is in the tree)

main()
