"""Random streams that depend on the experiment's seed and their purpose alone.

Every draw of trial k comes from a stream keyed by (seed, purpose, k, ...), so membership, initial weights, batch order and augmentation
do not depend on the shard, worker or machine that runs the trial.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Purpose(IntEnum):
    """Purpose of a stream, and part of its key. The numbers are fixed: changing one changes every experiment."""

    SUBSET = 0
    SUBSET_BOUNDARY = 1
    SUBSET_PERMUTATION = 2
    WEIGHTS = 3
    ORDER = 4
    AUGMENTATION = 5
    NOISE = 6
    REMOVAL = 7
    HALVES = 8
    TRAINER = 9


def stream(seed: int, purpose: Purpose, *ids: int) -> np.random.Generator:
    """Return the generator of a key; equal keys give equal draws."""
    return np.random.Generator(_bits(seed, purpose, ids))


def torch_seed(seed: int, purpose: Purpose, *ids: int) -> int:
    """Return a 63-bit seed for `torch.manual_seed`, keyed as in `stream`."""
    return int(_bits(seed, purpose, ids).random_raw() >> 1)


def random_keys(count: int, seed: int, purpose: Purpose, *ids: int) -> npt.NDArray[np.uint64]:
    """Return `count` raw words of 64 bits, keyed as in `stream`.

    numpy keeps the raw words of a bit generator in every version, but not the results of `permutation` and the like. So whatever another
    machine must reproduce is decided by sorting these words.
    """
    return np.asarray(_bits(seed, purpose, ids).random_raw(count), dtype=np.uint64)


def _bits(seed: int, purpose: Purpose, ids: tuple[int, ...]) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=(int(purpose), *ids)))
