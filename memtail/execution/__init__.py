"""Execution of an experiment: declare it, train its shards, aggregate its trials, or run all of this on one machine."""
