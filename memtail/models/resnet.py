"""Residual networks for small images.

`resnet9` is the nine-layer network of fast CIFAR training (Page, "How to train your ResNet", 2018). `resnet18` and `resnet50` are the
networks of He et al. (2016) with a stem for small images: one 3x3 convolution, no pooling. With `stem: imagenet`, and for large images,
they are torchvision's networks.
"""

import torch
from torch import nn

from memtail.models.layers import GlobalMaxPool, Scale


def resnet9(image_shape: tuple[int, int, int], classes: int, width: int = 64, scale: float = 0.125) -> nn.Module:
    """Return eight convolutions and a linear layer, with two residual blocks; about 6.6 M parameters at width 64.

    Args:
        image_shape: (C, H, W).
        classes: number of logits.
        width: channels of the first convolution.
        scale: factor of the logits, which are too large after batch normalisation.
    """
    return nn.Sequential(
        _convolution(image_shape[0], width),
        _convolution(width, 2 * width),
        nn.MaxPool2d(2),
        _Residual(nn.Sequential(_convolution(2 * width, 2 * width), _convolution(2 * width, 2 * width))),
        _convolution(2 * width, 4 * width),
        nn.MaxPool2d(2),
        _convolution(4 * width, 8 * width),
        nn.MaxPool2d(2),
        _Residual(nn.Sequential(_convolution(8 * width, 8 * width), _convolution(8 * width, 8 * width))),
        GlobalMaxPool(),
        nn.Flatten(),
        nn.Linear(8 * width, classes, bias=False),
        Scale(scale),
    )


def resnet18(image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return torchvision's resnet18 with a stem for small images."""
    return _with_small_stem("resnet18", image_shape, classes)


def resnet50(image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return torchvision's resnet50 with a stem for small images."""
    return _with_small_stem("resnet50", image_shape, classes)


def _with_small_stem(name: str, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    from torchvision import models

    network: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    network.conv1 = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return network


def _convolution(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True))


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.inner(x)
        return y
