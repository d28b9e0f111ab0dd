"""Training steps on batches that stay in the same memory, so that each is captured once, and the optimizers' updates of these steps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memtail.spec import AdamW, OptimizerSpec, Sgd
from memtail.trainers.images.cuda.captured import Captured


class CapturedSteps(nn.Module):
    """S networks whose training step is captured for each size of a batch. Subclasses define the step.

    Parameters and buffers hold everything that training depends on, and keep their memory.

    Args:
        width: S.
        device: where they are trained.
    """

    _repeats = True  # whether a graph can repeat the step

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.width = width
        self._rate, self._loss = torch.zeros((), device=device), torch.zeros(width, device=device)
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._batches: dict[int, _Batch] = {}

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
        self._loss.zero_()
        for (start, stop), rate in zip(bounds, rates, strict=True):
            self._rate.fill_(rate)
            self._take_step(pixels[:, start:stop], labels[:, start:stop])
        return self._loss.clone()

    def _take_step(self, pixels: Tensor, labels: Tensor) -> None:
        if not self._repeats:
            self._step(pixels, labels)
            return
        size = labels.shape[1]
        batch = self._batches.pop(size, None)
        if batch is None:
            # two are kept, those used last: the full size, and one of the last batches of subsets of many sizes
            self._batches = dict(list(self._batches.items())[-1:])
            kept, of = (torch.empty(given.shape, dtype=given.dtype, device=given.device) for given in (pixels, labels))
            batch = _Batch(kept, of, Captured([*self.parameters(), *self.buffers(), self._loss], self._pool))
        self._batches[size] = batch
        batch.pixels.copy_(pixels)
        batch.labels.copy_(labels)
        batch.captured(lambda: self._step(batch.pixels, batch.labels))

    def _step(self, pixels: Tensor, labels: Tensor) -> None:
        """Take one step with the rate `_rate`, without waiting for the device, and add the sums of the losses to `_loss`."""
        raise NotImplementedError


class _Batch(NamedTuple):
    """Examples [S, B, ...] and labels [S, B] of a batch, always in the same memory, and the step on them."""

    pixels: Tensor
    labels: Tensor
    captured: Captured


class Optimizer(nn.Module):
    """An optimizer with the kernels that torch's own ones use, and its state; the rate is a tensor, which a replayed graph reads anew.

    Args:
        spec: its constants; its learning rate is not used.
        values: the parameters.
    """

    steps: Tensor

    def __init__(self, spec: OptimizerSpec, values: Sequence[Tensor]) -> None:
        super().__init__()
        self._spec, self._values = spec, list(values)
        self._momenta = [] if isinstance(spec, Sgd) and not spec.momentum else self._like_values("momentum")
        if not isinstance(spec, Sgd):
            self._squares = self._like_values("square")
            self.register_buffer("steps", torch.zeros((), device=values[0].device))

    def _like_values(self, name: str) -> list[Tensor]:
        tensors = [torch.zeros_like(value, requires_grad=False) for value in self._values]
        for place, tensor in enumerate(tensors):
            self.register_buffer(f"{name}{place}", tensor)
        return tensors

    @torch.no_grad()
    def step(self, gradients: list[Tensor], rate: Tensor) -> None:
        """Update the parameters.

        Args:
            gradients: of each parameter, in its layout.
            rate: float32, a scalar on the device.
        """
        spec = self._spec
        constants: dict[str, Any] = {"lr": rate, "weight_decay": spec.weight_decay, "maximize": False}
        if isinstance(spec, Sgd):
            constants |= {"momentum": spec.momentum, "dampening": 0.0, "nesterov": spec.nesterov, "is_first_step": False}
            torch._fused_sgd_(self._values, gradients, self._momenta, **constants)
            return
        self.steps += 1
        constants |= {"beta1": spec.betas[0], "beta2": spec.betas[1], "eps": spec.eps, "amsgrad": False}
        fused = torch._fused_adamw_ if isinstance(spec, AdamW) else torch._fused_adam_
        fused(self._values, gradients, self._momenta, self._squares, [], [self.steps] * len(gradients), **constants)
