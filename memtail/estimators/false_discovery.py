"""How many of the high-influence pairs are chance: with few trials a fixed threshold of influence picks noise.

Which trials see a training example is drawn without regard to anything else. So, without influence, those that saw i are a random
choice among all t, and the number of them that got j right is hypergeometric: its upper tail is Fisher's exact test, one-sided.
The procedure of Benjamini and Hochberg (1995) over all pairs that were looked at then bounds the share of false ones among those kept.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memtail.estimators.binomial import Floats
from memtail.estimators.influence import influence_blocks
from memtail.estimators.pairs import MEM_THRESHOLD, candidates
from memtail.statistics.accumulator import Counts, PackedTrials

#: Rates above this are not told apart: only tests below it are kept while all pairs are gone through, which bounds the memory.
LARGEST_RATE = 0.1


@dataclass(frozen=True)
class FalseDiscovery:
    """Of chosen pairs, and of all that were tested.

    Attributes:
        rate: float64 [p], the smallest false discovery rate at which each chosen pair is kept (its q-value); 1 above `LARGEST_RATE`.
        tested: the number of pairs looked at.
        kept: float64, the rates of all tested pairs at most `LARGEST_RATE`, ascending.
    """

    rate: Floats
    tested: int
    kept: Floats


def false_discovery(
    packed: PackedTrials,
    mem: Floats,
    train_labels: npt.NDArray[np.int64],
    test_labels: npt.NDArray[np.int64],
    train: npt.NDArray[np.int64],
    test: npt.NDArray[np.int64],
    mem_threshold: float = MEM_THRESHOLD,
) -> FalseDiscovery:
    """The false discovery rates of pairs, among all pairs of one class with mem_i >= `mem_threshold`.

    Args:
        packed: the statistics.
        mem: float64 [n], memorization.
        train_labels, test_labels: int64 [n] and [q].
        train, test: int64 [p], the chosen pairs, which must be among those tested.
        mem_threshold: as in `high_influence_pairs`.
    """
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, packed.trials + 1)))])
    small, tested = [np.empty(0)], 0
    for rows, columns in candidates(mem, train_labels, test_labels, mem_threshold):
        for _, block in influence_blocks(packed, rows, columns):
            tails = _tails(block.both, block.k_in[:, None], block.right, log_factorials)
            small.append(tails[tails <= LARGEST_RATE])
            tested += tails.size
    found = np.sort(np.concatenate(small))
    # the rate of a pair is the least that keeps it, and keeping it keeps all of smaller tails
    rates = np.minimum.accumulate((tested * found / np.arange(1, len(found) + 1))[::-1])[::-1]
    both = np.bitwise_count(packed.membership[:, train] & packed.test_correct[:, test]).sum(0, dtype=np.int32)
    chosen = _tails(both[:, None], packed.k_in[train][:, None], packed.test_right[test][:, None], log_factorials)[:, 0]
    places = np.searchsorted(found, chosen, side="right") - 1
    kept = int(np.searchsorted(rates, LARGEST_RATE, side="right"))
    rate = np.ones(len(train))
    np.copyto(rate, np.append(rates, 1.0)[places], where=(chosen <= LARGEST_RATE) & (places < kept))
    return FalseDiscovery(rate, tested, rates[:kept])


def _tails(both: npt.NDArray[np.int32], k_in: Counts, right: Counts, log_factorials: Floats) -> Floats:
    from memtail.estimators.fisher_exact import upper_tails  # compiles

    tails: Floats = np.empty(both.shape)
    k_in, right = (np.broadcast_to(counts, both.shape) for counts in (k_in, right))
    upper_tails(both, k_in, right, len(log_factorials) - 1, log_factorials, LARGEST_RATE, tails)
    return tails
