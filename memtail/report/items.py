"""Items of the report page: numbers with standard errors, examples, pairs, doubtful labels, and all of them together as `Content`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memtail.datasets import Dataset
from memtail.datasets.dataset import Images, Row
from memtail.estimators import Stage
from memtail.experiment_store import Record
from memtail.scores.summary import ScoreSummary
from memtail.studies.result import StudyResult


@dataclass(frozen=True)
class Number:
    """An estimate and its standard error, NaN where there is none; and its 95% interval, of memorization and of selected pairs."""

    value: float
    se: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Example:
    """An example: its split, index and class, its file name and its memorization, the last three where known."""

    split: str
    index: int
    label: str | None
    file: str | None = None
    mem: Number | None = None

    def preview(self, dataset: Dataset) -> Images | str | Row:
        """Read its pixels, uint8 [H, W, C], its text, or its features."""
        return dataset.preview(self.split, self.index)


@dataclass(frozen=True)
class Pair:
    """A test example and a training example of high influence on it: a selected pair, or one by the thresholds of the paper.

    Attributes:
        test, train: the two examples.
        influence: influence of `train` on `test`.
        accuracy_in, accuracy_out: accuracy on `test`, or mean score, of the models that saw `train`, and of those that did not.
        adjusted: adjusted influence of a selected pair; else None.
        rate: false discovery rate at which the pair is kept; 1 if above `LARGEST_RATE`.
        confirmed: of a selected pair, whether its influence, too, is above 0 by a test; else whether `rate` is at most `DISCOVERY_RATE`.
        others: random training examples of the same class, for comparison.
    """

    test: Example
    train: Example
    influence: Number
    accuracy_in: Number
    accuracy_out: Number
    adjusted: float | None
    rate: float
    confirmed: bool
    others: list[Example]


@dataclass(frozen=True)
class DoubtfulLabel:
    """A training example whose label most models trained without it do not predict.

    Attributes:
        example: the training example.
        models: number of models that did not see it.
        held_out: their accuracy on it, which is the confidence in its label.
        margin: their mean logit margin; None where margins were not recorded.
        other: the class they predicted most often instead; None where predictions were not recorded.
        other_share: share of them that predicted `other`.
    """

    example: Example
    models: int
    held_out: Number
    margin: float | None
    other: str | None
    other_share: Number | None


@dataclass(frozen=True)
class Discoveries:
    """Numbers of pairs that an exact test of correctness keeps at `DISCOVERY_RATE`.

    Attributes:
        high: those by the thresholds of the paper.
        tested: pairs tested.
        passed: tested pairs of any influence that pass the test.
    """

    high: int
    tested: int
    passed: int


@dataclass(frozen=True)
class SoftScores:
    """Memorization of scores beside memorization, of the m training examples with both.

    Attributes:
        mem, mem_p: float64 [m].
        mean: mean of `mem_p`.
        rank_correlation: Spearman's, of both; NaN if one is constant.
    """

    mem: npt.NDArray[np.float64]
    mem_p: npt.NDArray[np.float64]
    mean: float
    rank_correlation: float


@dataclass(frozen=True)
class EpochStage:
    """Memorization after an epoch.

    Attributes:
        epoch: number of epochs.
        shares: share of the examples with at least each memorization of `MEM_STEPS`.
        quartiles: lower quartile, median and upper quartile of memorization, of the examples that are memorized in the end.
    """

    epoch: int
    shares: list[float]
    quartiles: tuple[float, float, float]


@dataclass(frozen=True)
class Content:
    """Content of the page.

    Attributes:
        record, summary: the experiment and the summary of its scores.
        warnings: limitations of the scores, as sentences.
        accuracies: mean accuracies over trials, by their key in the summary.
        stages: memorization by number of trials.
        fraction: share of the training set that a trial saw.
        expected_se: largest standard error to expect of a score.
        kind: kind of the examples.
        gallery: rows of (class, examples per step of memorization); without labels one row.
        classes: number of classes, of which the gallery shows some; 0 without labels.
        pairs: the pairs shown: selected ones, or by the thresholds of the paper in scores that have no selection.
        discoveries: pairs that pass a test of correctness; None without a test set, and where only scores are recorded.
        labels, doubtful: the doubtful labels shown, and how many there are; none without labels or correctness.
        soft: memorization of scores beside memorization; None if not all trials have recorded both.
        epochs: memorization by epoch; empty if no outcomes by epoch are published.
        others_recorded: whether the classes predicted instead were recorded.
        studies: results of the experiment's studies.
    """

    record: Record
    summary: ScoreSummary
    warnings: list[str]
    accuracies: dict[str, Number]
    stages: list[Stage]
    fraction: float
    expected_se: float
    kind: str
    gallery: list[tuple[str | None, list[list[Example]]]]
    classes: int
    pairs: list[Pair]
    discoveries: Discoveries | None
    labels: list[DoubtfulLabel]
    doubtful: int
    soft: SoftScores | None
    epochs: list[EpochStage]
    others_recorded: bool
    studies: Sequence[StudyResult]
