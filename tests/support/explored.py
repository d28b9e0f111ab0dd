"""Store of the explorer's tests: `digits`, trained; `odd`, with a study and markup and formulas as names; `young`, without scores."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from fastapi.testclient import TestClient
from PIL import Image

from memtail import datasets
from memtail.execution.declare import declare
from memtail.execution.embedded import run
from memtail.experiment_store import ExperimentStore
from memtail.explorer.app import create
from memtail.scores.publish import publish
from memtail.spec import Experiment
from memtail.statistics import Statistics
from memtail.storage import ObjectStore
from memtail.storage.local import LocalStore
from memtail.studies.result import StudyResult
from memtail.trainers.images.shard_size import checked_shard_size
from memtail.trials import TrialBatch, TrialMetrics, pack
from tests.support import inline

MARKUP = "<img src=x onerror=alert(1)>.png"
FORMULA = "=HYPERLINK(1).png"
CLASSES = ["<b>&", "=1+1"]
TRIALS = 48
FIGURE = b'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="300" viewBox="0 0 640 300"><rect width="640" height="300"/></svg>'


def fill(store: LocalStore, images: Path) -> None:
    """Create the three experiments; `images` is a folder for the images of `odd`."""
    model = {"name": "mlp", "hidden": [16]}
    digits = {
        "name": "digits",
        "dataset": {"name": "digits"},
        "model": {"name": "mlp", "hidden": [32]},
        "training": {"epochs": 6},
        "subsets": {"trials": TRIALS},
        "record": {"scores": True},  # selects pairs from few trials
    }
    with inline.training():
        run(Experiment.parse(digits), store.root)
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
    study = StudyResult(store, "odd", "removal", "The <pairs>", ["Without the 4 pairs it loses 2.5 ± 0.2 points."], 30, ["odd"], {}, {})
    store.put(study.prefix + "result.json", json.dumps(study.to_json()).encode())
    store.put(study.prefix + "figure.svg", FIGURE)
    young = Experiment.parse({"name": "young", "dataset": {"name": "digits"}, "model": model, "subsets": {"trials": TRIALS}})
    ExperimentStore(store, "young").register(
        declare(young, datasets.prepare(young.dataset), checked_shard_size(young, datasets.prepare(young.dataset)))
    )


def publish_random(store: ObjectStore, experiment: Experiment, trials: int) -> None:
    """Register an experiment and publish scores of random outcomes."""
    dataset = datasets.prepare(experiment.dataset)
    record = ExperimentStore(store, experiment.name).register(declare(experiment, dataset, checked_shard_size(experiment, dataset)))
    rng = np.random.default_rng(trials)
    statistics = Statistics(dataset.n_train, dataset.n_test)
    bits = {name: rng.random((trials, count)) for name, count in (("M", dataset.n_train), ("C", dataset.n_train), ("T", dataset.n_test))}
    M = bits["M"] < 0.7
    M[:, -1] = True  # in every subset
    C = M | (bits["C"] < np.linspace(0, 1, dataset.n_train))
    metrics = [TrialMetrics(trial, False, 0.0, 1.0, 0.5, 0.5) for trial in range(trials)]
    packed = (pack(M), pack(C), pack(bits["T"] < 0.5))
    statistics.accumulate(TrialBatch(np.arange(trials, dtype=np.int32), *packed, dataset.n_train, dataset.n_test, metrics))
    publish(store, record, statistics, dataset)


def opened(store: LocalStore, path: str) -> tuple[TestClient, Any]:
    """Return a client of the explorer, and its answer to a path once the scores have been read."""
    client = TestClient(create(store), base_url="http://localhost")
    while (answer := client.get(path)).status_code == 503:
        time.sleep(0.05)
    return client, answer
