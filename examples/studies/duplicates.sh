#!/bin/sh
# Near-duplicates among the images, by pixels and by features, and the pairs without them. The threshold is larger than the
# default, because the digits have hardly any near-duplicates. Run it from the root of the repository: sh examples/studies/duplicates.sh
set -eu
memtail run examples/digits.yaml
memtail study duplicates digits --nearness 0.5
