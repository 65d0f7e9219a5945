#!/usr/bin/env bash
# Gets OpenSSL's PKCS#11 provider for a system without a package of it, such as Debian 12: unpacks Debian 13's into
# $KUBE_BIN_DIR/ossl-modules (default /opt/k8s). apt downloads it and checks its signature; nothing is installed, and
# the system's package lists do not change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/need.sh

target=${KUBE_BIN_DIR:-/opt/k8s}/ossl-modules
[ ! -e "$target/pkcs11.so" ] || exit 0
need apt-get=apt dpkg-deb=dpkg openssl=openssl
modules=$(openssl version -m | sed 's/.*"\(.*\)"/\1/')
[ ! -e "$modules/pkcs11.so" ] || exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists,cache/archives}/partial
# shellcheck disable=SC2016 # apt's own variables
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -m 1 '/debian$' || true)
[ -n "$mirror" ] || { echo "wanted a Debian mirror among apt's sources, found none: install pkcs11-provider yourself" >&2; exit 1; }
echo "deb $mirror trixie main" >"$work/sources.list"
apt=(apt-get -qq -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
  -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root)
"${apt[@]}" update
(cd "$work" && "${apt[@]}" download pkcs11-provider)
dpkg-deb -x "$work"/pkcs11-provider_*.deb "$work/unpacked"
mkdir -p "$target"
install -m 0644 "$work"/unpacked/usr/lib/*/ossl-modules/pkcs11.so "$target/pkcs11.so.new"
mv "$target/pkcs11.so.new" "$target/pkcs11.so" # so that nothing finds a half-copied file
