#!/bin/sh
# What another model, a small CNN, also memorizes of what an MLP does. Run it in the folder of memtail's README:
# sh examples/studies/architectures.sh
set -eu
memtail run examples/digits.yaml
memtail run examples/digits-cnn.yaml
memtail study architectures digits digits-cnn
