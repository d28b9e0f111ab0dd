"""From an experiment to its scores: declaring, doing shards, aggregating, and running all of it on this machine."""
