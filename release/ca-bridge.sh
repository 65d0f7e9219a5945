#!/bin/sh
# Starts ca-bridge with the system's Python and only that Python's own library: no added packages, no variables
# ($PYTHONPATH and the like), no user's directory.
set -eu
tree=$(PATH=/usr/bin:/bin readlink -f -- "$0")
tree=${tree%/bin/ca-bridge}
# The Python with which the installer tested this tree.
python=
[ ! -f "$tree/python" ] || read -r python <"$tree/python"
[ -x "$python" ] || python=
@FIND_PYTHON@
exec "$python" -I -S "$tree/lib/start.py" "$0" "$@"
