"""Trials with planted pairs: each test example depends on one training example, by an effect of its own."""

from dataclasses import replace

import numpy as np

from memtail.statistics import Statistics
from memtail.statistics.soft import quantized
from memtail.trials import TrialBatch
from tests.support.batches import batch_of

_N, _Q, _CLASSES = 50, 150, 2


class PlantedPairs:
    """Runs of one experiment, whose trials differ by seed: all training examples are memorized, and effects decline exponentially.

    Args:
        seed: of the trials.
        effect: mean effect on the log-odds of a test example.
    """

    size = _N, _Q
    train_labels, test_labels = (np.arange(count, dtype=np.int64) % _CLASSES for count in (_N, _Q))

    def __init__(self, seed: int, effect: float = 0.8) -> None:
        fixed = np.random.default_rng(0)
        self._effect, self._base = effect * fixed.exponential(1, _Q), fixed.normal(0, 0.7, _Q)
        self._rng = np.random.default_rng((1, seed))

    def batch(self, first: int, trials: int) -> TrialBatch:
        """Draw consecutive trials with scores."""
        members = self._rng.random((trials, _N)) < 0.7
        odds = self._base + self._rng.normal(0, 1, (trials, _Q)) + 2 * self._effect * (members[:, np.arange(_Q) % _N] - 0.5)
        correct = self._rng.random((trials, _N)) < np.where(members, 0.95, 0.4)
        scores = quantized(1 / (1 + np.exp(-odds)))
        return replace(batch_of(first, members, correct, odds > 0), train_score=np.zeros(members.shape, np.uint8), test_score=scores)

    def statistics(self, trials: int) -> Statistics:
        """Draw a run."""
        statistics = Statistics(_N, _Q)
        self.extend(statistics, trials)
        return statistics

    def extend(self, statistics: Statistics, trials: int) -> None:
        """Accumulate trials up to a number of them."""
        if trials > len(statistics.metrics):
            statistics.accumulate(self.batch(len(statistics.metrics), trials - len(statistics.metrics)))
