#!/bin/sh
# Starts ca-bridge by the system's Python, with nothing of that but its own library: no packages that were added to it, no
# variables ($PYTHONPATH and the like), no user's directory.
set -eu
tree=$(PATH=/usr/bin:/bin readlink -f -- "$0")
tree=${tree%/bin/ca-bridge}
# The one by which the installer has proven this tree.
python=
[ ! -f "$tree/python" ] || read -r python <"$tree/python"
[ -x "$python" ] || python=
@FIND_PYTHON@
exec "$python" -I -S "$tree/lib/start.py" "$0" "$@"
