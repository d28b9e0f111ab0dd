"""The complete system as real processes on the loopback interface: Redis, MinIO, dispatcher, workers, aggregator."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis
import urllib3

from memtail.datasets import ImageDataset
from memtail.datasets.staged_dataset import stage
from memtail.execution.embedded import declare
from memtail.experiment_store import ExperimentStore
from memtail.scores.pointer import latest_version
from memtail.spec import Experiment
from memtail.storage import keys
from memtail.storage.s3 import S3Store
from tests.integration.servers import MinioServer, free_port, server_binary

PROJECT = Path(__file__).parents[2]
# Short intervals instead of the defaults.
QUICK = {
    "MEMTAIL_LEASE_SECONDS": "3",
    "MEMTAIL_RECONCILE_SECONDS": "0.2",
    "MEMTAIL_RESYNC_SECONDS": "2",
    "MEMTAIL_PUBLISH_SECONDS": "2",
}


class RedisServer:
    """A Redis server with a random password and without persistence.

    Args:
        certificates: folder with public.crt, private.key and ca.pem, to serve TLS.
    """

    def __init__(self, certificates: Path | None = None) -> None:
        self.port, self.password = free_port(), secrets.token_hex(16)
        self.url = f"redis://:{self.password}@127.0.0.1:{self.port}/0"
        self._listen = ["--port", str(self.port)]
        if certificates:
            self.url = f"{self.url.replace('redis', 'rediss', 1)}?ssl_ca_certs={certificates / 'ca.pem'}"
            self._listen = ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            self._listen += ["--tls-cert-file", str(certificates / "public.crt"), "--tls-key-file", str(certificates / "private.key")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [server_binary("redis-server"), *self._listen, "--bind", "127.0.0.1", "--requirepass", self.password]
        self._process = subprocess.Popen([*command, "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(redis.RedisError):
                if self.client().ping():
                    return
            assert self._process.poll() is None
            time.sleep(0.02)

    def client(self) -> Any:
        return redis.Redis.from_url(self.url, decode_responses=True)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


class Service:
    """A service process and its log."""

    def __init__(self, name: str, environment: dict[str, str], log: Path, prefix: tuple[str, ...] = ()) -> None:
        self.name, self._environment, self.log, self._prefix = name, environment, log, prefix
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Service":
        environment = {"MEMTAIL_PORT": str(free_port()), **self._environment}
        self.port = environment["MEMTAIL_PORT"]
        with self.log.open("ab") as output:
            command = [*self._prefix, sys.executable, "-m", f"services.{self.name}"]
            self._process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=output, stderr=output, start_new_session=True)
        return self

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    def kill(self) -> None:
        """Kill the process and its children, as the death of a container does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self, timeout: float = 30) -> None:
        """Stop it like a cluster: SIGTERM, then SIGKILL after a timeout."""
        self.process.terminate()
        try:
            self.process.wait(timeout)
        finally:
            self.kill()

    def children(self) -> list[int]:
        """Return the ids of the forked processes."""
        output = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False).stdout
        return [int(line) for line in output.split()]


class Cluster:
    """A bucket, a broker and services, which are stopped at the end."""

    def __init__(self, folder: Path, minio: MinioServer, **settings: str) -> None:
        self.folder, self.minio, self.redis = folder, minio, RedisServer()
        self.bucket = minio.new_bucket()
        self.store = S3Store(self.bucket, settings=minio.settings())
        self.environment = {
            **minio.environment(),
            **QUICK,
            "MEMTAIL_STORE": f"s3://{self.bucket}",
            "MEMTAIL_BROKER": self.redis.url,
            "MEMTAIL_CACHE": str(folder / "cache"),
            "MEMTAIL_DEVICES": "cpu",
            "OMP_NUM_THREADS": "1",
            **settings,
        }
        self.services: list[Service] = []

    def __enter__(self) -> "Cluster":
        self.redis.start()
        return self

    def __exit__(self, *_: object) -> None:
        for service in self.services:
            service.kill()
        self.redis.stop()

    def start(self, name: str, prefix: tuple[str, ...] = (), **environment: str) -> Service:
        log = self.folder / f"{name}-{len(self.services)}.log"
        service = Service(name, {**self.environment, **environment}, log, prefix)
        self.services.append(service)
        return service.start()

    def submit(self, experiment: Experiment, dataset: ImageDataset) -> ExperimentStore:
        stage(dataset, self.store)
        experiment_store = ExperimentStore(self.store, experiment.name)
        experiment_store.register(declare(experiment, dataset))
        return experiment_store

    def until(self, condition: Callable[[], Any], seconds: float = 90) -> float:
        """Wait until a condition is true; returns the seconds waited."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, self.logs()
            time.sleep(0.05)
        return time.monotonic() - began

    def until_published(self, experiment_store: ExperimentStore, trials: int, seconds: float = 90) -> float:
        """Wait until the published scores count a number of trials."""

        def published() -> bool:
            pointer = latest_version(self.store, experiment_store.name)
            return pointer is not None and pointer["summary"]["trials"] + pointer["summary"]["diverged"] >= trials

        return self.until(published, seconds)

    def scores(self, name: str) -> dict[str, bytes]:
        """Return the published score files."""
        pointer = latest_version(self.store, name)
        assert pointer is not None
        return {file: self.store.get(keys.scores(name, pointer["version"]) + file) for file in pointer["files"]}

    def serves(self, service: Service) -> bool:
        """Return whether a service is ready."""
        http = urllib3.PoolManager(retries=False)
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            return http.request("GET", f"http://127.0.0.1:{service.port}/readyz", timeout=5).status == 200
        return False

    def logs(self) -> str:
        return "\n".join(f"== {service.log.name}\n{service.log.read_text()[-4000:]}" for service in self.services)

    def events(self, service: Service, event: str) -> Iterator[str]:
        """Iterate over the lines of a service's log with an event."""
        return (line for line in service.log.read_text().splitlines() if f'"event": "{event}"' in line)
