"""Training rows: seconds per trial, from initial weights to evaluation on everything."""

import os
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from memtail import datasets
from memtail.datasets import ImageDataset
from memtail.execution.declare import declare
from memtail.execution.pool import Task, Workers
from memtail.execution.shard_task import ShardOutcome
from memtail.experiment_store import ExperimentStore
from memtail.models import build_model
from memtail.processes import cores
from memtail.spec import Experiment
from memtail.storage.local import LocalStore
from memtail.subsets import membership
from memtail.trials import Shard
from tests.benchmarks import baselines
from tests.benchmarks.baselines import Data, Recipe
from tests.benchmarks.bench import Row

REPETITIONS = 5


def _workload(name: str, model: dict, recipe: Recipe, dataset: dict) -> Experiment:
    schedule = {"name": recipe.schedule} | ({"warmup": 0.1} if recipe.schedule == "cosine" else {})
    optimizer = {"name": recipe.optimizer, "lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        optimizer |= {"momentum": recipe.momentum, "nesterov": recipe.nesterov}
    training = {"epochs": recipe.epochs, "batch_size": recipe.batch_size, "optimizer": optimizer, "schedule": schedule}
    return Experiment.parse({"name": name, "dataset": dataset, "model": model, "training": training})


def _data(dataset: ImageDataset) -> Data:
    mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)

    def images(array: np.ndarray) -> torch.Tensor:
        return ((torch.from_numpy(np.array(array)).float() - mean) / std).permute(0, 3, 1, 2).contiguous()

    return Data(
        images(dataset.train_images),
        torch.from_numpy(np.array(dataset.train_labels)),
        images(dataset.test_images),
        torch.from_numpy(np.array(dataset.test_labels)),
    )


def measure(name: str, model: dict, recipe: Recipe, dataset_spec: dict, trials: int, targets: dict[str, str], note: str = "") -> list[Row]:
    """Measure `trials` trials of memtail per repetition against one of each baseline."""
    experiment = _workload(name, model, recipe, dataset_spec)
    dataset = datasets.as_images(datasets.prepare(experiment.dataset))
    data = _data(dataset)
    torch.set_num_threads(cores())
    runs: dict[str, Callable] = {"(a)": baselines.with_dataloader, "(b)": baselines.in_memory}
    times: dict[str, list[float]] = {"ours": [], **{key: [] for key in targets}}
    accuracies: dict[str, list[tuple[float, float]]] = {key: [] for key in times}
    share = -(-trials // cores())
    record = declare(experiment, dataset, share).with_trials(2 * 10**6)
    with tempfile.TemporaryDirectory() as folder, Workers(Task(record, dataset.folder, folder, ""), ["cpu"] * cores()) as workers:
        experiment_store = ExperimentStore(LocalStore(Path(folder)), experiment.name)
        experiment_store.register(record)
        _train(workers, [Shard(10**6 + core, 10**6 + core) for core in range(cores())])  # start the processes
        for repetition in range(REPETITIONS):
            shards = [
                Shard(repetition * trials + first, min(repetition * trials + first + share, (repetition + 1) * trials) - 1)
                for first in range(0, trials, share)
            ]
            began = time.perf_counter()
            _train(workers, shards)
            times["ours"].append((time.perf_counter() - began) / trials)
            batches = [experiment_store.batch(shard, record) for shard in shards]
            accuracies["ours"] += [(entry.in_subset_accuracy, entry.test_accuracy) for batch in batches for entry in batch.metrics]
            for key in targets:
                torch.manual_seed(repetition)
                network = build_model(experiment.model, dataset.image_shape, len(dataset.classes))
                member = membership(experiment.subsets, dataset.train_labels, [repetition])[0]
                began = time.perf_counter()
                accuracies[key].append(runs[key](network, recipe, data, member))
                times[key].append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024

    def accuracy(key: str) -> str:
        inside, test = np.median(accuracies[key], axis=0)  # with few trials, one that fails to train would move a mean by points
        return f"{inside:.2%} in-subset, {test:.2%} test"

    return [
        Row(name, "trial", target, times["ours"], times[key], key, peak, f"ours {accuracy('ours')}; {key} {accuracy(key)}{note}")
        for key, target in targets.items()
    ]


def _train(workers: Workers, shards: list[Shard]) -> None:
    for shard in shards:
        workers.start(shard)
    while workers.running:
        for result in workers.finished(timeout=1.0):
            assert result.outcome is ShardOutcome.COMMITTED, result.error


def mnist() -> dict:
    """Measure on MNIST, from `MEMTAIL_DATA` or from the data of the tests."""
    return (
        {"name": "mnist"}
        if os.environ.get("MEMTAIL_DATA")
        else {"name": "mnist", "root": str(Path(__file__).parents[2] / "../shared/data")}
    )


DIGITS = Recipe(20, 64, 0.1, 0.9, 5e-4, True, "cosine")
DIGITS_ADAMW = Recipe(20, 64, 0.003, 0.0, 0.01, False, "cosine", "adamw")
DEMO = Recipe(2, 128, 0.1, 0.9, 0.0, False, "constant")

ROWS: dict[str, Callable[[], list[Row]]] = {
    "digits-mlp": partial(
        measure, "digits-mlp", {"name": "mlp", "hidden": [256]}, DIGITS, {"name": "digits"}, 256, {"(a)": "20x", "(b)": "5x"}
    ),
    "adamw-mlp": partial(
        measure, "adamw-mlp", {"name": "mlp", "hidden": [256]}, DIGITS_ADAMW, {"name": "digits"}, 256, {"(a)": "20x", "(b)": "5x"}
    ),
    "adamw-cnn": partial(measure, "adamw-cnn", {"name": "cnn"}, DIGITS_ADAMW, {"name": "digits"}, 2, {"(b)": "1x"}),
    "mnist-mlp": partial(
        measure, "mnist-mlp", {"name": "mlp", "hidden": [512, 256]}, DEMO, mnist(), 16, {"(a)": "2x", "(b)": "1.4x"}, "; 2 epochs"
    ),
    "mnist-cnn": partial(
        measure,
        "mnist-cnn",
        {"name": "cnn"},
        DEMO,
        {**mnist(), "max_train": 10000, "max_test": 2000},
        4,
        {"(b)": "1.5x"},
        "; 2 epochs of 7,000",
    ),
}
