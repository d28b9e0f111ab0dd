"""2 x 2 max pooling with ReLU in one pass over memory, for float32 images in channels-last order on a CPU.

In two passes with 64-bit indices it takes as much time as the convolutions of small networks. ReLU and max pooling commute, so this
stands for either order of the two layers. The first of equal values is the largest, and NaN is larger than any number, as in torch.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

# Winner where the largest of four is not above 0: ReLU gives 0 there, and no gradient goes back.
_NONE = 4


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def _larger(largest, place, value, here):  # type: ignore[no-untyped-def]
    """Compare without a branch, so that loops become vector instructions."""
    taken = (value > largest) | np.isnan(value)
    return value if taken else largest, here if taken else place


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def _pool(x, out, winner):  # type: ignore[no-untyped-def]
    channels = x.shape[3]
    for b in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                first, second = x[b, 2 * i, 2 * j], x[b, 2 * i, 2 * j + 1]
                third, fourth = x[b, 2 * i + 1, 2 * j], x[b, 2 * i + 1, 2 * j + 1]
                pooled, won = out[b, i, j], winner[b, i, j]
                for c in range(channels):
                    largest, place = first[c], np.int32(0)
                    largest, place = _larger(largest, place, second[c], np.int32(1))
                    largest, place = _larger(largest, place, third[c], np.int32(2))
                    largest, place = _larger(largest, place, fourth[c], np.int32(3))
                    none = largest <= 0
                    pooled[c] = np.float32(0) if none else largest
                    won[c] = np.uint8(_NONE) if none else np.uint8(place)


@numba.njit(cache=True, boundscheck=False)
def _unpool(gradient, winner, out):  # type: ignore[no-untyped-def]
    for b in range(gradient.shape[0]):
        for i in range(gradient.shape[1]):
            for j in range(gradient.shape[2]):
                for place in range(4):
                    for c in range(gradient.shape[3]):
                        won = winner[b, i, j, c] == place
                        out[b, 2 * i + place // 2, 2 * j + place % 2, c] = gradient[b, i, j, c] if won else np.float32(0)


class _PoolRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        images = x.permute(0, 2, 3, 1)
        batch, height, width, channels = images.shape
        out = torch.empty(batch, height // 2, width // 2, channels)
        winner = torch.empty(out.shape, dtype=torch.uint8)
        _pool(images.numpy(), out.numpy(), winner.numpy())
        ctx.save_for_backward(winner)
        ctx.shape = images.shape
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (winner,) = ctx.saved_tensors
        gradient = gradients[0].permute(0, 2, 3, 1).contiguous()
        _, height, width, _ = ctx.shape
        # an odd last row or column is in no window
        out = torch.empty(ctx.shape) if height % 2 == width % 2 == 0 else torch.zeros(ctx.shape)
        _unpool(gradient.numpy(), winner.numpy(), out.numpy())
        return out.permute(0, 3, 1, 2)


def pool_relu(x: Tensor) -> Tensor:
    """Return the ReLU of 2 x 2 max pooling: float32 [B, C, H, W], channels last, on a CPU -> [B, C, H // 2, W // 2]."""
    if torch.is_grad_enabled():
        pooled: Tensor = _PoolRelu.apply(x)
        return pooled
    images = x.permute(0, 2, 3, 1)
    batch, height, width, channels = images.shape
    out = torch.empty(batch, height // 2, width // 2, channels)
    _pool(images.numpy(), out.numpy(), torch.empty(out.shape, dtype=torch.uint8).numpy())
    return out.permute(0, 3, 1, 2)
