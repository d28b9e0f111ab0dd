"""Passes over all influences on a device: the same values, order and ties as without one, to the bit. Needs torch.

A block is [others, training examples], so that what is looked for among training examples lies side by side in memory. Divisions are
those of IEEE doubles, as on the CPU.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtail.estimators.binomial import Floats
from memtail.statistics.accumulator import Counts, Words
from memtail.statistics.cooccurrence_torch import count_block, words_on

# Training examples and others per block: int32 counts of 128 MiB, and a few float64 arrays of twice that.
_ROWS, _OTHERS = 8192, 4096

Places = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32], Floats]


class DeviceInfluence:
    """The statistics that influences follow from, on a device.

    Args:
        membership: uint64 [W, n], packed.
        k_in: int64 [n].
        correct: uint64 [W, b], packed, of the examples that are influenced.
        right: int64 [b].
        trials: t.
        device: "cpu" or a CUDA device.
    """

    def __init__(self, membership: Words, k_in: Counts, correct: Words, right: Counts, trials: int, device: str) -> None:
        self._membership, self._correct = words_on(membership, device), words_on(correct, device)
        self._seen = torch.from_numpy(k_in).to(device).double()
        self._unseen = trials - self._seen
        self._right = torch.from_numpy(right).to(device).double()

    def top(self, k: int) -> tuple[npt.NDArray[np.int64], Floats]:
        """As `memtail.estimators.top_influencers`: int64 [b, k] and float64 [b, k]."""
        n, b = len(self._membership), len(self._correct)
        device = self._membership.device
        index = torch.full((b, k), -1, device=device)
        value = torch.full((b, k), -torch.inf, dtype=torch.float64, device=device)
        for others in _blocks(b, _OTHERS):
            for rows in _blocks(n, _ROWS):
                train, influenced = (torch.arange(block.start, block.stop, device=device) for block in (rows, others))
                _, new = self._block(train, influenced)
                values = torch.cat([value[others], torch.where(new.isnan(), -torch.inf, new)], 1)
                places = _largest(values, k)
                before = index[others].gather(1, places.clamp(max=k - 1))
                value[others] = values.gather(1, places)
                index[others] = torch.where(places < k, before, places + (rows.start - k))
        defined = value > -torch.inf
        return torch.where(defined, index, -1).cpu().numpy(), torch.where(defined, value, torch.nan).cpu().numpy()

    def at_least(self, threshold: float, train: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> Iterator[Places]:
        """The pairs among the chosen examples whose influence is at least `threshold`, block by block.

        Yields:
            int64 [p] training indices, int64 [p] others, int32 [p] trials that saw the first and got the second right, and
            float64 [p] influences.
        """
        device = self._membership.device
        chosen, influenced = torch.from_numpy(train).to(device), torch.from_numpy(others).to(device)
        for columns in torch.split(influenced, _OTHERS):
            for rows in torch.split(chosen, _ROWS):
                both, value = self._block(rows, columns)
                j, i = (value >= threshold).nonzero(as_tuple=True)
                yield rows[i].cpu().numpy(), columns[j].cpu().numpy(), both[j, i].cpu().numpy(), value[j, i].cpu().numpy()

    def _block(self, train: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """int32 counts and float64 influences, [others, training examples]; NaN where one was never in or never out."""
        both = count_block(self._correct[others], self._membership[train])
        inside = both.double()
        # 0 / 0 where there is no estimate: nobody saw the example, so nobody saw it and was right
        outside = (self._right[others, None] - inside).div_(self._unseen[train])
        return both, inside.div_(self._seen[train]).sub_(outside)


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _largest(values: Tensor, k: int) -> Tensor:
    """int64 [a, k]: the places of the k largest of each row of [a, b], falling, ties by place; b is at least k.

    `topk` leaves open which of equal values it takes, so its last value is only the bar: places above it come first, then those
    on it, each in order, by keys that are all different.
    """
    bar = values.topk(k).values[:, -1:]
    count = values.shape[1]
    order = torch.arange(count, 0, -1, dtype=torch.int32, device=values.device)
    keys = (values > bar).to(torch.int32).add_(values >= bar).mul_(count).add_(order)
    places = keys.topk(k).indices
    falling = values.gather(1, places).sort(dim=1, descending=True, stable=True).indices
    return places.gather(1, falling)
