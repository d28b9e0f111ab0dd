"""Batch order and augmentation of each trial: pure functions of (seed, trial, epoch)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memtail.randomness import Purpose, stream


@dataclass(frozen=True)
class Augmentation:
    """Transformations of the images of one epoch, one entry per position in the epoch's order.

    Attributes:
        flip: bool [S, m], mirrored left to right.
        down: int64 [S, m], shift in pixels; None where images are not shifted.
        right: as `down`.
    """

    flip: npt.NDArray[np.bool_]
    down: npt.NDArray[np.int64] | None
    right: npt.NDArray[np.int64] | None


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


def epoch_augmentation(kind: str, seed: int, trials: Sequence[int], epoch: int, m: int, reach: int) -> Augmentation | None:
    """Return the augmentation of an epoch, None if there is none.

    Args:
        kind: "none", "flip" or "crop-flip".
        seed: the experiment's seed.
        trials: the S trials of a stack.
        epoch: from 0.
        m: examples in each trial's subset.
        reach: the largest shift in pixels.
    """
    if kind == "none":
        return None
    streams = [stream(seed, Purpose.AUGMENTATION, trial, epoch) for trial in trials]
    flip = np.stack([draws.random(m) < 0.5 for draws in streams])
    if kind == "flip":
        return Augmentation(flip, None, None)
    shifts = np.stack([draws.integers(-reach, reach + 1, (2, m)) for draws in streams])
    return Augmentation(flip, shifts[:, 0], shifts[:, 1])
