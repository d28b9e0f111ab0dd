"""The compiled loop of Fisher's exact test.

Importing numba and loading compiled code takes a moment, so callers import this module inside the functions that need it.
"""

import numba
import numpy as np

from memtail.statistics.numba_lock import with_numba_lock


@with_numba_lock
@numba.njit(parallel=True, cache=True, boundscheck=False)
def upper_tails(both, k_in, correct, trials, log_factorials, largest, out):  # type: ignore[no-untyped-def]
    """Set out[i, j] = P(X >= both[i, j]) for X hypergeometric: k_in[i, j] draws from `trials`, of which correct[i, j] are marked.

    Set it to 1 where it exceeds `largest`, which is below 1/2: the probability is at least that wherever `both` is at most the mean of X.
    The counts are integers [a, b], `log_factorials` float64 [trials + 1] with log(k!) at k, and `out` float64 [a, b].
    """
    rows, columns = both.shape
    for i in numba.prange(rows):
        for j in range(columns):
            observed, drawn, marked = both[i, j], k_in[i, j], correct[i, j]
            out[i, j] = 1.0
            if observed * trials <= drawn * marked:
                continue
            term = np.exp(
                log_factorials[marked] - log_factorials[observed] - log_factorials[marked - observed]
                + log_factorials[trials - marked] - log_factorials[drawn - observed] - log_factorials[trials - marked - drawn + observed]
                - log_factorials[trials] + log_factorials[drawn] + log_factorials[trials - drawn]
            )  # fmt: skip
            tail = term
            # above the mean each term is smaller than the one before
            for x in range(observed, min(drawn, marked)):
                term *= (marked - x) * (drawn - x) / ((x + 1) * (trials - marked - drawn + x + 1))
                tail += term
                if tail > largest or term < 1e-17 * tail:
                    break
            if tail <= largest:
                out[i, j] = tail
