"""Optimizers by name: the `optimizer` part of a training recipe -> a torch optimizer.

A further optimizer is an entry here and a class in `memtail.spec`, since its constants are declared and validated there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memtail.spec import Adam, AdamW, OptimizerSpec, Sgd


def make_optimizer(spec: OptimizerSpec, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe over the given parameters. Its learning rate is set before every step."""
    return _OPTIMIZERS[spec.name](spec, parameters)


def _sgd(spec: Sgd, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, nesterov=spec.nesterov, fused=True
    )


def _adam(spec: Adam, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        parameters, lr=spec.lr, betas=(spec.betas[0], spec.betas[1]), eps=spec.eps, weight_decay=spec.weight_decay, fused=True
    )


def _adamw(spec: AdamW, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=spec.lr, betas=(spec.betas[0], spec.betas[1]), eps=spec.eps, weight_decay=spec.weight_decay, fused=True
    )


# Each takes its own class of `memtail.spec`.
_OPTIMIZERS: dict[str, Callable[[Any, list[nn.Parameter]], torch.optim.Optimizer]] = {"sgd": _sgd, "adam": _adam, "adamw": _adamw}
