"""Scale test with short shards: `make scale`, or `make scale ARGS="--workers 100 --shards 2000"`.

A real dispatcher, aggregator, Redis, MinIO and API server; a thousand simulated pods, each with a light worker that sleeps instead of
training and commits random trials. Meanwhile Redis is flushed, the dispatcher and the aggregator are killed, and nodes are lost. At the end
each shard must be committed once, all trials be published, and no worker be left; prints the load of each component.
"""

import argparse
import functools
import json
import multiprocessing
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import urllib3
from prometheus_client.parser import text_string_to_metric_families
from tenacity import retry, stop_after_attempt, wait_fixed

from memtail import datasets
from memtail.experiment_store import ExperimentStore, Record
from memtail.settings import S3Settings
from memtail.spec import Experiment
from memtail.storage.s3 import S3Store
from memtail.trials import Provenance, TrialBatch, TrialMetrics, pack
from services.common.broker import Assignment
from services.common.settings import ServiceSettings
from tests.kubernetes.conftest import CONTROL_PLANE, Kubernetes, install_tools
from tests.kubernetes.fleet import Fleet
from tests.kubernetes.simulation import Pods
from tests.support.cluster import Cluster
from tests.support.servers import MinioServer

GPUS_PER_NODE, NODES_LOST = 8, 5
TICKS = 100  # per second, in /proc/PID/stat
# Number of processes for the light workers, since Python's threads share one core.
PROCESSES = 3

# On a busy machine the API server closes connections now and then.
retrying = retry(stop=stop_after_attempt(20), wait=wait_fixed(5), reraise=True)


@dataclass
class Snapshot:
    """Cumulative counts of work at one time."""

    shards: int
    seconds: float = field(default_factory=time.monotonic)
    redis: Counter[str] = field(default_factory=Counter)
    store: Counter[str] = field(default_factory=Counter)
    api: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    processor: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def scale(workers: int, shards: int, seconds: float) -> None:
    """Run the test. Raises: AssertionError: a shard was lost or committed twice."""
    install_tools(*CONTROL_PLANE, "helm")
    with tempfile.TemporaryDirectory() as folder:
        kubernetes = Kubernetes(Path(folder, "state"))
        try:
            kubernetes.start()
            kubernetes.nodes(-(-workers // GPUS_PER_NODE) + NODES_LOST, GPUS_PER_NODE)
            with MinioServer(Path(folder)) as minio, Cluster(Path(folder), minio, **_DEFAULTS) as cluster:
                _run(Fleet(kubernetes, cluster, _declare, datasets.prepare(_declare(2).dataset), workers), workers, shards, seconds)
        finally:
            kubernetes.stop()


_DEFAULTS = {"MEMTAIL_LEASE_SECONDS": "60", "MEMTAIL_RECONCILE_SECONDS": "2", "MEMTAIL_RESYNC_SECONDS": "60"}


def _declare(trials: int, **parts: Any) -> Experiment:
    return Experiment.parse({"name": "scale", "dataset": {"name": "digits"}, **parts, "subsets": {"trials": trials}})


def _run(fleet: Fleet, workers: int, shards: int, seconds: float) -> None:
    dispatcher, aggregator = fleet.dispatcher(), fleet.cluster.start("aggregator")
    processes, pipes = _start_pods(fleet, seconds)
    fleet.cluster.until(lambda: fleet.cluster.serves(dispatcher))
    began = time.monotonic()
    experiment_store = fleet.submit(shards, per_shard=1)
    fleet.cluster.until(lambda: len(retrying(fleet.running)()) >= workers, 600)
    print(f"{workers} workers running after {time.monotonic() - began:.1f} s", flush=True)
    start = _snapshot(fleet, pipes)

    def restart_dispatcher() -> None:
        dispatcher.kill()
        dispatcher.start()

    def restart_aggregator() -> None:
        aggregator.kill()
        aggregator.start()

    faults: dict[int, tuple[str, Callable[[], object]]] = {
        shards // 4: ("Redis flushed", lambda: fleet.cluster.redis.client().flushall()),
        shards // 2: ("dispatcher killed and started", restart_dispatcher),
        5 * shards // 8: ("aggregator killed and started", restart_aggregator),
        3 * shards // 4: (f"{NODES_LOST} nodes lost", lambda: fleet.kubernetes.kubectl("delete", *fleet.names("node")[:NODES_LOST])),
    }
    last = start
    while (done := sum(_ask(pipes, "count"))) < shards:
        for due in [due for due in faults if done >= due]:
            name, fault = faults.pop(due)
            fault()
            print(f"{name} at {done:,} shards", flush=True)
        if time.monotonic() - last.seconds > 60:
            last = _print_rates(last, _snapshot(fleet, pipes), dispatcher)
        time.sleep(1)
    end = _snapshot(fleet, pipes)
    print(f"all {shards:,} shards committed after {time.monotonic() - began:.0f} s; average rates per second:", flush=True)
    _print_rates(start, end, dispatcher)
    fleet.cluster.until(lambda: retrying(fleet.done)(experiment_store, shards), 600)
    print(f"no worker is left after {time.monotonic() - began:.0f} s")
    fleet.cluster.until_published(experiment_store, shards, 600)
    print(f"the scores of all trials are published after {time.monotonic() - began:.0f} s")
    counted: Counter[str] = sum(_ask(pipes, "committed"), Counter())
    assert len(counted) == shards
    assert set(counted.values()) == {1}
    events = json.loads(fleet.kubernetes.kubectl("get", "events", "--namespace", fleet.namespace, "--output", "json"))["items"]
    print("events of the dispatcher:", dict(Counter(each["reason"] for each in events if each["reason"].startswith("Worker"))))
    for process, pipe in zip(processes, pipes, strict=True):
        pipe.send("stop")
        process.join()


def _start_pods(fleet: Fleet, seconds: float) -> tuple[list[Any], list[Connection]]:
    spawn = multiprocessing.get_context("spawn")
    settings = fleet.cluster.minio.settings()
    services = fleet.cluster.settings(lease_seconds=60.0)
    arguments = (fleet.kubernetes.kubeconfig, fleet.namespace, services, fleet.cluster.bucket, settings, seconds)
    processes, pipes = [], []
    for part in range(PROCESSES):
        pipe, other = spawn.Pipe()
        processes.append(spawn.Process(target=_pods, args=(*arguments, part, other), daemon=True))
        processes[-1].start()
        pipes.append(pipe)
    return processes, pipes


def _pods(
    kubeconfig: str, namespace: str, services: ServiceSettings, bucket: str, settings: S3Settings, seconds: float, part: int, pipe: Any
) -> None:
    urllib3.disable_warnings()
    store = S3Store(bucket, settings=settings)
    body = RandomTrials(store)
    with Pods(kubeconfig, namespace, services, store, seconds, rest=60, part=(part, PROCESSES), body=body) as pods:
        while (question := pipe.recv()) != "stop":
            pipe.send({"count": len(pods.committed), "committed": pods.committed}[question])


class RandomTrials:
    """Makes trial batches of one random trial, as a training of digits would leave behind."""

    def __init__(self, store: S3Store) -> None:
        self._store = store

    @functools.cached_property
    def _record(self) -> Record:
        return ExperimentStore(self._store, "a").read_record()

    def __call__(self, assignment: Assignment) -> bytes:
        trial, n, q, rng = assignment.first, self._record.n_train, self._record.n_test, np.random.default_rng(assignment.first)
        members, train, test = (pack(rng.random((1, size), np.float32) < share) for size, share in ((n, 0.7), (n, 0.9), (q, 0.9)))
        metrics, provenance = [TrialMetrics(trial, False, 0.1, 0.9, 0.9, 0.9)], Provenance(self._record.fingerprint)
        return TrialBatch(np.array([trial], np.int32), members, train, test, n, q, metrics, provenance).to_bytes()


def _ask(pipes: list[Connection], question: str) -> list[Any]:
    for pipe in pipes:
        pipe.send(question)
    return [pipe.recv() for pipe in pipes]


def _snapshot(fleet: Fleet, pipes: list[Connection]) -> Snapshot:
    snapshot = Snapshot(sum(_ask(pipes, "count")))
    commands = fleet.cluster.redis.client().info("commandstats")
    snapshot.redis.update({name.removeprefix("cmdstat_"): entry["calls"] for name, entry in commands.items()})
    page = urllib3.request("GET", f"{fleet.cluster.minio.endpoint}/minio/v2/metrics/cluster").data.decode()
    for family in text_string_to_metric_families(page):
        snapshot.store.update({s.labels["api"]: s.value for s in family.samples if s.name == "minio_s3_requests_total"})
    for family in text_string_to_metric_families(retrying(fleet.kubernetes.kubectl)("get", "--raw", "/metrics")):
        for sample in family.samples:
            if sample.name == "apiserver_request_total":
                snapshot.api[f"{sample.labels['verb'].lower()} {sample.labels['resource'] or 'other'}"] += int(sample.value)
    for path in Path("/proc").glob("[0-9]*"):
        if name := _name_of(path):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            snapshot.processor[name] += int(fields[11]) + int(fields[12])  # in ticks
    return snapshot


def _name_of(process: Path) -> str:
    """Name the component that a process belongs to, by its command; empty for other processes."""
    try:
        program, *arguments = (process / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return ""
    for service in ("dispatcher", "aggregator"):
        if f"services.{service}" in arguments:
            return service
    if any("spawn_main" in argument for argument in arguments):
        return "light workers"
    name = Path(program).name
    return name if name in ("redis-server", "minio", *CONTROL_PLANE) else ""


def _print_rates(before: Snapshot, now: Snapshot, dispatcher: Any) -> Snapshot:
    seconds = now.seconds - before.seconds
    print(f"{now.shards:,} shards, {(now.shards - before.shards) / seconds:.1f}/s")
    for component, units in (("redis", 1), ("store", 1), ("api", 1), ("processor", TICKS)):
        increase = Counter(getattr(now, component))
        increase.subtract(getattr(before, component))
        largest = ", ".join(f"{name} {count / units / seconds:.2f}" for name, count in increase.most_common(8) if count > 0)
        print(f"  {component}: {increase.total() / units / seconds:.2f} ({largest})")
    resident = next(line for line in Path(f"/proc/{dispatcher.process.pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    print(f"  dispatcher: {int(resident.split()[1]) / 1024:.0f} MiB", flush=True)
    return now


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=20, help="duration of a shard")
    arguments = parser.parse_args()
    scale(arguments.workers, arguments.shards, arguments.seconds)
