"""Passes over all influences on a device, with values, order and ties equal to those without one, to the bit. Needs torch.

A block is [others, training examples], so that a search among training examples reads contiguous memory. Divisions are those of IEEE
doubles, as on the CPU.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtail.estimators.binomial import Floats
from memtail.statistics.accumulator import Counts, Words
from memtail.statistics.cooccurrence_torch import count_block, words_on

# Training examples and others per block: int32 counts of 128 MiB, and a few float64 arrays of 256 MiB.
_ROWS, _OTHERS = 8192, 4096

_Part = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32], Floats]


class DeviceInfluence:
    """The statistics behind influences, on a device.

    Args:
        membership: uint64 [W, n], packed.
        k_in: int64 [n], trials trained with each training example.
        bits: uint64 [W, b], packed correctness on the influenced examples.
        correct: int64 [b], trials that classify each of these correctly.
        trials: t.
        device: "cpu" or a CUDA device.
    """

    def __init__(self, membership: Words, k_in: Counts, bits: Words, correct: Counts, trials: int, device: str) -> None:
        self._membership, self._bits = words_on(membership, device), words_on(bits, device)
        self._k_in = torch.from_numpy(k_in).to(device).double()
        self._k_out = trials - self._k_in
        self._correct = torch.from_numpy(correct).to(device).double()

    def top(self, k: int) -> tuple[npt.NDArray[np.int64], Floats]:
        """Return int64 [b, k] indices and float64 [b, k] influences, as `memtail.estimators.top_influencers`."""
        n, b = len(self._membership), len(self._bits)
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

    def at_least(self, threshold: float, train: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> Iterator[_Part]:
        """Find the pairs with an influence of at least `threshold`, block by block.

        Args:
            threshold: of influence.
            train: int64 [a], training indices to search.
            others: int64 [b], indices of influenced examples to search.

        Yields:
            int64 [p] training indices, int64 [p] indices of the others, int32 [p] trials trained with the first that classify the second
            correctly, and float64 [p] influences.
        """
        device = self._membership.device
        training, influenced = torch.from_numpy(train).to(device), torch.from_numpy(others).to(device)
        for columns in torch.split(influenced, _OTHERS):
            for rows in torch.split(training, _ROWS):
                both, value = self._block(rows, columns)
                j, i = (value >= threshold).nonzero(as_tuple=True)
                yield rows[i].cpu().numpy(), columns[j].cpu().numpy(), both[j, i].cpu().numpy(), value[j, i].cpu().numpy()

    def _block(self, train: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """int32 counts and float64 influences, [others, training examples]; NaN for an example in every subset or in none."""
        both = count_block(self._bits[others], self._membership[train])
        inside = both.double()
        # 0 / 0 = NaN for an example in no subset or in every one
        outside = (self._correct[others, None] - inside).div_(self._k_out[train])
        return both, inside.div_(self._k_in[train]).sub_(outside)


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _largest(values: Tensor, k: int) -> Tensor:
    """int64 [a, k]: the places of the k largest values of each row of [a, b], falling, ties by place; b is at least k.

    `topk` does not specify its choice among equal values, so only its last value is used, as a bound: places above the bound come first,
    then those on it, each in order, by distinct keys.
    """
    bound = values.topk(k).values[:, -1:]
    count = values.shape[1]
    order = torch.arange(count, 0, -1, dtype=torch.int32, device=values.device)
    keys = (values > bound).to(torch.int32).add_(values >= bound).mul_(count).add_(order)
    places = keys.topk(k).indices
    falling = values.gather(1, places).sort(dim=1, descending=True, stable=True).indices
    return places.gather(1, falling)
