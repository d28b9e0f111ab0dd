"""Deployed processes: a dispatcher, workers and an aggregator, which distribute an embedded run over many machines.

Training, aggregation and estimation are implemented in `memtail`; the services only call it. All state is in the bucket, so the broker
(Redis) may be flushed or replaced at any time.
"""
