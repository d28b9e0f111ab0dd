"""The embedded run: one experiment from its declaration to its scores, on this machine, with a store in a folder or a bucket.

It goes on where an earlier run stopped, however that ended, and may run beside another of the same experiment: the store decides
which trial batch counts.
"""

import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import torch

from memtail import datasets
from memtail.datasets import ImageDataset
from memtail.errors import MemtailError
from memtail.execution.pool import Finished, StoredCheckpoints, Task, Workers
from memtail.execution.stopping import next_round
from memtail.experiment_store import MAX_ATTEMPTS, ExperimentStore, Record, missing_shards
from memtail.models import check_model
from memtail.scores.publish import publish
from memtail.spec import Experiment
from memtail.statistics import Statistics
from memtail.storage import ObjectStore, keys
from memtail.storage.local import LocalStore
from memtail.storage.open import open_store
from memtail.subsets import check_trials
from memtail.trainers.images.devices import available_devices
from memtail.trainers.images.profiling import PHASES
from memtail.trainers.images.shard_size import trials_per_shard
from memtail.trials import Shard

log = structlog.get_logger()

#: Scores are published at the end, and in a long run every so many seconds.
PUBLISH_SECONDS = 300.0


@dataclass
class RunState:
    """How far a run is, for whoever shows it; `partial` is how much of each shard in training is done (0 to 1).

    `phases`, when profiling, holds seconds: those of the training processes together, and this process's own under "writing".
    """

    wanted: int
    statistics: Statistics
    dataset: ImageDataset
    record: Record
    devices: list[str]
    partial: dict[Shard, float] = field(default_factory=dict)
    failed: dict[Shard, str] = field(default_factory=dict)
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def trials(self) -> int:
        """Trials committed, diverged ones included."""
        return len(self.statistics.metrics)

    @property
    def progress(self) -> float:
        """Trials done, with the shards in training counted by how far they are."""
        return self.trials + sum(share * len(shard.trials) for shard, share in self.partial.items())


def run(
    experiment: Experiment,
    store: str | Path = "memtail-store",
    *,
    dataset: ImageDataset | None = None,
    on_progress: Callable[[RunState], None] | None = None,
    on_preparation: Callable[[int, int], None] | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Run an experiment to its scores; returns their summary.

    Args:
        experiment: the declaration.
        store: the folder, or `s3://BUCKET/PREFIX`, in which results are kept; scores lie in `STORE/experiments/NAME`.
        dataset: the experiment's, if it is open already; by default it is prepared.
        on_progress: called several times a second with how far it is.
        on_preparation: called with (images done, images in all) while a folder of images is prepared.
        profile: also measure where the time of the trials goes, and add it to the summary that is returned, as `profile`: the wall-clock
            `seconds`, how many `devices` there were, and the seconds by phase, as device-seconds (of all devices together) in `phases`.

    Raises:
        MemtailError: bad input, or a store of another experiment of the same name.
        ShardsFailedError: some shards failed for good; the scores are published without them.
    """
    opened = open_store(store)
    if isinstance(opened, LocalStore):
        opened.remove_abandoned()
    dataset = dataset or datasets.prepare(experiment.dataset, on_preparation)
    experiment_store = ExperimentStore(opened, experiment.name)
    record = experiment_store.register(declare(experiment, dataset))
    devices = [str(device) for device in available_devices(experiment.execution.device)]
    state = RunState(record.experiment.subsets.trials, Statistics(dataset.n_train, dataset.n_test), dataset, record, devices)
    report = on_progress or (lambda state: None)

    began = time.monotonic()
    with _writing(state):
        _fold_committed(experiment_store, state)
    for key in list(opened.list(keys.checkpoints(experiment.name))):
        if (span := keys.parse_span(key)) and experiment_store.is_committed(Shard(*span)):
            opened.delete(key)
    while True:
        todo = _from_own_start(missing_shards(state.wanted, record.trials_per_shard, experiment_store.committed()))
        report(state)
        if todo:
            _train_all(todo, opened, experiment_store, state, report, profile)
            with _writing(state):
                _fold_committed(experiment_store, state)
        more = None if state.failed else next_round(state.record.experiment.subsets, state.statistics)
        if more is None:
            break
        state.record = experiment_store.extend(more)
        state.wanted = state.record.experiment.subsets.trials
    if state.failed:
        summary = publish(opened, state.record, state.statistics, dataset).to_dict() if state.statistics.trials else None
        raise ShardsFailedError(state.failed, f"{opened.address}/{keys.failures(experiment.name)}", summary)
    with _writing(state):
        summary = publish(opened, state.record, state.statistics, dataset).to_dict()
    return {**summary, "profile": _profile(state, time.monotonic() - began)} if profile else summary


class ShardsFailedError(MemtailError):
    """Some shards failed for good; `summary` is that of the scores without them, None if there are none at all."""

    def __init__(self, failed: dict[Shard, str], records: str, summary: dict[str, Any] | None) -> None:
        shard, error = next(iter(failed.items()))
        super().__init__(
            f"{len(failed)} shards failed {MAX_ATTEMPTS} times each and are missing from the scores ({shard}: {error}): "
            f"tracebacks are in {records}; mend the cause, then run again"
        )
        self.summary = summary


def declare(experiment: Experiment, dataset: ImageDataset, devices: list[torch.device] | None = None) -> Record:
    """The record under which an experiment is entered in a store, after checking all that can be checked before training.

    Args:
        experiment: the declaration.
        dataset: its dataset.
        devices: those that shards are to be cut for, which need not be here; by default this machine's.

    Raises:
        SpecError: the model or the subset design does not fit the dataset.
    """
    check_trials(experiment.subsets, dataset.train_labels)
    check_model(experiment.model, dataset.image_shape, len(dataset.classes))
    devices = devices or available_devices(experiment.execution.device)
    return Record(
        experiment=experiment,
        fingerprint=experiment.fingerprint(dataset.fingerprint),
        canonical=experiment.canonical(dataset.fingerprint),
        n_train=dataset.n_train,
        n_test=dataset.n_test,
        trials_per_shard=trials_per_shard(experiment, dataset, devices),
    )


def _train_all(
    todo: list[Shard],
    store: ObjectStore,
    experiment_store: ExperimentStore,
    state: RunState,
    report: Callable[[RunState], None],
    profile: bool,
) -> None:
    began = published = time.monotonic()
    task = Task(state.record.experiment, state.dataset.folder, store.address, device="", profile=profile)
    attempts: dict[Shard, int] = {}
    with Workers(task, state.devices[: len(todo)]) as workers:
        while todo or workers.running:
            while todo and workers.idle:
                workers.start(todo.pop(0))
            for finished in workers.finished(timeout=0.2):
                state.partial.pop(finished.shard, None)
                if finished.error is None:
                    for phase, spent in (finished.batch.provenance.phases or {}).items() if finished.batch else ():
                        state.phases[phase] += spent
                    with _writing(state):
                        _commit(finished, store, experiment_store, state)
                elif _may_retry(finished, experiment_store, attempts):
                    todo.append(finished.shard)
                else:
                    state.failed[finished.shard] = finished.error
            state.partial |= {shard: share for shard, share in workers.progress() if shard in workers.running}
            state.seconds = time.monotonic() - began
            report(state)
            if time.monotonic() - published > PUBLISH_SECONDS and state.statistics.trials:
                with _writing(state):
                    _fold_committed(experiment_store, state)
                    publish(store, state.record, state.statistics, state.dataset)
                published = time.monotonic()


@contextmanager
def _writing(state: RunState) -> Iterator[None]:
    began = time.monotonic()
    yield
    state.phases["writing"] += time.monotonic() - began


def _profile(state: RunState, seconds: float) -> dict[str, Any]:
    phases = {phase: state.phases[phase] for phase in (*PHASES, "writing")}
    devices = len(state.devices)
    # writing may go on beside training, so that together they can exceed the devices' time
    rest = max(0.0, devices * seconds - sum(phases.values()))
    return {"seconds": round(seconds, 3), "devices": devices, "phases": {p: round(s, 3) for p, s in {**phases, "rest": rest}.items()}}


def _fold_committed(experiment_store: ExperimentStore, state: RunState) -> None:
    """Fold what the store holds and this run has not: of earlier runs, or of another at the same time."""
    for shard in experiment_store.committed():
        if not all(trial in state.statistics.metrics for trial in shard.trials):
            state.statistics.accumulate(experiment_store.batch(shard, state.record))


def _commit(finished: Finished, store: ObjectStore, experiment_store: ExperimentStore, state: RunState) -> None:
    """Commit a batch and fold what the store then holds: this one, or that of another run that was first."""
    batch = finished.batch
    if batch is None or not experiment_store.commit(batch, state.record.fingerprint):
        batch = experiment_store.batch(finished.shard, state.record)
    StoredCheckpoints(store, experiment_store.name, finished.shard).remove()
    state.statistics.accumulate(batch)


def _may_retry(finished: Finished, experiment_store: ExperimentStore, attempts: dict[Shard, int]) -> bool:
    assert finished.error is not None
    experiment_store.record_failure(finished.shard, finished.error, finished.traceback)
    attempts[finished.shard] = attempts.get(finished.shard, 0) + 1
    again = attempts[finished.shard] < MAX_ATTEMPTS
    log.warning("shard failed", shard=str(finished.shard), attempt=attempts[finished.shard], error=finished.error, again=again)
    return again


def _from_own_start(shards: list[Shard]) -> list[Shard]:
    """The shards from a place of this process's own, so that two runs at once do not train the same ones side by side."""
    start = random.Random(os.getpid()).randrange(len(shards)) if shards else 0
    return shards[start:] + shards[:start]
