#!/bin/sh
# Takes ca-bridge away again, and leaves settings, state and whatever else is yours: `uninstall --help`.
set -eu
@FIND_PYTHON@
tree=$(PATH=/usr/bin:/bin readlink -f -- "$0")
tree=${tree%/bin/uninstall}
exec "$python" -I -S -c 'import sys; sys.path.insert(0, sys.argv.pop(1)); from release.installer import command; command.main()' \
  "$tree/libexec" uninstall "$@"
