#!/usr/bin/env bash
# Creates a virtual environment with the newest working Python >= 3.11; on Debian it installs the package python3-venv if it is missing.
# If uv is on PATH, uv creates the environment, and may download a Python.
set -euo pipefail
target=$1
[ -x "$target/bin/python" ] && exit 0
if command -v uv >/dev/null; then exec uv venv --quiet --python '>=3.11' "$target"; fi

make_with_any_python() {
  local python
  for python in python3.13 python3.12 python3.11 python3; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    rm -rf "$target"
    "$python" -m venv "$target" >/dev/null 2>&1 && return 0
  done
  return 1
}

make_with_any_python && exit 0
if command -v apt-get >/dev/null; then
  as_root=$([ "$(id -u)" = 0 ] || echo sudo)
  $as_root apt-get update -qq && $as_root apt-get install -y -qq python3-venv >/dev/null
  make_with_any_python && exit 0
fi
rm -rf "$target"
echo "make: no Python >= 3.11 with the module venv was found: install one (on Debian: apt install python3-venv)" >&2
exit 1
