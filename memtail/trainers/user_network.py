"""Trains the trials of a shard by the built-in trainer with a network of the user's own. Runs in a trainer process."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memtail.datasets import Dataset, as_trainable
from memtail.errors import WorkerFaultError
from memtail.spec import Experiment
from memtail.trainers.images import Progress, train_shard
from memtail.trainers.user_shard import Caller
from memtail.trials import TrialBatch


def train_network_shard(
    experiment: Experiment,
    dataset: Dataset,
    trials: Sequence[int],
    device: str,
    caller: Caller,
    checkpoint: bytes | None,
) -> TrialBatch:
    """Train trials; arguments and errors as of `memtail.train_shard`, but an error of the device is raised as it is.

    Args:
        experiment: the declaration.
        dataset: the experiment's dataset.
        trials: consecutive indices.
        device: as torch names it.
        caller: is told of progress, checkpoints and models, and asked whether to stop.
        checkpoint: the state saved last, None if there is none.
    """

    def report(progress: Progress) -> None:
        caller.progress(progress.epochs / progress.total)

    def step() -> bool:
        caller.step()
        return caller.should_stop()

    checkpoints = _CallersCheckpoints(checkpoint, caller)
    try:
        return train_shard(
            experiment,
            as_trainable(dataset),
            trials,
            torch.device(device),
            on_progress=report,
            checkpoints=checkpoints,
            stop=step,
        )
    except WorkerFaultError as error:  # user code may be its cause: the caller finds out whether the machine is at fault
        raise error.__cause__ or error from None


@dataclass(frozen=True)
class _CallersCheckpoints:
    """`memtail.trainers.checkpoints.Checkpoints` that the caller keeps."""

    state: bytes | None
    caller: Caller

    def load(self) -> bytes | None:
        return self.state

    def save(self, state: bytes) -> None:
        self.caller.save(state)

    def keep_model(self, trial: int, model: bytes) -> None:
        self.caller.keep_model(trial, model)
