"""Content of the report, chosen from the scores: data of the figures, examples, pairs, labels and warnings.

Reads no image but those shown, and draws nothing.
"""

from collections.abc import Sequence

import numpy as np

from memtail.datasets import Dataset
from memtail.errors import ScoresError
from memtail.estimators import convergence, expected_standard_error, false_discovery, influence
from memtail.estimators.binomial import Floats, share, standard_error
from memtail.estimators.pairs import MEM_THRESHOLD
from memtail.estimators.soft import mean_score, scores_on_test
from memtail.experiment_store import Record
from memtail.report.items import Content, Discoveries, DoubtfulLabel, EpochStage, Example, Number, Pair, SoftScores
from memtail.scores.reader import Scores, largest
from memtail.scores.summary import ACCURACIES, MEM_STEPS, SE_QUANTILES, ScoreSummary
from memtail.statistics.accumulator import PackedTrials, unpack_words
from memtail.studies.result import StudyResult
from memtail.trials import Shard

#: Edges of the histogram of memorization.
EDGES = np.linspace(-1, 1, 41)
#: False discovery rate up to which a pair passes a test of correctness.
DISCOVERY_RATE = 0.05
#: Memorization from which a label is doubtful: most models that did not see the example predict another class.
LABEL_MEM = 0.5
#: Degrees of memorization in the gallery, which shows the examples nearest to each.
GALLERY_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)

_GALLERY_EACH = 2
_GALLERY_EACH_UNLABELLED = 6
_GALLERY_CLASSES = 10
_MOST_PAIRS = 20
# Pairs by the thresholds of the paper are shown in at least this number, else only those that pass the test.
_FEWEST_PAIRS = 6
_RANDOM_OTHERS = 4
_MOST_LABELS = 30
_MOST_SHARDS = 5
# Lower in-subset accuracy than this means that models do not fit their subsets, so they memorize little.
_FITTED = 0.95


def choose_content(
    record: Record, scores: Scores, dataset: Dataset, studies: Sequence[StudyResult], different: Sequence[Shard] = ()
) -> Content:
    """Choose the content of an experiment's report.

    Args:
        record: the experiment.
        scores: its published scores.
        dataset: its images.
        studies: results of its studies.
        different: the shards of which two trainings differ.

    Raises:
        ScoresError: the scores are damaged, or no example has an estimate.
    """
    packed, summary = scores.statistics, scores.summary
    if summary.without_estimate == summary.n_train:
        raise ScoresError(
            f"experiment '{record.experiment.name}' has no training example that some models saw and others did not, so no scores to "
            f"report: use another design of subsets"
        )
    fraction = float(packed.k_in.mean() / packed.trials)
    expected = expected_standard_error(packed.trials, fraction)
    accuracies = {
        key: Number(summary[key], np.nan if (se := summary.accuracy_se[key]) is None else se)
        for key in ACCURACIES
        if summary[key] is not None
    }
    pairs, discoveries = _pairs(scores, dataset) if dataset.n_test else ([], None)
    gallery = _gallery(scores, dataset)
    labels, doubtful = _doubtful_labels(scores, dataset) if dataset.labelled and not scores.scores_only else ([], 0)
    return Content(
        record=record,
        summary=summary,
        warnings=_warnings(summary, discoveries, different),
        accuracies=accuracies,
        stages=convergence(packed, MEM_STEPS, SE_QUANTILES, EDGES),
        fraction=fraction,
        expected_se=expected,
        kind=dataset.kind,
        gallery=gallery,
        classes=len(np.unique(dataset.train_labels)) if dataset.labelled else 0,
        pairs=pairs,
        discoveries=discoveries,
        labels=labels,
        doubtful=doubtful,
        soft=_soft(scores),
        epochs=_epochs(scores),
        others_recorded="other" in scores.memorization,
        studies=studies,
    )


def _soft(scores: Scores) -> SoftScores | None:
    if scores.scores_only or "mem_p" not in scores.memorization:
        return None
    import pandas as pd  # slow to import, and only these scores need it

    mem, mem_p = (scores.memorization[name] for name in ("mem", "mem_p"))
    both = ~np.isnan(mem)
    ranks = [pd.Series(values[both]).rank() for values in (mem, mem_p)]
    return SoftScores(mem[both], mem_p[both], float(mem_p[both].mean()), float(ranks[0].corr(ranks[1])))


def _epochs(scores: Scores) -> list[EpochStage]:
    if scores.snapshots is None:
        return []
    final, stages = scores.memorization["mem"], []
    memorized = np.flatnonzero(final >= MEM_THRESHOLD)
    for epoch in np.unique(scores.snapshots["epoch"]).tolist():
        mem = scores.snapshots["mem"][scores.snapshots["epoch"] == epoch]  # by example, in order
        defined, at_end = mem[~np.isnan(mem)], mem[memorized]
        quartiles = np.nanquantile(at_end, (0.25, 0.5, 0.75)).tolist() if len(at_end) else [np.nan] * 3
        stages.append(EpochStage(epoch, [float((defined >= step).mean()) for step in MEM_STEPS], tuple(quartiles)))
    return stages


def _warnings(summary: ScoreSummary, discoveries: Discoveries | None, different: Sequence[Shard]) -> list[str]:
    warnings = []
    fitted = summary.in_subset_accuracy
    if summary.few_trials:
        of_pairs = _trust(summary, discoveries)
        warnings.append(
            f"{summary.few_trials}{of_pairs} Noise {'also ' if of_pairs else ''}lifts examples above a threshold of memorization, "
            f"more of them the lower the threshold is; intervals do not show this."
        )
    if fitted is not None and fitted < _FITTED and summary.outcome == "correct":
        warnings.append(
            f"Models classify {fitted:.1%} of their subsets correctly. Memorization is meaningful for models that fit their subsets: "
            f"train longer, or with a higher learning rate, before you trust these scores."
        )
    if summary.without_estimate:
        warnings.append(f"{summary.without_estimate} training examples were in every subset or in none, so they have no estimate.")
    if summary.diverged:
        warnings.append(f"{summary.diverged} trials diverged and are left out.")
    if summary.mixture:
        warnings.append(f"Trials of several kinds: {summary.mixture}. Equal trials may have different bits on them.")
    if different:
        spans = ", ".join(shard.span for shard in different[:_MOST_SHARDS]) + (", ..." if len(different) > _MOST_SHARDS else "")
        warnings.append(
            f"{len(different)} shards were trained twice with different outcomes, of which the first counts (trials {spans}): memtail "
            f"status names the devices. On devices of different kinds outcomes may differ; on equal ones a device or the model is at fault."
        )
    return warnings


def _trust(summary: ScoreSummary, discoveries: Discoveries | None) -> str:
    """Say which pairs to trust, if any test says so."""
    selected = summary.selected_pairs
    if not summary.n_test:
        return ""
    if selected is not None and not selected.count:
        return " No pair is selected: trust none."
    if selected is not None:
        chance = f"at most {selected.false_discovery_rate:.0%} of which are expected to be chance"
        return f" Of all pairs, trust the {selected.count:,} selected ones, {chance}, and no others."
    if discoveries is None:
        return ""
    return (
        f" Trust the {discoveries.high:,} of {summary.pairs.count:,} pairs that pass at a false discovery rate of {DISCOVERY_RATE:.0%}, "
        f"and no others."
    )


def _example(dataset: Dataset, split: str, index: int, scores: Scores | None = None) -> Example:
    labels, files = (dataset.train_labels, dataset.train_files) if split == "train" else (dataset.test_labels, dataset.test_files)
    file = None if files is None else bytes(files[index]).decode(errors="replace")
    mem = None
    if scores is not None:
        value, se = (float(scores.memorization[column][index]) for column in (scores.names.mem, scores.names.mem_se))
        mem = Number(value, se, (float(scores.mem_lo[index]), float(scores.mem_hi[index])))
    return Example(split, int(index), _class(dataset, int(labels[index])), file, mem)


def _class(dataset: Dataset, label: int) -> str | None:
    return dataset.classes[label] if dataset.labelled else None


def _gallery(scores: Scores, dataset: Dataset) -> list[tuple[str | None, list[list[Example]]]]:
    """Choose the classes with the most memorized examples, and of each the examples nearest to every step of memorization."""
    mem, labels = scores.memorization[scores.names.mem], scores.train_labels
    memorized = np.bincount(labels[mem >= MEM_THRESHOLD], minlength=len(dataset.classes))
    present = np.bincount(labels, minlength=len(dataset.classes)) > 0
    most = [label for label in np.argsort(-memorized, kind="stable").tolist() if present[label]][:_GALLERY_CLASSES]
    each = _GALLERY_EACH if dataset.labelled else _GALLERY_EACH_UNLABELLED
    reach = (GALLERY_STEPS[1] - GALLERY_STEPS[0]) / 2
    rows = []
    for label in sorted(most):
        own = np.flatnonzero(labels == label)
        row = []
        for step in GALLERY_STEPS:
            distance = np.abs(mem[own] - step)
            near = own[largest(np.where(distance < reach, -distance, np.nan), each)]
            row.append([_example(dataset, "train", index, scores) for index in near.tolist()])
        rows.append((_class(dataset, label), row))
    return rows


def _pairs(scores: Scores, dataset: Dataset) -> tuple[list[Pair], Discoveries | None]:
    """Choose the pairs shown, and count those that pass a test of correctness."""
    rates, discoveries = (None, None) if scores.scores_only else _discoveries(scores, dataset)
    if scores.summary.selected_pairs is not None:
        return _selected_pairs(scores, dataset), discoveries
    return _high_pairs(scores, dataset, rates), discoveries


def _discoveries(scores: Scores, dataset: Dataset) -> tuple[Floats, Discoveries]:
    """Test the pairs by the thresholds of the paper; returns their false discovery rates, and how many pass."""
    labels = np.asarray(dataset.train_labels), np.asarray(dataset.test_labels)
    found = false_discovery(scores.statistics, scores.memorization["mem"], *labels, scores.pairs["tr_idx"], scores.pairs["tt_idx"])
    high, passed = (int((rates <= DISCOVERY_RATE).sum()) for rates in (found.rate, found.kept))
    return found.rate, Discoveries(high, found.tested, passed)


def _selected_pairs(scores: Scores, dataset: Dataset) -> list[Pair]:
    """Choose the strongest selected pairs."""
    table, names, rng = scores.strongest_pairs(_MOST_PAIRS), scores.names, np.random.default_rng(0)
    columns = ("tr_idx", "tt_idx", names.infl, names.infl_se, "infl_lo", "infl_hi", "infl_adjusted", "q_value", "confirmed")
    return [
        _pair(scores, dataset, rng, train, test, Number(infl, se, (low, high)), adjusted, rate, confirmed)
        for train, test, infl, se, low, high, adjusted, rate, confirmed in zip(*(table[name].tolist() for name in columns), strict=True)
    ]


def _high_pairs(scores: Scores, dataset: Dataset, rates: Floats | None) -> list[Pair]:
    """Choose pairs by the thresholds of the paper: those that pass the test first, then the others, both by falling influence."""
    table, names, rng = scores.pairs, scores.names, np.random.default_rng(0)
    rates = np.full(len(table["tr_idx"]), np.nan) if rates is None else rates
    passes = rates <= DISCOVERY_RATE
    fewest = _MOST_PAIRS if scores.scores_only else _FEWEST_PAIRS
    places = np.argsort(~passes, kind="stable")[: min(max(int(passes.sum()), fewest), _MOST_PAIRS)]
    columns = (table["tr_idx"], table["tt_idx"], table[names.infl], table[names.infl_se], rates, passes)
    return [
        _pair(scores, dataset, rng, train, test, Number(infl, se), None, rate, confirmed)
        for train, test, infl, se, rate, confirmed in zip(*(column[places].tolist() for column in columns), strict=True)
    ]


def _pair(
    scores: Scores,
    dataset: Dataset,
    rng: np.random.Generator,
    train: int,
    test: int,
    influence: Number,
    adjusted: float | None,
    rate: float,
    confirmed: bool,
) -> Pair:
    """Add the examples to estimates, the accuracies with and without the training example, and others of its class."""
    labels = np.asarray(dataset.train_labels)
    mean_in, mean_out = _means(scores.statistics, train, test)
    others = np.flatnonzero((labels == labels[train]) & (np.arange(len(labels)) != train))
    drawn = rng.choice(others, min(_RANDOM_OTHERS, len(others)), replace=False).tolist()
    return Pair(
        test=_example(dataset, "test", test),
        train=_example(dataset, "train", train, scores),
        influence=influence,
        accuracy_in=mean_in,
        accuracy_out=mean_out,
        adjusted=adjusted,
        rate=rate,
        confirmed=confirmed,
        others=[_example(dataset, "train", index, scores) for index in drawn],
    )


def _means(packed: PackedTrials, train: int, test: int) -> tuple[Number, Number]:
    """Accuracy on a test example, or mean score, of the models that saw a training example, and of those that did not."""
    if packed.scores_only:
        members, scores = unpack_words(packed.membership[:, train])[packed.counted_mask], scores_on_test(packed, test)
        return Number(*mean_score(scores[members])), Number(*mean_score(scores[~members]))
    one = influence(packed, np.array([train]), np.array([test]))
    both, k_in, correct, k_out = int(one.both[0, 0]), int(one.k_in[0]), int(one.correct[0]), int(one.trials - one.k_in[0])
    return _share(both, k_in), _share(correct - both, k_out)


def _doubtful_labels(scores: Scores, dataset: Dataset) -> tuple[list[DoubtfulLabel], int]:
    """Choose the doubtful labels shown, and count all.

    Order: lowest held-out accuracy first, then lowest held-out margin or, without margins, the largest share that predicts one other class.
    """
    table = scores.memorization
    mem, p_out, k_out = table["mem"], table["p_out"], table["k_out"]
    margin = table.get("margin_out")
    doubtful = np.flatnonzero(mem >= LABEL_MEM)
    belief = margin if margin is not None else -np.nan_to_num(table.get("p_other", np.zeros(len(mem))))
    order = np.lexsort((-mem[doubtful], belief[doubtful], p_out[doubtful]))
    shown = []
    for index in doubtful[order][:_MOST_LABELS].tolist():
        other = other_share = None
        if "other" in table and table["other"][index] >= 0:
            other = dataset.classes[int(table["other"][index])]
            other_share = _share(round(float(table["p_other"][index]) * int(k_out[index])), int(k_out[index]))
        shown.append(
            DoubtfulLabel(
                example=_example(dataset, "train", index, scores),
                models=int(k_out[index]),
                held_out=_share(round(float(p_out[index]) * int(k_out[index])), int(k_out[index])),
                margin=None if margin is None else float(margin[index]),
                other=other,
                other_share=other_share,
            )
        )
    return shown, len(doubtful)


def _share(correct: int, count: int) -> Number:
    """Share of independent models that predict correctly, with its binomial standard error."""
    p = share(correct, count)
    return Number(float(p), float(standard_error(p, count)))
