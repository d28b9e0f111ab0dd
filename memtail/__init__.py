"""memtail: memorization and influence of training examples, estimated from models trained on random subsets.

    >>> import memtail
    >>> experiment = memtail.Experiment.load("experiment.yaml")
    >>> memtail.run(experiment, store="memtail-store")
    >>> scores = memtail.load_scores("memtail-store/experiments/digits")
    >>> scores.to_pandas("memorization").nlargest(10, "mem")

All but the exceptions are loaded at their first use, so a machine that only reads scores never loads torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from memtail.errors import (
    AccessRefusedError,
    BatchesRefusedError,
    DatasetError,
    ForeignObjectError,
    IncompleteRunError,
    LocalFileError,
    MemtailError,
    ObjectNotFound,
    OutcomeError,
    ScoresError,
    ShardsFailedError,
    SpecError,
    StoreError,
    TrainerError,
    TrainingStopped,
    UnreachableError,
    UnsupportedError,
    WorkerFaultError,
)

if TYPE_CHECKING:
    from memtail.execution.embedded import RunResult, run
    from memtail.models.trained import load_model
    from memtail.scores.fetch import load_scores
    from memtail.scores.reader import Scores
    from memtail.spec import Experiment
    from memtail.trainers.images import train_shard
    from memtail.trainers.task import Outcome, TrainingTask

_HOMES = {
    "Experiment": "memtail.spec.experiment",
    "RunResult": "memtail.execution.embedded",
    "Scores": "memtail.scores.reader",
    "Outcome": "memtail.trainers.task",
    "TrainingTask": "memtail.trainers.task",
    "load_model": "memtail.models.trained",
    "load_scores": "memtail.scores.fetch",
    "run": "memtail.execution.embedded",
    "train_shard": "memtail.trainers.images",
}

__all__ = [
    "AccessRefusedError",
    "BatchesRefusedError",
    "DatasetError",
    "Experiment",
    "ForeignObjectError",
    "IncompleteRunError",
    "LocalFileError",
    "MemtailError",
    "ObjectNotFound",
    "Outcome",
    "OutcomeError",
    "RunResult",
    "Scores",
    "ScoresError",
    "ShardsFailedError",
    "SpecError",
    "StoreError",
    "TrainerError",
    "TrainingStopped",
    "TrainingTask",
    "UnreachableError",
    "UnsupportedError",
    "WorkerFaultError",
    "load_model",
    "load_scores",
    "run",
    "train_shard",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'memtail' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
