"""The co-occurrence product M^T T: in how many trials example i was seen and example j was right.

Both terms of an influence follow from it and from column sums, so it is all that influence costs. On packed words it is AND and
population count, 64 trials at a time, or table lookups where those are faster.
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
        int32 [a, b], with out[i, j] = sum_w popcount(left[w, i] & right[w, j]).
    """
    from memtail.statistics import popcount as kernels  # compile: not for those who count no pairs
    from memtail.statistics import popcount_avx2 as lookup

    rows, columns = left.shape[1], right.shape[1]
    if rows == 1 or columns == 1:
        one, many = (left, right) if rows == 1 else (right, left)
        single = np.empty(many.shape[1], np.int32)
        kernels.count_one(np.ascontiguousarray(one[:, 0]), many, single)
        return single.reshape(rows, columns)
    if lookup.FASTER:
        looked_up = np.empty((rows, columns), np.int32)
        lookup.count_pairs(left, right, looked_up)
        return looked_up
    padding = -len(left) % kernels.WORDS
    left = np.pad(left, ((0, padding), (0, -rows % kernels.ROWS)))
    right = np.pad(right, ((0, padding), (0, 0))) if padding else right
    out = np.empty((left.shape[1], columns), np.int32)
    kernels.count_pairs(left, right, out)
    return out[:rows]
