"""Batches of each trial: their order and augmentation are a pure function of (seed, trial, epoch)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtail.randomness import Purpose, stream
from memtail.spec import AugmentationSpec
from memtail.trainers.images.augmentations import epoch_augmentation
from memtail.trainers.images.prefetch import ToDevice


@dataclass(frozen=True)
class Epoch:
    """What is drawn for an epoch of S trials.

    Attributes:
        order: int64 [S, m], the order in which each trial sees its subset, in host memory.
        index: the same, on the device.
        augmentations: names of the steps of the augmentation.
        draws: of each of these steps, tensors [S, m, ...] on the device.
    """

    order: Tensor
    index: Tensor
    augmentations: tuple[str, ...] = ()
    draws: tuple[dict[str, Tensor], ...] = ()


def draw_epoch(
    augmentation: Sequence[AugmentationSpec],
    seed: int,
    trials: Sequence[int],
    epoch: int,
    subsets: npt.NDArray[np.int64],
    size: Sequence[int],
    to_device: ToDevice,
) -> Epoch:
    """Draw an epoch; `size` is the images' height and width, the other arguments are as of `epoch_order` and `epoch_augmentation`."""
    order = torch.from_numpy(epoch_order(seed, trials, epoch, subsets))
    drawn = epoch_augmentation(augmentation, seed, trials, epoch, order.shape[1], size)
    if drawn is None:
        return Epoch(order, to_device(order))
    draws = tuple({name: to_device(torch.from_numpy(array)) for name, array in step.items()} for step in drawn.draws)
    return Epoch(order, to_device(order), drawn.names, draws)


def epoch_order(seed: int, trials: Sequence[int], epoch: int, subsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the order in which each trial sees its subset in an epoch.

    Args:
        seed: the experiment's seed.
        trials: the S trials of a stack.
        epoch: from 0.
        subsets: int64 [S, m], each trial's examples.

    Returns:
        int64 [S, m]: a permutation of each row.
    """
    return np.stack([stream(seed, Purpose.ORDER, trial, epoch).permutation(subset) for trial, subset in zip(trials, subsets, strict=True)])


def batch_bounds(m: int, batch_size: int) -> list[tuple[int, int]]:
    """Return start and stop of each batch of an epoch of m examples.

    The last batch may be smaller. A single left-over example joins the batch before, since it has no batch statistics.
    """
    starts = list(range(0, m, batch_size))
    if batch_size > 1 and len(starts) > 1 and m - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], m], strict=True))
