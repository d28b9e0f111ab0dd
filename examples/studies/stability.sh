#!/bin/sh
# Agreement of two runs, and the number of trials for an overlap of 80%. The study trains nothing itself.
# Run it from the root of the repository: sh examples/studies/stability.sh
set -eu
memtail run examples/digits.yaml
memtail study stability digits --wanted 0.8
