"""Trains the trials of one stack together, from initial weights to the outcomes of the final models."""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtail.models import own_network
from memtail.randomness import Purpose, torch_seed
from memtail.spec import Experiment, RecordedOutcomes
from memtail.trainers.images.batches import Epoch, batch_bounds, draw_epoch
from memtail.trainers.images.cpu.mlp import COMPILED, DenseStack, dense_layers
from memtail.trainers.images.cuda.mlp import CapturedDenseStack
from memtail.trainers.images.cuda.network import CapturedNetwork
from memtail.trainers.images.devices import float32_products
from memtail.trainers.images.evaluation import SplitOutcomes, evaluate
from memtail.trainers.images.images import DeviceImages
from memtail.trainers.images.initial import InitialStack, draw_stack
from memtail.trainers.images.optimizers import make_optimizer
from memtail.trainers.images.precision import computed_precision
from memtail.trainers.images.prefetch import ToDevice, prefetched
from memtail.trainers.images.profiling import Phases
from memtail.trainers.images.schedule import learning_rate_factor
from memtail.trainers.images.shard_size import is_compiled
from memtail.trainers.images.stack import Single, Stacked, join_parameters, use_channels_last

_Module = TypeVar("_Module", bound=nn.Module)

# Pixels of each network per call of the compiled steps: enough for the work to outweigh the call.
_PIXELS_AT_ONCE = 1 << 16

# Stacks of fully connected networks with steps of their own, by device.
_Dense = DenseStack | CapturedDenseStack
_DENSE: dict[str, type[_Dense]] = {"cpu": DenseStack, "cuda": CapturedDenseStack}
# Devices on which steps of other networks are captured, too.
_CAPTURING = {"cuda"}


@dataclass(frozen=True)
class StackResult:
    """Outcomes of S trials.

    Attributes:
        train: of the final models, on the training split.
        test: on the test split.
        loss: float64 [S], the mean training loss in the last epoch.
        snapshots: correctness on the training split after the epochs that are recorded, bool [S, n] each.
    """

    train: SplitOutcomes
    test: SplitOutcomes
    loss: npt.NDArray[np.float64]
    snapshots: dict[int, npt.NDArray[np.bool_]] = field(default_factory=dict)


class StackedRun:
    """S trials in training. The state can be saved at any step; restored, it continues to equal bits.

    Args:
        experiment: the declaration.
        images: the dataset on the device.
        input_shape: of an example, (C, H, W) or (D,).
        classes: number of classes.
        trials: the S trials; more than one only if the network is stackable.
        subsets: int64 [S, m], the examples of each trial's subset.
        phases: accumulates the seconds of each phase; compiled and captured steps count as forward/backward, their
            optimizer included.
        on_evaluated: called after each batch of an evaluation.
        initial: the networks before training, of which it takes possession; by default they are drawn now.
        epoch: the draws of the first epoch, if they were made before.
    """

    def __init__(
        self,
        experiment: Experiment,
        images: DeviceImages,
        input_shape: tuple[int, ...],
        classes: int,
        trials: Sequence[int],
        subsets: npt.NDArray[np.int64],
        phases: Phases | None = None,
        on_evaluated: Callable[[], object] = lambda: None,
        initial: InitialStack | None = None,
        epoch: Epoch | None = None,
    ) -> None:
        self.experiment, self.images, self.trials, self.subsets = experiment, images, trials, subsets
        self.recipe, self.phases, self._on_evaluated = experiment.training, phases or Phases(images.device), on_evaluated
        network, stack = initial or draw_stack(experiment, input_shape, classes, trials, pin=images.device.type == "cuda")
        self._names, self._first_epoch = list(own_network(network).state_dict()), epoch
        self.precision = computed_precision(self.recipe.precision, network, images.device)
        self.autocast = torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")
        self.bounds = batch_bounds(subsets.shape[1], self.recipe.batch_size)
        self.stacked = isinstance(stack, Stacked)
        own = self._with_own_steps(stack, network, input_shape)
        self.stack: Stacked | Single | _Dense | CapturedNetwork = own or self._on_device(stack).train()
        self.optimizer: torch.optim.Optimizer | None = None
        if own is None:
            if images.device.type == "cuda":
                use_channels_last(self.stack)
            parameters = [join_parameters(self.stack)] if self.stacked else list(self.stack.parameters())
            self.optimizer = make_optimizer(self.recipe.optimizer, parameters)
        self.steps_at_once = 1
        if isinstance(own, DenseStack):
            # independent of the stack's width, on which no bit may depend
            self.steps_at_once = max(1, _PIXELS_AT_ONCE // (self.recipe.batch_size * math.prod(input_shape)))
        if not self.stacked:  # such a network may draw in training (dropout)
            torch.manual_seed(torch_seed(experiment.subsets.seed, Purpose.NOISE, trials[0]))
        self.epoch, self.step = 0, 0
        self.loss_sum = torch.zeros(len(trials), device=images.device)
        self.snapshots: dict[int, npt.NDArray[np.bool_]] = {}

    def _with_own_steps(self, stack: Stacked | Single, network: nn.Module, input_shape: tuple[int, ...]) -> _Dense | CapturedNetwork | None:
        """Return the stack, on the device, as one with training steps of its own; None if it has none there."""
        images, recipe, on = self.images, self.recipe, self.images.device.type
        if not isinstance(recipe.optimizer, COMPILED) or (on in _CAPTURING and self.experiment.execution.compile is False):
            return None
        layers = dense_layers(stack) if on in _DENSE and self.precision != "bfloat16" else None
        if layers:
            moved = [self._on_device(layer) for layer in layers]
            return _DENSE[on](moved, input_shape, images.shift, images.scale, recipe.optimizer, recipe.label_smoothing)
        if on not in _CAPTURING or self.experiment.runs_user_code:
            return None
        captured = self._captured(stack, network, input_shape)
        captured.load(stack)
        return captured

    def _on_device(self, module: _Module) -> _Module:
        return module.to(self.images.device, non_blocking=self.images.device.type == "cuda")  # on CUDA from page-locked memory

    def _captured(self, stack: Stacked | Single, network: nn.Module, input_shape: tuple[int, ...]) -> CapturedNetwork:
        """Return the network that all stacks of this width share in this process, one after the other."""
        images, recipe, model = self.images, self.recipe, self.experiment.model
        compiled = is_compiled(self.experiment, network, input_shape, len(images.train), len(images.test))
        optimizer = recipe.optimizer.model_copy(update={"lr": 1.0})  # the rate is given at each step
        shape = (len(self.trials), self.bounds[0][1], *images.train.shape[1:])
        made_for = (model, optimizer, recipe.label_smoothing, self.precision, compiled), shape
        captured = next((kept for key, kept in images.networks if key == made_for), None)
        # a shard has stacks of two widths, the last one the rest
        images.networks = [(key, kept) for key, kept in images.networks if key[0] == made_for[0] and key != made_for][-1:]
        if captured is None:
            pixels = torch.zeros(shape, dtype=images.train.dtype, device=images.device)
            with float32_products(tf32=self.precision == "tf32"):
                bfloat16 = self.precision == "bfloat16"
                captured = CapturedNetwork(stack, images.shift, images.scale, recipe, bfloat16, pixels, compiled)
        images.networks.append((made_for, captured))
        return cast(CapturedNetwork, captured)

    def train(self, between_steps: Callable[["StackedRun"], None]) -> StackResult:
        """Train to the end and evaluate.

        Args:
            between_steps: called after every few steps; it may save the state, or raise to stop.
        """
        with float32_products(tf32=self.precision == "tf32"):
            return self._train(between_steps)

    def _train(self, between_steps: Callable[["StackedRun"], None]) -> StackResult:
        self._take_snapshot()  # the run may have been interrupted before it
        with closing(prefetched(self._drawn, range(self.epoch, self.recipe.epochs), self.images.device)) as epochs:
            while self.epoch < self.recipe.epochs:
                with self.phases.measure("data"):
                    drawn = next(epochs)
                self._train_epoch(drawn, between_steps)
                self._take_snapshot()
        m, record = self.subsets.shape[1], self.experiment.record
        train, test = (self._evaluate(split, record) for split in ("train", "test"))
        return StackResult(train, test, (self.loss_sum / m).cpu().double().numpy(), self.snapshots)

    def _take_snapshot(self) -> None:
        if self.step == 0 and self.epoch in self.experiment.record.snapshots and self.epoch not in self.snapshots:
            self.snapshots[self.epoch] = self._evaluate("train", RecordedOutcomes()).correct

    def _evaluate(self, split: str, record: RecordedOutcomes) -> SplitOutcomes:
        if not len(self.images.train if split == "train" else self.images.test):
            return SplitOutcomes.of_none(len(self.trials), record)
        with self.phases.measure("evaluation"):
            return evaluate(self.stack, self.images, split, record, self.autocast, self.recipe.batch_size, self._on_evaluated)

    def _drawn(self, epoch: int, to_device: ToDevice) -> Epoch:
        if epoch == 0 and (first := self._first_epoch) is not None:
            self._first_epoch = None
            return first
        recipe, seed, size = self.recipe, self.experiment.subsets.seed, self.images.train.shape[1:3]
        return draw_epoch(recipe.augmentation, seed, self.trials, epoch, self.subsets, size, to_device)

    def _train_epoch(self, drawn: Epoch, between_steps: Callable[["StackedRun"], None]) -> None:
        recipe, images = self.recipe, self.images
        steps = recipe.epochs * len(self.bounds)
        if self.step == 0:
            self.loss_sum.zero_()
        calls = [self.bounds[at : at + self.steps_at_once] for at in range(self.step, len(self.bounds), self.steps_at_once)]
        parts = [slice(bounds[0][0], bounds[-1][1]) for bounds in calls]
        with closing(images.batches(drawn, parts)) as batches:
            for bounds, part in zip(calls, parts, strict=True):
                done = self.epoch * len(self.bounds) + self.step
                rates = [recipe.optimizer.lr * learning_rate_factor(recipe.schedule, done + ahead, steps) for ahead in range(len(bounds))]
                with self.phases.measure("data"):
                    pixels, labels = next(batches)
                if self.optimizer is None:
                    within = [(first - part.start, last - part.start) for first, last in bounds]
                    with self.phases.measure("forward/backward"):
                        self.loss_sum += cast(_Dense | CapturedNetwork, self.stack).train_steps(pixels, labels, within, rates)
                else:
                    self.loss_sum += self._descend(self.optimizer, pixels, labels, *rates) * (part.stop - part.start)
                self.step += len(bounds)
                if self.step < len(self.bounds):
                    between_steps(self)
        self.epoch, self.step = self.epoch + 1, 0
        between_steps(self)

    def _descend(self, optimizer: torch.optim.Optimizer, pixels: Tensor, labels: Tensor, rate: float) -> Tensor:
        """Take one step of every trial; return the mean losses [S]."""
        for group in optimizer.param_groups:
            group["lr"] = rate
        with self.phases.measure("data"):
            batch = self.images.normalised(pixels)
        with self.phases.measure("forward/backward"):
            with self.autocast:
                logits = self.stack(batch)
            losses = F.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), reduction="none", label_smoothing=self.recipe.label_smoothing
            )
            self._clear_gradients(optimizer)
            # the gradient of each trial's mean loss, rounded as torch does
            torch.autograd.backward(losses, torch.full_like(losses, float(np.float32(1) / np.float32(labels.shape[1]))))
        with self.phases.measure("optimizer"):
            optimizer.step()
        return _mean_over_batch(losses.detach().view(labels.shape))

    def _clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Do as `optimizer.zero_grad`, at a tenth of its cost."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if self.stacked:
                    parameter.grad.zero_()
                else:
                    parameter.grad = None

    def weights_of(self, place: int) -> dict[str, Tensor]:
        """Return the state dict of one of the networks, with the names of the plain network."""
        return dict(zip(self._names, self.stack.tensors_of(place), strict=True))

    def state(self) -> dict[str, Any]:
        """Return a copy, in host memory, of everything that the remaining steps depend on."""
        state = {
            "made_by": self._maker(),
            "trials": list(self.trials),
            "epoch": self.epoch,
            "step": self.step,
            "stack": self.stack.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else {},
            "loss_sum": self.loss_sum,
        }
        if not self.stacked:
            state["random"] = torch.get_rng_state()
        if self.snapshots:
            state["snapshots"] = {epoch: torch.from_numpy(correct) for epoch, correct in self.snapshots.items()}
        if self.images.device.type == "cuda":
            state["cuda_random"] = torch.cuda.get_rng_state(self.images.device)
        return cast(dict[str, Any], _in_host_memory(state))

    def _maker(self) -> dict[str, str]:
        """What the bits of a step depend on beside the declaration. No trial is trained by two of them."""
        compiled = isinstance(self.stack, CapturedNetwork) and self.stack.compiled
        return {
            "stack": type(self.stack).__name__ + (", compiled" if compiled else ""),
            "device": self.images.device.type,
            "precision": self.precision,
            "torch": str(torch.__version__),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a saved state of the same trials.

        Raises:
            Exception: another implementation of the step made it, or it does not fit. Torch does not limit what it then raises.
        """
        if (maker := state["made_by"]) != self._maker():
            raise ValueError(f"it was made by {maker}, this is {self._maker()}")
        self.epoch, self.step = state["epoch"], state["step"]
        taken = {epoch: correct.cpu().numpy() for epoch, correct in state.get("snapshots", {}).items()}
        passed = self.epoch if self.step else self.epoch - 1
        self.snapshots = {epoch: taken[epoch] for epoch in self.experiment.record.snapshots if epoch <= passed or epoch in taken}
        self.stack.load_state_dict(state["stack"])
        if self.optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
        self.loss_sum = state["loss_sum"].to(self.images.device)
        if not self.stacked:
            torch.set_rng_state(state["random"].cpu())
        if "cuda_random" in state:
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.images.device)


def _in_host_memory(state: Any) -> Any:
    """Copy a state; in host memory, since the device has room for its training, and maybe for no more."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _in_host_memory(value) for name, value in state.items()}
    return [_in_host_memory(value) for value in state] if isinstance(state, list) else copy.deepcopy(state)


def _mean_over_batch(losses: Tensor) -> Tensor:
    """[S, B] -> [S], each mean summed in an order that does not depend on S."""
    return losses.cumsum(1)[:, -1] / losses.shape[1]
