"""Small networks that are plain sequences of layers, and so are trained stacked."""

import math
from itertools import pairwise

from torch import nn


def mlp(input_shape: tuple[int, ...], classes: int, hidden: list[int]) -> nn.Sequential:
    """Return fully connected layers of the widths `hidden`, with ReLU between them, on flattened images or on features."""
    widths = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def cnn(image_shape: tuple[int, ...], classes: int, channels: list[int], hidden: int) -> nn.Sequential:
    """Return 3x3 convolutions with ReLU and 2x2 max pooling, one per entry of `channels`, then one hidden layer."""
    before, height, width = image_shape
    layers: list[nn.Module] = []
    for after in channels:
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        before, height, width = after, height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * height * width, hidden), nn.ReLU(), nn.Linear(hidden, classes))
