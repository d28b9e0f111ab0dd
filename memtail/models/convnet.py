"""Network of the fastest trainings on CIFAR-10 (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024).

Its whitening of patches, which depends on the data, is a plain convolution here, so that weights follow from seed and trial alone.
"""

from torch import nn

from memtail.models.layers import GlobalMaxPool, Scale


def convnet8(image_shape: tuple[int, int, int], classes: int, width: int = 64, scale: float = 1 / 9) -> nn.Module:
    """Return seven convolutions and a linear layer; about 2 M parameters at width 64, and a third of the operations of `resnet9`.

    Args:
        image_shape: (C, H, W), at least 9 pixels a side.
        classes: number of logits.
        width: channels of the first of three blocks; the others have four times as many.
        scale: factor of the logits, which are too large after batch normalisation.
    """
    patches = 8 * image_shape[0]  # twice the number of values in a patch, as each has a sign
    return nn.Sequential(
        nn.Conv2d(image_shape[0], patches, 2),
        nn.GELU(),
        *_block(patches, width),
        *_block(width, 4 * width),
        *_block(4 * width, 4 * width),
        GlobalMaxPool(),
        nn.Flatten(),
        nn.Linear(4 * width, classes, bias=False),
        Scale(scale),
    )


def _block(before: int, after: int) -> list[nn.Module]:
    """Two convolutions; pooling comes before the first normalisation, which then has a quarter of the values."""
    return [
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(after),
        nn.GELU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.GELU(),
    ]
