"""Random streams that depend on the experiment's seed and on what they are for, and on nothing else.

Every draw of trial k comes from a stream keyed by (seed, purpose, k, ...), so that membership, initial weights, batch order and
augmentation are the same whichever shard, worker or machine the trial runs on.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Purpose(IntEnum):
    """What a stream is for; part of its key. The numbers are fixed: changing one changes every experiment."""

    SUBSET = 0
    SUBSET_BOUNDARY = 1
    SUBSET_DECK = 2
    WEIGHTS = 3
    ORDER = 4
    AUGMENTATION = 5
    NOISE = 6
    REMOVAL = 7
    HALVES = 8


def stream(seed: int, purpose: Purpose, *ids: int) -> np.random.Generator:
    """A generator keyed by (seed, purpose, ids); equal keys give equal draws."""
    return np.random.Generator(_bits(seed, purpose, ids))


def torch_seed(seed: int, purpose: Purpose, *ids: int) -> int:
    """A 63-bit seed for `torch.manual_seed`, keyed as in `stream`."""
    return int(_bits(seed, purpose, ids).random_raw() >> 1)


def random_keys(count: int, seed: int, purpose: Purpose, *ids: int) -> npt.NDArray[np.uint64]:
    """`count` raw 64-bit words, keyed as in `stream`.

    Raw words of a bit generator stay the same in every numpy version, which numpy does not promise of `permutation` and the
    like; whatever another machine must be able to recompute is therefore decided by sorting these.
    """
    return np.asarray(_bits(seed, purpose, ids).random_raw(count), dtype=np.uint64)


def _bits(seed: int, purpose: Purpose, ids: tuple[int, ...]) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=(int(purpose), *ids)))
