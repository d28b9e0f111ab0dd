"""Order in which concurrent embedded runs train shards."""

import heapq
import random

from memtail.execution.embedded import _in_own_order
from memtail.trials import Shard

SHARDS = [Shard(first, first) for first in range(250)]


def test_concurrent_runs_rarely_train_the_same_shard():
    """Simulates eight runs that begin within a shard's time, skip what is committed, and take 0.9 to 1.1 for a shard."""
    rng = random.Random(0)
    orders, committed, training, trained = [_in_own_order(SHARDS) for _ in range(8)], set(), {}, 0
    assert all(sorted(order, key=lambda shard: shard.first) == SHARDS for order in orders)
    events = [(rng.random(), run) for run in range(8)]
    while events:
        now, run = heapq.heappop(events)
        committed.add(training.pop(run, None))
        orders[run] = [shard for shard in orders[run] if shard not in committed]
        if orders[run]:
            training[run], *orders[run] = orders[run]
            trained += 1
            heapq.heappush(events, (now + rng.uniform(0.9, 1.1), run))
    assert committed >= set(SHARDS)
    assert trained < 1.4 * len(SHARDS)  # 1.14 on average; 2.7 if the runs go on in a common order from different starts
