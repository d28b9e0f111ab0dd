"""Precision of matrix products and convolutions: the declared one -> that of a network on a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from memtail.trainers.images.stack import StackedLinear, is_dense

#: Of the factors of products: 24, 11 or 8 significant bits. Sums are float32.
Precision = Literal["float32", "tf32", "bfloat16"]


def computed_precision(declared: Precision | Literal["auto"], network: nn.Module, device: torch.device) -> Precision:
    """Return the precision in which a network is trained on a device.

    On CUDA `auto` is `bfloat16`, but `tf32` for stacks of linear layers: these are limited by the bytes that a step moves, and copies of
    the weights in bfloat16 add to them. TF32 exists on CUDA only.

    Args:
        declared: of the recipe.
        network: one of the networks, before stacking.
        device: where it is trained.
    """
    if declared == "bfloat16":
        return "bfloat16"
    if device.type != "cuda":
        return "float32"
    if declared == "auto":
        return "tf32" if is_dense(network) else "bfloat16"
    return declared


@contextmanager
def exact_last_layer(stack: nn.Module) -> Iterator[None]:
    """Compute the last linear layer of a stack in float32, within an autocast block too: in bfloat16 many logits are equal."""
    linear = [layer for layer in stack.modules() if isinstance(layer, nn.Linear | StackedLinear)]
    if not linear:
        yield
        return
    last, compute = linear[-1], linear[-1].forward

    def exact(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return compute(x.float())

    own = vars(last).get("forward")
    last.forward = exact  # type: ignore[method-assign]
    try:
        yield
    finally:
        del last.forward
        if own is not None:
            last.forward = own  # type: ignore[method-assign]
