#!/bin/sh
# What one training image is worth to the test image that leans on it: test accuracy without the training side of the high-influence
# pairs, on the pairs' test images and on the rest. Run it in the folder of memtail's README: sh examples/studies/removal-pairs.sh
set -eu
memtail run examples/digits.yaml
memtail study removal digits --pairs
