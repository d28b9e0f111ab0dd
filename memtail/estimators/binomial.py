"""Shares of models, their standard errors, and the standard error of a difference of two shares.

Each model of a group either classifies an example correctly or not, independently of the others. So a share p of k models has variance
p (1 - p) / k, and the variances of two disjoint groups add up. Without models there is no share: NaN, never 0.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def share(correct: npt.ArrayLike, count: npt.ArrayLike) -> Floats:
    """Divide counts; NaN where `count` is 0.

    Args:
        correct: integers of any shape, the models of a group that classify an example correctly.
        count: integers that broadcast with `correct`, the models of the group.

    Returns:
        float64 of the common shape.
    """
    correct, count = np.asarray(correct), np.asarray(count)
    p: Floats = np.full(np.broadcast_shapes(correct.shape, count.shape), np.nan)
    np.divide(correct, count, out=p, where=count > 0)
    return p


def standard_error(p: npt.ArrayLike, count: npt.ArrayLike) -> Floats:
    """Return sqrt(p (1 - p) / count), the standard error of a share p of `count` models; NaN where `count` is 0."""
    return np.sqrt(_variance(p, count))


def difference_standard_error(p_in: npt.ArrayLike, k_in: npt.ArrayLike, p_out: npt.ArrayLike, k_out: npt.ArrayLike) -> Floats:
    """Return sqrt(p_in (1 - p_in) / k_in + p_out (1 - p_out) / k_out), the standard error of p_in - p_out; NaN where a count is 0."""
    return np.sqrt(_variance(p_in, k_in) + _variance(p_out, k_out))


def _variance(p: npt.ArrayLike, count: npt.ArrayLike) -> Floats:
    p = np.asarray(p, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance: Floats = p * (1 - p) / np.asarray(count)
    return variance
