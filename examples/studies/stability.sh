#!/bin/sh
# What another run of so many trials would find again, and how many trials it takes for an overlap of 80%: nothing is trained but the
# experiment. Run it in the folder of memtail's README: sh examples/studies/stability.sh
set -eu
memtail run examples/digits.yaml
memtail study stability digits --wanted 0.8
