"""Goals of a forecast: the numbers of trials that a precision takes, by a formula, or as published scores let expect."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from memtail.errors import ScoresError
from memtail.estimators import expected_standard_error, memorization
from memtail.estimators.overlap import SMALLEST_HALF, SPLITS, Overlaps, halves, jaccard, pair_selection, sizes, trials_for_overlap
from memtail.estimators.pairs import MEM_THRESHOLD
from memtail.execution.stopping import Labels, trials_needed
from memtail.spec import Experiment, UntilSpec
from memtail.statistics.accumulator import PackedTrials


@dataclass(frozen=True)
class Goal:
    """A precision, and the number of trials that it takes.

    Attributes:
        name: the precision, in words.
        trials: the number; None if it is unknown, or beyond reach.
        beyond: lower bound of the number if it is beyond reach.
    """

    name: str
    trials: int | None
    beyond: int | None = None


def described(until: UntilSpec | None) -> str | None:
    """Return the bounds of `subsets.until` in words, None if there are none."""
    if until is None:
        return None
    share, bounds = f"of {until.quantile:.0%} of the training examples at most", []
    if until.standard_error is not None:
        bounds.append(f"standard errors {share} {until.standard_error:g}")
    if until.interval_width is not None:
        bounds.append(f"95% intervals {share} {until.interval_width:g} wide")
    if until.ranking is not None:
        bounds.append(f"overlap {until.ranking.overlap:g} of the {until.ranking.top} most memorized examples")
    if until.pairs is not None:
        bounds.append(f"overlap {until.pairs.overlap:g} of the selected pairs")
    return ", ".join(bounds)


def until_goals(experiment: Experiment, limit: int, scores: PackedTrials | None, labels: Labels) -> list[Goal]:
    """Return the goals of `subsets.until`: the number of trials expected from published scores, and the largest one.

    Args:
        experiment: the declaration.
        limit: maximum number of trials, whatever the bound.
        scores: published statistics, None if there are none.
        labels: training and test labels.
    """
    until = experiment.subsets.until
    if until is None:
        return []
    most = min(limit, until.most_trials(experiment.subsets.fraction))
    goals = [Goal("until, at most", most)]
    if scores is not None:
        expected = trials_needed(until, scores, labels)
        goals.insert(0, Goal("until, as expected now", math.ceil(min(expected, most))))
    return goals


def error_goal(standard_error: float, fraction: float) -> Goal:
    """Return the goal that no expected standard error exceeds a bound."""
    return Goal(f"standard error {standard_error:g}", math.ceil((expected_standard_error(1, fraction) / standard_error) ** 2))


def overlap_goals(name: str, overlap: float, scores: PackedTrials, labels: Labels) -> list[Goal]:
    """Return the goals that two runs agree on memorized examples, and on selected pairs, as halves of the present trials let expect.

    Args:
        name: of the experiment.
        overlap: the overlap (Jaccard).
        scores: published statistics.
        labels: training and test labels.

    Raises:
        ScoresError: there are too few trials.
    """
    if not sizes(scores.trials):
        raise ScoresError(
            f"--overlap: experiment '{name}' has scores of {scores.trials} trials, and at least {2 * SMALLEST_HALF} are needed: "
            f"train some 250"
        )
    kinds = ("memorized examples", "selected pairs") if scores.n_test else ("memorized examples",)
    measured: dict[str, list[Overlaps]] = {kind: [] for kind in kinds}
    for trials in sizes(scores.trials):
        splits = [_overlaps(scores, labels, trials, split) for split in range(SPLITS)]
        for kind, by_split in zip(kinds, zip(*splits, strict=True), strict=True):
            measured[kind].append(Overlaps(trials, by_split))
    goals = []
    for kind in kinds:
        needed = trials_for_overlap(overlap, measured[kind])
        goals.append(Goal(f"overlap {overlap:g} of {kind}", needed.trials, needed.beyond))
    return goals


def _overlaps(scores: PackedTrials, labels: Labels, trials: int, split: int) -> Iterator[float | None]:
    both = halves(scores, trials, split)
    yield jaccard(*(np.flatnonzero(memorization(half).value >= MEM_THRESHOLD) for half in both))
    if scores.n_test:
        yield jaccard(*(pair_selection(half, *labels) for half in both))
