"""Networks of any kind on a CUDA device: the training step by automatic differentiation, captured in a CUDA graph.

One object serves all trials of an experiment in a process, one stack after the other: it is loaded with the weights of each. So a graph
is captured, and a network is compiled, once.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple, cast

import structlog
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtail.models.trained import normalised
from memtail.spec import TrainingSpec
from memtail.trainers.images.cuda.captured import Captured
from memtail.trainers.images.cuda.steps import CapturedSteps, Optimizer
from memtail.trainers.images.devices import is_out_of_memory
from memtail.trainers.images.initial import GENERATOR
from memtail.trainers.images.stack import Single, Stacked, is_shared, use_channels_last

log = structlog.get_logger()

_Forward = Callable[[Tensor], Tensor]


class CapturedNetwork(CapturedSteps):
    """A stack of built-in networks, and the state of their optimizer: float32. It is loaded before each training.

    Networks that draw random numbers, such as those with dropout, take the same steps without a graph.

    Args:
        stack: one of the architecture.
        shift: float32 [C] or [D]; values are normalised as (value + shift) * scale.
        scale: float32 [C] or [D].
        recipe: of the training; its learning rate is not used.
        bfloat16: whether products have factors in bfloat16.
        pixels: uint8 [S, B, H, W, C] or float32 [S, B, D], a batch to try the network with.
        compiled: whether to compile forward and backward pass for batches of this size.

    Attributes:
        compiled: whether they are compiled: not where that fails.
    """

    def __init__(
        self, stack: Stacked | Single, shift: Tensor, scale: Tensor, recipe: TrainingSpec, bfloat16: bool, pixels: Tensor, compiled: bool
    ) -> None:
        super().__init__(len(pixels), pixels.device)
        self.stack = copy.deepcopy(stack).to(pixels.device).train()
        if pixels.device.type == "cuda":
            use_channels_last(self.stack)
        self._shift, self._scale, self._smoothing, self._bfloat16 = shift, scale, recipe.label_smoothing, bfloat16
        self._trained = [parameter for parameter in self.stack.parameters() if parameter.requires_grad]
        self._optimizer = Optimizer(recipe.optimizer, self._trained)
        self._evaluations: dict[torch.Size, _Evaluation] = {}
        before = _random_state(pixels.device)
        with torch.no_grad():
            self.classes = self._logits(self.stack, self._normalised(pixels)).shape[-1]
        self._repeats = torch.equal(_random_state(pixels.device), before)
        self._full = pixels.shape[1]
        self._compiled = self._compile(pixels) if compiled else None
        self.compiled = self._compiled is not None

    def load(self, stack: Stacked | Single) -> None:
        """Begin anew with the parameters and buffers of a stack of the same architecture."""
        self.stack.train()  # an evaluation may have failed
        with torch.no_grad():
            for own, given in zip(_tensors(self.stack), _tensors(stack), strict=True):
                own.copy_(given, non_blocking=True)
            for state in self._optimizer.buffers():
                state.zero_()

    def tensors_of(self, place: int) -> list[Tensor]:
        """Return the content of the state dict of one of the networks, in its order."""
        return self.stack.tensors_of(place)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map images, or features, to logits [S, B, classes] as every stack does; in evaluation."""
        if not self._repeats:
            return cast(Tensor, self.stack(images))
        evaluation = self._evaluations.get(images.shape) or self._evaluation_of(images)
        evaluation.images.copy_(images)
        evaluation.captured(lambda: evaluation.logits.copy_(self._logits(self.stack, evaluation.images)))
        self._evaluations[images.shape] = evaluation  # not before it fits into the device's memory
        return evaluation.logits.clone()

    def _evaluation_of(self, images: Tensor) -> "_Evaluation":
        size = len(images) if is_shared(images) else images.shape[1]
        logits = torch.empty(self.width, size, self.classes, device=images.device)
        return _Evaluation(torch.empty_like(images), logits, Captured([logits], self._pool))

    def _step(self, pixels: Tensor, labels: Tensor) -> None:
        forward = self._compiled if self._compiled and labels.shape[1] == self._full else self.stack
        losses, gradients = self._differentiated(forward, pixels, labels)
        self._optimizer.step(gradients, self._rate)
        self._loss += losses.sum(1, dtype=torch.float64)  # rounded alike in any order

    def _differentiated(self, forward: _Forward, pixels: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the losses [S, B], and the gradients of each network's mean loss, in the layouts of the parameters."""
        logits = self._logits(forward, self._normalised(pixels))
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=self._smoothing)
        mean = torch.full_like(losses, 1 / labels.shape[1])
        gradients = torch.autograd.grad(losses, self._trained, mean, materialize_grads=True)
        laid_out = [
            gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)
            for gradient, parameter in zip(gradients, [parameter.detach() for parameter in self._trained], strict=True)
        ]
        return losses.detach().view(labels.shape), laid_out

    def _normalised(self, pixels: Tensor) -> Tensor:
        return normalised(pixels, self._shift, self._scale, are_images=pixels.dim() == 5)

    def _logits(self, forward: _Forward, examples: Tensor) -> Tensor:
        # without the cache, whose tensors may belong to no graph, or to another one
        device = examples.device.type
        with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False) if self._bfloat16 else nullcontext():
            return forward(examples).float()

    def _compile(self, pixels: Tensor) -> _Forward | None:
        """Compile the network, on a batch; return None where that fails, as without a compiler."""
        torch.compiler.reset()  # networks that this process compiled before count towards a limit
        torch.use_deterministic_algorithms(True, warn_only=True)  # of the compiler too
        compiled: _Forward = torch.compile(self.stack.forward, fullgraph=True, dynamic=False)
        try:
            with GENERATOR:
                self._differentiated(compiled, pixels, pixels.new_zeros(pixels.shape[:2], dtype=torch.int64))
        except Exception as error:  # torch does not limit what its compiler raises
            if is_out_of_memory(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("network cannot be compiled here, training without", error=reason, device=str(pixels.device))
            return None
        return compiled


class _Evaluation(NamedTuple):
    """Images of a batch and their logits [S, B, classes], always in the same memory."""

    images: Tensor
    logits: Tensor
    captured: Captured


def _tensors(stack: nn.Module) -> list[Tensor]:
    return [*stack.parameters(), *stack.buffers()]


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
