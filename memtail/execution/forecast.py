"""DeviceForecast of a run, measured in a few seconds: time, memory, bytes, cost, and the standard error of its scores.

The measurements are those of `memtail.execution.measurements`, in a store that is thrown away.
"""

import heapq
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from memtail import datasets
from memtail.datasets import ImageDataset
from memtail.errors import SpecError, StoreError
from memtail.estimators import expected_standard_error
from memtail.execution.declare import declare
from memtail.execution.measurements import measure_shard, measure_writing
from memtail.experiment_store import ExperimentStore, Record, missing_shards
from memtail.spec import Experiment
from memtail.storage import keys
from memtail.storage.open import open_store
from memtail.subsets import membership
from memtail.trainers.images.devices import available_devices
from memtail.trainers.images.shard_size import checked_shard_size
from memtail.trials import Shard

#: Numbers of devices for which a forecast is made, beside those of this machine.
DEVICES = (1, 8, 64)
#: What a shard should take: enough to pay for starting it, few enough to lose little.
SHARD_SECONDS = 30.0

_START = "import memtail.cli.app, memtail.cli.display, memtail.logs, memtail.execution.embedded, memtail.scores.reader"


@dataclass(frozen=True)
class DeviceForecast:
    """What a whole run takes on some number of devices: wall-clock seconds, and the cost of the devices for that long."""

    devices: int
    seconds: float
    cost: float | None


@dataclass(frozen=True)
class Forecast:
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
    here: DeviceForecast
    elsewhere: tuple[DeviceForecast, ...]
    trial_bytes: int
    score_bytes: int
    standard_error: float
    wanted_standard_error: float | None
    trials_for_it: int | None


def forecast(
    experiment: Experiment,
    store: str | Path = "memtail-store",
    *,
    price: float | None = None,
    standard_error: float | None = None,
    on_preparation: Callable[[int, int], None] | None = None,
) -> Forecast:
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
        raise SpecError(f"--standard-error must be above 0, got {standard_error:g}")
    if price is not None and not 0 <= price < math.inf:
        raise SpecError(f"--price must be at least 0, got {price:g}")
    dataset = datasets.prepare(experiment.dataset, on_preparation)
    began = time.perf_counter()
    record, todo = _to_train(experiment, datasets.prepare(experiment.dataset), store)
    subprocess.run([sys.executable, "-c", _START], check=True, stdin=subprocess.DEVNULL)
    started = time.perf_counter() - began
    devices = [str(device) for device in available_devices(experiment.execution.device)]
    trials, fraction = experiment.subsets.trials, _fraction(experiment, dataset)
    remaining = sum(len(shard.trials) for shard in todo)
    with tempfile.TemporaryDirectory(prefix="memtail-plan-") as folder:
        shard = measure_shard(record, dataset, fraction, devices, Path(folder))
        writing = measure_writing(record, dataset, fraction, Path(folder))
    per_trial = shard.seconds / shard.trials + writing.trial_seconds
    startup = started + shard.startup_seconds

    def on_devices(count: int, lengths: list[int]) -> DeviceForecast:
        seconds = _makespan([length * per_trial for length in lengths], count) + writing.publish_seconds
        seconds += startup if lengths else started
        return DeviceForecast(count, seconds, None if price is None else price * count * seconds / 3600)

    def cut(count: int) -> list[int]:
        size = max(1, min(record.trials_per_shard, -(-remaining // count)))
        return [min(size, remaining - first) for first in range(0, remaining, size)]

    row = sum(2 * size for size in (dataset.n_train, dataset.n_test)) if experiment.record.margins else 0
    row += 2 * -(-dataset.n_train // 8) + -(-dataset.n_test // 8)
    error = expected_standard_error(1, fraction)
    return Forecast(
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
        here=on_devices(len(devices), [len(each.trials) for each in todo]),
        elsewhere=tuple(on_devices(count, cut(count)) for count in DEVICES),
        trial_bytes=round(trials * (row + shard.mistake_bytes * dataset.n_train + shard.other_bytes / shard.trials)),
        score_bytes=writing.file_bytes,
        standard_error=expected_standard_error(trials, fraction),
        wanted_standard_error=standard_error,
        trials_for_it=None if standard_error is None else math.ceil((error / standard_error) ** 2),
    )


def _to_train(experiment: Experiment, dataset: ImageDataset, store: str | Path) -> tuple[Record, list[Shard]]:
    """The record that a run would go by, and the shards that the store lacks."""
    wanted = declare(experiment, dataset, checked_shard_size(experiment, dataset))
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
