#!/bin/sh
# Removes ca-bridge, and keeps settings, state and all files that you added: `uninstall --help`.
set -eu
PATH=/usr/sbin:/usr/bin:/sbin:/bin # fixed, whatever the caller's is: programs found in it run as root
export PATH
python=
@FIND_PYTHON@
tree=$(readlink -f -- "$0")
tree=${tree%/bin/uninstall}
exec "$python" -I -S -c 'import sys; sys.path.insert(0, sys.argv.pop(1)); from release.installer import command; command.main()' \
  "$tree/libexec" uninstall "$@"
