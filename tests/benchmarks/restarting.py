"""Restart of an aggregator on a bucket with many trial batches, with and without a snapshot, until scores of all trials are published."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np

from memtail import datasets
from memtail.datasets import ImageDataset
from memtail.datasets.staged_dataset import stage
from memtail.execution.declare import declare
from memtail.experiment_store import ExperimentStore
from memtail.scores.pointer import latest_version
from memtail.spec import Experiment
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.trials import Provenance, TrialBatch, TrialMetrics, pack
from services.aggregator.aggregator import Aggregator
from services.common.settings import ServiceSettings
from tests.benchmarks.bench import Row

LATENCY = 0.02
# Keys in a page of a listing.
_PAGE = 1000


class DistantStore(LocalStore):
    """A folder that answers each request, and each page of a listing, after `LATENCY` seconds."""

    def get(self, key: str, limit: int | None = None) -> bytes:
        time.sleep(LATENCY)
        return super().get(key, limit)

    def put(self, key: str, data: bytes) -> None:
        time.sleep(LATENCY)
        super().put(key, data)

    def exists(self, key: str) -> bool:
        time.sleep(LATENCY)
        return super().exists(key)

    def upload(self, key: str, path: Path, start: int = 0, length: int | None = None) -> None:
        time.sleep(LATENCY)
        super().upload(key, path, start, length)

    def download(self, key: str, path: Path) -> None:
        time.sleep(LATENCY)
        super().download(key, path)

    def list(self, prefix: str) -> Iterator[str]:
        for number, key in enumerate(super().list(prefix)):
            if number % _PAGE == 0:
                time.sleep(LATENCY)
            yield key


def restart(batches: int) -> list[Row]:
    """Measure a restart with `batches` batches of one trial of digits each."""
    dataset = datasets.prepare(Experiment.parse({"name": "digits", "dataset": {"name": "digits"}, "subsets": {"trials": 64}}).dataset)
    with tempfile.TemporaryDirectory() as folder:
        _fill(LocalStore(folder), dataset, batches)
        store = DistantStore(folder)
        without, silent_without = _restarted(store, batches)
        size = store.local_path(keys.snapshot("restart")).stat().st_size / 2**20
        restored, silent = _restarted(store, batches)
    note = f"{batches:,} batches, {1000 * LATENCY:.0f} ms per request; snapshot of {size:.1f} MiB; longest time without a sign of life "
    note += f"{silent:.1f} s with it, {silent_without:.1f} s without"
    return [Row(f"restart-{batches}", "restart", "60 s", [restored], [without], "without a snapshot", note=note)]


def _fill(store: LocalStore, dataset: ImageDataset, batches: int) -> None:
    """Write random trial batches straight into the folder."""
    stage(dataset, store)
    parts = {"name": "restart", "dataset": {"name": "digits"}, "subsets": {"trials": batches}, "execution": {"trials_per_shard": 1}}
    record = ExperimentStore(store, "restart").register(declare(Experiment.parse(parts), dataset, 1))
    store.local_path(keys.trials("restart").rstrip("/")).mkdir()
    rng, n, q = np.random.default_rng(0), dataset.n_train, dataset.n_test
    for trial in range(batches):
        members, train, test = (pack(rng.random((1, size), np.float32) < share) for size, share in ((n, 0.7), (n, 0.9), (q, 0.9)))
        metrics = [TrialMetrics(trial, False, 0.1, 0.9, 0.9, 0.9)]
        batch = TrialBatch(np.array([trial], np.int32), members, train, test, n, q, metrics, Provenance(record.fingerprint))
        store.local_path(keys.trial_batch("restart", trial, trial)).write_bytes(batch.to_bytes())


def _restarted(store: LocalStore, batches: int) -> tuple[float, float]:
    """Return the seconds until all trials are published, and the longest time without a sign of life."""
    for key in list(store.list(keys.all_scores("restart"))):
        store.delete(key)
    began = last = time.perf_counter()
    longest = 0.0

    def progress() -> None:
        nonlocal last, longest
        now = time.perf_counter()
        last, longest = now, max(longest, now - last)

    aggregator = Aggregator(store, ServiceSettings(store=store.address), progress)
    with patch.object(Aggregator, "_report"):  # a thread would read scores that are removed for the next restart
        while (pointer := latest_version(store, "restart")) is None or pointer.summary.trials < batches:
            aggregator.catch_up()
            progress()
    return time.perf_counter() - began, longest


ROWS: dict[str, Callable[[], list[Row]]] = {
    "restart-small": lambda: restart(1_000) + restart(10_000),
    "restart-large": lambda: restart(100_000),
}
