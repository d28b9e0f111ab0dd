"""Means over retrained models, and differences of means, with 95% confidence intervals."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """`value`, and `half` the width of its confidence interval, both as fractions of 1."""

    value: float
    half: float

    def __str__(self) -> str:
        """In percent, or percentage points: `1.91 ± 0.26`."""
        return f"{100 * self.value:z.2f} ± {100 * self.half:.2f}"


def mean(values: Floats) -> Interval:
    """The mean of independent values with the interval of Student's t; needs two values at least."""
    from scipy.stats import t

    half = t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(values.mean()), float(half))


def difference(first: Floats, second: Floats) -> Interval:
    """The mean of `first` less that of `second`, with Welch's interval (the two need not vary alike)."""
    from scipy.stats import t

    of_means = [values.var(ddof=1) / len(values) for values in (first, second)]
    variance = sum(of_means)
    if variance == 0:
        return Interval(float(first.mean() - second.mean()), 0.0)
    freedom = variance**2 / sum(each**2 / (len(values) - 1) for each, values in zip(of_means, (first, second), strict=True))
    half = t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance)
    return Interval(float(first.mean() - second.mean()), float(half))
