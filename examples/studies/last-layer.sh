#!/bin/sh
# Where memorization happens: what is left of it if all layers but the last are frozen. Run it in the folder of memtail's README:
# sh examples/studies/last-layer.sh
set -eu
memtail run examples/digits.yaml
memtail study last-layer digits
