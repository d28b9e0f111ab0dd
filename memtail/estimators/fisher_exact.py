"""The compiled loop of exact tests. Importing this takes a moment; only what tests pairs does."""

import numba
import numpy as np

from memtail.statistics.numba_lock import one_at_a_time


@one_at_a_time
@numba.njit(parallel=True, cache=True, boundscheck=False)
def upper_tails(both, k_in, right, trials, log_factorials, largest, out):  # type: ignore[no-untyped-def]
    """out[i, j] = P(X >= both[i, j]) for X hypergeometric: `right[i, j]` of `trials` are marked, `k_in[i, j]` are drawn.

    It is 1 where it is above `largest`, which is below 1/2: the probability reaches that wherever `both` is no more than the mean of X.
    """
    rows, columns = both.shape
    for i in numba.prange(rows):
        for j in range(columns):
            found, drawn, marked = both[i, j], k_in[i, j], right[i, j]
            out[i, j] = 1.0
            if found * trials <= drawn * marked:
                continue
            term = np.exp(
                log_factorials[marked] - log_factorials[found] - log_factorials[marked - found]
                + log_factorials[trials - marked] - log_factorials[drawn - found] - log_factorials[trials - marked - drawn + found]
                - log_factorials[trials] + log_factorials[drawn] + log_factorials[trials - drawn]
            )  # fmt: skip
            tail = term
            # above the mean each term is smaller than the one before
            for x in range(found, min(drawn, marked)):
                term *= (marked - x) * (drawn - x) / ((x + 1) * (trials - marked - drawn + x + 1))
                tail += term
                if tail > largest or term < 1e-17 * tail:
                    break
            if tail <= largest:
                out[i, j] = tail
