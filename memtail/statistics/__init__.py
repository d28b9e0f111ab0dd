"""The sufficient statistics of all trials so far, bit-packed, and the co-occurrence counts taken from them."""

from memtail.statistics.accumulator import Statistics
from memtail.statistics.cooccurrence import cooccurrence

__all__ = ["Statistics", "cooccurrence"]
