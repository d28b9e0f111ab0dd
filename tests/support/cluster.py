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
from typing import Any, Self

import redis
import urllib3

from memtail.datasets import ImageDataset
from memtail.datasets.staged_dataset import stage
from memtail.execution.declare import declare
from memtail.experiment_store import Control, ExperimentStore, experiment_names
from memtail.scores.pointer import latest_version
from memtail.spec import Experiment
from memtail.storage import keys
from memtail.storage.identity import make_identity
from memtail.storage.s3 import S3Store
from memtail.trainers.images.shard_size import checked_shard_size
from services.common.broker import Broker
from services.common.settings import ServiceSettings
from tests.support import versions
from tests.support.faulty_models import Gate
from tests.support.servers import MinioServer, free_port, server_binary

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

    @property
    def running(self) -> bool:
        """Whether the process is running."""
        return self._process is not None and self._process.poll() is None

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
    """One service process with its log; `special` if its settings differ from the defaults."""

    def __init__(
        self,
        name: str,
        environment: dict[str, str],
        log: Path,
        prefix: tuple[str, ...] = (),
        code: Path = PROJECT,
        special: bool = False,
    ) -> None:
        self.name, self._environment, self.log, self._prefix, self._code = name, environment, log, prefix, code
        self.special = special
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Service":
        environment = {"MEMTAIL_PORT": str(free_port()), **self._environment}
        self.port = environment["MEMTAIL_PORT"]
        with self.log.open("ab") as output:
            command = [*self._prefix, sys.executable, "-m", f"services.{self.name}"]
            self._process = subprocess.Popen(command, cwd=self._code, env=environment, stdout=output, stderr=output, start_new_session=True)
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
        """Stop the process as Kubernetes does: SIGTERM, then SIGKILL after a timeout."""
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
        self._started = 0

    def __enter__(self) -> Self:
        self.redis.start()
        return self

    def __exit__(self, *_: object) -> None:
        for service in self.services:
            service.kill()
        self.redis.stop()

    def start(self, name: str, prefix: tuple[str, ...] = (), code: Path = PROJECT, **environment: str) -> Service:
        """Start a service; `code` is the folder of its version of the packages."""
        self._started += 1
        log = self.folder / f"{name}-{self._started}.log"
        complete = {**self.environment, **(versions.environment(code) if code != PROJECT else {}), **environment}
        service = Service(name, complete, log, prefix, code, special=bool(prefix or environment))
        self.services.append(service)
        return service.start()

    def submit(self, experiment: Experiment, dataset: ImageDataset) -> ExperimentStore:
        stage(dataset, self.store)
        experiment_store = ExperimentStore(self.store, experiment.name)
        experiment_store.register(declare(experiment, dataset, checked_shard_size(experiment, dataset)))
        return experiment_store

    def settings(self, **settings: Any) -> ServiceSettings:
        """Return the settings of the services, with which a test reaches their keys in Redis."""
        own = {"store": self.store.address, "identity": make_identity(self.store), "broker": self.redis.url}
        return ServiceSettings(**{**own, **settings})

    def broker(self) -> Broker:
        """Open the queue and the leases."""
        return Broker(self.settings())

    def until(self, condition: Callable[[], Any], seconds: float = 90, poll_seconds: float = 0.05) -> float:
        """Wait until a condition is true; returns the seconds waited."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, self.logs()
            time.sleep(poll_seconds)
        return time.monotonic() - began

    def until_published(self, experiment_store: ExperimentStore, trials: int, seconds: float = 90, poll_seconds: float = 0.05) -> float:
        """Wait until the published scores count a number of trials."""

        def published() -> bool:
            pointer = latest_version(self.store, experiment_store.name)
            return pointer is not None and pointer.summary.accumulated_trials >= trials

        return self.until(published, seconds, poll_seconds)

    def scores(self, name: str) -> dict[str, bytes]:
        """Return the published score files."""
        pointer = latest_version(self.store, name)
        assert pointer is not None
        return {file: self.store.get(keys.scores(name, pointer.version) + file) for file in pointer.files}

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

    def log_lines(self, name: str, event: str, experiment: str) -> list[str]:
        """Return the log lines with an event of an experiment, of all services of a name."""
        mine = (service for service in self.services if service.name == name)
        return [line for service in mine for line in self.events(service, event) if f'"experiment": "{experiment}"' in line]


class LivingCluster(Cluster):
    """A cluster shared by many tests: one dispatcher, two workers and an aggregator, which are replaced after a test ended them.

    Its workers train `gated` models as `gate` permits, and mark injected faults in the folder `faults` (see `tests.support.faulty_models`).
    """

    _KINDS = {"dispatcher": 1, "worker": 2, "aggregator": 1}  # noqa: RUF012 - never changed

    def __init__(self, folder: Path, minio: MinioServer) -> None:
        self.gate, self.faults = Gate(folder / "gate"), folder / "faults"
        self.faults.mkdir()
        quick = {"MEMTAIL_RESYNC_SECONDS": "1", "MEMTAIL_PUBLISH_SECONDS": "1"}
        super().__init__(folder, minio, GATE_FOLDER=str(folder / "gate"), FAULT_FOLDER=str(self.faults), **quick)

    def kinds(self, name: str) -> list[Service]:
        """Return the services of a name."""
        return [service for service in self.services if service.name == name]

    def end(self, *services: Service) -> None:
        """End services without restarting them."""
        for service in services:
            service.kill()
            self.services.remove(service)
        # a message that Redis sends to an ended worker is lost to the test, so wait until it has closed their connections
        self.until(lambda: self.redis.client().info("clients")["blocked_clients"] <= len(self.kinds("worker")))
        for _ in range(2):
            self.redis.client().ping()

    def replace(self, name: str, prefix: tuple[str, ...] = (), **environment: str) -> Service:
        """Replace all services of a name by one with other settings."""
        self.end(*self.kinds(name))
        return self.start(name, prefix, **environment)

    def restore(self) -> None:
        """Restore the initial state: no experiments, a closed gate, and all services running with default settings."""
        if not self.redis.running:
            self.redis.start()
        self.end(*(service for service in self.services if service.special or service.process.poll() is not None))
        for name, count in self._KINDS.items():
            self.end(*self.kinds(name)[count:])
            for _ in range(count - len(self.kinds(name))):
                self.start(name)
        self._finish_all()
        self.gate.close()
        for mark in self.faults.iterdir():
            mark.unlink()

    def _finish_all(self) -> None:
        """Cancel all experiments, and remove them when no worker trains them."""
        names = experiment_names(self.store)
        for name in names:
            ExperimentStore(self.store, name).set_control(Control("cancelled"))
        self.gate.open()
        broker = self.broker()
        if names:
            self.until(lambda: not broker.leased() and not broker.waiting())
        for key in list(self.store.list("experiments/")):
            self.store.delete(key)
