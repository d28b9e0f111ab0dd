"""`train_shard`: the trials of a shard, trained stack by stack, as a trial batch."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
import torch

from memtail.datasets import Trainable
from memtail.errors import TrainingStopped
from memtail.models import build_model
from memtail.models.trained import About, packed
from memtail.spec import Experiment
from memtail.subsets import membership
from memtail.trainers.checkpoints import Checkpoints
from memtail.trainers.images.batches import Epoch, draw_epoch
from memtail.trainers.images.checkpoint import ShardState, decode, encode
from memtail.trainers.images.devices import attributed, cpu_name, device_kind, device_name, is_out_of_memory, reproducible
from memtail.trainers.images.images import DeviceImages, device_images
from memtail.trainers.images.initial import InitialStack, draw_stack
from memtail.trainers.images.prefetch import ToDevice, prefetched, runs_ahead
from memtail.trainers.images.profiling import Phases
from memtail.trainers.images.stack import is_stackable
from memtail.trainers.images.stack_trainer import StackedRun, StackResult
from memtail.trainers.images.stack_width import stack_width
from memtail.trainers.images.trial_batch import concatenate, make_trial_batch
from memtail.trainers.trial_batch import describe_training
from memtail.trials import TrialBatch

log = structlog.get_logger()

#: Least seconds of training between two checkpoints.
CHECKPOINT_SECONDS = 120.0
# Largest share of the time that checkpoints take. A slow one, as of large networks in a busy store, makes the next one later.
_CHECKPOINT_SHARE = 0.01


@dataclass(frozen=True)
class Progress:
    """Progress of a shard: `epochs` of `total` are done, each of one trial."""

    epochs: int
    total: int


def train_shard(
    experiment: Experiment,
    dataset: Trainable,
    trials: Sequence[int],
    device: torch.device,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], bool] | None = None,
    following: Callable[[], Sequence[int] | None] = lambda: None,
) -> TrialBatch:
    """Train trials and record the outcomes of their final models.

    Membership, initial weights, batch order and augmentation of trial k follow from (seed, k) alone. Stackable networks are trained many
    at a time; if the device runs out of memory, the stack is halved and trained again, and at last the dataset leaves the device. A trial
    whose loss or logits stop being finite is recorded as diverged, with all correctness bits 0.

    Args:
        experiment: the declaration.
        dataset: the experiment's dataset, prepared.
        trials: consecutive indices.
        device: where to train.
        on_progress: called after every epoch of a stack.
        checkpoints: where the state is saved and resumed from, and where models are kept that `record.models` asks for; without one,
            neither is. The state is saved at most every two minutes, and less often if saving would take
            more than a hundredth of the time.
        stop: asked every few steps whether to stop. It is also called after every batch of an evaluation, and after every model that is
            kept, where training is not stopped.
        following: asked, where an accelerator begins the last stack, for the trials of this experiment that this process trains next, if
            they are known; what the first of them begin with is drawn meanwhile, and kept for the next call.

    Returns:
        The trials' batch. Its provenance holds the experiment's fingerprint, the software, the device, and the seconds of training, also
        by phase (of this call, not of an interrupted one).

    Raises:
        SpecError: the model or the subset design does not fit the dataset.
        torch.OutOfMemoryError: a single trial does not fit into the device's memory.
        TrainingStopped: `stop` returned True.
        WorkerFaultError: the device or the disk of this machine is at fault.
    """
    with attributed(device):
        began, started = time.perf_counter(), datetime.now(UTC)
        fingerprint, phases = experiment.fingerprint(dataset.fingerprint), Phases(device)
        ahead = _take_ahead(fingerprint, device, trials)
        members = ahead.members if ahead else membership(experiment.subsets, dataset.train_labels, trials)
        with reproducible(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            shard = _ShardTraining(experiment, dataset, device, list(trials), members, on_progress, checkpoints, stop, fingerprint, phases)
            result = shard.run(ahead.stack if ahead else None, following)
        provenance = replace(
            describe_training(fingerprint, device_name(device), cpu_name(), started, time.perf_counter() - began),
            devices=tuple(shard.kinds) if len(shard.kinds) > 1 else None,  # it was resumed on another
            phases={phase: round(spent, 3) for phase, spent in phases.seconds().items()},
        )
        return make_trial_batch(dataset, trials, members, result, provenance)


@dataclass
class _Stack:
    """A stack of a shard: its rows there, the state of an interrupted training, and what is drawn for it beside other work."""

    rows: list[int]
    state: dict[str, Any] | None = None
    subsets: npt.NDArray[np.int64] | None = None
    initial: InitialStack | None = None
    epoch: Epoch | None = None


@dataclass(frozen=True)
class _Ahead:
    """What is drawn of a shard before its training: membership, and its first stack."""

    fingerprint: str
    device: torch.device
    trials: list[int]
    members: npt.NDArray[np.bool_]
    stack: _Stack


_kept: list[_Ahead] = []  # of the next shard of this process


def _take_ahead(fingerprint: str, device: torch.device, trials: Sequence[int]) -> _Ahead | None:
    """Return what is kept of a shard; what is kept of another one is given up."""
    ahead = _kept.pop() if _kept else None
    return ahead if ahead and (ahead.fingerprint, ahead.device, ahead.trials) == (fingerprint, device, list(trials)) else None


@dataclass
class _ShardTraining:
    experiment: Experiment
    dataset: Trainable
    device: torch.device
    trials: list[int]
    members: npt.NDArray[np.bool_]
    on_progress: Callable[[Progress], None] | None
    checkpoints: Checkpoints | None
    stop: Callable[[], bool] | None
    fingerprint: str
    phases: Phases
    finished: list[tuple[list[int], StackResult]] = field(default_factory=list)
    saved_at: float = field(default_factory=time.monotonic)
    kinds: list[str] = field(default_factory=list)  # of all devices of the shard, in the order of use
    saving: float = 0.0  # seconds that the last checkpoint took

    def run(self, drawn: _Stack | None, following: Callable[[], Sequence[int] | None]) -> StackResult:
        """Train the shard; the first stack may be drawn already."""
        interrupted, kind = self._load(), device_kind(self.device)
        if kind not in self.kinds[-1:]:
            self.kinds.append(kind)
        with torch.random.fork_rng(devices=[]):
            network = build_model(self.experiment.model, self.dataset.input_shape, len(self.dataset.classes))
        width = stack_width(network, self.dataset.input_shape, self.experiment.training.batch_size, self.device)
        stacks = self._stacks(width, interrupted)
        # other networks may draw in training from the generator of the weights
        if not (runs_ahead(self.device) and is_stackable(network)):
            for stack in stacks:
                self._train_rows(stack)
            return concatenate([result for _, result in self.finished])

        def items() -> Iterator[_Stack | Sequence[int]]:
            for stack in stacks:
                yield drawn if drawn and stack.state is None and stack.rows == drawn.rows else stack
            if (trials := following()) is not None:
                yield trials

        def prepare(item: _Stack | Sequence[int], to_device: ToDevice) -> _Stack | _Ahead | None:
            if isinstance(item, _Stack):
                return self._prepare(item, to_device)
            try:
                return self._ahead(item, width, to_device)
            except Exception:  # of the other shard, which meets it again
                log.debug("next shard cannot be prepared", exc_info=True)
                return None

        with closing(prefetched(prepare, items(), self.device)) as prepared:
            for item in prepared:
                if isinstance(item, _Stack):
                    self._train_rows(item)
                elif item is not None:
                    _kept.append(item)
        return concatenate([result for _, result in self.finished])

    def _ahead(self, trials: Sequence[int], width: int, to_device: ToDevice) -> _Ahead:
        """Draw another shard's membership and first stack."""
        members = membership(self.experiment.subsets, self.dataset.train_labels, trials)
        other = replace(self, trials=list(trials), members=members, finished=[])
        stack = other._prepare(next(other._stacks(width, None)), to_device)
        return _Ahead(self.fingerprint, self.device, other.trials, members, stack)

    def _stacks(self, width: int, interrupted: dict[str, Any] | None) -> Iterator[_Stack]:
        """Yield the stacks to train: at most `width` trials each, with subsets of one size (those of explicit masks may differ)."""
        sizes = self.members.sum(1)
        rows: list[int] = []
        first = sum(len(trials) for trials, _ in self.finished)
        if interrupted is not None:
            # with the trials of the checkpoint, since the stacks of this run may have another width
            yield _Stack([self.trials.index(trial) for trial in interrupted["trials"]], interrupted)
            first += len(interrupted["trials"])
        for row in range(first, len(self.trials)):
            if rows and (len(rows) == width or sizes[row] != sizes[rows[0]]):
                yield _Stack(rows)
                rows = []
            rows.append(row)
        if rows:
            yield _Stack(rows)

    def _prepare(self, stack: _Stack, to_device: ToDevice) -> _Stack:
        """Draw for a stack what does not depend on others, unless it is drawn."""
        if stack.initial is not None:
            return stack
        stack.subsets, stack.initial = self._subsets(stack), self._initial(stack)
        if stack.state is None:
            recipe, seed, size = self.experiment.training, self.experiment.subsets.seed, self.dataset.input_shape[1:]
            try:
                stack.epoch = draw_epoch(recipe.augmentation, seed, self._trials(stack), 0, stack.subsets, size, to_device)
            except Exception as error:
                if not is_out_of_memory(error):  # else it is drawn when the stack before has left the device
                    raise
        return stack

    def _trials(self, stack: _Stack) -> list[int]:
        return [self.trials[row] for row in stack.rows]

    def _subsets(self, stack: _Stack) -> npt.NDArray[np.int64]:
        return np.stack([np.flatnonzero(self.members[row]) for row in stack.rows])

    def _initial(self, stack: _Stack) -> InitialStack:
        shape, classes = self.dataset.input_shape, len(self.dataset.classes)
        return draw_stack(self.experiment, shape, classes, self._trials(stack), pin=self.device.type == "cuda")

    @property
    def _images(self) -> DeviceImages:
        return device_images(self.dataset, self.device)

    def _train_rows(self, stack: _Stack) -> None:
        rows = stack.rows
        try:
            self.finished.append((self._trials(stack), self._train_stack(stack)))
            return
        except Exception as error:
            if not is_out_of_memory(error) or (len(rows) == 1 and not self._images.evict()):
                raise
        self._images.networks.clear()
        torch.cuda.empty_cache()  # does nothing where this process has not used CUDA
        if len(rows) == 1:
            log.warning("out of device memory, reading the dataset from host memory", trial=self.trials[rows[0]], device=str(self.device))
            self._train_rows(stack)
            return
        half = len(rows) // 2
        log.warning("out of device memory, halving the stack", trials=len(rows), into=half, device=str(self.device))
        self._train_rows(_Stack(rows[:half]))
        self._train_rows(_Stack(rows[half:]))

    def _train_stack(self, stack: _Stack) -> StackResult:
        run = self._begin(stack)
        if stack.state is not None:
            try:
                run.restore(stack.state)
            except Exception as error:  # see `StackedRun.restore`
                if is_out_of_memory(error):
                    raise
                trials = f"{run.trials[0]}-{run.trials[-1]}"
                log.warning("checkpoint does not fit, starting over", trials=trials, error=str(error)[:200])
                run = self._begin(stack)
        result = run.train(self._between_steps)
        self._keep_models(run)
        return result

    def _begin(self, stack: _Stack) -> StackedRun:
        """Begin a training. What was drawn for it leaves the stack: the training changes it, and the device should hold it once."""
        subsets = self._subsets(stack) if stack.subsets is None else stack.subsets
        initial, epoch = stack.initial or self._initial(stack), stack.epoch
        stack.initial = stack.epoch = None
        shape, classes, trials = self.dataset.input_shape, len(self.dataset.classes), self._trials(stack)
        return StackedRun(self.experiment, self._images, shape, classes, trials, subsets, self.phases, self._give_sign, initial, epoch)

    def _keep_models(self, run: StackedRun) -> None:
        """Have the trained models kept that are to be."""
        images, shape, classes = run.images, self.dataset.input_shape, len(self.dataset.classes)
        for place, trial in enumerate(run.trials):
            if self.checkpoints and self.experiment.record.keeps_model(trial):
                about = About(self.fingerprint, trial, shape, classes, images.shift.tolist(), images.scale.tolist())
                self.checkpoints.keep_model(trial, packed(run.weights_of(place), about))
                self._give_sign()

    def _give_sign(self) -> None:
        """Give a sign of life. Training is stopped only between steps, with a checkpoint."""
        if self.stop is not None:
            self.stop()

    def _between_steps(self, run: StackedRun) -> None:
        if self.on_progress and run.step == 0:
            epochs = self.experiment.training.epochs
            finished = sum(len(trials) for trials, _ in self.finished) * epochs
            self.on_progress(Progress(finished + run.epoch * len(run.trials), len(self.trials) * epochs))
        stopped = self.stop is not None and self.stop()
        pause = max(CHECKPOINT_SECONDS, self.saving / _CHECKPOINT_SHARE)
        if self.checkpoints and (stopped or time.monotonic() - self.saved_at >= pause):
            began = time.monotonic()
            self.checkpoints.save(encode(ShardState(self.fingerprint, self.finished, run.state(), self.kinds)))
            self.saved_at = time.monotonic()
            self.saving = self.saved_at - began
        if stopped:
            raise TrainingStopped

    def _load(self) -> dict[str, Any] | None:
        """Take over the finished stacks of a checkpoint; return the state of its stack in training."""
        data = self.checkpoints.load() if self.checkpoints else None
        if data is None:
            return None
        try:
            state = decode(data, self.fingerprint)
            recorded = self.experiment.record
            if any(list(result.snapshots) != recorded.snapshots for _, result in state.finished):
                raise ValueError("it has the outcomes of other epochs than are recorded")
            if any((result.train.score is not None) != recorded.keeps_scores for _, result in state.finished):
                raise ValueError("it has other outcomes than are recorded")
        except Exception as error:  # torch.load does not limit what damaged bytes raise
            log.warning("checkpoint cannot be used, starting over", trials=f"{self.trials[0]}-{self.trials[-1]}", error=str(error))
            return None
        self.finished, self.kinds = state.finished, state.kinds
        return state.stack
