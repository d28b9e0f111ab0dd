#!/bin/sh
# Agreement of the memorization scores of two models: an MLP and a small CNN.
# Run it from the root of the repository: sh examples/studies/architectures.sh
set -eu
memtail run examples/digits.yaml
memtail run examples/digits-cnn.yaml
memtail study architectures digits digits-cnn
