"""Subsets of an experiment: the design, the number of trials, and the precision at which it ends."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from memtail.confidence import Z
from memtail.spec.base import Part

# Fewest trials in the first round of an experiment that stops at a standard error.
_SMALLEST_ROUND = 64
# Smallest bound that may be declared: by far more trials than are allowed would be needed.
_SMALLEST = 1e-4
# Standard error in the worst case up to which an overlap is sought: ties, or a lack of pairs, may keep it from ever being reached.
_FINEST = 0.01


class RankingSpec(Part):
    """The agreement on the most memorized examples at which an experiment ends.

    Attributes:
        top: the number of most memorized examples.
        overlap: the overlap (Jaccard) of these with those of another run of as many trials, as expected from the present trials.
    """

    top: Annotated[int, Field(ge=1)]
    overlap: Annotated[float, Field(gt=0, lt=1)]


class PairsSpec(Part):
    """The agreement on the selected pairs, those of `pairs.parquet`, at which an experiment ends.

    Attributes:
        overlap: the overlap (Jaccard) of the selected pairs with those of another run of as many trials, as expected from the present
            trials.
    """

    overlap: Annotated[float, Field(gt=0, lt=1)]


class UntilSpec(Part):
    """The precision at which an experiment ends: all bounds that are declared, at least one, have to hold.

    Attributes:
        standard_error: the largest standard error of memorization accepted.
        interval_width: the largest width of the 95% interval of memorization accepted, from `mem_lo` to `mem_hi`.
        ranking: the agreement with another run on the most memorized examples that is needed. It is sought up to the number of trials at
            which no standard error exceeds 0.01.
        pairs: the agreement with another run on the selected pairs that is needed; sought as far as `ranking`. Without any pairs it is not
            reached. It takes a test set.
        quantile: the share of training examples that must reach `standard_error` and `interval_width`.
    """

    standard_error: Annotated[float, Field(ge=_SMALLEST, lt=0.5)] | None = None
    interval_width: Annotated[float, Field(ge=_SMALLEST, lt=2)] | None = None
    ranking: RankingSpec | None = None
    pairs: PairsSpec | None = None
    quantile: Annotated[float, Field(gt=0, le=1)] = 0.95

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if all(bound is None for bound in (self.standard_error, self.interval_width, self.ranking, self.pairs)):
            raise ValueError("until needs a bound: standard_error, interval_width, ranking or pairs")
        return self

    def most_trials(self, fraction: float) -> int:
        """Return the number of trials that suffices for every example, or is the most for an overlap: the worst case, p_in = p_out = 1/2.

        See `memtail.estimators.expected_standard_error`.

        Args:
            fraction: of the training examples in each subset.
        """
        bounds = (
            self.standard_error,
            None if self.interval_width is None else self.interval_width / (2 * Z),
            None if self.ranking is None and self.pairs is None else _FINEST,
        )
        bound = min(each for each in bounds if each is not None)
        return math.ceil((1 / fraction + 1 / (1 - fraction)) / 4 / bound**2)

    def first_round(self, fraction: float) -> int:
        """Return the number of trials of the first round: a twentieth of the worst case, but enough to estimate standard errors from.

        Args:
            fraction: of the training examples in each subset.
        """
        most = self.most_trials(fraction)
        return max(2, min(most, max(_SMALLEST_ROUND, most // 20)))


class SubsetsSpec(Part):
    """The subset design and the number of trials.

    Attributes:
        design: the rule that maps a trial to its subset (see `memtail.subsets`).
        fraction: share of the training examples in a subset.
        trials: number of trials; with `until`, the number to begin with, which has a suitable default.
        seed: seed of the experiment: of subsets, initial weights, batch order and augmentation.
        masks: of the design `explicit`, a `.npy` file of booleans [trials, n].
        until: continue in rounds of trials until the scores have this precision.
    """

    design: Literal["uniform", "balanced", "stratified", "explicit"] = "uniform"
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.7
    trials: Annotated[int, Field(ge=2)] = 1000
    seed: Annotated[int, Field(ge=0)] = 0
    masks: Path | None = None
    until: UntilSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _begin_with_a_first_round(cls, data: Any) -> Any:
        try:
            if "trials" not in data and data["until"]:
                until = UntilSpec.model_validate(data["until"])
                return {**data, "trials": until.first_round(float(data.get("fraction", 0.7)))}
        except (KeyError, TypeError, ValueError, ArithmeticError):  # a ValidationError is a ValueError
            pass  # there is no `until`, or its own validation reports it
        return data

    @model_validator(mode="after")
    def _masks_are_given_in_full(self) -> Self:
        if self.masks is not None and self.until is not None:
            raise ValueError("until cannot be combined with masks, which fix the number of trials")
        return self

    @model_validator(mode="after")
    def _masks_belong_to_explicit(self) -> Self:
        if (self.design == "explicit") != (self.masks is not None):
            raise ValueError("masks (a .npy file of booleans [trials, n]) are required for design 'explicit', and refused for others")
        return self
