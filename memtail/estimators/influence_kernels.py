"""Compiled loops over blocks of influences: their values, and the largest of every column.

Importing numba and loading compiled code takes a moment, so callers import this module inside the functions that need it.
"""

import numba
import numpy as np

from memtail.statistics.numba_lock import one_at_a_time

_STRIPE = 4096  # columns of one task: its row of float64 values stays in the first-level cache
_COLUMNS = 256  # columns whose smallest kept values stay in the first-level cache


@one_at_a_time
@numba.njit(parallel=True, cache=True, boundscheck=False, error_model="numpy")
def influence_values(both, k_in, right, trials, out):  # type: ignore[no-untyped-def]
    """out[i, j] = both[i, j] / k_in[i] - (right[j] - both[i, j]) / (trials - k_in[i]); NaN where a divisor is 0."""
    rows, columns = both.shape
    stripes = (columns + _STRIPE - 1) // _STRIPE
    for task in numba.prange(rows * stripes):
        i, stripe = task // stripes, task % stripes
        seen, unseen = np.float64(k_in[i]), np.float64(trials - k_in[i])
        for j in range(stripe * _STRIPE, min((stripe + 1) * _STRIPE, columns)):
            out[i, j] = both[i, j] / seen - (right[j] - both[i, j]) / unseen
        if seen == 0 or unseen == 0:
            out[i, stripe * _STRIPE : min((stripe + 1) * _STRIPE, columns)] = np.nan


@one_at_a_time
@numba.njit(parallel=True, cache=True, boundscheck=False, error_model="numpy")
def influence_column(both, k_in, right, trials, out):  # type: ignore[no-untyped-def]
    """`influence_values` of all training examples on one other: out[i] from both[i], k_in[i] and the scalar `right`."""
    for i in numba.prange(len(both)):
        seen, unseen = np.float64(k_in[i]), np.float64(trials - k_in[i])
        value = both[i] / seen - (right - both[i]) / unseen
        out[i] = np.nan if seen == 0 or unseen == 0 else value


@one_at_a_time
@numba.njit(parallel=True, cache=True, boundscheck=False)
def keep_largest(values, first, index, value):  # type: ignore[no-untyped-def]
    """Merge rows first, first + 1, ... of values [a, b] into each column's largest so far, [b, k] falling; NaN is passed over."""
    rows, columns = values.shape
    k = value.shape[1]
    for stripe in numba.prange((columns + _COLUMNS - 1) // _COLUMNS):
        start, stop = stripe * _COLUMNS, min((stripe + 1) * _COLUMNS, columns)
        least = value[start:stop, k - 1].copy()
        for i in range(rows):
            row = values[i, start:stop]
            for j in range(stop - start):
                new = row[j]
                if new > least[j]:
                    place = k - 1
                    while place > 0 and new > value[start + j, place - 1]:
                        value[start + j, place] = value[start + j, place - 1]
                        index[start + j, place] = index[start + j, place - 1]
                        place -= 1
                    value[start + j, place] = new
                    index[start + j, place] = first + i
                    least[j] = value[start + j, k - 1]
