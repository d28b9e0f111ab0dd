"""Stability study: overlap of the scores of two runs, and the number of trials needed for a given overlap.

The trials of an experiment are split at random into two disjoint halves, several times, and the scores of the halves are compared (see
`memtail.studies.agreement`); then half as many trials are split, and so on. Two halves of t trials show how far two runs of t / 2 trials
agree. Nothing is trained.

Compared are memorized examples, pairs by the thresholds of the paper, and pairs by adjusted influence. The trials that an overlap needs are
measured, or follow from a power law (see `memtail.estimators.overlap`).
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from memtail.errors import ScoresError
from memtail.estimators.overlap import (
    REACH,
    SMALLEST_HALF,
    SPLITS,
    Needed,
    Overlaps,
    halves,
    jaccard,
    mean_defined,
    pair_selection,
    sizes,
    trials_for_overlap,
)
from memtail.estimators.pairs import Indices
from memtail.experiment_store import ExperimentStore
from memtail.scores.fetch import open_scores
from memtail.scores.reader import Scores
from memtail.scores.summary import ScoreSummary
from memtail.statistics.accumulator import PackedTrials
from memtail.storage import ObjectStore
from memtail.studies.agreement import PAPERS, Agreement, Comparison, Estimates, Score, compare, draw_by_threshold, table
from memtail.studies.options import ExperimentName
from memtail.studies.result import StudyResult, write_result
from memtail.studies.study import Prepared

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SELECTED: dict[Score, str] = {
    "memorization": f"memorized examples (mem >= {PAPERS['memorization']})",
    "influence": f"pairs of the paper's thresholds (infl >= {PAPERS['influence']})",
    "adjusted influence": "pairs selected by adjusted influence",
}


def prepare(
    store: ObjectStore,
    name: ExperimentName,
    *,
    overlap: Annotated[
        float,
        typer.Option("--wanted", min=0.01, max=0.999, help="Overlap (0 to 1) for which the trials needed are estimated.", metavar="J"),
    ] = 0.9,
) -> Prepared:
    """Prepare the study.

    Args:
        store: holds the experiment.
        name: the experiment.
        overlap: Jaccard coefficient for which the trials needed are estimated.

    Raises:
        StoreError: there is no such experiment, or the store cannot be read.
    """
    ExperimentStore(store, name).read_record()
    return Prepared(lambda: _evaluate(store, name, overlap))


@dataclass(frozen=True)
class _Group:
    """Comparisons of two disjoint sets of `trials` trials each, one for each random split; `adjusted` is empty without test examples."""

    trials: int
    splits: list[Comparison]
    adjusted: list[Agreement]

    @property
    def scores(self) -> list[Score]:
        """The scores compared: without test examples memorization alone."""
        return [*self.splits[0].scores, *(each.score for each in self.adjusted[:1])]

    def overlaps(self, score: Score) -> Overlaps:
        """Overlaps of the selections: at the paper's threshold, or by adjusted influence."""
        adjusted = score == "adjusted influence"
        agreements = self.adjusted if adjusted else [split.at_paper_threshold(score) for split in self.splits]
        return Overlaps(self.trials, [each.jaccard for each in agreements])

    def difference(self, score: Score) -> float | None:
        """Mean difference of the scores selected; None where there are none, and of adjusted influence."""
        thresholds = score != "adjusted influence"
        return mean_defined(split.at_paper_threshold(score).difference for split in self.splits) if thresholds else None

    def rank_correlations(self) -> list[float]:
        """Rank correlations, where defined."""
        return [split.rank_correlation for split in self.splits if split.rank_correlation is not None]


def _evaluate(store: ObjectStore, name: str, overlap: float) -> StudyResult:
    """Compare halves of the trials and write the result. Raises: ScoresError: there are no scores, or too few trials; StoreError."""
    scores = open_scores(store, name)
    groups = _groups(scores, name)
    largest = groups[0]
    needed = {score: trials_for_overlap(overlap, [group.overlaps(score) for group in groups]) for score in largest.scores}
    rows = [
        ({"trials": group.trials, "split": number, "rank_correlation": split.rank_correlation}, agreement)
        for group in groups
        for number, split in enumerate(group.splits)
        for agreement in (*split.agreements, *group.adjusted[number : number + 1])
    ]
    result = StudyResult(
        store,
        name,
        "stability",
        f"Agreement of two runs of {largest.trials} trials",
        _findings(groups, overlap, needed),
        scores.statistics.trials,
        [name],
        {"scores": scores.folder.name, "wanted": overlap, "splits": SPLITS},
        {
            "trials": largest.trials,
            "jaccard": {score: largest.overlaps(score).mean for score in largest.scores},
            "rank_correlation": mean_defined(largest.rank_correlations()),
            "trials_needed": {score: asdict(each) for score, each in needed.items()},
        },
    )
    write_result(result, table(rows), _draw(scores.summary, groups, overlap))
    return result


def _groups(scores: Scores, name: str) -> list[_Group]:
    """Split and compare, largest number of trials first."""
    packed, labels = scores.statistics, (scores.train_labels, scores.test_labels)
    if packed.trials < 2 * SMALLEST_HALF:
        raise ScoresError(
            f"experiment '{name}' has {packed.trials} trials, a split needs at least {2 * SMALLEST_HALF}: raise subsets.trials"
        )
    return [_group(packed, labels, trials) for trials in sizes(packed.trials)]


def _group(packed: PackedTrials, labels: tuple[Indices, Indices], trials: int) -> _Group:
    splits, adjusted = [], []
    for number in range(SPLITS):
        drawn = halves(packed, trials, number)
        splits.append(compare(*(Estimates.of(half, *labels) for half in drawn)))
        if packed.n_test:
            first, second = (pair_selection(half, *labels) for half in drawn)
            adjusted.append(Agreement("adjusted influence", None, len(first), len(second), jaccard(first, second), None))
    return _Group(trials, splits, adjusted)


def _findings(groups: list[_Group], overlap: float, needed: dict[Score, Needed]) -> list[str]:
    largest = groups[0]
    trials = largest.trials
    findings = []
    for score in largest.scores:
        overlaps = largest.overlaps(score).defined
        if not overlaps:
            findings.append(f"Two disjoint sets of {trials} trials select no {_SELECTED[score]}.")
            continue
        difference = largest.difference(score)
        findings.append(
            f"The {_SELECTED[score]} of two disjoint sets of {trials} trials overlap by {sum(overlaps) / len(overlaps):.3f} "
            f"(Jaccard; {min(overlaps):.3f} to {max(overlaps):.3f} over {SPLITS} splits)"
            f"{'' if difference is None else f'; on average, their scores differ by {difference:.3f}'}."
        )
    correlation = mean_defined(largest.rank_correlations())
    if correlation is not None:
        findings.append(f"The rank correlation of their memorization scores is {correlation:.3f}.")
    for score, each in needed.items():
        goal = f"An overlap of {overlap:g} of the {_SELECTED[score]} needs"
        if each.measured:
            smallest = groups[-1].trials == each.trials
            findings.append(f"{goal} {'at most' if smallest else 'about'} {each.trials} trials, as measured.")
        elif each.beyond is not None:
            findings.append(f"{goal} more than {each.beyond} trials, which is beyond the reach of the power law.")
        elif each.trials is not None:
            by_split = f"{each.fewest} to {each.most or f'more than {REACH * trials}'} by single splits"
            findings.append(f"{goal} about {each.trials} trials ({by_split}), by a power law fitted to at most {trials} measured trials.")
        else:
            findings.append(f"{goal} an unknown number of trials: the measurements do not determine a power law.")
    return findings


def _draw(summary: ScoreSummary, groups: list[_Group], overlap: float) -> "Figure":
    from memtail.figures.style import COLOURS, GREY, drawing

    names = summary.names
    labels: dict[Score, str] = {
        "memorization": f"memorized, {names.mem} ≥ {PAPERS['memorization']}",
        "influence": f"pairs, {names.infl} ≥ {PAPERS['influence']}",
        "adjusted influence": "pairs by adjusted influence",
    }
    curves = [(labels[score], [group.overlaps(score).defined for group in groups]) for score in groups[0].scores]
    curves.append((f"ranks of {names.mem}", [group.rank_correlations() for group in groups]))
    counts = [group.trials for group in groups]
    with drawing(9, 3.4) as figure:
        by_trials, overlaps, differences = figure.subplots(1, 3)
        for (label, measured), colour in zip(curves, COLOURS, strict=False):
            points = [(trials, values) for trials, values in zip(counts, measured, strict=True) if values]
            trials = [count for count, _ in points]
            by_trials.plot(trials, [np.mean(values) for _, values in points], marker="o", color=colour, label=label)
            low, high = ([bound(values) for _, values in points] for bound in (min, max))
            by_trials.fill_between(trials, low, high, color=colour, alpha=0.2, linewidth=0)
        by_trials.axhline(overlap, color=GREY, linestyle="--", linewidth=1)
        by_trials.set_xscale("log")
        by_trials.set_xticks(counts, [str(count) for count in counts])
        by_trials.minorticks_off()
        by_trials.set(
            xlabel="trials t",
            ylabel="overlap (Jaccard); rank correlation",
            ylim=(0, 1.02),
            title=f"{summary.experiment}: two runs of t trials",
        )
        figure.legend(loc="outside lower center", ncols=len(curves))
        for score, colour in zip(groups[0].splits[0].scores, COLOURS, strict=False):
            draw_by_threshold(overlaps, groups[0].splits[0].agreements, score, "jaccard", color=colour)
            draw_by_threshold(differences, groups[0].splits[0].agreements, score, "difference", color=colour)
        overlaps.set(xlabel="threshold", ylabel="overlap (Jaccard)", title=f"selections of {counts[0]} trials")
        differences.set(xlabel="threshold", ylabel="mean difference", title="difference of the scores")
    return figure
