#!/usr/bin/env bash
# Runs the tests in a separate environment, .venv-PYTHON-VERSIONS.
#
#   tools/test-with.sh PYTHON locked|lowest [PYTEST ARGUMENTS...]
#
# locked: the versions of constraints.txt. lowest: the oldest versions of direct requirements that pyproject.toml allows, and the newest
# development tools. uv finds the Python, or downloads it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 versions=$2
shift 2
venv=.venv-$python-$versions
uv=$(command -v uv || echo "$PWD/.venv/bin/uv")
requirements() { .venv/bin/python tools/requirements.py "$@"; }

[ -x "$venv/bin/python" ] || "$uv" venv --quiet --python "$python" "$venv"
if [ "$versions" = lowest ]; then
  requirements base services train hf | "$uv" pip compile --quiet --resolution lowest-direct --python "$venv/bin/python" --output-file "$venv/lowest.txt" -
  requirements build dev | "$uv" pip install --quiet --python "$venv/bin/python" --requirement "$venv/lowest.txt" --requirement -
  "$uv" pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation --editable .
  # old versions use what newer ones of their own requirements deprecate, and minio's finalizer fails where its constructor raised
  set -- -W ignore::DeprecationWarning -W ignore::pytest.PytestUnraisableExceptionWarning "$@"
else
  requirements build base services train hf dev | PATH=$(dirname "$uv"):$PATH tools/install.sh "$venv" .
fi
"$venv/bin/python" -m pytest "$@"
