"""Compiled loops that count co-occurrences in packed words by AND and population count.

A vector unit does AND, population count and addition for eight words at a time. The limit is moving words between cache and registers, so
each loaded word is used for several examples of the other side. Importing numba and loading compiled code takes a moment, so callers
import this module inside the functions that need it.
"""

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from memtail.statistics.numba_lock import with_numba_lock

#: `count_pairs` takes rows and words in groups of these sizes.
ROWS = 4
WORDS = 2

_COLUMNS = 256  # columns of the right side at a time: their words stay in the second-level cache
_TILE = 64  # rows of the left side in one task
_STRIPE = 4096  # columns in one task of `count_one`: their running counts stay in the first-level cache


@intrinsic
def _popcount(typing_context, word):  # type: ignore[no-untyped-def]
    """Population count of a uint64, as one instruction; numba does not expose it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctpop(arguments[0])

    del typing_context
    return types.uint64(types.uint64), generate


@with_numba_lock
@numba.njit(parallel=True, cache=True, boundscheck=False)
def count_pairs(left, right, out):  # type: ignore[no-untyped-def]
    """Set int32 out[i, j] = sum_w popcount(left[w, i] & right[w, j]), for uint64 [W, a] and [W, b].

    W is a multiple of WORDS, and a one of ROWS.
    """
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


@with_numba_lock
@numba.njit(parallel=True, cache=True, boundscheck=False)
def count_one(one, words, out):  # type: ignore[no-untyped-def]
    """Set int32 out[j] = sum_w popcount(one[w] & words[w, j]), for uint64 [W] and [W, b]; reads every word once."""
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
