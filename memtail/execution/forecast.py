"""What a run would take, measured in a few seconds: time, memory, bytes, cost, and how exact its scores will be.

Shards are trained as `memtail run` would, by its own processes, on all devices at once, in a store that is thrown away. What would take
too long is cut short: fewer epochs, and of a large dataset fewer images. Seconds are then extrapolated from three shards per device:

* a cold one of one epoch, which with the next gives the start-up: processes, imports, compilation;
* a warm one of one epoch, whose phases tell evaluation from everything else;
* a warm one of as many epochs as fit into a few seconds (of all, if they do), whose seconds beyond evaluation are those of training.
"""

import heapq
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memtail import datasets
from memtail.datasets import ImageDataset
from memtail.errors import MemtailError, SpecError, StoreError
from memtail.estimators import expected_standard_error
from memtail.execution.embedded import declare
from memtail.execution.pool import Task, Workers
from memtail.experiment_store import ExperimentStore, Record, missing_shards
from memtail.scores.publish import publish
from memtail.spec import Experiment, SubsetsSpec
from memtail.statistics import Statistics
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.storage.open import open_store
from memtail.subsets import membership
from memtail.trainers.images.devices import available_devices
from memtail.trainers.images.shard_size import operations_per_trial
from memtail.trials import Provenance, Shard, TrialBatch, TrialMetrics, pack

#: Numbers of devices for which a forecast is made, beside those of this machine.
DEVICES = (1, 8, 64)
#: What a shard should take: enough to pay for starting it, few enough to lose little.
SHARD_SECONDS = 30.0

_MEASURED_SECONDS = 4.0
_WRITING_SECONDS = 2.0
# Floating-point operations of one epoch and an evaluation of a shard that are measured without cutting the dataset: a second or two.
_OPERATIONS = {"cpu": 4e10, "mps": 4e12, "cuda": 4e13}
_FEWEST_IMAGES = 64
_START = "import memtail.cli.app, memtail.cli.display, memtail.logs, memtail.execution.embedded, memtail.scores.reader"


@dataclass(frozen=True)
class Forecast:
    """What a whole run takes on some number of devices: wall-clock seconds, and the cost of the devices for that long."""

    devices: int
    seconds: float
    cost: float | None


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        experiment: its name.
        trials, trials_to_train: how many are wanted, and how many of them the store does not hold.
        device, devices: the kind of device, and how many this machine has.
        extrapolated: whether training was cut short when it was measured.
        seconds_per_trial: on one device, while all others are busy too.
        startup_seconds, scoring_seconds: what a run takes before its first and after its last trial.
        peak_memory: bytes, the most that one training process takes: of the device on CUDA, of the host elsewhere.
        trials_per_shard, best_trials_per_shard: as the run will cut them, and as many as take about half a minute.
        here: the forecast for this machine.
        elsewhere: forecasts for `DEVICES` such devices.
        trial_bytes, score_bytes: what the store holds in the end: all trial batches, one version of the scores.
        standard_error: the largest to expect of a memorization or influence, with both rates at 1/2.
        wanted_standard_error, trials_for_it: as asked for, and the trials that it takes; None if not asked.
    """

    experiment: str
    trials: int
    trials_to_train: int
    device: str
    devices: int
    extrapolated: bool
    seconds_per_trial: float
    startup_seconds: float
    scoring_seconds: float
    peak_memory: int
    trials_per_shard: int
    best_trials_per_shard: int
    here: Forecast
    elsewhere: tuple[Forecast, ...]
    trial_bytes: int
    score_bytes: int
    standard_error: float
    wanted_standard_error: float | None
    trials_for_it: int | None


def plan(
    experiment: Experiment,
    store: str | Path = "memtail-store",
    *,
    price: float | None = None,
    standard_error: float | None = None,
    on_preparation: Callable[[int, int], None] | None = None,
) -> Plan:
    """Measure what an experiment would take.

    Args:
        experiment: the declaration.
        store: the folder or bucket in which its results are, or would be, kept: what it holds need not be trained. It is only read.
        price: of one device for an hour.
        standard_error: the one that is wanted of every score.
        on_preparation: as in `memtail.run`.

    Raises:
        SpecError: bad input.
        StoreError: the store holds another experiment of this name.
        MemtailError: a trial failed.
    """
    if standard_error is not None and not 0 < standard_error < math.inf:
        raise SpecError(f"standard error: {standard_error:g} cannot be had, ask for one above 0")
    if price is not None and not 0 <= price < math.inf:
        raise SpecError(f"price: {price:g} is no price, give one of 0 or more")
    dataset = datasets.prepare(experiment.dataset, on_preparation)
    began = time.perf_counter()
    record, todo = _to_train(experiment, datasets.prepare(experiment.dataset), store)
    subprocess.run([sys.executable, "-c", _START], check=True, stdin=subprocess.DEVNULL)
    started = time.perf_counter() - began
    devices = [str(device) for device in available_devices(experiment.execution.device)]
    trials, fraction = experiment.subsets.trials, _fraction(experiment, dataset)
    remaining = sum(len(shard.trials) for shard in todo)
    with tempfile.TemporaryDirectory(prefix="memtail-plan-") as folder:
        shard = _measure_shard(record, dataset, fraction, devices, Path(folder))
        writing = _measure_writing(record, dataset, fraction, Path(folder))
    per_trial = shard.seconds / shard.trials + writing.trial_seconds
    startup = started + shard.startup_seconds

    def forecast(count: int, lengths: list[int]) -> Forecast:
        seconds = _makespan([length * per_trial for length in lengths], count) + writing.publish_seconds
        seconds += startup if lengths else started
        return Forecast(count, seconds, None if price is None else price * count * seconds / 3600)

    def cut(count: int) -> list[int]:
        size = max(1, min(record.trials_per_shard, -(-remaining // count)))
        return [min(size, remaining - first) for first in range(0, remaining, size)]

    row = sum(2 * size for size in (dataset.n_train, dataset.n_test)) if experiment.record.margins else 0
    row += 2 * -(-dataset.n_train // 8) + -(-dataset.n_test // 8)
    error = expected_standard_error(1, fraction)
    return Plan(
        experiment=experiment.name,
        trials=trials,
        trials_to_train=remaining,
        device=devices[0].partition(":")[0],
        devices=len(devices),
        extrapolated=shard.extrapolated,
        seconds_per_trial=per_trial,
        startup_seconds=startup,
        scoring_seconds=writing.publish_seconds,
        peak_memory=shard.peak_memory,
        trials_per_shard=record.trials_per_shard,
        best_trials_per_shard=max(1, min(int(SHARD_SECONDS / per_trial), -(-trials // len(devices)))),
        here=forecast(len(devices), [len(each.trials) for each in todo]),
        elsewhere=tuple(forecast(count, cut(count)) for count in DEVICES),
        trial_bytes=round(trials * (row + shard.mistake_bytes * dataset.n_train + shard.other_bytes / shard.trials)),
        score_bytes=writing.file_bytes,
        standard_error=expected_standard_error(trials, fraction),
        wanted_standard_error=standard_error,
        trials_for_it=None if standard_error is None else math.ceil((error / standard_error) ** 2),
    )


def _to_train(experiment: Experiment, dataset: ImageDataset, store: str | Path) -> tuple[Record, list[Shard]]:
    """The record that a run would go by, and the shards that the store lacks."""
    wanted = declare(experiment, dataset)
    experiment_store = ExperimentStore(open_store(store, verify=False), experiment.name)
    if not experiment_store.store.exists(keys.experiment(experiment.name)):
        return wanted, missing_shards(experiment.subsets.trials, wanted.trials_per_shard, [])
    held = experiment_store.read_record()
    if held.fingerprint != wanted.fingerprint:
        raise StoreError(f"experiment '{experiment.name}' is in the store {store} and differs from this spec: choose another name or store")
    record = replace(wanted, trials_per_shard=held.trials_per_shard)
    return record, missing_shards(experiment.subsets.trials, record.trials_per_shard, experiment_store.committed())


def _fraction(experiment: Experiment, dataset: ImageDataset) -> float:
    """M / n; of explicit masks, which may differ in size, the mean of some."""
    trials = range(min(experiment.subsets.trials, 16))
    mean = float(membership(experiment.subsets, dataset.train_labels, trials).mean())
    return min(max(mean, 1 / dataset.n_train), 1 - 1 / dataset.n_train)


def _makespan(shards: list[float], devices: int) -> float:
    """The seconds until all shards are trained, each by the first device that is free."""
    free = [0.0] * devices
    for seconds in shards:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


@dataclass(frozen=True)
class _ShardFigures:
    """Of one shard: its trials and warm seconds, and the bytes of its batch that are not rows of arrays: of mistakes by training image and
    trial, and all others.
    """

    trials: int
    seconds: float
    startup_seconds: float
    peak_memory: int
    mistake_bytes: float
    other_bytes: int
    extrapolated: bool


def _measure_shard(record: Record, dataset: ImageDataset, fraction: float, devices: list[str], folder: Path) -> _ShardFigures:
    size, epochs = min(record.trials_per_shard, record.experiment.subsets.trials), record.experiment.training.epochs
    short = _shortened(record.experiment, 1, fraction)
    share = _OPERATIONS[devices[0].partition(":")[0]] / (size * operations_per_trial(short, dataset))
    if devices[0] != "cpu":  # whole batches, without which an accelerator is not busy
        share = max(share, record.experiment.training.batch_size / (fraction * dataset.n_train))
    sample = dataset if share >= 1 else _sample(dataset, share, folder / "sample")
    shards = [Shard(place * size, (place + 1) * size - 1) for place in range(len(devices))]

    with Workers(Task(short, sample.folder, str(folder / "store"), device=""), devices) as workers:
        cold, _ = _train_at_once(workers, shards)
        warm, finished = _train_at_once(workers, shards, profile=True)
        spent = [batch.provenance.phases or {} for batch, _ in finished]
        evaluation = float(np.mean([phases["evaluation"] for phases in spent]))
        epoch = float(np.mean([sum(phases.values()) for phases in spent])) - evaluation
        fixed = max(0.0, warm - epoch - evaluation)  # building the networks, handing over
        measured = max(1, min(epochs, int((_MEASURED_SECONDS - evaluation - fixed) / max(epoch, 1e-6))))
        seconds, finished = _train_at_once(workers, shards, experiment=_shortened(record.experiment, measured, fraction))
    training = max(0.0, seconds - fixed - evaluation) * epochs / measured * dataset.n_train / sample.n_train
    evaluation *= (dataset.n_train + dataset.n_test) / (sample.n_train + sample.n_test)
    images, measured_images = (data.train_images.nbytes + data.test_images.nbytes for data in (dataset, sample))
    return _ShardFigures(
        trials=size,
        seconds=fixed + training + evaluation,
        startup_seconds=max(0.0, cold - warm),
        peak_memory=max(memory for _, memory in finished) + images - measured_images,
        mistake_bytes=_mistake_bytes(finished[0][0]) / (size * sample.n_train),
        other_bytes=_other_bytes(finished[0][0]),
        extrapolated=measured < epochs or sample is not dataset,
    )


def _train_at_once(workers: Workers, shards: list[Shard], **changes: Any) -> tuple[float, list[tuple[TrialBatch, int]]]:
    """Train one shard per process; returns the mean of the seconds that they took, and each one's batch and its process's peak memory."""
    began, seconds, trained = time.perf_counter(), [], []
    for shard in shards:
        workers.start(shard, **changes)
    while workers.running:
        for finished in workers.finished(timeout=1.0):
            if finished.batch is None:
                raise MemtailError(f"a trial failed while planning: {finished.error}")
            seconds.append(time.perf_counter() - began)
            trained.append((finished.batch, finished.peak_memory))
    return float(np.mean(seconds)), trained


def _shortened(experiment: Experiment, epochs: int, fraction: float) -> Experiment:
    """The same work per epoch, on whatever subsets, so that it can be done on a part of the dataset."""
    subsets = SubsetsSpec(fraction=fraction, trials=experiment.subsets.trials, seed=experiment.subsets.seed)
    return experiment.model_copy(update={"subsets": subsets, "training": experiment.training.model_copy(update={"epochs": epochs})})


def _sample(dataset: ImageDataset, share: float, folder: Path) -> ImageDataset:
    """A part of a dataset, as a prepared dataset of its own."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        count = min(len(labels), max(_FEWEST_IMAGES, round(share * len(labels))))
        rows = np.sort(rng.choice(len(labels), count, replace=False))
        np.save(folder / f"{split}_images.npy", images[rows])
        np.save(folder / f"{split}_labels.npy", labels[rows])
    meta = {"fingerprint": "sample", "classes": dataset.classes, "mean": dataset.mean, "std": dataset.std, "has_files": False}
    (folder / "meta.json").write_text(json.dumps(meta))
    return ImageDataset.open(folder)


def _other_bytes(batch: TrialBatch) -> int:
    arrays = (batch.membership, batch.train_correct, batch.test_correct, batch.train_margin, batch.test_margin)
    return len(batch.to_bytes()) - sum(array.nbytes for array in arrays if array is not None) - _mistake_bytes(batch)


def _mistake_bytes(batch: TrialBatch) -> int:
    return 0 if batch.train_mistakes is None else batch.train_mistakes.nbytes


@dataclass(frozen=True)
class _WritingFigures:
    """Committing and folding a trial, publishing the scores of all, and the bytes of these."""

    trial_seconds: float
    publish_seconds: float
    file_bytes: int


def _measure_writing(record: Record, dataset: ImageDataset, fraction: float, folder: Path) -> _WritingFigures:
    """Commit, fold and publish made-up trials of the experiment's size: as many as there will be, if that takes no more than seconds."""
    name, wanted, size = record.experiment.name, record.experiment.subsets.trials, record.trials_per_shard
    store = LocalStore(folder / "store")
    experiment_store, statistics = ExperimentStore(store, name), Statistics(dataset.n_train, dataset.n_test)
    rng = np.random.default_rng(0)
    memorized = rng.random(dataset.n_train) < 0.05

    def margins(*shape: int) -> npt.NDArray[np.float16] | None:
        return rng.normal(0, 5, shape).astype(np.float16) if record.experiment.record.margins else None

    seconds = 0.0
    while len(statistics.metrics) < wanted and seconds < _WRITING_SECONDS:
        first = len(statistics.metrics)
        trials = np.arange(first, min(first + size, wanted), dtype=np.int32)
        members = rng.random((len(trials), dataset.n_train), np.float32) < fraction
        batch = TrialBatch(
            trial=trials,
            membership=pack(members),
            train_correct=pack(members | ~memorized),
            test_correct=pack(rng.random((len(trials), dataset.n_test), np.float32) < 0.95),
            n_train=dataset.n_train,
            n_test=dataset.n_test,
            metrics=[TrialMetrics(int(trial), False, 0.0, 1.0, 1.0, 1.0) for trial in trials],
            provenance=Provenance(record.fingerprint),
            train_margin=margins(len(trials), dataset.n_train),
            test_margin=margins(len(trials), dataset.n_test),
            train_mistakes=np.zeros(np.count_nonzero(~members & memorized), np.uint16),
        )
        began = time.perf_counter()
        experiment_store.commit(batch, record.fingerprint)
        statistics.accumulate(batch)
        seconds += time.perf_counter() - began
    began = time.perf_counter()
    publish(store, record, statistics, dataset)
    published = time.perf_counter() - began
    files = sum(path.stat().st_size for path in store.path(keys.all_scores(name).rstrip("/")).rglob("*") if path.is_file())
    words = -(-wanted // 64) - -(-len(statistics.metrics) // 64)
    missing = 8 * words * (2 * dataset.n_train + dataset.n_test + 1)  # of the packed statistics, which alone grow with the trials
    return _WritingFigures(seconds / len(statistics.metrics), published, files + missing)
