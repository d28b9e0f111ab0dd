"""Compiled loops over blocks of influences: their values, and the largest of every column.

Importing numba and loading compiled code takes a moment, so callers import this module inside the functions that need it.
"""

import numba
import numpy as np

from memtail.statistics.numba_lock import with_numba_lock

_STRIPE = 4096  # columns in one task: its row of values stays in the first-level cache
_COLUMNS = 256  # columns in one task of `keep_largest`: their bounds stay in the first-level cache


@with_numba_lock
@numba.njit(parallel=True, cache=True, boundscheck=False, error_model="numpy")
def influence_values(both, k_in, correct, trials, out):  # type: ignore[no-untyped-def]
    """Set out[i, j] = both[i, j] / k_in[i] - (correct[j] - both[i, j]) / (trials - k_in[i]); NaN where a divisor is 0.

    Arrays are those of `Influence`, and `out` is float64 [a, b].
    """
    rows, columns = both.shape
    stripes = (columns + _STRIPE - 1) // _STRIPE
    for task in numba.prange(rows * stripes):
        i, stripe = task // stripes, task % stripes
        inside, outside = np.float64(k_in[i]), np.float64(trials - k_in[i])
        for j in range(stripe * _STRIPE, min((stripe + 1) * _STRIPE, columns)):
            out[i, j] = both[i, j] / inside - (correct[j] - both[i, j]) / outside
        if inside == 0 or outside == 0:
            out[i, stripe * _STRIPE : min((stripe + 1) * _STRIPE, columns)] = np.nan


@with_numba_lock
@numba.njit(parallel=True, cache=True, boundscheck=False, error_model="numpy")
def influence_column(both, k_in, correct, trials, out):  # type: ignore[no-untyped-def]
    """Set float64 out[i] to the influence on one example, from both[i], k_in[i] and the scalar `correct`: see `influence_values`."""
    for i in numba.prange(len(both)):
        inside, outside = np.float64(k_in[i]), np.float64(trials - k_in[i])
        value = both[i] / inside - (correct - both[i]) / outside
        out[i] = np.nan if inside == 0 or outside == 0 else value


@with_numba_lock
@numba.njit(parallel=True, cache=True, boundscheck=False)
def keep_largest(values, first, index, value):  # type: ignore[no-untyped-def]
    """Merge rows first, first + 1, ... into the k largest of each column so far.

    `values` is float64 [a, b]; NaN is ignored. `index` int64 and `value` float64 [b, k], falling, are updated in place; of equal values
    the earlier row comes first.
    """
    rows, columns = values.shape
    k = value.shape[1]
    for stripe in numba.prange((columns + _COLUMNS - 1) // _COLUMNS):
        start, stop = stripe * _COLUMNS, min((stripe + 1) * _COLUMNS, columns)
        bound = value[start:stop, k - 1].copy()
        for i in range(rows):
            row = values[i, start:stop]
            for j in range(stop - start):
                new = row[j]
                if new > bound[j]:
                    place = k - 1
                    while place > 0 and new > value[start + j, place - 1]:
                        value[start + j, place] = value[start + j, place - 1]
                        index[start + j, place] = index[start + j, place - 1]
                        place -= 1
                    value[start + j, place] = new
                    index[start + j, place] = first + i
                    bound[j] = value[start + j, k - 1]
