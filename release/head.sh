#!/bin/sh
# ca-bridge @VERSION@ for Linux on @PLATFORM@: the program and all that it needs but Python itself.
#
#   sh @FILE@ check              would it run here?
#   sh @FILE@ install            also an upgrade; asks no index, needs no network
#   sh @FILE@ install --enable   the same, and the nightly timer runs
#   sh @FILE@ --help
#
# Behind these lines there is a zip archive, which Python reads as it is: nothing is unpacked into a temporary directory.
set -eu
PATH=/usr/sbin:/usr/bin:/sbin:/bin # whatever was given: what is found in it runs as root
export PATH
found=$(sed '1,/^exit 1$/d' "$0" | sha256sum)
if [ "${found%% *}" != @DIGEST@ ]; then
  echo "error: $0: wanted a whole and unchanged file, found another digest" >&2
  echo "hint: copy it again, and check its signature" >&2
  exit 1
fi
python=
@FIND_PYTHON@
exec "$python" -I -S "$0" "$@"
exit 1
