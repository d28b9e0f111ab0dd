"""Rows about the explorer: response times with the published statistics of 4,000 trials on 60,000 images."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import urllib3

from memtail.datasets import ImageDataset
from memtail.datasets.prepared import write_dataset
from memtail.datasets.sources import InMemoryDataset
from memtail.execution.declare import declare
from memtail.experiment_store import ExperimentStore
from memtail.scores.publish import publish
from memtail.spec import Experiment
from memtail.statistics import Statistics
from memtail.storage.local import LocalStore
from memtail.trainers.images.shard_size import checked_shard_size
from memtail.trials import TrialBatch, TrialMetrics
from tests.benchmarks.bench import Row
from tests.support.servers import free_port

TRIALS, N, Q, CLASSES = 4000, 50_000, 10_000, 10
PER_BATCH, REPETITIONS = 200, 30

VIEWS = {
    "gallery": "?page={}",
    "filtered gallery": "?class=3&from=-0.01&q=1&sort=hardest&page={}",
    "gallery as CSV": "/train.csv?page={}",
    "training example": "/train/{}",
    "test example": "/test/{}",
    "image": "/images/train/{}.png",
}


def explorer() -> list[Row]:
    """Measure each view over HTTP, with another example or page each time. Scores are read before; the first response does not count."""
    with tempfile.TemporaryDirectory() as folder:
        store, cache, port = Path(folder, "store"), Path(folder, "cache"), free_port()
        _publish(LocalStore(store), cache)
        command = [sys.executable, "-m", "memtail", "explore", "--store", str(store), "--port", str(port)]
        with subprocess.Popen(command, env={**os.environ, "MEMTAIL_CACHE": str(cache)}, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline()
            http = urllib3.HTTPConnectionPool("127.0.0.1", port, timeout=120)
            try:
                while http.request("GET", "/experiments/bench/train/0").status == 503:  # while the scores are being read
                    time.sleep(0.1)
                return [_row(http, name, view) for name, view in VIEWS.items()]
            finally:
                process.terminate()


def _row(http: urllib3.HTTPConnectionPool, name: str, view: str) -> Row:
    times = []
    for place in range(REPETITIONS + 1):
        began = time.perf_counter()
        answer = http.request("GET", f"/experiments/bench{view.format(place + 1)}")
        times.append(time.perf_counter() - began)
        assert answer.status == 200
    return Row(f"explorer, {name}", "answer", "100 ms", times[1:], note=f"t = {TRIALS}, n = {N}, q = {Q}; {len(answer.data)} bytes")


def _publish(store: LocalStore, cache: Path) -> None:
    rng = np.random.default_rng(0)

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % CLASSES

    made = InMemoryDataset(*images(N), *images(Q), tuple(f"class {label}" for label in range(CLASSES)))
    dataset = ImageDataset.open(write_dataset(made, cache / "datasets"))
    spec = {"name": "bench", "dataset": {"name": "cifar10"}, "model": {"name": "mlp"}, "subsets": {"trials": TRIALS}}
    record = ExperimentStore(store, "bench").register(
        declare(Experiment.parse(spec), dataset, checked_shard_size(Experiment.parse(spec), dataset))
    )
    statistics = Statistics(N, Q)
    for first in range(0, TRIALS, PER_BATCH):
        M, more, C, T = (rng.integers(0, 256, (PER_BATCH, count // 8), np.uint8) for count in (N, N, N, Q))
        trials = np.arange(first, first + PER_BATCH, dtype=np.int32)
        metrics = [TrialMetrics(trial, False, 0.0, 1.0, 0.5, 0.5) for trial in trials.tolist()]
        statistics.accumulate(TrialBatch(trials, M | more, C, T, N, Q, metrics))
    publish(store, record, statistics, dataset)


ROWS: dict[str, Callable[[], list[Row]]] = {"explorer": explorer}
