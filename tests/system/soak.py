"""Soak test with ten minutes of random faults: `make soak`, or `make soak ARGS="--minutes 2 --seed 7"`.

Experiments run one after another while Redis, the bucket, the dispatcher, the aggregator and the workers fail at random. At the end each
experiment must have every trial once, and scores that are bit-identical to those of an undisturbed run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from memtail import datasets
from memtail.execution.embedded import run
from memtail.experiment_store import ExperimentStore
from memtail.scores.pointer import latest_version
from memtail.spec import Experiment
from memtail.storage import keys
from memtail.storage.local import LocalStore
from services.common.broker import Assignment
from tests.support.cluster import Cluster, Service
from tests.support.servers import MinioServer

TRIALS, PER_SHARD = 96, 4
SHARD_SECONDS = 20  # time limit, several times the duration of a shard
SPEC: dict[str, Any] = {
    "dataset": {"name": "digits"},
    "model": {"name": "mlp", "hidden": [64]},
    "training": {"epochs": 400},
    "subsets": {"trials": TRIALS},
    "execution": {"trials_per_shard": PER_SHARD, "device": "cpu"},
}


class Faults:
    """Faults to inject, with one public method each."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self._cluster, self._rng = cluster, rng
        self.experiment_store: ExperimentStore | None = None

    def all(self) -> list[Callable[[], None]]:
        """Return all faults."""
        return [getattr(self, name) for name in sorted(vars(type(self))) if not name.startswith("_") and name != "all"]

    def redis_killed(self) -> None:
        self._cluster.redis.kill()
        time.sleep(self._rng.uniform(0, 3))
        self._cluster.redis.start()

    def redis_restarted_often(self) -> None:
        for _ in range(5):
            self._cluster.redis.kill()
            self._cluster.redis.start()
            time.sleep(self._rng.uniform(0, 1))

    def redis_flushed(self) -> None:
        self._cluster.redis.client().flushall()

    def store_down(self) -> None:
        self._cluster.minio.stop()
        time.sleep(self._rng.uniform(0, 6))
        self._cluster.minio.start()

    def child_killed(self) -> None:
        for child in self._one("worker").children():
            os.kill(child, signal.SIGKILL)

    def child_hung(self) -> None:
        """Stop a training process until it is killed at the time limit of a shard, or continue it if it has none."""
        worker = self._one("worker")
        children = worker.children()
        for child in children:
            os.kill(child, signal.SIGSTOP)
        end = time.monotonic() + 2 * SHARD_SECONDS
        while time.monotonic() < end and set(children) & set(worker.children()):
            time.sleep(0.1)
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGCONT)

    def worker_at_fault(self) -> None:
        """Start a worker without its device, which ends after two messages."""
        worker = self._cluster.start("worker", MEMTAIL_DEVICES="cuda:31")
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(20)
        worker.kill()
        self._cluster.services.remove(worker)

    def worker_killed(self) -> None:
        self._restarted("worker")

    def dispatcher_killed(self) -> None:
        self._restarted("dispatcher")

    def aggregator_killed(self) -> None:
        self._restarted("aggregator")

    def worker_stopped(self) -> None:
        worker = self._one("worker")
        worker.stop(60)
        worker.start()

    def worker_frozen(self) -> None:
        """Freeze a worker longer than its lease, so that its shard is trained twice."""
        group = self._one("worker").process.pid
        os.killpg(group, signal.SIGSTOP)
        time.sleep(self._rng.uniform(4, 6))
        os.killpg(group, signal.SIGCONT)

    def batch_deleted(self) -> None:
        assert self.experiment_store is not None
        if committed := self.experiment_store.committed():
            shard = self._rng.choice(committed)
            self._cluster.store.delete(keys.trial_batch(self.experiment_store.name, shard.first, shard.last))
            self.experiment_store.reopen("soak test")  # it may have ended

    def batch_discarded(self) -> None:
        assert self.experiment_store is not None
        if committed := self.experiment_store.committed():
            self.experiment_store.discard(self._rng.choice(committed), "soak test")

    def messages_repeated(self) -> None:
        assert self.experiment_store is not None
        first = self._rng.randrange(0, TRIALS, PER_SHARD)
        fingerprint = self.experiment_store.read_record().fingerprint
        assignment = Assignment(experiment=self.experiment_store.name, fingerprint=fingerprint, first=first, last=first + PER_SHARD - 1)
        self._cluster.broker().send([assignment] * 5)

    def _one(self, name: str) -> Service:
        return self._rng.choice([service for service in self._cluster.services if service.name == name])

    def _restarted(self, name: str) -> None:
        service = self._one(name)
        service.kill()
        service.start()


def soak(minutes: float, seed: int) -> None:
    """Run the test. Raises: AssertionError: a trial was lost or counted twice, or scores differ."""
    rng = random.Random(seed)
    injected: Counter[str] = Counter()
    limit = {"MEMTAIL_SHARD_SECONDS": str(SHARD_SECONDS)}
    with tempfile.TemporaryDirectory() as folder, MinioServer(Path(folder)) as minio, Cluster(Path(folder), minio, **limit) as cluster:
        dataset = datasets.prepare(Experiment.parse({"name": "soak", **SPEC}).dataset)
        for name in ("dispatcher", "worker", "worker", "aggregator"):
            cluster.start(name)
        faults, experiment_stores = Faults(cluster, rng), list[ExperimentStore]()
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            experiment_stores.append(cluster.submit(Experiment.parse({"name": f"soak-{len(experiment_stores)}", **SPEC}), dataset))
            faults.experiment_store = experiment_stores[-1]
            while time.monotonic() < end and not _published(cluster, experiment_stores[-1]):
                fault = rng.choice(faults.all())
                fault()
                injected[fault.__name__] += 1
                print(f"{end - time.monotonic():4.0f} s left, {fault.__name__}: {_state(experiment_stores[-1])}", flush=True)
                time.sleep(rng.uniform(1, 10))
                experiment_stores[-1].clear_failures()  # faults may fail a shard three times
        for experiment_store in experiment_stores:
            cluster.until(partial(_published, cluster, experiment_store), 300)
        _check(cluster, experiment_stores, Path(folder, "expected"))
    summary = ", ".join(f"{count} x {name.replace('_', ' ')}" for name, count in injected.most_common())
    print(
        f"{injected.total()} faults ({summary}); "
        f"{len(experiment_stores) * TRIALS} trials of {len(experiment_stores)} experiments, each counted once"
    )


def _published(cluster: Cluster, experiment_store: ExperimentStore) -> bool:
    pointer = latest_version(cluster.store, experiment_store.name)
    return pointer is not None and pointer.summary.trials >= TRIALS and len(experiment_store.committed()) >= TRIALS // PER_SHARD


def _state(experiment_store: ExperimentStore) -> str:
    return f"{experiment_store.name} has {len(experiment_store.committed())} of {TRIALS // PER_SHARD} shards"


def _check(cluster: Cluster, experiment_stores: list[ExperimentStore], folder: Path) -> None:
    undisturbed = LocalStore(folder)
    run(Experiment.parse({"name": "soak", **SPEC}), folder)
    expected = _scores(undisturbed, "soak")
    for experiment_store in experiment_stores:
        assert sorted(trial for shard in experiment_store.committed() for trial in shard.trials) == list(range(TRIALS)), (
            experiment_store.name
        )
        found = _scores(cluster.store, experiment_store.name)
        differing = [name for name in expected if found.get(name) != expected[name]]
        assert found.keys() == expected.keys(), f"{experiment_store.name}: {differing}"
        assert not differing, f"{experiment_store.name}: {differing}"


def _scores(store: Any, name: str) -> dict[str, Any]:
    """Return the published files, without the experiment's name in the summary."""
    pointer = latest_version(store, name)
    assert pointer is not None
    files: dict[str, Any] = {file: store.get(keys.scores(name, pointer.version) + file) for file in pointer.files}
    files["summary.json"] = {key: value for key, value in json.loads(files["summary.json"]).items() if key != "experiment"}
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    soak(arguments.minutes, arguments.seed)
