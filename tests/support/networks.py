"""User-defined networks, named in experiments as `tests.support.networks:NAME`."""

import math

import torch
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


class _Strict(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        if features.shape[1:] != (self.in_features,) or features.dtype != torch.float32:
            raise RuntimeError(f"got {features.dtype} {list(features.shape)}")
        return super().forward(features)


def for_features(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A linear network that insists on features float32 [B, D]; it is trained one at a time."""
    (features,) = input_shape
    return _Strict(features, classes)


def normalised(image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A stackable network with batch normalisation."""
    inner = nn.Sequential(nn.Conv2d(image_shape[0], 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(inner, nn.Identity(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(4, classes, bias=False))
