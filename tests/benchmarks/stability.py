"""Statistical rows: how well two disjoint runs agree on pairs and on memorized examples, by the paper's thresholds and by other selections.

    make bench ROW=stability-digits     trains 8,000 trials with each of four seeds: a quarter of an hour on two cores
    make bench ROW=stability-mnist      trains 4,000 trials on 3,000 images of MNIST: a quarter of an hour and more

The trials of one experiment are split at random, several times, into two sets of t trials and the rest. Columns of each number of trials:

* overlap: the Jaccard coefficient of what the two sets select.
* recall: the share of what the first rule, the paper's, selects from all trials that a set of t trials selects.
* right: the share of what the first set selects whose influence, or memorization, is above 0 in the rest at a mid-p of 0.05, by Fisher's
  exact test.
* number: how much is selected.

Memorized examples are selected twice: by the paper's threshold, and as the k of the largest estimate, averaged over k from half to twice
the number that the threshold selects. Where few examples are memorized there are gaps between them, and a threshold in a gap, or beside
one, says little about an estimate.

The targets compare adjusted influence with the thresholds of the paper at twice the trials, and other estimates of memorization with mem at
3/2 of them: at least the overlap, and 0.9 of the recall with equal trials. Differences of overlaps come with the standard error of their
mean over the seeds. The constants of `memtail.estimators.adjusted` were chosen on experiments of seed 0, which the rows do not measure.

The rows write the overlaps to `stability.json` and draw them into the documentation. CIFAR-10 was trained on a GPU.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from scipy.stats import hypergeom

import memtail
from memtail.estimators import high_influence_pairs, memorization
from memtail.estimators.adjusted import select_pairs
from memtail.estimators.binomial import Floats, normal_tail
from memtail.estimators.pairs import MEM_THRESHOLD
from memtail.experiment_store import ExperimentStore
from memtail.figures.style import COLOURS, drawing, encoded
from memtail.statistics.accumulator import PackedTrials
from memtail.statistics.soft import ONE
from memtail.storage.local import LocalStore
from memtail.trials import unpack
from tests.benchmarks import training
from tests.benchmarks.bench import Row

TRIALS = (125, 250, 500, 1000, 2000)
# What two thirds of these numbers of trials select is compared with what all of them do.
TWO_THIRDS = {round(2 * number / 3): number for number in TRIALS}
OVERLAPS = Path(__file__).with_name("stability.json")
_PICTURES = Path(__file__).parents[2] / "docs/concepts"
_LEVELS = np.arange(ONE + 1).clip(0.5, ONE - 0.5)
# Log-odds of each score.
_ODDS = np.log(_LEVELS / (ONE - _LEVELS)).astype(np.float32)
# A share of what is right is measured in at least this many trials.
_REST = 400

Keys = npt.NDArray[np.int64]
Bits = npt.NDArray[np.bool_]


class Stability(NamedTuple):
    """Means over the splits; see the module."""

    overlap: float
    recall: float
    right: float
    number: float


#: By rule and number of trials.
Measured = dict[tuple[str, int], Stability]


class Selection(NamedTuple):
    """Rules that select from some trials.

    Attributes:
        rules: their names; the first is the paper's.
        select: from the indices of trials, the selections of each rule, as many of each: int64 numbers.
        right: from the indices of other trials and a selection, the share that is right.
    """

    rules: tuple[str, ...]
    select: Callable[[Keys], list[list[Keys]]]
    right: Callable[[Keys, Keys], float]


def of_pairs(packed: PackedTrials, train_labels: Keys, test_labels: Keys) -> Selection:
    """Select pairs, as numbers train * q + test."""

    def select(trials: Keys) -> list[list[Keys]]:
        part = packed.select(trials)
        mem = memorization(part)
        by_thresholds = high_influence_pairs(part, mem, train_labels, test_labels)
        by_rule = by_thresholds, select_pairs(part, mem.value, train_labels, test_labels)
        return [[pairs.train * packed.n_test + pairs.test] for pairs in by_rule]

    def right(trials: Keys, keys: Keys) -> float:
        part, (train, test) = packed.select(trials), np.divmod(keys, packed.n_test)
        both = np.bitwise_count(part.membership[:, train] & part.test_correct[:, test]).sum(0, dtype=np.int64)
        return _right(both, part.k_in[train], part.correct_on_test[test], part.trials)

    return Selection(("thresholds of the paper", "adjusted influence"), select, right)


class Outcomes(NamedTuple):
    """Membership, correctness and scores in 255ths of training examples, each [t, n]."""

    members: Bits
    correct: Bits
    scores: npt.NDArray[np.uint8]


def of_examples(outcomes: Outcomes, sizes: Sequence[int] = ()) -> Selection:
    """Select memorized examples: those of the largest estimates, for each of `sizes`; without, those of at least the threshold.

    The third estimate takes the log-odds for normal, with one variance and two means, inside and outside the subsets: Phi(mean / sd)
    takes the place of the rate of correct models.
    """

    def select(trials: Keys) -> list[list[Keys]]:
        members, correct, scores = (each[trials] for each in outcomes)
        k_in = members.sum(0)

        def means(results: npt.NDArray[Any]) -> tuple[Floats, Floats]:
            total, inside = results.sum(0, dtype=np.float64), (members * results).sum(0, dtype=np.float64)
            return inside / k_in, (total - inside) / (len(trials) - k_in)

        def chosen(inside: Floats, outside: Floats) -> list[Keys]:
            order = np.argsort(outside - inside, kind="stable")
            return [order[:size] for size in sizes] or [np.flatnonzero(inside - outside >= MEM_THRESHOLD)]

        odds = _ODDS[scores]
        inside, outside = means(odds)
        variance = np.maximum(np.mean(odds**2, 0) - (inside**2 * k_in + outside**2 * (len(trials) - k_in)) / len(trials), 0.01)
        of_normal = (normal_tail(-mean / np.sqrt(variance)) for mean in (inside, outside))
        return [chosen(*means(correct)), chosen(*means(scores / np.float32(ONE))), chosen(*of_normal)]

    def right(trials: Keys, keys: Keys) -> float:
        members, correct = (each[np.ix_(trials, keys)] for each in (outcomes.members, outcomes.correct))
        return _right((members & correct).sum(0), members.sum(0), correct.sum(0), len(trials))

    return Selection(("mem", "mem_p", "normal log-odds"), select, right)


def _right(both: Keys, k_in: Keys, correct: Keys, trials: int) -> float:
    null = hypergeom(trials, correct, k_in)
    return float((null.sf(both) + null.pmf(both) / 2 <= 0.05).mean())


def stability(selection: Selection, counted: Keys, numbers: Sequence[int], splits: int) -> Measured:
    """Measure each rule at each of some numbers of trials, of which twice as many are among the `counted` ones."""
    reference = selection.select(counted)[0]
    rng, drawn = np.random.default_rng(0), {}
    for trials in (number for number in numbers if 2 * number <= len(counted)):
        for _ in range(splits):
            first, second, rest = np.split(rng.permutation(counted), [trials, 2 * trials])
            for rule, ones, others in zip(selection.rules, selection.select(first), selection.select(second), strict=True):
                for one, other, paper in zip(ones, others, reference, strict=True):
                    recalls = [len(np.intersect1d(keys, paper)) / len(paper) for keys in (one, other)]
                    overlap = len(np.intersect1d(one, other)) / max(1, len(np.union1d(one, other)))
                    right = selection.right(rest, one) if len(rest) >= _REST and len(one) else np.nan
                    drawn.setdefault((rule, trials), []).append((overlap, np.mean(recalls), right, (len(one) + len(other)) / 2))
    return {key: Stability(*np.mean(values, 0)) for key, values in drawn.items()}


def digits() -> list[Row]:
    """Measure on the digits, with 8,000 trials of each of four seeds."""
    sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "nesterov": True}
    return _row("digits", {"name": "digits"}, {"epochs": 20, "optimizer": sgd}, 8000, 12, seeds=(1, 2, 3, 4))


def mnist() -> list[Row]:
    """Measure on 3,000 and 1,500 images of MNIST, from `MEMTAIL_DATA` or from the data of the tests, with 4,000 trials."""
    sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
    dataset = {**training.mnist(), "max_train": 3000, "max_test": 1500}
    return _row("mnist", dataset, {"epochs": 15, "optimizer": sgd}, 4000, 4, seeds=(1,))


def _row(name: str, dataset: dict[str, Any], recipe: dict[str, Any], trials: int, splits: int, seeds: Sequence[int]) -> list[Row]:
    times, measured = [], []
    for seed in seeds:
        experiment = memtail.Experiment.model_validate(
            {
                "name": f"stability-{name}",
                "dataset": dataset,
                "model": {"name": "mlp", "hidden": [128]},
                "training": {"batch_size": 64, "schedule": {"name": "cosine", "warmup": 0.1}, **recipe},
                "subsets": {"design": "uniform", "fraction": 0.7, "trials": trials, "seed": seed},
                "record": {"scores": True},
            }
        )
        with tempfile.TemporaryDirectory() as store:
            memtail.run(experiment, store=store)
            began = time.perf_counter()
            measured.append(by_kind(store, experiment.name, splits))
        times.append(time.perf_counter() - began)
    notes = [summarized(f"{name}, {kind}", kind, [each[kind] for each in measured]) for kind in measured[0]]
    overlaps = json.loads(OVERLAPS.read_text())
    for kind in measured[0]:
        overlaps[kind][name] = curves([each[kind] for each in measured])
    OVERLAPS.write_text(json.dumps(overlaps, indent=1) + "\n")
    draw(overlaps)
    return [Row(f"stability-{name}", "seed", "at least 0", times, note="; ".join(notes))]


PAIRS, THRESHOLD, LARGEST = "pairs", "examples of at least 0.25", "examples of the largest estimate"


def by_kind(store: str, name: str, splits: int) -> dict[str, Measured]:
    """Measure the selections of pairs and of examples in a finished experiment with recorded scores."""
    scores = memtail.load_scores(f"{store}/experiments/{name}")
    counted, outcomes = scores.statistics.counted_trials, _outcomes(store, name)
    everything = np.arange(len(outcomes.members))
    by_threshold = of_examples(outcomes)
    memorized = len(by_threshold.select(everything)[0][0])
    largest = of_examples(outcomes, np.rint(memorized * np.geomspace(0.5, 2, 9)).astype(int).tolist())
    numbers = sorted({*TRIALS, *TWO_THIRDS})
    return {
        PAIRS: stability(of_pairs(scores.statistics, scores.train_labels, scores.test_labels), counted, TRIALS, splits),
        THRESHOLD: stability(by_threshold, everything, numbers, splits),
        LARGEST: stability(largest, everything, numbers, splits),
    }


def _outcomes(store: str, name: str) -> Outcomes:
    experiment = ExperimentStore(LocalStore(Path(store)), name)
    record = experiment.read_record()
    batches = [experiment.batch(shard, record) for shard in experiment.committed()]
    return Outcomes(
        np.concatenate([unpack(batch.membership, batch.n_train) for batch in batches]),
        np.concatenate([batch.correctness()[0] for batch in batches]),
        np.concatenate([batch.train_score for batch in batches]),
    )


def summarized(title: str, kind: str, measured: list[Measured]) -> str:
    """Print the means over the seeds, and return by how much other rules with fewer trials differ from the first, with standard errors."""
    means = {key: Stability(*np.mean([each[key] for each in measured], 0)) for key in measured[0]}
    rules, numbers = (list(dict.fromkeys(part)) for part in zip(*means, strict=True))
    table = Table(title=f"{title}: overlap, recall, right, number", title_justify="left")
    for column in ("selection", *(f"t = {number:,}" for number in numbers)):
        table.add_column(column)
    for rule in rules:
        cells = (means[rule, number] for number in numbers)
        table.add_row(rule, *(f"{one.overlap:.3f}  {one.recall:.2f}  {one.right:.2f}  {one.number:.0f}" for one in cells))
    Console(width=180).print(table)
    compared = {number // 2: number for number in TRIALS if number // 2 in numbers} if kind == PAIRS else TWO_THIRDS
    notes = []
    for rule, (few, many) in product(rules[1:], compared.items()):
        if many not in numbers:
            continue
        differences = [each[rule, few].overlap - each[rules[0], many].overlap for each in measured]
        error = f" ± {np.std(differences, ddof=1) / np.sqrt(len(differences)):.3f}" if len(differences) > 1 else ""
        right, enough = not means[rule, few].right < 0.9, means[rule, few].recall >= 0.9 * means[rules[0], few].recall
        met = "" if np.mean(differences) >= 0 and right and enough else " MISSED"
        notes.append(f"{rule}, {few} against {many}: {np.mean(differences):+.3f}{error}{met}")
    return f"{kind}: " + "; ".join(notes)


def curves(measured: list[Measured]) -> dict[str, dict[str, float]]:
    """Mean overlaps over the seeds, by rule and number of trials."""
    found: dict[str, dict[str, float]] = {}
    for rule, number in measured[0]:
        found.setdefault(rule, {})[str(number)] = round(float(np.mean([each[rule, number].overlap for each in measured])), 3)
    return found


def draw(overlaps: dict[str, dict[str, dict[str, dict[str, float]]]]) -> None:
    """Draw the overlaps against the number of trials into the documentation: a picture of pairs, and one of memorized examples."""
    for kind, stem, ylim in ((PAIRS, "pairs", (0, 1)), (LARGEST, "memorized", (0.8, 1))):
        with drawing(3.2 * len(overlaps[kind]), 3) as figure:
            axes = figure.subplots(1, len(overlaps[kind]), sharey=True, squeeze=False)[0]
            for place, (name, by_rule) in zip(axes, overlaps[kind].items(), strict=True):
                for colour, (rule, curve) in zip(COLOURS, by_rule.items(), strict=False):
                    place.plot([int(number) for number in curve], list(curve.values()), marker="o", markersize=4, color=colour, label=rule)
                place.set_xscale("log")
                place.set_xticks(TRIALS, [f"{number:,}" for number in TRIALS])
                place.minorticks_off()
                place.set(xlabel="trials t", title=TITLES[name], ylim=ylim)
            axes[0].set_ylabel("overlap of two runs (Jaccard)")
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        (_PICTURES / f"stability-{stem}.png").write_bytes(encoded(figure)["png"])


TITLES = {"digits": "digits", "mnist": "MNIST, 3,000 images", "cifar10": "CIFAR-10, 5,000 images"}
ROWS: dict[str, Callable[[], list[Row]]] = {"stability-digits": digits, "stability-mnist": mnist}
