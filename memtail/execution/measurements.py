"""Measurements behind a forecast: shards trained as a run trains them, and synthetic trials accumulated and published.

Training that would take too long is cut short: fewer epochs, and of a large dataset fewer examples. Seconds are extrapolated from three
shards per device:

* a cold one of one epoch, which with the next gives the start-up: processes, imports, compilation;
* a warm one of one epoch, whose phases separate evaluation from training;
* a warm one of as many epochs as fit into a few seconds (of all, if they do), whose seconds beyond evaluation are those of training.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memtail.datasets import Dataset, Trainable, as_trainable, open_dataset
from memtail.errors import MemtailError
from memtail.execution.declare import declare, network_operations
from memtail.execution.pool import Task, Workers
from memtail.execution.shard_task import ShardOutcome, ShardResult
from memtail.experiment_store import ExperimentStore, Record
from memtail.scores.publish import publish
from memtail.settings import Settings
from memtail.spec import Experiment, SubsetsSpec
from memtail.statistics import Statistics
from memtail.statistics.soft import PLANES
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.trainers.images.shard_size import is_long, operations_per_trial
from memtail.trials import Provenance, Shard, TrialBatch, TrialMetrics, pack

_MEASURED_SECONDS = 4.0
_WRITING_SECONDS = 2.0
# Floating-point operations of one epoch and an evaluation of a shard that are measured without cutting the dataset: a second or two.
_OPERATIONS = {"cpu": 4e10, "mps": 4e12, "cuda": 4e13}
_FEWEST_EXAMPLES = 64


@dataclass(frozen=True)
class ShardFigures:
    """Measurements of one shard.

    Attributes:
        trials: number of its trials.
        seconds: from the start to the commit in a warm process.
        startup_seconds: seconds that the first shard of a process takes longer.
        peak_memory: peak memory of a training process, in bytes.
        mistake_bytes: bytes of misclassified training examples in the trial batch, by trial and training example.
        other_bytes: bytes of the trial batch outside its arrays.
        model_bytes: bytes of a model, if the first one is to be kept; otherwise 0.
        extrapolated: whether fewer epochs or examples were trained.
    """

    trials: int
    seconds: float
    startup_seconds: float
    peak_memory: int
    mistake_bytes: float
    other_bytes: int
    model_bytes: int
    extrapolated: bool


def measure_shard(record: Record, dataset: Trainable, fraction: float, devices: list[str], folder: Path, store: str) -> ShardFigures:
    """Train shards of the experiment's size on all devices at once.

    Args:
        record: the experiment's record.
        dataset: its dataset.
        fraction: m / n.
        devices: devices to train on, one process each.
        folder: an empty folder for stores and a sample of the dataset.
        store: address of the experiment's store, to which user code has no access.

    Raises:
        MemtailError: a trial failed.
    """
    size, epochs = min(record.trials_per_shard, record.experiment.subsets.trials), record.experiment.training.epochs
    trials = max(record.experiment.subsets.trials, 2 * len(devices) * size)
    short = _shortened(record.experiment, 1, fraction, trials)
    operations = network_operations(short, dataset, store) or operations_per_trial(short, dataset)
    share = _OPERATIONS[devices[0].partition(":")[0]] / (size * operations)
    if devices[0] != "cpu":  # at least one full batch, else an accelerator is not busy
        share = max(share, record.experiment.training.batch_size / (fraction * dataset.n_train))
    sample = dataset if share >= 1 else _sample(dataset, share, folder / "sample")
    both = [Shard(first, first + size - 1) for first in range(0, 2 * len(devices) * size, size)]
    cold_shards, shards = both[: len(devices)], both[len(devices) :]

    whole = _as_compiled(record.experiment, dataset)

    def shortened(epochs: int) -> Record:
        # with shards of the size to be measured
        return declare(_shortened(whole, epochs, fraction, trials), sample, size)

    with Workers(Task(shortened(1), sample.folder, "", device="", code=Settings().code), devices) as workers:
        # in one store, so that a trainer process is kept
        cold, _ = _train_at_once(workers, cold_shards, folder / "short", shortened(1))
        warm, results = _train_at_once(workers, shards, folder / "short", shortened(1))
        spent = [result.phases for result in results]
        evaluation = float(np.mean([phases["evaluation"] for phases in spent]))
        epoch = float(np.mean([sum(phases.values()) for phases in spent])) - evaluation
        fixed = max(0.0, warm - epoch - evaluation)  # building the networks, the commit, communication
        measured = max(1, min(epochs, int((_MEASURED_SECONDS - evaluation - fixed) / max(epoch, 1e-6))))
        around = warm - float(np.mean([result.seconds for result in results]))
        _, results = _train_at_once(workers, shards, folder / "whole", shortened(measured))
        seconds = around + float(np.mean([result.seconds for result in results]))  # without the start of a trainer process
    batch = ExperimentStore(LocalStore(folder / "whole"), record.experiment.name).batch(shards[0], shortened(measured))
    training = max(0.0, seconds - fixed - evaluation) * epochs / measured * dataset.n_train / sample.n_train
    evaluation *= (dataset.n_train + dataset.n_test) / (sample.n_train + sample.n_test)
    # those after epochs are of the training examples only, and were not measured
    evaluation *= 1 + len(record.experiment.record.snapshots) * dataset.n_train / (dataset.n_train + dataset.n_test)
    size_of, size_of_sample = (data.examples("train").nbytes + data.examples("test").nbytes for data in (dataset, sample))
    return ShardFigures(
        trials=size,
        seconds=fixed + training + evaluation,
        startup_seconds=max(0.0, cold - warm),
        peak_memory=max(result.peak_memory for result in results) + size_of - size_of_sample,
        mistake_bytes=_mistake_bytes(batch) / (size * sample.n_train),
        other_bytes=_other_bytes(batch),
        model_bytes=next((each.bytes for each in LocalStore(folder / "short").inventory(keys.models(record.experiment.name))), 0),
        extrapolated=measured < epochs or sample is not dataset,
    )


def _train_at_once(workers: Workers, shards: list[Shard], store: Path, record: Record) -> tuple[float, list[ShardResult]]:
    """Train one shard per process into an empty store; returns the mean of their seconds, and their results."""
    ExperimentStore(LocalStore(store), record.experiment.name).register(record)
    began, seconds, results = time.perf_counter(), [], []
    for shard in shards:
        workers.start(shard, store=str(store), record=record)
    while workers.running:
        for result in workers.finished(timeout=1.0):
            if result.outcome is not ShardOutcome.COMMITTED:
                raise MemtailError(f"a trial failed while the run was measured: {result.error}")
            seconds.append(time.perf_counter() - began)
            results.append(result)
    return float(np.mean(seconds)), results


def _as_compiled(experiment: Experiment, dataset: Dataset) -> Experiment:
    """Return an experiment whose network is compiled if that of the whole run is: with fewer epochs `auto` would not."""
    execution = experiment.execution
    if experiment.runs_user_code or execution.compile != "auto" or not is_long(operations_per_trial(experiment, dataset)):
        return experiment
    return experiment.model_copy(update={"execution": execution.model_copy(update={"compile": True})})


def _shortened(experiment: Experiment, epochs: int, fraction: float, trials: int) -> Experiment:
    """Return an experiment of equal work per epoch; its uniform subsets also fit a part of the dataset.

    It records no outcomes after epochs, which it may not reach.
    """
    subsets = SubsetsSpec(fraction=fraction, trials=trials, seed=experiment.subsets.seed)
    training = experiment.training.model_copy(update={"epochs": epochs})
    recorded = experiment.record.model_copy(update={"snapshots": []})
    return experiment.model_copy(update={"subsets": subsets, "training": training, "record": recorded})


def _sample(dataset: Trainable, share: float, folder: Path) -> Trainable:
    """Write a random part of a dataset as a prepared dataset."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, labels in (("train", dataset.train_labels), ("test", dataset.test_labels)):
        count = min(len(labels), max(_FEWEST_EXAMPLES, round(share * len(labels))))
        rows = np.sort(rng.choice(len(labels), count, replace=False))
        np.save(folder / f"{split}_{dataset.kind}.npy", dataset.examples(split)[rows])
        np.save(folder / f"{split}_labels.npy", labels[rows])
    meta = json.loads((dataset.folder / "meta.json").read_text()) | {"fingerprint": "sample", "has_files": False}
    (folder / "meta.json").write_text(json.dumps(meta))
    return as_trainable(open_dataset(folder))


def _other_bytes(batch: TrialBatch) -> int:
    names = ("membership", "train_correct", "test_correct", "train_margin", "test_margin", "train_score", "test_score")
    arrays = [getattr(batch, name) for name in names]
    of_arrays: int = sum(array.nbytes for array in arrays if array is not None)
    return len(batch.to_bytes()) - of_arrays - _mistake_bytes(batch)


def _mistake_bytes(batch: TrialBatch) -> int:
    return 0 if batch.train_mistakes is None else batch.train_mistakes.nbytes


@dataclass(frozen=True)
class WritingFigures:
    """Measurements of the parent's work: seconds to accumulate a trial, seconds to publish all scores, and their bytes."""

    trial_seconds: float
    publish_seconds: float
    file_bytes: int


def measure_writing(record: Record, dataset: Dataset, fraction: float, folder: Path) -> WritingFigures:
    """Accumulate and publish synthetic trials of the experiment's size: all of its trials, or as many as take two seconds."""
    name, total, size = record.experiment.name, record.experiment.subsets.trials, record.trials_per_shard
    store = LocalStore(folder / "written")
    experiment_store, statistics = ExperimentStore(store, name), Statistics(dataset.n_train, dataset.n_test)
    experiment_store.register(record)
    rng = np.random.default_rng(0)
    memorized = rng.random(dataset.n_train) < 0.05
    epochs = record.experiment.record.snapshots

    def margins(*shape: int) -> npt.NDArray[np.float16] | None:
        return rng.normal(0, 5, shape).astype(np.float16) if record.experiment.record.margins else None

    def scores(*shape: int) -> npt.NDArray[np.uint8] | None:
        return rng.integers(0, 256, shape, np.uint8) if record.experiment.record.keeps_scores else None

    seconds = 0.0
    while len(statistics.metrics) < total and seconds < _WRITING_SECONDS:
        first = len(statistics.metrics)
        trials = np.arange(first, min(first + size, total), dtype=np.int32)
        members = rng.random((len(trials), dataset.n_train), np.float32) < fraction
        learned = pack(rng.random(members.shape, np.float32) < 0.95) if epochs else None
        batch = TrialBatch(
            trial=trials,
            membership=pack(members),
            train_correct=pack(members | ~memorized),
            test_correct=pack(rng.random((len(trials), dataset.n_test), np.float32) < 0.95),
            n_train=dataset.n_train,
            n_test=dataset.n_test,
            metrics=[TrialMetrics(int(trial), False, 0.0, 1.0, 1.0, 1.0 if dataset.n_test else None) for trial in trials],
            provenance=Provenance(record.fingerprint),
            train_margin=margins(len(trials), dataset.n_train),
            test_margin=margins(len(trials), dataset.n_test),
            train_score=scores(len(trials), dataset.n_train),
            test_score=scores(len(trials), dataset.n_test),
            train_mistakes=np.zeros(np.count_nonzero(~members & memorized), np.uint16),
            snapshot_epochs=np.array(epochs, np.int32) if epochs else None,
            snapshot_correct=None if learned is None else np.stack([np.roll(learned, place, 1) for place in range(len(epochs))]),
        )
        experiment_store.commit(batch, record.fingerprint)
        began = time.perf_counter()
        statistics.accumulate(experiment_store.batch(batch.shard, record))
        seconds += time.perf_counter() - began
    began = time.perf_counter()
    publish(store, record, statistics, dataset)
    published = time.perf_counter() - began
    files = sum(path.stat().st_size for path in store.local_path(keys.all_scores(name).rstrip("/")).rglob("*") if path.is_file())
    words = -(-total // 64) - -(-len(statistics.metrics) // 64)
    columns = 2 * dataset.n_train + (1 + PLANES * record.experiment.record.keeps_scores) * dataset.n_test + 1
    missing = 8 * words * columns  # of the packed statistics: only they grow with the trials
    return WritingFigures(seconds / len(statistics.metrics), published, files + missing)
