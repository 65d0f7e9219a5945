#!/bin/sh
# Takes ca-bridge away again, and leaves settings, state and whatever else is yours: `uninstall --help`.
set -eu
PATH=/usr/sbin:/usr/bin:/sbin:/bin # whatever was given: what is found in it runs as root
export PATH
python=
@FIND_PYTHON@
tree=$(readlink -f -- "$0")
tree=${tree%/bin/uninstall}
exec "$python" -I -S -c 'import sys; sys.path.insert(0, sys.argv.pop(1)); from release.installer import command; command.main()' \
  "$tree/libexec" uninstall "$@"
