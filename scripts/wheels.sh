# Sourced after need.sh by scripts that build releases: gets the wheels for them.
# shellcheck shell=bash

venv=$PWD/.cache/venv-release
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

# project_wheel: builds the project's wheel and sets $project to its path.
project_wheel() {
  local made=.cache/wheels/project
  make_venv "$venv" requirements-build.lock
  rm -rf "$made"
  # The wheel's own rules decide which files it contains: no bytecode, and no stray files of the tree.
  "$venv/bin/python" -m pip --quiet --disable-pip-version-check wheel --no-deps --no-build-isolation --wheel-dir "$made" .
  project=$(echo "$made"/*.whl)
}

# wheels_for PLATFORM: downloads missing wheels, checks them with the lock's digests, and sets $wheels to the directory.
wheels_for() {
  local version tag stamp name
  case $1 in x86_64 | aarch64) ;; *) die "--platform: wanted x86_64 or aarch64, found $1" ;; esac
  wheels=.cache/wheels/$1
  stamp=$(sha256sum <requirements.lock)
  [ "$(cat "$wheels/stamp" 2>/dev/null)" != "$stamp" ] || return 0
  echo "downloading for $1: the packages of requirements.lock" >&2
  rm -rf "$wheels"
  for version in 3.11 3.12 3.13; do
    tag=cp${version/./}
    local options=(--implementation cp --python-version "$version" --abi "$tag" --abi abi3 --abi none)
    for name in manylinux_2_28 manylinux_2_17 manylinux2014; do options+=(--platform "${name}_$1"); done
    "$venv/bin/python" -m pip --quiet --disable-pip-version-check download --no-deps --require-hashes \
      --only-binary :all: "${options[@]}" --requirement requirements.lock --dest "$wheels"
  done
  echo "$stamp" >"$wheels/stamp"
}
