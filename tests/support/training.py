"""What tests of the built-in trainer share: comparison of batches, torch's optimizers, and networks that are trained stacked."""

import numpy as np
import torch
from torch import nn

from memtail import models

STACKABLE = {
    "mlp": lambda: models.plain.mlp((1, 8, 8), 5, [7, 6]),
    "cnn": lambda: models.plain.cnn((3, 8, 8), 5, [4, 6], 7),
    "nested with batch normalisation": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Identity(),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Linear(4, 5, bias=False),
    ),
}

_SAME = ("trial", "membership", "train_correct", "test_correct", "train_mistakes")


def same_bits(batches, others, recorded=False):
    """Return whether two lists of batches hold equal outcomes and metrics; `recorded`: also equal margins and scores."""

    def joined(parts, name):
        return np.concatenate([getattr(part, name) for part in parts])

    for name in _SAME + (("train_margin", "test_margin", "train_score", "test_score") if recorded else ()):
        if joined(batches, name).tobytes() != joined(others, name).tobytes():
            return False
    return [entry for part in batches for entry in part.metrics] == [entry for part in others for entry in part.metrics]


def torchs_optimizer(spec, parameters):
    """Return torch's optimizer with the declared constants, in its plain implementation."""
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.name]
    constants = {name: getattr(spec, name) for name in type(spec).model_fields if name != "name"}
    return kind(parameters, **constants, foreach=False)


class Interrupted:
    """Checkpoints in memory; raises `StopError` once the save numbered `stop_at` is kept."""

    class StopError(Exception):
        pass

    def __init__(self, stop_at=None):
        self.state, self.saves, self.stop_at = None, 0, stop_at

    def load(self):
        return self.state

    def save(self, state):
        self.state, self.saves = state, self.saves + 1
        if self.saves == self.stop_at:
            raise Interrupted.StopError
