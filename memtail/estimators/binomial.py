"""Shares of models, their standard errors, and the standard error and the confidence interval of a difference of two shares.

Each model of a group either classifies an example correctly or not, independently of the others. So a share p of k models has variance
p (1 - p) / k, and the variances of two disjoint groups add up. The observed p in place of the true one gives an error of 0 where all models
of a group agree, which few models do by chance. So one correct model and one incorrect model are added to each group (Agresti and Caffo,
The American Statistician 54, 2000): p~ = (p k + 1) / (k + 2), with variance p~ (1 - p~) / (k + 2). Shares and differences themselves stay
the observed ones; a confidence interval has its centre at the difference of the p~. Without models there is no share: NaN, never 0.
"""

import math

import numpy as np
import numpy.typing as npt

from memtail.confidence import Z

Floats = npt.NDArray[np.float64]

_erfc = np.frompyfunc(math.erfc, 1, 1)  # images of services have no scipy


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
    """Return the standard error of a share p of `count` models; NaN where p is.

    One correct model and one incorrect model are added here, too, so that the squares of the errors of two shares add up to that of their
    difference.
    """
    return np.sqrt(_variance(_adjusted(p, count), count))


def difference_standard_error(p_in: npt.ArrayLike, k_in: npt.ArrayLike, p_out: npt.ArrayLike, k_out: npt.ArrayLike) -> Floats:
    """Return the standard error of p_in - p_out; NaN where one of them is."""
    return np.sqrt(_variance(_adjusted(p_in, k_in), k_in) + _variance(_adjusted(p_out, k_out), k_out))


def difference_interval(p_in: npt.ArrayLike, k_in: npt.ArrayLike, p_out: npt.ArrayLike, k_out: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Return the ends of the 95% confidence interval of p_in - p_out, from -1 to 1; NaN where one of them is.

    It contains p_in - p_out. `make bench ROW=coverage` measures how often it contains the true difference.
    """
    centre = _adjusted(p_in, k_in) - _adjusted(p_out, k_out)
    half = Z * difference_standard_error(p_in, k_in, p_out, k_out)
    return np.maximum(centre - half, -1), np.minimum(centre + half, 1)


def normal_interval(value: Floats, standard_error: Floats) -> tuple[Floats, Floats]:
    """Return the ends of the 95% confidence interval of a difference of mean scores, from -1 to 1; NaN where the standard error is."""
    return np.maximum(value - Z * standard_error, -1), np.minimum(value + Z * standard_error, 1)


def normal_tail(z: npt.ArrayLike) -> Floats:
    """Return the probability that a standard normal variable is above z, of the shape of z; NaN where z is."""
    tail: Floats = np.asarray(_erfc(np.asarray(z) / math.sqrt(2)), np.float64) / 2
    return tail


def _adjusted(p: npt.ArrayLike, count: npt.ArrayLike) -> Floats:
    """The share with one correct model and one incorrect model more."""
    count = np.asarray(count)
    adjusted: Floats = (np.asarray(p, np.float64) * count + 1) / (count + 2)
    return adjusted


def _variance(adjusted: Floats, count: npt.ArrayLike) -> Floats:
    variance: Floats = adjusted * (1 - adjusted) / (np.asarray(count) + 2)
    return variance
