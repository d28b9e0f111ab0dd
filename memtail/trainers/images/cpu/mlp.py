"""Fully connected networks on a CPU: stacks with compiled training steps, which allocate no torch tensors.

The step of a small network takes less time than automatic differentiation needs for its graph. Here a run of steps is one call; the
networks of a stack are trained one after another, each from the processor's cache.
"""

from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtail.spec import Adam, AdamW, OptimizerSpec, Sgd
from memtail.trainers.images.stack import Stacked, StackedLinear, channels_first, channels_last, is_shared

#: Optimizers with compiled steps, and with captured ones on CUDA devices.
COMPILED = (Sgd, Adam, AdamW)


class DenseStack(nn.Module):
    """S networks of linear layers with ReLU between them, and the state of their optimizer: float32, on a CPU.

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
    momenta: Tensor
    squares: Tensor
    steps: Tensor

    def __init__(
        self,
        layers: list[StackedLinear],
        input_shape: tuple[int, ...],
        shift: Tensor,
        scale: Tensor,
        optimizer: OptimizerSpec,
        label_smoothing: float,
    ) -> None:
        from memtail.trainers.images.cpu.gemm import COLUMNS, ROWS  # compiles

        super().__init__()
        self.width, self.classes = layers[-1].weight.shape[:2]
        self._columns, self._rows = COLUMNS, ROWS
        self._image = input_shape if len(input_shape) == 3 else (*input_shape, 1, 1)
        pixels = self._image[1] * self._image[2]
        self._shift, self._scale = (constants.repeat(pixels).numpy() for constants in (shift, scale))
        widths = [len(self._shift), *(layer.weight.shape[1] for layer in layers)]
        self._widths = widths
        self._sizes = np.array([-(-width // COLUMNS) * COLUMNS for width in widths])
        areas = self._sizes[:-1] * self._sizes[1:]
        self._weights = np.concatenate([[0], np.cumsum(areas)[:-1]])
        self._biases = areas.sum() + np.concatenate([[0], np.cumsum(self._sizes[1:])[:-1]])
        self.register_buffer("values", torch.zeros(self.width, int(areas.sum() + self._sizes[1:].sum())))
        self.register_buffer("momenta", torch.zeros_like(self.values))
        if not isinstance(optimizer, Sgd):
            self.register_buffer("squares", torch.zeros_like(self.values))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._transposed = np.empty(int(areas[1:].max(initial=0)), np.float32)
        self._workspaces: dict[int, _Workspace] = {}
        self._optimizer, self._smoothing = optimizer, np.float32(label_smoothing)
        for layer, weight_at, bias_at in zip(layers, self._weights.tolist(), self._biases.tolist(), strict=True):
            weight = layer.weight.detach()
            if not weight_at:  # pixels are channels last
                weight = channels_last(weight, self._image)
            self._load(weight, cast(Tensor, layer.bias).detach(), weight_at, bias_at)

    def _load(self, weight: Tensor, bias: Tensor, weight_at: int, bias_at: int) -> None:
        out, inputs = weight.shape[1:]
        padded = F.pad(weight.mT, (0, -out % self._columns, 0, -inputs % self._columns))
        panels = padded.view(*padded.shape[:2], -1, self._columns).transpose(1, 2).flatten(1)
        self.values[:, weight_at : weight_at + panels.shape[1]] = panels
        self.values[:, bias_at : bias_at + out] = bias[:, 0]

    def tensors_of(self, place: int) -> list[Tensor]:
        """Return weight [out, in] and bias [out] of each layer of one of the networks."""
        tensors: list[Tensor] = []
        for layer, (weight_at, bias_at) in enumerate(zip(self._weights.tolist(), self._biases.tolist(), strict=True)):
            (rows, columns), (inputs, out) = self._sizes[layer : layer + 2].tolist(), self._widths[layer : layer + 2]
            panels = self.values[place, weight_at : weight_at + rows * columns].view(-1, rows, self._columns)
            weight = panels.transpose(0, 1).reshape(rows, columns)[:inputs, :out].mT
            if not layer:  # pixels are channels last
                weight = channels_first(weight, self._image)
            tensors += [weight, self.values[place, bias_at : bias_at + out]]
        return tensors

    def forward(self, images: Tensor) -> Tensor:
        """Map float32 images [S, B, C, H, W], or [B, C, H, W] shared by all networks, to logits [S, B, classes]; or features, alike."""
        from memtail.trainers.images.cpu.mlp_kernels import forward  # compiles

        shared = is_shared(images)
        flat = images.movedim(-3, -1).flatten(-3) if images.dim() > 3 else images
        count, pixels = flat.shape[-2:]
        padded = -(-count // self._rows) * self._rows
        x = F.pad(flat, (0, int(self._sizes[0]) - pixels, 0, padded - count)).contiguous().numpy()
        workspace = self._workspace(padded)
        logits = np.empty((self.width, count, self.classes), np.float32)
        shape = (int(self._sizes[-1]) // self._columns, padded, self._columns)
        for network, values in enumerate(self.values.numpy()):
            examples = x if shared else x[network]
            forward(
                examples.reshape(-1), padded, values, self._sizes, self._weights, self._biases, workspace.starts, workspace.outputs
            )  # fmt: skip
            panels = workspace.outputs[workspace.starts[-1] : workspace.starts[-1] + np.prod(shape)].reshape(shape)
            logits[network] = panels[:, :count].transpose(1, 0, 2).reshape(count, -1)[:, : self.classes]
        return torch.from_numpy(logits)

    def train_steps(self, pixels: Tensor, labels: Tensor, bounds: list[tuple[int, int]], rates: list[float]) -> Tensor:
        """Take one step of the optimizer per batch, on every network.

        Args:
            pixels: uint8 [S, B, H, W, C] or float32 [S, B, D], the examples of all batches.
            labels: int64 [S, B].
            bounds: start and stop of each batch among the examples; each starts where the one before stops.
            rates: the learning rate of each step.

        Returns:
            float32 [S], the sums of the examples' losses.
        """
        from memtail.trainers.images.cpu.mlp_kernels import train_steps  # compiles

        places = np.array([bounds[0][0], *(stop for _, stop in bounds)])
        workspace = self._workspace(-(-int(np.diff(places).max()) // self._rows) * self._rows)
        losses = np.empty(self.width, np.float32)
        train_steps(
            pixels.flatten(1).numpy(), labels.numpy(), self._shift, self._scale, places, *self._update(rates), self.classes,
            self.values.numpy(), self.momenta.numpy(), self._sizes, self._weights, self._biases,
            workspace.starts, workspace.x, workspace.outputs, workspace.deltas, self._transposed, self._smoothing, losses,
        )  # fmt: skip
        return torch.from_numpy(losses)

    def _update(self, rates: list[float]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """Return the rates of the next steps, the constants and the mean squares, as `train_steps` of the kernels takes them."""
        spec, by_step = self._optimizer, np.ones((len(rates), 3), np.float32)
        if isinstance(spec, Sgd):
            by_step[:, 0] = rates
            return by_step, np.array([spec.momentum, spec.weight_decay, spec.nesterov], np.float32), None
        first, second = spec.betas
        decoupled = isinstance(spec, AdamW)
        steps = int(self.steps) + 1 + np.arange(len(rates))
        by_step[:, 0] = rates / (1 - first**steps)
        by_step[:, 1] = np.sqrt(1 - second**steps)
        if decoupled:
            by_step[:, 2] = 1 - np.array(rates) * spec.weight_decay
        self.steps += len(rates)
        constants = [1 - first, second, 1 - second, spec.eps, 0.0 if decoupled else spec.weight_decay]
        return by_step, np.array(constants, np.float32), self.squares.numpy()

    def _workspace(self, padded: int) -> "_Workspace":
        """Return the arrays for a padded number of examples, allocated once."""
        if padded not in self._workspaces:
            starts = np.concatenate([[0, 0], np.cumsum(self._sizes[1:-1] * padded)])
            total = int(self._sizes[1:].sum()) * padded
            x, outputs, deltas = (np.zeros(size, np.float32) for size in (self._sizes[0] * padded, total, total))
            self._workspaces[padded] = _Workspace(starts, x, outputs, deltas)
        return self._workspaces[padded]


class _Workspace(NamedTuple):
    """Arrays for a number of examples: starts of each layer's outputs, the batch, the outputs, and their gradients."""

    starts: npt.NDArray[np.int64]
    x: npt.NDArray[np.float32]
    outputs: npt.NDArray[np.float32]
    deltas: npt.NDArray[np.float32]


def dense_layers(stack: nn.Module) -> list[StackedLinear] | None:
    """Return the linear layers of a stack of flattening, then linear layers with ReLU between them; None for any other stack."""
    if not isinstance(stack, Stacked):
        return None
    layers = list(stack.layers)[1:]
    linear = [layer for layer in layers[::2] if isinstance(layer, StackedLinear)]
    between = [layer for layer in layers[1::2] if isinstance(layer, nn.ReLU)]
    whole = linear and len(linear) + len(between) == len(layers) and len(linear) == len(between) + 1
    return linear if whole and all(layer.bias is not None for layer in linear) else None
