"""High-influence pairs: a memorized training example, and a test example of its class whose correct prediction depends on it.

Without labels all labels are equal, so that pairs are not restricted to a class.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memtail.estimators.binomial import Floats
from memtail.estimators.influence import influence_blocks, influence_standard_error
from memtail.estimators.memorization import Memorization
from memtail.estimators.soft import soft_influence_blocks
from memtail.statistics.accumulator import PackedTrials

#: The paper's thresholds.
MEM_THRESHOLD = 0.25
INFL_THRESHOLD = 0.15

Indices = npt.NDArray[np.int64]
# Training indices, test indices, influences and their standard errors of some pairs.
_Part = tuple[Indices, Indices, Floats, Floats]


@dataclass(frozen=True)
class Pairs:
    """Pairs by falling influence; ties by training index, then by test index.

    Attributes:
        train, test: int64 [p], indices in original order.
        influence, influence_se: float64 [p], influence and its standard error.
        mem, mem_se: float64 [p], memorization of the training example and its standard error.
    """

    train: Indices
    test: Indices
    influence: Floats
    influence_se: Floats
    mem: Floats
    mem_se: Floats

    def __len__(self) -> int:
        return len(self.train)


def high_influence_pairs(
    packed: PackedTrials,
    memorization: Memorization,
    train_labels: Indices,
    test_labels: Indices,
    mem_threshold: float = MEM_THRESHOLD,
    infl_threshold: float = INFL_THRESHOLD,
    device: str | None = None,
) -> Pairs:
    """Find all pairs of one class with mem_i >= `mem_threshold` and infl_ij >= `infl_threshold` (the paper, section 3.2).

    Where only scores are recorded, mem_p and infl_p take the places of mem and infl.

    Args:
        packed: the statistics.
        memorization: estimated from them.
        train_labels: int64 [n].
        test_labels: int64 [q].
        mem_threshold: of memorization.
        infl_threshold: of influence.
        device: as in `memtail.estimators.top_influencers`; influence on scores is computed on the processor.
    """
    classes = candidates(memorization.value, train_labels, test_labels, mem_threshold)
    on_processor = device is None or packed.scores_only
    parts = list(_find(packed, classes, infl_threshold) if on_processor else _find_on(str(device), packed, classes, infl_threshold))
    train = np.concatenate([part[0] for part in parts] or [np.empty(0, np.int64)])
    test = np.concatenate([part[1] for part in parts] or [np.empty(0, np.int64)])
    value = np.concatenate([part[2] for part in parts] or [np.empty(0)])
    se = np.concatenate([part[3] for part in parts] or [np.empty(0)])
    order = np.lexsort((test, train, -value))
    train, test = train[order], test[order]
    return Pairs(train, test, value[order], se[order], memorization.value[train], memorization.standard_error[train])


def candidates(mem: Floats, train_labels: Indices, test_labels: Indices, mem_threshold: float) -> list[tuple[Indices, Indices]]:
    """List, for each class with both, the training examples with mem_i >= `mem_threshold`, and the class's test examples.

    Args:
        mem: float64 [n], memorization.
        train_labels: int64 [n].
        test_labels: int64 [q].
        mem_threshold: of memorization.

    Returns:
        Training and test indices, ascending, by class.
    """
    memorized = mem >= mem_threshold
    return [
        (np.flatnonzero(memorized & (train_labels == label)), np.flatnonzero(test_labels == label))
        for label in np.intersect1d(train_labels[memorized], test_labels)
    ]


def _find(packed: PackedTrials, classes: list[tuple[Indices, Indices]], threshold: float) -> Iterator[_Part]:
    for rows, columns in classes:
        blocks = soft_influence_blocks(packed, rows, columns) if packed.scores_only else influence_blocks(packed, rows, columns)
        for place, block in blocks:
            i, j = np.nonzero(block.value >= threshold)
            yield rows[place][i], columns[j], block.value[i, j], block.standard_error_at(i, j)


def _find_on(device: str, packed: PackedTrials, classes: list[tuple[Indices, Indices]], threshold: float) -> Iterator[_Part]:
    from memtail.estimators.influence_torch import DeviceInfluence  # needs torch

    influences = DeviceInfluence(packed.membership, packed.k_in, packed.correctness("test"), packed.correct_on_test, packed.trials, device)
    for rows, columns in classes:
        for i, j, both, value in influences.at_least(threshold, rows, columns):
            yield i, j, value, influence_standard_error(both, packed.k_in[i], packed.correct_on_test[j], packed.trials)
