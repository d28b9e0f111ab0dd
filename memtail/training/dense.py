"""Fully connected networks on a CPU: stacks whose training steps are compiled, with no array of torch's made on the way.

A small network's step is over before automatic differentiation has made its graph. Here a run of steps is one call; networks of a stack
are trained one after another, each staying in the processor's cache meanwhile.
"""

from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtail.experiment import Sgd
from memtail.training.stack import Stacked, StackedLinear


class DenseStack(nn.Module):
    """S networks of linear layers with ReLU between them, with their momenta: float32, on a CPU.

    It takes images as every stack does and gives logits [S, B, classes]. Parameters and momenta are buffers, so that `state_dict` holds
    all that training depends on.

    Args:
        layers: the linear layers of all S networks, from input to logits.
        optimizer: gradient descent's constants, but for the learning rate.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
    """

    values: Tensor
    momenta: Tensor

    def __init__(self, layers: list[StackedLinear], optimizer: Sgd, label_smoothing: float) -> None:
        from memtail.training.tile import COLUMNS, ROWS  # compiles

        super().__init__()
        self.width, self.classes = layers[-1].weight.shape[:2]
        self._features = layers[0].weight.shape[2]
        self._columns, self._rows = COLUMNS, ROWS
        widths = [self._features, *(layer.weight.shape[1] for layer in layers)]
        self._sizes = np.array([-(-width // COLUMNS) * COLUMNS for width in widths])
        areas = self._sizes[:-1] * self._sizes[1:]
        self._weights = np.concatenate([[0], np.cumsum(areas)[:-1]])
        self._biases = areas.sum() + np.concatenate([[0], np.cumsum(self._sizes[1:])[:-1]])
        self.register_buffer("values", torch.zeros(self.width, int(areas.sum() + self._sizes[1:].sum())))
        self.register_buffer("momenta", torch.zeros_like(self.values))
        self._turned = np.empty(int(areas[1:].max(initial=0)), np.float32)
        self._room: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]] = {}
        self._constants = (
            np.float32(optimizer.momentum),
            np.float32(optimizer.weight_decay),
            optimizer.nesterov,
            np.float32(label_smoothing),
        )
        for layer, weight_at, bias_at in zip(layers, self._weights.tolist(), self._biases.tolist(), strict=True):
            self._load(layer, weight_at, bias_at)

    @torch.no_grad()
    def _load(self, layer: StackedLinear, weight_at: int, bias_at: int) -> None:
        out, inputs = layer.weight.shape[1:]
        padded = F.pad(layer.weight.mT, (0, -out % self._columns, 0, -inputs % self._columns))
        panels = padded.view(*padded.shape[:2], -1, self._columns).transpose(1, 2).flatten(1)
        self.values[:, weight_at : weight_at + panels.shape[1]] = panels
        self.values[:, bias_at : bias_at + out] = cast(Tensor, layer.bias)[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        """float32 images [S, B, C, H, W], or [B, C, H, W] shared by all networks -> logits [S, B, classes]."""
        from memtail.training.dense_kernels import forward  # compiles

        shared = images.dim() == 4
        count = images.shape[0 if shared else 1]
        x = self._inputs(images[None] if shared else images, count)
        padded = -(-count // self._rows) * self._rows
        work, outputs, _ = self._for(padded)
        logits = np.empty((self.width, count, self.classes), np.float32)
        shape = (int(self._sizes[-1]) // self._columns, padded, self._columns)
        for network in range(self.width):
            values = self.values[network].numpy()
            forward(x[0 if shared else network], 0, count, padded, values, self._sizes, self._weights, self._biases, work, outputs)
            panels = outputs[work[-1] : work[-1] + np.prod(shape)].reshape(shape)
            logits[network] = panels[:, :count].transpose(1, 0, 2).reshape(count, -1)[:, : self.classes]
        return torch.from_numpy(logits)

    def train_steps(self, images: Tensor, labels: Tensor, bounds: list[tuple[int, int]], rates: list[float]) -> Tensor:
        """One step of gradient descent per batch, on every network.

        Args:
            images: float32 [S, B, C, H, W], the examples of all the batches.
            labels: int64 [S, B].
            bounds: start and stop of each batch among them, each beginning where the last ended.
            rates: the learning rate of each step.

        Returns:
            float32 [S], the sums of the examples' losses.
        """
        from memtail.training.dense_kernels import train_steps  # compiles

        x = self._inputs(images, bounds[-1][1] - bounds[-1][0])
        wanted = labels.numpy()
        places = np.array([bounds[0][0], *(stop for _, stop in bounds)])
        steps = np.array(rates, np.float32)
        work, outputs, deltas = self._for(-(-int(np.diff(places).max()) // self._rows) * self._rows)
        losses = [
            train_steps(
                x[network], wanted[network], places, steps, self.classes,
                self.values[network].numpy(), self.momenta[network].numpy(),
                self._sizes, self._weights, self._biases, work, outputs, deltas, self._turned, *self._constants,
            )
            for network in range(self.width)
        ]  # fmt: skip
        return torch.tensor(losses)

    def _inputs(self, images: Tensor, last: int) -> npt.NDArray[np.float32]:
        """[S, B, C, H, W] -> float32 [S, ...], features and examples padded to what the compiled loops read.

        `last` is the size of the last batch among the examples.
        """
        flat = images.flatten(2)
        columns, rows = -flat.shape[2] % self._columns, -last % self._rows
        padded = F.pad(flat, (0, columns, 0, rows)) if columns or rows else flat
        return padded.flatten(1).numpy()

    def _for(self, padded: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Where each layer's outputs begin for so many examples, and room for them and their gradients, made once."""
        if padded not in self._room:
            work = np.concatenate([[0, 0], np.cumsum(self._sizes[1:-1] * padded)])
            total = int(self._sizes[1:].sum()) * padded
            self._room[padded] = work, np.zeros(total, np.float32), np.zeros(total, np.float32)
        return self._room[padded]


def dense_layers(stack: nn.Module) -> list[StackedLinear] | None:
    """The linear layers of a stack that is flattening, then linear layers with ReLU between them; None of any other."""
    if not isinstance(stack, Stacked):
        return None
    layers = list(stack.layers)[1:]
    linear = [layer for layer in layers[::2] if isinstance(layer, StackedLinear)]
    between = [layer for layer in layers[1::2] if isinstance(layer, nn.ReLU)]
    whole = linear and len(linear) + len(between) == len(layers) and len(linear) == len(between) + 1
    return linear if whole and all(layer.bias is not None for layer in linear) else None


def mean_over_batch(losses: Tensor) -> Tensor:
    """[S, B] -> [S], each mean taken in the same order whatever S is."""
    return losses.cumsum(1)[:, -1] / losses.shape[1]
