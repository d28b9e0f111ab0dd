"""Backpropagation through stacked fully connected networks, written out.

A small network's step is over before automatic differentiation has made its graph and its temporaries. Here every array is made once
and filled again at each step; what remains are the matrix products.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from memtail.training.stack import Stacked, StackedLinear


@dataclass(frozen=True)
class _Buffers:
    """Of one batch size: each layer's output, and the gradient of the loss by it."""

    outputs: list[Tensor]
    deltas: list[Tensor]


class DenseBackpropagation:
    """Losses and gradients of a stack of linear layers with ReLU between them.

    Args:
        layers: the linear layers, from input to logits; their gradients, which must be there, are filled in place.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
    """

    def __init__(self, layers: list[StackedLinear], label_smoothing: float) -> None:
        self._layers = layers
        self._smoothing = label_smoothing
        self._buffers: dict[int, _Buffers] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean losses [S] of a batch: float32 images [S, B, C, H, W], int64 labels [S, B]."""
        buffers = self._for_batch(images)
        outputs, deltas = buffers.outputs, buffers.deltas
        inputs = [images.flatten(2), *outputs[:-1]]
        for layer, given, output in zip(self._layers, inputs, outputs, strict=True):
            _linear(layer, given, output)
            if output is not outputs[-1]:
                output.relu_()
        losses = self._loss(outputs[-1], labels, deltas[-1])
        for depth in reversed(range(len(self._layers))):
            layer, delta = self._layers[depth], deltas[depth]
            torch.bmm(delta.mT, inputs[depth], out=cast(Tensor, layer.weight.grad))
            if layer.bias is not None:
                torch.sum(delta, 1, keepdim=True, out=cast(Tensor, layer.bias.grad))
            if depth:
                before = torch.bmm(delta, layer.weight, out=deltas[depth - 1])
                torch.ops.aten.threshold_backward.grad_input(before, outputs[depth - 1], 0, grad_input=before)
        return losses

    def _loss(self, logits: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
        """The cross-entropy of every network, and into `delta` its gradient by the logits: (softmax - target) / B."""
        log_p = torch.log_softmax(logits, -1)
        torch.exp(log_p, out=delta)
        label = labels[..., None]
        loss = -log_p.gather(-1, label)[..., 0]
        if self._smoothing:
            loss = (1 - self._smoothing) * loss - self._smoothing * log_p.mean(-1)
            delta -= self._smoothing / logits.shape[-1]
        delta.scatter_add_(-1, label, torch.full_like(label, -(1 - self._smoothing), dtype=delta.dtype))
        delta /= labels.shape[1]
        return mean_over_batch(loss)

    def _for_batch(self, images: Tensor) -> _Buffers:
        size = images.shape[1]
        if size not in self._buffers:
            shapes = [(images.shape[0], size, layer.weight.shape[1]) for layer in self._layers]
            self._buffers[size] = _Buffers([images.new_empty(shape) for shape in shapes], [images.new_empty(shape) for shape in shapes])
        return self._buffers[size]


def mean_over_batch(losses: Tensor) -> Tensor:
    """[S, B] -> [S], each mean taken in the same order whatever S is."""
    return losses.cumsum(1)[:, -1] / losses.shape[1]


def dense_layers(stack: nn.Module) -> list[StackedLinear] | None:
    """The linear layers of a stack that is flattening, then linear layers with ReLU between them; None of any other."""
    if not isinstance(stack, Stacked):
        return None
    layers = list(stack.layers)[1:]
    linear = [layer for layer in layers[::2] if isinstance(layer, StackedLinear)]
    between = [layer for layer in layers[1::2] if isinstance(layer, nn.ReLU)]
    return linear if linear and len(linear) + len(between) == len(layers) and len(linear) == len(between) + 1 else None


def _linear(layer: StackedLinear, given: Tensor, output: Tensor) -> None:
    if layer.bias is None:
        torch.bmm(given, layer.weight.mT, out=output)
    else:
        torch.baddbmm(layer.bias, given, layer.weight.mT, out=output)
