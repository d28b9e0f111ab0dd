#!/bin/sh
# Memorization with only the last layer trained; all others are frozen.
# Run it from the root of the repository: sh examples/studies/last-layer.sh
set -eu
memtail run examples/digits.yaml
memtail study last-layer digits
