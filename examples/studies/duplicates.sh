#!/bin/sh
# Whether pairs are more than copies: near-duplicates among the images, by pixels and by features, and what the pairs are without them.
# Near is less near than by default, since these digits have hardly any. Run it in the folder of memtail's README:
# sh examples/studies/duplicates.sh
set -eu
memtail run examples/digits.yaml
memtail study duplicates digits --nearness 0.5
