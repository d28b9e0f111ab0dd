"""`train_shard`: the trials of a shard, stack by stack, into a trial batch."""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import structlog
import torch

from memtail.datasets import ImageDataset
from memtail.errors import TrainingStopped
from memtail.models import build_model
from memtail.spec import Experiment
from memtail.subsets import membership
from memtail.trainers.images.devices import is_out_of_memory, reproducible
from memtail.trainers.images.evaluation import Outcome
from memtail.trainers.images.images import device_images
from memtail.trainers.images.profiling import Phases
from memtail.trainers.images.stack import is_stackable
from memtail.trainers.images.stack_trainer import StackedRun, StackResult, from_bytes, to_bytes
from memtail.trials import Provenance, TrialBatch, TrialMetrics, pack

log = structlog.get_logger()

#: Seconds of training after which a checkpoint is written, at the earliest.
CHECKPOINT_SECONDS = 120.0
# The share of the time that checkpoints may take: where a thousand large networks are kept in one store, each is kept less often.
_CHECKPOINT_SHARE = 0.01

# Fully connected stacks of this width stay in a processor's cache. A processor runs convolutions fastest one network at a time;
# on an accelerator it takes many small networks to fill the chip.
_STACK_WIDTH = {"cpu": 16, "cuda": 64, "mps": 32}


@dataclass(frozen=True)
class Progress:
    """How far a shard is: `epochs` of `total` (epochs of one trial) are done."""

    epochs: int
    total: int


class Checkpoints(Protocol):
    """Where the state of one unfinished shard is kept."""

    def load(self) -> bytes | None:
        """The last saved state, None if there is none."""
        ...

    def save(self, state: bytes) -> None:
        """Replace the saved state."""
        ...


def train_shard(
    experiment: Experiment,
    dataset: ImageDataset,
    trials: Sequence[int],
    device: torch.device,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], bool] | None = None,
    profile: bool = False,
) -> TrialBatch:
    """Train trials and record what their final models get right.

    Membership, initial weights, batch order and augmentation of trial k follow from (seed, k) alone. Stackable networks train many
    at a time; if the device runs out of memory the stack is halved and trained again. A trial whose loss or logits stop being finite
    is recorded as diverged, with all correctness bits 0.

    Args:
        experiment: the declaration.
        dataset: as prepared.
        trials: consecutive indices.
        device: where to train.
        on_progress: called after every epoch of a stack.
        checkpoints: if given, the state is saved there every two minutes of training, or so rarely that it takes a hundredth of the
            time, and taken up from there.
        stop: asked every few steps whether to stop.
        profile: also say in the provenance, as `phases`, how many seconds went where (of this call, not of an interrupted one).

    Returns:
        The trials' batch; its provenance holds the experiment's fingerprint, the software, the device and the seconds it took.

    Raises:
        SpecError: the model or the subset design does not fit the dataset.
        torch.OutOfMemoryError: one trial alone does not fit.
        TrainingStopped: `stop` returned True.
    """
    began, started = time.perf_counter(), datetime.now(UTC)
    members = membership(experiment.subsets, dataset.train_labels, trials)
    fingerprint = experiment.fingerprint(dataset.fingerprint)
    phases = Phases(device if profile else None)
    with reproducible(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        shard = _ShardTraining(experiment, dataset, device, list(trials), members, on_progress, checkpoints, stop, fingerprint, phases)
        results = shard.run()
    seconds = time.perf_counter() - began
    return _batch(experiment, dataset, np.array(trials), members, results, device, fingerprint, started, seconds, phases)


@dataclass
class _ShardTraining:
    experiment: Experiment
    dataset: ImageDataset
    device: torch.device
    trials: list[int]
    members: npt.NDArray[np.bool_]
    on_progress: Callable[[Progress], None] | None
    checkpoints: Checkpoints | None
    stop: Callable[[], bool] | None
    fingerprint: str
    phases: Phases
    done: list[tuple[list[int], StackResult]] = field(default_factory=list)
    saved_at: float = field(default_factory=time.monotonic)
    saving: float = 0.0  # seconds that the last checkpoint took

    def run(self) -> StackResult:
        interrupted = self._load()
        if interrupted is not None:
            # with the trials it had then: the stacks of this run may be of another width
            self._train_rows([self.trials.index(trial) for trial in interrupted["trials"]], interrupted)
        for rows in self._stacks(self._width(), sum(len(trials) for trials, _ in self.done)):
            self._train_rows(rows, None)
        return _concatenated([result for _, result in self.done])

    def _width(self) -> int:
        """How many networks to train as one."""
        with torch.random.fork_rng(devices=[]):
            network = build_model(self.experiment.model, self.dataset.image_shape, len(self.dataset.classes))
        dense = not any(isinstance(layer, torch.nn.Conv2d) for layer in network.modules())
        return _STACK_WIDTH[self.device.type] if is_stackable(network) and (dense or self.device.type != "cpu") else 1

    def _stacks(self, width: int, first: int) -> Iterator[list[int]]:
        """Runs of at most `width` rows, from `first` on, whose subsets have the same size (those of explicit masks may differ)."""
        sizes = self.members.sum(1)
        rows: list[int] = []
        for row in range(first, len(self.trials)):
            if rows and (len(rows) == width or sizes[row] != sizes[rows[0]]):
                yield rows
                rows = []
            rows.append(row)
        if rows:
            yield rows

    def _train_rows(self, rows: list[int], resumed: dict[str, Any] | None) -> None:
        try:
            self.done.append(([self.trials[row] for row in rows], self._train_stack(rows, resumed)))
            return
        except Exception as error:
            if not is_out_of_memory(error) or len(rows) == 1:
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(rows) // 2
        log.warning("out of device memory, halving the stack", trials=len(rows), into=half, device=str(self.device))
        self._train_rows(rows[:half], None)
        self._train_rows(rows[half:], None)

    def _train_stack(self, rows: list[int], resumed: dict[str, Any] | None) -> StackResult:
        subsets = np.stack([np.flatnonzero(self.members[row]) for row in rows])
        trials = [self.trials[row] for row in rows]
        images = device_images(self.dataset, self.device)
        run = StackedRun(self.experiment, images, self.dataset.image_shape, len(self.dataset.classes), trials, subsets, self.phases)
        if resumed is not None:
            run.restore(resumed)
        return run.train(self._between_steps)

    def _between_steps(self, run: StackedRun) -> None:
        if self.on_progress and run.step == 0:
            epochs = self.experiment.training.epochs
            finished = sum(len(trials) for trials, _ in self.done) * epochs
            self.on_progress(Progress(finished + run.epoch * len(run.trials), len(self.trials) * epochs))
        stopped = self.stop is not None and self.stop()
        pause = max(CHECKPOINT_SECONDS, self.saving / _CHECKPOINT_SHARE)
        if self.checkpoints and (stopped or time.monotonic() - self.saved_at >= pause):
            began = time.monotonic()
            self.checkpoints.save(
                to_bytes({"fingerprint": self.fingerprint, "done": [_to_state(*entry) for entry in self.done], "stack": run.state()})
            )
            self.saved_at = time.monotonic()
            self.saving = self.saved_at - began
        if stopped:
            raise TrainingStopped

    def _load(self) -> dict[str, Any] | None:
        """Take up what a checkpoint holds; returns the state of the stack that was in training."""
        data = self.checkpoints.load() if self.checkpoints else None
        if data is None:
            return None
        try:
            state = from_bytes(data, self.device)
            if state["fingerprint"] != self.fingerprint:
                raise ValueError("it belongs to another experiment")
            self.done = [_from_state(entry) for entry in state["done"]]
            stack: dict[str, Any] = state["stack"]
        except Exception as error:  # torch.load raises whatever the bytes make it raise
            log.warning("checkpoint cannot be used, starting over", trials=f"{self.trials[0]}-{self.trials[-1]}", error=str(error))
            self.done = []
            return None
        return stack


_RESULT_ARRAYS = ("correct", "margin", "finite", "given")


def _to_state(trials: list[int], result: StackResult) -> dict[str, Any]:
    state: dict[str, Any] = {"trials": trials, "loss": torch.from_numpy(result.loss)}
    for split, outcome in (("train", result.train), ("test", result.test)):
        for name in _RESULT_ARRAYS:
            array = getattr(outcome, name)
            state[f"{split}_{name}"] = None if array is None else torch.from_numpy(array)
    return state


def _from_state(state: dict[str, Any]) -> tuple[list[int], StackResult]:
    arrays = {name: value.cpu().numpy() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    train, test = (Outcome(*(arrays[f"{split}_{name}"] for name in _RESULT_ARRAYS)) for split in ("train", "test"))
    return state["trials"], StackResult(train, test, arrays["loss"])


def _concatenated(results: list[StackResult]) -> StackResult:
    def joined(outcomes: list[Outcome]) -> Outcome:
        margins = [outcome.margin for outcome in outcomes if outcome.margin is not None]
        given = [outcome.given for outcome in outcomes if outcome.given is not None]
        return Outcome(
            np.concatenate([outcome.correct for outcome in outcomes]),
            np.concatenate(margins) if margins else None,
            np.concatenate([outcome.finite for outcome in outcomes]),
            np.concatenate(given) if given else None,
        )

    return StackResult(
        joined([result.train for result in results]),
        joined([result.test for result in results]),
        np.concatenate([result.loss for result in results]),
    )


def _batch(
    experiment: Experiment,
    dataset: ImageDataset,
    trials: npt.NDArray[np.int64],
    members: npt.NDArray[np.bool_],
    result: StackResult,
    device: torch.device,
    fingerprint: str,
    started: datetime,
    seconds: float,
    phases: Phases,
) -> TrialBatch:
    diverged = ~(np.isfinite(result.loss) & result.train.finite & result.test.finite)
    train_correct = result.train.correct & ~diverged[:, None]
    test_correct = result.test.correct & ~diverged[:, None]
    assert result.train.given is not None
    metrics = []
    for row, trial in enumerate(trials):
        inside, right = members[row], train_correct[row]
        metrics.append(
            TrialMetrics(
                trial=int(trial),
                diverged=bool(diverged[row]),
                loss=float(result.loss[row]) if np.isfinite(result.loss[row]) else None,
                in_subset_accuracy=float(right[inside].mean()),
                held_out_accuracy=float(right[~inside].mean()) if not inside.all() else None,
                test_accuracy=float(test_correct[row].mean()),
            )
        )
    provenance = Provenance(
        fingerprint=fingerprint,
        memtail=version("memtail"),
        torch=str(torch.__version__),  # a plain string: reading it elsewhere needs no torch
        python=platform.python_version(),
        host=platform.node(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})",
        started=started.isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        phases={phase: round(spent, 3) for phase, spent in phases.seconds.items()} if phases.on else None,
    )
    return TrialBatch(
        trial=trials.astype(np.int32),
        membership=pack(members),
        train_correct=pack(train_correct),
        test_correct=pack(test_correct),
        n_train=dataset.n_train,
        n_test=dataset.n_test,
        metrics=metrics,
        provenance=provenance,
        train_margin=result.train.margin,
        test_margin=result.test.margin,
        train_mistakes=result.train.given[~train_correct & ~diverged[:, None]].astype(np.uint16),
    )
