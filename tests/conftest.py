"""Shared by all tests: a cache of their own, small experiments, and random statistics."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from memtail import datasets
from memtail.datasets import ImageDataset
from memtail.spec import Experiment


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared datasets go to a folder made for this run of the tests."""
    import os

    os.environ["MEMTAIL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("MEMTAIL_DATA", None)
    os.environ.pop("MEMTAIL_STORE", None)


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """How a command or a service sets up its logs is not for the next test."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def declare() -> Callable[..., Experiment]:
    """Makes experiments on digits from what differs: `declare(trials=8, training={"epochs": 2})`."""

    def make(trials: int = 16, **parts: Any) -> Experiment:
        subsets = {"trials": trials, **parts.pop("subsets", {})}
        training = {"epochs": 2, **parts.pop("training", {})}
        spec = {"name": "digits", "dataset": {"name": "digits"}, "model": {"name": "mlp", "hidden": [16]}}
        return Experiment.parse({**spec, "training": training, "subsets": subsets, **parts})

    return make


@pytest.fixture(scope="session")
def digits(own_cache: None) -> ImageDataset:
    return datasets.prepare(Experiment.parse({"name": "digits", "dataset": {"name": "digits"}}).dataset)


def write_arrays(path: Path, **changes: Any) -> Path:
    """An `arrays` dataset of 40 training and 20 test images of 6 x 6 in two classes, told apart by their brightness."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 40), ("test", 20)):
        labels = np.arange(count) % 2
        arrays[f"{split}_labels"] = labels
        arrays[f"{split}_images"] = (rng.integers(0, 100, (count, 6, 6)) + 150 * labels[:, None, None]).astype(np.uint8)
    arrays.update(changes)
    np.savez(path, **arrays)
    return path
