"""memtail: what neural networks memorize, and which examples they owe it to.

    >>> import memtail
    >>> experiment = memtail.Experiment.load("experiment.yaml")
    >>> memtail.run(experiment, store="memtail-store")
    >>> scores = memtail.load_scores("memtail-store/experiments/digits")
    >>> scores.to_pandas("memorization").nlargest(10, "mem")

The names below are loaded when they are first used, so that a machine that only reads scores never loads torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memtail.errors import MemtailError
    from memtail.execution.embedded import run
    from memtail.scores.fetch import load_scores
    from memtail.scores.reader import Scores
    from memtail.spec import Experiment
    from memtail.trainers.images import train_shard

_HOMES = {
    "Experiment": "memtail.spec.experiment",
    "MemtailError": "memtail.errors",
    "Scores": "memtail.scores.reader",
    "load_scores": "memtail.scores.fetch",
    "run": "memtail.execution.embedded",
    "train_shard": "memtail.trainers.images",
}

__all__ = ["Experiment", "MemtailError", "Scores", "load_scores", "run", "train_shard"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'memtail' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
