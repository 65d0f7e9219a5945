#!/bin/sh
# ca-bridge @VERSION@ for Linux on @PLATFORM@: the program and everything it needs except Python itself.
#
#   sh @FILE@ check              does it run on this machine? changes nothing
#   sh @FILE@ install            installs or upgrades; needs no network and no package index
#   sh @FILE@ install --enable   also starts the nightly timer
#   sh @FILE@ --help
#
# A zip archive follows these lines. Python reads it directly: nothing is unpacked into a temporary directory.
set -eu
PATH=/usr/sbin:/usr/bin:/sbin:/bin # fixed, whatever the caller's is: programs found in it run as root
export PATH
found=$(sed '1,/^exit 1$/d' "$0" | sha256sum)
if [ "${found%% *}" != @DIGEST@ ]; then
  echo "error: $0: wanted a complete and unchanged file, found another digest" >&2
  echo "hint: copy it again, and check its signature" >&2
  exit 1
fi
python=
@FIND_PYTHON@
exec "$python" -I -S "$0" "$@"
exit 1
