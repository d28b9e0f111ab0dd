"""Stacking: S networks of one architecture as one network, computed in one call.

A `torch.nn.Sequential` of plain layers is stacked layer by layer: linear layers become batched matrix products, convolutions become
grouped convolutions, and batch normalisation acts on more channels. No value of one network enters another, so each network is trained
exactly as it would be alone, and one that diverges does not affect the rest. Any other network is trained one at a time.

A stack maps float images [S, B, C, H, W], or [B, C, H, W] shared by all networks, to logits [S, B, classes]; or features [S, B, D] or
[B, D].
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtail.models import own_network

_PLAIN = (nn.Flatten, nn.Linear, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.Identity)

# Floats in the widest vector of today's processors, with room to spare.
_VECTOR = 64


def is_stackable(network: nn.Module) -> bool:
    """Return whether a network is a sequence of plain layers, each used once and all of them trained, without hooks."""
    layers = _plain_layers(network)
    if layers is None or len({id(layer) for layer in layers}) < len(layers):
        return False
    kinds = [type(layer) for layer in layers]
    if nn.Linear in kinds and (nn.Flatten not in kinds or kinds.index(nn.Linear) < kinds.index(nn.Flatten)):
        return False
    flattening = [(layer.start_dim, layer.end_dim) for layer in layers if isinstance(layer, nn.Flatten)]
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    return flattening == [(1, -1)] and not hooked and all(parameter.requires_grad for parameter in network.parameters())


def is_dense(network: nn.Module) -> bool:
    """Return whether a network is stackable and has no convolution."""
    return is_stackable(network) and not any(isinstance(layer, nn.Conv2d) for layer in network.modules())


def _plain_layers(network: nn.Module) -> list[nn.Module] | None:
    """Return the layers of a sequence in order, nested sequences flattened; None if it is no sequence of plain layers."""
    if type(network) is not nn.Sequential:  # a subclass may override forward
        return [network] if type(network) in _PLAIN else None
    layers: list[nn.Module] = []
    for layer in network:
        inner = _plain_layers(layer)
        if inner is None:
            return None
        layers += inner
    return layers


def stack_networks(networks: list[nn.Module]) -> "Stacked | Single":
    """Return a module that computes all the given networks, with their weights.

    Raises:
        ValueError: there are several networks, and they are not stackable.
    """
    if is_stackable(networks[0]):
        return Stacked(cast(list[nn.Sequential], networks))
    if len(networks) > 1:
        raise ValueError(f"{type(networks[0]).__name__} is not a sequence of plain layers and cannot be stacked")
    return Single(networks[0])


def is_shared(examples: Tensor) -> bool:
    """Return whether examples are shared by all networks: [B, C, H, W] or [B, D]."""
    return examples.dim() in (2, 4)


def channels_last(weight: Tensor, image: tuple[int, ...]) -> Tensor:
    """Reorder the inputs of a weight [..., C H W], by pixel: [..., H W C]."""
    return weight.reshape(*weight.shape[:-1], *image).movedim(-3, -1).flatten(-3)


def channels_first(weight: Tensor, image: tuple[int, ...]) -> Tensor:
    """Undo `channels_last`."""
    channels, height, width = image
    return weight.reshape(*weight.shape[:-1], height, width, channels).movedim(-1, -3).flatten(-3)


def join_parameters(stack: nn.Module) -> nn.Parameter:
    """Move all parameters of a module, and their gradients, into one array each, of which they become views.

    One update then serves all parameters. The arrays are padded to whole vectors: the loops of the update treat a remainder with other
    instructions, which round otherwise, and the rounding must not depend on the number of networks.
    """
    parameters = list(stack.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    values = parameters[0].new_zeros(-(-total // _VECTOR) * _VECTOR)
    gradients = torch.zeros_like(values)
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        view, gradient = (_view(array[start:stop], parameter.shape) for array in (values, gradients))
        view.copy_(parameter.detach())
        parameter.data, parameter.grad = view, gradient
        start = stop
    joined = nn.Parameter(values)
    joined.grad = gradients
    return joined


def use_channels_last(stack: nn.Module) -> None:
    """Lay out the weights of plain convolutions channels last, as images are: cuDNN otherwise copies each of them in every step."""
    for layer in stack.modules():
        if type(layer) is nn.Conv2d:  # a subclass may view its weights in their usual layout
            layer.to(memory_format=torch.channels_last)


def _view(part: Tensor, shape: torch.Size) -> Tensor:
    """Return part of an array as a parameter; convolution weights are channels last, as images are."""
    if len(shape) != 4:
        return part.view(shape)
    out, channels, height, width = shape
    return part.view(out, height, width, channels).permute(0, 3, 1, 2)


class Single(nn.Module):
    """A stack of one network of any kind.

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map float images [1, B, C, H, W], or [B, C, H, W], to logits [1, B, classes]; or features, alike."""
        logits: Tensor = self.network(images if is_shared(images) else images[0])
        return logits[None]

    def tensors_of(self, place: int) -> list[Tensor]:
        """Return the content of the network's state dict, in its order."""
        return list(own_network(self.network).state_dict().values())


class Stacked(nn.Module):
    """A stack of sequential networks as one sequence of layers.

    Args:
        networks: S stackable networks of one architecture.
    """

    def __init__(self, networks: list[nn.Sequential]) -> None:
        super().__init__()
        self.width = len(networks)
        self.layers = nn.ModuleList(_stack_layers([_plain_layers(network) or [] for network in networks]))

    def forward(self, images: Tensor) -> Tensor:
        """Map float images [S, B, C, H, W], or [B, C, H, W] shared by all networks, to logits [S, B, classes]; or features, alike."""
        if is_shared(images):
            shared = images.flatten(1) if isinstance(self.layers[0], _Flatten) else images
            x = shared.expand(self.width, *shared.shape)
        else:
            x = images
        for layer in self.layers:
            x = layer(x)
        return x

    def tensors_of(self, place: int) -> list[Tensor]:
        """Return the content of the state dict of one of the networks, in its order."""
        return [
            layer.tensor_of(place, name) if isinstance(layer, StackedLinear) else value.chunk(self.width)[place] if value.dim() else value
            for layer in self.layers
            for name, value in layer.state_dict().items()
        ]


def _stack_layers(networks: list[list[nn.Module]]) -> list[nn.Module]:
    """Return stacked layers, on [B, S * C, H, W] from the first convolution or pooling on and on [S, B, F] after flattening."""
    layers: list[nn.Module] = []
    grouped = False
    for copies in zip(*networks, strict=True):
        first = copies[0]
        if layers and grouped and _is_pooled_relu(layers[-1], first):
            layers[-1] = _PooledRelu()
            continue
        if isinstance(first, nn.Conv2d | nn.BatchNorm2d | nn.MaxPool2d | nn.AvgPool2d) and not grouped:
            layers.append(_Group())
            grouped = True
        if isinstance(first, nn.Linear):
            layers.append(StackedLinear(cast(list[nn.Linear], copies)))
        elif isinstance(first, nn.Conv2d):
            layers.append(_stack_convolution(cast(list[nn.Conv2d], copies)))
        elif isinstance(first, nn.BatchNorm2d):
            layers.append(_stack_normalisation(cast(list[nn.BatchNorm2d], copies)))
        elif isinstance(first, nn.Flatten):
            layers.append(_Flatten(len(copies), grouped))
            grouped = False
        elif not isinstance(first, nn.Identity):
            layers.append(first)
    return layers


class _Group(nn.Module):
    """[S, B, C, H, W] -> [B, S * C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1, 2)


class _Flatten(nn.Module):
    """[S, B, ...] or [B, S * C, H, W] -> [S, B, F]."""

    def __init__(self, width: int, grouped: bool) -> None:
        super().__init__()
        self.width = width
        self.grouped = grouped

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self.width, -1).transpose(0, 1) if self.grouped else x.flatten(2)


def _is_pooled_relu(layer: nn.Module, following: nn.Module) -> bool:
    """Return whether two layers are ReLU and plain 2 x 2 max pooling, in either order."""
    relu, pool = (layer, following) if isinstance(layer, nn.ReLU) else (following, layer)
    if not (isinstance(relu, nn.ReLU) and isinstance(pool, nn.MaxPool2d)):
        return False
    sizes = {pool.kernel_size, pool.stride} <= {2, (2, 2)}
    return sizes and pool.padding in (0, (0, 0)) and pool.dilation in (1, (1, 1)) and not pool.ceil_mode


class _PooledRelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last):
            from memtail.trainers.images.cpu.maxpool_relu import pool_relu  # compiles

            return pool_relu(x)
        return F.relu(F.max_pool2d(x, 2))


class StackedLinear(nn.Module):
    """S linear layers: `weight` [S, out, in], `bias` [S, 1, out] or None.

    Args:
        copies: the S layers.
    """

    def __init__(self, copies: list[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in copies]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in copies])[:, None]) if copies[0].bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [S, B, in] to [S, B, out]."""
        weight = self.weight.mT
        return torch.bmm(x, weight) if self.bias is None else torch.baddbmm(self.bias, x, weight)

    def tensor_of(self, place: int, name: str) -> Tensor:
        """Return `weight` [out, in] or `bias` [out] of one of the layers."""
        return self.weight.detach()[place] if name == "weight" else cast(Tensor, self.bias).detach()[place, 0]


def _stack_convolution(copies: list[nn.Conv2d]) -> nn.Conv2d:
    one, width = copies[0], len(copies)
    layer = nn.Conv2d(
        width * one.in_channels,
        width * one.out_channels,
        cast(tuple[int, int], one.kernel_size),
        cast(tuple[int, int], one.stride),
        cast(tuple[int, int] | str, one.padding),
        cast(tuple[int, int], one.dilation),
        width * one.groups,
        one.bias is not None,
        one.padding_mode,
    )
    _join(layer, list(copies))
    return layer


def _stack_normalisation(copies: list[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    one = copies[0]
    layer = nn.BatchNorm2d(len(copies) * one.num_features, one.eps, one.momentum, one.affine, one.track_running_stats)
    _join(layer, list(copies))
    return layer


@torch.no_grad()
def _join(layer: nn.Module, copies: list[nn.Module]) -> None:
    """Load the concatenated parameters and buffers of the stacked layers."""
    states = [copy.state_dict() for copy in copies]
    layer.load_state_dict(
        {name: torch.cat([state[name] for state in states]) if value.dim() else value for name, value in states[0].items()}
    )
