"""Chooses the number of networks in a stack: by the device, and on CUDA by its memory."""

import copy
import math

import torch
from torch import nn

from memtail.trainers.images.stack import is_dense, is_stackable

# Networks of linear layers. Stacks of this width stay in a processor's cache; on CUDA wider ones gain nothing.
_DENSE = {"cpu": 16, "cuda": 512, "mps": 32}
# Networks with convolutions. A processor runs these fastest one network at a time; an accelerator needs many small ones to be busy.
_CONVOLUTIONAL = {"cpu": 1, "cuda": 64, "mps": 32}
# Share of the device's memory for a stack; the rest is for the dataset and for what is counted too low.
_SHARE = 0.5


def stack_width(network: nn.Module, input_shape: tuple[int, ...], batch_size: int, device: torch.device) -> int:
    """Return the number of networks that are trained together.

    It follows from the memory of the device, not from what is free, so that equal devices compute equal bits.

    Args:
        network: one of them.
        input_shape: of an example, (C, H, W) or (D,).
        batch_size: examples per step of each network.
        device: where they are trained.
    """
    if not is_stackable(network):
        return 1
    if not is_dense(network):
        return _CONVOLUTIONAL[device.type]
    if device.type != "cuda":
        return _DENSE[device.type]
    room = _SHARE * torch.cuda.get_device_properties(device).total_memory
    return max(1, min(_DENSE["cuda"], int(room / network_bytes(network, input_shape, batch_size))))


def network_bytes(network: nn.Module, input_shape: tuple[int, ...], batch_size: int) -> int:
    """Return the bytes of a device that one more network of linear layers takes, counted without computing.

    These are four arrays of its parameters: the values, their gradients and two of the optimizer; and two of each layer's output for a
    batch, the second for its gradient, or for the larger batches of an evaluation.
    """
    sizes = [batch_size * math.prod(input_shape)]
    counted = copy.deepcopy(network).to("meta")
    for layer in counted.modules():
        if not isinstance(layer, nn.Sequential):
            layer.register_forward_hook(lambda layer, given, output: sizes.append(output.numel()))
    with torch.no_grad():
        counted(torch.empty(batch_size, *input_shape, device="meta"))
    parameters = sum(parameter.numel() for parameter in counted.parameters())
    return 4 * (4 * parameters + 2 * sum(sizes))
