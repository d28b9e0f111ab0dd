"""Fully connected networks on a CUDA device: stacks whose training step is written out and captured in a CUDA graph.

Automatic differentiation keeps a gradient for each parameter, and adds to it; here products write gradients to their place. Values,
gradients and momenta of all parameters are one array each, so that one kernel updates all of them.
"""

from typing import cast

import torch
from torch import Tensor

from memtail.spec import OptimizerSpec
from memtail.trainers.images.cuda.steps import CapturedSteps, Optimizer
from memtail.trainers.images.stack import StackedLinear, channels_first, channels_last, is_shared

# Parts of an array begin at a multiple of this many floats, since kernels read 256 bytes at a time.
_ALIGNMENT = 64


class CapturedDenseStack(CapturedSteps):
    """S networks of linear layers with ReLU between them, and the state of their optimizer: float32.

    Like every stack, it maps normalised examples to logits [S, B, classes]. Parameters and the optimizer's state are buffers, so that
    `state_dict` holds everything that training depends on.

    Args:
        layers: the linear layers of all S networks, from input to logits.
        input_shape: of an example, (C, H, W) or (D,), which is D channels of one pixel.
        shift: float32 [C] or [D]; values are normalised as (value + shift) * scale.
        scale: float32 [C] or [D].
        optimizer: constants of the optimizer; its learning rate is not used.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
    """

    values: Tensor

    def __init__(
        self,
        layers: list[StackedLinear],
        input_shape: tuple[int, ...],
        shift: Tensor,
        scale: Tensor,
        optimizer: OptimizerSpec,
        label_smoothing: float,
    ) -> None:
        super().__init__(layers[0].weight.shape[0], shift.device)
        self._image = input_shape if len(input_shape) == 3 else (*input_shape, 1, 1)
        pixels = self._image[1] * self._image[2]
        self._shift, self._scale = shift.repeat(pixels), scale.repeat(pixels)
        self._smoothing = label_smoothing
        parameters = [tensor.detach() for layer in layers for tensor in (layer.weight, cast(Tensor, layer.bias))]
        parameters[0] = channels_last(parameters[0], self._image)
        shapes = [parameter.shape for parameter in parameters]
        self.classes = shapes[-2][1]
        total = sum(_padded(shape) for shape in shapes)
        self.register_buffer("values", torch.zeros(total, device=shift.device))
        self._gradients = torch.zeros_like(self.values)
        self._optimizer = Optimizer(optimizer, [self.values])
        self._parameters_at, self._gradients_at = (_parts(array, shapes) for array in (self.values, self._gradients))
        for place, parameter in zip(self._parameters_at, parameters, strict=True):
            place.copy_(parameter)

    def tensors_of(self, place: int) -> list[Tensor]:
        """Return weight [out, in] and bias [out] of each layer of one of the networks."""
        weights, biases = self._parameters_at[::2], self._parameters_at[1::2]
        tensors = [tensor for weight, bias in zip(weights, biases, strict=True) for tensor in (weight[place], bias[place, 0])]
        tensors[0] = channels_first(tensors[0], self._image)
        return tensors

    def forward(self, images: Tensor) -> Tensor:
        """Map float32 images [S, B, C, H, W], or [B, C, H, W] shared by all networks, to logits [S, B, classes]; or features, alike."""
        flat = images.movedim(-3, -1).flatten(-3) if images.dim() > 3 else images
        return self._outputs(flat.expand(self.width, *flat.shape) if is_shared(images) else flat)[-1]

    @torch.no_grad()
    def _step(self, pixels: Tensor, labels: Tensor) -> None:
        outputs = self._outputs((pixels.flatten(2) + self._shift) * self._scale)
        log_p = outputs[-1].log_softmax(-1)
        labelled = labels[..., None] == torch.arange(self.classes, device=labels.device)
        target = labelled * (1 - self._smoothing) + self._smoothing / self.classes
        self._loss -= (log_p * target).sum((1, 2), dtype=torch.float64)  # rounded alike in any order
        gradient = (log_p.exp_() - target) / labels.shape[1]
        for layer in reversed(range(0, len(self._gradients_at), 2)):
            torch.bmm(gradient.mT, outputs[layer // 2], out=self._gradients_at[layer])
            torch.sum(gradient, 1, keepdim=True, out=self._gradients_at[layer + 1])
            if layer:
                gradient = torch.bmm(gradient, self._parameters_at[layer]).mul_(outputs[layer // 2] > 0)
        self._optimizer.step([self._gradients], self._rate)

    def _outputs(self, examples: Tensor) -> list[Tensor]:
        """Return the examples [S, B, D], then the outputs of each layer."""
        outputs, last = [examples], len(self._parameters_at) - 2
        for layer in range(0, last + 1, 2):
            weight, bias = self._parameters_at[layer : layer + 2]
            sums = torch.baddbmm(bias, outputs[-1], weight.mT)
            outputs.append(sums if layer == last else sums.relu_())
        return outputs


def _padded(shape: torch.Size) -> int:
    return -(-shape.numel() // _ALIGNMENT) * _ALIGNMENT


def _parts(array: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    parts = torch.split(array, [_padded(shape) for shape in shapes])
    return [part[: shape.numel()].view(shape) for part, shape in zip(parts, shapes, strict=True)]
