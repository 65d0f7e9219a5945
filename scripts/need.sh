# Sourced by the project's shell scripts: installs what they need from the system if it may, otherwise names it.
# shellcheck shell=bash

die() { printf 'error: %s\n' "$1" >&2; [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2; exit 1; }

# install_packages PACKAGE...: installs Debian packages, and says so, because that changes the machine.
install_packages() {
  local apt=(apt-get -o DPkg::Lock::Timeout=300)
  command -v apt-get >/dev/null || die "wanted the Debian packages $*, found no apt-get" "install their programs with this system's package manager"
  [ "$(id -u)" = 0 ] || die "wanted the Debian packages $*, found them missing" "run: sudo apt-get install $*"
  echo "installing Debian packages: $*" >&2
  # Update the package lists only if this fails: a fresh machine has none, and other machines need no newer ones.
  DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 && return
  "${apt[@]}" update -qq
  DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y -qq --no-install-recommends "$@" >/dev/null
}

# need PROGRAM=PACKAGE...: installs the packages of the programs that are not in $PATH.
need() {
  local item missing=()
  for item in "$@"; do command -v "${item%%=*}" >/dev/null || missing+=("${item#*=}"); done
  [ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
}

# find_python: prints the path of a Python 3.11 or newer that can make virtual environments.
find_python() {
  local name found=
  for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$(command -v "$name"); break; fi
  done
  if [ -z "$found" ]; then
    command -v python3 >/dev/null && die "wanted Python 3.11 or newer, found $(python3 --version)" "install one and name it: PYTHON=/path/to/python3.11 $0"
    install_packages python3 python3-venv
    found=$(command -v python3)
  fi
  if ! "$found" -c 'import ensurepip, venv' 2>/dev/null; then
    # Debian and Ubuntu have them in a separate package for each Python.
    install_packages "${found##*/}-venv"
  fi
  echo "$found"
}

# make_venv DIR LOCK...: makes a virtual environment with exactly the packages of the lock files, again when they change.
make_venv() {
  local directory=$1 python stamp; shift
  python=$(find_python)
  stamp="$directory $("$python" --version) $(cat "$@" | sha256sum)"
  [ "$(cat "$directory/stamp" 2>/dev/null)" != "$stamp" ] || return 0
  echo "installing into ${directory#"$PWD/"}: the Python packages of $*" >&2
  rm -rf "$directory"
  "$python" -m venv "$directory"
  "$directory/bin/python" -m pip --quiet --disable-pip-version-check install --require-hashes --no-deps "${@/#/--requirement=}"
  echo "$stamp" >"$directory/stamp"
}

# install_project VENV: installs this project's wheel, as users get it, in place of an earlier one.
install_project() {
  local pip=("$1/bin/python" -m pip --quiet --disable-pip-version-check)
  rm -rf "$1/wheel"
  "${pip[@]}" wheel --no-deps --no-build-isolation --wheel-dir "$1/wheel" .
  "${pip[@]}" install --no-deps --force-reinstall "$1"/wheel/*.whl
}

# progress TOTAL: reads pip's output and shows its progress: on one line of a terminal, otherwise a line for every fifth
# package.
progress() {
  local total=$1 line count=0
  while read -r line; do
    case $line in
      Collecting\ *) count=$((count + 1)); line=${line#Collecting }; line=${line%% *} ;;
      Installing\ *) line="unpacking them" ;;
      *) continue ;;
    esac
    if [ -t 2 ] && [ "${TERM:-dumb}" != dumb ]; then
      printf '\r\033[K  %d of %d: %s' "$count" "$total" "${line%%==*}" >&2
    elif [ $((count % 5)) = 0 ] || [ "$count" = "$total" ]; then
      printf '  %d of %d: %s\n' "$count" "$total" "${line%%==*}" >&2
    fi
  done
  if [ -t 2 ] && [ "${TERM:-dumb}" != dumb ]; then printf '\r\033[K' >&2; fi
}

# pip_of PYTHON: prints the path of the pip that its venv module copies into environments; nothing if there is none.
pip_of() {
  "$1" -c '
import ensurepip, pathlib
places = [pathlib.Path(ensurepip.__file__).parent / "_bundled", pathlib.Path("/usr/share/python-wheels")]
print(next((wheel / "pip" for place in places for wheel in sorted(place.glob("pip-*.whl"))), ""))'
}

# make_lean_venv DIR LOCK...: installs the project and the lock files' packages for this platform into an environment
# without pip and without compiled bytecode, and shows each step; again when the lock files or the project change.
make_lean_venv() {
  local directory=$1 python pip stamp total begin=$SECONDS; shift
  python=$(find_python)
  stamp="$directory $("$python" --version) $(cat "$@" pyproject.toml | sha256sum) $(find bridge backends config -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 cat | sha256sum)"
  [ "$(cat "$directory/stamp" 2>/dev/null)" != "$stamp" ] || return 0
  pip=$(pip_of "$python")
  rm -rf "$directory"
  echo "first run: everything goes into ${directory#"$PWD/"}, nothing else is touched" >&2
  echo "1/3 an environment with $("$python" --version)" >&2
  if [ -n "$pip" ]; then "$python" -m venv --without-pip "$directory"; else "$python" -m venv "$directory"; pip="-m pip"; fi
  local run=("$directory/bin/python" ${pip:+$pip} --disable-pip-version-check)
  total=$(cat "$@" | grep -c '^[A-Za-z0-9._-]*==[^;]*$\|^[A-Za-z0-9._-]*==.*PyPy')
  echo "2/3 $total Python packages, each checked by its hash" >&2
  "${run[@]}" install --no-compile --progress-bar off --require-hashes --no-deps "${@/#/--requirement=}" | progress "$total"
  echo "3/3 ca-bridge itself" >&2
  "${run[@]}" --quiet install --no-compile --no-deps --no-build-isolation .
  echo "$stamp" >"$directory/stamp"
  echo "ready after $((SECONDS - begin)) s" >&2
}
