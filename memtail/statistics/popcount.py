"""Compiled loops over packed words. Importing this takes a moment; only what counts pairs does.

A vector unit does AND, population count and addition for eight words at a time. What limits it is moving words between the cache and
registers, so each word loaded is used for several examples of the other side.
"""

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from memtail.statistics.numba_lock import one_at_a_time

#: `count_pairs` takes rows and words in groups of these.
ROWS = 4
WORDS = 2

_COLUMNS = 256  # of the right side, times the number of words: stays in the second-level cache
_TILE = 64  # rows of the left side that one thread takes at a time
_STRIPE = 4096  # examples whose running counts stay in the first-level cache


@intrinsic
def _popcount(typing_context, word):  # type: ignore[no-untyped-def]
    """The population count instruction, which numba has no name for."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctpop(arguments[0])

    del typing_context
    return types.uint64(types.uint64), generate


@one_at_a_time
@numba.njit(parallel=True, cache=True, boundscheck=False)
def count_pairs(left, right, out):  # type: ignore[no-untyped-def]
    """out[i, j] = sum_w popcount(left[w, i] & right[w, j]), for uint64 [W, a] and [W, b]; W and a are multiples of WORDS and ROWS."""
    words, rows = left.shape
    columns = right.shape[1]
    for tile in numba.prange((rows + _TILE - 1) // _TILE):
        count0 = np.empty(_COLUMNS, np.uint64)
        count1 = np.empty(_COLUMNS, np.uint64)
        count2 = np.empty(_COLUMNS, np.uint64)
        count3 = np.empty(_COLUMNS, np.uint64)
        for start in range(0, columns, _COLUMNS):
            n = min(_COLUMNS, columns - start)
            for i in range(tile * _TILE, min((tile + 1) * _TILE, rows), ROWS):
                count0[:], count1[:], count2[:], count3[:] = 0, 0, 0, 0
                for w in range(0, words, WORDS):
                    a0, a1, a2, a3 = left[w, i], left[w, i + 1], left[w, i + 2], left[w, i + 3]
                    b0, b1, b2, b3 = left[w + 1, i], left[w + 1, i + 1], left[w + 1, i + 2], left[w + 1, i + 3]
                    right_a = right[w, start : start + n]
                    right_b = right[w + 1, start : start + n]
                    for j in range(n):
                        a, b = right_a[j], right_b[j]
                        count0[j] += _popcount(a0 & a) + _popcount(b0 & b)  # type: ignore[call-arg]
                        count1[j] += _popcount(a1 & a) + _popcount(b1 & b)
                        count2[j] += _popcount(a2 & a) + _popcount(b2 & b)
                        count3[j] += _popcount(a3 & a) + _popcount(b3 & b)
                for j in range(n):
                    out[i, start + j] = np.int32(count0[j])
                    out[i + 1, start + j] = np.int32(count1[j])
                    out[i + 2, start + j] = np.int32(count2[j])
                    out[i + 3, start + j] = np.int32(count3[j])


@one_at_a_time
@numba.njit(parallel=True, cache=True, boundscheck=False)
def count_one(one, words, out):  # type: ignore[no-untyped-def]
    """out[j] = sum_w popcount(one[w] & words[w, j]), for uint64 [W] and [W, b]: reads every word once."""
    columns = words.shape[1]
    for stripe in numba.prange((columns + _STRIPE - 1) // _STRIPE):
        start = stripe * _STRIPE
        n = min(_STRIPE, columns - start)
        count = np.zeros(n, np.uint64)
        for w in range(words.shape[0]):
            bits, row = one[w], words[w, start : start + n]
            for j in range(n):
                count[j] += _popcount(bits & row[j])  # type: ignore[call-arg]
        for j in range(n):
            out[start + j] = np.int32(count[j])
