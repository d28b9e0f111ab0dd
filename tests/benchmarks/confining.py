"""Rows about the trainer process: equal trials by a function and by a network that call memtail's own, and by the built-in trainer."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from memtail import datasets
from memtail.execution.declare import declare
from memtail.experiment_store import Record
from memtail.spec import Experiment
from memtail.trainers.shard_trainer import ShardTrainer
from memtail.trials import Shard, TrialBatch
from tests.benchmarks.bench import Row

REPETITIONS, TRIALS = 10, 64
_CODE = Path(__file__).parents[1] / "support"
_CONFINED = ("function", "network")


def trainer_process() -> list[Row]:
    """Measure the time per trial of whole shards, alternately; the start of the process counts on neither side."""
    spec = {"dataset": {"name": "digits"}, "subsets": {"trials": 10**6}}
    recipe = {"model": {"name": "mlp", "hidden": [256]}, "training": {"epochs": 30}}
    built_in = Experiment.parse({"name": "built-in", **spec, **recipe})
    options = {"experiment": built_in.model_dump(mode="json")}
    trainer = {"function": "wrapped_training:train", "options": options, "folder": str(_CODE)}
    network = {**recipe, "model": {"name": "wrapped_training:network", "options": {"hidden": [256]}}}
    experiments = {
        "function": Experiment.parse({"name": "function", **spec, "trainer": trainer}),
        "network": Experiment.parse({"name": "network", **spec, **network}),
        "built-in": built_in,
    }
    dataset = datasets.prepare(built_in.dataset)
    records = {name: declare(each, dataset, TRIALS) for name, each in experiments.items()}
    trainers = {name: ShardTrainer("cpu") for name in records}
    times: dict[str, list[float]] = {name: [] for name in records}

    def train(name: str, record: Record, shard: Shard) -> TrialBatch:
        return trainers[name].train(record, dataset, shard, None, code=_CODE)

    try:
        for repetition in range(REPETITIONS + 1):
            shard = Shard(repetition * TRIALS, (repetition + 1) * TRIALS - 1)
            batches = {}
            for name in sorted(records, reverse=bool(repetition % 2)):
                began = time.perf_counter()
                batches[name] = train(name, records[name], shard)
                times[name].append((time.perf_counter() - began) / TRIALS)
            for name in _CONFINED:
                assert (batches[name].train_correct == batches["built-in"].train_correct).all()
                assert (batches[name].test_correct == batches["built-in"].test_correct).all()
    finally:
        for each in trainers.values():
            each.end()
    accuracy, rows = statistics.mean(entry.test_accuracy or 0.0 for entry in batches["built-in"].metrics), []
    for name in _CONFINED:
        ours, baseline = times[name][1:], times["built-in"][1:]  # the first repetition starts the process and compiles
        overhead = statistics.median(a / b for a, b in zip(ours, baseline, strict=True)) - 1
        note = f"digits, MLP 256, shards of {TRIALS}; {100 * overhead:+.2f}% per trial; equal bits, test accuracy {accuracy:.2%}"
        rows.append(Row(f"trainer-process, {name}", "trial", "0.99x", ours, baseline, "the built-in trainer", note=note))
    return rows


ROWS: dict[str, Callable[[], list[Row]]] = {"trainer-process": trainer_process}
