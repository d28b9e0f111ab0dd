"""A large experiment, compressed in time: `make scale`, or `make scale ARGS="--workers 100 --shards 2000"`.

A real dispatcher, Redis, MinIO and API server; a thousand simulated pods, each with a light worker that takes shards and sleeps instead of
training. On the way Redis is flushed, the dispatcher is killed, and some nodes vanish. At the end every shard is committed once, and no
worker is left; what it took is printed.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import urllib3
from prometheus_client.parser import text_string_to_metric_families
from tenacity import retry, stop_after_attempt, wait_fixed

from memtail import datasets
from memtail.settings import S3Settings
from memtail.spec import Experiment
from memtail.storage.s3 import S3Store
from tests.kubernetes.conftest import CONTROL_PLANE, Kubernetes, install_tools
from tests.kubernetes.fleet import Fleet
from tests.kubernetes.simulation import Pods
from tests.support.cluster import Cluster
from tests.support.servers import MinioServer

GPUS_PER_NODE, NODES_LOST = 8, 5
# Light workers are spread over processes, since Python's threads share one core.
PROCESSES = 3
BODY = bytes(1024)

# The API server of a busy machine breaks off an answer now and then.
patient = retry(stop=stop_after_attempt(20), wait=wait_fixed(5), reraise=True)


@dataclass
class Moment:
    """What had been done at some moment, summed up from the beginning."""

    shards: int
    seconds: float = field(default_factory=time.monotonic)
    redis: Counter[str] = field(default_factory=Counter)
    store: Counter[str] = field(default_factory=Counter)
    api: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    processor: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def scale(workers: int, shards: int, seconds: float) -> None:
    """Run, print, and check that nothing is lost or done twice. Raises: AssertionError."""
    install_tools(*CONTROL_PLANE, "helm")
    with tempfile.TemporaryDirectory() as folder:
        kubernetes = Kubernetes(Path(folder, "state"))
        try:
            kubernetes.start()
            kubernetes.nodes(-(-workers // GPUS_PER_NODE) + NODES_LOST, GPUS_PER_NODE)
            with MinioServer(Path(folder)) as minio, Cluster(Path(folder), minio, **_AS_IN_REAL_USE) as cluster:
                _run(Fleet(kubernetes, cluster, _declare, datasets.prepare(_declare(2).dataset), workers), workers, shards, seconds)
        finally:
            kubernetes.stop()


_AS_IN_REAL_USE = {"MEMTAIL_LEASE_SECONDS": "60", "MEMTAIL_RECONCILE_SECONDS": "2", "MEMTAIL_RESYNC_SECONDS": "60"}


def _declare(trials: int, **parts: Any) -> Experiment:
    return Experiment.parse({"name": "scale", "dataset": {"name": "digits"}, **parts, "subsets": {"trials": trials}})


def _run(fleet: Fleet, workers: int, shards: int, seconds: float) -> None:
    dispatcher = fleet.dispatcher()
    processes, pipes = _start_pods(fleet, seconds)
    fleet.cluster.until(lambda: fleet.cluster.serves(dispatcher))
    began = time.monotonic()
    experiment_store = fleet.submit(shards, per_shard=1)
    fleet.cluster.until(lambda: len(patient(fleet.running)()) >= workers, 600)
    print(f"{workers} workers run after {time.monotonic() - began:.1f} s", flush=True)
    start = _moment(fleet, pipes)
    faults = {
        shards // 4: ("Redis flushed", lambda: fleet.cluster.redis.client().flushall()),
        shards // 2: ("dispatcher killed and started", lambda: (dispatcher.kill(), dispatcher.start())),
        3 * shards // 4: (f"{NODES_LOST} nodes vanish", lambda: fleet.kubernetes.kubectl("delete", *fleet.found("node")[:NODES_LOST])),
    }
    last = start
    while (done := sum(_ask(pipes, "count"))) < shards:
        for due in [due for due in faults if done >= due]:
            what, fault = faults.pop(due)
            fault()
            print(f"{what} at {done:,} shards", flush=True)
        if time.monotonic() - last.seconds > 60:
            last = _told(last, _moment(fleet, pipes), dispatcher)
        time.sleep(1)
    end = _moment(fleet, pipes)
    print(f"all {shards:,} shards committed after {time.monotonic() - began:.0f} s; in all, per second:", flush=True)
    _told(start, end, dispatcher)
    fleet.cluster.until(lambda: patient(fleet.done)(experiment_store, shards), 600)
    print(f"no worker is left after {time.monotonic() - began:.0f} s")
    counted = sum(_ask(pipes, "committed"), Counter())
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
    where = (fleet.kubernetes.kubeconfig, fleet.namespace, fleet.cluster.redis.url, fleet.cluster.bucket, settings, seconds)
    processes, pipes = [], []
    for part in range(PROCESSES):
        pipe, other = spawn.Pipe()
        processes.append(spawn.Process(target=_pods, args=(*where, part, other), daemon=True))
        processes[-1].start()
        pipes.append(pipe)
    return processes, pipes


def _pods(kubeconfig: str, namespace: str, broker: str, bucket: str, settings: S3Settings, seconds: float, part: int, pipe: Any) -> None:
    urllib3.disable_warnings()
    store = S3Store(bucket, settings=settings)
    with Pods(kubeconfig, namespace, broker, store, seconds, rest=60, lease=60, part=(part, PROCESSES), body=BODY) as pods:
        while (question := pipe.recv()) != "stop":
            pipe.send({"count": len(pods.committed), "committed": pods.committed}[question])


def _ask(pipes: list[Connection], question: str) -> list[Any]:
    for pipe in pipes:
        pipe.send(question)
    return [pipe.recv() for pipe in pipes]


def _moment(fleet: Fleet, pipes: list[Connection]) -> Moment:
    moment = Moment(sum(_ask(pipes, "count")))
    commands = fleet.cluster.redis.client().info("commandstats")
    moment.redis.update({name.removeprefix("cmdstat_"): entry["calls"] for name, entry in commands.items()})
    page = urllib3.request("GET", f"{fleet.cluster.minio.endpoint}/minio/v2/metrics/cluster").data.decode()
    for family in text_string_to_metric_families(page):
        moment.store.update({s.labels["api"]: s.value for s in family.samples if s.name == "minio_s3_requests_total"})
    for family in text_string_to_metric_families(patient(fleet.kubernetes.kubectl)("get", "--raw", "/metrics")):
        for sample in family.samples:
            if sample.name == "apiserver_request_total":
                moment.api[f"{sample.labels['verb'].lower()} {sample.labels['resource'] or 'other'}"] += sample.value
    for path in Path("/proc").glob("[0-9]*"):
        if name := _name_of(path):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            moment.processor[name] += (int(fields[11]) + int(fields[12])) / 100
    return moment


def _name_of(process: Path) -> str:
    """Which of those that matter a process is, by its command."""
    try:
        program, *arguments = (process / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return ""
    if "services.dispatcher" in arguments:
        return "dispatcher"
    if any("spawn_main" in argument for argument in arguments):
        return "light workers"
    name = Path(program).name
    return name if name in ("redis-server", "minio", *CONTROL_PLANE) else ""


def _told(before: Moment, now: Moment, dispatcher: Any) -> Moment:
    seconds = now.seconds - before.seconds
    print(f"{now.shards:,} shards, {(now.shards - before.shards) / seconds:.1f}/s")
    for what in ("redis", "store", "api", "processor"):
        grown = Counter(getattr(now, what))
        grown.subtract(getattr(before, what))
        most = ", ".join(f"{name} {count / seconds:.2f}" for name, count in grown.most_common(8) if count > 0)
        print(f"  {what}: {grown.total() / seconds:.2f} ({most})")
    resident = next(line for line in Path(f"/proc/{dispatcher.process.pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    print(f"  dispatcher: {int(resident.split()[1]) / 1024:.0f} MiB", flush=True)
    return now


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=20, help="that a shard takes")
    arguments = parser.parse_args()
    scale(arguments.workers, arguments.shards, arguments.seconds)
