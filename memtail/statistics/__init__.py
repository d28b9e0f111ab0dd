"""Sufficient statistics of all counted trials, bit-packed, and co-occurrence counts of their bits."""

from memtail.statistics.accumulator import Statistics
from memtail.statistics.cooccurrence import cooccurrence

__all__ = ["Statistics", "cooccurrence"]
