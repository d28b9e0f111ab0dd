"""Small Inception network of Zhang et al., "Understanding deep learning requires rethinking generalization" (2017), figure 3."""

import torch
from torch import nn


def inception(image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return two-branch inception and downsample modules for 28 x 28 inputs, at least 12 x 12; about 1.65 M parameters."""
    return nn.Sequential(
        _convolution(image_shape[0], 96, 3),
        *(_Branches(before, ones, threes) for before, ones, threes in ((96, 32, 32), (64, 32, 48))),
        _Downsample(80, 80),
        *(_Branches(before, ones, threes) for before, ones, threes in ((160, 112, 48), (160, 96, 64), (160, 80, 80), (160, 48, 96))),
        _Downsample(144, 96),
        *(_Branches(before, ones, threes) for before, ones, threes in ((240, 176, 160), (336, 176, 160))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(336, classes),
    )


def _convolution(before: int, after: int, kernel: int, stride: int = 1) -> nn.Module:
    padding = kernel // 2 if stride == 1 else 0
    return nn.Sequential(nn.Conv2d(before, after, kernel, stride, padding, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True))


class _Branches(nn.Module):
    def __init__(self, before: int, ones: int, threes: int) -> None:
        super().__init__()
        self.ones = _convolution(before, ones, 1)
        self.threes = _convolution(before, threes, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.ones(x), self.threes(x)], dim=1)


class _Downsample(nn.Module):
    def __init__(self, before: int, threes: int) -> None:
        super().__init__()
        self.threes = _convolution(before, threes, 3, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.threes(x), self.pool(x)], dim=1)
