"""High-influence pairs: a test example and a memorized training example of its class that it owes its correct prediction to."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memtail.estimators.binomial import Floats
from memtail.estimators.influence import influence_blocks, influence_error
from memtail.estimators.memorization import Memorization
from memtail.statistics.accumulator import PackedTrials

#: The paper's thresholds.
MEM_THRESHOLD = 0.25
INFL_THRESHOLD = 0.15


@dataclass(frozen=True)
class Pairs:
    """Pairs by falling influence (ties by training, then test index).

    Attributes:
        train, test: int64 [p], indices in original order.
        influence, influence_error: float64 [p].
        mem, mem_error: float64 [p], memorization of the training example.
    """

    train: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]
    influence: Floats
    influence_error: Floats
    mem: Floats
    mem_error: Floats

    def __len__(self) -> int:
        return len(self.train)


def high_influence_pairs(
    packed: PackedTrials,
    memorization: Memorization,
    train_labels: npt.NDArray[np.int64],
    test_labels: npt.NDArray[np.int64],
    mem_threshold: float = MEM_THRESHOLD,
    infl_threshold: float = INFL_THRESHOLD,
    device: str | None = None,
) -> Pairs:
    """All pairs of one class with mem_i >= `mem_threshold` and infl_ij >= `infl_threshold` (the paper, section 3.2).

    `device` is where to compute, as in `memtail.estimators.top_influencers`; the answer is the same.
    """
    classes = candidates(memorization.value, train_labels, test_labels, mem_threshold)
    found = list(_found(packed, classes, infl_threshold) if device is None else _found_on(device, packed, classes, infl_threshold))
    train = np.concatenate([part[0] for part in found] or [np.empty(0, np.int64)])
    test = np.concatenate([part[1] for part in found] or [np.empty(0, np.int64)])
    value = np.concatenate([part[2] for part in found] or [np.empty(0)])
    error = np.concatenate([part[3] for part in found] or [np.empty(0)])
    order = np.lexsort((test, train, -value))
    train, test = train[order], test[order]
    return Pairs(train, test, value[order], error[order], memorization.value[train], memorization.error[train])


def candidates(
    mem: Floats, train_labels: npt.NDArray[np.int64], test_labels: npt.NDArray[np.int64], mem_threshold: float
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Class by class, the training examples with mem_i >= `mem_threshold`, and the test examples that they may influence."""
    memorized = mem >= mem_threshold
    return [
        (np.flatnonzero(memorized & (train_labels == label)), np.flatnonzero(test_labels == label))
        for label in np.unique(train_labels[memorized])
    ]


_Found = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats, Floats]
_Classes = list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]


def _found(packed: PackedTrials, classes: _Classes, threshold: float) -> Iterator[_Found]:
    for rows, columns in classes:
        for place, block in influence_blocks(packed, rows, columns):
            i, j = np.nonzero(block.value >= threshold)
            yield rows[place][i], columns[j], block.value[i, j], block.error_at(i, j)


def _found_on(device: str, packed: PackedTrials, classes: _Classes, threshold: float) -> Iterator[_Found]:
    from memtail.estimators.influence_torch import DeviceInfluence  # needs torch

    influences = DeviceInfluence(packed.membership, packed.k_in, packed.test_correct, packed.test_right, packed.trials, device)
    for rows, columns in classes:
        for i, j, both, value in influences.at_least(threshold, rows, columns):
            yield i, j, value, influence_error(both, packed.k_in[i], packed.test_right[j], packed.trials)
