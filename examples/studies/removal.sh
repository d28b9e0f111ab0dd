#!/bin/sh
# What memorized training examples are worth: test accuracy without those of mem >= 0.1, 0.25, 0.5, 0.75 and 0.9, and without as many
# random ones. Run it in the folder of memtail's README: sh examples/studies/removal.sh
set -eu
memtail run examples/digits.yaml
memtail study removal digits
