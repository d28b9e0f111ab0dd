"""False discovery rates of high-influence pairs: with few trials, most pairs above a fixed threshold are there by chance.

The subsets do not depend on correctness. So without influence, the trials trained with i are a random choice among all t, and the number of
them that classify j correctly is hypergeometric; its upper tail is Fisher's exact test, one-sided. The procedure of Benjamini and Hochberg
(1995) over all tested pairs then bounds the share of false ones among the kept.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memtail.estimators.binomial import Floats
from memtail.estimators.influence import correct_in_at, influence_blocks
from memtail.estimators.pairs import MEM_THRESHOLD, Indices, candidates
from memtail.statistics.accumulator import Counts, PackedTrials

#: The largest rate that is computed: only tests below it are kept in a pass over all pairs, which bounds the memory.
LARGEST_RATE = 0.1


@dataclass(frozen=True)
class FalseDiscovery:
    """False discovery rates of selected pairs, and of all tested ones.

    Attributes:
        rate: float64 [p], the smallest false discovery rate that keeps each selected pair (its q-value); 1 above `LARGEST_RATE`.
        tested: the number of pairs tested.
        kept: float64, the rates of all tested pairs up to `LARGEST_RATE`, ascending.
    """

    rate: Floats
    tested: int
    kept: Floats


def false_discovery(
    packed: PackedTrials,
    mem: Floats,
    train_labels: Indices,
    test_labels: Indices,
    train: Indices,
    test: Indices,
    mem_threshold: float = MEM_THRESHOLD,
) -> FalseDiscovery:
    """Compute false discovery rates of pairs, among all pairs of one class with mem_i >= `mem_threshold`.

    Args:
        packed: the statistics.
        mem: float64 [n], memorization.
        train_labels: int64 [n].
        test_labels: int64 [q].
        train: int64 [p], training indices of the selected pairs, which are among those tested.
        test: int64 [p], their test indices.
        mem_threshold: as in `high_influence_pairs`.
    """
    log_factorials = _log_factorials(packed.trials)
    small, tested = [np.empty(0)], 0
    for rows, columns in candidates(mem, train_labels, test_labels, mem_threshold):
        for _, block in influence_blocks(packed, rows, columns):
            tails = _tails(block.both, block.k_in[:, None], block.correct, log_factorials)
            small.append(tails[tails <= LARGEST_RATE])
            tested += tails.size
    both = correct_in_at(packed, train, test)
    selected = _tails(both[:, None], packed.k_in[train][:, None], packed.correct_on_test[test][:, None], log_factorials)[:, 0]
    rate, kept = discovery_rates(np.concatenate(small), tested, selected)
    return FalseDiscovery(rate, tested, kept)


def discovery_rates(small: Floats, tested: int, tails: Floats) -> tuple[Floats, Floats]:
    """Compute false discovery rates from the tail probabilities of tests, by Benjamini and Hochberg.

    Args:
        small: float64, the tail probabilities up to `LARGEST_RATE` of all tests.
        tested: the number of tests.
        tails: float64 [p], of selected ones among them.

    Returns:
        float64 [p], the rate of each selected test, 1 above `LARGEST_RATE`; and the rates of all tests up to it, ascending.
    """
    ascending = np.sort(small)
    # the rate of a test is the smallest one that keeps it, and with it all tests of smaller tails
    rates = np.minimum.accumulate((tested * ascending / np.arange(1, len(ascending) + 1))[::-1])[::-1]
    places = np.searchsorted(ascending, tails, side="right") - 1
    kept = int(np.searchsorted(rates, LARGEST_RATE, side="right"))
    rate = np.ones(len(tails))
    np.copyto(rate, np.append(rates, 1.0)[places], where=(tails <= LARGEST_RATE) & (places < kept))
    return rate, rates[:kept]


def mid_p(packed: PackedTrials, train: Indices, test: Indices) -> Floats:
    """Test p pairs alone: Fisher's exact test, one-sided, where half of the probability of what was observed counts.

    Args:
        packed: the statistics.
        train: int64 [p], training indices.
        test: int64 [p], test indices.

    Returns:
        float64 [p], P(X > x) + P(X = x) / 2; at least 1/2 where P(X >= x) is above `LARGEST_RATE`.
    """
    log_factorials = _log_factorials(packed.trials)
    both = correct_in_at(packed, train, test)[:, None]
    k_in, correct = packed.k_in[train][:, None], packed.correct_on_test[test][:, None]
    most = np.minimum(k_in, correct)
    at_least, above = (_tails(np.minimum(count, most), k_in, correct, log_factorials) for count in (both, both + 1))
    tails: Floats = ((at_least + np.where(both < most, above, 0)) / 2)[:, 0]
    return tails


def _log_factorials(trials: int) -> Floats:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])


def _tails(both: npt.NDArray[np.int32], k_in: Counts, correct: Counts, log_factorials: Floats) -> Floats:
    """float64 [a, b], the upper tails of counts, all of which broadcast to [a, b]; 1 above `LARGEST_RATE`."""
    from memtail.estimators.fisher_exact import upper_tails  # compiles

    tails: Floats = np.empty(both.shape)
    k_in, correct = (np.broadcast_to(counts, both.shape) for counts in (k_in, correct))
    upper_tails(both, k_in, correct, len(log_factorials) - 1, log_factorials, LARGEST_RATE, tails)
    return tails
