"""The contract of training code of the user's own: a `TrainingTask` in, an `Outcome` out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from memtail.datasets import Dataset


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one trial says about all n training and q test examples, in the order of the dataset: members of the subset and others alike.

    Any array-like of the right length is accepted.

    Attributes:
        train_correct: bool [n], whether the trained model is right about the example: predicts its label, if the dataset has labels. None
            where the experiment says `record: {scores: only}`.
        test_correct: bool [q]; may be None if the dataset has no test set.
        train_margin: float [n], logit margins; recorded where the experiment says `record: {margins: true}`.
        test_margin: float [q].
        train_score: float [n], in [0, 1], such as the probability of the label; recorded, in 255ths, where the experiment says
            `record: {scores: true}`, or `only` in place of correctness.
        test_score: float [q].
        train_labels: [n], labels as the training code has them; compared with the dataset's, so that outcomes in another order are refused.
        test_labels: [q].
        train_ids: [n], file names as the training code has them; compared with the dataset's.
        test_ids: [q].
        metrics: further numbers of the trial; `loss` is recorded, and a trial whose loss is not finite counts as diverged.
    """

    train_correct: npt.ArrayLike | None = None
    test_correct: npt.ArrayLike | None = None
    train_margin: npt.ArrayLike | None = None
    test_margin: npt.ArrayLike | None = None
    train_score: npt.ArrayLike | None = None
    test_score: npt.ArrayLike | None = None
    train_labels: npt.ArrayLike | None = None
    test_labels: npt.ArrayLike | None = None
    train_ids: Sequence[str] | npt.ArrayLike | None = None
    test_ids: Sequence[str] | npt.ArrayLike | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TrainingTask:
    """One trial to train.

    Attributes:
        trial: index of the trial.
        subset: int64 [m], ascending: indices of the training examples to train on.
        seed: 63 bits that follow from the experiment's seed and the trial. Draw all randomness from it, so that equal trials have equal
            outcomes.
        device: device to train on, as torch names it: `cpu`, `cuda:0`, ...
        options: `trainer.options` of the experiment file.
        dataset: the prepared dataset, opened.
        workdir: an empty folder for temporary files, emptied after the trial; the current folder while the trial is trained.
        checkpoint: a folder that is kept when training is interrupted, as it was at the last `save()`; empty in a new trial.
    """

    trial: int
    subset: npt.NDArray[np.int64]
    seed: int
    device: str
    options: dict[str, Any]
    dataset: "Dataset"
    workdir: Path
    checkpoint: Path
    _on_report: Callable[[float, dict[str, float]], None] = field(default=lambda fraction, metrics: None, repr=False)
    _on_save: Callable[[], None] = field(default=lambda: None, repr=False)
    _stop: Callable[[], bool] = field(default=lambda: False, repr=False)

    def report(self, fraction: float, **metrics: float) -> None:
        """Report progress, for displays; code that has reported once must go on to, or it counts as hung.

        Args:
            fraction: trained part of the trial, 0 to 1.
            metrics: numbers for the log.
        """
        self._on_report(fraction, metrics)

    def save(self) -> None:
        """Keep the files in `checkpoint`: an interrupted trial begins with them when it is trained again."""
        self._on_save()

    def should_stop(self) -> bool:
        """Return whether training is to stop: save what is needed to go on, then raise `memtail.TrainingStopped`."""
        return self._stop()
