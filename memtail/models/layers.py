"""Layers that several networks share."""

import torch
from torch import nn
from torch.nn import functional as F


class GlobalMaxPool(nn.Module):
    """`nn.AdaptiveMaxPool2d(1)`, to the bit; on CUDA that has no deterministic gradient, and is eight times slower."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, C, H, W] to [B, C, 1, 1]."""
        return F.max_pool2d(x, x.shape[-2:])


class Scale(nn.Module):
    """Multiplies by a constant.

    Args:
        factor: the constant.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map any tensor to one of its shape."""
        return x * self.factor
