"""User-defined networks, named in experiments as `tests.support.networks:NAME`."""

import math

from torch import Tensor, nn


def with_dropout(image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A network that only its dropout keeps from being stacked."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, classes))


class _Failing(nn.Linear):
    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) > 2:
            raise RuntimeError("not in training")
        return super().forward(images.flatten(1))


def failing(image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A network that passes the check of models but fails in training."""
    return _Failing(math.prod(image_shape), classes)
