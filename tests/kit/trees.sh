#!/usr/bin/env bash
# Makes root file systems of bare Debians for tests of releases, with debootstrap, python3 and systemd.
#
#   tests/kit/trees.sh [SUITE...]        bookworm (12) and trixie (13)
#
# They go to $CA_BRIDGE_TREES (default /var/lib/ca-bridge-trees), once for a machine; tests use them through an overlay.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/need.sh

trees=${CA_BRIDGE_TREES:-/var/lib/ca-bridge-trees}
# No pip, venv or compiler; openssl for the tests' CA, and cron because Debian's installer installs it.
packages=python3,openssl,systemd,systemd-sysv,dbus,cron
need debootstrap=debootstrap systemd-nspawn=systemd-container tar=tar
mirror=${CA_BRIDGE_DEBIAN:-http://deb.debian.org/debian}

mkdir -p "$trees"
[ $# -gt 0 ] || set -- bookworm trixie
exec 9>"$trees/lock"
flock 9
for suite in "$@"; do
  [ "$(cat "$trees/$suite.stamp" 2>/dev/null)" != "$packages" ] || continue
  echo "making a bare Debian in $trees/$suite (2 minutes)" >&2
  rm -rf "${trees:?}/$suite" "$trees/$suite.new"
  debootstrap --variant=minbase --include="$packages" "$suite" "$trees/$suite.new" "$mirror" >"$trees/$suite.log" 2>&1 ||
    die "debootstrap: $(tail -n 3 "$trees/$suite.log")"
  rm -rf "$trees/$suite.new"/var/cache/apt/archives/*.deb
  mv "$trees/$suite.new" "$trees/$suite"
  echo "$packages" >"$trees/$suite.stamp"
done
