#!/bin/sh
# Near-duplicates by pixels and by features, and their share of the high-influence pairs. The threshold is larger than the
# default, because the digits have hardly any near-duplicates. Run it from the root of the repository: sh examples/studies/duplicates.sh
set -eu
memtail run examples/digits.yaml
memtail study duplicates digits --nearness 0.5
