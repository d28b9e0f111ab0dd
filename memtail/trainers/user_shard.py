"""Trains the trials of a shard by a function or a command of the user's, as a trial batch. Runs in a trainer process."""

import io
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import structlog
import torch

from memtail.datasets import Dataset, open_dataset
from memtail.errors import OutcomeError
from memtail.randomness import Purpose, torch_seed
from memtail.spec import Experiment, FunctionTrainer
from memtail.statistics.soft import quantized
from memtail.subsets import membership
from memtail.trainers.images.devices import cpu_name, device_name
from memtail.trainers.outcomes import check_outcome, looks_permuted, recorded_arrays, says_enough
from memtail.trainers.task import TrainingTask
from memtail.trainers.trial_batch import describe_training, pack_trials
from memtail.trials import Provenance, TrialBatch

log = structlog.get_logger()

# Least seconds between two checkpoints of finished trials.
_CHECKPOINT_SECONDS = 60.0
# Parts of an outcome that are compared with the dataset.
_COMPARED = ("train_labels", "test_labels", "train_ids", "test_ids")
_PERMUTED = (
    "models are no better on their subsets than elsewhere: outcomes are probably not in the order of the dataset, or the subset is "
    "ignored; return train_labels to check the order"
)


class UserTrainer(Protocol):
    """Training code of the user's own."""

    #: Whether it takes all trials of a shard in one call.
    takes_many: bool

    def __call__(self, tasks: Sequence[TrainingTask]) -> Sequence[object]:
        """Train trials, and return what each gives: an `Outcome`, if the code is as it should be."""
        ...


class Caller(Protocol):
    """What the shard tells its caller, and asks it."""

    def progress(self, fraction: float) -> None:
        """Take the trained part of the shard, 0 to 1."""
        ...

    def step(self) -> None:
        """Take a sign that training advances."""
        ...

    def finished(self, trial: int) -> None:
        """Take a trial that is trained."""
        ...

    def save(self, state: bytes) -> None:
        """Keep a checkpoint."""
        ...

    def keep_model(self, trial: int, model: bytes) -> None:
        """Keep the model of a trained trial."""
        ...

    def warn(self, message: str, trials: str) -> None:
        """Take a warning to the user, about the trials `first-last`."""
        ...

    def should_stop(self) -> bool:
        """Return whether training is to stop."""
        ...


@dataclass
class _State:
    """What a checkpoint holds: arrays and metrics of the finished trials, and a tar file of the folder of the trial in training."""

    arrays: dict[int, dict[str, npt.NDArray[Any]]] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    files: bytes = b""

    def to_bytes(self, fingerprint: str) -> bytes:
        stored: dict[str, Any] = {f"{trial}/{name}": array for trial, arrays in self.arrays.items() for name, array in arrays.items()}
        for trial, metrics in self.metrics.items():
            stored |= {f"{trial}/metrics/{name}": np.float64(value) for name, value in metrics.items()}
        buffer = io.BytesIO()
        np.savez(buffer, fingerprint=fingerprint, files=np.frombuffer(self.files, np.uint8), **stored)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, fingerprint: str) -> "_State":
        state = cls()
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            if str(stored["fingerprint"]) != fingerprint:
                raise ValueError("it belongs to another experiment")
            state.files = stored["files"].tobytes()
            for key in stored.files:
                trial, _, name = key.partition("/")
                if name.startswith("metrics/"):
                    state.metrics.setdefault(int(trial), {})[name.removeprefix("metrics/")] = float(stored[key])
                elif name:
                    state.arrays.setdefault(int(trial), {})[name] = stored[key]
                    state.metrics.setdefault(int(trial), {})
        return state


def train_user_shard(
    experiment: Experiment,
    fingerprint: str,
    dataset: Dataset,
    trials: Sequence[int],
    device: str,
    train: UserTrainer,
    caller: Caller,
    checkpoint: bytes | None,
) -> TrialBatch:
    """Train trials and pack their outcomes.

    Args:
        experiment: the declaration.
        fingerprint: of the experiment.
        dataset: the experiment's dataset.
        trials: consecutive indices.
        device: as torch names it.
        train: the user's code.
        caller: is told of progress and checkpoints, and asked whether to stop.
        checkpoint: the state saved last, None if there is none.

    Returns:
        The trials' batch.

    Raises:
        OutcomeError: the code returned no proper outcome.
        TrainingStopped: the code stopped because it was told to.
        Exception: whatever the user's code raises.
    """
    began, started = time.perf_counter(), datetime.now(UTC)
    members = membership(experiment.subsets, dataset.train_labels, trials)
    shard = _UserShard(experiment, fingerprint, dataset, list(trials), members, device, train, caller)
    shard.resume(checkpoint)
    shard.run()
    seconds = time.perf_counter() - began
    compared = tuple(name for name in _COMPARED if name in (shard.compared or ()))
    provenance = replace(
        describe_training(fingerprint, device_name(torch.device(device)), cpu_name(), started, seconds), compared=compared or None
    )
    arrays, metrics = [shard.state.arrays[trial] for trial in trials], [shard.state.metrics[trial] for trial in trials]
    batch = make_batch(dataset, trials, members, arrays, metrics, provenance)
    ordered = any(name.startswith("train") for name in compared)
    trained = [row for row, trial in enumerate(batch.metrics) if not trial.diverged]
    outcome = "train_score" if experiment.record.scores_only else "train_correct"
    if not ordered and trained:
        subsets, train_outcomes = members[trained], np.stack([arrays[row][outcome] for row in trained])
        if looks_permuted(subsets, train_outcomes) and says_enough(subsets, train_outcomes):
            caller.warn(_PERMUTED, f"{trials[0]}-{trials[-1]}")
    return batch


@dataclass
class _UserShard:
    experiment: Experiment
    fingerprint: str
    dataset: Dataset
    trials: list[int]
    members: npt.NDArray[np.bool_]
    device: str
    train: UserTrainer
    caller: Caller
    state: _State = field(default_factory=_State)
    saved_at: float = field(default_factory=time.monotonic)
    compared: set[str] | None = None

    def resume(self, checkpoint: bytes | None) -> None:
        if checkpoint is None:
            return
        try:
            state = _State.from_bytes(checkpoint, self.fingerprint)
            names = recorded_arrays(self.experiment.record)
            if any(arrays.keys() != names for arrays in state.arrays.values()):
                raise ValueError("it has other outcomes than are recorded")
            self.state = state
        except Exception as error:  # damaged bytes make numpy raise anything
            log.warning("checkpoint cannot be used, starting over", trials=f"{self.trials[0]}-{self.trials[-1]}", error=str(error))

    def run(self) -> None:
        missing = [row for row, trial in enumerate(self.trials) if trial not in self.state.arrays]
        groups = [missing] if self.train.takes_many and missing else [[row] for row in missing]
        for rows in groups:
            with self._folders(rows) as tasks:
                outcomes = self.train(tasks)
            if not isinstance(outcomes, Sequence) or len(outcomes) != len(rows):
                raise OutcomeError(f"train_many returned {_described(outcomes)} for {len(rows)} tasks: return a list of one Outcome each")
            for row, outcome in zip(rows, outcomes, strict=True):
                self._take(self.trials[row], outcome)
            self.state.files = b""
            self._progress(0.0)
            if time.monotonic() - self.saved_at >= _CHECKPOINT_SECONDS and len(self.state.arrays) < len(self.trials):
                self._save(b"")

    def _take(self, trial: int, outcome: object) -> None:
        try:
            self.state.arrays[trial], self.state.metrics[trial] = check_outcome(outcome, self.dataset, self.experiment.record)
        except OutcomeError as error:
            trainer = self.experiment.trainer
            code = trainer.function if isinstance(trainer, FunctionTrainer) else " ".join(getattr(trainer, "command", ()))
            raise OutcomeError(f"trial {trial} of {code}: {error}") from None
        compared = {name for name in _COMPARED if getattr(outcome, name) is not None}
        self.compared = compared if self.compared is None else self.compared & compared
        self.caller.finished(trial)

    @contextmanager
    def _folders(self, rows: list[int]) -> Iterator[list[TrainingTask]]:
        """Make the folders of some trials, and make the first one's the current folder."""
        folders = [Path(_base().name, str(place)) for place in range(len(rows))]
        before, parts = Path.cwd(), dict.fromkeys(rows, 0.0)
        try:
            # arrays of its own for each call of the code: what it writes to them reaches neither a later trial nor the check of the order
            dataset = open_dataset(self.dataset.folder)
            tasks = [self._task(row, dataset, folder, parts) for row, folder in zip(rows, folders, strict=True)]
            if self.state.files:
                with tarfile.open(fileobj=io.BytesIO(self.state.files)) as archive:
                    archive.extractall(tasks[0].checkpoint, filter="data")
            os.chdir(tasks[0].workdir)
            yield tasks
        finally:
            os.chdir(before)
            for folder in folders:
                _empty(folder)

    def _task(self, row: int, dataset: Dataset, folder: Path, parts: dict[int, float]) -> TrainingTask:
        workdir, checkpoint = folder / "work", folder / "checkpoint"
        for path in (workdir, checkpoint):
            path.mkdir(parents=True, exist_ok=True)

        def report(fraction: float, metrics: Mapping[str, float]) -> None:
            parts[row] = min(max(float(fraction), 0.0), 1.0)
            self._progress(sum(parts.values()))

        options = getattr(self.experiment.trainer, "options", {})
        seed = torch_seed(self.experiment.subsets.seed, Purpose.TRAINER, self.trials[row])
        subset = np.flatnonzero(self.members[row]).astype(np.int64)
        return TrainingTask(
            self.trials[row],
            subset,
            seed,
            self.device,
            dict(options),
            dataset,
            workdir,
            checkpoint,
            report,
            lambda: self._save(_packed(checkpoint)),
            self.caller.should_stop,
        )

    def _progress(self, beyond: float) -> None:
        self.caller.progress((len(self.state.arrays) + beyond) / len(self.trials))

    def _save(self, files: bytes) -> None:
        self.state.files = files
        self.caller.save(self.state.to_bytes(self.fingerprint))
        self.saved_at = time.monotonic()


@cache
def _base() -> "tempfile.TemporaryDirectory[str]":
    """The folder with the folders of trials, which stay from trial to trial: to make and remove them can take longer than training."""
    return tempfile.TemporaryDirectory(prefix="trials-", ignore_cleanup_errors=True)


def _empty(folder: Path) -> None:
    """Remove what a trial has left in its folder."""
    with suppress(OSError):  # one is missing, or is no folder any more
        work, checkpoint = folder / "work", folder / "checkpoint"
        if {*folder.iterdir()} == {work, checkpoint} and not any(work.iterdir()) and not any(checkpoint.iterdir()):
            return
    shutil.rmtree(folder, ignore_errors=True)


def _described(outcomes: object) -> str:
    return f"{len(outcomes)} outcomes" if isinstance(outcomes, Sequence) else type(outcomes).__name__


def _packed(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, arcname=".")
    return buffer.getvalue()


def make_batch(
    dataset: Dataset,
    trials: Sequence[int],
    members: npt.NDArray[np.bool_],
    arrays: Sequence[Mapping[str, npt.NDArray[Any]]],
    metrics: Sequence[Mapping[str, float]],
    provenance: Provenance,
) -> TrialBatch:
    """Pack what trials returned. One whose loss, margins or scores are not numbers is diverged: its bits are 0.

    Args:
        dataset: the dataset of the k trials.
        trials: their indices.
        members: bool [k, n], their subsets.
        arrays: of each trial, as `check_outcome` returns them.
        metrics: likewise.
        provenance: of the batch.
    """
    stacked = {name: np.stack([each[name] for each in arrays]) for name in arrays[0]}
    diverged = np.array([not np.isfinite(each.get("loss", 0.0)) for each in metrics])
    further = {name: array for name, array in stacked.items() if name.endswith(("_margin", "_score"))}
    for array in further.values():
        diverged |= np.isnan(array).any(1)
    further |= {name: quantized(np.nan_to_num(array)) for name, array in further.items() if name.endswith("_score")}
    return pack_trials(
        dataset,
        trials,
        members,
        stacked.get("train_correct"),
        stacked.get("test_correct"),
        np.array([each.get("loss", np.nan) for each in metrics]),
        diverged,
        provenance,
        further=[{name: value for name, value in each.items() if name != "loss" and np.isfinite(value)} for each in metrics],
        **further,
    )
