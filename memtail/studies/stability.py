"""How much of the scores another run would find again, and how many trials it takes for it to find enough.

The trials of an experiment are split at random into two halves that share none, several times, and the scores of the two compared (see
`memtail.studies.agreement`); then the same is done with ever fewer of the trials. So the halves of T trials say how far two runs of T / 2
trials agree. Nothing is trained.

A wanted overlap that was reached with fewer trials than there are is told from what was measured. Otherwise the overlap J of what t trials
select is continued by a power law, 1 - J = a t^-b, fitted to the logarithms by least squares, once for each split: the share of examples
whose score is so near the threshold that chance decides falls with their standard error, and so with a power of t.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memtail.errors import ScoresError
from memtail.experiment_store import ExperimentStore
from memtail.randomness import Purpose, random_keys
from memtail.scores.fetch import open_scores
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

#: What was measured is continued to so many times the largest number of trials.
REACH = 8

_WHAT = {"memorization": f"memorized examples (mem >= {PAPERS['memorization']})", "influence": f"pairs (infl >= {PAPERS['influence']})"}


@dataclass(frozen=True)
class _Split:
    """Two disjoint sets of t trials each."""

    trials: int
    number: int
    agreements: list[Agreement]
    rank_correlation: float | None

    def at(self, score: Score, threshold: float) -> Agreement:
        return next(each for each in self.agreements if each.score == score and each.threshold == threshold)


@dataclass(frozen=True)
class _Needed:
    """The trials that a wanted overlap takes.

    Attributes:
        trials: so many; None if that cannot be told, or is too far.
        beyond: more than so many, if it is too far.
        fewest, most: the same as `trials` by single splits, where it was continued; None if too far.
        measured: whether the overlap was reached by what was measured: `trials` reach it, and half as many do not, or were not tried.
    """

    trials: int | None = None
    beyond: int | None = None
    fewest: int | None = None
    most: int | None = None
    measured: bool = False


def study_stability(store: ObjectStore, name: str, *, wanted: float) -> StudyResult:
    """Compare the halves of an experiment's trials, and write the result into the store.

    Args:
        store, name: the experiment.
        wanted: the overlap (Jaccard coefficient, 0 to 1) for which the trials needed are told.

    Raises:
        ScoresError: there are no scores, or of too few trials.
    """
    ExperimentStore(store, name).read_record()
    scores = open_scores(store, name)
    packed, labels = scores.statistics, (scores.memorization["label"], scores.test_labels)
    if packed.trials < 2 * SMALLEST_HALF:
        raise ScoresError(f"experiment '{name}' has {packed.trials} trials, {2 * SMALLEST_HALF} are needed to split: raise subsets.trials")
    splits = []
    trials = packed.trials // 2
    while trials >= SMALLEST_HALF:
        for number in range(SPLITS):
            drawn = packed.counted_trials[np.argsort(random_keys(packed.trials, 0, Purpose.HALVES, trials, number))]
            halves = [Estimates.of(packed.select(half), *labels) for half in (drawn[:trials], drawn[trials : 2 * trials])]
            splits.append(_Split(trials, number, list(agreements(*halves)), rank_correlation(*halves)))
        trials //= 2
    needed = {score: _trials_for(wanted, splits, score) for score in THRESHOLDS}
    rows = [
        ({"trials": split.trials, "split": split.number, "rank_correlation": split.rank_correlation}, each)
        for split in splits
        for each in split.agreements
    ]
    result = StudyResult(
        store,
        name,
        "stability",
        f"What two runs of {splits[0].trials} trials would agree on",
        _findings(splits, wanted, needed),
        packed.trials,
        [name],
        {"scores": scores.folder.name, "wanted": wanted, "splits": SPLITS},
        {
            "trials": splits[0].trials,
            "jaccard": {score: _overlap(splits[:SPLITS], score) for score in THRESHOLDS},
            "rank_correlation": _mean([split.rank_correlation for split in splits[:SPLITS]]),
            "trials_needed": {score: vars(each) for score, each in needed.items()},
        },
    )
    write_result(result, table(rows), _draw(name, splits, wanted))
    return result


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _overlaps(splits: list[_Split], score: Score) -> list[float]:
    found = (split.at(score, PAPERS[score]).jaccard for split in splits)
    return [value for value in found if value is not None]


def _overlap(splits: list[_Split], score: Score) -> float | None:
    return _mean(list(_overlaps(splits, score)))


def _by_trials(splits: list[_Split]) -> list[list[_Split]]:
    """Groups of as many trials each, most first."""
    return [splits[start : start + SPLITS] for start in range(0, len(splits), SPLITS)]


def _trials_for(wanted: float, splits: list[_Split], score: Score) -> _Needed:
    groups, reached = _by_trials(splits), None
    for group in groups:  # most trials first
        overlap = _overlap(group, score)
        if overlap is None or overlap < wanted:
            break
        reached = group[0].trials
    if reached is not None:
        return _Needed(reached, measured=True)
    told = sorted(_continued(wanted, [group[number] for group in groups], score) for number in range(SPLITS))
    if math.isnan(sum(told)):
        return _Needed()
    fewest, middle, most = (None if math.isinf(trials) else math.ceil(trials) for trials in (told[0], told[SPLITS // 2], told[-1]))
    return _Needed(middle, REACH * splits[0].trials if middle is None else None, fewest, most)


def _continued(wanted: float, of_one: list[_Split], score: Score) -> float:
    """The trials for a wanted overlap by the power law through one split each; infinite beyond `REACH`, NaN if it cannot be fitted."""
    points = [(each.trials, overlap) for each in of_one if (overlap := each.at(score, PAPERS[score]).jaccard) is not None and overlap < 1]
    if len(points) < 2:
        return math.nan
    slope, start = np.polyfit([math.log(trials) for trials, _ in points], [math.log(1 - overlap) for _, overlap in points], 1)
    most = of_one[0].trials
    exponent = (math.log(1 - wanted) - start) / slope if slope < 0 else math.inf
    return max(most, math.exp(exponent)) if exponent <= math.log(REACH * most) else math.inf


def _findings(splits: list[_Split], wanted: float, needed: dict[Score, _Needed]) -> list[str]:
    most = splits[:SPLITS]
    trials = most[0].trials
    findings = []
    for score in THRESHOLDS:
        overlaps, at = _overlaps(most, score), [split.at(score, PAPERS[score]) for split in most]
        if not overlaps:
            findings.append(f"Two disjoint sets of {trials} trials select no {_WHAT[score]}.")
            continue
        apart = _mean([each.difference for each in at])
        findings.append(
            f"Two disjoint sets of {trials} trials select {_WHAT[score]} that overlap by {sum(overlaps) / len(overlaps):.3f} "
            f"(Jaccard; {min(overlaps):.3f} to {max(overlaps):.3f} over {SPLITS} splits), with scores {apart:.3f} apart on average."
        )
    correlation = _mean([split.rank_correlation for split in most])
    if correlation is not None:
        findings.append(f"The rank correlation of their memorization scores is {correlation:.3f}.")
    for score, each in needed.items():
        goal = f"An overlap of {wanted:g} of the {_WHAT[score]} takes"
        if each.measured:
            smallest = splits[-1].trials == each.trials
            findings.append(f"{goal} {'at most' if smallest else 'about'} {each.trials} trials, as measured.")
        elif each.beyond is not None:
            findings.append(f"{goal} more than {each.beyond} trials: further than what was measured can be continued.")
        elif each.trials is not None:
            by_split = f"{each.fewest} to {each.most or f'more than {REACH * trials}'} by single splits"
            findings.append(f"{goal} about {each.trials} trials ({by_split}), by a power law that goes beyond the {trials} measured.")
        else:
            findings.append(f"{goal} a number of trials that cannot be told from what was measured.")
    return findings


def _draw(name: str, splits: list[_Split], wanted: float) -> "Figure":
    from memtail.figures.style import COLOURS, GREY, drawing

    groups = _by_trials(splits)
    curves: list[tuple[str, list[list[float]]]] = [
        (f"memorized, mem ≥ {PAPERS['memorization']}", [_overlaps(group, "memorization") for group in groups]),
        (f"pairs, infl ≥ {PAPERS['influence']}", [_overlaps(group, "influence") for group in groups]),
        ("ranks of mem", [[s.rank_correlation for s in group if s.rank_correlation is not None] for group in groups]),
    ]
    with drawing(9, 3.4) as figure:
        by_trials, overlap, apart = figure.subplots(1, 3)
        for (label, values), colour in zip(curves, COLOURS, strict=False):
            shown = [(group[0].trials, found) for group, found in zip(groups, values, strict=True) if found]
            trials = [count for count, _ in shown]
            by_trials.plot(trials, [np.mean(found) for _, found in shown], marker="o", color=colour, label=label)
            by_trials.fill_between(
                trials, [min(found) for _, found in shown], [max(found) for _, found in shown], color=colour, alpha=0.2, linewidth=0
            )
        by_trials.axhline(wanted, color=GREY, linestyle="--", linewidth=1)
        by_trials.set_xscale("log")
        counts = [group[0].trials for group in groups]
        by_trials.set_xticks(counts, [str(count) for count in counts])
        by_trials.minorticks_off()
        by_trials.set(
            xlabel="trials t", ylabel="overlap (Jaccard); rank correlation", ylim=(0, 1.02), title=f"{name}: two runs of t trials"
        )
        figure.legend(loc="outside lower center", ncols=3)
        most: Any = splits[0].agreements
        for score, colour in zip(THRESHOLDS, COLOURS, strict=False):
            for axes, what in ((overlap, "jaccard"), (apart, "difference")):
                draw_by_threshold(axes, most, score, what, color=colour)  # type: ignore[arg-type]
        overlap.set(xlabel="threshold", ylabel="overlap (Jaccard)", title=f"what {counts[0]} trials select")
        apart.set(xlabel="threshold", ylabel="mean difference", title="how far the scores are apart")
    return figure
