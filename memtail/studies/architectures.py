"""How much of the scores other models find on the same dataset (the paper's figure 7).

The scores of two experiments are compared as those of two sets of trials are (see `memtail.studies.agreement`). Beside them stand the two
halves of the first experiment's own trials, which differ by chance alone. Nothing is trained.
"""

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from memtail.archive import ExperimentArchive, Record
from memtail.errors import ScoresError
from memtail.randomness import Purpose, random_keys
from memtail.scores.fetch import open_scores
from memtail.storage import ObjectStore
from memtail.studies.agreement import PAPERS, THRESHOLDS, Agreement, Estimates, agreements, draw_by_threshold, rank_correlation, table
from memtail.studies.result import StudyResult, write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def study_architectures(store: ObjectStore, names: list[str]) -> StudyResult:
    """Compare the scores of two or more experiments, and write the result into the store, under the first of them.

    Raises:
        ScoresError: they are fewer than two, or not of one dataset, or have no scores.
    """
    if len(set(names)) < 2:
        raise ScoresError(f"there is nothing to compare '{names[0]}' with: name two experiments or more")
    records = [ExperimentArchive(store, name).record() for name in dict.fromkeys(names)]
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
    found = [Estimates.of(each.statistics, *labels) for each in scores]
    own = scores[0].statistics
    drawn = own.counted_trials[np.argsort(random_keys(own.trials, 0, Purpose.HALVES, own.trials // 2, 0))]
    halves = [Estimates.of(own.only(half), *labels) for half in (drawn[::2], drawn[1::2])]
    compared = [(f"{names[i]} and {names[j]}", found[i], found[j]) for i, j in combinations(range(len(names)), 2)]
    compared.append((f"two halves of {names[0]}", halves[0], halves[1]))
    measured = {label: list(agreements(one, other)) for label, one, other in compared}
    ranks = {label: rank_correlation(one, other) for label, one, other in compared}
    rows = [({"compared": label, "rank_correlation": ranks[label]}, each) for label, agreed in measured.items() for each in agreed]
    summaries = [each.summary for each in scores]
    findings = [_of_one(record, summary) for record, summary in zip(records, summaries, strict=True)]
    findings += [_of_two(label, agreed, ranks[label]) for label, agreed in measured.items()]
    result = StudyResult(
        store,
        names[0],
        "architectures",
        f"What {', '.join(names[:-1])} and {names[-1]} agree on",
        findings,
        sum(int(summary["trials"]) for summary in summaries),
        names,
        {"scores": {name: each.folder.name for name, each in zip(names, scores, strict=True)}},
        {label: {"rank_correlation": ranks[label], **_at_papers(agreed)} for label, agreed in measured.items()},
    )
    write_result(result, table(rows), _draw(measured))
    return result


def _at_papers(agreed: list[Agreement]) -> dict[str, float | None]:
    return {each.score: each.jaccard for each in agreed if each.threshold == PAPERS[each.score]}


def _of_one(record: Record, summary: dict[str, Any]) -> str:
    memorized, pairs = summary["mem_share_at_least"][f"{PAPERS['memorization']:g}"], summary["pairs"]["count"]
    return (
        f"{record.experiment.name} ({record.experiment.model.name}, {summary['trials']} trials): {summary['test_accuracy']:.2%} of the "
        f"test examples are classified correctly, {memorized:.2%} of the training examples are memorized "
        f"(mem >= {PAPERS['memorization']}), and there are {pairs} pairs."
    )


def _of_two(label: str, agreed: list[Agreement], ranks: float | None) -> str:
    parts = []
    for score, what in (("memorization", "memorized examples"), ("influence", "pairs")):
        at = next(each for each in agreed if each.score == score and each.threshold == PAPERS[each.score])
        overlap = "do not overlap, being none" if at.jaccard is None else f"overlap by {at.jaccard:.3f}"
        parts.append(f"their {what} ({at.first} and {at.second}) {overlap}")
    if ranks is not None:
        parts.append(f"their memorization scores have a rank correlation of {ranks:.3f}")
    return f"{label}: {', '.join(parts)}."


def _draw(measured: dict[str, list[Agreement]]) -> "Figure":
    from memtail.studies.drawing import COLOURS, GREY, drawing

    with drawing(7.5, 5.6) as figure:
        grid = figure.subplots(2, 2, sharex="col")
        for number, (label, agreed) in enumerate(measured.items()):
            last = number == len(measured) - 1
            style = {"color": GREY, "linestyle": "--"} if last else {"color": COLOURS[number % len(COLOURS)]}
            for column, score in enumerate(THRESHOLDS):
                draw_by_threshold(grid[0, column], agreed, score, "jaccard", label=label if column == 0 else None, **style)
                draw_by_threshold(grid[1, column], agreed, score, "difference", **style)
        grid[0, 0].set(ylabel="overlap (Jaccard)", xlabel="", title="memorized examples")
        grid[0, 1].set(xlabel="", title="pairs")
        grid[1, 0].set(ylabel="mean difference of scores")
        figure.legend(loc="outside lower center", ncols=2)
    return figure
