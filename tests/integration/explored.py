"""A store for the explorer: `digits`, trained; `odd`, images whose names are markup and formulas; `young`, without scores."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from memtail import datasets
from memtail.archive import ExperimentArchive
from memtail.experiment import Experiment
from memtail.runner import declare, run
from memtail.scores.publish import publish
from memtail.statistics import Statistics
from memtail.storage import ObjectStore
from memtail.storage.local import LocalStore
from memtail.trials import TrialBatch, TrialMetrics, pack

MARKUP = "<img src=x onerror=alert(1)>.png"
FORMULA = "=HYPERLINK(1).png"
CLASSES = ["<b>&", "=1+1"]
TRIALS = 48


@pytest.fixture(scope="session")
def explored(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> Iterator[LocalStore]:
    store = LocalStore(tmp_path_factory.mktemp("explored"))
    model = {"name": "mlp", "hidden": [16]}
    digits = {"name": "digits", "dataset": {"name": "digits"}, "model": model, "training": {"epochs": 4}, "subsets": {"trials": TRIALS}}
    run(Experiment.parse(digits), store.root)
    images = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in CLASSES:
            folder = images / split / label
            folder.mkdir(parents=True)
            for name in (MARKUP, FORMULA, "c.png", "d.png"):
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / name, "PNG")
    dataset = {"name": "folder", "root": str(images), "resolution": 8}
    odd = Experiment.parse({"name": "odd", "dataset": dataset, "model": model, "subsets": {"trials": TRIALS}})
    publish_random(store, odd, TRIALS)
    young = Experiment.parse({"name": "young", "dataset": {"name": "digits"}, "model": model, "subsets": {"trials": TRIALS}})
    ExperimentArchive(store, "young").enroll(declare(young, datasets.prepare(young.dataset)))
    yield store


def publish_random(store: ObjectStore, experiment: Experiment, trials: int) -> None:
    """Enter an experiment in a store and publish scores of random outcomes."""
    dataset = datasets.prepare(experiment.dataset)
    record = ExperimentArchive(store, experiment.name).enroll(declare(experiment, dataset))
    rng = np.random.default_rng(trials)
    statistics = Statistics(dataset.n_train, dataset.n_test)
    bits = {name: rng.random((trials, count)) for name, count in (("M", dataset.n_train), ("C", dataset.n_train), ("T", dataset.n_test))}
    M = bits["M"] < 0.7
    M[:, -1] = True  # never out
    C = M | (bits["C"] < np.linspace(0, 1, dataset.n_train))
    metrics = [TrialMetrics(trial, False, 0.0, 1.0, 0.5, 0.5) for trial in range(trials)]
    packed = (pack(M), pack(C), pack(bits["T"] < 0.5))
    statistics.fold(TrialBatch(np.arange(trials, dtype=np.int32), *packed, dataset.n_train, dataset.n_test, metrics))
    publish(store, record, statistics, dataset)
