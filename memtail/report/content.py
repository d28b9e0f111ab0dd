"""What the report shows, chosen from the scores: figures' data, examples and pairs, and what is to be said about them. Draws nothing.

Of a large dataset only the images shown are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from memtail.datasets import ImageDataset
from memtail.errors import ScoresError
from memtail.estimators import Stage, convergence, expected_standard_error, false_discovery, influence
from memtail.estimators.binomial import share, standard_error
from memtail.estimators.pairs import INFL_THRESHOLD, MEM_THRESHOLD
from memtail.experiment_store import Record
from memtail.scores.reader import Scores, largest
from memtail.scores.summary import ACCURACIES, MEM_STEPS, SE_QUANTILES, ScoreSummary

#: Edges of the histogram of memorization.
EDGES = np.linspace(-1, 1, 41)
#: The false discovery rate at which a pair counts as found.
DISCOVERY_RATE = 0.05
#: A label is worth a look from this memorization on: most models that did not see the example prefer another.
LABEL_MEM = 0.5
#: The gallery shows the examples nearest to these memorizations, so many of each.
GALLERY_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)

_GALLERY_EACH = 2
_GALLERY_CLASSES = 10
# As many pairs as were found, within these.
_FEWEST_PAIRS, _MOST_PAIRS = 6, 20
_RANDOM = 4
_LABELS = 30
# Scores are blurred where the largest standard error to be expected is no better than a third of the influence looked for.
_BLURRED = INFL_THRESHOLD / 3
# Models that do not fit what they saw memorize nothing.
_FITTED = 0.95


class Study(Protocol):
    """A follow-up study, as far as it is shown; `of_scores` is the version of the scores that it rests on."""

    @property
    def study(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def findings(self) -> list[str]: ...
    @property
    def trials(self) -> int: ...
    @property
    def of_scores(self) -> str | None: ...
    def figure_svg(self) -> bytes: ...


@dataclass(frozen=True)
class Number:
    """An estimate and its standard error; NaN where there is none."""

    value: float
    error: float


@dataclass(frozen=True)
class Example:
    """One image: of which split and where in it, and its class."""

    split: str
    index: int
    label: str
    file: str | None = None
    mem: Number | None = None


@dataclass(frozen=True)
class Pair:
    """A test example and the training example that it leans on.

    Attributes:
        influence: of the second on the first.
        seen, unseen: accuracy on the test example of the models that saw the training example, and of those that did not.
        rate: the false discovery rate at which the pair is kept; 1 if above `LARGEST_RATE`.
        found: whether that is at most `DISCOVERY_RATE`.
        others: random training examples of the class.
    """

    test: Example
    train: Example
    influence: Number
    seen: Number
    unseen: Number
    rate: float
    found: bool
    others: list[Example]


@dataclass(frozen=True)
class Doubt:
    """A label worth a look.

    Attributes:
        example: the training example.
        models: how many did not see it.
        held_out: accuracy on it of the models that did not see it: the confidence in its label.
        margin: their mean logit margin, None where margins were not recorded.
        other: the class that they most often gave it instead, None where that was not recorded.
        other_share: how many of them did.
    """

    example: Example
    models: int
    held_out: Number
    margin: float | None
    other: str | None
    other_share: Number | None


@dataclass(frozen=True)
class PairCounts:
    """How many pairs there are: above the thresholds, of those found at the false discovery rate, and tested in all."""

    high: int
    found: int
    train: int
    test: int
    tested: int
    kept: int


@dataclass(frozen=True)
class Content:
    """All that the page says. `fraction` of the training examples is what a trial saw, `doubtful` the number of all doubts."""

    record: Record
    summary: ScoreSummary
    warnings: list[str]
    accuracies: dict[str, Number]
    stages: list[Stage]
    fraction: float
    expected_error: float
    gallery: list[tuple[str, list[list[Example]]]]
    gallery_of: int
    pairs: list[Pair]
    counts: PairCounts
    doubts: list[Doubt]
    doubtful: int
    others_recorded: bool
    studies: Sequence[Study]


def content(record: Record, scores: Scores, dataset: ImageDataset, studies: Sequence[Study]) -> Content:
    """Choose what to show.

    Args:
        record: the experiment's.
        scores: of it.
        dataset: of it.
        studies: of it.

    Raises:
        ScoresError: the scores are damaged, or no example has an estimate.
    """
    packed, summary = scores.statistics, scores.summary
    if summary.without_estimate == summary.n_train:
        raise ScoresError(
            f"experiment '{record.experiment.name}' has no training example that some models saw and others did not, so nothing to report"
        )
    fraction = float(packed.k_in.mean() / packed.trials)
    expected = expected_standard_error(packed.trials, fraction)
    accuracies = {
        key: Number(summary[key], np.nan if (error := summary.accuracy_se[key]) is None else error)
        for key in ACCURACIES
        if summary[key] is not None
    }
    pairs, counts = _pairs(scores, dataset)
    gallery = _gallery(scores, dataset)
    doubts, doubtful = _doubts(scores, dataset)
    return Content(
        record=record,
        summary=summary,
        warnings=_warnings(summary, expected, counts),
        accuracies=accuracies,
        stages=convergence(packed, MEM_STEPS, SE_QUANTILES, EDGES),
        fraction=fraction,
        expected_error=expected,
        gallery=gallery,
        gallery_of=len(np.unique(dataset.train_labels)),
        pairs=pairs,
        counts=counts,
        doubts=doubts,
        doubtful=doubtful,
        others_recorded="other" in scores.memorization,
        studies=studies,
    )


def _warnings(summary: ScoreSummary, expected: float, counts: PairCounts) -> list[str]:
    said = []
    trials, fitted = summary.trials, summary.in_subset_accuracy
    if expected > _BLURRED:
        said.append(
            f"These scores come from {trials} trials only: a score near one half may be off by a standard error of {expected:.3f}. "
            f"A fixed threshold of influence then picks chance too, so believe the {counts.found:,} of {counts.high:,} pairs that keep a "
            f"false discovery rate of {DISCOVERY_RATE:.0%}, and no others. Noise also lifts examples above a threshold of memorization, "
            f"the more of them the lower it is, which no standard error shows. More trials sharpen everything: four times as many halve "
            f"the errors."
        )
    if fitted is not None and fitted < _FITTED:
        said.append(
            f"Models got {fitted:.1%} of what they saw right. Memorization is measured on models that fit what they saw: "
            f"train longer, or with a higher learning rate, before believing these scores."
        )
    if summary.without_estimate:
        said.append(f"{summary.without_estimate} training examples were in every subset or in none, and have no estimate.")
    if summary.diverged:
        said.append(f"{summary.diverged} trials diverged, and are left out.")
    return said


def _example(dataset: ImageDataset, split: str, index: int, scores: Scores | None = None) -> Example:
    labels, files = (dataset.train_labels, dataset.train_files) if split == "train" else (dataset.test_labels, dataset.test_files)
    file = None if files is None else bytes(files[index]).decode(errors="replace")
    mem = None if scores is None else Number(*(float(scores.memorization[column][index]) for column in ("mem", "mem_se")))
    return Example(split, int(index), dataset.classes[int(labels[index])], file, mem)


def _gallery(scores: Scores, dataset: ImageDataset) -> list[tuple[str, list[list[Example]]]]:
    """The classes with the most memorized examples; of each the examples nearest to every step, if nearer to it than to another."""
    mem, labels = scores.memorization["mem"], scores.memorization["label"]
    memorized = np.bincount(labels[mem >= MEM_THRESHOLD], minlength=len(dataset.classes))
    present = np.bincount(labels, minlength=len(dataset.classes)) > 0
    most = [label for label in np.argsort(-memorized, kind="stable").tolist() if present[label]][:_GALLERY_CLASSES]
    reach = (GALLERY_STEPS[1] - GALLERY_STEPS[0]) / 2
    shown = []
    for label in sorted(most):
        own = np.flatnonzero(labels == label)
        row = []
        for step in GALLERY_STEPS:
            distance = np.abs(mem[own] - step)
            near = own[largest(np.where(distance < reach, -distance, np.nan), _GALLERY_EACH)]
            row.append([_example(dataset, "train", index, scores) for index in near.tolist()])
        shown.append((dataset.classes[label], row))
    return shown


def _pairs(scores: Scores, dataset: ImageDataset) -> tuple[list[Pair], PairCounts]:
    """Those found at the false discovery rate first, each by falling influence."""
    packed, table, mem = scores.statistics, scores.pairs, scores.memorization["mem"]
    train, test = table["tr_idx"], table["tt_idx"]
    train_labels, test_labels = np.asarray(dataset.train_labels), np.asarray(dataset.test_labels)
    discovery = false_discovery(packed, mem, train_labels, test_labels, train, test)
    found = discovery.rate <= DISCOVERY_RATE
    rng = np.random.default_rng(0)
    shown = []
    for place in np.argsort(~found, kind="stable")[: min(max(int(found.sum()), _FEWEST_PAIRS), _MOST_PAIRS)].tolist():
        i, j = int(train[place]), int(test[place])
        one = influence(packed, np.array([i]), np.array([j]))
        both, k_in, right, k_out = int(one.both[0, 0]), int(one.k_in[0]), int(one.correct[0]), int(one.trials - one.k_in[0])
        others = np.flatnonzero((train_labels == train_labels[i]) & (np.arange(len(train_labels)) != i))
        drawn = rng.choice(others, min(_RANDOM, len(others)), replace=False).tolist()
        shown.append(
            Pair(
                test=_example(dataset, "test", j),
                train=_example(dataset, "train", i, scores),
                influence=Number(float(table["infl"][place]), float(table["infl_se"][place])),
                seen=_share(both, k_in),
                unseen=_share(right - both, k_out),
                rate=float(discovery.rate[place]),
                found=bool(found[place]),
                others=[_example(dataset, "train", index, scores) for index in drawn],
            )
        )
    kept = int((discovery.kept <= DISCOVERY_RATE).sum())
    counts = PairCounts(len(train), int(found.sum()), len(np.unique(train)), len(np.unique(test)), discovery.tested, kept)
    return shown, counts


def _doubts(scores: Scores, dataset: ImageDataset) -> tuple[list[Doubt], int]:
    """The least believed first: by held-out accuracy, then by held-out margin, or else by how far models agree on another class."""
    table = scores.memorization
    mem, p_out, k_out = table["mem"], table["p_out"], table["k_out"]
    margin = table.get("margin_out")
    doubtful = np.flatnonzero(mem >= LABEL_MEM)
    belief = margin if margin is not None else -np.nan_to_num(table.get("p_other", np.zeros(len(mem))))
    order = np.lexsort((-mem[doubtful], belief[doubtful], p_out[doubtful]))
    shown = []
    for index in doubtful[order][:_LABELS].tolist():
        other = other_share = None
        if "other" in table and table["other"][index] >= 0:
            other = dataset.classes[int(table["other"][index])]
            other_share = _share(round(float(table["p_other"][index]) * int(k_out[index])), int(k_out[index]))
        shown.append(
            Doubt(
                example=_example(dataset, "train", index, scores),
                models=int(k_out[index]),
                held_out=_share(round(float(p_out[index]) * int(k_out[index])), int(k_out[index])),
                margin=None if margin is None else float(margin[index]),
                other=other,
                other_share=other_share,
            )
        )
    return shown, len(doubtful)


def _share(right: int, count: int) -> Number:
    """A share of independent models, with the standard error of a binomial share."""
    p = share(right, count)
    return Number(float(p), float(standard_error(p, count)))


def image_of(example: Example, dataset: ImageDataset) -> npt.NDArray[np.uint8]:
    """Its pixels, uint8 [H, W, C]."""
    images = dataset.train_images if example.split == "train" else dataset.test_images
    return np.asarray(images[example.index])
