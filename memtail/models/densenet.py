"""DenseNet-BC-100 with growth rate 12 (Huang et al., 2017), the CIFAR variant, in torchvision's building blocks."""

from torch import nn


def densenet100(image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return three dense blocks of 16 bottleneck layers each, compression 0.5; about 0.77 M parameters."""
    from torchvision.models.densenet import DenseNet

    growth = 12
    network: nn.Module = DenseNet(growth, (16, 16, 16), num_init_features=2 * growth, bn_size=4, num_classes=classes)
    stem = nn.Conv2d(image_shape[0], 2 * growth, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight)
    features: nn.Sequential = network.features  # type: ignore[assignment]
    # torchvision's stem reduces the sides of an image to a quarter, too much for small images
    kept = [(name, layer) for name, layer in features.named_children() if name not in ("conv0", "norm0", "relu0", "pool0")]
    network.features = nn.Sequential()
    network.features.add_module("conv0", stem)
    for name, layer in kept:
        network.features.add_module(name, layer)
    return network
