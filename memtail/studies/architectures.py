"""How much of the scores other models find on the same dataset (the paper's figure 7).

Half of the trials of one experiment are compared with as many of another (see `memtail.studies.agreement`), and beside that with as many
others of its own, which differ by chance alone. The trials are split in several ways. Nothing is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memtail.errors import ScoresError
from memtail.experiment_store import ExperimentStore, Record
from memtail.randomness import Purpose, random_keys
from memtail.scores.fetch import open_scores
from memtail.scores.summary import ScoreSummary
from memtail.statistics.accumulator import PackedTrials
from memtail.storage import ObjectStore
from memtail.studies.agreement import (
    PAPERS,
    SMALLEST_HALF,
    SPLITS,
    THRESHOLDS,
    Agreement,
    Estimates,
    Score,
    agreements,
    draw_by_threshold,
    rank_correlation,
    table,
)
from memtail.studies.result import StudyResult, write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def study_architectures(store: ObjectStore, names: list[str]) -> StudyResult:
    """Compare the scores of two or more experiments, and write the result into the store, under the first of them.

    Raises:
        ScoresError: they are fewer than two, or not of one dataset, or have no scores, or too few trials.
    """
    if len(set(names)) < 2:
        raise ScoresError(f"there is nothing to compare '{names[0]}' with: name two experiments or more")
    records = [ExperimentStore(store, name).read_record() for name in dict.fromkeys(names)]
    names = [record.experiment.name for record in records]
    first = records[0].canonical["dataset"]["fingerprint"]
    for record in records[1:]:
        other = record.canonical["dataset"]["fingerprint"]
        if other != first:
            raise ScoresError(
                f"experiment '{record.experiment.name}' is of dataset {other[:8]}..., '{names[0]}' of {first[:8]}...: "
                f"compare experiments on the same images"
            )
    scores = [open_scores(store, name) for name in names]
    labels = scores[0].memorization["label"], scores[0].test_labels
    statistics = [each.statistics for each in scores]
    trials = min(own.trials for own in statistics) // 2
    if trials < SMALLEST_HALF:
        fewest = min(scores, key=lambda each: each.statistics.trials).summary
        raise ScoresError(
            f"experiment '{fewest.experiment}' has {fewest.trials} trials, {2 * SMALLEST_HALF} are needed to compare: raise subsets.trials"
        )
    measured: dict[str, list[_Compared]] = {}
    for split in range(SPLITS):
        halves = [[Estimates.of(own.select(half), *labels) for half in _halves(own, trials, split)] for own in statistics]
        for i, j in combinations_with_replacement(range(len(names)), 2):
            label = f"{names[i]} and {names[j]}" if i != j else f"{names[i]} and itself"
            one, other = halves[i][0], halves[j][1]
            measured.setdefault(label, []).append(_Compared(list(agreements(one, other)), rank_correlation(one, other)))
    rows = [
        ({"compared": label, "split": number, "trials": trials, "rank_correlation": each.rank_correlation}, agreement)
        for label, found in measured.items()
        for number, each in enumerate(found)
        for agreement in each.agreements
    ]
    summaries = [each.summary for each in scores]
    findings = [_of_one(record, summary) for record, summary in zip(records, summaries, strict=True)]
    findings.append(
        f"Each comparison is of {trials} trials with {trials} others; what keeps a model apart from itself is chance alone. In brackets "
        f"are the least and the greatest of {SPLITS} ways to split the trials."
    )
    findings += [_of_two(label, found) for label, found in measured.items()]
    result = StudyResult(
        store,
        names[0],
        "architectures",
        f"What {', '.join(names[:-1])} and {names[-1]} agree on",
        findings,
        sum(summary.trials for summary in summaries),
        names,
        {"scores": {name: each.folder.name for name, each in zip(names, scores, strict=True)}},
        {"trials": trials, "agreement": {label: _at_papers(found) for label, found in measured.items()}},
    )
    write_result(result, table(rows), _draw(measured, trials))
    return result


@dataclass(frozen=True)
class _Compared:
    """One way to split the trials."""

    agreements: list[Agreement]
    rank_correlation: float | None

    def overlap(self, score: Score) -> float | None:
        return next(each.jaccard for each in self.agreements if each.score == score and each.threshold == PAPERS[score])


def _halves(packed: PackedTrials, trials: int, split: int) -> list[npt.NDArray[np.int64]]:
    """Two disjoint sets of so many trials each, by their indices.

    A trial is in the same set whatever the experiment, unless too many of one set diverged: experiments of one seed have the subset of
    trial k in common, and would agree by it. Of trials 2 k and 2 k + 1 chance puts one in each set.
    """
    counted = packed.counted_trials
    swapped = random_keys(int(counted[-1]) // 2 + 1, 0, Purpose.HALVES, split)[counted // 2] % 2
    first = counted % 2 == swapped
    one, other = counted[first], counted[~first]
    if len(one) < trials:
        one, other = np.concatenate([one, other[trials:]]), other[:trials]
    if len(other) < trials:
        one, other = one[:trials], np.concatenate([other, one[trials:]])
    return [one[:trials], other[:trials]]


def _at_papers(found: list[_Compared]) -> dict[str, float | None]:
    spreads: dict[str, tuple[float, float, float] | None] = {score: _spread([each.overlap(score) for each in found]) for score in PAPERS}
    spreads["rank_correlation"] = _spread([each.rank_correlation for each in found])
    return {what: None if spread is None else spread[0] for what, spread in spreads.items()}


def _spread(values: Sequence[float | None]) -> tuple[float, float, float] | None:
    """Mean, least and greatest of what is defined."""
    defined = [value for value in values if value is not None]
    return (sum(defined) / len(defined), min(defined), max(defined)) if defined else None


def _of_one(record: Record, summary: ScoreSummary) -> str:
    memorized, pairs = summary.mem_share(PAPERS["memorization"]), summary.pairs.count
    share = "none has an estimate" if memorized is None else f"{memorized:.2%} of the training examples are memorized"
    return (
        f"{record.experiment.name} ({record.experiment.model.name}, {summary.trials} trials): {summary.test_accuracy:.2%} of the "
        f"test examples are classified correctly, {share} (mem >= {PAPERS['memorization']}), and there are {pairs} pairs."
    )


def _of_two(label: str, found: list[_Compared]) -> str:
    parts = []
    whats: dict[Score, str] = {"memorization": "memorized examples", "influence": "pairs"}
    for score, what in whats.items():
        overlap = _spread([each.overlap(score) for each in found])
        parts.append(f"{what} do not overlap, being none" if overlap is None else f"{what} overlap by {_bracketed(overlap)}")
    ranks = _spread([each.rank_correlation for each in found])
    if ranks is not None:
        parts.append(f"memorization scores have a rank correlation of {_bracketed(ranks)}")
    return f"{label}: {', '.join(parts)}."


def _bracketed(spread: tuple[float, float, float]) -> str:
    return f"{spread[0]:.3f} ({spread[1]:.3f} to {spread[2]:.3f})"


def _draw(measured: dict[str, list[_Compared]], trials: int) -> "Figure":
    from memtail.figures.style import COLOURS, drawing

    with drawing(7.5, 5.6) as figure:
        grid = figure.subplots(2, 2, sharex="col")
        for number, (label, found) in enumerate(measured.items()):
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": "--" if label.endswith(" and itself") else "-"}
            agreed = found[0].agreements
            for column, score in enumerate(THRESHOLDS):
                draw_by_threshold(grid[0, column], agreed, score, "jaccard", label=label if column == 0 else None, **style)
                draw_by_threshold(grid[1, column], agreed, score, "difference", **style)
        figure.suptitle(f"{trials} trials each")
        grid[0, 0].set(ylabel="overlap (Jaccard)", xlabel="", title="memorized examples")
        grid[0, 1].set(xlabel="", title="pairs")
        grid[1, 0].set(ylabel="mean difference of scores")
        figure.legend(loc="outside lower center", ncols=2)
    return figure
