"""The network: a convolutional backbone, and a head, the linear layer that classifies its 64 features."""

from collections import OrderedDict

from torch import nn


def build(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return the network for images [C, H, W]."""
    channels, height, width = input_shape
    backbone = nn.Sequential(
        nn.Conv2d(channels, 16, 5, padding=2), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (height // 2) * (width // 2), 64), nn.ReLU(),
    )  # fmt: skip
    return nn.Sequential(OrderedDict(backbone=backbone, head=nn.Linear(64, classes)))
