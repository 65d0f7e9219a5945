# Sourced by the project's shell scripts: what they need of the system, installed where we may, else named.
# shellcheck shell=bash

die() { printf 'error: %s\n' "$1" >&2; [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2; exit 1; }

# install_packages PACKAGE...: Debian packages. Says so, since it changes the machine.
install_packages() {
  local apt=(apt-get -o DPkg::Lock::Timeout=300)
  command -v apt-get >/dev/null || die "wanted the Debian packages $*, found no apt-get" "install what they hold by this system's own means"
  [ "$(id -u)" = 0 ] || die "wanted the Debian packages $*, found them missing" "run: sudo apt-get install $*"
  echo "installing Debian packages: $*" >&2
  # A fresh machine has no package lists, and one that has them needs no new ones.
  DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 && return
  "${apt[@]}" update -qq
  DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y -qq --no-install-recommends "$@" >/dev/null
}

# need PROGRAM=PACKAGE...: the packages of the programs that are not in $PATH.
need() {
  local item missing=()
  for item in "$@"; do command -v "${item%%=*}" >/dev/null || missing+=("${item#*=}"); done
  [ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
}
