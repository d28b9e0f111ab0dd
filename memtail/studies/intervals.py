"""Means over retrained models, and differences of means, with 95% confidence intervals."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A value and `half` the width of its confidence interval, as fractions of 1."""

    value: float
    half: float

    def __str__(self) -> str:
        """Format in percent or percentage points: `1.91 ± 0.26`."""
        return f"{100 * self.value:z.2f} ± {100 * self.half:.2f}"


def mean(values: Floats) -> Interval:
    """Mean of at least two independent values, with Student's t interval."""
    from scipy.stats import t

    half = t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(values.mean()), float(half))


def difference(first: Floats, second: Floats) -> Interval:
    """Mean of `first` minus mean of `second`, with Welch's interval, which allows unequal variances."""
    from scipy.stats import t

    of_means = [values.var(ddof=1) / len(values) for values in (first, second)]
    variance = sum(of_means)
    if variance == 0:
        return Interval(float(first.mean() - second.mean()), 0.0)
    freedom = variance**2 / sum(each**2 / (len(values) - 1) for each, values in zip(of_means, (first, second), strict=True))
    half = t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance)
    return Interval(float(first.mean() - second.mean()), float(half))
