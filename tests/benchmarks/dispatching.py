"""Rows about the dispatcher: one pass over 100,000 shards and 1,000 workers, with real servers."""

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from memtail import datasets
from memtail.execution.declare import declare
from memtail.experiment_store import ExperimentStore
from memtail.spec import Experiment
from memtail.storage import keys
from memtail.storage.s3 import S3Store
from memtail.trainers.images.shard_size import checked_shard_size
from memtail.trials import Shard
from services.common.broker import Assignment, Broker
from services.common.settings import ServiceSettings
from services.dispatcher.dispatcher import Dispatcher
from tests.benchmarks.bench import Row
from tests.support.cluster import RedisServer
from tests.support.servers import MinioServer

SHARDS, WORKERS, COMMITTED = 100_000, 1_000, 50_000


def dispatcher() -> list[Row]:
    """Measure the first pass and later ones with half of the shards committed, one leased per worker, and a full queue."""
    redis = RedisServer()
    with tempfile.TemporaryDirectory() as folder, MinioServer(Path(folder)) as minio:
        redis.start()
        try:
            store = S3Store(minio.new_bucket(), settings=minio.settings())
            settings = ServiceSettings(store=store.address, broker=redis.url, lease_seconds=600, resync_seconds=1e-3)
            return _passes(store, Broker(settings), settings)
        finally:
            redis.stop()


def _passes(store: S3Store, broker: Broker, settings: ServiceSettings) -> list[Row]:
    spec = {"name": "big", "dataset": {"name": "digits"}, "subsets": {"trials": SHARDS}, "execution": {"trials_per_shard": 1}}
    experiment = Experiment.parse(spec)
    experiment_store = ExperimentStore(store, "big")
    record = experiment_store.register(
        declare(experiment, datasets.prepare(experiment.dataset), checked_shard_size(experiment, datasets.prepare(experiment.dataset)))
    )
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda trial: store.put(keys.trial_batch("big", trial, trial), b""), range(COMMITTED)))
    first, passes = [], []
    for _ in range(3):
        dispatcher = Dispatcher(store, broker, settings)
        for trial in range(COMMITTED, COMMITTED + WORKERS):
            broker.acquire(Assignment(experiment="big", fingerprint=record.fingerprint, first=trial, last=trial), f"worker-{trial}")
        for times in (first, passes, passes, passes):
            began = time.perf_counter()
            plan = dispatcher.reconcile()
            times.append(time.perf_counter() - began)
            broker.redis.ltrim(f"{broker.prefix}shards", 0, -201)  # as if workers took some
    assert plan.outstanding["big"] == SHARDS - COMMITTED
    assert Shard(COMMITTED, COMMITTED) not in {assignment.shard for assignment in plan.send}
    memory = broker.redis.info("memory")["used_memory_peak"] / 2**20
    note = f"{SHARDS:,} shards, {COMMITTED:,} committed, {WORKERS:,} leased, {settings.max_queued:,} queued; peak is Redis's"
    return [
        Row("dispatcher-start", "pass", "", first, [], "", memory, f"{note}; the first pass, which lists all batches"),
        Row("dispatcher", "pass", "2 s, 100 MiB", passes, [], "", memory, f"{note}; each lists a part of the batches"),
    ]


ROWS: dict[str, Callable[[], list[Row]]] = {"dispatcher": dispatcher}
