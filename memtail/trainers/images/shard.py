"""`train_shard`: the trials of a shard, trained stack by stack, as a trial batch."""

import time
from collections.abc import Callable, Iterator, Sequence
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
from memtail.trainers.images.checkpoint import ShardState, decode, encode
from memtail.trainers.images.devices import attributed, cpu_name, device_kind, device_name, is_out_of_memory, reproducible
from memtail.trainers.images.images import DeviceImages, device_images
from memtail.trainers.images.profiling import Phases
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
    profile: bool = False,
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
        profile: add the seconds by phase (of this call, not of an interrupted one) to the provenance, as `phases`.

    Returns:
        The trials' batch. Its provenance holds the experiment's fingerprint, the software, the device and the seconds of training.

    Raises:
        SpecError: the model or the subset design does not fit the dataset.
        torch.OutOfMemoryError: a single trial does not fit into the device's memory.
        TrainingStopped: `stop` returned True.
        WorkerFaultError: the device or the disk of this machine is at fault.
    """
    with attributed(device):
        began, started = time.perf_counter(), datetime.now(UTC)
        members = membership(experiment.subsets, dataset.train_labels, trials)
        fingerprint = experiment.fingerprint(dataset.fingerprint)
        phases = Phases(device if profile else None)
        with reproducible(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            shard = _ShardTraining(experiment, dataset, device, list(trials), members, on_progress, checkpoints, stop, fingerprint, phases)
            result = shard.run()
        provenance = replace(
            describe_training(fingerprint, device_name(device), cpu_name(), started, time.perf_counter() - began),
            devices=tuple(shard.kinds) if len(shard.kinds) > 1 else None,  # it was resumed on another
            phases={phase: round(spent, 3) for phase, spent in phases.seconds.items()} if phases.on else None,
        )
        return make_trial_batch(dataset, trials, members, result, provenance)


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

    def run(self) -> StackResult:
        interrupted, kind = self._load(), device_kind(self.device)
        if kind not in self.kinds[-1:]:
            self.kinds.append(kind)
        if interrupted is not None:
            # with the trials of the checkpoint, since the stacks of this run may have another width
            self._train_rows([self.trials.index(trial) for trial in interrupted["trials"]], interrupted)
        for rows in self._stacks(self._width(), sum(len(trials) for trials, _ in self.finished)):
            self._train_rows(rows, None)
        return concatenate([result for _, result in self.finished])

    def _width(self) -> int:
        """Return the number of networks per stack."""
        with torch.random.fork_rng(devices=[]):
            network = build_model(self.experiment.model, self.dataset.input_shape, len(self.dataset.classes))
        return stack_width(network, self.dataset.input_shape, self.experiment.training.batch_size, self.device)

    def _stacks(self, width: int, first: int) -> Iterator[list[int]]:
        """Yield runs of at most `width` rows, from `first` on, with subsets of one size (those of explicit masks may differ)."""
        sizes = self.members.sum(1)
        rows: list[int] = []
        for row in range(first, len(self.trials)):
            if rows and (len(rows) == width or sizes[row] != sizes[rows[0]]):
                yield rows
                rows = []
            rows.append(row)
        if rows:
            yield rows

    @property
    def _images(self) -> DeviceImages:
        return device_images(self.dataset, self.device)

    def _train_rows(self, rows: list[int], resumed: dict[str, Any] | None) -> None:
        try:
            self.finished.append(([self.trials[row] for row in rows], self._train_stack(rows, resumed)))
            return
        except Exception as error:
            if not is_out_of_memory(error) or (len(rows) == 1 and not self._images.evict()):
                raise
        self._images.network = None
        torch.cuda.empty_cache()  # does nothing where this process has not used CUDA
        if len(rows) == 1:
            log.warning("out of device memory, reading the dataset from host memory", trial=self.trials[rows[0]], device=str(self.device))
            self._train_rows(rows, resumed)
            return
        half = len(rows) // 2
        log.warning("out of device memory, halving the stack", trials=len(rows), into=half, device=str(self.device))
        self._train_rows(rows[:half], None)
        self._train_rows(rows[half:], None)

    def _train_stack(self, rows: list[int], resumed: dict[str, Any] | None) -> StackResult:
        subsets = np.stack([np.flatnonzero(self.members[row]) for row in rows])
        trials = [self.trials[row] for row in rows]

        def begin() -> StackedRun:
            shape, classes = self.dataset.input_shape, len(self.dataset.classes)
            return StackedRun(self.experiment, self._images, shape, classes, trials, subsets, self.phases, self._give_sign)

        run = begin()
        if resumed is not None:
            try:
                run.restore(resumed)
            except Exception as error:  # see `StackedRun.restore`
                if is_out_of_memory(error):
                    raise
                log.warning("checkpoint does not fit, starting over", trials=f"{trials[0]}-{trials[-1]}", error=str(error)[:200])
                run = begin()
        result = run.train(self._between_steps)
        self._keep_models(run)
        return result

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
