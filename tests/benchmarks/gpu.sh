#!/usr/bin/env bash
# All GPU measurements, on a machine with one CUDA GPU. MEMTAIL_DATA is the folder of MNIST and CIFAR.
set -euo pipefail
cd "$(dirname "$0")/../.."
export MEMTAIL_DATA=${MEMTAIL_DATA:-$PWD/../shared/data}
make --silent .venv/installed-dev
exec .venv/bin/python -m tests.benchmarks.gpu "$@"
