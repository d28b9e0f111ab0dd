"""Check of a function or a command: one of its trials, trained as a run would, without a store."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memtail import datasets
from memtail.datasets import Dataset
from memtail.errors import SpecError
from memtail.execution.declare import declare
from memtail.experiment_store import Record
from memtail.experiment_store.replicas import compare
from memtail.spec import Experiment, ImagesTrainer, ImportedTrainer
from memtail.spec.trainer import code_files
from memtail.statistics.soft import ONE
from memtail.trainers.outcomes import looks_permuted
from memtail.trainers.shard_trainer import ShardTrainer
from memtail.trials import Shard, TrialBatch, TrialMetrics, unpack


@dataclass(frozen=True)
class TrainerCheck:
    """What one trial says about its trainer.

    Attributes:
        experiment: name of the experiment.
        trial, trials: the trial, and the number of all trials.
        device, devices: device that it was trained on, and number of devices of a run on this machine.
        code: names of the files whose content is in the fingerprint.
        subset, n_train: number of training examples in the subset, and of all.
        outcome: accuracies, or mean scores, and metrics.
        compared: the labels and ids that were returned and are the dataset's.
        margins, scores: whether they were returned and are recorded.
        scores_only: whether scores are in the place of correctness.
        seconds, start_seconds: seconds of the trial, and of the start of the trainer process.
        warnings: signs of a fault, one line each.
    """

    experiment: str
    trial: int
    trials: int
    device: str
    devices: int
    code: tuple[str, ...]
    subset: int
    n_train: int
    outcome: TrialMetrics
    compared: tuple[str, ...]
    margins: bool
    scores: bool
    scores_only: bool
    seconds: float
    start_seconds: float
    warnings: tuple[str, ...]

    def all_seconds(self, seconds: float) -> float:
        """Return the seconds of all trials on the devices of this machine if one takes `seconds`."""
        return seconds * -(-self.trials // self.devices)


@dataclass(frozen=True)
class Repetition:
    """A second training of the trial, in the same process.

    Attributes:
        differences: number of outcomes, margins and scores that differ from the first training's.
        seconds: seconds of the trial; less than at first, when the code imports and compiles what it needs.
    """

    differences: int
    seconds: float


class TrainerChecker:
    """Trains one trial of an experiment in a trainer process, as often as it is asked to. A context manager, which ends the process.

    Args:
        experiment: the declaration, with a function or a command as its trainer.
        trial: index of the trial.
        on_preparation: as in `memtail.run`.
        store: address of a store; if it is a folder, user code has no access to it. It need not exist, and is not opened.

    Raises:
        SpecError: bad input, or the built-in trainer.
    """

    def __init__(self, experiment: Experiment, trial: int, on_preparation: Any = None, store: str | None = None) -> None:
        from memtail.trainers.images.devices import available_devices

        if isinstance(experiment.trainer, ImagesTrainer | ImportedTrainer):
            raise SpecError(f"experiment '{experiment.name}' has no training code of the user's own, so that nothing is checked")
        if not 0 <= trial < experiment.subsets.trials:
            raise SpecError(f"--trial {trial}: the trials of experiment '{experiment.name}' are 0 to {experiment.subsets.trials - 1}")
        self._devices = [str(device) for device in available_devices(experiment.execution.device)]
        self._code = tuple(sorted(code_files(experiment.trainer, sys.path)))
        self._folder: Path | None = experiment.trainer.folder
        self._dataset: Dataset = datasets.prepare(experiment.dataset, on_preparation)
        self._record: Record = declare(experiment, self._dataset, 1)
        self._shard, self._store = Shard(trial, trial), store
        self._trainer = ShardTrainer(self._devices[0])
        self._first: TrialBatch | None = None

    def __enter__(self) -> "TrainerChecker":
        return self

    def __exit__(self, *_: object) -> None:
        self._trainer.end()

    def check(self) -> TrainerCheck:
        """Train the trial. Raises: MemtailError: as in a run."""
        began = time.perf_counter()
        batch = self._first = self._train()
        spent, seconds = time.perf_counter() - began, batch.provenance.seconds or 0.0
        members = unpack(batch.membership, batch.n_train)
        experiment, trial = self._record.experiment, batch.metrics[0]
        return TrainerCheck(
            experiment=experiment.name,
            trial=trial.trial,
            trials=experiment.subsets.trials,
            device=self._devices[0],
            devices=len(self._devices),
            code=self._code,
            subset=int(members.sum()),
            n_train=batch.n_train,
            outcome=trial,
            compared=batch.provenance.compared or (),
            margins=batch.train_margin is not None,
            scores=batch.train_score is not None,
            scores_only=batch.scores_only,
            seconds=seconds,
            start_seconds=max(0.0, spent - seconds),
            warnings=tuple(_warnings(batch)),
        )

    def repeat(self) -> Repetition:
        """Train the trial once more, after `check`. Raises: MemtailError: as in a run."""
        if self._first is None:
            raise RuntimeError("no trial was trained before")
        second = self._train()
        compared = compare(self._first, second)
        return Repetition(compared.bits + compared.margins, second.provenance.seconds or 0.0)

    def _train(self) -> TrialBatch:
        return self._trainer.train(self._record, self._dataset, self._shard, None, code=self._folder, store=self._store)


def _warnings(batch: TrialBatch) -> list[str]:
    trial = batch.metrics[0]
    if trial.diverged:
        return ["the trial diverged and would not count: its loss, a margin or a score is not finite"]
    if trial.held_out_accuracy is None:
        return []
    members, word = unpack(batch.membership, batch.n_train), "score" if batch.scores_only else "accuracy"
    train = batch.train_score / ONE if batch.scores_only and batch.train_score is not None else batch.correctness()[0]
    if (train == 1).all():
        perfect = "have a score of 1" if batch.scores_only else "are correct"
        return [f"all training examples {perfect}, held-out ones too: check that the code trains on task.subset only"]
    if any(name.startswith("train") for name in batch.provenance.compared or ()):
        no_better = trial.in_subset_accuracy <= trial.held_out_accuracy
        return [f"in-subset {word} is no higher than held-out {word}: check that the code trains on task.subset"] if no_better else []
    if not looks_permuted(members, train):
        return []
    return [
        f"in-subset and held-out {word} cannot be told apart: the outcomes may be in another order than the dataset (a shuffled loader), "
        "or the code ignores the subset, or one trial says too little; return train_labels to have the order checked"
    ]
