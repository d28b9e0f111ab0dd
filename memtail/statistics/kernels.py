"""Compiled loops over packed words. Importing this takes a moment; only what counts pairs does."""

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

# Examples of one side that are counted against a block of the other while both stay in the cache.
_TILE = 64


@intrinsic
def _popcount(typing_context, word):  # type: ignore[no-untyped-def]
    """The population count instruction, which numba has no name for."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctpop(arguments[0])

    del typing_context
    return types.uint64(types.uint64), generate


@numba.njit(parallel=True, cache=True, boundscheck=False)
def count_pairs(left, right, out):  # type: ignore[no-untyped-def]
    tiles = (left.shape[0] + _TILE - 1) // _TILE
    for tile in numba.prange(tiles):
        for i in range(tile * _TILE, min((tile + 1) * _TILE, left.shape[0])):
            for j in range(right.shape[0]):
                total = np.uint64(0)
                for w in range(left.shape[1]):
                    total += _popcount(left[i, w] & right[j, w])  # type: ignore[call-arg]
                out[i, j] = total
