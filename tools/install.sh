#!/usr/bin/env bash
# Installs requirements, at the versions and with the hashes of constraints.txt, into a virtual environment.
#
#   tools/install.sh VENV [PROJECT] <REQUIREMENTS     PROJECT is installed editable
#
# TORCH_INDEX is the URL of an index with other builds of torch, such as https://download.pytorch.org/whl/cpu. Torch, torchvision and their
# dependencies are then installed from that index alone, at the versions of constraints.txt: with two indexes, one could offer a package under
# the name of a package of the other (dependency confusion). The hashes of these builds are not checked; all other packages must match theirs.
set -euo pipefail
tools=$(cd "$(dirname "$0")" && pwd)
constraints=$tools/../constraints.txt
python=$1/bin/python
project=${2:-}
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
cat >"$requirements"

locked() { sed -n "/^$1==/,/[^\\\\]\$/p" "$constraints"; }  # the lines of a package in constraints.txt
version() { locked "$1" | sed -n '1s/ .*//p'; }

if command -v uv >/dev/null; then
  install() { uv pip install --quiet --python "$python" "$@"; }
else
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
  install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
  install --requirement <(locked pip)
fi
if [ -n "${TORCH_INDEX:-}" ] && grep -q '^torch[^a-z]' "$requirements"; then
  (
    unset PIP_FIND_LINKS UV_INDEX UV_EXTRA_INDEX_URL UV_FIND_LINKS
    # takes precedence over a configuration file, which may name more indexes
    export PIP_EXTRA_INDEX_URL=$TORCH_INDEX UV_NO_CONFIG=1
    install --index-url "$TORCH_INDEX" "$(version torch)" "$(version torchvision)"
  )
fi
install --constraint "$constraints" --requirement "$requirements"
# setuptools warns about every editable installation
[ -z "$project" ] || PYTHONWARNINGS=ignore install --no-deps --no-build-isolation --editable "$project"
