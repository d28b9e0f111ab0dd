"""The co-occurrence product M^T T: for every pair (i, j), the trials with example i in their subset that classify example j correctly.

Both terms of an influence follow from it and from column sums, so it is the whole cost of influence. On packed words it takes AND and
population count for 64 trials at a time, or table look-ups on processors where those are faster.
"""

import numpy as np
import numpy.typing as npt

from memtail.statistics.accumulator import Words


def cooccurrence(left: Words, right: Words) -> npt.NDArray[np.int32]:
    """Count, for every pair of columns, the trials whose bit is set in both.

    Args:
        left: uint64 [W, a], words as in `PackedTrials`.
        right: uint64 [W, b].

    Returns:
        int32 [a, b], out[i, j] = sum_w popcount(left[w, i] & right[w, j]).
    """
    from memtail.statistics import popcount, popcount_avx2  # compile: not for callers that count no pairs

    rows, columns = left.shape[1], right.shape[1]
    if rows == 1 or columns == 1:
        one, many = (left, right) if rows == 1 else (right, left)
        counts = np.empty(many.shape[1], np.int32)
        popcount.count_one(np.ascontiguousarray(one[:, 0]), many, counts)
        return counts.reshape(rows, columns)
    if popcount_avx2.FASTER:
        out = np.empty((rows, columns), np.int32)
        popcount_avx2.count_pairs(left, right, out)
        return out
    padding = -len(left) % popcount.WORDS
    left = np.pad(left, ((0, padding), (0, -rows % popcount.ROWS)))
    right = np.pad(right, ((0, padding), (0, 0))) if padding else right
    out = np.empty((left.shape[1], columns), np.int32)
    popcount.count_pairs(left, right, out)
    return out[:rows]
