"""Agreement of two sets of trials on the scores of one dataset: overlap of the selections at each threshold, and rank correlation.

The overlap of two selections is the Jaccard coefficient, the size of their intersection over the size of their union. The difference of
the scores is the mean absolute difference over the union.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from memtail.estimators import Memorization, Pairs, high_influence_pairs, influence_at, memorization
from memtail.estimators.pairs import INFL_THRESHOLD, MEM_THRESHOLD
from memtail.estimators.soft import soft_influence_at
from memtail.statistics.accumulator import PackedTrials

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Score = Literal["memorization", "influence", "adjusted influence"]

#: Thresholds at which two sets are compared, including the paper's.
THRESHOLDS: dict[Score, tuple[float, ...]] = {
    "memorization": (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "influence": (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5),
}
PAPERS: dict[Score, float] = {"memorization": MEM_THRESHOLD, "influence": INFL_THRESHOLD}


@dataclass(frozen=True)
class Agreement:
    """Agreement of two sets of trials on one score at one threshold; pairs are those of one class with mem >= 0.25.

    Attributes:
        score, threshold: the score and the threshold of the selections; no threshold for adjusted influence, which makes one selection.
        first, second: number of examples or pairs that each set selects.
        jaccard: overlap of the two selections; None if both are empty.
        difference: mean absolute difference of the scores over the union; None if the union is empty or has no estimates.
    """

    score: Score
    threshold: float | None
    first: int
    second: int
    jaccard: float | None
    difference: float | None


@dataclass(frozen=True)
class Estimates:
    """Memorization and high-influence pairs by one set of trials."""

    packed: PackedTrials
    mem: Memorization
    pairs: Pairs

    @classmethod
    def of(cls, packed: PackedTrials, train_labels: npt.NDArray[np.int64], test_labels: npt.NDArray[np.int64]) -> "Estimates":
        """Estimate from packed statistics."""
        mem = memorization(packed)
        return cls(packed, mem, high_influence_pairs(packed, mem, train_labels, test_labels))


@dataclass(frozen=True)
class Comparison:
    """Agreement of two sets of trials.

    Attributes:
        agreements: agreement on both scores at each threshold; on memorization alone without test examples.
        rank_correlation: Spearman's, of the memorization scores that both sets have; None where it is undefined.
    """

    agreements: list[Agreement]
    rank_correlation: float | None

    @property
    def scores(self) -> list[Score]:
        """The scores compared."""
        return list(dict.fromkeys(each.score for each in self.agreements))

    def at_paper_threshold(self, score: Score) -> Agreement:
        """Return the agreement on a score at the paper's threshold."""
        return next(each for each in self.agreements if each.score == score and each.threshold == PAPERS[score])


def compare(first: Estimates, second: Estimates) -> Comparison:
    """Compare two sets of trials."""
    return Comparison(list(_agreements(first, second)), _rank_correlation(first, second))


def _agreements(first: Estimates, second: Estimates) -> Iterator[Agreement]:
    mem = (first.mem.value, second.mem.value)
    for threshold in THRESHOLDS["memorization"]:
        yield _agreement("memorization", threshold, mem, (mem[0] >= threshold, mem[1] >= threshold))
    q = first.packed.n_test
    if not q:
        return
    pairs = [each.pairs.train * q + each.pairs.test for each in (first, second)]
    union = np.union1d(*pairs)
    infl = tuple(_influence_at(each.packed, *np.divmod(union, q)) for each in (first, second))
    members = [np.isin(union, each) for each in pairs]
    for threshold in THRESHOLDS["influence"]:
        selected = tuple(own & (value >= threshold) for own, value in zip(members, infl, strict=True))
        yield _agreement("influence", threshold, infl, selected)


def _influence_at(packed: PackedTrials, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Influence at pairs, on scores where only those are recorded."""
    soft = soft_influence_at(packed, train, test) if packed.scores_only else None
    return influence_at(packed, train, test) if soft is None else soft[0]


def _rank_correlation(first: Estimates, second: Estimates) -> float | None:
    from scipy.stats import spearmanr

    both = ~(np.isnan(first.mem.value) | np.isnan(second.mem.value))
    varies = [np.ptp(each.mem.value[both]) > 0 if both.any() else False for each in (first, second)]
    return float(spearmanr(first.mem.value[both], second.mem.value[both]).statistic) if all(varies) else None


def _agreement(
    score: Score, threshold: float, values: tuple[npt.NDArray[Any], ...], selected: tuple[npt.NDArray[np.bool_], ...]
) -> Agreement:
    union = selected[0] | selected[1]
    count = int(union.sum())
    differences = np.abs(values[0] - values[1])[union]
    differences = differences[~np.isnan(differences)]
    return Agreement(
        score,
        threshold,
        int(selected[0].sum()),
        int(selected[1].sum()),
        float((selected[0] & selected[1]).sum() / count) if count else None,
        float(differences.mean()) if len(differences) else None,
    )


def table(rows: list[tuple[dict[str, Any], Agreement]]) -> dict[str, list[Any]]:
    """Return agreements as columns, after the columns that label each of them."""
    flat = [{**labels, **asdict(agreement)} for labels, agreement in rows]
    return {column: [row[column] for row in flat] for column in flat[0]}


def draw_by_threshold(
    axes: "Axes", agreements: list[Agreement], score: Score, measure: Literal["jaccard", "difference"], **style: Any
) -> None:
    """Draw one line: a measure of agreement on a score by threshold."""
    own = [each for each in agreements if each.score == score]
    values = [getattr(each, measure) for each in own]
    axes.plot([each.threshold or 0 for each in own], [np.nan if value is None else value for value in values], marker="o", **style)
    axes.set(xlabel=f"threshold of {score}")
    axes.set_ylim(bottom=0, top=1.02 if measure == "jaccard" else None, auto=measure == "difference")
