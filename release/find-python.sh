# By name, since running each for its version would take as long as the program's own start. /usr/bin comes first, with all
# versions: /usr/local/bin may get another Python at any time.
for directory in /usr/bin /usr/local/bin; do
  for version in @PYTHONS@; do
    [ -n "$python" ] || [ ! -x "$directory/python$version" ] || python=$directory/python$version
  done
done
if [ -z "$python" ]; then
  found=none; for one in /usr/bin/python3 /usr/local/bin/python3; do [ ! -x "$one" ] || found="$one ($("$one" -V 2>&1 || :))"; done
  echo "error: wanted one of Python @PYTHONS@ in /usr/bin or /usr/local/bin, found: $found" >&2
  echo "hint: install one from your system's own packages: python3 (Debian 12 and 13, Ubuntu 24.04), python3.11 (RHEL 8 and 9)" >&2
  exit 1
fi
