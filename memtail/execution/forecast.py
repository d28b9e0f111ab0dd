"""Forecast of a run, measured in a few seconds: time, memory, bytes, cost, and the standard error of its scores.

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
from memtail.datasets import Dataset, as_trainable
from memtail.errors import ScoresError, SpecError, StoreError
from memtail.estimators import expected_standard_error
from memtail.execution.declare import declare, network_shard_size
from memtail.execution.goals import Goal, described, error_goal, overlap_goals, until_goals
from memtail.execution.measurements import measure_shard, measure_writing
from memtail.experiment_store import ExperimentStore, Record, missing_shards
from memtail.scores.fetch import open_scores
from memtail.scores.pointer import latest_version
from memtail.spec import Experiment, ImagesTrainer
from memtail.statistics.accumulator import PackedTrials
from memtail.storage import ObjectStore, keys
from memtail.storage.open import open_store
from memtail.subsets import membership
from memtail.trainers.images.devices import available_devices
from memtail.trainers.images.shard_size import checked_shard_size
from memtail.trials import Shard

#: Numbers of devices of the forecasts beside the one for this machine.
DEVICES = (1, 8, 64)
#: Target duration of a shard: long against its start, short enough to lose little.
SHARD_SECONDS = 30.0

_START = "import memtail.cli.app, memtail.cli.display, memtail.logs, memtail.execution.embedded, memtail.scores.reader"


@dataclass(frozen=True)
class DeviceForecast:
    """Duration and cost of a whole run on some number of devices.

    Attributes:
        devices: number of devices.
        seconds: wall-clock seconds of the run.
        cost: price of the devices for that time, None without a price.
    """

    devices: int
    seconds: float
    cost: float | None


@dataclass(frozen=True)
class GoalForecast:
    """Forecast of a run that reaches a goal (see `memtail.execution.goals`).

    Attributes:
        goal: the goal, in words.
        trials: the number of trials that it takes; None if it is unknown, or beyond reach.
        beyond: lower bound of the number if it is beyond reach.
        here: forecast for this machine; None without a number of trials.
        elsewhere: forecasts for `DEVICES` devices of this kind; empty without a number of trials.
    """

    goal: str
    trials: int | None
    beyond: int | None
    here: DeviceForecast | None
    elsewhere: tuple[DeviceForecast, ...]


@dataclass(frozen=True)
class Forecast:
    """Forecast of a run.

    Attributes:
        experiment: name of the experiment.
        trials, trials_to_train: number of all trials, and of those the store does not hold.
        device, devices: kind of device, and number of them on this machine.
        extrapolated: whether training was cut short when it was measured.
        seconds_per_trial: seconds of a trial on one device while all others are busy too.
        startup_seconds, scoring_seconds: seconds of a run before its first and after its last trial.
        peak_memory: peak memory of a training process in bytes: of the device on CUDA, of the host elsewhere.
        trials_per_shard, best_trials_per_shard: trials in a shard of the run, and in one of about half a minute.
        here: forecast for this machine.
        elsewhere: forecasts for `DEVICES` devices of this kind.
        trial_bytes, score_bytes, model_bytes: bytes in the store at the end: all trial batches, one version of the scores, and the models
            that are kept.
        standard_error: largest expected standard error of a memorization or influence: both rates at 1/2.
        until: the bounds at which the run ends, in words; `trials` are those of the present round then. None without `subsets.until`.
        wanted_standard_error, trials_for_it: the standard error asked for, and the number of trials it takes; None if not asked.
        goals: forecasts of runs that reach the bounds of `subsets.until`, and what was asked for.
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
    model_bytes: int
    standard_error: float
    until: str | None
    wanted_standard_error: float | None
    trials_for_it: int | None
    goals: tuple[GoalForecast, ...]


def forecast(
    experiment: Experiment,
    store: str | Path = "memtail-store",
    *,
    price: float | None = None,
    standard_error: float | None = None,
    overlap: float | None = None,
    on_preparation: Callable[[int, int], None] | None = None,
) -> Forecast:
    """Forecast the run of an experiment from a few seconds of training.

    Args:
        experiment: the declaration.
        store: the folder or bucket of its results, which is only read: trials in it need not be trained.
        price: price of one device for an hour.
        standard_error: standard error to reach for every score.
        overlap: overlap to reach of what two runs select: memorized examples, and pairs. It takes published scores in the store.
        on_preparation: as in `memtail.run`.

    Raises:
        SpecError: bad input.
        ScoresError: an overlap is asked for, and there are no published scores, or too few trials.
        StoreError: the store holds another experiment of this name.
        MemtailError: a trial failed.
    """
    if not isinstance(experiment.trainer, ImagesTrainer):
        raise SpecError(
            f"experiment '{experiment.name}' is trained by a function or a command, and a forecast measures the built-in trainer: "
            f"memtail trainer check measures one trial, and forecasts the time of all"
        )
    if standard_error is not None and not 0 < standard_error < math.inf:
        raise SpecError(f"--standard-error must be above 0, got {standard_error:g}")
    if overlap is not None and not 0 < overlap < 1:
        raise SpecError(f"--overlap must be between 0 and 1, got {overlap:g}")
    if price is not None and not 0 <= price < math.inf:
        raise SpecError(f"--price must be at least 0, got {price:g}")
    dataset = datasets.prepare(experiment.dataset, on_preparation)
    began = time.perf_counter()
    opened = open_store(store, verify=False)
    record, todo = _to_train(experiment, datasets.prepare(experiment.dataset), opened)
    trials, fraction = record.experiment.subsets.trials, _fraction(experiment, dataset)
    subprocess.run([sys.executable, "-c", _START], check=True, stdin=subprocess.DEVNULL)
    started = time.perf_counter() - began
    labels, scores = (dataset.train_labels, dataset.test_labels), _published(opened, experiment.name)
    goals = until_goals(experiment, record.most_trials, scores, labels)
    if standard_error is not None:
        goals.append(error_goal(standard_error, fraction))
    if overlap is not None:
        if scores is None:
            raise ScoresError(
                f"--overlap needs scores, and experiment '{experiment.name}' has none in the store {opened.address}: "
                f"train some 250 trials first (memtail run)"
            )
        goals += overlap_goals(experiment.name, overlap, scores, labels)
    devices = [str(device) for device in available_devices(experiment.execution.device)]
    remaining = sum(len(shard.trials) for shard in todo)
    present = trials - remaining
    with tempfile.TemporaryDirectory(prefix="memtail-plan-") as folder:
        shard = measure_shard(record, as_trainable(dataset), fraction, devices, Path(folder), opened.address)
        writing = measure_writing(record, dataset, fraction, Path(folder))
    per_trial = shard.seconds / shard.trials + writing.trial_seconds
    startup = started + shard.startup_seconds

    def on_devices(count: int, lengths: list[int]) -> DeviceForecast:
        seconds = _makespan([length * per_trial for length in lengths], count) + writing.publish_seconds
        seconds += startup if lengths else started
        return DeviceForecast(count, seconds, None if price is None else price * count * seconds / 3600)

    def cut(count: int, remaining: int) -> list[int]:
        size = max(1, min(record.trials_per_shard, -(-remaining // count)))
        return [min(size, remaining - first) for first in range(0, remaining, size)]

    def up_to(goal: Goal) -> GoalForecast:
        if goal.trials is None:
            return GoalForecast(goal.name, None, goal.beyond, None, ())
        more = max(0, goal.trials - present)
        here, *elsewhere = (on_devices(count, cut(count, more)) for count in (len(devices), *DEVICES))
        return GoalForecast(goal.name, goal.trials, None, here, tuple(elsewhere))

    row = (2 * experiment.record.margins + record.experiment.record.keeps_scores) * (dataset.n_train + dataset.n_test)
    row += (2 + len(experiment.record.snapshots)) * -(-dataset.n_train // 8) + -(-dataset.n_test // 8)
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
        elsewhere=tuple(on_devices(count, cut(count, remaining)) for count in DEVICES),
        trial_bytes=round(trials * (row + shard.mistake_bytes * dataset.n_train + shard.other_bytes / shard.trials)),
        score_bytes=writing.file_bytes,
        model_bytes=(trials if experiment.record.models == "all" else min(trials, experiment.record.models)) * shard.model_bytes,
        standard_error=expected_standard_error(trials, fraction),
        until=described(experiment.subsets.until),
        wanted_standard_error=standard_error,
        trials_for_it=None if standard_error is None else error_goal(standard_error, fraction).trials,
        goals=tuple(up_to(goal) for goal in goals),
    )


def _to_train(experiment: Experiment, dataset: Dataset, store: ObjectStore) -> tuple[Record, list[Shard]]:
    """The record of the run, and the shards without a batch in the store."""
    size = network_shard_size(experiment, dataset, store.address, None) or checked_shard_size(experiment, dataset)
    declared, experiment_store = declare(experiment, dataset, size), ExperimentStore(store, experiment.name)
    if not store.exists(keys.experiment(experiment.name)):
        return declared.decided(), missing_shards(experiment.subsets.trials, declared.trials_per_shard, [])
    held = experiment_store.read_record()
    if held.fingerprint != declared.fingerprint:
        raise StoreError(
            f"experiment '{experiment.name}' is in the store {store.address} and differs from this spec: choose another name or store"
        )
    record = replace(declared.decided(held), trials_per_shard=held.trials_per_shard)
    if experiment.subsets.until is not None:  # extended since it was declared
        record = record.with_trials(max(experiment.subsets.trials, held.experiment.subsets.trials))
    return record, experiment_store.missing(record)


def _published(store: ObjectStore, name: str) -> PackedTrials | None:
    """The statistics of the latest scores; None if there are none."""
    return None if latest_version(store, name) is None else open_scores(store, name).statistics


def _fraction(experiment: Experiment, dataset: Dataset) -> float:
    """Fraction m / n; for explicit masks, whose sizes may differ, the mean over the first 16."""
    trials = range(min(experiment.subsets.trials, 16))
    mean = float(membership(experiment.subsets, dataset.train_labels, trials).mean())
    return min(max(mean, 1 / dataset.n_train), 1 - 1 / dataset.n_train)


def _makespan(shards: list[float], devices: int) -> float:
    """Seconds until all shards are trained, each by the first device that is free."""
    free = [0.0] * devices
    for seconds in shards:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)
