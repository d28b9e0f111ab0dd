"""The deployed processes: a dispatcher, workers and an aggregator, which walk the same road as an embedded run on many machines.

They hold no science: what they do to trials is done by `memtail`. The bucket is the only memory; the broker (Redis) may be emptied or
replaced at any moment.
"""
