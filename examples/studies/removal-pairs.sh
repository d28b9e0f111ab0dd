#!/bin/sh
# Test accuracy after removal of the training examples of the high-influence pairs, on the pairs' test examples and on all others.
# Run it from the root of the repository: sh examples/studies/removal-pairs.sh
set -eu
memtail run examples/digits.yaml
memtail study removal digits --pairs
