"""What memtail does on one GPU, measured in a single run without a network: see `tests.benchmarks.gpu.__main__`."""
