#!/usr/bin/env bash
# Everything that is measured on a GPU, in one go, on a machine with one CUDA GPU. MEMTAIL_DATA is where MNIST and CIFAR lie.
set -euo pipefail
cd "$(dirname "$0")/../.."
export MEMTAIL_DATA=${MEMTAIL_DATA:-$PWD/../shared/data}
make --silent .venv/installed-dev
exec .venv/bin/python -m tests.benchmarks.gpu "$@"
