#!/bin/sh
# Test accuracy after removal of the training examples with mem >= 0.1, 0.25, 0.5, 0.75 and 0.9, and of equally many random ones.
# Run it from the root of the repository: sh examples/studies/removal.sh
set -eu
memtail run examples/digits.yaml
memtail study removal digits
