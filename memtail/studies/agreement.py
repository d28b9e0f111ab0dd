"""How far two sets of trials agree on the scores of one dataset: what they select, threshold by threshold, and how they rank it.

What both select is measured by the Jaccard coefficient, the share of what either selects that both do; how far their scores are apart by
the mean absolute difference over what either selects.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from memtail.estimators import Memorization, Pairs, high_influence_pairs, influence_at, memorization
from memtail.estimators.pairs import INFL_THRESHOLD, MEM_THRESHOLD
from memtail.statistics.accumulator import PackedTrials

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Score = Literal["memorization", "influence"]

#: Thresholds at which the two are compared; the paper's among them.
THRESHOLDS: dict[Score, tuple[float, ...]] = {
    "memorization": (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "influence": (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5),
}
PAPERS: dict[Score, float] = {"memorization": MEM_THRESHOLD, "influence": INFL_THRESHOLD}

#: How often trials are split in two to be compared, and the fewest in a half.
SPLITS = 5
SMALLEST_HALF = 50


@dataclass(frozen=True)
class Agreement:
    """Of two sets of trials, on one score at one threshold; the pairs' influence is of pairs of one class with mem >= 0.25.

    Attributes:
        first, second: how many examples or pairs each selects.
        jaccard: of the two selections; None if both are empty.
        difference: mean absolute difference of the scores over what either selects; None if that is nothing, or has no estimate.
    """

    score: Score
    threshold: float
    first: int
    second: int
    jaccard: float | None
    difference: float | None


@dataclass(frozen=True)
class Estimates:
    """What one set of trials says: memorization, and the high-influence pairs."""

    packed: PackedTrials
    mem: Memorization
    pairs: Pairs

    @classmethod
    def of(cls, packed: PackedTrials, train_labels: npt.NDArray[np.int64], test_labels: npt.NDArray[np.int64]) -> "Estimates":
        """Estimate from packed statistics."""
        mem = memorization(packed)
        return cls(packed, mem, high_influence_pairs(packed, mem, train_labels, test_labels))


def agreements(first: Estimates, second: Estimates) -> Iterator[Agreement]:
    """How far the two agree on either score, threshold by threshold."""
    mem = (first.mem.value, second.mem.value)
    for threshold in THRESHOLDS["memorization"]:
        yield _agreement("memorization", threshold, mem, (mem[0] >= threshold, mem[1] >= threshold))
    q = first.packed.n_test
    found = [each.pairs.train * q + each.pairs.test for each in (first, second)]
    either = np.union1d(*found)
    infl = tuple(influence_at(each.packed, *np.divmod(either, q)) for each in (first, second))
    theirs = [np.isin(either, each) for each in found]
    for threshold in THRESHOLDS["influence"]:
        selected = tuple(own & (value >= threshold) for own, value in zip(theirs, infl, strict=True))
        yield _agreement("influence", threshold, infl, selected)


def rank_correlation(first: Estimates, second: Estimates) -> float | None:
    """Spearman's, of the memorization scores where both have one; None where it is not defined."""
    from scipy.stats import spearmanr

    both = ~(np.isnan(first.mem.value) | np.isnan(second.mem.value))
    varies = [np.ptp(each.mem.value[both]) > 0 if both.any() else False for each in (first, second)]
    return float(spearmanr(first.mem.value[both], second.mem.value[both]).statistic) if all(varies) else None


def _agreement(
    score: Score, threshold: float, values: tuple[npt.NDArray[Any], ...], selected: tuple[npt.NDArray[np.bool_], ...]
) -> Agreement:
    either = selected[0] | selected[1]
    count = int(either.sum())
    apart = np.abs(values[0] - values[1])[either]
    apart = apart[~np.isnan(apart)]
    return Agreement(
        score,
        threshold,
        int(selected[0].sum()),
        int(selected[1].sum()),
        float((selected[0] & selected[1]).sum() / count) if count else None,
        float(apart.mean()) if len(apart) else None,
    )


def table(rows: list[tuple[dict[str, Any], Agreement]]) -> dict[str, list[Any]]:
    """Agreements as columns, with those that say what each is of before them."""
    flat = [{**of, **asdict(agreement)} for of, agreement in rows]
    return {column: [row[column] for row in flat] for column in flat[0]}


def draw_by_threshold(axes: "Axes", found: list[Agreement], score: Score, what: Literal["jaccard", "difference"], **style: Any) -> None:
    """One line: an agreement on a score by threshold."""
    own = [each for each in found if each.score == score]
    values = [getattr(each, what) for each in own]
    axes.plot([each.threshold for each in own], [np.nan if value is None else value for value in values], marker="o", **style)
    axes.set(xlabel=f"threshold of {score}")
    axes.set_ylim(bottom=0, top=1.02 if what == "jaccard" else None, auto=what == "difference")
