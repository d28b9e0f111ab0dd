"""Architecture study: agreement of different models on the scores of one dataset (the paper's figure 7).

Half of the trials of one experiment are compared with equally many trials of another (see `memtail.studies.agreement`). For comparison,
two halves of one experiment are compared too: these differ by chance alone. The trials are split in several ways. Nothing is trained.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Annotated

import numpy as np
import numpy.typing as npt
import typer

from memtail.errors import ScoresError
from memtail.estimators.overlap import SMALLEST_HALF, SPLITS, mean_defined
from memtail.experiment_store import ExperimentStore, Record
from memtail.randomness import Purpose, random_keys
from memtail.scores.fetch import open_scores
from memtail.scores.reader import Scores
from memtail.scores.summary import ScoreSummary
from memtail.spec import CommandTrainer, Experiment, FunctionTrainer, ImportedTrainer
from memtail.statistics.accumulator import PackedTrials
from memtail.storage import ObjectStore
from memtail.studies.agreement import (
    PAPERS,
    Comparison,
    Estimates,
    Score,
    compare,
    draw_by_threshold,
    table,
)
from memtail.studies.result import StudyResult, write_result
from memtail.studies.study import Prepared

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def prepare(
    store: ObjectStore, names: Annotated[list[str], typer.Argument(help="Experiments on one dataset, two or more.", metavar="NAME...")]
) -> Prepared:
    """Prepare the study of two or more experiments on one dataset.

    Args:
        store: holds the experiments.
        names: the experiments; the result is stored under the first.

    Raises:
        ScoresError: there are fewer than two experiments, or their datasets or the kinds of their outcomes differ.
        StoreError: there is no such experiment, or the store cannot be read.
    """
    if len(set(names)) < 2:
        raise ScoresError(f"there is no experiment to compare '{names[0]}' with: name two experiments or more")
    records = [ExperimentStore(store, name).read_record() for name in dict.fromkeys(names)]
    first = records[0].canonical["dataset"]["fingerprint"]
    for record in records[1:]:
        if record.experiment.record.scores_only != records[0].experiment.record.scores_only:
            raise ScoresError(
                f"of the experiments '{names[0]}' and '{record.experiment.name}' one has scores only, and the other is of correctness: "
                "compare experiments of one kind"
            )
        other = record.canonical["dataset"]["fingerprint"]
        if other != first:
            raise ScoresError(
                f"experiment '{record.experiment.name}' has dataset {other[:8]}..., '{names[0]}' has {first[:8]}...: "
                f"compare experiments on the same images"
            )
    return Prepared(lambda: _evaluate(store, records))


def _evaluate(store: ObjectStore, records: list[Record]) -> StudyResult:
    """Compare the experiments and write the result. Raises: ScoresError: one has no scores, or too few trials; StoreError."""
    names = [record.experiment.name for record in records]
    scores = [open_scores(store, name) for name in names]
    trials = min(each.statistics.trials for each in scores) // 2
    if trials < SMALLEST_HALF:
        fewest = min(scores, key=lambda each: each.statistics.trials).summary
        raise ScoresError(
            f"experiment '{fewest.experiment}' has {fewest.trials} trials, a comparison needs at least {2 * SMALLEST_HALF}: "
            f"raise subsets.trials"
        )
    compared = _compare_all(names, scores, trials)
    rows = [
        ({"compared": label, "split": number, "trials": trials, "rank_correlation": each.rank_correlation}, agreement)
        for label, splits in compared.items()
        for number, each in enumerate(splits)
        for agreement in each.agreements
    ]
    summaries = [each.summary for each in scores]
    findings = [
        *(_of_experiment(record, summary) for record, summary in zip(records, summaries, strict=True)),
        f"Each comparison is between two disjoint sets of {trials} trials; two sets of one model differ by chance alone. Brackets hold the "
        f"range over {SPLITS} random splits of the trials.",
        *(_of_comparison(label, splits) for label, splits in compared.items()),
    ]
    result = StudyResult(
        store,
        names[0],
        "architectures",
        f"Agreement of {', '.join(names[:-1])} and {names[-1]}",
        findings,
        sum(summary.trials for summary in summaries),
        names,
        {"scores": {name: each.folder.name for name, each in zip(names, scores, strict=True)}},
        {"trials": trials, "agreement": {label: _means(splits) for label, splits in compared.items()}},
    )
    write_result(result, table(rows), _draw(compared, trials))
    return result


def _compare_all(names: list[str], scores: list[Scores], trials: int) -> dict[str, list[Comparison]]:
    """Compare all pairs of experiments, and each with itself, in every split; by label."""
    labels = scores[0].train_labels, scores[0].test_labels
    statistics = [each.statistics for each in scores]
    compared: dict[str, list[Comparison]] = {}
    for split in range(SPLITS):
        halves = [[Estimates.of(own.select(half), *labels) for half in _halves(own, trials, split)] for own in statistics]
        for i, j in combinations_with_replacement(range(len(names)), 2):
            label = f"{names[i]} and {names[j]}" if i != j else f"{names[i]} and itself"
            compared.setdefault(label, []).append(compare(halves[i][0], halves[j][1]))
    return compared


def _halves(packed: PackedTrials, trials: int, split: int) -> list[npt.NDArray[np.int64]]:
    """Draw two disjoint sets of `trials` trials each, by their indices.

    A trial is in the same set in every experiment, unless too many trials of one set diverged: experiments with the same seed have the
    subset of trial k in common, so comparing trial k with itself would overstate the agreement. Of trials 2 k and 2 k + 1, chance puts one
    in each set.
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


def _overlaps(splits: list[Comparison], score: Score) -> list[float | None]:
    return [each.at_paper_threshold(score).jaccard for each in splits]


def _means(splits: list[Comparison]) -> dict[str, float | None]:
    means: dict[str, float | None] = {score: mean_defined(_overlaps(splits, score)) for score in splits[0].scores}
    return means | {"rank_correlation": mean_defined(each.rank_correlation for each in splits)}


def _of_experiment(record: Record, summary: ScoreSummary) -> str:
    memorized = summary.mem_share(PAPERS["memorization"])
    share = "no training example has an estimate" if memorized is None else f"{memorized:.2%} of the training examples are memorized"
    facts = [f"{share} ({summary.names.mem} >= {PAPERS['memorization']})"]
    if summary.test_accuracy is not None:
        facts = [f"test {summary.names.mean} {summary.test_accuracy:.2%}", *facts, _pairs(summary)]
    return f"{record.experiment.name} ({_trained(record.experiment)}, {summary.trials} trials): {', '.join(facts)}."


def _pairs(summary: ScoreSummary) -> str:
    paper = f"{summary.pairs.count} pairs of {summary.names.infl} >= {PAPERS['influence']}"
    return paper if summary.selected_pairs is None else f"{summary.selected_pairs.count} selected pairs, {paper}"


def _trained(experiment: Experiment) -> str:
    """Name the model, the code that trains it, or where its trials come from."""
    match experiment.trainer:
        case FunctionTrainer(function=function):
            return function
        case CommandTrainer(command=command):
            return " ".join(command)
        case ImportedTrainer(imported=origin):
            return origin
    return experiment.model.name


def _of_comparison(label: str, splits: list[Comparison]) -> str:
    parts = []
    selected: dict[Score, str] = {"memorization": "memorized examples", "influence": f"pairs of infl >= {PAPERS['influence']}"}
    for score in splits[0].scores:
        items = selected[score]
        overlap = _with_range(_overlaps(splits, score))
        parts.append(f"neither selects {items}" if overlap is None else f"{items} overlap by {overlap}")
    ranks = _with_range([each.rank_correlation for each in splits])
    if ranks is not None:
        parts.append(f"memorization scores have a rank correlation of {ranks}")
    return f"{label}: {', '.join(parts)}."


def _with_range(values: Sequence[float | None]) -> str | None:
    """Format the mean and the range of the values that are defined; None if there are none."""
    defined = [value for value in values if value is not None]
    return f"{sum(defined) / len(defined):.3f} ({min(defined):.3f} to {max(defined):.3f})" if defined else None


def _draw(compared: dict[str, list[Comparison]], trials: int) -> "Figure":
    from memtail.figures.style import COLOURS, drawing

    with drawing(7.5, 5.6) as figure:
        scores = next(iter(compared.values()))[0].scores
        grid = figure.subplots(2, len(scores), sharex="col", squeeze=False)
        for number, (label, splits) in enumerate(compared.items()):
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": "--" if label.endswith(" and itself") else "-"}
            for column, score in enumerate(scores):
                draw_by_threshold(grid[0, column], splits[0].agreements, score, "jaccard", label=label if column == 0 else None, **style)
                draw_by_threshold(grid[1, column], splits[0].agreements, score, "difference", **style)
        figure.suptitle(f"{trials} trials each")
        for column, title in enumerate(("memorized examples", "pairs")[: len(scores)]):
            grid[0, column].set(xlabel="", title=title)
        grid[0, 0].set(ylabel="overlap (Jaccard)")
        grid[1, 0].set(ylabel="mean difference of scores")
        figure.legend(loc="outside lower center", ncols=2)
    return figure
